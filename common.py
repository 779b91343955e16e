"""The CLIP image tower in plain PyTorch, its loader, the space-only baselines, and what the four methods share.

    ViT          the image tower of "Learning Transferable Visual Models From Natural Language Supervision"
                 (Radford et al., ICML 2021), parameter names as in OpenAI's release, so that weights load as they are
    load_clip    any plain-ViT CLIP of open_clip, by name and tag or from a local file
    SpaceOnly    linear probe and full fine-tuning on frames alone: what every method must beat

Shapes: B clips, T frames, N patches a frame, D width, h heads.
"""

import difflib
import zipfile
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SHIPPED = Path(__file__).resolve().parent / "colab"  # NAME.json and NAME.safetensors of the CLIP that comes with us


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the GELU of OpenAI's CLIP, written as a SiLU so that autograd keeps one tensor, not two."""

    def forward(self, x):
        return F.silu(1.702 * x) / 1.702


class LayerNorm(nn.LayerNorm):
    """LayerNorm that answers in the dtype of its input: autocast would keep a float32 copy of every activation."""

    def forward(self, x):
        with nullcontext() if x.dtype == torch.float32 else torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head self-attention along the second-last dimension; parameters named as nn.MultiheadAttention's."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width**-0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        """x (..., n, D) -> (..., n, D)"""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).flatten(0, -3)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(rearrange(y, "b h n d -> b n (h d)").view_as(x))


class Block(nn.Module):
    """Pre-norm transformer block: x + MSA(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, width, heads, mlp_width, activation):
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = LayerNorm(width)
        layers = ("c_fc", nn.Linear(width, mlp_width)), ("gelu", activation()), ("c_proj", nn.Linear(mlp_width, width))
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class ViT(nn.Module):
    """CLIP's image tower. `forward` answers images (B, 3, H, W) with embeddings (B, output_dim).

    The video methods use its parts: `embed`, `ln_pre`, `transformer.resblocks`, `ln_post`. `mean` and `std` are those
    of the pixels that its weights were trained on.
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
    ):
        super().__init__()
        if image_size % patch_size or width % heads:
            raise ValueError(
                f"image_size {image_size} must be a multiple of patch_size {patch_size}, width {width} of heads {heads}"
            )
        self.image_size, self.patch_size, self.width, self.heads = image_size, patch_size, width, heads
        self.mean, self.std = CLIP_MEAN, CLIP_STD
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn((image_size // patch_size) ** 2 + 1, width))
        self.ln_pre = LayerNorm(width)
        activation = QuickGELU if quick_gelu else nn.GELU
        blocks = (Block(width, heads, int(width * mlp_ratio), activation) for _ in range(layers))
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, output_dim))

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
        return self.ln_post(x[:, 0]) @ self.proj


def load_clip(name, pretrained="openai", image_size=None, quick_gelu=None):
    """The image tower `name` of open_clip ("ViT-B-16", "ViT-L-14-336", ...) as a `ViT`.

    pretrained: an open_clip tag ("openai", "laion2b_s34b_b88k", ...), which is downloaded; a local file (OpenAI's
        TorchScript archive, a state dict of open_clip, of its image tower alone, or safetensors); "shipped" for the
        ViT-Toy-16 in colab/; None for random weights.
    image_size: another size than the weights were trained at; the positional embedding is resized (bicubic).
    quick_gelu: by default as the weights were trained: what open_clip records for the tag; yes for OpenAI's archive and
        for names that end in "-quickgelu". Nothing in an ordinary local file tells, so say it where the name does not.
    Raises ValueError for an unknown name or tag and for weights that do not fit, FileNotFoundError for a missing file.
    """
    import open_clip  # takes seconds, and only this function needs it

    open_clip.add_model_config(SHIPPED)
    name = name.replace("/", "-")
    config = open_clip.get_model_config(name)
    if config is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3, cutoff=0.5)
        raise ValueError(f"unknown backbone {name!r}; did you mean {' or '.join(near) or 'ViT-B-16'}?")
    vision = dict(config["vision_cfg"])
    width, layers, head_width = (vision.pop(k, d) for k, d in (("width", 768), ("layers", 12), ("head_width", 64)))
    patch_size, trained_size, mlp_ratio = (
        vision.pop(k, d) for k, d in (("patch_size", 16), ("image_size", 224), ("mlp_ratio", 4.0))
    )
    if vision or not isinstance(layers, int):
        raise ValueError(
            f"{name} is no plain ViT (its configuration has {', '.join(vision) or 'stages'}): not supported"
        )

    if pretrained == "shipped":
        pretrained = SHIPPED / f"{name}.safetensors"
    tag = None if pretrained is None else open_clip.get_pretrained_cfg(name, str(pretrained))
    state, is_openai_archive = None, False
    if pretrained is not None:
        try:
            path = Path(open_clip.download_pretrained(tag)) if tag else Path(pretrained)
        except Exception as error:  # the hub's, the network's
            raise FileNotFoundError(
                f"cannot download {pretrained} of {name} ({type(error).__name__}); name a local file instead"
            ) from error
        if not path.is_file():
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
            raise FileNotFoundError(
                f"{pretrained!r} is neither a file nor an open_clip tag of {name} (its tags: {tags})"
            )
        state, is_openai_archive = read_weights(path)
    if quick_gelu is None:
        recorded = tag.get("quick_gelu", False) if tag else is_openai_archive
        quick_gelu = recorded or config.get("quick_gelu", False)

    size = image_size or trained_size
    vit = ViT(size, patch_size, width, layers, width // head_width, mlp_ratio, config["embed_dim"], quick_gelu)
    if tag:
        vit.mean, vit.std = tag["mean"], tag["std"]  # most, but not all, are CLIP's own
    if state is not None:
        load_strict(vit, fit_positions(image_tower(state), vit), f"{pretrained} for {name}")
    return vit


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


def image_tower(state):
    """The image tower's tensors, by CLIP's own names, of a state dict that may hold other towers and any prefix."""
    anchor = next((k for k in state if k.endswith("class_embedding")), None)
    if anchor is None:
        raise ValueError("these weights hold no CLIP image tower: no 'class_embedding' among their keys")
    prefix = anchor.removesuffix("class_embedding")
    if prefix:
        return {k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix)}
    return {k: v.float() for k, v in state.items()}


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
    vit.proj = None
    return vit


def classifier(width, num_classes):
    """The classifier of the methods' released code: weights of standard deviation 0.02, biases 0."""
    head = nn.Linear(width, num_classes)
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def normalize(video, vit):
    """uint8 pixels (B, T, 3, H, W) -> floats with the mean and standard deviation that the tower was trained with."""
    mean = torch.tensor(vit.mean, device=video.device).view(3, 1, 1) * 255
    std = torch.tensor(vit.std, device=video.device).view(3, 1, 1) * 255
    return (video - mean) / std


class SpaceOnly(nn.Module):
    """The image tower on each frame, the mean of the [class] tokens, a linear classifier: no frame sees another.

    The baselines of AIM's table 1: frozen space-only (`tune="head"`, a linear probe), finetuned space-only ("all").
    """

    def __init__(self, clip, num_classes, num_frames=8, tune="head", dropout=0.5):
        super().__init__()
        if tune not in ("head", "all"):
            raise ValueError(f"tune is {tune!r}; it must be head or all")
        self.vit = freeze(clip)
        self.vit.requires_grad_(tune == "all")
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


def count_parameters(model):
    """(total, tunable)"""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in counts), sum(n for n, tunable in counts if tunable)


def gflops(model, video):
    """GFLOPs of one forward pass as the papers count them: a multiply-add is one. Works on the meta device too."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(video)
    return counter.get_total_flops() / 2 / 1e9
