"""Benchmarks, as commands.

    python tests/bench.py train                      step time of every method beside the plain ViT's, in the same run
    python tests/bench.py train --method aim --batch-size 4 --precision bf16
    python tests/bench.py decode CLIP...             8 frames of 224 from each clip: ours, PyAV, decord, torchcodec

A step is forward, backward and AdamW on random clips; the variants take turns, and medians are compared. Decoding is
counted in the CPU time of one core; decord and torchcodec take part where they are installed, in their own processes.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import av
import numpy as np
import torch
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import data
import train

ADAPTED = ("aim", "st_adapter", "zeroi2v", "side4video")


def stepper(method, args, device, redo=False):
    """A function that takes one training step of a method on random clips and waits for its end."""
    cls, recipes = train.METHODS[method]
    keywords = recipes[args.recipe].get("model", {}) if args.recipe in recipes else {}
    model = cls(common.ViT(**getattr(common, args.backbone)), 400, num_frames=args.frames, **keywords).to(device)
    if redo:
        common.recompute(model)
    if device.type == "cuda" and args.precision != "fp32":
        common.cast_frozen(model, train.DTYPES[args.precision])
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)
    video = torch.randn(args.batch_size, args.frames, 3, 224, 224, device=device)
    run = {"precision": args.precision}

    def step():
        with train.autocast(run, device):
            loss = model(video).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def time_steps(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = {"plain ViT, all weights": stepper("finetune", args, device)}
    for method in args.method:
        steps[method] = stepper(method, args, device)
        steps[f"{method} --recompute"] = stepper(method, args, device, redo=True)
    seconds = {name: [] for name in steps}
    for turn in range(args.turns + 1):  # the first warms up
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    plain = statistics.median(seconds["plain ViT, all weights"])
    print(f"{args.backbone}, {args.batch_size} clips of {args.frames} frames, {args.precision}, {device}")
    print(f"{'':28}{'s a step':>10}{'of plain ViT':>14}{'of kept':>10}")
    for name, times in seconds.items():
        median = statistics.median(times)
        kept = seconds[name.removesuffix(" --recompute")]
        # Neighbours in time are compared, since a machine's speed wanders.
        ratio = statistics.median(a / b for a, b in zip(times, kept))
        print(f"{name:28}{median:10.3f}{median / plain:14.2f}{ratio:10.2f}")


def ours(path, numbers):
    frames = torch.from_numpy(data.open_video(path).read(numbers, short_side=448)).permute(0, 3, 1, 2)
    return v2.functional.center_crop(v2.functional.resize(frames, [224]), [224, 224])


def every_frame(path, numbers):
    """PyAV in sequence; the chosen frames are converted."""
    wanted = set(numbers.tolist())
    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_count = 1
        decoded = enumerate(container.decode(container.streams.video[0]))
        frames = np.stack([frame.to_ndarray(format="rgb24") for i, frame in decoded if i in wanted])
    return v2.functional.center_crop(
        v2.functional.resize(torch.from_numpy(frames).permute(0, 3, 1, 2), [224]), [224, 224]
    )


def with_decord(path, numbers):
    import decord

    frames = torch.from_numpy(decord.VideoReader(path, num_threads=1).get_batch(numbers).asnumpy()).permute(0, 3, 1, 2)
    return v2.functional.center_crop(v2.functional.resize(frames, [224]), [224, 224])


def with_torchcodec(path, numbers):
    from torchcodec.decoders import VideoDecoder

    frames = VideoDecoder(path, num_ffmpeg_threads=1).get_frames_at(numbers.tolist()).data
    return v2.functional.center_crop(v2.functional.resize(frames, [224]), [224, 224])


READERS = {"ours": ours, "PyAV, every frame": every_frame, "decord": with_decord, "torchcodec": with_torchcodec}


def cpu_seconds(name, clip, numbers):
    """Of one core, for one clip; or why the reader cannot be used."""
    torch.set_num_threads(1)
    started = time.process_time()
    try:
        READERS[name](clip, numbers)
    except (ImportError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return time.process_time() - started


def time_decoding(args):
    clips = [(str(clip), len(data.open_video(clip))) for clip in args.clips]
    spawn = multiprocessing.get_context("spawn")  # two copies of FFmpeg do not share a process well
    pools = {name: ProcessPoolExecutor(1, mp_context=spawn) for name in READERS}
    seconds = {name: {clip: [] for clip, _ in clips} for name in READERS}
    for turn in range(args.turns + 1):  # the first warms up
        for clip, num_frames in clips:
            numbers = data.segments(num_frames, 8, np.random.default_rng(turn))
            for name, pool in list(pools.items()):
                answer = pool.submit(cpu_seconds, name, clip, numbers).result()
                if isinstance(answer, str):
                    print(f"{name}: {answer}")
                    pools.pop(name).shutdown()
                elif turn:
                    seconds[name][clip].append(answer)
    print(f"clips a second of one core, 8 frames of 224 from {len(clips)} clips, T-segment sampling")
    for name, pool in pools.items():
        pool.shutdown()
        medians = [statistics.median(times) for times in seconds[name].values()]
        each = " ".join(f"{1 / median:.1f}" for median in medians)
        paired = [a / b for clip, _ in clips for a, b in zip(seconds[name][clip], seconds["ours"][clip])]
        total = len(clips) / sum(medians)
        print(f"{name:20}{total:8.1f}   each {each}   {statistics.median(paired):.2f} times the CPU time of ours")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    steps = what.add_parser("train", help="step times")
    steps.add_argument("--method", nargs="+", choices=list(train.METHODS), default=ADAPTED)
    steps.add_argument("--backbone", choices=("B16", "L14"), default="B16")
    steps.add_argument("--recipe", default="k400")
    steps.add_argument("--frames", type=int, default=8)
    steps.add_argument("--batch-size", type=int, default=1)
    steps.add_argument("--precision", choices=train.DTYPES, default="fp32")
    steps.add_argument("--turns", type=int, default=5)
    decode = what.add_parser("decode", help="reading frames")
    decode.add_argument("clips", nargs="+", type=Path)
    decode.add_argument("--turns", type=int, default=9)
    args = parser.parse_args()
    {"train": time_steps, "decode": time_decoding}[args.what](args)


if __name__ == "__main__":
    main()
