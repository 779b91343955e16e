"""Side4Video: Spatial-Temporal Side Network for Memory-Efficient Image-to-Video Transfer Learning (Yao et al., 2023).

The image transformer is frozen and runs without gradients. A narrow side network reads what its blocks put out, one
side block for each or for every second of them, and is all that learns: nothing is ever propagated back through the
ViT. It has no [class] token of its own; the ViT's, shifted in time, are keys and values of its attention.

       video                                               ViT: no gradient, no saved activation
       |--- Conv3D 3 x P x P --- BN --- s_0                images --- block 1 --- ... --- block l --- ...
       |                                                                             |
       s (B, T, N, d)                            Z (B, T, N+1, D) --- LN --- Down ---+--- z (B, T, N+1, d)      eq. (1)
       |--- (s + z_patches) / 2  <--------------------------------------------------/                           eq. (2)
       |--- BN --- 1x1x1 --- depthwise 3x1x1 --- 1x1x1 ---------- (+)
       |--- + positions --- LN --- attention over [z_class shifted in time ; patches] --- (+)
       |--- BN --- MLP ------------------------------------------ (+)
       s (B, T, N, d)     ...     BN --- mean over T and N --- classifier                                       eq. (3)

B clips, T frames, N patches a frame, D and d the widths of the ViT and of the side network. Tuned: the side network.
"""

import contextlib
import re

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import B16, E14, L14, Attention, LayerNorm, classifier, freeze, load_strict, tensors_of


class Down(nn.Module):
    """Eq. (1): Down(Norm(Z)). The norm's weight and bias act through the projection, so one tensor is kept, not two."""

    def __init__(self, inputs, outputs, eps):
        super().__init__()
        self.ln = nn.LayerNorm(inputs, eps)
        self.fc = nn.Linear(inputs, outputs)

    def forward(self, z):
        with torch.no_grad():
            z = F.layer_norm(z, z.shape[-1:], eps=self.ln.eps).to(z.dtype)
        return F.linear(z, self.fc.weight * self.ln.weight, self.fc.bias + self.fc.weight @ self.ln.bias)


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm3d of the paper, for channels that stand last: statistics over clips, frames, patches and processes."""

    def forward(self, x):
        flat = x.flatten(0, -2)
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(flat).view_as(x)
        y, mean, var = SharedNorm.apply(flat, self.weight, self.bias, self.eps)
        with torch.no_grad():
            n = len(flat) * dist.get_world_size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        return y.view_as(x)


class SharedNorm(torch.autograd.Function):
    """Batch norm of x (n, d) with the mean and variance over all processes, which bring equally many rows.

    PyTorch's SyncBatchNorm is for GPUs alone. Only x is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        n = len(x) * dist.get_world_size()
        mean = x.sum(0, dtype=torch.float32)
        dist.all_reduce(mean)
        centred = x - mean.div_(n)
        var = centred.square().sum(0)
        dist.all_reduce(var)
        scale = (var.div_(n) + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.mark_non_differentiable(mean, var)
        return torch.addcmul(bias, centred, scale * weight).to(x.dtype), mean, var

    @staticmethod
    def backward(ctx, dy, *_):
        x, weight, mean, scale = ctx.saved_tensors
        normed = (x - mean) * scale
        sums = torch.stack([(dy * normed).sum(0), dy.sum(0, dtype=torch.float32)])  # the gradients of weight and bias,
        means = sums.clone()  # and, over all processes, how x moves the mean and the variance
        dist.all_reduce(means)
        means /= len(x) * dist.get_world_size()
        dx = (dy - means[1] - normed * means[0]) * (scale * weight)
        return dx.to(x.dtype), sums[0], sums[1], None


class TemporalConv(nn.Module):
    """Depthwise separable convolution over time: 1x1x1, depthwise 3x1x1 (as shifted multiply-adds), 1x1x1."""

    def __init__(self, width):
        super().__init__()
        self.point_in = nn.Linear(width, width)
        self.depth = nn.Conv1d(width, width, 3, groups=width)  # its parameters only
        self.point_out = nn.Linear(width, width)

    def forward(self, x):
        """x (B, T, N, d) -> the same shape"""
        T, x = x.shape[1], F.pad(self.point_in(x), (0, 0, 0, 0, 1, 1))  # B x T+2 x N x d
        y, weight = self.depth.bias.to(x.dtype), self.depth.weight.to(x.dtype)  # d x 1 x 3
        for i in range(3):
            y = torch.addcmul(y, x[:, i : i + T], weight[:, 0, i])
        return self.point_out(y)


class TemporalAttention(nn.Module):
    """The alternative of table 9(b): each patch attends to itself in the other frames."""

    def __init__(self, width, heads):
        super().__init__()
        self.attn = Attention(width, heads)

    def forward(self, x):
        """x (B, T, N, d) -> the same shape"""
        y = self.attn(rearrange(x, "b t n d -> (b n) t d"))
        return rearrange(y, "(b n) t d -> b t n d", b=len(x))


class SideBlock(nn.Module):
    """One block of the side network (fig. 3b): fusion, temporal module, [CLS]-shift attention, MLP."""

    recompute = False  # keep what enters the block only, and compute the rest again in the backward pass

    def __init__(self, width, heads, temporal, cls_shift):
        super().__init__()
        self.cls_shift = cls_shift
        # Section 3.3: batch norm before convolution and MLP, layer norm before attention.
        self.bn_1 = BatchNorm(width) if temporal == "conv" else LayerNorm(width)
        self.temporal = TemporalConv(width) if temporal == "conv" else TemporalAttention(width, heads)
        self.ln_1 = LayerNorm(width)
        self.attn = Attention(width, heads)
        self.bn_2 = BatchNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def attention(self, x, cls, positions):
        """Spatial attention in each frame. x (B, T, n, d), the keys' and values' cls (B, T, 1, d) -> (B, T, n, d)"""
        if self.cls_shift:
            # Half of the channels come from the next frame, half from the one before; zeros from outside the clip.
            half = cls.shape[-1] // 2
            after = F.pad(cls[:, 1:, :, :half], (0, 0, 0, 0, 0, 1))
            before = F.pad(cls[:, :-1, :, half:], (0, 0, 0, 0, 1, 0))
            cls = torch.cat([after, before], dim=-1)
        x = self.ln_1(torch.cat([cls, x + positions.to(x.dtype)], dim=2))  # B x T x 1+n x d
        qkv = F.linear(x, self.attn.in_proj_weight, self.attn.in_proj_bias)
        q, k, v = rearrange(qkv, "b t n (three h d) -> three (b t) h n d", three=3, h=self.attn.heads)
        y = F.scaled_dot_product_attention(q[:, :, 1:], k, v)
        return self.attn.out_proj(rearrange(y, "(b t) h n d -> b t n (h d)", b=len(x)))

    def insides(self, s, z, positions):
        extra = s.shape[2] - (z.shape[2] - 1)  # a [CLS] token of its own, in table 9(d); the temporal module skips it
        own, s = s[:, :, :extra], s[:, :, extra:]
        s = 0.5 * s + 0.5 * z[:, :, 1:]  # eq. (2); the paper adds, the released code takes the mean
        s = s + self.temporal(self.bn_1(s))
        s = torch.cat([own, s], dim=2) if extra else s
        s = s + self.attention(s, z[:, :, :1], positions)
        return s + self.mlp(self.bn_2(s))

    def forward(self, s, z, positions):
        """s (B, T, n, d), z (B, T, N+1, d), positions (n, d) -> s"""
        if not (self.recompute and torch.is_grad_enabled()):
            return self.insides(s, z, positions)
        contexts = lambda: (contextlib.nullcontext(), statistics_at_rest(self))  # noqa: E731
        return checkpoint(self.insides, s, z, positions, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def statistics_at_rest(module):
    """Leaves the running statistics of batch norms as they were: the first pass through the batch has counted it."""
    before = [buffer.clone() for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in zip(module.buffers(), before):
            buffer.copy_(value)


class Side4Video(nn.Module):
    """The video model. `clip` is a `common.ViT`; it is frozen in place. The defaults are the paper's B/16 settings.

    width: d, a multiple of 64, the width of a head. side_layers: l; 0 for as many as the ViT has blocks. fusion: which
    of these are read (table 9a): "interval", every (layers / l)-th, or "top", the last l. temporal (9b): "conv" or
    "attention". cls_shift (9c): shift the ViT's [CLS] tokens in time. representation (9d): "gap", the mean over frames
    and patches; "vit" or "own", the mean over frames of a [CLS] token that the side network carries along, which starts
    as the ViT's of the first layer read and is fused with those that follow, or as a learned one. The paper says no
    more of these two; here they pass by the temporal module. num_frames: of a clip; the weights do not depend on it.
    """

    def __init__(
        self,
        clip,
        num_classes,
        num_frames=8,
        width=320,
        side_layers=0,
        fusion="interval",
        temporal="conv",
        cls_shift=True,
        representation="gap",
        dropout=0.0,
    ):
        super().__init__()
        layers = len(clip.blocks)
        side_layers = side_layers or layers
        for name, value, known in (
            ("fusion", fusion, ("interval", "top")),
            ("temporal", temporal, ("conv", "attention")),
            ("representation", representation, ("gap", "vit", "own")),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; it must be one of: {', '.join(known)}")
        if width < 64 or width % 64:
            raise ValueError(f"width is {width}; it must be a multiple of 64, the width of a head")
        if not 0 < side_layers <= layers or (fusion == "interval" and layers % side_layers):
            raise ValueError(f"side_layers is {side_layers}: the {layers} blocks of the ViT cannot be read so")
        step = layers // side_layers if fusion == "interval" else 1
        self.read = list(range(layers - 1, -1, -step))[:side_layers][::-1]  # counted from 1: every step-th, or the last
        self.representation = representation
        self.vit = freeze(clip)
        self.stem = nn.Conv3d(3, width, (3, clip.patch_size, clip.patch_size), (1, *[clip.patch_size] * 2), (1, 0, 0))
        self.stem_bn = BatchNorm(width)
        self.position_embedding = nn.Parameter(width**-0.5 * torch.randn(len(clip.positional_embedding) - 1, width))
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width)) if representation == "own" else None
        self.downs = nn.ModuleList(Down(clip.width, width, clip.ln_post.eps) for _ in self.read)
        self.blocks = nn.ModuleList(SideBlock(width, width // 64, temporal, cls_shift) for _ in self.read)
        self.post_bn = BatchNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.head = classifier(width, num_classes)

    def features(self, video):
        """video (B, T, 3, H, W) -> (B, d)"""
        s = self.stem(rearrange(video, "b t c h w -> b c t h w"))
        s = self.stem_bn(rearrange(s, "b d t h w -> b t (h w) d"))  # s_0, B x T x N x d
        positions = self.position_embedding
        for i, z in enumerate(self.outputs(video)):
            z = self.downs[i](z)  # eq. (1), B x T x N+1 x d
            if self.representation != "gap":
                if i == 0:
                    own = z[:, :, :1]
                    if self.representation == "own":
                        own = self.class_embedding.to(z.dtype).expand_as(own)
                    s, positions = torch.cat([own, s], dim=2), F.pad(positions, (0, 0, 1, 0))
                elif self.representation == "vit":
                    s = torch.cat([0.5 * s[:, :, :1] + 0.5 * z[:, :, :1], s[:, :, 1:]], dim=2)
            s = self.blocks[i](s, z, positions)
        s = self.post_bn(s)
        return s.mean((1, 2)) if self.representation == "gap" else s[:, :, 0].mean(1)  # eq. (3)

    @torch.no_grad()
    def outputs(self, video):
        """The outputs Z (B, T, N+1, D) of the ViT's blocks that are read, one after the other."""
        z = self.vit.ln_pre(self.vit.embed(video.flatten(0, 1)))
        for i, block in enumerate(self.vit.blocks):
            z = block(z)
            if i in self.read:
                yield z.unflatten(0, video.shape[:2])

    def forward(self, video):
        """video (B, T, 3, H, W), normalised -> logits (B, num_classes)"""
        return self.head(self.dropout(self.features(video)))


def load_official(model, checkpoint):
    """Reads the authors' checkpoint as `torch.load` gives it, nested, with any prefix; ValueError if it misfits."""
    renamed = {}
    for key, tensor in tensors_of(checkpoint).items():
        key = re.sub(r"^.*?(?=visual\.)", "", key)
        key = re.sub(r"^(.*\.)?fc\.(weight|bias)$", r"head.\2", key)
        for pattern, name in RELEASED_NAMES:
            key = re.sub(pattern, name, key)
        if re.search(r"\.point_(in|out)\.weight$", key):
            tensor = tensor.flatten(1)  # a 1x1x1 convolution is a linear layer
        elif key.endswith(".depth.weight"):
            tensor = tensor.flatten(2)
        renamed[re.sub(r"^visual\.", "vit.", key)] = tensor
    # What recognition does not use, released files may lack or keep.
    renamed.pop("vit.proj", None)
    for key in ("vit.ln_post.weight", "vit.ln_post.bias"):
        renamed.setdefault(key, model.state_dict()[key])
    load_strict(model, renamed, "of Side4Video's authors")


RELEASED_NAMES = (
    (r"^visual\.side_conv1\.", "stem."),
    (r"^visual\.side_pre_bn3d\.", "stem_bn."),
    (r"^visual\.side_post_bn\.", "post_bn."),
    (r"^visual\.transformer\.side_spatial_position_embeddings$", "position_embedding"),
    (r"^visual\.transformer\.side_lns\.(\d+)\.", r"downs.\1.ln."),
    (r"^visual\.transformer\.side_linears\.(\d+)\.", r"downs.\1.fc."),
    (r"^visual\.transformer\.side_transformer\.", "blocks."),
    (r"^(blocks\.\d+)\.conv\.0\.", r"\1.temporal.point_in."),
    (r"^(blocks\.\d+)\.conv\.1\.", r"\1.temporal.depth."),
    (r"^(blocks\.\d+)\.conv\.2\.", r"\1.temporal.point_out."),
    (r"^(blocks\.\d+)\.mlp\.fc1\.", r"\1.mlp.0."),
    (r"^(blocks\.\d+)\.mlp\.fc2\.", r"\1.mlp.2."),
)

# Table 12 and the released configurations; the larger ViTs have their own columns.
K400 = dict(
    epochs=30,
    warmup_epochs=4,
    batch_size=256,
    lr=1e-3,
    weight_decay=0.15,
    label_smoothing=0.1,
    views=(4, 3),
    augment=dict(crop=(0.08, 1.0), flip=0.5, gray=0.2),
)
SSV2 = dict(
    K400,
    batch_size=128,
    views=(2, 3),
    augment=dict(crop=(0.08, 1.0), flip=0.5, randaugment=dict(num_ops=4, magnitude=7)),
    repeat=2,
)
TOY = dict(
    backbone="ViT-Toy-16",
    pretrained="shipped",
    epochs=6,
    warmup_epochs=0.3,
    batch_size=12,
    lr=4e-3,
    weight_decay=0.05,
    clip_grad=1.0,
    eval_every=6,
    model=dict(width=64),
)
L14_MODEL, E14_MODEL = dict(width=512), dict(width=576, side_layers=32)
RECIPES = {
    "k400": K400,
    "k400 ViT-L-14": dict(K400, lr=1e-4, model=L14_MODEL),
    "k400 EVA02-E-14": dict(  # RandAugment as in the released configuration; table 12 has none
        K400, epochs=20, batch_size=128, lr=1e-4, model=E14_MODEL, augment=K400["augment"] | SSV2["augment"]
    ),
    "ssv1": dict(SSV2, epochs=40),
    "ssv1 ViT-L-14": dict(SSV2, epochs=40, lr=1e-4, model=L14_MODEL),
    "ssv1 EVA02-E-14": dict(SSV2, epochs=30, warmup_epochs=6, batch_size=64, lr=1e-4, model=E14_MODEL),
    "ssv2": SSV2,
    "ssv2 ViT-L-14": dict(SSV2, lr=1e-4, model=L14_MODEL),
    "ssv2 EVA02-E-14": dict(SSV2, epochs=25, warmup_epochs=6, batch_size=64, lr=1e-4, model=E14_MODEL),
    "toy": TOY,
}

# Tables 1, 2 and 4; table 2 prints GFLOPs for three views.
# label, ViT, switches, frames, total (M), tunable (M), GFLOPs per view; None where the paper prints nothing
PAPER = [
    ("ViT-B/16 light: 6 x 192", B16, dict(side_layers=6, width=192), 8, None, 4, 445 / 3),
    ("ViT-B/16: 12 x 320", B16, {}, 8, None, 21, 528 / 3),
    ("ViT-L/14 light: 12 x 320", L14, dict(side_layers=12), 8, None, 22, 2092 / 3),
    ("ViT-L/14: 24 x 512", L14, L14_MODEL, 8, None, 102, 2611 / 3),
    ("ViT-E/14 light: 32 x 576", E14, E14_MODEL, 8, None, None, 7980),
]

if __name__ == "__main__":
    from colab.tables import compare

    compare(Side4Video, PAPER)
