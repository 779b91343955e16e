"""`python data.py check` reads every video of a dataset; `python data.py show` draws what a model sees of a clip."""

import argparse
import os
import signal
import sys
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torchvision.utils import save_image
from tqdm import tqdm

from data import DATASETS, SPLITS, Clip, VideoDataset, VideoError, find_clips, open_video

LIMIT = 600  # seconds that `check` gives a video
alarm = getattr(signal, "alarm", lambda seconds: None)  # Windows has no such clock


def inspect(path):
    """Decodes a whole video -> (number of frames, "") or (0, what is wrong)"""
    try:
        alarm(LIMIT)  # then the system ends this process: nothing else stops a decoder that hangs
        video = open_video(path)
        video.read(range(len(video)), short_side=16)
        return len(video), ""
    except VideoError as error:
        return 0, str(error)
    finally:
        alarm(0)


def inspect_all(paths, workers):
    """Yields what `inspect` says of each path, even if reading it ends the process that does it."""
    for start in range(0, len(paths), 256):
        some, results = paths[start : start + 256], {}
        with suppress(BrokenExecutor), ProcessPoolExecutor(workers) as pool:
            results.update(zip(some, pool.map(inspect, some)))
        for path in some:
            if path not in results:  # a process ended: alone, each video shows whether it was the one
                with suppress(BrokenExecutor), ProcessPoolExecutor(1) as pool:
                    results[path] = pool.submit(inspect, path).result()
            yield results.get(path, (0, f"{path}: it ends the process that reads it, or takes over {LIMIT} s"))


def check(args):
    """Reads every video of a dataset once, and lists the broken ones."""
    data = find_clips(args.data, args.data_root, args.val_data, args.annotations, args.fold)
    counts = ", ".join(f"{len(getattr(data, split)):,} {split}" for split in SPLITS)
    print(f"{args.data}: {len(data.classes)} classes; videos: {counts}", *data.missing, sep="\n")
    paths = sorted({clip.path for split in SPLITS for clip in getattr(data, split)})
    results = list(tqdm(inspect_all(paths, args.workers), total=len(paths), unit="video", dynamic_ncols=True))
    frames = [num_frames for num_frames, problem in results if not problem] or [0]
    print(f"frames per video: {min(frames)} to {max(frames)}, median {int(np.median(frames))}")
    broken = {path: problem for path, (_, problem) in zip(paths, results) if problem}
    print(f"{len(broken):,} of {len(paths):,} videos are broken", *list(broken.values())[:10], sep="\n  ")
    if broken:
        args.out.write_bytes(os.fsencode("".join(f"{os.path.abspath(path)}\n" for path in broken)))
        print(f"{args.out} lists them; train.py --skip {args.out} leaves them out")


def show(args):
    """Draws the T frames of a clip as in testing, then three times as in training."""
    clips, shape = [Clip(args.clip, 0)], dict(num_frames=args.frames, size=args.size, span=args.span)
    augment = dict(crop=(0.08, 1.0), flip=0.5, randaugment=(4, 7.0), erasing=0.25)
    trained = VideoDataset(clips, augment=augment, **shape)
    rows = [VideoDataset(clips, **shape).test_views(args.clip)[0], *(trained[i][0] for i in range(3))]
    save_image(torch.cat(rows) / 255, args.out, nrow=args.frames, pad_value=1.0)
    print(f"{args.out}: {args.frames} frames as in testing, and three times as in training")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="data.py", description="Look at one video, or read all videos of a dataset.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("check", help="read every video of a dataset once and say what is wrong")
    p.add_argument("--data", required=True, help=f"{', '.join(DATASETS)}, toy, a folder, or a list file")
    p.add_argument("--data-root", default="", help="where its videos are")
    p.add_argument("--val-data", default="", help="the list file to evaluate on, if --data is a list file")
    p.add_argument("--annotations", default="", help="where its annotation files are (default: --data-root)")
    p.add_argument("--fold", type=int, choices=(1, 2, 3), default=1, help="of UCF101 and HMDB51 (default: 1)")
    p.add_argument("--out", type=Path, default=Path("broken.txt"), help="the list to write (default: broken.txt)")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    p = commands.add_parser("show", help="draw the frames that a model would see")
    p.add_argument("clip")
    p.add_argument("out", help="the .png file to write")
    p.add_argument("--frames", type=int, default=8)
    p.add_argument("--size", type=int, default=224)
    p.add_argument("--span", type=int, default=0, help="video frames that a clip covers; 0: T segments of the video")
    args = parser.parse_args(argv)
    try:
        {"check": check, "show": show}[args.command](args)
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
