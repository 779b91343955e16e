"""The CLIP image tower in plain PyTorch, the space-only baselines, and what the four methods share.

The tower is that of "Learning Transferable Visual Models From Natural Language Supervision" (Radford et al., ICML 2021;
arXiv 2103.00020). Its parameters have OpenAI's names, so that their weights load as they are. After the tower and the
baselines come what the methods share, the loading of weights by name, and what makes EVA's and ImageNet's towers.

Shapes: B clips or images, T frames, N patches per frame, D width, h heads.
"""

import difflib
import os
import zipfile
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the pixels, red, green and blue, from 0 to 1
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SHORT = 16  # of a few tokens, as along time, plain products attend faster than the kernels made for long sequences
SHIPPED = Path(__file__).resolve().parent / "colab"  # has the shipped CLIP, as NAME.json and NAME.safetensors


class QuickGELU(nn.Module):
    """The GELU of OpenAI's CLIP: x * sigmoid(1.702 x)."""

    def forward(self, x):
        return F.silu(1.702 * x).div_(1.702)  # the same, but autograd keeps one tensor instead of two


class LayerNorm(nn.LayerNorm):
    """LayerNorm whose output has the dtype of its input. Under autocast PyTorch's own would make a float32 copy."""

    def forward(self, x):
        with nullcontext() if x.dtype == torch.float32 else torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head self-attention (MSA). Its parameters have the names of nn.MultiheadAttention."""

    def __init__(self, width, heads, causal=False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width**-0.5)  # of Q, K and V together
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.norm = nn.Identity()  # CLIP has no norm here, EVA has

    def forward(self, x):
        """x (..., n, D) -> (..., n, D). Each of n tokens attends to all; if causal, to none after it."""
        # x is B x N x D or B x T x N x D. A transposed x, as AIM's (B N) x T x D, is made contiguous: otherwise PyTorch
        # would multiply its sequences one by one, and not as the rows of one matrix.
        qkv = F.linear(x.contiguous(), self.in_proj_weight, self.in_proj_bias).flatten(0, -3)  # (B or B T) x n x 3D
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        if x.shape[-2] <= SHORT and not self.causal:
            y = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1).to(
                v.dtype
            ) @ v  # softmax(Q K^T / sqrt(d)) V
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # the same without the n x n weights
        y = rearrange(y, "b h n d -> b n (h d)").view_as(x)
        return self.norm(self.out_proj(y))


class Block(nn.Module):
    """Transformer block: x + MSA(LN(x)), then x + MLP(LN(x))."""

    recompute = False

    def __init__(self, width, heads, mlp_width, activation, causal=False):
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = Attention(width, heads, causal)
        self.ln_2 = LayerNorm(width)
        layers = dict(c_fc=nn.Linear(width, mlp_width), gelu=activation(), c_proj=nn.Linear(mlp_width, width))
        self.mlp = nn.Sequential(OrderedDict(layers, norm=nn.Identity()))  # CLIP has no norm here, EVA has

    def branch(self, function, *x):
        """function(*x); with `recompute`, x alone is kept, and it runs again in the backward pass (checkpointing)."""
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
    """CLIP's image tower: images (B, 3, H, W), normalised with `mean` and `std` -> embeddings (B, output_dim).

    The video methods use its parts: `embed`, `ln_pre`, `blocks` and `ln_post`. quick_gelu: OpenAI's weights need it.
    variant: keywords of `apply_variant` (at the end of this file), for the towers of EVA and ImageNet.
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
        **variant,
    ):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size is {image_size}; it must be a multiple of patch_size, {patch_size}")
        self.image_size, self.patch_size, self.width, self.heads = image_size, patch_size, width, heads
        self.mean, self.std = CLIP_MEAN, CLIP_STD
        scale, activation = width**-0.5, QuickGELU if quick_gelu else nn.GELU
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn((image_size // patch_size) ** 2 + 1, width))
        self.ln_pre = LayerNorm(width)
        blocks = [Block(width, heads, round(width * mlp_ratio), activation) for _ in range(layers)]
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, output_dim)) if output_dim else None
        self.proj_bias = None
        apply_variant(self, **variant)

    @property
    def blocks(self):
        return self.transformer.resblocks

    def embed(self, images):
        """images (B, 3, H, W) -> tokens (B, N+1, D): [class] first, positions added, before ln_pre."""
        x = rearrange(self.conv1(images), "b d h w -> b (h w) d")
        cls = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)  # B x 1 x D
        return torch.cat([cls, x], dim=1) + self.positional_embedding.to(x.dtype)

    def forward(self, images):
        x = self.ln_pre(self.embed(images))
        for block in self.blocks:
            x = block(x)
        x = self.ln_post(x[:, 0])  # B x D, the [class] token
        return x if self.proj is None else F.linear(x, self.proj.T, self.proj_bias)


class TextTower(nn.Module):
    """CLIP's text tower, for retrieval: ids of tokens (B, L), L <= context_length -> vectors (B, L, output_dim).

    CLIP's own text feature is the vector of the [end] token, which has the highest id. What follows it changes nothing.
    """

    tokenize = None  # a function of a list of texts -> ids (B, L), which `load_clip` sets

    def __init__(
        self, vocab_size=49408, context_length=77, width=512, layers=12, heads=8, output_dim=512, quick_gelu=False
    ):
        super().__init__()
        activation = QuickGELU if quick_gelu else nn.GELU
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, width))
        blocks = [Block(width, heads, 4 * width, activation, causal=True) for _ in range(layers)]
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.ln_final = LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, output_dim))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # of the contrastive loss, as a logarithm

    def forward(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]  # B x L x D
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_final(x) @ self.text_projection


# The backbones of the papers' tables, as keywords of `ViT`.
B16 = dict()
L14 = dict(patch_size=14, width=1024, layers=24, heads=16)
E14 = dict(
    patch_size=14, width=1792, layers=64, heads=16, mlp_ratio=15360 / 1792,
    patch_bias=True, ln_pre=False, post_norm=True, eps=1e-6,
)  # fmt: skip


def freeze(vit):
    """Freezes the image tower in place and drops its projection, which only retrieval needs."""
    vit.requires_grad_(False)
    vit.proj = vit.proj_bias = None
    return vit


def classifier(width, num_classes):
    """The linear classifier, with the initial values of the methods' released code: std 0.02, biases 0."""
    head = nn.Linear(width, num_classes)
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def cross_entropy(logits, label, label_smoothing=0.0):
    """logits (B, num_classes), label (B,) -> loss per clip (B,), in float32; 0 where the label is -100 (unreadable)."""
    return F.cross_entropy(logits.float(), label, label_smoothing=label_smoothing, reduction="none")


class SpaceOnly(nn.Module):
    """The image tower on each frame, the mean of the [class] tokens, a classifier: no frame sees another.

    These are the baselines of AIM's table 1 and of ST-Adapter's poster. tune: what is tuned beside the classifier:
    nothing ("head", the linear probe), the last block and ln_post ("last", partial fine-tuning), or the whole tower
    ("all", full fine-tuning). num_frames is accepted as by every method, and unused: no weight depends on it.
    """

    loss = staticmethod(cross_entropy)  # the training loop asks the model for its loss

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
        z = self.vit.ln_pre(self.vit.embed(video.flatten(0, 1)))  # (B T) x N+1 x D
        for block in self.vit.blocks:
            z = block(z)
        cls = self.vit.ln_post(z[:, 0])  # (B T) x D
        return cls.unflatten(0, (-1, video.shape[1])).mean(1)

    def forward(self, video):
        """video (B, T, 3, H, W), normalised -> logits (B, num_classes)"""
        return self.head(self.dropout(self.features(video)))


def normalize(video, vit):
    """uint8 pixels (B, T, 3, H, W) -> floats with the mean and standard deviation that the tower was trained with."""
    pixels = 255 * torch.tensor([vit.mean, vit.std])
    mean, std = pixels.to(video.device, non_blocking=True).view(2, 3, 1, 1)
    return (video - mean) / std


def choose_blocks(blocks, layers):
    """The indices that "all", "bottom", "top" (half), "every second", or numbers ("9 10 11", [9, 10, 11]) stand for."""
    every, half = list(range(layers)), layers // 2
    named = {"all": every, "bottom": every[:half], "top": every[half:], "every second": every[1::2]}
    if isinstance(blocks, str):
        blocks = named.get(blocks) or blocks.replace(",", " ").split()
    chosen = [int(i) if str(i).isdigit() else -1 for i in blocks]
    if not chosen or not set(chosen) <= set(every):
        raise ValueError(f"blocks is {blocks!r}; it must be {', '.join(named)}, or numbers from 0 to {layers - 1}")
    return chosen


def bottleneck_width(width, ratio):
    """The width of an adapter's middle: `ratio` of the ViT's, and at least 1."""
    if ratio <= 0:
        raise ValueError(f"ratio is {ratio}; it must be more than 0")
    return max(int(width * ratio), 1)


def cast_frozen(model, dtype):
    """Keeps the frozen weights in half precision, which autocast would compute with; the tuned ones stay float32."""
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.data.to(dtype)


def recompute(model):
    """Turns on activation checkpointing inside of every branch of a block that has a `recompute` switch."""
    for module in model.modules():
        if hasattr(module, "recompute"):
            module.recompute = True


def count_parameters(model):
    """(total, tunable)"""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in counts), sum(n for n, tunable in counts if tunable)


def tuned_state(model):
    """What training changes, and therefore what a checkpoint holds: parameters that take gradients, and buffers."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def load_tuned(model, state, source):
    """The inverse of `tuned_state`, as strict as `load_strict`; `state` may hold frozen weights as well."""
    load_strict(model, {name: p for name, p in model.named_parameters() if not p.requires_grad} | state, source)


def load_strict(model, state, source):
    """load_state_dict, but ValueError says in a sentence which keys are missing, unexpected or of another shape."""
    own = model.state_dict()
    problems = [f"it misses {k}" for k in sorted(own.keys() - state.keys())]
    problems += [f"it has unexpected {k}" for k in sorted(state.keys() - own.keys())]
    shapes = [(k, tuple(state[k].shape), tuple(own[k].shape)) for k in own if k in state]
    problems += [f"it differs in shape: {k} is {theirs}, not {ours}" for k, theirs, ours in shapes if theirs != ours]
    if problems:
        more = f", and {len(problems) - 3} more problems" if len(problems) > 3 else ""
        raise ValueError(f"the checkpoint {source} does not fit: {', '.join(problems[:3])}{more}")
    model.load_state_dict(state)


def load_clip(name, pretrained="openai", image_size=None, text=False):
    """The image tower `name` of open_clip ("ViT-B-16", "EVA02-E-14", ...) or timm -> `ViT`; text: also a `TextTower`.

    name: of timm with a tag ("vit_base_patch16_224.augreg_in21k"). Any name may end in "-quickgelu": OpenAI's weights
        need QuickGELU, which their archive and open_clip's tags tell, but no other file; without it they run, badly.
    pretrained: a tag of open_clip ("openai", "laion2b_s34b_b88k", ...), to be downloaded; a local file of a whole CLIP
        or of its image tower; "shipped": the ViT-Toy-16 in colab/; None: random weights.
    image_size: in pixels, if not the one of the weights; the positional embedding is then resized (bicubic).
    Raises ValueError for an unknown name and for weights that do not fit, FileNotFoundError for missing weights.
    """
    import open_clip  # the two take seconds, and only this function needs them
    import timm

    open_clip.add_model_config(SHIPPED)
    name, quick_gelu = name.replace("/", "-"), name.endswith("-quickgelu")  # "ViT-B/16" is OpenAI's spelling
    if open_clip.get_model_config(name) is None:  # open_clip has some of these names itself
        name = name.removesuffix("-quickgelu")
    config = open_clip.get_model_config(name)
    in_timm = config is None and timm.is_model(name)
    if config is None and not in_timm:
        near = difflib.get_close_matches(name, open_clip.list_models() + timm.list_models(), n=3, cutoff=0.5)
        raise ValueError(f"unknown backbone {name!r}; did you mean {' or '.join(near) or 'ViT-B-16'}?")
    shape, record = timm_shape(name) if in_timm else clip_shape(name, config)
    tag = open_clip.get_pretrained_cfg(name, str(pretrained))  # {} if open_clip has no such tag
    record = tag or record

    state, path = {}, pretrained
    try:
        if tag:
            path = open_clip.download_pretrained(tag)
        elif in_timm and pretrained == "openai":
            state, path = timm.create_model(name, pretrained=True).state_dict(), None
    except Exception as error:  # the errors of the network and of the hub are many
        raise FileNotFoundError(f"cannot download {pretrained} of {name} ({type(error).__name__})") from error
    if path is not None:
        path = SHIPPED / f"{name}.safetensors" if pretrained == "shipped" else Path(path)
        if not path.is_file():
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
            raise FileNotFoundError(f"{pretrained!r} is neither a file nor a tag of {name} (its tags: {tags})")
        state = tensors_of(read_checkpoint(path))

    from_openai = "input_resolution" in state  # a key that only OpenAI's archives hold, and what is taken out of them
    quick_gelu = quick_gelu or from_openai or shape["quick_gelu"] or record.get("quick_gelu", False)
    vit = ViT(**dict(shape, image_size=image_size or shape["image_size"], quick_gelu=quick_gelu))
    vit.mean, vit.std = record.get("mean", CLIP_MEAN), record.get("std", CLIP_STD)
    if pretrained is not None:
        load_strict(vit, fit_positions(image_tower(state, shape), vit), f"{pretrained} for {name}")
    if not text:
        return vit
    keys = ("vocab_size", "context_length", "width", "layers", "heads")
    if in_timm or not set(config["text_cfg"]) <= set(keys):
        raise ValueError(f"the text tower of {name} is not CLIP's")
    tower = TextTower(**config["text_cfg"], output_dim=config["embed_dim"], quick_gelu=quick_gelu)
    if pretrained is not None:
        text = {key: state[key].float() for key in tower.state_dict() if key in state}
        load_strict(tower, text, f"{pretrained}, text")
    if name == "ViT-Toy-16":
        from colab.toy import tokenize
    tower.tokenize = tokenize if name == "ViT-Toy-16" else open_clip.get_tokenizer(name, context_length=32)
    return vit, tower


def clip_shape(name, config):
    """-> the keywords of `ViT` for the image tower of open_clip's `config`, and what is recorded of its pixels."""
    vision = dict(config["vision_cfg"])
    if "timm_model_name" in vision:
        return timm_shape(vision["timm_model_name"], config["embed_dim"])
    keys = dict(image_size=224, patch_size=16, width=768, layers=12, mlp_ratio=4.0)
    shape = {key: vision.pop(key, default) for key, default in keys.items()}
    shape["heads"] = shape["width"] // vision.pop("head_width", 64)
    if vision or not isinstance(shape["layers"], int):
        raise ValueError(f"{name} is no plain ViT: its configuration has {', '.join(vision) or 'stages'}")
    return dict(shape, output_dim=config["embed_dim"], quick_gelu=config.get("quick_gelu", False)), {}


def read_checkpoint(path):
    """The dictionary in a file of torch.save, safetensors or TorchScript; runs no pickle. OSError, ValueError."""
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path) and any(n.endswith("/constants.pkl") for n in zipfile.ZipFile(path).namelist()):
            state = torch.jit.load(path, map_location="cpu").state_dict()
            return {"input_resolution": torch.tensor(0)} | state  # the mark of OpenAI's weights, see `load_clip`
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # the unpickler, the zip reader and TorchScript each raise their own
        raise ValueError(f"{path} is not a checkpoint that can be read safely, or it is damaged") from error


def save(checkpoint, path):
    """Writes a file beside `path` and then renames it, so that the old one stays whole whatever happens."""
    beside = path.with_suffix(".partial")
    with open(beside, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def tensors_of(checkpoint):
    """The dictionary of tensors inside a checkpoint, however deeply nested ({"state_dict": {...}, "epoch": 3, ...})."""
    own = {k: v for k, v in checkpoint.items() if isinstance(v, torch.Tensor)}
    return max([own, *(tensors_of(v) for v in checkpoint.values() if isinstance(v, dict))], key=len)


def image_tower(state, shape=None):
    """The image tower of a state dict, which may hold other towers and any prefix, by CLIP's names and in float32;
    `shape`, the keywords of `ViT`, is needed for timm's names only."""
    anchor = next((k for k in state if k.endswith(("class_embedding", "cls_token"))), None)
    if anchor is None:
        raise ValueError("these weights hold no CLIP image tower: no 'class_embedding' among their keys")
    prefix = anchor.removesuffix("class_embedding").removesuffix("cls_token")
    tower = {k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix)}
    return from_timm(tower, shape) if anchor.endswith("cls_token") else tower


def fit_positions(state, vit):
    """Resizes the positional embedding of `state` to the patch grid of `vit`; the [class] position stays."""
    from timm.layers import resample_abs_pos_embed

    positions, grid = state.get("positional_embedding"), vit.image_size // vit.patch_size
    if positions is None or len(positions) == grid**2 + 1:
        return state
    return dict(state, positional_embedding=resample_abs_pos_embed(positions[None], [grid, grid])[0])


def apply_variant(vit, patch_bias=False, ln_pre=True, post_norm=False, proj_bias=False, eps=1e-5):
    """Turns a new CLIP tower, in place, into one of ImageNet (patch_bias, no ln_pre, eps 1e-6) or EVA (also post_norm).

    patch_bias, proj_bias: biases of the patch embedding and of the projection. eps: of every LayerNorm. post_norm:
    blocks are x + LN(MSA(x)): the norms stand at the end of `attn` and `mlp`, and `ln_1`, `ln_2` do nothing. A method
    that calls `attn(ln_1(x))` is therefore right for both kinds.
    """
    for module in vit.modules():
        if isinstance(module, LayerNorm):
            module.eps = eps
    if not ln_pre:
        vit.ln_pre = nn.Identity()
    for block in vit.blocks if post_norm else ():
        block.attn.norm, block.ln_1 = block.ln_1, nn.Identity()
        block.mlp.norm, block.ln_2 = block.ln_2, nn.Identity()
    if patch_bias:
        vit.conv1.bias = nn.Parameter(torch.zeros(vit.width))
    if proj_bias:
        vit.proj_bias = nn.Parameter(torch.zeros(vit.proj.shape[1]))


def timm_shape(name, output_dim=0):
    """`clip_shape` for a ViT of timm; one with rotary embedding, gates, registers or other extras raises ValueError."""
    import timm

    with torch.device("meta"):
        try:
            trunk = timm.create_model(name, num_classes=output_dim)
            block, patches = trunk.blocks[0], trunk.patch_embed
            activation = type(block.mlp.act).__name__
            notes = str(trunk.pretrained_cfg.get("notes"))  # timm has OpenAI's weights under names of GELU models too
            shape = dict(
                image_size=patches.img_size[0],
                patch_size=patches.patch_size[0],
                width=trunk.embed_dim,
                layers=len(trunk.blocks),
                heads=block.attn.num_heads,
                mlp_ratio=block.mlp.fc1.out_features / trunk.embed_dim,
                output_dim=output_dim,
                quick_gelu=activation == "QuickGELU" or "natively QuickGELU" in notes,
                patch_bias=patches.proj.bias is not None,
                ln_pre=isinstance(getattr(trunk, "norm_pre", None), nn.LayerNorm),
                post_norm="PostNorm" in type(block).__name__,
                proj_bias=bool(output_dim) and trunk.head.bias is not None,
                eps=trunk.norm.eps,
            )
            load_strict(ViT(**shape), from_timm(trunk.state_dict(), shape), "of timm")
            if getattr(trunk, "rope", None) is not None or activation not in ("GELU", "QuickGELU"):
                raise ValueError("it has a rotary embedding or another activation")
        except (AttributeError, RuntimeError, ValueError) as error:  # RuntimeError: timm has no such tag
            raise ValueError(f"{name} is no plain ViT: {error}") from error
    return shape, trunk.pretrained_cfg


def from_timm(state, shape):
    """The tensors of a ViT of timm by CLIP's names. EVA stores the biases of q and v apart, and k has none."""
    names = TIMM_NAMES | ({"norm1": "attn.norm", "norm2": "mlp.norm"} if shape["post_norm"] else {})
    renamed = {}
    for key, tensor in state.items():
        if key.endswith("v_bias") or (key.startswith("head.") and not shape["output_dim"]):
            continue
        if key.endswith("q_bias"):
            tensor = torch.cat([tensor, torch.zeros_like(tensor), state[key.replace("q_bias", "v_bias")]])
        elif key == "cls_token":
            tensor = tensor.flatten()  # 1 x 1 x D -> D
        elif key == "pos_embed":
            tensor = tensor[0]  # 1 x N+1 x D -> N+1 x D
        elif key == "head.weight":
            tensor = tensor.T
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        renamed[key] = tensor
    return renamed


TIMM_NAMES = {  # in this order
    "cls_token": "class_embedding", "pos_embed": "positional_embedding", "patch_embed.proj": "conv1",
    "norm_pre.": "ln_pre.", "norm.": "ln_post.", "head.weight": "proj", "head.bias": "proj_bias",
    "blocks.": "transformer.resblocks.", "norm1": "ln_1", "norm2": "ln_2",
    "attn.qkv.": "attn.in_proj_", "attn.q_bias": "attn.in_proj_bias", "attn.proj.": "attn.out_proj.",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip
