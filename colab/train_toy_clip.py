"""Trains the small CLIP that ships with the project, image and text tower, on captioned stills of the toy world.

    python colab/train_toy_clip.py            writes colab/ViT-Toy-16.safetensors; six minutes or so on two cores

The image tower is `common.ViT`, the text tower open_clip's; the file is an open_clip state dict in half precision.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from colab import toy  # noqa: E402
from colab.toy import tokenize  # noqa: E402
from common import load_clip, normalize  # noqa: E402

NAME = "ViT-Toy-16"
SIZES = ("tiny", "small", "large", "huge")
ROWS = ("top", "upper", "middle", "lower", "bottom")
COLUMNS = ("leftmost", "left", "center", "right", "rightmost")


def still(rng):
    """One shape anywhere, of any size -> image uint8 (3, S, S), caption such as "a small red ring upper left" """
    frame = toy.background(rng, 1)
    shape, color = toy.look(rng)
    radius = np.exp(rng.uniform(np.log(4), np.log(18)))
    x, y = rng.uniform(0.08, 0.92, 2)
    toy.paint(frame, shape, color, x * toy.SIZE, y * toy.SIZE, radius)
    size = SIZES[np.searchsorted((6, 9, 12.5), radius)]
    row, column = ROWS[int((y - 0.08) / 0.84 * 5)], COLUMNS[int((x - 0.08) / 0.84 * 5)]
    image = torch.from_numpy(frame[0].clip(0, 255).astype(np.uint8)).permute(2, 0, 1)
    return image, f"a {size} {color} {shape} {row} {column}"


def matched(clip, images, tokens):
    """The share of images whose own caption is the nearest of all captions here."""
    image = F.normalize(clip.visual(normalize(images, clip.visual)), dim=-1)
    nearest = (image @ clip.encode_text(tokens, normalize=True).T).argmax(1)
    return (tokens[nearest] == tokens).all(1).float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--stills", type=int, default=40_000)
    parser.add_argument("--out", type=Path, default=HERE / f"{NAME}.safetensors")
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    images, captions = zip(*(still(rng) for _ in tqdm(range(args.stills + 1000), desc="painting stills")))
    images, tokens = torch.stack(images), tokenize(captions)

    open_clip.add_model_config(HERE)
    clip = open_clip.create_model(NAME)
    clip.visual = load_clip(NAME, pretrained=None)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, args.steps, pct_start=0.1)
    contrast = open_clip.ClipLoss()
    for step in (bar := tqdm(range(args.steps), desc="training")):
        batch = torch.randint(args.stills, (256,))
        image = F.normalize(clip.visual(normalize(images[batch], clip.visual)), dim=-1)
        loss = contrast(image, clip.encode_text(tokens[batch], normalize=True), clip.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}")

    with torch.no_grad():
        share = matched(clip.eval(), images[-1000:], tokens[-1000:])
    save_file({name: tensor.half().contiguous() for name, tensor in clip.state_dict().items()}, args.out)
    size = args.out.stat().st_size / 1e6
    print(f"{100 * share:.1f} % of 1000 new stills find their caption; {args.out} has {size:.1f} MB")


if __name__ == "__main__":
    main()
