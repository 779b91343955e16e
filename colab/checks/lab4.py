"""Checks of lab 4: ZeroI2V, free at test time."""

import torch

import zeroi2v
from colab.check import MistakeError, exercise, progress, solution  # noqa: F401  for the notebook

shift, LinearAdapter = (
    zeroi2v.shift,
    zeroi2v.LinearAdapter,
)  # as the files have them, whatever a cell puts in their place


def relocated(x, offsets):
    return shift(x, [(dt, x.shape[-1] // len(offsets)) for dt in offsets])


def by_index(source):
    """A relocation in which head i of frame t takes frame source(t, dt, T)"""

    def wrong(x, offsets):
        T, d = x.shape[1], x.shape[-1] // len(offsets)
        heads = [x[:, [source(t, dt, T) for t in range(T)], :, i * d : (i + 1) * d] for i, dt in enumerate(offsets)]
        return torch.cat(heads, dim=-1)

    return wrong


def own(t, dt, T):
    return t + dt if 0 <= t + dt < T else t


def zeros_outside(x, offsets):
    T, d = x.shape[1], x.shape[-1] // len(offsets)
    y = by_index(own)(x, offsets)
    for i, dt in enumerate(offsets):
        for t in range(T):
            y[:, t, :, i * d : (i + 1) * d] *= 0 <= t + dt < T
    return y


def interleaved(x, offsets):
    y, h = x.clone(), len(offsets)
    for i in range(h):
        y[..., i::h] = shift(x, [(offsets[i], x.shape[-1])])[..., i::h]
    return y


def overwritten(x, offsets):
    x, d = x.clone(), x.shape[-1] // len(offsets)
    for i, dt in enumerate(offsets):
        for t in range(x.shape[1]):
            x[:, t, :, i * d : (i + 1) * d] = x[:, own(t, dt, x.shape[1]), :, i * d : (i + 1) * d]
    return x


@exercise(
    reference=relocated,
    mistakes=[
        (
            "You write into the tensor that you read: later frames get what is already moved. Copy it first.",
            overwritten,
        ),
        (
            "The sign is wrong: head i of frame t takes frame t + dt, you took frame t - dt.",
            lambda x, o: by_index(lambda t, dt, T: own(t, -dt, T))(x, o),
        ),
        (
            "The clip is not a circle: where t + dt is outside of the clip, the head keeps its own frame t.",
            by_index(lambda t, dt, T: (t + dt) % T),
        ),
        (
            "Outside of the clip you took the nearest frame of the clip; the head keeps its own frame t.",
            by_index(lambda t, dt, T: min(max(t + dt, 0), T - 1)),
        ),
        ("Outside of the clip you put zeros; the head keeps its own frame t.", zeros_outside),
        ("The channels of a head stand side by side: head 0 has the first d of them, not every h-th.", interleaved),
        ("Every head was given the offset of head 0; each has its own.", lambda x, o: relocated(x, o[:1])),
        (
            "The heads are in reverse order: offsets[0] belongs to the first d channels.",
            lambda x, o: relocated(x, o[::-1]),
        ),
        ("Nothing moved: each head took its own frame.", lambda x, o: x),
        (
            "You moved tokens within a frame; frames are dimension 1.",
            lambda x, o: relocated(x.transpose(1, 2), o).transpose(1, 2),
        ),
        ("You moved clips; frames are dimension 1.", lambda x, o: relocated(x.transpose(0, 1), o).transpose(0, 1)),
    ],
)
def relocate(definition):
    """keys and values from other frames"""
    return definition(torch.randn(4, 5, 7, 12), [-1, 2, 0, -3])


def two(result, names):
    """The outputs of a definition that must return two tensors"""
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise MistakeError(f"Return two tensors: {names}.")
    return [*result]


def affine_of(W1, b1, W2, b2, s):
    return torch.eye(len(W2), dtype=W2.dtype, device=W2.device) + s * W2 @ W1, s * (W2 @ b1 + b2)


def changed(A=lambda A, *_: A, a=lambda a, *_: a):
    """affine_of with another A or a"""

    def wrong(W1, b1, W2, b2, s):
        right = affine_of(W1, b1, W2, b2, s)
        return A(right[0], W1, b1, W2, b2, s), a(right[1], W1, b1, W2, b2, s)

    return wrong


@exercise(
    reference=affine_of,
    mistakes=[
        ("The identity is missing in A: the adapter adds to x.", changed(A=lambda A, W1, b1, W2, b2, s: s * W2 @ W1)),
        ("The scale s belongs to W_up W_down alone, not to the identity.", changed(A=lambda A, W1, b1, W2, b2, s: s * (A.new_ones(len(A)).diag() + W2 @ W1))),
        ("The scale s is missing.", lambda W1, b1, W2, b2, s: affine_of(W1, b1, W2, b2, 1)),
        ("The scale s is missing in A.", changed(A=lambda A, W1, b1, W2, b2, s: affine_of(W1, b1, W2, b2, 1)[0])),
        ("The scale s is missing in a.", changed(a=lambda a, W1, b1, W2, b2, s: a / s)),
        ("The scale s is missing for W_up b_down: b_up and b_down are both scaled.", changed(a=lambda a, W1, b1, W2, b2, s: W2 @ b1 + s * b2)),
        ("The scale s is missing for b_up: b_up and b_down are both scaled.", changed(a=lambda a, W1, b1, W2, b2, s: s * W2 @ b1 + b2)),
        ("b_down is missing in a: W_up is applied to it too.", changed(a=lambda a, W1, b1, W2, b2, s: s * b2)),
        ("b_up is missing in a.", changed(a=lambda a, W1, b1, W2, b2, s: s * W2 @ b1)),
        ("A is transposed: here matrices act on columns, A x, as W x in nn.Linear.", changed(A=lambda A, *_: A.T)),
    ],
)  # fmt: skip
def affine(definition):
    """an adapter as a matrix and a vector"""
    D, k = 8, 3
    W1, b1, W2, b2 = torch.randn(k, D), torch.randn(k), torch.randn(D, k), torch.randn(D)
    return two(definition(W1, b1, W2, b2, 0.7), "A and a")


def merged(W, b, A, a, after):
    return (A @ W, A @ b + a) if after else (W @ A, W @ a + b)


@exercise(
    reference=merged,
    mistakes=[
        ("The merge is on the wrong side: an adapter before the layer gives W A, one after it gives A W.", lambda W, b, A, a, after: merged(W, b, A, a, not after)),
        ("An adapter before the layer is merged on the other side: W A and W a + b.", lambda W, b, A, a, after: merged(W, b, A, a, True)),
        ("An adapter after the layer is merged on the other side: A W and A b + a.", lambda W, b, A, a, after: merged(W, b, A, a, False)),
        ("Both matrices are right, both vectors are only added: the second layer is applied to the vector of the first.", lambda W, b, A, a, after: (merged(W, b, A, a, after)[0], a + b)),
        ("Before the layer, a goes through W as x does: W a + b, not a + b.", lambda W, b, A, a, after: (merged(W, b, A, a, after)[0], A @ b + a if after else a + b)),
        ("After the layer, A is applied to b as well: A b + a, not a + b.", lambda W, b, A, a, after: (merged(W, b, A, a, after)[0], a + b if after else W @ a + b)),
        (
            "The bias changes too: it is A b + a after the layer, W a + b before it.",
            lambda W, b, A, a, after: (merged(W, b, A, a, after)[0], b),
        ),
        ("The bias of the layer is not what it was: the adapter's vector a is missing.", lambda W, b, A, a, after: (merged(W, b, A, a, after)[0], A @ b if after else b)),
        ("A is transposed: with matrices that act on columns no transpose is needed.", lambda W, b, A, a, after: merged(W, b, A.T, a, after)),
    ],
)  # fmt: skip
def merge(definition):
    """adapter and frozen layer as one layer"""
    W, b, A, a = torch.randn(8, 8), torch.randn(8), torch.randn(8, 8), torch.randn(8)
    both = [two(definition(W, b, A, a, after), "W_new and b_new") for after in (False, True)]
    return [*both[0], *both[1]]


def reach(offsets, blocks=4, T=8):
    """bool (T, T): whether the frame of the row depends on the frame of the column after so many blocks"""
    one = torch.eye(T)
    for t in range(T):
        for dt in offsets:
            one[t, own(t, dt, T)] = 1
    return one.matrix_power(blocks) > 0


DEFAULT, BUDGET = [-1, 1, 2], 6
PAIRS = int(reach(DEFAULT).sum())


@exercise(
    reference=lambda: [-2, -1, 3],
    mistakes=[
        (f"These are the default's offsets, or as good: {PAIRS} of 64 pairs. More are needed.", lambda: [-1, 1, 2]),
        (f"That is 7 frames of offset in all; the budget is {BUDGET}.", lambda: [-3, 1, 3]),
        (f"That reaches 36 of 64 pairs, fewer than the default's {PAIRS}: look both ways.", lambda: [1, 2, 3]),
        ("The ViT has three heads, and you gave 2 offsets.", lambda: [-2, 3]),
        ("An offset is a whole number of frames.", lambda: [-0.5, 0.5, 2]),
    ],
)
def choose_offsets(definition):
    """offsets within a budget that reach further"""
    offsets = definition()
    if offsets is None:
        raise MistakeError("It returns None: is the `return` missing?")
    offsets = [*offsets]
    if len(offsets) != 3:
        raise MistakeError(f"The ViT has three heads, and you gave {len(offsets)} offsets.")
    if any(dt != int(dt) for dt in offsets):
        raise MistakeError("An offset is a whole number of frames.")
    spent = sum(abs(int(dt)) for dt in offsets)
    if spent > BUDGET:
        raise MistakeError(f"That is {spent} frames of offset in all; the budget is {BUDGET}.")
    pairs = int(reach([int(dt) for dt in offsets]).sum())
    if pairs == PAIRS:
        raise MistakeError(f"These are the default's offsets, or as good: {PAIRS} of 64 pairs. More are needed.")
    if pairs < PAIRS:
        raise MistakeError(f"That reaches {pairs} of 64 pairs, fewer than the default's {PAIRS}: look both ways.")
    return torch.tensor(1.0)
