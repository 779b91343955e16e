"""The CLIP image tower in plain PyTorch, its loader, the space-only baselines, and what the four methods share.

    ViT          the image tower of "Learning Transferable Visual Models From Natural Language Supervision"
                 (Radford et al., ICML 2021), parameter names as in OpenAI's release, so that weights load as they are
    load_clip    any plain-ViT CLIP of open_clip and plain ViT of timm, by name and tag or from a local file
    SpaceOnly    linear probe, partial and full fine-tuning on frames alone: what every method must beat

Shapes: B clips, T frames, N patches a frame, D width, h heads.
"""

import difflib
import re
import zipfile
from collections import OrderedDict
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SHIPPED = Path(__file__).resolve().parent / "colab"  # NAME.json and NAME.safetensors of the CLIP that comes with us


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the GELU of OpenAI's CLIP, written as a SiLU so that autograd keeps one tensor, not two."""

    def forward(self, x):
        return F.silu(1.702 * x).div_(1.702)


class LayerNorm(nn.LayerNorm):
    """LayerNorm that answers in the dtype of its input: autocast would keep a float32 copy of every activation."""

    def forward(self, x):
        with nullcontext() if x.dtype == torch.float32 else torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head self-attention along the second-last dimension; parameters named as nn.MultiheadAttention's."""

    def __init__(self, width, heads, norm=None):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width**-0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.norm = norm or nn.Identity()  # on the answer, in post-norm blocks

    def forward(self, x):
        """x (..., n, D) -> (..., n, D)"""
        # One product of two matrices; of a transposed x, as along time, PyTorch would make one for each sequence.
        qkv = F.linear(x.contiguous(), self.in_proj_weight, self.in_proj_bias).flatten(0, -3)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.norm(self.out_proj(rearrange(y, "b h n d -> b n (h d)").view_as(x)))


class Block(nn.Module):
    """Pre-norm transformer block: x + MSA(LN(x)), then x + MLP(LN(x)).

    In EVA's post-norm blocks, x + LN(MSA(x)), the norms stand at the end of `attn` and `mlp`, and `ln_1`, `ln_2` do
    nothing: whoever calls `attn(ln_1(x))` is right for both.
    """

    recompute = False  # keep a branch's input only, and compute the rest again in the backward pass

    def __init__(self, width, heads, mlp_width, activation, post_norm=False, eps=1e-5):
        super().__init__()
        self.ln_1 = nn.Identity() if post_norm else LayerNorm(width, eps)
        self.attn = Attention(width, heads, LayerNorm(width, eps) if post_norm else None)
        self.ln_2 = nn.Identity() if post_norm else LayerNorm(width, eps)
        layers = ("c_fc", nn.Linear(width, mlp_width)), ("gelu", activation()), ("c_proj", nn.Linear(mlp_width, width))
        norm = ("norm", LayerNorm(width, eps) if post_norm else nn.Identity())
        self.mlp = nn.Sequential(OrderedDict((*layers, norm)))

    def branch(self, function, *x):
        """function(*x), cheap in memory if `recompute`"""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(function, *x, use_reentrant=False)
        return function(*x)

    def msa(self, x):
        return self.branch(lambda x: self.attn(self.ln_1(x)), x)

    def ffn(self, x):
        return self.branch(lambda x: self.mlp(self.ln_2(x)), x)

    def forward(self, x):
        x = x + self.msa(x)
        return x + self.ffn(x)


class ViT(nn.Module):
    """CLIP's image tower. `forward` answers images (B, 3, H, W) with embeddings (B, output_dim).

    The video methods use its parts: `embed`, `ln_pre`, `transformer.resblocks`, `ln_post`. `mean` and `std` are those
    of the pixels that its weights were trained on. The last six switches make it the towers that are not quite CLIP's:
    ImageNet's (patch_bias, no ln_pre, eps 1e-6, no projection) and EVA's (also post_norm, a bias on the projection).
    """

    def __init__(
        self,
        image_size=224,
        patch_size=16,
        width=768,
        layers=12,
        heads=12,
        mlp_ratio=4.0,
        output_dim=512,
        quick_gelu=False,
        patch_bias=False,
        ln_pre=True,
        post_norm=False,
        proj_bias=False,
        eps=1e-5,
    ):
        super().__init__()
        if image_size % patch_size or width % heads:
            raise ValueError(
                f"image_size {image_size} must be a multiple of patch_size {patch_size}, width {width} of heads {heads}"
            )
        self.image_size, self.patch_size, self.width, self.heads = image_size, patch_size, width, heads
        self.mean, self.std = CLIP_MEAN, CLIP_STD
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size, bias=patch_bias)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn((image_size // patch_size) ** 2 + 1, width))
        self.ln_pre = LayerNorm(width, eps) if ln_pre else nn.Identity()
        activation = QuickGELU if quick_gelu else nn.GELU
        block = partial(Block, width, heads, round(width * mlp_ratio), activation, post_norm, eps)
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(block() for _ in range(layers))})
        self.ln_post = LayerNorm(width, eps)
        self.proj = nn.Parameter(scale * torch.randn(width, output_dim)) if output_dim else None
        self.proj_bias = nn.Parameter(torch.zeros(output_dim)) if output_dim and proj_bias else None

    @property
    def blocks(self):
        return self.transformer.resblocks

    def embed(self, images):
        """images (B, 3, H, W) -> tokens (B, N+1, D): [class] first, positions added, before ln_pre."""
        x = rearrange(self.conv1(images), "b d h w -> b (h w) d")
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        return x + self.positional_embedding.to(x.dtype)

    def forward(self, images):
        x = self.ln_pre(self.embed(images))
        for block in self.blocks:
            x = block(x)
        x = self.ln_post(x[:, 0])
        return x if self.proj is None else F.linear(x, self.proj.T, self.proj_bias)


# The backbones of the papers' tables, as keywords of `ViT`.
B16 = dict()
L14 = dict(patch_size=14, width=1024, layers=24, heads=16)
E14 = dict(
    patch_size=14, width=1792, layers=64, heads=16, mlp_ratio=15360 / 1792,
    patch_bias=True, ln_pre=False, post_norm=True, eps=1e-6,
)  # fmt: skip


def load_clip(name, pretrained="openai", image_size=None, quick_gelu=None):
    """The image tower `name` of open_clip ("ViT-B-16", "EVA02-E-14", ...) or timm, as a `ViT`.

    name: for a ViT of timm, with its tag ("vit_base_patch16_224.augreg_in21k").
    pretrained: an open_clip tag ("openai", "laion2b_s34b_b88k", ...), which is downloaded; a local file (OpenAI's
        TorchScript archive, a state dict of open_clip, of its image tower alone, or safetensors); "shipped" for the
        ViT-Toy-16 in colab/; None for random weights.
    image_size: another size than the weights were trained at; the positional embedding is resized (bicubic).
    quick_gelu: by default as the weights were trained: what open_clip records for the tag; yes for OpenAI's archive and
        for names that end in "-quickgelu". Nothing in an ordinary local file tells, so say it where the name does not.
    Raises ValueError for an unknown name or tag and for weights that do not fit, FileNotFoundError for a missing file.
    """
    import open_clip  # takes seconds, and only this function needs it
    import timm

    open_clip.add_model_config(SHIPPED)
    name = name.replace("/", "-")
    config = open_clip.get_model_config(name)
    if config is not None:
        shape, record = clip_shape(name, config)
        tag = open_clip.get_pretrained_cfg(name, str(pretrained)) if pretrained else None
        tags, download = open_clip.list_pretrained_tags_by_model(name), partial(open_clip.download_pretrained, tag)
    elif timm.is_model(name):
        shape, record = timm_shape(name)
        tag = record if pretrained == "openai" else None  # its tag is part of its name
        tags, download = timm.list_pretrained(name), partial(timm.create_model, name, pretrained=True)
    else:
        near = difflib.get_close_matches(name, open_clip.list_models() + timm.list_models(), n=3, cutoff=0.5)
        raise ValueError(f"unknown backbone {name!r}; did you mean {' or '.join(near) or 'ViT-B-16'}?")

    state, is_openai_archive = None, False
    if tag:
        try:
            source = download()
        except Exception as error:  # the hub's, the network's
            raise FileNotFoundError(
                f"cannot download {pretrained} of {name} ({type(error).__name__}); name a local file instead"
            ) from error
        state = source.state_dict() if isinstance(source, nn.Module) else None
        pretrained = source if state is None else pretrained
    if pretrained is not None and state is None:
        path = SHIPPED / f"{name}.safetensors" if pretrained == "shipped" else Path(pretrained)
        if not path.is_file():
            raise FileNotFoundError(
                f"{pretrained!r} is neither a file nor a tag of {name} (its tags: {', '.join(tags) or 'none'})"
            )
        state, is_openai_archive = read_weights(path)

    if quick_gelu is None:
        quick_gelu = (tag or {}).get("quick_gelu") or is_openai_archive or shape["quick_gelu"]
    vit = ViT(**dict(shape, image_size=image_size or shape["image_size"], quick_gelu=quick_gelu))
    if tag or "mean" in record:
        vit.mean, vit.std = (tag or record)["mean"], (tag or record)["std"]  # most, but not all, are CLIP's own
    if state is not None:
        load_strict(vit, fit_positions(image_tower(state, shape), vit), f"{pretrained} for {name}")
    return vit


def clip_shape(name, config):
    """What `ViT` must be told to be open_clip's image tower `name`, and what is recorded of its pixels."""
    vision = dict(config["vision_cfg"])
    if "timm_model_name" in vision:
        return timm_shape(vision["timm_model_name"], config["embed_dim"])
    keys = dict(image_size=224, patch_size=16, width=768, layers=12, mlp_ratio=4.0)
    shape = {key: vision.pop(key, default) for key, default in keys.items()}
    heads = shape["width"] // vision.pop("head_width", 64)
    if vision or not isinstance(shape["layers"], int):
        raise ValueError(
            f"{name} is no plain ViT (its configuration has {', '.join(vision) or 'stages'}): not supported"
        )
    quick_gelu = config.get("quick_gelu", False)
    return dict(shape, heads=heads, output_dim=config["embed_dim"], quick_gelu=quick_gelu), {}


def timm_shape(name, output_dim=0):
    """The same for a ViT of timm, pre- or post-norm, without rotary embedding or other extras."""
    import timm

    with torch.device("meta"):
        try:
            trunk = timm.create_model(name, num_classes=output_dim)
            block, patches = trunk.blocks[0], trunk.patch_embed
            # OpenAI's weights stand under the names of GELU models too.
            notes = " ".join(trunk.pretrained_cfg.get("notes") or ())
            shape = dict(
                image_size=patches.img_size[0],
                patch_size=patches.patch_size[0],
                width=trunk.embed_dim,
                layers=len(trunk.blocks),
                heads=block.attn.num_heads,
                mlp_ratio=block.mlp.fc1.out_features / trunk.embed_dim,
                output_dim=output_dim,
                quick_gelu=type(block.mlp.act).__name__ == "QuickGELU" or "natively QuickGELU" in notes,
                patch_bias=patches.proj.bias is not None,
                ln_pre=isinstance(getattr(trunk, "norm_pre", None), nn.LayerNorm),
                post_norm="PostNorm" in type(block).__name__,
                proj_bias=bool(output_dim) and trunk.head.bias is not None,
                eps=trunk.norm.eps,
            )
            plain = getattr(trunk, "rope", None) is None and type(block.mlp.act).__name__ in ("GELU", "QuickGELU")
            theirs, ours = from_timm(trunk.state_dict(), shape), ViT(**shape).state_dict()
            plain = plain and {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in ours.items()}
        except (AttributeError, RuntimeError) as error:  # it lacks what a plain ViT has, or its tag is unknown
            raise ValueError(f"{name} is no plain ViT, or no tag of timm ({error})") from error
    if not plain:
        raise ValueError(f"{name} is no plain ViT (rotary embedding, gates, registers, ...): not supported")
    return shape, trunk.pretrained_cfg


def from_timm(state, shape):
    """The tensors of a ViT of timm by CLIP's names. Where q, k, v have biases apart, as in EVA, k has none."""
    renamed = {}
    for key, tensor in state.items():
        if key.endswith(".v_bias") or (key.startswith("head.") and not shape["output_dim"]):
            continue
        if key.endswith(".q_bias"):
            tensor = torch.cat([tensor, torch.zeros_like(tensor), state[key.replace("q_bias", "v_bias")]])
        elif key in ("cls_token", "pos_embed"):
            tensor = tensor[0]
        tensor = tensor[0] if key == "cls_token" else tensor.T if key == "head.weight" else tensor
        for pattern, name in TIMM_NAMES:
            key = re.sub(pattern, name, key)
        if shape["post_norm"]:
            key = key.replace("ln_1.", "attn.norm.").replace("ln_2.", "mlp.norm.")
        renamed[key] = tensor
    return renamed


TIMM_NAMES = (
    ("^cls_token$", "class_embedding"),
    ("^pos_embed$", "positional_embedding"),
    (r"^patch_embed\.proj\.", "conv1."),
    (r"^norm_pre\.", "ln_pre."),
    (r"^norm\.", "ln_post."),
    (r"^head\.weight$", "proj"),
    (r"^head\.bias$", "proj_bias"),
    (r"^blocks\.", "transformer.resblocks."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".attn.in_proj_"),
    (r"\.attn\.q_bias$", ".attn.in_proj_bias"),
    (r"\.attn\.proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)


def read_weights(path):
    """The tensors of a checkpoint file, and whether it is a TorchScript archive (as OpenAI's are). No pickle is run."""
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path), False
        if zipfile.is_zipfile(path) and any(n.endswith("/constants.pkl") for n in zipfile.ZipFile(path).namelist()):
            return torch.jit.load(path, map_location="cpu").state_dict(), True
        return tensors_of(torch.load(path, map_location="cpu", weights_only=True)), False
    except Exception as e:  # the unpickler, the zip reader and TorchScript each raise their own
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise ValueError(f"{path} is not a checkpoint that can be read safely: {reason}") from e


def tensors_of(checkpoint):
    """The dictionary of tensors inside a checkpoint, however deeply nested ({"state_dict": {...}, "epoch": 3, ...})."""
    own = {k: v for k, v in checkpoint.items() if isinstance(v, torch.Tensor)}
    return max([own, *(tensors_of(v) for v in checkpoint.values() if isinstance(v, dict))], key=len)


def image_tower(state, shape=None):
    """The image tower's tensors, by CLIP's own names, of a state dict that may hold other towers and any prefix."""
    anchors = ("class_embedding", "cls_token")
    anchor = next((k for k in state if k.endswith(anchors)), None)
    if anchor is None:
        raise ValueError("these weights hold no CLIP image tower: no 'class_embedding' among their keys")
    prefix = anchor.removesuffix(anchors[0]).removesuffix(anchors[1])
    tower = {k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix)}
    return from_timm(tower, shape) if anchor.endswith(anchors[1]) else tower


def fit_positions(state, vit):
    """Resizes the positional embedding of `state` to the patch grid of `vit`, the [class] position kept."""
    from timm.layers import resample_abs_pos_embed

    positions, wanted = state.get("positional_embedding"), vit.positional_embedding
    if positions is not None and positions.shape[0] != wanted.shape[0] and positions.shape[1:] == wanted.shape[1:]:
        grid = vit.image_size // vit.patch_size
        state = dict(state, positional_embedding=resample_abs_pos_embed(positions[None], [grid, grid])[0])
    return state


def load_strict(model, state, source):
    """load_state_dict with an error in a sentence: the first keys that are missing, unexpected or of another shape."""
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    other = [
        f"{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    for what, keys in (("misses", missing), ("has unexpected", unexpected), ("differs in shape:", other)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(f"the checkpoint {source} does not fit: it {what} {', '.join(keys[:3])}{more}")
    model.load_state_dict(state)


def freeze(vit):
    """Freezes the image tower in place and drops its projection, which only retrieval needs."""
    vit.requires_grad_(False)
    vit.proj = vit.proj_bias = None
    return vit


def choose_blocks(blocks, layers):
    """The indices that "all", "bottom", "top" (half), "every second", or numbers ("9 10 11", [9, 10, 11]) stand for."""
    named = {
        "all": range(layers),
        "bottom": range(layers // 2),
        "top": range(layers // 2, layers),
        "every second": range(1, layers, 2),
    }
    if isinstance(blocks, str) and blocks in named:
        return list(named[blocks])
    try:
        chosen = [int(i) for i in (blocks.replace(",", " ").split() if isinstance(blocks, str) else blocks)]
    except ValueError:
        chosen = []
    if not chosen or not all(0 <= i < layers for i in chosen):
        raise ValueError(f"blocks is {blocks!r}; it must be {', '.join(named)}, or numbers from 0 to {layers - 1}")
    return chosen


def bottleneck_width(width, ratio):
    """The width of an adapter's middle, `ratio` of the ViT's and at least 1."""
    if not 0 < ratio < float("inf"):
        raise ValueError(f"ratio is {ratio}; it must be more than 0")
    return max(int(width * ratio), 1)


def classifier(width, num_classes):
    """The classifier of the methods' released code: weights of standard deviation 0.02, biases 0."""
    head = nn.Linear(width, num_classes)
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def normalize(video, vit):
    """uint8 pixels (B, T, 3, H, W) -> floats with the mean and standard deviation that the tower was trained with."""
    pixels = 255 * torch.tensor([vit.mean, vit.std])
    mean, std = pixels.to(video.device, non_blocking=True).view(2, 3, 1, 1)
    return (video - mean) / std


class SpaceOnly(nn.Module):
    """The image tower on each frame, the mean of the [class] tokens, a linear classifier: no frame sees another.

    The baselines of AIM's table 1 and ST-Adapter's benchmark, by what is tuned beside the classifier: nothing (`tune`
    "head", a linear probe), the last block and ln_post ("last", partial fine-tuning), everything ("all").
    """

    def __init__(self, clip, num_classes, num_frames=8, tune="head", dropout=0.5):
        super().__init__()
        if tune not in ("head", "last", "all"):
            raise ValueError(f"tune is {tune!r}; it must be head, last or all")
        self.vit = freeze(clip)
        for module in {"head": [], "last": [clip.blocks[-1], clip.ln_post], "all": [clip]}[tune]:
            module.requires_grad_(True)
        self.dropout = nn.Dropout(dropout)
        self.head = classifier(clip.width, num_classes)

    def features(self, video):
        """video (B, T, 3, H, W) -> (B, D)"""
        z = self.vit.ln_pre(self.vit.embed(video.flatten(0, 1)))
        for block in self.vit.blocks:
            z = block(z)
        return self.vit.ln_post(z[:, 0]).unflatten(0, video.shape[:2]).mean(1)

    def forward(self, video):
        return self.head(self.dropout(self.features(video)))


def cast_frozen(model, dtype):
    """Keeps the frozen weights in half precision, which is what autocast would compute with; the tuned stay float32."""
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.data.to(dtype)


def tuned_state(model):
    """What training changes, and so what a checkpoint holds: parameters that take gradients, and buffers."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def load_tuned(model, state, source):
    """The inverse of `tuned_state`, as strict as `load_strict`; a state with frozen weights in it is fine as well."""
    load_strict(model, {**model.state_dict(), **state} if state.keys() >= tuned_state(model).keys() else state, source)


def recompute(model):
    """Activation checkpointing of what is cheap to redo: the insides of every branch that has a `recompute` switch."""
    for module in model.modules():
        if hasattr(module, "recompute"):
            module.recompute = True


def count_parameters(model):
    """(total, tunable)"""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in counts), sum(n for n, tunable in counts if tunable)
