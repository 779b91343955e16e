"""ST-Adapter: Parameter-Efficient Image-to-Video Transfer Learning (Pan et al., NeurIPS 2022).

Paper: arXiv 2206.13559. Released code: github.com/linziyi96/st-adapter. What is called eq. (1) here is the only
equation of the authors' poster (section 2); the tables are the poster's as well.

The image transformer is frozen. A bottleneck adapter learns space and time together with one cheap operator between its
two projections: a depthwise 3D convolution over the patch tokens, laid out as a T x H x W volume. It starts as the
identity, so training starts from the frozen image model on each frame.

       z (B, T, N+1, D)
       |  ST-Adapter                                  before the attention as well: on SSv2
       |--- LN1 --- MSA --------------------- (+)
       |  ST-Adapter:    [class] passes by
       |                 patches ---+--- W_down --- DWConv3D --- f --- W_up --- (+)      eq. (1)
       |                            +-------------------------------------------
       |--- LN2 --- MLP --------------------- (+)
       z (B, T, N+1, D)

B clips, T frames, N = H x W patches per frame in H rows and W columns, D width, C width of the bottleneck.
Frozen: the whole ViT. Tuned: the adapters and the classifier.
"""

import re

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common import B16, L14, choose_blocks, classifier, cross_entropy, freeze, image_tower, load_strict, tensors_of

ACTIVATIONS = {"none": nn.Identity, "relu": nn.ReLU, "gelu": nn.GELU}


class DWConv3D(nn.Conv3d):
    """Depthwise convolution over (T, H, W): one kernel per channel, no sum over channels. Padding keeps the shape.

    It equals F.conv3d(x, weight, bias, padding=padding, groups=C), where channels come first and which is slow. With a
    kernel over time alone, the released one, it is a few shifted multiply-adds. With any other, it is a sum of
    depthwise 2D convolutions, which are fast, one for each of the kernel's kt planes.
    """

    def __init__(self, channels, kernel):
        super().__init__(channels, channels, kernel, padding=[k // 2 for k in kernel], groups=channels)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        """x (B, T, H, W, C) -> the same shape"""
        T, (kt, kh, kw) = x.shape[1], self.kernel_size
        x = F.pad(x, (0, 0, 0, 0, 0, 0, kt // 2, kt // 2))  # B x T+kt-1 x H x W x C: zeros outside of the clip
        weight, y = self.weight.to(x.dtype), self.bias.to(x.dtype)  # C x 1 x kt x kh x kw, C
        for i in range(kt):
            if kh == kw == 1:
                y = torch.addcmul(y, x[:, i : i + T], weight[:, 0, i, 0, 0])  # y + x[t + i - kt // 2] * weight[i]
            else:
                frames = rearrange(x[:, i : i + T], "b t h w c -> (b t) c h w")
                frames = F.conv2d(frames, weight[:, :, i], padding=self.padding[1:], groups=self.groups)
                y = y + rearrange(frames, "(b t) c h w -> b t h w c", t=T)
        return y


class SpatioTemporalAdapter(nn.Module):
    """Eq. (1) on the patch tokens: X + f(DWConv3D(X W_down)) W_up.

    In the released code f is the identity, and W_down, W_up and the convolution have biases.
    """

    def __init__(self, width, bottleneck, kernel, activation):
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.conv = DWConv3D(bottleneck, kernel)
        self.activation = ACTIVATIONS[activation]()
        self.up = nn.Linear(bottleneck, width)
        # With the convolution and both of these biases at zero, the adapter starts as the identity (released code).
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)

    def forward(self, z, H):
        """z (B, T, 1 + H W, D) -> the same shape"""
        cls, x = z[:, :, :1], z[:, :, 1:]  # B x T x 1 x D and B x T x N x D
        y = rearrange(self.down(x), "b t (h w) c -> b t h w c", h=H)
        y = rearrange(self.activation(self.conv(y)), "b t h w c -> b t (h w) c")
        return torch.cat([cls, x + self.up(y)], dim=2)  # eq. (1)


class STAdapter(nn.Module):
    """The video model. `clip` is a `common.ViT`; it is frozen in place. The defaults are the released K400 settings.

    num_frames is accepted as by every method, and unused: no weight depends on it. bottleneck: C. kernel: of the
    convolution, (time, height, width), odd numbers. before_attention, before_mlp: where in a block an adapter stands.
    blocks: which blocks have them: "all", "bottom" or "top" half, "every second", or their numbers. activation: f of
    eq. (1): "none", "relu", "gelu".
    """

    loss = staticmethod(cross_entropy)  # the training loop asks the model for its loss

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
        if len(kernel) != 3 or any(k < 1 or k % 2 == 0 for k in kernel):
            raise ValueError(f"kernel is {kernel}; it must be three odd numbers: time, height, width")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; it must be one of: {', '.join(ACTIVATIONS)}")
        places = [name for name, wanted in (("attn", before_attention), ("mlp", before_mlp)) if wanted]
        self.vit = freeze(clip)
        self.adapters = nn.ModuleList(nn.ModuleDict() for _ in clip.blocks)
        for i in choose_blocks(blocks, len(clip.blocks)):
            for place in places:
                self.adapters[i][place] = SpatioTemporalAdapter(clip.width, bottleneck, kernel, activation)
        self.dropout = nn.Dropout(dropout)  # before the classifier (released code)
        self.head = classifier(clip.width, num_classes)

    def features(self, video):
        """video (B, T, 3, height, width) in pixels -> (B, D)"""
        H = self.vit.image_size // self.vit.patch_size
        z = self.vit.ln_pre(self.vit.embed(video.flatten(0, 1)))  # (B T) x N+1 x D
        z = z.unflatten(0, (-1, video.shape[1]))  # B x T x N+1 x D
        for adapters, block in zip(self.adapters, self.vit.blocks):
            if "attn" in adapters:
                z = adapters["attn"](z, H)
            z = z + block.msa(z)  # each frame by itself
            # In the last block this adapter is idle: no attention follows that could carry its patches to the [class]
            # tokens, which alone are read. It is kept because the released checkpoints hold it.
            if "mlp" in adapters:
                z = adapters["mlp"](z, H)
            z = z + block.ffn(z)
        return self.vit.ln_post(z[:, :, 0].mean(1))  # the mean of the [class] tokens comes first (released code)

    def forward(self, video):
        """video (B, T, 3, height, width), normalised -> logits (B, num_classes)"""
        return self.head(self.dropout(self.features(video)))


def load_official(model, checkpoint):
    """Loads the authors' released checkpoint, as `torch.load` gives it, into `model`; ValueError if it does not fit.

    It holds what is tuned. CLIP's weights may lie beside it under "clip"; if not, the model keeps those that it has.
    """
    clip, renamed = checkpoint.get("clip"), {}
    for key, tensor in tensors_of({k: v for k, v in checkpoint.items() if k != "clip"}).items():
        key = re.sub(r"^(.*\.)?fc\.(weight|bias)$", r"head.\2", key)
        key = re.sub(r"^.*?resblocks\.(\d+)\.adapter_pre_(attn|mlp)\.", r"adapters.\1.\2.", key)
        renamed[key.replace(".fc1.", ".down.").replace(".fc2.", ".up.")] = tensor
    tower = image_tower(tensors_of(clip)) if clip else model.vit.state_dict()
    renamed |= {f"vit.{key}": tensor for key, tensor in tower.items() if key != "proj"}
    load_strict(model, renamed, "of ST-Adapter's authors")


# The released configurations.
K400 = dict(
    epochs=12,
    warmup_epochs=2,
    batch_size=192,  # of all processes together
    lr=1e-3,  # for lr_batch clips, and in proportion for other batches
    lr_batch=256,
    weight_decay=1e-2,  # not of biases
    span=128,  # video frames that a clip spans: 8 of them, every 16th
    views=(3, 1),  # test views per video, temporal x spatial; the poster prints 8 x 3 x 1 for both data sets
    augment=dict(short_side=(1.0, 1.15), flip=0.5),
)
SSV2 = dict(
    K400,
    epochs=50,
    batch_size=256,
    span=0,  # the whole video: one frame from each of T equal segments
    views=(1, 3),
    augment=dict(crop=(0.08, 1.0), randaugment=(4, 7)),
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

# The poster prints GFLOPs for three views. Its SSv2 row of ViT-L/14 repeats the GFLOPs of the K400 layout.
# label, ViT, switches, frames, total (M), tunable (M), GFLOPs per view; None where the poster prints nothing
PAPER = [
    ("K400, ViT-B/16, 8 frames", B16, {}, 8, None, 7.2, 455 / 3),
    ("K400, ViT-L/14, 8 frames", L14, {}, 8, None, 20, 2062 / 3),
    ("SSv2, ViT-B/16, 8 frames", B16, SSV2["model"], 8, None, 14, 489 / 3),
    ("SSv2, ViT-L/14, 8 frames, as K400", L14, {}, 8, None, 20, 2062 / 3),
]

if __name__ == "__main__":
    from colab.tables import compare

    compare(STAdapter, PAPER)
