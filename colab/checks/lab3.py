"""Checks of lab 3: ST-Adapter."""

import torch
import torch.nn.functional as F
from einops import EinopsError, rearrange

from colab.check import MistakeError, as_tensor, exercise, progress, same, solution  # noqa: F401  for the notebook


def convolution(x, weight, bias):
    """By PyTorch's own depthwise convolution"""
    y = F.conv1d(rearrange(x, "b t n c -> (b n) c t"), weight[:, None], bias, padding=1, groups=len(bias))
    return rearrange(y, "(b n) c t -> b t n c", b=len(x))


def rolled(x, weight, bias):
    return bias + weight[:, 0] * x.roll(1, 1) + weight[:, 1] * x + weight[:, 2] * x.roll(-1, 1)


def nearest(x, weight, bias):
    x = torch.cat([x[:, :1], x, x[:, -1:]], dim=1)
    return bias + sum(weight[:, i] * x[:, i : i + x.shape[1] - 2] for i in range(3))


def from_the_end(x, weight, bias):
    """x[:, t - 1] at t = 0, where Python counts from the end, with a condition at the last frame only"""
    y = convolution(x, weight, bias)
    y[:, 0] += weight[:, 0] * x[:, -1]
    return y


def inside(x, weight, bias):
    return convolution(x, weight, bias)[:, 1:-1]


def reshaped(x, weight, bias):
    y = F.conv1d(x.reshape(-1, len(bias), x.shape[1]), weight[:, None], bias, padding=1, groups=len(bias))
    return y.reshape(x.shape)


def along_patches(x, weight, bias):
    return convolution(x.transpose(1, 2), weight, bias).transpose(1, 2)


def without_own_frame(x, weight, bias):
    return convolution(x, weight * torch.tensor([1, 0, 1]), bias)


def shifted(x, weight, bias, before):
    T = x.shape[1]
    x = F.pad(x, (0, 0, 0, 0, before, 2 - before))
    return bias + sum(weight[:, i] * x[:, i : i + T] for i in range(3))


@exercise(
    reference=convolution,
    mistakes=[
        (
            "The clip is not a circle: frames outside of it are zero, but you took them from its other end (roll).",
            rolled,
        ),
        (
            "The kernel runs backwards: weight[:, 0] belongs to frame t - 1, the one before.",
            lambda x, weight, bias: convolution(x, weight.flip(1), bias),
        ),
        ("Frames outside of the clip are zero, not copies of the first and the last frame.", nearest),
        ("You convolved along the patches; time is the second dimension of x.", along_patches),
        (
            "Frame t takes frames t - 2, t - 1 and t; it should take t - 1, t and t + 1.",
            lambda x, weight, bias: shifted(x, weight, bias, 2),
        ),
        (
            "Frame t takes frames t, t + 1 and t + 2; it should take t - 1, t and t + 1.",
            lambda x, weight, bias: shifted(x, weight, bias, 0),
        ),
        (
            "Before the first frame stands zero, but x[:, t - 1] at t = 0 is x[:, -1], the last frame.",
            from_the_end,
        ),
        (
            "The first and the last frame are missing: they have an output too, with zero for the neighbour that is not there.",
            inside,
        ),
        (
            "The first and the last frame are zero; their output is computed too, with zero for the missing neighbour.",
            lambda x, weight, bias: F.pad(inside(x, weight, bias), (0, 0, 0, 0, 1, 1)),
        ),
        (
            "The first and the last frame stay as they were; their output is computed too, with zero for the missing neighbour.",
            lambda x, weight, bias: torch.cat([x[:, :1], inside(x, weight, bias), x[:, -1:]], dim=1),
        ),
        ("The frame itself is missing: weight[:, 1] belongs to frame t.", without_own_frame),
        (
            "`reshape` does not exchange dimensions, it only cuts the numbers anew: use `transpose` or `rearrange`.",
            reshaped,
        ),
        ("The bias is missing.", lambda x, weight, bias: convolution(x, weight, 0 * bias)),
        (
            "The bias is counted three times: add it once, not with each shift.",
            lambda x, weight, bias: convolution(x, weight, 3 * bias),
        ),
        (
            "All channels have the kernel of the first one; each should have its own.",
            lambda x, weight, bias: convolution(x, weight[:1].expand_as(weight), bias),
        ),
        (
            "Channels are mixed: you summed over them. Depthwise means that each stays by itself.",
            lambda x, weight, bias: convolution(x, weight, bias).sum(-1, keepdim=True).expand_as(x),
        ),
    ],
)
def temporal_conv(definition):
    """a convolution over time by shifts"""
    x, weight, bias = torch.randn(2, 5, 3, 7), torch.randn(7, 3), torch.randn(7)
    before = x.clone()
    y = definition(x, weight, bias)
    if not torch.equal(x, before) and not same([as_tensor(y)], [as_tensor(convolution(before, weight, bias))]):
        raise MistakeError("You write into x while you still read from it: collect the sum in a new tensor.")
    return y


def volume(z, H, operation):
    x = operation(rearrange(z[:, :, 1:], "b t (h w) d -> b t h w d", h=H))
    return torch.cat([z[:, :, :1], x.flatten(2, 3)], dim=2)


def columns_first(z, H, operation):
    x = operation(rearrange(z[:, :, 1:], "b t (w h) d -> b t h w d", h=H))
    return torch.cat([z[:, :, :1], rearrange(x, "b t h w d -> b t (w h) d")], dim=2)


def back_by_columns(z, H, operation):
    x = operation(rearrange(z[:, :, 1:], "b t (h w) d -> b t h w d", h=H))
    return torch.cat([z[:, :, :1], rearrange(x, "b t h w d -> b t (w h) d")], dim=2)


def class_changed(z, H, operation):
    out = volume(z, H, operation)
    out[:, :, 0] += out[:, :, 1:].mean(2)
    return out


def class_at_the_end(z, H, operation):
    out = volume(z, H, operation)
    return torch.cat([out[:, :, 1:], out[:, :, :1]], dim=2)


def last_is_class(z, H, operation):
    x = operation(rearrange(z[:, :, :-1], "b t (h w) d -> b t h w d", h=H))
    return torch.cat([x.flatten(2, 3), z[:, :, -1:]], dim=2)


@exercise(
    reference=volume,
    mistakes=[
        (
            "The patches stand row by row: h is the outer one of (h w). You laid them out column by column.",
            columns_first,
        ),
        ("The way back goes by columns; the patches must return in the order in which they came.", back_by_columns),
        ("[class] is at the end of your list; it belongs before the patches.", class_at_the_end),
        ("[class] is the first token, not the last one.", last_is_class),
        (
            "[class] is lost: the output has only the patches.",
            lambda z, H, operation: volume(z, H, operation)[:, :, 1:],
        ),
        (
            "[class] changed: it was set to zero, and should pass by as it is.",
            lambda z, H, operation: torch.cat([0 * z[:, :, :1], volume(z, H, operation)[:, :, 1:]], dim=2),
        ),
        ("[class] changed: the mean of the patches was added; it should pass by as it is.", class_changed),
        (
            "`operation` is applied twice.",
            lambda z, H, operation: volume(volume(z, H, operation), H, operation),
        ),
        ("Nothing happened to the patches: is the result of `operation` used?", lambda z, H, operation: z),
        (
            "The input is added to the result; the skip is the adapter's, not this function's.",
            lambda z, H, operation: torch.cat([z[:, :, :1], (z + volume(z, H, operation))[:, :, 1:]], dim=2),
        ),
    ],
)
def through_volume(definition):
    """from tokens to a volume and back"""
    mark = torch.randn(2, 3, 4, 5, 7)

    def operation(x):
        if x.shape != mark.shape:
            shapes = f"{tuple(x.shape)}, it should be (B, T, H, W, D) = {tuple(mark.shape)}"
            raise MistakeError(f"`operation` got the shape {shapes}.")
        return x * mark  # each place of the volume is treated differently

    try:
        return definition(torch.randn(2, 3, 21, 7), 4, operation)
    except EinopsError as error:
        if "axis of length 21" in str(error):
            tokens = "one [class] and 20 patches: dimension 2 of z"
            raise MistakeError(f"21 tokens are not H rows of patches. Take [class] off first ({tokens}).") from error
        raise


def taps(size, kernel):
    """How many of the size * kernel inputs of a convolution along one side are not padding"""
    return sum(0 <= i + d < size for i in range(size) for d in range(-(kernel // 2), kernel // 2 + 1))


@exercise(
    reference=lambda T, H, W, C, kernel: T * H * W * C * kernel[0] * kernel[1] * kernel[2],
    mistakes=[
        (
            "That is a full convolution, where each of the C outputs reads all C inputs; a depthwise one reads its own only.",
            lambda T, H, W, C, kernel: T * H * W * C * C * kernel[0] * kernel[1] * kernel[2],
        ),
        (
            "A multiplication with its addition is counted as one here, not as two.",
            lambda T, H, W, C, kernel: 2 * T * H * W * C * kernel[0] * kernel[1] * kernel[2],
        ),
        (
            "A multiplication with its addition is counted as one here: kernel weights, not 2 kernel - 1 operations.",
            lambda T, H, W, C, kernel: T * H * W * C * (2 * kernel[0] * kernel[1] * kernel[2] - 1),
        ),
        (
            "The bias is an addition without a multiplication; it does not count.",
            lambda T, H, W, C, kernel: T * H * W * C * (kernel[0] * kernel[1] * kernel[2] + 1),
        ),
        (
            "You left out the products with the zeros outside of the volume; all counters include them.",
            lambda T, H, W, C, kernel: C * taps(T, kernel[0]) * taps(H, kernel[1]) * taps(W, kernel[2]),
        ),
        (
            "The places are missing: there is an output at each of the H W patches of a frame.",
            lambda T, H, W, C, kernel: T * C * kernel[0] * kernel[1] * kernel[2],
        ),
        (
            "The kernel is missing: each output costs one multiply-add for each of its weights.",
            lambda T, H, W, C, kernel: T * H * W * C,
        ),
        (
            "That is in units of a billion; return the number itself.",
            lambda T, H, W, C, kernel: torch.tensor(T * H * W * C * kernel[0] * kernel[1] * kernel[2] / 1e9).double(),
        ),
        (
            "The channels are missing: each of the C has a kernel of its own.",
            lambda T, H, W, C, kernel: T * H * W * kernel[0] * kernel[1] * kernel[2],
        ),
        (
            "The frames are missing: there is an output at each of the T.",
            lambda T, H, W, C, kernel: H * W * C * kernel[0] * kernel[1] * kernel[2],
        ),
        (
            "You added the three sides of the kernel; it has their product of weights.",
            lambda T, H, W, C, kernel: T * H * W * C * sum(kernel),
        ),
        ("Only the kernel's side along time is counted.", lambda T, H, W, C, kernel: T * H * W * C * kernel[0]),
        (
            "Those are the parameters of the kernels; they are used once at every place of the volume.",
            lambda T, H, W, C, kernel: C * kernel[0] * kernel[1] * kernel[2],
        ),
        (
            "Places at the border count as well: with padding there are T H W outputs.",
            lambda T, H, W, C, kernel: (
                (T - kernel[0] + 1) * (H - kernel[1] + 1) * (W - kernel[2] + 1) * C * kernel[0] * kernel[1] * kernel[2]
            ),
        ),
    ],
)
def depthwise_flops(definition):
    """what a depthwise convolution costs"""
    return [definition(5, 6, 7, 11, (3, 1, 5)), definition(4, 9, 8, 3, (1, 3, 3))]


@exercise(
    reference=lambda convolutions, kernel: 1 + convolutions * (kernel - 1),
    mistakes=[
        (
            "Windows overlap: each further convolution adds kernel - 1 frames, not kernel.",
            lambda convolutions, kernel: convolutions * kernel,
        ),
        (
            "Windows overlap, so that the reach grows by a sum and not by a product.",
            lambda convolutions, kernel: kernel**convolutions,
        ),
        ("The frame itself is missing.", lambda convolutions, kernel: convolutions * (kernel - 1)),
        (
            "That is right for a kernel of 3 only; one of k reaches k // 2 frames to each side.",
            lambda convolutions, kernel: 1 + 2 * convolutions,
        ),
        (
            "Each further convolution adds kernel - 1 frames, not one.",
            lambda convolutions, kernel: kernel + convolutions - 1,
        ),
        (
            "Each further convolution reaches further on both sides: it adds kernel - 1 frames.",
            lambda convolutions, kernel: kernel + (convolutions - 1) * (kernel // 2),
        ),
        (
            "A kernel of k frames reaches k // 2 frames to each side, not k / 2: its middle is the frame itself.",
            lambda convolutions, kernel: 1 + convolutions * kernel,
        ),
        (
            "A kernel of k frames reaches k // 2 frames to each side, not k.",
            lambda convolutions, kernel: 1 + 2 * convolutions * kernel,
        ),
        (
            "The clip is long enough: do not cut the number off at its 8 frames.",
            lambda convolutions, kernel: min(8, 1 + convolutions * (kernel - 1)),
        ),
        (
            "That is the reach to one side; the other side counts as well.",
            lambda convolutions, kernel: 1 + convolutions * (kernel // 2),
        ),
        (
            "That is one convolution; `convolutions` of them stand on each other.",
            lambda convolutions, kernel: kernel,
        ),
        (
            "You counted one convolution too many: the first one already reaches `kernel` frames.",
            lambda convolutions, kernel: kernel + convolutions * (kernel - 1),
        ),
    ],
)
def frames_seen(definition):
    """how far the frames reach"""
    return [definition(2, 3), definition(5, 7), definition(1, 5), definition(24, 3)]
