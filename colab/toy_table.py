"""What each method learns of the toy videos, beside its controls, and AIM's table 1 in small.

    python colab/toy_table.py                  trains what is missing in runs/toy-table and prints the README's tables
    python colab/toy_table.py --retrieval      the same for text-video retrieval, on toy_captions
    python colab/toy_table.py --checkpoints    trains the four methods, rows of that table 1, and retrieval, and writes
                                               them as colab/checkpoints/*.pt, which the labs load

All figures are of the test split, which nothing was tuned on: top-1 in percent over ten classes; for retrieval R@1 of
captions of which no two are equal, and how often a caption prefers its video to that video played backwards.
"""

import argparse
import copy
import statistics
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import train  # noqa: E402
from common import count_parameters, save  # noqa: E402
from data import VideoDataset, find_clips  # noqa: E402

METHODS = {"AIM": "aim", "ST-Adapter": "st_adapter", "ZeroI2V": "zeroi2v", "Side4Video": "side4video"}
ABLATION = {  # row: (folder, flags), the rows of AIM's table 1
    "linear probe (frozen, space-only)": ("linear_probe", "--method linear_probe"),
    "all weights tuned, space-only": ("finetune", "--method finetune"),
    "spatial adaptation": ("spatial", "--method aim --set temporal=false joint=false temporal_embedding=false"),
    "spatial + temporal adaptation": ("temporal", "--method aim --set joint=false"),
    "spatial + temporal + joint adaptation = AIM": ("aim", "--method aim"),
    "control: spatial adaptation and temporal embedding": ("control", "--method aim --set temporal=false joint=false"),
}
CAPTIONS = {  # row: (folder or "" for no training, flags of settings)
    "zero-shot CLIP, mean pooling": ("", dict(model=["matching=mean"])),
    "zero-shot CLIP, token-wise": ("", {}),
    "Side4Video, mean pooling": ("retrieval-mean", dict(model=["matching=mean", "width=64"])),
    "Side4Video, token-wise": ("retrieval", {}),
    "the same, random backbone": ("retrieval-random", dict(pretrained="none")),
}
ORDERS = {  # the new order of the T frames of test clip i
    "as they are": lambda T, i: torch.arange(T),
    "shuffled": lambda T, i: torch.randperm(T, generator=torch.Generator().manual_seed(i)),
    "reversed": lambda T, i: torch.arange(T - 1, -1, -1),
}


class Reordered(VideoDataset):
    """Test clips whose frames stand in another order."""

    def __getitem__(self, i):
        video, *rest = super().__getitem__(i)  # V x T x 3 x H x W
        return video[:, ORDERS[self.order](self.T, i)], *rest


def measure(folder, splits, order="as they are", merged=False):
    """The checkpoint in `folder` on the test split -> (top-1 of the monotone classes, of the jumping ones)"""
    run = train.read(folder / "checkpoint.pt")["run"]
    model, _ = train.load_model(folder / "checkpoint.pt")
    if merged:
        model.merge()
    dataset = Reordered(splits.test, run["num_frames"], model.vit.image_size, run["span"], run["views"], keep=True)
    dataset.order = order
    world = train.World.here("cpu")
    result, _ = train.evaluate(model, dataset, splits, run, world, folder / "test_classes.csv")
    return result["top1 monotone"], result["top1 jumping"]


def trained(folder, flags, seed, data_root, data="toy"):
    """Trains what is not there yet -> folder"""
    always = f"--data {data} --device cpu --resume --seed {seed} --data-root {data_root} --out {folder}"
    train.main([*always.split(), *flags.split()])
    return folder


def cells(results):
    """[(monotone, jumping), ...] of the seeds -> two cells: the mean, and half of the range"""
    for values in zip(*results):
        spread = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
        yield f"{statistics.mean(values):.1f}{spread}"


def retrieval_table(args):
    """Lines of the table of retrieval: every row with its mean over the seeds"""
    splits, world = find_clips("toy_captions", args.data_root), train.World.here("cpu")
    shown = ["text-to-video R@1", "video-to-text R@1", "over the mirror"]
    lines = [f"| {' | '.join(['', 'tuned', *shown])} |", "|---" * (2 + len(shown)) + "|"]
    for title, (name, flags) in CAPTIONS.items():
        results = []
        for seed in range(args.seeds):
            run = train.settings(dict(method="side4video", data="toy_captions", seed=seed) | copy.deepcopy(flags))
            if name:
                words = [word for key, value in flags.items() for word in option(key, value)]
                folder = args.runs / f"{name}-{seed}"
                trained(folder, " ".join(["--method side4video", *words]), seed, args.data_root, "toy_captions")
                model, _ = train.load_model(folder / "checkpoint.pt")
            else:
                model, folder = train.build(run, []), args.runs
            dataset = VideoDataset(splits.test, run["num_frames"], model.vit.image_size, keep=True)
            result, _ = train.evaluate(model, dataset, splits, run, world, folder / "test_classes.csv")
            results.append([result[key] for key in shown])
        tuned = f"{count_parameters(model)[1]:,}" if name else "0"
        lines.append(f"| {title} | {tuned} | {' | '.join(cells(results))} |")
    return lines


def option(key, value):
    """A setting as words of the command line"""
    return ["--set", *value] if key == "model" else [f"--{key}", value]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", default=HERE.parent / "datasets")
    parser.add_argument("--runs", type=Path, default=Path("runs/toy-table"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--checkpoints", action="store_true")
    parser.add_argument("--retrieval", action="store_true")
    args = parser.parse_args()
    if args.checkpoints:
        for method in METHODS.values():
            folder = trained(args.runs / f"{method}-0", f"--method {method}", 0, args.data_root)
            write_small(folder / "checkpoint.pt", HERE / "checkpoints" / f"{method}.pt")
        for name, flags in ABLATION.values():
            if name in ("linear_probe", "spatial", "control", "temporal"):
                folder = trained(args.runs / f"{name}-0", flags, 0, args.data_root)
                write_small(folder / "checkpoint.pt", HERE / "checkpoints" / f"aim_{name}.pt")
        folder = trained(args.runs / "retrieval-0", "--method side4video", 0, args.data_root, "toy_captions")
        write_small(folder / "checkpoint.pt", HERE / "checkpoints" / "retrieval.pt")
        return
    if args.retrieval:
        return print("", *retrieval_table(args), sep="\n")
    splits = find_clips("toy", args.data_root)
    heads = ["", "tuned", *(f"{name}, {group}" for name in [*ORDERS, "random backbone"] for group in splits.groups)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for title, method in METHODS.items():
        folders = [
            trained(args.runs / f"{method}-{s}", f"--method {method}", s, args.data_root) for s in range(args.seeds)
        ]
        rows = [cells([measure(folder, splits, order) for folder in folders]) for order in ORDERS]
        random = trained(args.runs / f"{method}-random-0", f"--method {method} --pretrained none", 0, args.data_root)
        rows.append(cells([measure(random, splits)]))
        _, tuned = count_parameters(train.load_model(folders[0] / "checkpoint.pt")[0])
        lines.append(f"| {title} | {tuned:,} | {' | '.join(cell for row in rows for cell in row)} |")
        if method == "zeroi2v":
            merged = cells([measure(folder, splits, merged=True) for folder in folders])
            lines.append(f"| {title}, merged | | {' | '.join(merged)} |{' |' * (len(heads) - 4)}")
    lines += ["", "| AIM's table 1 in small | tuned | monotone | jumping |", "|---" * 4 + "|"]
    for title, (name, flags) in ABLATION.items():
        folder = trained(args.runs / f"{name}-0", flags, 0, args.data_root)
        _, tuned = count_parameters(train.load_model(folder / "checkpoint.pt")[0])
        lines.append(f"| {title} | {tuned:,} | {' | '.join(cells([measure(folder, splits)]))} |")
    print("", *lines, sep="\n")


def write_small(source, target):
    """A checkpoint in half precision and without the optimizer, for `train.load_model` and --init."""
    checkpoint = train.read(source)
    state = {name: x.half() if x.is_floating_point() else x for name, x in checkpoint["state"].items()}
    run = checkpoint["run"] | {"data_root": ""}
    target.parent.mkdir(exist_ok=True)
    save({"run": run, "classes": checkpoint["classes"], "state": state}, target)


if __name__ == "__main__":
    main()
