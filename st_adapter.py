"""ST-Adapter: Parameter-Efficient Image-to-Video Transfer Learning (Pan et al., NeurIPS 2022).

The image transformer is frozen. A bottleneck adapter learns space and time together with one cheap operator between
its two projections: a depthwise 3D convolution over the patch tokens, laid out as a T x H x W volume. It starts as the
identity, so training starts from the frozen image model on each frame.

       z (B, T, N+1, D)
       |  ST-Adapter                                  before the attention as well: on SSv2
       |--- LN1 --- MSA --------------------- (+)
       |  ST-Adapter:    [class] passes by
       |                 patches ---+--- W_down --- DWConv3D --- f --- W_up --- (+)      eq. (1)
       |                            +-------------------------------------------
       |--- LN2 --- MLP --------------------- (+)
       z (B, T, N+1, D)

Eq. (1) is the equation of the poster, section 2. B clips, T frames, N = H x W patches a frame, D width.
Frozen: the whole ViT. Tuned: adapters and classifier.
"""

import re

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common import (
    B16,
    L14,
    choose_blocks,
    classifier,
    freeze,
    image_tower,
    load_strict,
    load_tuned,
    tensors_of,
)

ACTIVATIONS = {"none": nn.Identity, "relu": nn.ReLU, "gelu": nn.GELU}


class DWConv3D(nn.Conv3d):
    """Depthwise convolution over (T, H, W) of channels that stand last; its padding keeps the shape.

    Libraries are slow at it. A kernel over time alone, the released one, is a few shifted multiply-adds; any other is a
    depthwise 2D convolution, which libraries are good at, for each of the kernel's kt planes.
    """

    def __init__(self, channels, kernel):
        super().__init__(channels, channels, kernel, padding=[k // 2 for k in kernel], groups=channels)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        """x (B, T, H, W, C) -> the same shape"""
        T, (kt, kh, kw) = x.shape[1], self.kernel_size
        x = F.pad(x, (0, 0, 0, 0, 0, 0, kt // 2, kt // 2))  # B x T+kt-1 x H x W x C
        weight, y = self.weight.to(x.dtype), self.bias.to(x.dtype)  # C x 1 x kt x kh x kw
        for i in range(kt):
            if kh == kw == 1:
                y = torch.addcmul(y, x[:, i : i + T], weight[:, 0, i, 0, 0])
            else:
                frames = rearrange(x[:, i : i + T], "b t h w c -> (b t) c h w")
                frames = F.conv2d(frames, weight[:, :, i], padding=self.padding[1:], groups=self.groups)
                y = y + rearrange(frames, "(b t) c h w -> b t h w c", t=T)
        return y


class SpatioTemporalAdapter(nn.Module):
    """Eq. (1) on the patch tokens: X + f(DWConv3D(X W_down)) W_up. The released f is the identity."""

    def __init__(self, width, bottleneck, kernel, activation):
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.conv = DWConv3D(bottleneck, kernel)
        self.activation = ACTIVATIONS[activation]()
        self.up = nn.Linear(bottleneck, width)
        # Released code: with the convolution and both biases at zero the adapter starts as the identity.
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)

    def forward(self, z, H):
        """z (B, T, N+1, D), whose patches form H rows -> the same shape"""
        cls, x = z[:, :, :1], z[:, :, 1:]
        y = rearrange(self.down(x), "b t (h w) c -> b t h w c", h=H)
        y = rearrange(self.activation(self.conv(y)), "b t h w c -> b t (h w) c")
        return torch.cat([cls, x + self.up(y)], dim=2)  # eq. (1)


class STAdapter(nn.Module):
    """The video model. `clip` is a `common.ViT`; it is frozen in place. The defaults are the released K400 settings.

    bottleneck: width of the adapters. kernel: of the convolution, (time, height, width), odd numbers. before_attention,
    before_mlp: where in a block an adapter stands. blocks: which blocks have them: "all", "bottom" or "top" half,
    "every second", or their numbers. activation: f of eq. (1): "none", "relu", "gelu". num_frames: of a clip; the
    weights do not depend on it.
    """

    def __init__(
        self,
        clip,
        num_classes,
        num_frames=8,
        bottleneck=384,
        kernel=(3, 1, 1),
        before_attention=False,
        before_mlp=True,
        blocks="all",
        activation="none",
        dropout=0.5,
    ):
        super().__init__()
        kernel = tuple(kernel)
        if len(kernel) != 3 or any(not isinstance(k, int) or k < 1 or k % 2 == 0 for k in kernel):
            raise ValueError(f"kernel is {kernel}; it must be three odd numbers: time, height, width")
        if bottleneck < 1:
            raise ValueError(f"bottleneck is {bottleneck}; it must be 1 or more")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; it must be one of: {', '.join(ACTIVATIONS)}")
        places = [name for name, wanted in (("attn", before_attention), ("mlp", before_mlp)) if wanted]
        if not places:
            raise ValueError("an adapter stands before_attention, before_mlp, or both; not nowhere")
        chosen = choose_blocks(blocks, len(clip.blocks))
        self.vit = freeze(clip)
        self.adapters = nn.ModuleList(nn.ModuleDict() for _ in clip.blocks)
        for i in chosen:
            for place in places:
                self.adapters[i][place] = SpatioTemporalAdapter(clip.width, bottleneck, kernel, activation)
        self.dropout = nn.Dropout(dropout)
        self.head = classifier(clip.width, num_classes)

    def features(self, video):
        """video (B, T, 3, H, W) -> (B, D), the normalised mean over frames of the [class] tokens."""
        rows = video.shape[-2] // self.vit.patch_size
        z = self.vit.ln_pre(self.vit.embed(video.flatten(0, 1))).unflatten(0, video.shape[:2])  # B x T x N+1 x D
        for adapters, block in zip(self.adapters, self.vit.blocks):
            if "attn" in adapters:
                z = adapters["attn"](z, rows)
            z = z + block.msa(z)
            if "mlp" in adapters:  # in the last block it is idle: its patches reach no [class] token any more
                z = adapters["mlp"](z, rows)
            z = z + block.ffn(z)
        return self.vit.ln_post(z[:, :, 0].mean(1))

    def forward(self, video):
        """video (B, T, 3, H, W), normalised -> logits (B, num_classes)"""
        return self.head(self.dropout(self.features(video)))


def load_official(model, checkpoint):
    """Reads the authors' checkpoint as `torch.load` gives it, with any prefix; ValueError if it does not fit.

    It holds what is tuned; CLIP's weights may lie beside it under "clip", else the model keeps those that it has.
    """
    clip, renamed = checkpoint.get("clip"), {}
    for key, tensor in tensors_of({k: v for k, v in checkpoint.items() if k != "clip"}).items():
        key = re.sub(r"^(.*\.)?fc\.(weight|bias)$", r"head.\2", key)
        key = re.sub(r"^.*?resblocks\.(\d+)\.adapter_pre_(attn|mlp)\.", r"adapters.\1.\2.", key)
        renamed[key.replace(".fc1.", ".down.").replace(".fc2.", ".up.")] = tensor
    if not clip:
        return load_tuned(model, renamed, "of ST-Adapter's authors")
    tower = image_tower(tensors_of(clip))
    renamed |= {f"vit.{key}": tensor for key, tensor in tower.items() if key != "proj"}
    load_strict(model, renamed, "of ST-Adapter's authors")


# The released configurations. The learning rate is 1e-3 for 256 clips, in proportion for other batches.
K400 = dict(
    epochs=12,
    warmup_epochs=2,
    batch_size=192,
    lr=1e-3,
    lr_batch=256,
    weight_decay=1e-2,
    span=128,
    views=(3, 1),
    augment=dict(short_side=(1.0, 1.15), flip=0.5),
)
SSV2 = dict(
    K400,
    epochs=50,
    batch_size=256,
    span=0,
    views=(1, 3),
    augment=dict(crop=(0.08, 1.0), randaugment=dict(num_ops=4, magnitude=7)),
    model=dict(before_attention=True),
)
TOY = dict(
    backbone="ViT-Toy-16",
    pretrained="shipped",
    epochs=4,
    warmup_epochs=0.3,
    batch_size=12,
    lr=8e-3,
    weight_decay=0.01,
    clip_grad=1.0,
    eval_every=4,
    model=dict(bottleneck=48, before_attention=True, dropout=0.0),
)
RECIPES = {"k400": K400, "ssv2": SSV2, "toy": TOY}

# The poster's tables, GFLOPs for three views. Its SSv2 row of ViT-L/14 repeats the GFLOPs of the K400 layout.
# label, ViT, switches, frames, total (M), tunable (M), GFLOPs per view; None where the paper prints nothing
PAPER = [
    ("K400, ViT-B/16, 8 frames", B16, {}, 8, None, 7.2, 455 / 3),
    ("K400, ViT-L/14, 8 frames", L14, {}, 8, None, 20, 2062 / 3),
    ("SSv2, ViT-B/16, 8 frames", B16, SSV2["model"], 8, None, 14, 489 / 3),
    ("SSv2, ViT-L/14, 8 frames, as K400", L14, {}, 8, None, 20, 2062 / 3),
]

if __name__ == "__main__":
    from colab.tables import compare

    compare(STAdapter, PAPER)
