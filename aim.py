"""AIM: Adapting Image Models for Efficient Video Action Recognition (Yang et al., ICLR 2023).

Paper: arXiv 2302.03024; its equations, tables and sections are cited here. Released code:
github.com/taoyang1122/adapt-image-models.

The image transformer is frozen, and each block uses its own attention twice: along time, then along space. Three small
adapters per block make this work: after the temporal attention, after the spatial attention, and beside the MLP. They
start at zero (the spatial one with a skip), so training starts from the frozen image model on each frame.

       z (B, T, N+1, D)
       |--- LN1 --- [in] --- T-MSA --- Adapter ------ (+)      eq. (3)   [in]: one more adapter, with a skip, on SSv2
       |--- LN1 ------------ S-MSA --- Adapter+skip - (+)      eq. (4)   T-MSA and S-MSA are the same frozen weights
       |--- LN2 --+--------- MLP -------------------- (+)      eq. (5)
       |          +--------- s * Adapter ------------ (+)
       z (B, T, N+1, D)

The paper's own listing is algorithm 1 in appendix F. As printed, it overwrites `xt` twice (x stands where xt is meant),
so no attention along time is left in it. Eq. (3) and the released code have it.

B clips, T frames, N patches per frame, D width. Frozen: the ViT. Tuned: the adapters and the classifier; in the
released code also a temporal embedding and the ViT's ln_post.
"""

import re

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision.ops import StochasticDepth

from common import B16, L14, bottleneck_width, choose_blocks, classifier, cross_entropy, freeze, load_strict, tensors_of


class Adapter(nn.Module):
    """Fig. 2(a): fc D -> rD, GELU (released code), fc rD -> D, which starts at zero (appendix A). r is the ratio."""

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
    """What AIM adds to one block (fig. 2e). `forward` is lent the frozen block, so CLIP's weights keep their names.

    spatial, temporal, joint: the adaptations of table 1, each on or off. temporal_in: one more adapter before T-MSA, on
    SSv2 (its place after LN1 and its skip: released code). scale: s of eq. (5). drop_path: rate of stochastic depth,
    which in training leaves two of the branches out for some clips (the choice of the two: released code).
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

        def t_msa(z):  # the T tokens at each of the N+1 positions attend to each other
            return block.attn(rearrange(self.temporal_in(block.ln_1(z)), "b t n d -> (b n) t d"))

        def adapter_and_mlp(z):
            y = block.ln_2(z)
            # The MLP comes last because recomputation stops at the last tensor that a gradient needs, the input of its
            # GELU: the product with W_down, 7 % of a training step with --recompute, is not computed again.
            return self.scale * self.joint(y), block.mlp(y)

        if self.temporal is not None:
            zt = self.temporal(block.branch(t_msa, z))  # (B N+1) x T x D
            z = z + self.drop_path(rearrange(zt, "(b n) t d -> b t n d", n=z.shape[2]))  # eq. (3)
        z = z + self.spatial(block.msa(z))  # eq. (4): LN and S-MSA, each frame by itself
        if self.joint is None:
            return z + block.ffn(z)  # eq. (2): LN and MLP, as in the ViT
        adapted, mlp = block.branch(adapter_and_mlp, z)
        return z + mlp + self.drop_path(adapted)  # eq. (5)


class AIM(nn.Module):
    """The video model. `clip` is a `common.ViT`; it is frozen in place. The defaults are the paper's K400 settings.

    num_frames: T. ratio: the adapters' bottleneck width over D (table 8). scale: s of eq. (5). blocks: which blocks are
    adapted (table 7): "all", "bottom" or "top" half, "every second", or their numbers. spatial, temporal, joint: the
    rows of table 1. temporal_in: the SSv2 layout. drop_path: the rate of stochastic depth in the last block; it rises
    linearly from 0 in the first (released code).
    """

    loss = staticmethod(cross_entropy)  # the training loop asks the model for its loss

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
        self.num_frames = num_frames
        self.vit = freeze(clip)
        self.vit.ln_post.requires_grad_(True)  # (released code)
        # One vector per frame, zero at the start, added to all tokens of the frame (released code).
        self.temporal_embedding = nn.Parameter(torch.zeros(1, num_frames, clip.width)) if temporal_embedding else None
        rates = [drop_path * i / max(layers - 1, 1) for i in range(layers)]
        switches = dict(spatial=spatial, temporal=temporal, joint=joint, temporal_in=temporal_in)
        self.adapters = nn.ModuleDict(
            {str(i): AIMBlock(clip.width, ratio, scale, rates[i], **switches) for i in choose_blocks(blocks, layers)}
        )
        self.dropout = nn.Dropout(dropout)  # before the classifier (released code)
        self.head = classifier(clip.width, num_classes)

    def features(self, video):
        """video (B, T, 3, H, W) -> (B, D)"""
        if video.shape[1] != self.num_frames:
            raise ValueError(
                f"the clip has {video.shape[1]} frames, the model was built for num_frames={self.num_frames}"
            )
        z = self.vit.embed(video.flatten(0, 1)).unflatten(0, (-1, self.num_frames))  # B x T x N+1 x D
        if self.temporal_embedding is not None:
            z = z + self.temporal_embedding[:, :, None].to(z.dtype)  # 1 x T x 1 x D
        z = self.vit.ln_pre(z)
        for i, block in enumerate(self.vit.blocks):
            z = self.adapters[str(i)](z, block) if str(i) in self.adapters else block(z)
        return self.vit.ln_post(z[:, :, 0]).mean(1)  # section 3.4; the norm comes first (released code)

    def forward(self, video):
        """video (B, T, 3, H, W), normalised -> logits (B, num_classes)"""
        return self.head(self.dropout(self.features(video)))


def load_official(model, checkpoint):
    """Loads the authors' released checkpoint, as `torch.load` gives it, into `model`; ValueError if it does not fit."""
    renamed = {}
    for key, tensor in tensors_of(checkpoint).items():
        key = re.sub(r"^.*?cls_head\.fc_cls\.", "head.", key)
        key = re.sub(r"^.*?backbone\.(?!temporal_embedding)", "vit.", key)
        key = re.sub(r"^.*?backbone\.", "", key)
        adapter = re.fullmatch(r"vit\.transformer\.resblocks\.(\d+)\.(\w+)\.D_(fc[12]\.\w+)", key)
        if adapter and adapter[2] in RELEASED:
            key = f"adapters.{adapter[1]}.{RELEASED[adapter[2]]}.{adapter[3]}"
        renamed[key] = tensor
    load_strict(model, renamed, "of AIM's authors")


RELEASED = {"S_Adapter": "spatial", "T_Adapter": "temporal", "T_Adapter_in": "temporal_in", "MLP_Adapter": "joint"}

# Appendix A and the released configurations.
K400 = dict(
    epochs=30,
    warmup_epochs=3,
    batch_size=64,  # of all processes together
    lr=3e-4,
    weight_decay=0.05,
    span=128,  # video frames that a clip spans: 8, 16 or 32 of them, every 16th, 8th or 4th
    views=(3, 1),  # test views per video, temporal x spatial; the tables print frames x temporal x spatial
    augment=dict(crop=(0.08, 1.0), flip=0.5),
    model=dict(drop_path=0.2),
)
SSV2 = dict(
    K400,
    epochs=50,
    span=0,  # the whole video: one frame from each of T equal segments
    views=(1, 3),
    label_smoothing=0.1,
    augment=dict(crop=(0.08, 1.0), randaugment=(4, 7), erasing=0.25),
    model=dict(drop_path=0.2, temporal_in=True),
)
DIVING48 = dict(K400, epochs=50, span=0, views=(1, 1))
TOY = dict(
    backbone="ViT-Toy-16",
    pretrained="shipped",
    epochs=4,
    warmup_epochs=0.3,
    batch_size=12,
    lr=8e-3,
    embedding_lr=5.0,  # the temporal embedding's learning rate, in multiples of lr (not in the paper)
    weight_decay=0.05,
    clip_grad=1.0,
    eval_every=4,
    model=dict(drop_path=0.0, dropout=0.0),
)
RECIPES = {"k400": K400, "k700": K400, "ssv2": SSV2, "diving48": DIVING48, "toy": TOY}

# Tables 2 and 3, which print GFLOPs for three views.
# label, ViT, switches, frames, total (M), tunable (M), GFLOPs per view
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
