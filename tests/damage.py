"""Damages copies of video files in every way a disk and a network know, and reads them: frames or one clear error each.

python tests/damage.py CLIP... [--copies 1000]     prints what became of them, the slowest, and the growth of the memory
"""

import argparse
import collections
import io
import resource
import sys
import tempfile
import time
import wave
from pathlib import Path

import av
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import IGNORED, Clip, VideoDataset

WAYS = (
    "truncated",
    "bits flipped",
    "spliced",
    "zeroed",
    "no start",
    "no keyframes",
    "empty",
    "text",
    "other suffix",
    "audio only",
)


def damage(way, clip, other, rng):
    """The bytes of the file `clip`, damaged; `other` is the file from which foreign bytes come."""
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
    if way == "no keyframes":
        return without_keyframes(clip, rng)
    if way == "audio only":
        return silence()
    return {"empty": b"", "text": b"<html>404 Not Found</html>" * 40, "other suffix": whole}[way]


def without_keyframes(clip, rng):
    """A Matroska file of the packets of `clip` that are no keyframes, or of a random stretch of them."""
    file = io.BytesIO()
    with av.open(str(clip)) as source, av.open(file, "w", format="matroska") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        packets = [p for p in source.demux(stream) if p.size and p.dts is not None and not p.is_keyframe]
        start = rng.integers(len(packets)) if rng.random() < 0.5 else 0
        for packet in packets[start : start + rng.integers(1, len(packets) + 1)]:
            packet.stream = copy
            target.mux(packet)
    return file.getvalue()


def silence():
    """A WAV file of half a second."""
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
    """-> {(way, "frames" or "error" or what is unclear): n}, the slowest read in seconds, growth of the memory in MB"""
    rng, outcomes, slowest, before = np.random.default_rng(seed), collections.Counter(), 0.0, None
    with tempfile.TemporaryDirectory() as folder:
        for i in range(copies):
            way, clip, other = WAYS[i % len(WAYS)], clips[rng.integers(len(clips))], clips[rng.integers(len(clips))]
            suffix = rng.choice([".mp4", ".avi", ".mkv", ".txt"]) if way == "other suffix" else clip.suffix
            path = Path(folder) / f"{i}{suffix}"
            path.write_bytes(damage(way, clip, other, rng))
            started = time.monotonic()
            video, label, read, problem = VideoDataset([Clip(str(path), 0)], 8, 64)[0]
            slowest = max(slowest, time.monotonic() - started)
            if label == 0 and not problem and video.shape == (1, 8, 3, 64, 64) and read == str(path):
                outcomes[way, "frames"] += 1
            elif label == IGNORED and problem.count("\n") == 0 and str(path) in problem:
                outcomes[way, "error"] += 1
            else:
                outcomes[way, f"unclear: {problem!r}"] += 1
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
    for way in WAYS:
        print(f"{way}:", ", ".join(f"{n} {what}" for (how, what), n in sorted(outcomes.items()) if how == way))
    clear = sum(n for (_, what), n in outcomes.items() if what in ("frames", "error"))
    print(f"{clear} of {args.copies} clear; slowest {slowest:.1f} s, memory grew by {growth:.1f} MB")
    sys.exit(clear != args.copies or slowest > 10)


if __name__ == "__main__":
    main()
