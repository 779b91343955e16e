"""The controls: what each part of AIM, and each baseline, learns of the toy videos. The paper's table 1 in small.

python colab/toy_table.py            trains what is missing into runs/toy-table, prints the README's table (test split)
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

ROWS = {  # row: (folder, flags, seeds)
    "linear probe (frozen, space-only)": ("linear-probe", "--method linear_probe", 1),
    "all weights tuned, space-only": ("finetune", "--method finetune", 1),
    "spatial adaptation": ("spatial", "--method aim --set temporal=false joint=false temporal_embedding=false", 1),
    "spatial + temporal": ("temporal", "--method aim --set joint=false", 1),
    "spatial + temporal + joint = **AIM**": ("aim", "--method aim", 3),
    "AIM on a random frozen backbone": ("random", "--method aim --pretrained none", 1),
    "control: spatial + temporal embedding, no frame sees another": (
        "control",
        "--method aim --set temporal=false joint=false",
        1,
    ),
}
ORDERS = {  # of the T frames of test clip i
    "AIM, test frames shuffled": lambda T, i: torch.randperm(T, generator=torch.Generator().manual_seed(i)),
    "AIM, test frames reversed": lambda T, i: torch.arange(T - 1, -1, -1),
}


class Reordered(VideoDataset):
    """Testing clips whose frames stand in another order."""

    def __getitem__(self, i):
        video, label, problem = super().__getitem__(i)
        return video[:, self.order(self.T, i)], label, problem


def measure(folder, data, order=None):
    """The checkpoint's result over the test split -> (top-1 monotone, top-1 jumping, tunable parameters)"""
    checkpoint = train.load(folder / "checkpoint.pt")
    run, device = checkpoint["run"], torch.device("cpu")
    model = train.build(run, len(data.classes), device)
    load_tuned(model, checkpoint["state"], folder)
    kind = Reordered if order else VideoDataset
    dataset = kind(data.test, run["num_frames"], model.vit.image_size, run["span"], run["views"], keep=True)
    dataset.order = order
    result, _ = train.evaluate(model, dataset, data, run, train.Place(device, rank=0, world=1, workers=0))
    return result["top1 monotone"], result["top1 jumping"], count_parameters(model)[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", default="datasets")
    parser.add_argument("--runs", type=Path, default=Path("runs/toy-table"))
    args = parser.parse_args()
    data = find_clips("toy", args.data_root)
    table = ["| toy, test split | tunable | monotone: 8 classes | jumping: 2 classes |", "|---|---|---|---|"]
    for row, (name, flags, seeds) in ROWS.items():
        results = []
        for seed in range(seeds):
            folder = args.runs / f"{name}-{seed}"
            common = f"--data toy --device cpu --seed {seed}".split()
            what = flags.split()
            if (folder / "checkpoint.pt").exists():
                what = [*what[:2], "--resume"]  # the checkpoint knows the rest
            train.main([*common, "--data-root", args.data_root, "--out", str(folder), *what])
            results.append(measure(folder, data))
        monotone, jumping = (", ".join(f"{r[k]:.1f}" for r in results) for k in (0, 1))
        table.append(f"| {row} | {results[0][2]:,} | {monotone} | {jumping} |")
    for row, order in ORDERS.items():
        monotone, jumping, _ = measure(args.runs / "aim-0", data, order)
        table.append(f"| {row} | | {monotone:.1f} | {jumping:.1f} |")
    print("", *table, sep="\n")


if __name__ == "__main__":
    main()
