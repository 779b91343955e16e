"""`python zeroi2v.py merge CHECKPOINT OUT`: a trained ZeroI2V as a plain CLIP image tower."""

import sys
from pathlib import Path

import torch

import common
from zeroi2v import ZeroI2V


def merge_checkpoint(source, target):
    """Reads a checkpoint of train.py, folds the adapters, and writes two files.

    target: the image tower by CLIP's names, for `load_clip` and open_clip's `visual.load_state_dict`. Beside it,
    NAME.video.pt: a checkpoint for `train.py --eval` and `--predict` that holds the rest and names the tower.
    """
    checkpoint = common.read_checkpoint(source)
    run, classes = checkpoint.get("run", {}), checkpoint.get("classes")
    if run.get("method") != "zeroi2v":
        raise ValueError(f"{source} is not a checkpoint of train.py --method zeroi2v")
    pretrained = None if run["pretrained"] == "none" else run["pretrained"]
    clip = common.load_clip(run["backbone"], pretrained, run["image_size"] or None)
    tower = clip.state_dict()  # with the projection, which `freeze` drops
    model = ZeroI2V(clip, len(classes), run["num_frames"], **run["model"])
    common.load_tuned(model, checkpoint["state"], source)
    model.merge()
    take_pixels_of(clip, common.load_clip(run["backbone"], None))
    common.save(tower | clip.state_dict(), target)

    quick = "-quickgelu" * isinstance(clip.blocks[0].mlp.gelu, common.QuickGELU)  # which the tower's file does not tell
    name, beside = run["backbone"].removesuffix("-quickgelu") + quick, target.with_suffix(".video.pt")
    run = run | dict(backbone=name, pretrained=str(target.resolve()), image_size=clip.image_size)
    run["model"] = run["model"] | {"kind": "none"}
    common.save({"run": run, "classes": classes, "state": common.tuned_state(model)}, beside)
    print(f"{target}: the merged image tower, for load_clip({name!r}, {str(target)!r})")
    print(f"{beside}: the video model on it, for train.py --eval --checkpoint {beside}")


@torch.no_grad()
def take_pixels_of(clip, plain):
    """Moves a normalisation of pixels that only the tag of the weights told into the weights: files do not tell."""
    mean, std, own_mean, own_std = (torch.tensor(values) for values in (plain.mean, plain.std, clip.mean, clip.std))
    # What `clip` was trained on is slope * (what a local file is given) + offset, in each channel.
    slope, offset = std / own_std, (mean - own_mean) / own_std
    clip.positional_embedding[1:] += torch.einsum("d c h w, c -> d", clip.conv1.weight, offset)
    clip.conv1.weight *= slope[:, None, None]


def main(argv):
    if len(argv) != 2:
        sys.exit(__doc__)
    try:
        merge_checkpoint(*map(Path, argv))
    except (ValueError, OSError) as error:
        sys.exit(f"zeroi2v.py: {error}")
