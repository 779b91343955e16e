"""ZeroI2V: Zero-Cost Adaptation of Pre-trained Transformers from Image to Video (Li et al., ECCV 2024).

The image transformer is frozen. Some heads of its attention take their keys and values from neighbouring frames, which
costs nothing (STDHA). Linear adapters around the frozen layers make up for the difference between images and videos;
having no activation, they merge into those layers after training: the video model is then a plain ViT, in cost as well.

       z (B, T, N+1, D)
       |--- LN1 --- A_in --- W_q, W_k, W_v --- STDHA --- W_o --- A_out --- (+)      eqs. (7) to (9)
       |--- LN2 --- B_in --- W_up --- activation --- W_down --- B_out ---- (+)      each adapter: eq. (11)
       z (B, T, N+1, D)

       W_k X^t, W_v X^t:  head 1 | head 2 | head 3 | ...     as the image model has them, of frame t
       STDHA at frame t:  t - 1  | t + 1  |   t    | ...     dt = -1, +1, 0, ...: whose keys and values a head sees

B clips, T frames, N patches a frame, D width. Frozen: the whole ViT but ln_post. Tuned: adapters, temporal embedding,
ln_post, classifier.

    python zeroi2v.py                              the paper's tables beside what this code measures
    python zeroi2v.py merge CHECKPOINT OUT         a trained checkpoint as a plain CLIP image tower
"""

import argparse
import itertools
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import save_file
from torch import nn

from common import (
    B16,
    L14,
    QuickGELU,
    bottleneck_width,
    classifier,
    freeze,
    load_clip,
    load_strict,
    load_tuned,
    tensors_of,
    tuned_state,
)

WEIGHTS = ("q", "k", "v", "o", "up", "down")  # of a block: table 2's columns; "qkv" is one adapter for three of them


class Adapter(nn.Module):
    """x + s W_up W_down x: eq. (11) in the released code, with biases and a scale; from the identity.

    With an activation between the two, it is table 2's "Adapter w/ GELU", which does not merge.
    """

    def __init__(self, width, bottleneck, scale, dropout=0.0, activation=None):
        super().__init__()
        self.scale = scale
        self.fc1 = nn.Linear(width, bottleneck)
        self.activation = activation or nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(bottleneck, width)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x):
        return x + self.scale * self.fc2(self.dropout(self.activation(self.fc1(x))))

    def affine(self):
        """The adapter as (A, a): x -> A x + a, in float64."""
        (W1, b1), (W2, b2) = ((fc.weight.double(), fc.bias.double()) for fc in (self.fc1, self.fc2))
        return torch.eye(len(W2)).to(W2) + self.scale * W2 @ W1, self.scale * (W2 @ b1 + b2)


class LoRA(nn.Module):
    """Eq. (10): an update W_up W_down of a weight (Hu et al., ICLR 2022), from zero."""

    def __init__(self, inputs, outputs, bottleneck, scale):
        super().__init__()
        self.scale = scale
        self.down = nn.Linear(inputs, bottleneck, bias=False)
        self.up = nn.Linear(bottleneck, outputs, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.scale * self.up(self.down(x))

    def update(self):
        return self.scale * self.up.weight.double() @ self.down.weight.double()


class TemporalHeads(nn.Module):
    """Only tuning the temporal heads (appendix A.2): an update of their rows of W_q, W_k, W_v, or columns of W_o."""

    def __init__(self, width, channels, columns):
        super().__init__()
        self.columns = columns
        self.weight = nn.Parameter(torch.zeros(width, len(channels)) if columns else torch.zeros(len(channels), width))
        self.register_buffer("channels", torch.tensor(channels, dtype=torch.long), persistent=False)

    def forward(self, x):
        if self.columns:
            return F.linear(x[..., self.channels], self.weight)
        y = F.linear(x, self.weight)
        return torch.zeros_like(x, dtype=y.dtype).index_copy(-1, self.channels, y)

    def update(self):
        width = max(self.weight.shape)
        zeros = self.weight.new_zeros(width, width, dtype=torch.float64)
        return zeros.index_copy(int(self.columns), self.channels, self.weight.double())


class ZeroI2VBlock(nn.Module):
    """What ZeroI2V adds to one block. The frozen block is lent to `forward`: CLIP's weights keep their names."""

    def __init__(self, adapters, temporal, groups):
        super().__init__()
        self.adapters = nn.ModuleDict(adapters)
        self.temporal = temporal  # which zero-cost operator of table 1(a)
        self.groups = groups  # [(dt, channels), ...], in the order of the heads

    def shift(self, x, groups):
        """Each group of the channels of x (B, T, ...) from frame t + dt, or from t itself where that is outside."""
        parts = []
        for part, (dt, _) in zip(x.split([channels for _, channels in groups], dim=-1), groups):
            if 0 < dt < x.shape[1]:
                part = torch.cat([part[:, dt:], part[:, -dt:]], dim=1)
            elif 0 > dt > -x.shape[1]:
                part = torch.cat([part[:, :-dt], part[:, :dt]], dim=1)
            parts.append(part)
        return torch.cat(parts, dim=-1)

    def relocate(self, x, heads):
        """The keys or the values, (B, T, N+1, D), as the queries of frame t see them."""
        if self.temporal == "heads":  # K_i^(t + dt_i) of eq. (8): whole heads move
            return self.shift(x, self.groups)
        if self.temporal == "channels":  # the same share of the channels, but of every head
            groups = [(dt, channels // heads) for dt, channels in self.groups if dt]
            groups.append((0, x.shape[-1] // heads - sum(channels for _, channels in groups)))
            return self.shift(x.unflatten(-1, (heads, -1)), groups).flatten(-2)
        return x

    def normed(self, ln, z):
        x = ln(z)
        if self.temporal == "class":  # of the [class] tokens alone, before MHSA and MLP
            x = torch.cat([self.shift(x[:, :, :1], self.groups), x[:, :, 1:]], dim=2)
        return x

    def linear(self, name, x, weight, bias):
        """The frozen layer `name` with what adapts it; an adapter behind W_o and W_down is `behind`'s affair."""
        if name not in self.adapters:
            return F.linear(x, weight, bias)
        adapter = self.adapters[name]
        if not isinstance(adapter, Adapter):
            return F.linear(x, weight, bias) + adapter(x)
        return F.linear(x if name in ("o", "down") else adapter(x), weight, bias)

    def behind(self, name, x):
        serial = name in self.adapters and isinstance(self.adapters[name], Adapter)
        return self.adapters[name](x) if serial else x

    def stdha(self, z, block):
        x, attn = self.normed(block.ln_1, z), block.attn
        if "qkv" in self.adapters:
            x = self.adapters["qkv"](x)
        layers = zip("qkv", attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3))
        q, k, v = (self.linear(name, x, weight, bias) for name, weight, bias in layers)
        k, v = self.relocate(k, attn.heads), self.relocate(v, attn.heads)
        q, k, v = (rearrange(y, "b t n (h d) -> (b t) h n d", h=attn.heads) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)  # eqs. (7), (8)
        y = rearrange(y, "(b t) h n d -> b t n (h d)", t=z.shape[1])
        return self.linear("o", y, attn.out_proj.weight, attn.out_proj.bias)  # eq. (9)

    def mlp(self, z, block):
        x, mlp = self.normed(block.ln_2, z), block.mlp
        x = mlp.gelu(self.linear("up", x, mlp.c_fc.weight, mlp.c_fc.bias))
        return self.linear("down", x, mlp.c_proj.weight, mlp.c_proj.bias)

    def forward(self, z, block):
        """z (B, T, N+1, D) -> the same shape"""
        z = z + block.attn.norm(self.behind("o", block.branch(self.stdha, z, block)))  # eq. (1)
        return z + block.mlp.norm(self.behind("down", block.branch(self.mlp, z, block)))  # eq. (2)

    @torch.no_grad()
    def merge(self, block):
        """Structural reparameterization (section 3.3): the adapters into the frozen weights, in float64."""
        in_weight, in_bias = block.attn.in_proj_weight, block.attn.in_proj_bias
        layers = dict(zip("qkv", zip(in_weight.chunk(3), in_bias.chunk(3))))
        layers["qkv"] = in_weight, in_bias
        for name, layer in (("o", block.attn.out_proj), ("up", block.mlp.c_fc), ("down", block.mlp.c_proj)):
            layers[name] = layer.weight, layer.bias
        for name, adapter in self.adapters.items():
            weight, bias = layers[name]
            W, b = weight.double(), bias.double()
            if not isinstance(adapter, Adapter):
                W = W + adapter.update()  # eq. (10)
            elif not isinstance(adapter.activation, nn.Identity):
                raise ValueError("an adapter with an activation cannot be merged")
            else:
                A, a = adapter.affine()
                W, b = (A @ W, A @ b + a) if name in ("o", "down") else (W @ A, W @ a + b)  # eq. (11)
            weight.copy_(W)
            bias.copy_(b)
        self.adapters = nn.ModuleDict()


class ZeroI2V(nn.Module):
    """The video model. `clip` is a `common.ViT`; it is frozen in place. The defaults are the paper's K400 settings.

    dataset: "k400" or "ssv2", whose row of table 6 gives the head offsets and the adapters for this ViT and num_frames.
    offsets: dt of each head in turn, further heads have 0: "-1 1 -2", or a sequence; "" for table 6.
    adapt: which of W_q, W_k, W_v, W_o, W_up, W_down are adapted: "qkv o up down" (4 adapters), "q k v o up down" (6),
        ...; "" for table 6.
    kind: how (table 2): "linear", "gelu", "lora"; "temporal heads" tunes only these, "none" nothing, "full" the ViT.
    ratio: bottleneck width over D (table 8). scale: s of an adapter (released: 0.5 on K400, 1 on SSv2).
    temporal: the zero-cost operator (table 1a): "heads" (STDHA), "channels", "class" or "none".
    """

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
        kinds = ("linear", "gelu", "lora", "temporal heads", "none", "full")
        operators = ("heads", "channels", "class", "none")
        for name, value, known in (("kind", kind, kinds), ("temporal", temporal, operators)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; it must be one of: {', '.join(known)}")
        width, heads = clip.width, clip.heads
        offsets = offsets.replace(",", " ").split() if isinstance(offsets, str) else offsets
        their_offsets, their_adapt = table_6(heads, num_frames, dataset)
        try:
            offsets = [int(dt) for dt in offsets] or their_offsets
        except ValueError:
            raise ValueError(f"offsets is {' '.join(offsets)!r}; it must be whole numbers: -1 1 2") from None
        names = (adapt or their_adapt).replace(",", " ").split()
        if kind == "lora" and not adapt:
            names = WEIGHTS
        unknown = [name for name in names if name not in (*WEIGHTS, "qkv")]
        if unknown or ("qkv" in names and (kind == "lora" or {"q", "k", "v"} & set(names))):
            raise ValueError(f"adapt is {adapt!r}; {kind} goes with some of {', '.join(WEIGHTS)}, or qkv for three")
        if len(offsets) > heads:
            raise ValueError(f"{len(offsets)} head offsets for a ViT of {heads} heads")
        offsets = [*offsets, *[0] * (heads - len(offsets))]
        bottleneck, size = bottleneck_width(width, ratio), width // heads
        groups = [(dt, size * len(list(same))) for dt, same in itertools.groupby(offsets)]
        channels = [size * i + j for i, dt in enumerate(offsets) if dt for j in range(size)]  # of the temporal heads

        def adapter(name):
            if kind == "lora":
                mlp_width = clip.blocks[0].mlp.c_fc.out_features
                inputs, outputs = mlp_width if name == "down" else width, mlp_width if name == "up" else width
                return LoRA(inputs, outputs, bottleneck, scale)
            return Adapter(width, bottleneck, scale, adapter_dropout, nn.GELU() if kind == "gelu" else None)

        self.num_frames = num_frames
        self.vit = freeze(clip)
        (self.vit if kind == "full" else self.vit.ln_post).requires_grad_(True)
        # Released code: zero at the start, added to every token of its frame.
        self.temporal_embedding = nn.Parameter(torch.zeros(1, num_frames, width))
        self.blocks = nn.ModuleList()
        for _ in clip.blocks:
            adapters = {name: adapter(name) for name in names} if kind in ("linear", "gelu", "lora") else {}
            if kind == "temporal heads":
                adapters = {name: TemporalHeads(width, channels, name == "o") for name in "qkvo"}
            self.blocks.append(ZeroI2VBlock(adapters, temporal, groups))
        self.dropout = nn.Dropout(dropout)
        self.head = classifier(width, num_classes)

    def features(self, video):
        """video (B, T, 3, H, W) -> (B, D), the mean over frames of the normalised [class] tokens."""
        B, T = video.shape[:2]
        if self.num_frames != T:
            raise ValueError(f"the clip has {T} frames, the model was built for num_frames={self.num_frames}")
        z = self.vit.embed(video.flatten(0, 1)).unflatten(0, (B, T))  # B x T x N+1 x D
        z = self.vit.ln_pre(z + self.temporal_embedding[:, :, None].to(z.dtype))
        for adapted, block in zip(self.blocks, self.vit.blocks):
            z = adapted(z, block)
        return self.vit.ln_post(z[:, :, 0]).mean(1)

    def forward(self, video):
        """video (B, T, 3, H, W), normalised -> logits (B, num_classes)"""
        return self.head(self.dropout(self.features(video)))

    def merge(self):
        """Folds every adapter into the frozen weights, in place -> self, now as small and fast as the plain ViT."""
        for adapted, block in zip(self.blocks, self.vit.blocks):
            adapted.merge(block)
        return self


def table_6(heads, num_frames, dataset):
    """Table 6 -> (dt of the temporal heads, in the released order; which weights have adapters).

    Other numbers of heads and frames follow its rule: ceil(h / 12) heads for each of -1 and +1, a wider field for more
    frames.
    """
    if dataset not in ("k400", "ssv2"):
        raise ValueError(f"dataset is {dataset!r}; table 6 has k400 and ssv2")
    n = -(-heads // 12)
    near = [-1] * n + [1] * n
    if num_frames < 16:
        offsets = near
    elif num_frames < 32:
        offsets = [*near, 2] if dataset == "k400" else near + [-2] * n + [2] * n
    else:
        offsets = [*near, -2, 2, 3]
    six = dataset == "ssv2" and n == 1 and num_frames < 16
    return offsets[:heads], "q k v o up down" if six else "qkv o up down"


def load_official(model, checkpoint):
    """Reads the authors' checkpoint as `torch.load` gives it, nested, with any prefix; ValueError if it misfits."""
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


RELEASED_NAMES = {
    "T_Adapter_in": "qkv",
    "T_Adapter_in_q": "q",
    "T_Adapter_in_k": "k",
    "T_Adapter_in_v": "v",
    "S_Adapter": "o",
    "MLP_Adapter": "up",
    "MLP_Adapter_out": "down",
}

# Table 7 and the released configurations. 8, 16, 32 frames every 16th, 8th, 4th are a span of 128 video frames.
K400 = dict(
    epochs=40,
    warmup_epochs=2.5,
    batch_size=64,
    lr=3e-4,
    weight_decay=0.05,
    span=128,
    views=(3, 1),
    augment=dict(crop=(0.08, 1.0), flip=0.5, randaugment=dict(num_ops=4, magnitude=7)),
)
SSV2 = dict(
    K400,
    epochs=50,
    span=0,
    views=(1, 3),
    label_smoothing=0.1,
    augment=dict(crop=(0.08, 1.0), flip=0.5, randaugment=dict(num_ops=4, magnitude=7), erasing=0.25),
    model=dict(dataset="ssv2", scale=1.0),
)
TOY = dict(
    backbone="ViT-Toy-16",
    pretrained="shipped",
    epochs=8,
    warmup_epochs=0.3,
    batch_size=12,
    lr=4e-3,
    temporal_lr=5.0,
    weight_decay=0.05,
    clip_grad=1.0,
    eval_every=8,
    model=dict(offsets="-1 1 2", adapt="q k v o up down", dropout=0.0),  # its ViT has three heads
)
RECIPES = {"k400": K400, "ssv2": SSV2, "toy": TOY}

# Tables 3 and 4 print the merged model, which is the one of `kind="none"`, and GFLOPs for three views. Table 2 compares
# what is tuned at ViT-B/16 (adapters only), by their width.
# label, ViT, switches, frames, total (M), tunable (M), GFLOPs per view; None where the paper prints nothing
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
for kind, width, adapt, millions in (
    ("lora", 192, "q v", 7),
    ("lora", 192, "q k v o", 14),
    ("lora", 192, "q v up down", 25),
    ("lora", 128, "q v up down", 17),
    ("lora", 192, "q k v o up down", 32),
    ("lora", 128, "q k v o up down", 21),
    ("gelu", 96, "qkv o up down", 7),
    ("gelu", 192, "qkv up", 7),
    ("gelu", 192, "qkv o up", 10),
    ("gelu", 192, "qkv o up down", 14),
    ("linear", 96, "qkv o up down", 7),
    ("linear", 192, "qkv up", 7),
    ("linear", 192, "qkv o up", 10),
    ("linear", 192, "qkv o up down", 14),
    ("linear", 192, "q k v o up down", 20),
    ("linear", 128, "q k v o up down", 14),
):
    switches = dict(kind=kind, ratio=width / 768, adapt=adapt)
    PAPER.append((f"{kind}, {width} wide: {adapt}", B16, switches, None, None, millions))


def merge_checkpoint(source, target):
    """The command line's `merge`: reads what train.py saved, folds the adapters, writes two files.

    target: the image tower by CLIP's names, for open_clip's `visual.load_state_dict` and our `load_clip`. Beside it,
    NAME.video.pt: a checkpoint for `train.py --eval` and `--predict` that holds the rest and names the tower.
    """
    try:
        checkpoint = torch.load(source, map_location="cpu", weights_only=True)
        run, classes, state = checkpoint["run"], checkpoint["classes"], checkpoint["state"]
    except Exception as error:  # whatever the unpickler says of a file that is not ours
        raise ValueError(f"{source} is not a checkpoint of train.py ({type(error).__name__})") from error
    if run["method"] != "zeroi2v":
        raise ValueError(f"{source} is of --method {run['method']}, which does not merge")
    if not target.parent.is_dir() or target.is_dir() or target.resolve() == source.resolve():
        raise ValueError(f"{target} cannot be written: name a new file in a folder that exists")
    torch.manual_seed(run["seed"])
    clip = load_clip(run["backbone"], run["pretrained"], run["image_size"], run.get("quick_gelu"))
    tower = clip.state_dict()  # with the projection, which `freeze` drops
    model = ZeroI2V(clip, len(classes), run["num_frames"], **run["model"])
    load_tuned(model, state, source)
    tower |= model.merge().vit.state_dict()
    (save_file if target.suffix == ".safetensors" else torch.save)(tower, target)

    quick_gelu = isinstance(clip.blocks[0].mlp.gelu, QuickGELU)  # which the tower's file does not tell
    size = dict(pretrained=str(target.resolve()), image_size=clip.image_size, quick_gelu=quick_gelu)
    merged = run | size | {"model": run["model"] | {"kind": "none"}}
    rest = {k: v for k, v in checkpoint.items() if k in ("classes", "groups", "result")}
    beside = target.with_suffix(".video.pt")
    torch.save({"run": merged, "state": tuned_state(model), **rest}, beside)
    print(f"{target}: the merged image tower, for open_clip's visual.load_state_dict, and")
    print(
        f"  load_clip({run['backbone']!r}, {str(target)!r}, quick_gelu={quick_gelu})  # the file cannot tell the last"
    )
    print(f"{beside}: the video model on it, which must stay where it is: train.py --eval --checkpoint {beside}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command = parser.add_subparsers(dest="command", metavar="merge").add_parser("merge", help="fold the adapters")
    command.add_argument("checkpoint", type=Path, help="the checkpoint.pt of a run of train.py --method zeroi2v")
    command.add_argument("out", type=Path, help="the file to write the image tower to")
    args = parser.parse_args(argv)
    if args.command is None:
        from colab.tables import compare

        return compare(ZeroI2V, PAPER)
    try:
        merge_checkpoint(args.checkpoint, args.out)
    except (ValueError, OSError) as error:
        sys.exit(f"zeroi2v.py: {error}")


if __name__ == "__main__":
    main()
