"""AIM: Adapting Image Models for Efficient Video Action Recognition (Yang et al., ICLR 2023).

The image transformer is frozen and its own attention is used twice in each block: along time, then along space. Three
small adapters a block make the reuse work: behind the temporal attention, behind the spatial attention, and beside the
MLP. They start at zero (the spatial one with a skip), so training starts from the frozen image model on each frame.

       z (B, T, N+1, D)
       |--- LN1 --- [in] --- T-MSA --- Adapter ------ (+)      eq. (3)   [in]: one more adapter, with a skip, on SSv2
       |--- LN1 ------------ S-MSA --- Adapter+skip - (+)      eq. (4)   T-MSA and S-MSA are the same frozen weights
       |--- LN2 --+--------- MLP -------------------- (+)      eq. (5)
       |          +--------- s * Adapter ------------ (+)
       z (B, T, N+1, D)

B clips, T frames, N patches a frame, D width. Frozen: the whole ViT but ln_post. Tuned: adapters, temporal embedding,
ln_post, classifier.
"""

import re

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision.ops import StochasticDepth

from common import B16, L14, bottleneck_width, choose_blocks, classifier, freeze, load_strict, tensors_of


class Adapter(nn.Module):
    """The bottleneck of fig. 2(a), after Houlsby et al. (ICML 2019): fc D -> rD, GELU, fc rD -> D from zero."""

    def __init__(self, width, ratio=0.25, skip=False):
        super().__init__()
        self.skip = skip
        bottleneck = bottleneck_width(width, ratio)
        self.fc1 = nn.Linear(width, bottleneck)
        self.fc2 = nn.Linear(bottleneck, width)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x):
        y = self.fc2(F.gelu(self.fc1(x)))
        return x + y if self.skip else y


class AIMBlock(nn.Module):
    """What AIM adds to one block (fig. 2e). The frozen block is lent to `forward`: CLIP's weights keep their names.

    spatial, temporal, joint: the adaptations of table 1, each on or off. temporal_in: the further adapter before T-MSA
    that the paper uses on SSv2. scale: s. drop_path: how often branch (3) and the adapter of (5) are dropped, by clip.
    """

    def __init__(self, width, ratio, scale, drop_path, spatial, temporal, joint, temporal_in):
        super().__init__()
        self.scale = scale
        self.spatial = Adapter(width, ratio, skip=True) if spatial else nn.Identity()
        self.temporal = Adapter(width, ratio) if temporal else None
        self.temporal_in = Adapter(width, ratio, skip=True) if temporal and temporal_in else nn.Identity()
        self.joint = Adapter(width, ratio) if joint else None
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, z, block):
        """z (B, T, N+1, D) -> the same shape"""

        def t_msa(z):
            return block.attn(rearrange(self.temporal_in(block.ln_1(z)), "b t n d -> (b n) t d"))

        def mlps(z):
            y = block.ln_2(z)
            return self.scale * self.joint(y), block.mlp(y)  # in this order a recomputation can stop before W_down

        if self.temporal is not None:
            zt = rearrange(self.temporal(block.branch(t_msa, z)), "(b n) t d -> b t n d", b=len(z))
            z = z + self.drop_path(zt)  # eq. (3)
        z = z + self.spatial(block.msa(z))  # eq. (4)
        if self.joint is None:
            return z + block.ffn(z)  # eq. (2)
        adapted, mlp = block.branch(mlps, z)
        return z + mlp + self.drop_path(adapted)  # eq. (5)


class AIM(nn.Module):
    """The video model. `clip` is a `common.ViT`; it is frozen in place. The defaults are the paper's K400 settings.

    ratio: bottleneck width over D (table 8). blocks: which blocks are adapted (table 7): "all", "bottom" or "top" half,
    "every second", or their numbers. scale: s of eq. (5). temporal_in: the SSv2 layout. drop_path: stochastic depth of
    the last block, rising linearly from 0 at the first. temporal_embedding: learn a position for each frame (in the
    released code).
    """

    def __init__(
        self,
        clip,
        num_classes,
        num_frames=8,
        ratio=0.25,
        scale=0.5,
        blocks="all",
        spatial=True,
        temporal=True,
        joint=True,
        temporal_in=False,
        temporal_embedding=True,
        drop_path=0.2,
        dropout=0.5,
    ):
        super().__init__()
        layers = len(clip.blocks)
        if not 0 <= drop_path <= 1:
            raise ValueError(f"drop_path is {drop_path}; it is a probability")
        self.num_frames = num_frames
        self.vit = freeze(clip)
        self.vit.ln_post.requires_grad_(True)
        # Released code: zero at the start, added to every token of its frame.
        self.temporal_embedding = nn.Parameter(torch.zeros(1, num_frames, clip.width)) if temporal_embedding else None
        rates = [drop_path * i / max(layers - 1, 1) for i in range(layers)]
        switches = dict(spatial=spatial, temporal=temporal, joint=joint, temporal_in=temporal_in)
        self.adapters = nn.ModuleDict(
            {str(i): AIMBlock(clip.width, ratio, scale, rates[i], **switches) for i in choose_blocks(blocks, layers)}
        )
        self.dropout = nn.Dropout(dropout)
        self.head = classifier(clip.width, num_classes)

    def features(self, video):
        """video (B, T, 3, H, W) -> (B, D), the mean over frames of the normalised [class] tokens."""
        B, T = video.shape[:2]
        if self.num_frames != T:
            raise ValueError(f"the clip has {T} frames, the model was built for num_frames={self.num_frames}")
        z = self.vit.embed(video.flatten(0, 1)).unflatten(0, (B, T))  # B x T x N+1 x D
        if self.temporal_embedding is not None:
            z = z + self.temporal_embedding[:, :, None].to(z.dtype)
        z = self.vit.ln_pre(z)
        for i, block in enumerate(self.vit.blocks):
            z = self.adapters[str(i)](z, block) if str(i) in self.adapters else block(z)
        return self.vit.ln_post(z[:, :, 0]).mean(1)

    def forward(self, video):
        """video (B, T, 3, H, W), normalised -> logits (B, num_classes)"""
        return self.head(self.dropout(self.features(video)))


def load_official(model, checkpoint):
    """Reads the authors' checkpoint as `torch.load` gives it, nested, with any prefix; ValueError if it misfits."""
    renamed = {}
    for key, tensor in tensors_of(checkpoint).items():
        key = re.sub(r"^.*?cls_head\.fc_cls\.", "head.", key)
        key = re.sub(r"^.*?backbone\.(?!temporal_embedding)", "vit.", key)
        key = re.sub(r"^.*?backbone\.", "", key)
        adapter = re.fullmatch(r"vit\.transformer\.resblocks\.(\d+)\.(\w+)\.D_(fc[12]\.\w+)", key)
        if adapter and adapter[2] in RELEASED_NAMES:
            key = f"adapters.{adapter[1]}.{RELEASED_NAMES[adapter[2]]}.{adapter[3]}"
        renamed[key] = tensor
    load_strict(model, renamed, "of AIM's authors")


RELEASED_NAMES = {
    "S_Adapter": "spatial",
    "T_Adapter": "temporal",
    "T_Adapter_in": "temporal_in",
    "MLP_Adapter": "joint",
}

# Appendix A and the released configurations. 8, 16, 32 frames every 16th, 8th, 4th are a span of 128 video frames.
K400 = dict(
    epochs=30,
    warmup_epochs=3,
    batch_size=64,
    lr=3e-4,
    weight_decay=0.05,
    span=128,
    views=(3, 1),
    augment=dict(crop=(0.08, 1.0), flip=0.5),
    model=dict(drop_path=0.2),
)
SSV2 = dict(
    K400,
    epochs=50,
    span=0,
    views=(1, 3),
    label_smoothing=0.1,
    augment=dict(crop=(0.08, 1.0), randaugment=dict(num_ops=4, magnitude=7), erasing=0.25),
    model=dict(drop_path=0.2, temporal_in=True),
)
TOY = dict(
    backbone="ViT-Toy-16",
    pretrained="shipped",
    epochs=4,
    warmup_epochs=0.3,
    batch_size=12,
    lr=8e-3,
    temporal_lr=5.0,
    weight_decay=0.05,
    clip_grad=1.0,
    eval_every=4,
    model=dict(drop_path=0.0, dropout=0.0),
)
RECIPES = {
    "k400": K400,
    "k700": K400,
    "ssv2": SSV2,
    "diving48": dict(K400, epochs=50, span=0, views=(1, 1)),
    "toy": TOY,
}

# Tables 2 and 3: the paper prints GFLOPs for three views.
# label, ViT, switches, frames, total (M), tunable (M), GFLOPs per view; None where the paper prints nothing
PAPER = [
    ("K400, ViT-B/16, 8 frames", B16, {}, 8, 97, 11, 606 / 3),
    ("K400, ViT-B/16, 16 frames", B16, {}, 16, 97, 11, 1214 / 3),
    ("K400, ViT-B/16, 32 frames", B16, {}, 32, 97, 11, 2428 / 3),
    ("K400, ViT-L/14, 8 frames", L14, {}, 8, 341, 38, 2802 / 3),
    ("K400, ViT-L/14, 16 frames", L14, {}, 16, 341, 38, 5604 / 3),
    ("K400, ViT-L/14, 32 frames", L14, {}, 32, 341, 38, 11208 / 3),
    ("SSv2, ViT-B/16, 8 frames", B16, SSV2["model"], 8, 100, 14, 624 / 3),
    ("SSv2, ViT-B/16, 16 frames", B16, SSV2["model"], 16, 100, 14, 1248 / 3),
    ("SSv2, ViT-B/16, 32 frames", B16, SSV2["model"], 32, 100, 14, 2496 / 3),
    ("SSv2, ViT-L/14, 8 frames", L14, SSV2["model"], 8, 354, 50, 2877 / 3),
    ("SSv2, ViT-L/14, 16 frames", L14, SSV2["model"], 16, 354, 50, 5754 / 3),
    ("SSv2, ViT-L/14, 32 frames", L14, SSV2["model"], 32, 354, 50, 11508 / 3),
]

if __name__ == "__main__":
    from colab.tables import compare

    compare(AIM, PAPER)
