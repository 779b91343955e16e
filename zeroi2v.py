"""ZeroI2V: Zero-Cost Adaptation of Pre-trained Transformers from Image to Video (Li et al., ECCV 2024).

Paper: https://arxiv.org/abs/2310.01324; equations have the numbers of its first version. The authors' code:
https://github.com/leexinhao/ZeroI2V, whose behaviour counts where the paper is silent: "(released code)".

The image transformer is frozen. Some heads of its attention take their keys and values from neighbouring frames, which
costs nothing (STDHA). Linear adapters around the frozen layers make up for the difference between images and videos;
since they have no activation, they merge into these layers after training. The merged model has the parameters and the
FLOPs of a plain ViT; beside it, the shift of the heads, the temporal embedding and the classifier remain.

       z (B, T, N+1, D)
       |--- LN1 --- A_in --- W_q, W_k, W_v --- STDHA --- W_o --- A_out --- (+)      eqs. (7) to (9), (1)
       |--- LN2 --- B_in --- W_up --- activation --- W_down --- B_out ---- (+)      eqs. (6), (2); adapters: eq. (11)
       z (B, T, N+1, D)

       W_k X^t, W_v X^t:  head 1 | head 2 | head 3 | ...     as the image model has them, of frame t
       STDHA at frame t:  t - 1  | t + 1  |   t    | ...     dt = -1, +1, 0, ...: whose keys and values a head sees

B clips, T frames, N patches per frame, D width. Frozen: the whole ViT except ln_post. Tuned: adapters, temporal
embedding, ln_post and classifier (the latter three as in the released code).

    python zeroi2v.py                              the paper's tables beside what this code measures
    python zeroi2v.py merge CHECKPOINT OUT         a trained checkpoint as a plain CLIP image tower
"""

import itertools
import re
import sys

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common import B16, L14, bottleneck_width, classifier, cross_entropy, freeze, load_strict, tensors_of


def shift(x, groups):
    """Head relocation: x (B, T, ..., D) with each group of channels from frame t + dt, or from t if that is outside.

    groups: [(dt, channels), ...], which divide D. Four frames become, for dt = -1: 0 0 1 2; for dt = +1: 1 2 3 3; for
    dt = -2: 0 1 0 1. That a frame at the border keeps its own keys and values is (released code).
    """
    parts = []
    for part, (dt, _) in zip(x.split([channels for _, channels in groups], dim=-1), groups):
        if 0 < dt < x.shape[1]:
            part = torch.cat([part[:, dt:], part[:, -dt:]], dim=1)
        elif 0 > dt > -x.shape[1]:
            part = torch.cat([part[:, :-dt], part[:, :dt]], dim=1)
        parts.append(part)
    return torch.cat(parts, dim=-1)


class LinearAdapter(nn.Module):
    """x + s W_up W_down x: (I + W_up W_down) of eq. (11), with biases, dropout and a scale s (released code).

    after: whether it stands after its frozen layer (after W_o and W_down) or before it (before the others).
    """

    def __init__(self, width, bottleneck, scale, dropout=0.0, after=False):
        super().__init__()
        self.scale, self.after = scale, after
        self.fc1 = nn.Linear(width, bottleneck)  # W_down
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(bottleneck, width)  # W_up
        nn.init.zeros_(self.fc2.weight)  # (released code) the adapter starts as the identity
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x):
        """x (..., D) -> (..., D)"""
        return x + self.scale * self.fc2(self.dropout(self.fc1(x)))

    def adapt(self, x, W, b):
        """The frozen layer W x + b together with its adapter."""
        return self(F.linear(x, W, b)) if self.after else F.linear(self(x), W, b)

    def merge(self, W, b):
        """The one layer (W, b) that does the same. All in float64."""
        # As in eq. (11), matrices act on columns here; eqs. (3) to (6) write X as rows. The adapter is x -> A x + a.
        W1, b1, W2, b2 = (p.double() for p in (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias))
        A = torch.eye(len(W2), device=W2.device, dtype=W2.dtype) + self.scale * W2 @ W1
        a = self.scale * (W2 @ b1 + b2)
        return (A @ W, A @ b + a) if self.after else (W @ A, W @ a + b)  # eq. (11), and on the input side W A


class ZeroI2VBlock(nn.Module):
    """What ZeroI2V adds to one block. The frozen block is lent to `forward`: CLIP's weights keep their names.

    adapters: by the frozen layer that they adapt: q, k, v (or qkv, one adapter for the three), o, up, down.
    groups: [(dt, channels), ...] of the heads in turn.
    """

    def __init__(self, adapters, groups):
        super().__init__()
        self.adapters = nn.ModuleDict(adapters)
        self.groups = groups

    def linear(self, name, x, W, b):
        """The frozen layer `name` with its adapter, if it has one."""
        return self.adapters[name].adapt(x, W, b) if name in self.adapters else F.linear(x, W, b)

    def relocate(self, x, heads):
        """The keys or the values (B, T, N+1, D) as the queries of frame t see them: K_i^(t + dt_i) of eq. (8)."""
        return shift(x, self.groups)

    def stdha(self, x, block):
        """x (B, T, N+1, D) -> the same shape: what the heads put out, side by side"""
        attn = block.attn
        x = self.adapters["qkv"](x) if "qkv" in self.adapters else x
        layers = zip("qkv", attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3))
        q, k, v = (self.linear(name, x, W, b) for name, W, b in layers)  # eq. (3)
        k, v = self.relocate(k, attn.heads), self.relocate(v, attn.heads)
        q, k, v = (rearrange(y, "b t n (h d) -> (b t) h n d", h=attn.heads) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)  # eqs. (7) and (8): softmax(Q K^T / sqrt(d)) V
        return rearrange(y, "(b t) h n d -> b t n (h d)", t=x.shape[1])

    def hidden(self, x, block):
        """x (B, T, N+1, D) -> B x T x N+1 x 4D, the middle of the MLP"""
        return block.mlp.gelu(self.linear("up", x, block.mlp.c_fc.weight, block.mlp.c_fc.bias))

    def forward(self, z, block):
        """z (B, T, N+1, D) -> the same shape"""
        # W_o and W_down stand outside of the branches, so that recomputation does not have to run them again.
        attn, mlp = block.attn, block.mlp
        y = block.branch(lambda z: self.stdha(block.ln_1(z), block), z)
        z = z + attn.norm(self.linear("o", y, attn.out_proj.weight, attn.out_proj.bias))  # eqs. (9) and (1)
        y = block.branch(lambda z: self.hidden(block.ln_2(z), block), z)
        return z + mlp.norm(self.linear("down", y, mlp.c_proj.weight, mlp.c_proj.bias))  # eqs. (6) and (2)

    @torch.no_grad()
    def merge(self, block):
        """Structural reparameterization (section 3.3): the adapters into the frozen weights, in place."""
        W, b = block.attn.in_proj_weight, block.attn.in_proj_bias
        o, up, down = block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj
        layers = {"o": (o.weight, o.bias), "up": (up.weight, up.bias), "down": (down.weight, down.bias), "qkv": (W, b)}
        layers |= zip("qkv", zip(W.chunk(3), b.chunk(3)))  # views of the fused weight: to copy into them changes it
        for name, adapter in self.adapters.items():
            for frozen, merged in zip(layers[name], adapter.merge(*(p.double() for p in layers[name]))):
                frozen.copy_(merged)
        self.adapters = nn.ModuleDict()


class ZeroI2V(nn.Module):
    """The video model. `clip` is a `common.ViT`; it is frozen in place. The defaults are the paper's K400 settings.

    dataset: "k400" or "ssv2", whose row of table 6 gives the head offsets and the adapters for this ViT and num_frames.
    offsets: dt of each head in turn, further heads have 0: "-1 1 -2", or a sequence; "" for table 6.
    adapt: which layers are adapted: "qkv o up down" (4 adapters), "q k v o up down" (6), ...; "" for table 6.
    kind: how (table 2): "linear", "gelu", "lora"; "temporal heads" tunes only these, "none" nothing, "full" the ViT.
    ratio: bottleneck width over D (table 8). scale: s of an adapter (released: 0.5 on K400, 1 on SSv2).
    temporal: the zero-cost operator (table 1a): "heads" (STDHA), "channels", "class" or "none".
    """

    loss = staticmethod(cross_entropy)  # the training loop asks every model for its loss

    def __init__(
        self,
        clip,
        num_classes,
        num_frames=8,
        dataset="k400",
        offsets="",
        adapt="",
        kind="linear",
        ratio=0.25,
        scale=0.5,
        temporal="heads",
        adapter_dropout=0.0,
        dropout=0.5,
    ):
        super().__init__()
        width, heads = clip.width, clip.heads
        their_offsets, their_adapt = table_6(heads, num_frames, dataset)
        offsets = offsets.replace(",", " ").split() if isinstance(offsets, str) else offsets
        offsets = [int(dt) for dt in offsets] or their_offsets
        offsets = [*offsets, *[0] * (heads - len(offsets))]
        default = {"lora": "q k v o up down", "temporal heads": "q k v o"}.get(kind, their_adapt)
        names = [] if kind in ("none", "full") else (adapt or default).replace(",", " ").split()
        groups = [(dt, width // heads * len(list(same))) for dt, same in itertools.groupby(offsets)]
        layers = {"q", "k", "v", "o", "up", "down"} | ({"qkv"} if kind != "lora" and not {*"qkv"} & {*names} else set())
        for what, chosen, known in (
            ("kind", {kind}, KINDS),
            ("temporal", {temporal}, OPERATORS),
            ("adapt", {*names}, layers),
        ):
            if not chosen <= set(known):
                raise ValueError(f"{what} is {' '.join(chosen)!r}; it must be of: {', '.join(known)}")
        if len(offsets) > heads:
            raise ValueError(f"{len(offsets)} head offsets for a ViT of {heads} heads")

        self.num_frames = num_frames
        self.vit = freeze(clip)
        (self.vit if kind == "full" else self.vit.ln_post).requires_grad_(True)  # ln_post: (released code)
        # (released code) Zero at the start, and added to every token of its frame.
        self.temporal_embedding = nn.Parameter(torch.zeros(1, num_frames, width))
        how = dict(offsets=offsets, bottleneck=bottleneck_width(width, ratio), scale=scale, dropout=adapter_dropout)
        self.blocks = nn.ModuleList()
        for block in clip.blocks:
            adapters = {name: make_adapter(kind, name, block, **how) for name in names}
            self.blocks.append(OPERATORS[temporal](adapters, groups))
        self.dropout = nn.Dropout(dropout)  # (released code)
        self.head = classifier(width, num_classes)

    def features(self, video):
        """video (B, T, 3, H, W) -> (B, D), the mean over frames of the normalised [class] tokens."""
        T = video.shape[1]
        if self.num_frames != T:
            raise ValueError(f"the clip has {T} frames, the model was built for num_frames={self.num_frames}")
        z = self.vit.embed(video.flatten(0, 1)).unflatten(0, (-1, T))  # B x T x N+1 x D
        z = self.vit.ln_pre(z + self.temporal_embedding[:, :, None].to(z.dtype))  # + 1 x T x 1 x D
        for adapted, block in zip(self.blocks, self.vit.blocks):
            z = adapted(z, block)
        return self.vit.ln_post(z[:, :, 0]).mean(1)  # the norm before the mean (released code)

    def forward(self, video):
        """video (B, T, 3, H, W), normalised -> logits (B, num_classes)"""
        return self.head(self.dropout(self.features(video)))

    def merge(self):
        """Folds every adapter into the frozen weights, in place -> self, now as small and fast as the plain ViT."""
        for adapted, block in zip(self.blocks, self.vit.blocks):
            adapted.merge(block)
        return self


def table_6(heads, num_frames, dataset):
    """Table 6 -> (dt of the temporal heads, relocated heads first as in the released code; which weights are adapted)

    Other numbers of heads and frames follow its rule: ceil(h / 12) heads for each of -1 and +1, more for more frames.
    """
    if dataset not in ("k400", "ssv2"):
        raise ValueError(f"dataset is {dataset!r}; table 6 has k400 and ssv2")
    n = -(-heads // 12)
    more = []
    if num_frames >= 32:
        more = [-2, 2, 3]
    elif num_frames >= 16:
        more = [2] if dataset == "k400" else [-2] * n + [2] * n
    six = dataset == "ssv2" and n == 1 and num_frames < 16
    return [*[-1] * n, *[1] * n, *more][:heads], "q k v o up down" if six else "qkv o up down"


def load_official(model, checkpoint):
    """Reads the authors' checkpoint, as `torch.load` gives it, with any prefix; ValueError if it does not fit."""
    renamed = {}
    for key, tensor in tensors_of(checkpoint).items():
        key = re.sub(r"^.*?cls_head\.fc_cls\.", "head.", key)
        key = re.sub(r"^.*?backbone\.(?!temporal_embedding)", "vit.", key)
        key = re.sub(r"^.*?backbone\.", "", key)
        adapter = re.fullmatch(r"vit\.transformer\.resblocks\.(\d+)\.(\w+)\.D_(fc[12]\.\w+)", key)
        if adapter and adapter[2] in RELEASED_NAMES:
            key = f"blocks.{adapter[1]}.adapters.{RELEASED_NAMES[adapter[2]]}.{adapter[3]}"
        renamed[key] = tensor
    load_strict(model, renamed, "of ZeroI2V's authors")


RELEASED_NAMES = dict(T_Adapter_in="qkv", T_Adapter_in_q="q", T_Adapter_in_k="k", T_Adapter_in_v="v")
RELEASED_NAMES |= dict(S_Adapter="o", MLP_Adapter="up", MLP_Adapter_out="down")

# Table 7 and the released configurations. 8, 16, 32 frames every 16th, 8th, 4th are a span of 128 video frames.
K400 = dict(
    epochs=40, warmup_epochs=2.5, batch_size=64, lr=3e-4, weight_decay=0.05, span=128, views=(3, 1),
    augment=dict(crop=(0.08, 1.0), flip=0.5, randaugment=(4, 7)),
)  # fmt: skip
SSV2 = dict(
    K400, epochs=50, span=0, views=(1, 3), label_smoothing=0.1, model=dict(dataset="ssv2", scale=1.0),
    augment=dict(crop=(0.08, 1.0), flip=0.5, randaugment=(4, 7), erasing=0.25),
)  # fmt: skip
TOY = dict(
    backbone="ViT-Toy-16", pretrained="shipped", epochs=8, warmup_epochs=0.3, batch_size=12, lr=4e-3, embedding_lr=5.0,
    weight_decay=0.05, clip_grad=1.0, eval_every=8,
    model=dict(offsets="-1 1 2", adapt="q k v o up down", dropout=0.0),  # its ViT has three heads
)  # fmt: skip
RECIPES = {"k400": K400, "ssv2": SSV2, "toy": TOY}

# What follows is for the ablations: the other kinds of table 2, and the other operators of table 1(a).

KINDS = ("linear", "gelu", "lora", "temporal heads", "none", "full")


def make_adapter(kind, name, block, offsets, bottleneck, scale, dropout):
    """What adapts the frozen layer `name` of a block."""
    width, mlp_width = len(block.attn.out_proj.weight), len(block.mlp.c_fc.weight)
    if kind == "temporal heads":
        return OnlyTemporalHeads(width, offsets, columns=name == "o")
    if kind == "lora":
        sizes = {"up": (width, mlp_width), "down": (mlp_width, width)}
        return LoRA(*sizes.get(name, (width, width)), bottleneck, scale)
    cls = GELUAdapter if kind == "gelu" else LinearAdapter
    return cls(width, bottleneck, scale, dropout, after=name in ("o", "down"))


class GELUAdapter(LinearAdapter):
    """The "Adapter w/ GELU", which cannot merge."""

    def forward(self, x):
        return x + self.scale * self.fc2(self.dropout(F.gelu(self.fc1(x))))

    def merge(self, W, b):
        raise ValueError("an adapter with an activation cannot be merged")


class LoRA(nn.Module):
    """Eq. (10): an update W_up W_down beside a frozen weight (Hu et al., ICLR 2022), zero at the start."""

    def __init__(self, inputs, outputs, bottleneck, scale):
        super().__init__()
        self.scale = scale
        self.down = nn.Linear(inputs, bottleneck, bias=False)
        self.up = nn.Linear(bottleneck, outputs, bias=False)
        nn.init.zeros_(self.up.weight)

    def adapt(self, x, W, b):
        return F.linear(x, W, b) + self.scale * self.up(self.down(x))

    def merge(self, W, b):
        return W + self.scale * self.up.weight.double() @ self.down.weight.double(), b  # eq. (10)


class OnlyTemporalHeads(nn.Module):
    """An update of the rows of W_q, W_k, W_v, or the columns of W_o, that belong to temporal heads (appendix A.2)."""

    def __init__(self, width, offsets, columns):
        super().__init__()
        channels = [i for i in range(width) if offsets[i // (width // len(offsets))]]
        self.register_buffer("channels", torch.tensor(channels, dtype=torch.long), persistent=False)
        self.columns, self.weight = columns, nn.Parameter(torch.zeros(len(channels), width))

    def adapt(self, x, W, b):
        y = F.linear(x, W, b)
        if self.columns:
            return y + F.linear(x[..., self.channels], self.weight.T)
        return y.index_add(-1, self.channels, F.linear(x, self.weight))

    def merge(self, W, b):
        update = self.weight.double()
        return (W.index_add(1, self.channels, update.T) if self.columns else W.index_add(0, self.channels, update)), b


class ChannelShift(ZeroI2VBlock):
    """The temporal channel shift of table 1(a): the same share of the channels moves, but of every head."""

    def relocate(self, x, heads):
        groups = [(dt, channels // heads) for dt, channels in self.groups if dt]
        groups.append((0, x.shape[-1] // heads - sum(channels for _, channels in groups)))
        return shift(x.unflatten(-1, (heads, -1)), groups).flatten(-2)


class NoShift(ZeroI2VBlock):
    def relocate(self, x, heads):
        return x


class ClassShift(NoShift):
    """The [class] token shift of table 1(a): channels of the [class] tokens alone move, before MHSA and before MLP."""

    def stdha(self, x, block):
        return super().stdha(torch.cat([shift(x[:, :, :1], self.groups), x[:, :, 1:]], dim=2), block)

    def hidden(self, x, block):
        return super().hidden(torch.cat([shift(x[:, :, :1], self.groups), x[:, :, 1:]], dim=2), block)


OPERATORS = {"heads": ZeroI2VBlock, "channels": ChannelShift, "class": ClassShift, "none": NoShift}

# Tables 3 and 4 print the merged model, which is the one of `kind="none"`, and GFLOPs for three views.
# label, ViT, switches, frames, total (M), tunable (M), GFLOPs per view[, measure memory]; None: not in the paper
PAPER = [
    ("K400, ViT-B/16, 8 frames", B16, {}, 8, None, 14),
    ("K400, ViT-L/14, 8 frames", L14, {}),
    ("SSv2, ViT-B/16, 8 frames", B16, SSV2["model"]),
    ("SSv2, ViT-L/14, 8 frames", L14, SSV2["model"]),
    ("merged, ViT-B/16, 8 frames", B16, dict(kind="none"), 8, 86, None, 422 / 3, False),
    ("merged, ViT-B/16, 16 frames", B16, dict(kind="none"), 16, 86, None, 844 / 3, False),
    ("merged, ViT-B/16, 32 frames", B16, dict(kind="none"), 32, 86, None, 1688 / 3, False),
    ("merged, ViT-L/14, 8 frames", L14, dict(kind="none"), 8, 304, None, 1946 / 3, False),
    ("merged, ViT-L/14, 16 frames", L14, dict(kind="none"), 16, 304, None, 3892 / 3, False),
    ("merged, ViT-L/14, 32 frames", L14, dict(kind="none"), 32, 304, None, 7783 / 3, False),
    ("full fine-tuning", B16, dict(kind="full"), None, None, 86),
    ("linear probe", B16, dict(kind="none"), None, None, 0),
    ("only tuning the temporal heads", B16, dict(kind="temporal heads"), None, None, 4.6),
]
PAPER += [  # of table 2: kind, bottleneck width, adapted layers, tunable parameters of the adapters (M)
    (f"{kind}, {width} wide: {adapt}", B16, dict(kind=kind, ratio=width / 768, adapt=adapt), None, None, millions)
    for kind, width, adapt, millions in (
        ("lora", 192, "q v", 7), ("lora", 192, "q k v o", 14), ("lora", 192, "q v up down", 25),
        ("lora", 128, "q v up down", 17), ("lora", 192, "q k v o up down", 32), ("lora", 128, "q k v o up down", 21),
        ("gelu", 96, "qkv o up down", 7), ("gelu", 192, "qkv up", 7), ("gelu", 192, "qkv o up", 10),
        ("gelu", 192, "qkv o up down", 14), ("linear", 96, "qkv o up down", 7), ("linear", 192, "qkv up", 7),
        ("linear", 192, "qkv o up", 10), ("linear", 192, "qkv o up down", 14), ("linear", 192, "q k v o up down", 20),
        ("linear", 128, "q k v o up down", 14),
    )
]  # fmt: skip


if __name__ == "__main__":
    from colab import merge, tables

    merge.main(sys.argv[2:]) if sys.argv[1:2] == ["merge"] else tables.compare(ZeroI2V, PAPER)
