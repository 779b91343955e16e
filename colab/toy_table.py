"""What each method learns of the toy videos, with its controls, and each part of AIM: its table 1 in small.

python colab/toy_table.py            trains what is missing into runs/toy-table, prints the README's tables (test split)
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from common import count_parameters, load_tuned  # noqa: E402
from data import VideoDataset, find_clips  # noqa: E402

ABLATION = {  # row: (folder, flags), AIM's table 1 in small
    "linear probe (frozen, space-only)": ("linear-probe", "--method linear_probe"),
    "all weights tuned, space-only": ("finetune", "--method finetune"),
    "spatial adaptation": ("spatial", "--method aim --set temporal=false joint=false temporal_embedding=false"),
    "spatial + temporal": ("temporal", "--method aim --set joint=false"),
    "spatial + temporal + joint = **AIM**": ("aim", "--method aim"),
    "control: spatial + temporal embedding, no frame sees another": (
        "control",
        "--method aim --set temporal=false joint=false",
    ),
}
METHODS = {"AIM": "aim", "ST-Adapter": "st_adapter", "ZeroI2V": "zeroi2v", "Side4Video": "side4video"}
SEEDS = 3
ORDERS = {  # of the T frames of test clip i
    "shuffled": lambda T, i: torch.randperm(T, generator=torch.Generator().manual_seed(i)),
    "reversed": lambda T, i: torch.arange(T - 1, -1, -1),
}


class Reordered(VideoDataset):
    """Testing clips whose frames stand in another order."""

    def __getitem__(self, i):
        video, label, problem = super().__getitem__(i)
        return video[:, self.order(self.T, i)], label, problem


def measure(folder, data, order=None, merged=False):
    """The checkpoint's result over the test split -> (top-1 monotone, top-1 jumping, tunable parameters)"""
    checkpoint = train.load(folder / "checkpoint.pt")
    run, device = checkpoint["run"], torch.device("cpu")
    model = train.build(run, len(data.classes), device)
    load_tuned(model, checkpoint["state"], folder)
    if merged:
        model.merge()
    kind = Reordered if order else VideoDataset
    dataset = kind(data.test, run["num_frames"], model.vit.image_size, run["span"], run["views"], keep=True)
    dataset.order = order
    result = train.evaluate(model, dataset, data, run, train.Place(device, rank=0, world=1, workers=0)).result
    return result["top1 monotone"], result["top1 jumping"], count_parameters(model)[1]


def trained(folder, flags, seed, data_root):
    """Trains what is not there yet -> folder"""
    what = flags.split()
    if (folder / "checkpoint.pt").exists():
        what = [*what[:2], "--resume"]  # the checkpoint knows the rest
    always = f"--data toy --device cpu --seed {seed} --data-root {data_root} --out {folder}".split()
    train.main([*always, *what])
    return folder


def text(results):
    """[(monotone, jumping, ...), ...] -> "97.2, 94.4 / 96.2, 95.6", by seed"""
    return " / ".join(", ".join(f"{r[k]:.1f}" for r in results) for k in (0, 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", default="datasets")
    parser.add_argument("--runs", type=Path, default=Path("runs/toy-table"))
    args = parser.parse_args()
    data = find_clips("toy", args.data_root)
    lines = ["| monotone / jumping | tunable | three seeds | shuffled | reversed | random backbone |", "|---" * 6 + "|"]
    for title, method in METHODS.items():
        flags = f"--method {method}"
        folders = [trained(args.runs / f"{method}-{s}", flags, s, args.data_root) for s in range(SEEDS)]
        random = trained(args.runs / f"{method}-random-0", f"{flags} --pretrained none", 0, args.data_root)
        results = [measure(folder, data) for folder in folders]
        orders = [text([measure(folders[0], data, order)]) for order in ORDERS.values()]
        cells = f"{results[0][2]:,}", text(results), *orders, text([measure(random, data)])
        lines.append(f"| {title} | {' | '.join(cells)} |")
        if method == "zeroi2v":
            merged = text([measure(folder, data, merged=True) for folder in folders])
            lines.append(f"| {title}, merged | | {merged} | | | |")
    lines += ["", "| AIM's table 1 | tunable | monotone | jumping |", "|---" * 4 + "|"]
    for title, (name, flags) in ABLATION.items():
        monotone, jumping, tunable = measure(trained(args.runs / f"{name}-0", flags, 0, args.data_root), data)
        lines.append(f"| {title} | {tunable:,} | {monotone:.1f} | {jumping:.1f} |")
    print("", *lines, sep="\n")


if __name__ == "__main__":
    main()
