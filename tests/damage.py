"""Damages copies of video files in every way a disk and a network know, and reads them: frames or one clear error each.

python tests/damage.py CLIP... [--copies 1000]        prints what became of them, the slowest, and the memory's growth
"""

import argparse
import collections
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Clip, VideoDataset

WAYS = ("truncated", "bits flipped", "spliced", "zeroed", "empty", "text", "other suffix", "no start", "audio only")


def damage(way, clip, other, rng):
    """The bytes of `clip`, damaged."""
    whole = bytearray(clip.read_bytes())
    if way == "truncated":
        return whole[: rng.integers(1, len(whole))]
    if way == "bits flipped":
        for place in rng.integers(0, len(whole), rng.integers(1, 200)):
            whole[place] ^= 1 << rng.integers(8)
        return whole
    if way == "spliced":
        foreign = other.read_bytes()
        at, start = rng.integers(0, len(whole)), rng.integers(0, len(foreign))
        return whole[:at] + foreign[start : start + rng.integers(1, 50_000)] + whole[at:]
    if way == "zeroed":
        at, length = rng.integers(0, len(whole)), rng.integers(1, 20_000)
        whole[at : at + length] = bytes(len(whole[at : at + length]))
        return whole
    if way == "no start":
        return whole[rng.integers(1, len(whole)) :]
    return {"empty": b"", "text": b"<html>404 Not Found</html>" * 40, "other suffix": whole, "audio only": silence()}[
        way
    ]


def silence():
    """A WAV file of half a second."""
    import io
    import wave

    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(8000))
    return file.getvalue()


def megabytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def run(clips, copies, seed=0):
    """-> {"frames": n, "error": n, ...}, the slowest read in seconds, growth of the resident memory in MB"""
    rng, outcomes, slowest, before = np.random.default_rng(seed), collections.Counter(), 0.0, None
    with tempfile.TemporaryDirectory() as folder:
        for i in range(copies):
            way, clip, other = WAYS[i % len(WAYS)], clips[rng.integers(len(clips))], clips[rng.integers(len(clips))]
            suffix = rng.choice([".mp4", ".avi", ".mkv", ".txt"]) if way == "other suffix" else clip.suffix
            path = Path(folder) / f"{i}{suffix}"
            path.write_bytes(damage(way, clip, other, rng))
            started = time.monotonic()
            video, label, problem = VideoDataset([Clip(str(path), 0)], 8, 64)[0]
            slowest = max(slowest, time.monotonic() - started)
            if label == 0 and not problem and video.shape == (1, 8, 3, 64, 64):
                outcomes["frames"] += 1
            elif label == -1 and problem.count("\n") == 0 and str(path) in problem:
                outcomes["error"] += 1
            else:
                outcomes[f"unclear: {problem!r}"] += 1
            path.unlink()
            if i == copies // 5:  # the libraries have set up by then
                before = megabytes()
    return outcomes, slowest, megabytes() - before


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", nargs="+", type=Path)
    parser.add_argument("--copies", type=int, default=1000)
    args = parser.parse_args()
    outcomes, slowest, growth = run(args.clips, args.copies)
    print(dict(outcomes), f"slowest {slowest:.1f} s, memory grew by {growth:.1f} MB")
    sys.exit(outcomes.total() != outcomes["frames"] + outcomes["error"] or slowest > 10)


if __name__ == "__main__":
    main()
