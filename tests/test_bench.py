"""The benchmarks run, and their figures are of what they say. Their times are nobody's promise."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from colab import toy

ROOT = Path(__file__).resolve().parent.parent


def bench(*argv):
    result = subprocess.run(
        [sys.executable, "tests/bench.py", *map(str, argv)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_feed_says_what_limits_and_how_many_cores_are_enough(tmp_path):
    for split in ("train", "val"):
        for name in ("grows", "shrinks"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                toy.write_video(tmp_path / split / name / f"{i}.mp4", toy.clip(name, np.random.default_rng(i)))
    said = bench("feed", "--method", "aim", "--recipe", "toy", "--data", tmp_path, "--batch-size", 4)
    need = float(re.search(r"a training step takes ([\d.]+) clips per second \(aim, ViT-Toy-16, \w+\)", said)[1])
    one, decoding, augmenting = map(
        float, re.search(r"one core gives ([\d.]+) .* ([\d.]+), .* ([\d.]+)$", said, re.M).groups()
    )
    assert need > 0 and one < min(decoding, augmenting)
    workers = [int(n) for n in re.findall(r"^ *(\d+) workers: ", said, re.M)]
    assert workers[0] == 1 and workers == sorted(set(workers))
    cores = int(re.search(r"(?:training step|Loading) limits.* about (\d+) cores", said)[1])
    assert cores == -(-need // one) or abs(cores - need / one) < 1.1  # the printed figures are rounded


def test_augment_compares_both_in_one_run():
    said = bench("augment", "--turns", 1)
    assert re.search(r"torchvision's +\d+ clips per second.*\nours +\d+ clips.*\nours is [\d.]+ times as fast", said)
