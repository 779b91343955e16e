"""Checks of lab 2: AIM, one attention used twice."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import aim
import common
from colab.check import MistakeError, exercise, fill, progress, solution  # noqa: F401  for the notebook

Adapter = aim.Adapter  # the project's, also after a notebook has put an edited one in its place


class Variant(Adapter):
    """An adapter with the project's parameters; subclasses are what students typically write."""

    def forward(self, x):
        return self.output(x, self.fc2(F.gelu(self.fc1(x))))

    def output(self, x, y):
        return x + y if self.skip else y


class AlwaysSkip(Variant):
    def output(self, x, y):
        return x + y


class NeverSkip(Variant):
    def output(self, x, y):
        return y


class Linear(Variant):
    def forward(self, x):
        return self.output(x, self.fc2(self.fc1(x)))


class ReLU(Variant):
    def forward(self, x):
        return self.output(x, self.fc2(F.relu(self.fc1(x))))


class LateGELU(Variant):
    def forward(self, x):
        return self.output(x, F.gelu(self.fc2(self.fc1(x))))


class TwoGELUs(Variant):
    def forward(self, x):
        return self.output(x, F.gelu(self.fc2(F.gelu(self.fc1(x)))))


@exercise(
    reference=Adapter,
    mistakes=[
        ("The skip is always there; x is added only where `skip` is True.", AlwaysSkip),
        ("The skip is missing: where `skip` is True, x is added to the output.", NeverSkip),
        ("The GELU is missing: without it the two layers are one matrix of low rank.", Linear),
        ("You used ReLU; the released code has GELU, and trained weights fit only that.", ReLU),
        ("The GELU stands after the second layer; it belongs between the two.", LateGELU),
        ("There is a GELU after the second layer as well: then the output is hardly ever negative.", TwoGELUs),
    ],
)
def adapter(definition):
    """the bottleneck that starts at zero"""
    outputs = []
    for width, ratio, skip in ((8, 0.25, False), (10, 0.5, True)):
        module, x = definition(width, ratio, skip=skip), torch.randn(2, 3, 5, width)
        wanted = Adapter(width, ratio, skip=skip)
        if not isinstance(module, nn.Module):
            raise MistakeError("An adapter is an nn.Module, or the optimizer would not find its parameters.")
        if hasattr(module, "fc1") and module.fc1.weight.shape != wanted.fc1.weight.shape:
            hidden = wanted.fc1.out_features
            raise MistakeError(
                f"fc1 has a weight {tuple(module.fc1.weight.shape)}; width {width} and ratio {ratio} make {hidden} "
                f"numbers in the middle: ({hidden}, {width})."
            )
        for name in ("fc1", "fc2"):
            if hasattr(module, name) and getattr(module, name).bias is None:
                raise MistakeError(f"{name} has no bias; the paper's fully connected layers have one.")
        if hasattr(module, "fc1") and not module.fc1.weight.any():
            raise MistakeError(
                "fc1 starts at zero too: then neither layer gets a gradient, and it never starts to learn."
            )
        if hasattr(module, "fc2") and (module.fc2.weight.any() or module.fc2.bias.any()):
            raise MistakeError(
                "fc2 does not start at zero, weight and bias: training would not start from the image model."
            )
        outputs.append(fill(module, like=wanted)(x))
    return outputs


def t_msa_of_the_project(z, attn):
    zt = rearrange(z, "b t n d -> (b n) t d")
    return rearrange(attn(zt), "(b n) t d -> b t n d", n=z.shape[2])


def without_moving(z, attn):
    B, T, N, D = z.shape
    return attn(z.reshape(B * N, T, D)).reshape(B, T, N, D)


def moved_back_wrongly(z, attn):
    zt = attn(rearrange(z, "b t n d -> (b n) t d"))
    return zt.reshape(z.shape)


@exercise(
    reference=t_msa_of_the_project,
    mistakes=[
        (
            "Frames do not see each other: you attended along space, inside of each frame.",
            lambda z, attn: attn(z),
        ),
        (
            "All tokens of a clip see each other: you attended jointly. Each of the positions needs a sequence of its own.",
            lambda z, attn: rearrange(attn(rearrange(z, "b t n d -> b (t n) d")), "b (t n) d -> b t n d", n=z.shape[2]),
        ),
        (
            "Clips see each other: B stands in the sequence. A sequence has the T tokens of one clip at one position.",
            lambda z, attn: rearrange(attn(rearrange(z, "b t n d -> n (b t) d")), "n (b t) d -> b t n d", b=len(z)),
        ),
        (
            "The clips attend to each other, not the frames: the sequence runs along B, and should run along T.",
            lambda z, attn: rearrange(attn(rearrange(z, "b t n d -> (t n) b d")), "(t n) b d -> b t n d", t=z.shape[1]),
        ),
        (
            "`reshape` alone moves nothing: (B, T, N+1, D) read as (B N+1, T, D) mixes positions. T and N+1 must be swapped.",
            without_moving,
        ),
        (
            "The way back is wrong: swap N+1 and T again, do not only reshape.",
            moved_back_wrongly,
        ),
        (
            "The output is (B N+1, T, D), as the attention gives it; bring it back to (B, T, N+1, D).",
            lambda z, attn: attn(rearrange(z, "b t n d -> (b n) t d")),
        ),
        (
            "The output is (B, N+1, T, D): swap T and N+1 back.",
            lambda z, attn: t_msa_of_the_project(z, attn).transpose(1, 2),
        ),
        (
            "z is added to the output. Eq. (3) does that later, after the adapter.",
            lambda z, attn: z + t_msa_of_the_project(z, attn),
        ),
    ],
)
def t_msa(definition):
    """attention along time, with the same layer"""
    attn = fill(common.Attention(8, heads=2))
    return definition(torch.randn(2, 3, 5, 8), attn)


def eq345(z, block, temporal, spatial, joint, s=0.5):
    zt = z + temporal(t_msa_of_the_project(block.ln_1(z), block.attn))
    zs = zt + spatial(block.attn(block.ln_1(zt)))
    y = block.ln_2(zs)
    return zs + block.mlp(y) + s * joint(y)


def in_parallel(z, block, temporal, spatial, joint, s=0.5):
    y = block.ln_1(z)
    zs = z + temporal(t_msa_of_the_project(y, block.attn)) + spatial(block.attn(y))
    y = block.ln_2(zs)
    return zs + block.mlp(y) + s * joint(y)


def space_first(z, block, temporal, spatial, joint, s=0.5):
    zs = z + spatial(block.attn(block.ln_1(z)))
    zt = zs + temporal(t_msa_of_the_project(block.ln_1(zs), block.attn))
    y = block.ln_2(zt)
    return zt + block.mlp(y) + s * joint(y)


def space_twice(z, block, temporal, spatial, joint, s=0.5):
    zt = z + temporal(block.attn(block.ln_1(z)))
    zs = zt + spatial(block.attn(block.ln_1(zt)))
    y = block.ln_2(zs)
    return zs + block.mlp(y) + s * joint(y)


def varied(ffn=None, norm_1=True, residual=True, scale_all=False, adapters=True):
    """Variants of the block: `ffn` replaces the sum of eq. (5); the others leave something out."""

    def wrong(z, block, temporal, spatial, joint, s=0.5):
        ln = block.ln_1 if norm_1 else (lambda x: x)
        temporal, spatial = (temporal, spatial) if adapters else (lambda x: x, lambda x: x)
        zt = (z if residual else 0) + temporal(t_msa_of_the_project(ln(z), block.attn))
        zs = (zt if residual else 0) + spatial(block.attn(ln(zt)))
        if ffn is not None:
            return ffn(zs, block, joint, s)
        y = block.ln_2(zs)
        return zs + block.mlp(y) + s * joint(y)

    return wrong


@exercise(
    reference=eq345,
    mistakes=[
        ("S-MSA must see what T-MSA has changed: eq. (4) reads z^T, you gave it z.", in_parallel),
        ("Space comes first in yours; eq. (3), time, comes first.", space_first),
        ("Eq. (3) attends along time: use your t_msa there. Yours attends along space twice.", space_twice),
        ("LN is missing before the attention: eq. (3) and (4) have MSA(LN(z)).", varied(norm_1=False)),
        ("The residual is missing: eq. (3) is z + ..., eq. (4) is z^T + ...", varied(residual=False)),
        ("The adapters after T-MSA and S-MSA are missing.", varied(adapters=False)),
        (
            "s is missing: eq. (5) has s times the adapter's output.",
            varied(lambda z, b, joint, s: z + b.mlp(b.ln_2(z)) + joint(b.ln_2(z))),
        ),
        (
            "s is fixed at 0.5 in yours; it is an argument.",
            lambda z, block, temporal, spatial, joint, s=0.5: eq345(z, block, temporal, spatial, joint),
        ),
        (
            "s multiplies the MLP as well; it belongs to the adapter alone.",
            varied(lambda z, b, joint, s: z + s * (b.mlp(b.ln_2(z)) + joint(b.ln_2(z)))),
        ),
        (
            "The joint adapter reads the MLP's output; in eq. (5) it stands beside the MLP and reads LN(z^S).",
            varied(lambda z, b, joint, s: z + b.mlp(b.ln_2(z)) + s * joint(b.mlp(b.ln_2(z)))),
        ),
        (
            "The joint adapter reads z^S; in eq. (5) it reads LN(z^S), as the MLP does.",
            varied(lambda z, b, joint, s: z + b.mlp(b.ln_2(z)) + s * joint(z)),
        ),
        (
            "The joint adapter reads the MLP's sum; in eq. (5) both read LN(z^S).",
            varied(lambda z, b, joint, s: (y := z + b.mlp(b.ln_2(z))) + s * joint(b.ln_2(y))),
        ),
        (
            "Eq. (5) uses the block's second norm, ln_2; you used ln_1 again.",
            varied(lambda z, b, joint, s: z + b.mlp(b.ln_1(z)) + s * joint(b.ln_1(z))),
        ),
        ("The MLP is missing in eq. (5).", varied(lambda z, b, joint, s: z + s * joint(b.ln_2(z)))),
        ("The adapter is missing in eq. (5).", varied(lambda z, b, joint, s: z + b.mlp(b.ln_2(z)))),
        ("z^S is missing in eq. (5).", varied(lambda z, b, joint, s: b.mlp(b.ln_2(z)) + s * joint(b.ln_2(z)))),
    ],
)
def aim_block(definition):
    """the block of equations (3) to (5)"""
    D = 8
    block = fill(common.Block(D, heads=2, mlp_width=4 * D, activation=nn.GELU))
    temporal, spatial, joint = (Adapter(D, skip=skip) for skip in (False, True, False))
    adapters = nn.ModuleDict(dict(temporal=temporal, spatial=spatial, joint=joint))
    fill(adapters)
    z = torch.randn(2, 3, 5, D)
    return [definition(z, block, temporal, spatial, joint, s) for s in (0.5, 0.3)]


def dropped(rate_of=lambda i, layers, last: last * i / max(layers - 1, 1), scaled=lambda rate: 1 / (1 - rate)):
    def drop_path(y, kept, i, layers, last):
        rate = rate_of(i, layers, last)
        return y * kept.view(-1, *[1] * (y.ndim - 1)) * scaled(rate)

    return drop_path


def other_way_round(y, kept, i, layers, last):
    return dropped()(y, ~kept, i, layers, last)


@exercise(
    reference=dropped(),
    mistakes=[
        (
            "The rate does not reach `last` in the last block: the denominator is layers - 1.",
            dropped(lambda i, layers, last: last * i / layers),
        ),
        (
            "The first block has a rate already; i counts from 0, and so does the rate.",
            dropped(lambda i, layers, last: last * (i + 1) / layers),
        ),
        ("Every block has the same rate; it rises from 0 to `last`.", dropped(lambda i, layers, last: last)),
        (
            "The rate falls from block to block; it rises from 0 in the first to `last` in the last.",
            dropped(lambda i, layers, last: last * (layers - 1 - i) / max(layers - 1, 1)),
        ),
        (
            "The division is missing: a branch that is kept with probability 1 - rate is divided by 1 - rate.",
            dropped(scaled=lambda rate: 1),
        ),
        ("You multiplied with 1 - rate; divide by it, then the mean stays the same.", dropped(scaled=lambda r: 1 - r)),
        (
            "You divided by the rate; divide by the probability of being kept, 1 - rate.",
            dropped(scaled=lambda r: 1 / torch.tensor(float(r))),
        ),
        ("It is the wrong way round: where `kept` is True, the branch stays.", other_way_round),
        (
            "Nothing is left out: clips for which `kept` is False must become zero.",
            lambda y, kept, i, layers, last: y / (1 - last * i / max(layers - 1, 1)),
        ),
    ],
)
def drop_path(definition):
    """stochastic depth and its rates"""
    kept, y = torch.tensor([True, False, True]), torch.randn(3, 2, 5, 8)
    try:
        outputs = [definition(y, kept, i, 7, 0.3) for i in (2, 6, 1)]
    except RuntimeError as error:
        if "must match the size" not in str(error):
            raise
        raise MistakeError(
            "`kept` has one value per clip; give it y's dimensions: kept[:, None, None, None]."
        ) from None
    try:
        single = definition(y, kept, 0, 1, 0.3)
    except ZeroDivisionError:
        raise MistakeError("With a single block, layers = 1, you divide by zero; its rate is 0.") from None
    return [*outputs, single.nan_to_num() if isinstance(single, torch.Tensor) else single]
