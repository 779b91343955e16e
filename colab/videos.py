"""`python data.py check` reads every video of a dataset; `python data.py show` draws what a model sees of a clip.

`python data.py shrink` is in shrink.py.
"""

import argparse
import os
import signal
import sys
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager, suppress
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


@contextmanager
def processes(number):
    """A pool whose processes leave Ctrl-C to the main one, which then waits only for what is under way."""
    pool = ProcessPoolExecutor(number, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def each(function, items, workers):
    """Yields function(item) for each item, in order; None where that ended the process that computed it."""
    for start in range(0, len(items), 256):
        some, done = items[start : start + 256], 0
        with suppress(BrokenExecutor), processes(workers) as pool:
            for result in pool.map(function, some):
                yield result
                done += 1
        for item in some[done:]:  # a process ended: alone, each item shows whether it was the one
            result = None
            with suppress(BrokenExecutor), processes(1) as pool:
                result = pool.submit(function, item).result()
            yield result


def inspect_all(paths, workers):
    """Yields what `inspect` says of each path, even if reading it ends the process that does it."""
    for path, result in zip(paths, each(inspect, paths, workers)):
        yield result or (0, f"{path}: it ends the process that reads it, or takes over {LIMIT} s")


def check(args):
    """Reads every video of a dataset once, and lists the broken ones."""
    data = find_clips(args.data, args.data_root, args.val_data, args.annotations, args.fold)
    videos = {split: {clip.path for clip in getattr(data, split)} for split in SPLITS}
    counts = ", ".join(f"{len(paths):,} {split}" for split, paths in videos.items())
    captions = sum(map(len, data.captions.values()))
    labels = f"{captions:,} captions" if captions else f"{len(data.classes)} classes"
    print(f"{args.data}: {labels}; videos: {counts}", *data.missing, sep="\n")
    paths = sorted(set().union(*videos.values()))
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
    from colab.shrink import shrink

    parser = argparse.ArgumentParser(prog="data.py", description="Look at one video, or go through those of a dataset.")
    commands = parser.add_subparsers(dest="command", required=True)
    whole = argparse.ArgumentParser(add_help=False)
    whole.add_argument("--data", required=True, help=f"{', '.join(DATASETS)}, toy, a folder, or a list file")
    whole.add_argument("--data-root", default="", help="where its videos are")
    whole.add_argument("--val-data", default="", help="the list file to evaluate on, if --data is a list file")
    whole.add_argument("--annotations", default="", help="where its annotation files are (default: --data-root)")
    whole.add_argument("--fold", type=int, choices=(1, 2, 3), default=1, help="of UCF101 and HMDB51 (default: 1)")
    whole.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    p = commands.add_parser("check", parents=[whole], help="read every video of a dataset once and say what is wrong")
    p.add_argument("--out", type=Path, default=Path("broken.txt"), help="the list to write (default: broken.txt)")
    p = commands.add_parser("shrink", parents=[whole], help="rewrite every video small and fast to decode")
    p.add_argument("--out", type=Path, required=True, help="the folder for the new dataset")
    p.add_argument("--keyframes", type=int, default=16, help="a keyframe every so many frames (default: 16)")
    p.add_argument("--short-side", type=int, default=256, help="in pixels; never enlarged (default: 256)")
    p = commands.add_parser("show", help="draw the frames that a model would see")
    p.add_argument("clip")
    p.add_argument("out", help="the .png file to write")
    p.add_argument("--frames", type=int, default=8)
    p.add_argument("--size", type=int, default=224)
    p.add_argument("--span", type=int, default=0, help="video frames that a clip covers; 0: T segments of the video")
    args = parser.parse_args(argv)
    try:
        {"check": check, "show": show, "shrink": shrink}[args.command](args)
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ndata.py: stopped", file=sys.stderr)
        sys.exit(130)
