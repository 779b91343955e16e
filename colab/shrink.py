"""`python data.py shrink --data DATA --out DST`: a dataset as videos that are small and fast to decode."""

import os
import shutil
import time
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch
from tqdm import tqdm

from colab.videos import each
from data import SPLITS, VIDEO, FrameFolder, VideoError, find_clips, one_error, open_video, segments, walk

RATE = 25  # frames per second of what does not tell its own


def frames_of(video, short_side):
    """Yields all frames in order, uint8 (H, W, 3), RGB, upright"""
    if isinstance(video, FrameFolder):
        for n in range(len(video)):
            yield video.read([n], short_side)[0]
        return
    with video.open() as container:
        for frame in container.decode(video=0):
            yield video.upright_rgb(frame, short_side)


def write(video, path, short_side, keyframes):
    """Writes all frames of a video as H.264 in an MP4 file, without audio. Raises VideoError."""
    rate, stream = RATE, None
    if not isinstance(video, FrameFolder):
        with video.open() as container:
            rate = container.streams.video[0].average_rate or RATE
    # A keyframe every so often, and nothing that makes decoding slow (fastdecode).
    gop = f"keyint={keyframes}:min-keyint={keyframes}:scenecut=0"
    options = {"tune": "fastdecode", "x264-params": gop}
    with av.open(str(path), "w", format="mp4") as container:
        written = 0
        for pixels in islice(frames_of(video, short_side), len(video)):
            height, width = (side + side % 2 for side in pixels.shape[:2])  # H.264 stores colours of 2 x 2 pixels
            if stream is None:
                stream = container.add_stream("libx264", rate=rate, options=options)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                stream.codec_context.thread_count = 1  # there is a process per core
            if (width, height) != (stream.width, stream.height):
                raise VideoError(f"{video.path}: its frames differ in size")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame.reformat(width, height, "yuv420p")))
            written += 1
        if written < len(video):
            raise VideoError(f"{video.path}: damaged, not all of its {len(video)} frames can be decoded")
        container.mux(stream.encode())  # what the encoder still holds


def shrink_one(job):
    """(source, target, short_side, keyframes) -> what was wrong, or "". A target that exists already is left alone."""
    source, target, *how = job
    beside = Path(f"{target}.partial")
    try:
        if not os.path.exists(target):
            beside.parent.mkdir(parents=True, exist_ok=True)
            with one_error(source, "cannot be rewritten"):
                write(open_video(source), beside, *how)
            beside.replace(target)
        return ""
    except VideoError as error:
        beside.unlink(missing_ok=True)
        return str(error)


def size_of(path):
    folder = os.path.isdir(path)
    return sum(entry.stat().st_size for entry in os.scandir(path)) if folder else os.path.getsize(path)


def seconds_to_read(path):
    """Of one core: eight frames, one from each of eight segments, as a model of 224 pixels reads them."""
    rng, length, began = np.random.default_rng(0), len(open_video(path)), time.process_time()
    for _ in range(3):
        open_video(path).read(segments(length, 8, rng), short_side=448)
    return (time.process_time() - began) / 3


def shrink(args):
    """Rewrites every video of a dataset into the folder `--out`, where the same training command then works."""
    data = find_clips(args.data, args.data_root, args.val_data, args.annotations, args.fold)
    root = Path(args.data_root or (args.data if os.path.isdir(args.data) else Path(args.data).parent)).absolute()
    if args.out.absolute().is_relative_to(root):
        raise ValueError(f"--out {args.out} must not lie inside of {root}, whose videos are read")
    if args.keyframes < 1 or args.short_side < 2:
        raise ValueError("--keyframes must be at least 1, and --short-side at least 2")
    jobs, is_list = {}, bool(args.val_data)
    for path in sorted({os.path.abspath(clip.path) for split in SPLITS for clip in getattr(data, split)}):
        if not Path(path).is_relative_to(root):
            raise ValueError(f"{path} lies outside of {root}: name the folder of all videos with --data-root")
        # A list file names each path, which therefore stays; elsewhere a folder of frames needs a suffix to be found.
        suffix = "" if is_list or VIDEO.search(path) else ".mp4"
        jobs[path] = f"{args.out.absolute() / os.path.relpath(path, root)}{suffix}"
    for file in walk(root)[1].values():
        if file.suffix in (".csv", ".json", ".txt"):
            copy = args.out / file.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)

    work = [(source, target, args.short_side, args.keyframes) for source, target in jobs.items()]
    results = tqdm(each(shrink_one, work, args.workers), total=len(work), unit="video", dynamic_ncols=True)
    problems = [
        f"{path}: it ends the process that reads it" if why is None else why for path, why in zip(jobs, results)
    ]
    done = [job for job, problem in zip(jobs.items(), problems) if not problem]
    before, after = (sum(map(size_of, paths)) for paths in (list(zip(*done)) or [(), ()]))
    print(f"{len(done):,} of {len(jobs):,} videos are in {args.out}; bytes {before:,} -> {after:,}")
    if done:
        torch.set_num_threads(1)
        some = done[:: -(-len(done) // 8)]
        old, new = (sum(map(seconds_to_read, paths)) / len(some) for paths in zip(*some))
        speeds = f"{1 / old:.0f} -> {1 / new:.0f} clips per second of one core, {old / new:.1f} times as many"
        print(f"decoding 8 frames of 224 pixels, measured on {len(some)} videos: {speeds}")
    broken = [problem for problem in problems if problem]
    print(*[f"{len(broken)} cannot be read:" if broken else "all could be read", *broken[:10]], sep="\n  ")
