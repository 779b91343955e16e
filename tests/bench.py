"""Benchmarks, as commands.

    python tests/bench.py train                      step time of every method beside the plain ViT's, in the same run
    python tests/bench.py train --method aim --batch-size 4 --precision bf16

A step is forward, backward and AdamW on random clips; the variants take turns, and medians are compared.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
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
    time_steps(parser.parse_args())


if __name__ == "__main__":
    main()
