"""Benchmarks, as commands.

    python tests/bench.py train                      a training step of every method beside the plain ViT's
    python tests/bench.py train --method aim --batch-size 4 --precision fp32 bf16 --no-compile
    python tests/bench.py decode CLIP...             8 frames of 224 from each clip: ours, PyAV, decord, torchcodec
    python tests/bench.py augment                    RandAugment: ours beside torchvision's
    python tests/bench.py feed --method aim --data k400 --data-root ...    how many cores feed a training step

A step is train.py's: uint8 clips (random ones) to floats, forward, loss, backward, fused AdamW. `of ViT` is its time
beside the plain ViT's own forward and backward, all weights with gradients; `of products` beside its matrix products
alone: the same shapes as bare torch.mm, forward and backward. Each variant has a process of its own, for its memory;
on a CPU, whose speed wanders, they take turns and neighbours in time are compared. MFU is of the GPU's dense peak.
Decoding is counted in the CPU time of one core; decord and torchcodec take part where they are installed.
`feed` takes what train.py takes. It never reads weights: random ones take the same time.
"""

import argparse
import collections
import contextlib
import math
import multiprocessing
import os
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from operator import truediv
from pathlib import Path

import av
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import data
import train

ADAPTED = ("aim", "st_adapter", "zeroi2v", "side4video")
PEAKS = {  # dense TFLOP/s in half precision, by a part of the GPU's name, as the makers print them
    "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125, "RTX 4090": 165,
    "V100": 125, "T4": 65,
}  # fmt: skip


class Products(TorchDispatchMode):
    """Counts the shapes of the matrix products that run under it."""

    def __init__(self):
        super().__init__()
        self.shapes = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        factors = {torch.ops.aten.mm.default: args[:2], torch.ops.aten.addmm.default: args[1:3]}.get(function)
        if factors:
            self.shapes[(*factors[0].shape, factors[1].shape[1])] += 1
        return function(*args, **(kwargs or {}))


def stepper(method, variant, precision, args):
    """-> a function that takes one training step, and the step's products and FLOPs as eager PyTorch has them"""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    cls, recipes, *_ = train.METHODS["finetune" if variant == "plain ViT" else method]
    keywords = recipes[args.recipe].get("model", {})
    clip = common.ViT(**getattr(common, args.backbone), quick_gelu=True)
    model = cls(clip, 400, num_frames=args.frames, **keywords).to(device).train()
    run, world = dict(weight_decay=0.05, embedding_lr=1.0), train.World(device, train.DTYPES[precision])
    if variant == "--recompute":
        common.recompute(model)
    common.cast_frozen(model, world.dtype)
    optimizer = torch.optim.AdamW(train.parameter_groups(model, run), lr=1e-6, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    forward = torch.compile(model) if variant == "--compile" else model
    video = torch.randint(256, (args.batch_size, args.frames, 3, 224, 224), dtype=torch.uint8, device=device)
    label = torch.randint(400, (args.batch_size,), device=device)

    def forward_backward(forward):
        with world.autocast():
            loss = model.loss(forward(common.normalize(video, model.vit)), label).mean()
        scaler.scale(loss).backward()

    def step():
        forward_backward(forward)
        if variant != "plain ViT":
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    with Products() as products, FlopCounterMode(display=False) as flops:
        forward_backward(model)
    optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return step, products.shapes, flops.get_total_flops()


STEP = None  # of the process of a variant


def set_up(*what):
    global STEP
    STEP, shapes, flops = stepper(*what)
    STEP()
    return shapes, flops


def set_up_products(shapes, precision):
    global STEP
    sizes = {shape: (shape[:2], shape[1:]) for shape in shapes}
    factors = {shape: [torch.randn(s, dtype=train.DTYPES[precision]) for s in two] for shape, two in sizes.items()}

    def products():
        for shape, times in shapes.items():
            for _ in range(times):
                torch.mm(*factors[shape])

    STEP = products
    STEP()


def take_step():
    began = time.perf_counter()
    STEP()
    return time.perf_counter() - began


def peak_gib():
    """The most that was in use: of the GPU's memory by tensors, or of the computer's by this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def time_steps(args):
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    args.turns, args.batch_size = args.turns or (20 if gpu else 5), args.batch_size or (32 if gpu else 1)
    variants = ["plain ViT", "", "--recompute"] + ["--compile"] * args.compile
    peak = next((tflops for name, tflops in PEAKS.items() if name in (gpu or "")), None)
    print(
        f"{args.backbone}, {args.batch_size} clips of {args.frames} frames a step, {gpu or 'CPU'}, {args.turns} turns"
    )
    columns = ("s a step", "clips/s", "peak GiB", "of ViT", "of products", "MFU")
    print(f"{'':36}", *(f"{column:>11}" for column in columns), flush=True)
    for method in args.method:
        for precision in args.precision or default_precisions(gpu):
            seconds, memory, flops = time_variants(variants, method, precision, args)
            for variant, times in seconds.items():
                if variant == "products":
                    continue
                # Neighbours in time, since a machine's speed wanders.
                beside = {n: statistics.median(map(truediv, times, seconds[n])) for n in seconds if n in BESIDE}
                cells = [statistics.median(times), args.batch_size / statistics.median(times), memory[variant]]
                cells += [beside["plain ViT"], beside.get("products"), None]
                if variant == "plain ViT":
                    cells[4] = None
                elif peak and precision != "fp32":
                    cells[5] = flops / cells[0] / peak / 1e12
                label = f"plain ViT, {precision}" if variant == "plain ViT" else f"{method}, {precision} {variant}"
                print(f"{label:36}", *(f"{'-' if c is None else f'{c:.3f}':>11}" for c in cells), flush=True)


BESIDE = ("plain ViT", "products")


def time_variants(variants, method, precision, args):
    """-> {variant: seconds of each turn}, {variant: peak GiB}, FLOPs of the method's step as eager PyTorch has them"""
    spawn, pools, seconds, memory = multiprocessing.get_context("spawn"), {}, collections.defaultdict(list), {}

    def start(name, *what):
        pools[name] = ProcessPoolExecutor(1, mp_context=spawn)
        return pools[name].submit(*what).result()

    def take_turns(names):
        for _ in range(args.turns):
            for name in names:
                seconds[name].append(pools[name].submit(take_step).result())
        for name in names:
            memory[name] = pools[name].submit(peak_gib).result()
            pools.pop(name).shutdown()

    for variant in variants:
        shapes, count = start(variant, set_up, method, variant, precision, args)
        if variant == "":
            flops = count
            if not torch.cuda.is_available():
                start("products", set_up_products, shapes, precision)
        if torch.cuda.is_available():  # one after the other: each has the GPU's memory to itself
            take_turns([variant])
    take_turns(list(pools))
    return seconds, memory, flops


def default_precisions(gpu):
    """A CPU without units for bf16 takes minutes a step in it; ask for it with --precision."""
    if gpu:
        return ["bf16", "fp16", "fp32"]
    cpu = Path("/proc/cpuinfo")
    return ["fp32"] + ["bf16"] * (cpu.exists() and "bf16" in cpu.read_text())


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


def time_augmentation(args):
    """With AIM's recipe for SSv2, of random pixels in the layout that a reader gives them."""
    torch.set_num_threads(1)
    video = torch.randint(256, (8, 256, 340, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    change, ours = data.train_transform(224, crop=(0.08, 1.0), randaugment=(4, 7.0)), data.RandAugment
    seconds = {"torchvision's": [], "ours": []}
    for turn in range(args.turns + 1):  # the first warms up
        for name, cls in (("torchvision's", v2.RandAugment), ("ours", ours)):
            data.RandAugment = cls
            torch.manual_seed(turn)
            began = time.process_time()
            for _ in range(20):
                change(video)
            seconds[name] += [(time.process_time() - began) / 20] if turn else []
    ratio = statistics.median(map(truediv, *seconds.values()))
    for name, times in seconds.items():
        print(f"{name:14}{1 / statistics.median(times):7.0f} clips per second of one core (crop and RandAugment)")
    print(f"ours is {ratio:.2f} times as fast")


def time_feeding(argv):
    """The loader's clips per second for 1, 2, ... workers, beside what the training step needs."""
    job, flags = train.parse(argv)
    run = train.settings(flags | {"pretrained": "none"})
    splits = data.find_clips(run["data"], **{n.replace("data_root", "root"): run[n] for n in train.PLACES})
    world = train.World.here(job["device"], run["precision"])
    model = train.build(run, splits.classes).to(world.device).train()
    common.cast_frozen(model, world.dtype)
    if run["recompute"]:
        common.recompute(model)
    forward = torch.compile(model) if run["compile"] else model
    train_set, _ = data.datasets(run, splits, "val", model.vit.image_size)
    train_set.kept = None  # every clip is decoded, as of a large dataset

    size = run["batch_size"] // run["accumulate"] if world.device.type == "cuda" else 2
    shape = (size, run["num_frames"], 3, *[model.vit.image_size] * 2)
    video = torch.randint(256, shape, dtype=torch.uint8, device=world.device)
    label = torch.zeros(size, dtype=torch.long, device=world.device)
    optimizer, times = torch.optim.AdamW(train.parameter_groups(model, run), lr=1e-6, fused=True), []
    for _ in range(6):
        began = time.perf_counter()
        with world.autocast():
            loss = model.loss(forward(common.normalize(video, model.vit)), label)
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    need = size / statistics.median(times[2:])
    print(
        f"a training step takes {need:.1f} clips per second ({run['method']}, {run['backbone']}, {world.device.type})"
    )

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    items = np.random.default_rng(0).integers(len(train_set), size=24).tolist()
    decoding, whole = 0.0, 0.0
    for item in [items[0], *items]:
        started = time.process_time()
        with contextlib.suppress(data.VideoError):
            train_set.read(train_set.clips[item].path, np.random.default_rng(0))
        middle = time.process_time()
        train_set[item]
        if item is not items[0] or decoding:
            decoding, whole = decoding + middle - started, whole + time.process_time() - middle
        else:
            decoding, whole = 1e-9, 1e-9  # the first one warms up
    one = len(items) / whole
    parts = (
        f"decoding alone {len(items) / decoding:.1f}, augmentation alone {len(items) / max(whole - decoding, 1e-9):.1f}"
    )
    print(f"one core gives {one:.1f} clips per second: {parts}")
    torch.set_num_threads(threads)

    best, cores = 0.0, os.cpu_count()
    for workers in sorted({*(2**k for k in range(8) if 2**k <= cores), cores}):
        batch = max(run["batch_size"] // 8, 4)
        batches = [
            np.random.default_rng(k).integers(len(train_set), size=batch).tolist() for k in range(4 * workers + 4)
        ]
        loader = iter(data.loader(train_set, batches, workers))
        for _ in range(workers):
            next(loader)  # every worker has started
        began, clips = time.perf_counter(), 0
        for item, *_ in loader:
            clips += len(item)
        pace = clips / (time.perf_counter() - began)
        best = max(best, pace)
        print(f"{workers:4} workers: {pace:8.1f} clips per second", flush=True)
    enough = math.ceil(need / one)
    if best >= need:
        print(f"The training step limits; about {enough} cores for loading are enough.")
    else:
        print(
            f"Loading limits: it gives {best:.0f} of {need:.0f} clips per second; about {enough} cores would be enough."
        )


def main():
    if sys.argv[1:2] == ["feed"]:  # whose flags are train.py's
        return time_feeding(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    steps = what.add_parser("train", help="step times")
    steps.add_argument("--method", nargs="+", choices=list(train.METHODS), default=ADAPTED)
    steps.add_argument("--backbone", choices=("B16", "L14"), default="B16")
    steps.add_argument("--recipe", default="k400")
    steps.add_argument("--frames", type=int, default=8)
    steps.add_argument("--batch-size", type=int, help="(default: 32 on a GPU, 1 on a CPU)")
    steps.add_argument(
        "--precision", nargs="+", choices=train.DTYPES, help="(default: all that the machine is made for)"
    )
    steps.add_argument("--no-compile", dest="compile", action="store_false", help="compiling takes minutes")
    steps.add_argument("--turns", type=int)
    decode = what.add_parser("decode", help="reading frames")
    decode.add_argument("clips", nargs="+", type=Path)
    decode.add_argument("--turns", type=int, default=9)
    augment = what.add_parser("augment", help="RandAugment")
    augment.add_argument("--turns", type=int, default=9)
    what.add_parser("feed", help="how many cores feed a training step; its flags are those of train.py")
    args = parser.parse_args()
    {"train": time_steps, "decode": time_decoding, "augment": time_augmentation}[args.what](args)


if __name__ == "__main__":
    main()
