"""Checks of lab 5: Side4Video."""

import torch
import torch.nn.functional as F

from colab.check import MistakeError, exercise, progress, solution  # noqa: F401  for the notebook


def interval_or_top(layers, side_layers, fusion):
    step = layers // side_layers
    return list(range(step - 1, layers, step) if fusion == "interval" else range(layers - side_layers, layers))


def changed_blocks(interval=interval_or_top, top=interval_or_top):
    """interval_or_top with another rule for one of the two"""
    return lambda layers, side_layers, fusion: (interval if fusion == "interval" else top)(layers, side_layers, fusion)


@exercise(
    reference=interval_or_top,
    mistakes=[
        (
            "For interval, each step ends with the block that is read; you read the first block of each step.",
            changed_blocks(interval=lambda n, k, _: list(range(0, n, n // k))),
        ),
        (
            "You read the first block of each step, whatever `fusion` is: interval reads the last one, top the last blocks.",
            lambda n, k, _: list(range(0, n, n // k)),
        ),
        ("Blocks are numbered from 0 here; you numbered them from 1.", lambda *a: [i + 1 for i in interval_or_top(*a)]),
        (
            "For interval, blocks are numbered from 0 as well: the last one is number layers - 1.",
            changed_blocks(interval=lambda n, k, _: list(range(n // k, n + 1, n // k))),
        ),
        (
            "For interval, you read the middle of each step; the last block of it is read.",
            changed_blocks(interval=lambda n, k, _: [i + (n // k) // 2 for i in range(0, n, n // k)]),
        ),
        (
            "For interval, you spread the blocks from the first to the last; steps are equal, and each ends with its block.",
            changed_blocks(interval=lambda n, k, _: torch.linspace(0, n - 1, k).long().tolist()),
        ),
        (
            "For top, your blocks are one too high: the last one is number layers - 1.",
            changed_blocks(top=lambda n, k, _: list(range(n - k + 1, n + 1))),
        ),
        ("The numbers should rise; you begin with the last block.", lambda *a: interval_or_top(*a)[::-1]),
        (
            "For top, the last `side_layers` blocks are read; you took the first ones.",
            changed_blocks(top=lambda n, k, _: list(range(k))),
        ),
        (
            "For top, your blocks are one too low: the last one is number layers - 1.",
            changed_blocks(top=lambda n, k, _: list(range(n - k - 1, n - 1))),
        ),
        (
            "interval and top are exchanged.",
            lambda n, k, fusion: interval_or_top(n, k, "top" if fusion == "interval" else "interval"),
        ),
        ("You return the interval for both: look at `fusion`.", lambda n, k, _: interval_or_top(n, k, "interval")),
        ("You return the top for both: look at `fusion`.", lambda n, k, _: interval_or_top(n, k, "top")),
    ],
)
def layers_read(definition):
    """which blocks of the ViT are read"""
    asked = [(12, 4, "interval"), (12, 4, "top"), (30, 5, "interval"), (30, 5, "top"), (7, 7, "interval")]
    answers = [definition(*question) for question in asked]
    if any(answer is None for answer in answers):
        raise MistakeError("It returns None: is the `return` missing?")
    if any(not hasattr(answer, "__iter__") for answer in answers):
        raise MistakeError("Return a list of block numbers.")
    answers = [[int(i) for i in answer] for answer in answers]
    for (layers, side_layers, fusion), answer in zip(asked, answers):
        if len(answer) != side_layers:
            question = f"layers_read({layers}, {side_layers}, {fusion!r})"
            step = f": a step is layers // side_layers = {layers // side_layers} blocks long"
            step = step if answer == list(range(layers))[side_layers - 1 :: side_layers] else ""
            raise MistakeError(f"{question} gives {len(answer)} blocks; it should give {side_layers}{step}.")
    return [torch.tensor(answer) for answer in answers]


def shifted(cls, first=1, second=-1, outside="zeros", part=lambda d: d // 2):
    """Channels up to `part` from frame t + first, the rest from frame t + second"""
    T, d = cls.shape[1], cls.shape[-1]
    out = []
    for dt, channels in ((first, slice(0, part(d))), (second, slice(part(d), d))):
        t = torch.arange(T) + dt
        inside = ((t >= 0) & (t < T))[:, None, None]
        t = t % T if outside == "circle" else t.clamp(0, T - 1)
        x = cls[:, t][..., channels]
        if outside == "own":
            x = torch.where(inside, x, cls[..., channels])
        out.append(x * inside if outside == "zeros" else x)
    return torch.cat(out, dim=-1)


def half_of(cls, half):
    """`shifted` with zeros in the other half of the channels"""
    channels = torch.arange(cls.shape[-1]) >= cls.shape[-1] // 2
    return shifted(cls) * (channels == bool(half))


def interleaved(cls):
    out = shifted(cls).clone()
    out[..., 0::2], out[..., 1::2] = (shifted(cls, dt, dt)[..., i::2] for i, dt in ((0, 1), (1, -1)))
    return out


@exercise(
    reference=shifted,
    mistakes=[
        (
            "The two halves are exchanged: the first half of the channels comes from frame t + 1.",
            lambda cls: shifted(cls, -1, 1),
        ),
        (
            "The clip is not a circle: outside of it stand zeros, but you took frames from its other end (roll).",
            lambda cls: shifted(cls, outside="circle"),
        ),
        ("Outside of the clip stand zeros, not copies of the first and the last frame.", lambda cls: shifted(cls, outside="nearest")),
        ("All channels come from frame t + 1; the second half should come from frame t - 1.", lambda cls: shifted(cls, 1, 1)),
        ("All channels come from frame t - 1; the first half should come from frame t + 1.", lambda cls: shifted(cls, -1, -1)),
        ("The second half stayed in its frame; it should come from frame t - 1.", lambda cls: shifted(cls, 1, 0)),
        ("The first half stayed in its frame; it should come from frame t + 1.", lambda cls: shifted(cls, 0, -1)),
        ("A half is d / 2 channels side by side, not every second channel.", interleaved),
        ("Nothing moved.", lambda cls: cls),
        ("The second half is zero; it should come from frame t - 1.", lambda cls: half_of(cls, 0)),
        ("The first half is zero; it should come from frame t + 1.", lambda cls: half_of(cls, 1)),
        ("You moved by two frames; it is one.", lambda cls: shifted(cls, 2, -2)),
        ("The input is added; the shifted [CLS] takes its place.", lambda cls: cls + shifted(cls)),
        (
            "You added the two frames; one half of the channels comes from each.",
            lambda cls: shifted(cls, 1, 1) + shifted(cls, -1, -1),
        ),
        (
            "The halves changed places: channels of the second half stand first. Channels stay where they are.",
            lambda cls: shifted(cls.roll(cls.shape[-1] // 2, -1), -1, 1),
        ),
        (
            "Before the first frame stand zeros, but cls[:, t - 1] at t = 0 is cls[:, -1], the last frame.",
            lambda cls: torch.cat([half_of(cls, 0).chunk(2, -1)[0], cls.roll(1, 1).chunk(2, -1)[1]], dim=-1),
        ),
        (
            "You moved clips; frames are dimension 1.",
            lambda cls: shifted(cls.transpose(0, 1)).transpose(0, 1),
        ),
    ],
)  # fmt: skip
def cls_shift(definition):
    """[CLS] from the next and the last frame"""
    cls = torch.randn(3, 5, 1, 8)
    before = cls.clone()
    result = definition(cls)
    if not torch.equal(cls, before):
        raise MistakeError("You write into the tensor that you read: later frames get what is already moved.")
    return result


def map_of_a_class(s, weight, bias, c, h):
    return (s @ weight[c] + bias[c]).unflatten(-1, (h, -1))


@exercise(
    reference=map_of_a_class,
    mistakes=[
        ("The bias is missing: the mean of the map is the logit less bias[c].", lambda s, W, b, c, h: map_of_a_class(s, W, 0 * b, c, h)),
        (
            "Add the whole bias at each place; you divided it by the number of frames.",
            lambda s, W, b, c, h: map_of_a_class(s, W, b / s.shape[1], c, h),
        ),
        (
            "Add the whole bias at each place; you divided it by the number of patches.",
            lambda s, W, b, c, h: map_of_a_class(s, W, b / s.shape[2], c, h),
        ),
        (
            "w_c . s is a sum over the channels; you took their mean.",
            lambda s, W, b, c, h: map_of_a_class(s, W / s.shape[-1], b, c, h),
        ),
        (
            "That is a softmax over the patches; the numbers themselves are asked for.",
            lambda s, W, b, c, h: (s @ W[c] + b[c]).softmax(-1).unflatten(-1, (h, -1)),
        ),
        (
            "Those are absolute values: then the mean is no longer the logit.",
            lambda s, W, b, c, h: map_of_a_class(s, W, b, c, h).abs(),
        ),
        (
            "h is the number of rows: a map has h rows and N / h columns, yours the other way round.",
            lambda s, W, b, c, h: (s @ W[c] + b[c]).unflatten(-1, (-1, h)),
        ),
        (
            "Add the whole bias at each place: in the mean over T N places it counts once.",
            lambda s, W, b, c, h: map_of_a_class(s, W, b / (s.shape[1] * s.shape[2]), c, h),
        ),
        (
            "You divided by the number of places: the mean, not the sum, of the map should be the logit.",
            lambda s, W, b, c, h: map_of_a_class(s, W, b, c, h) / (s.shape[1] * s.shape[2]),
        ),
        (
            "Only positive values are left: then the mean is no longer the logit.",
            lambda s, W, b, c, h: map_of_a_class(s, W, b, c, h).relu(),
        ),
        (
            "That is a softmax over classes; the logit comes before it.",
            lambda s, W, b, c, h: F.linear(s, W, b).softmax(-1)[..., c].unflatten(-1, (h, -1)),
        ),
        (
            "Patches stand row by row: you laid them out column by column.",
            lambda s, W, b, c, h: map_of_a_class(s, W, b, c, s.shape[2] // h).transpose(-1, -2),
        ),
        (
            "You have the map of every class; take that of class c.",
            lambda s, W, b, c, h: F.linear(s, W, b).unflatten(2, (h, -1)),
        ),
        ("The shape should be (B, T, h, w): the patches are still one list.", lambda s, W, b, c, h: s @ W[c] + b[c]),
    ],
)  # fmt: skip
def class_map(definition):
    """the map whose mean is the logit"""
    return definition(torch.randn(2, 3, 20, 7), torch.randn(6, 7), torch.randn(6), 4, 5)


def on_a_line(width, known):
    (d1, m1), (d2, m2) = known.items()
    return m1 + (width - d1) * (m2 - m1) / (d2 - d1)


@exercise(
    reference=on_a_line,
    mistakes=[
        (
            "That is in proportion to the width. Something is kept at any width, too: use both points.",
            lambda width, known: next(iter(known.values())) * width / next(iter(known)),
        ),
        (
            "That is in proportion to the width. Something is kept at any width, too: use both points.",
            lambda width, known: [*known.values()][1] * width / [*known][1],
        ),
        (
            "That is in proportion to the width. Something is kept at any width, too: use both points.",
            lambda width, known: width * sum(known.values()) / sum(known),
        ),
        (
            "That is in proportion to the width. Something is kept at any width, too: use both points.",
            lambda width, known: width * sum(mib / d for d, mib in known.items()) / 2,
        ),
        (
            "The slope is multiplied with the distance to the known width, width - d1, not with the width.",
            lambda width, known: next(iter(known.values())) + on_a_line(width, known) - on_a_line(0, known),
        ),
        (
            "The line begins at one of the two points: you took the MiB of one and the width of the other.",
            lambda width, known: on_a_line(width, known) + [*known.values()][1] - next(iter(known.values())),
        ),
        (
            "That is what the nearest known width keeps.",
            lambda width, known: known[min(known, key=lambda d: abs(d - width))],
        ),
        (
            "The slope is right; what is kept at any width is missing.",
            lambda width, known: on_a_line(width, known) - on_a_line(0, known),
        ),
        (
            "That is in proportion to the square of the width: activations have one width, only weights have two.",
            lambda width, known: [*known.values()][1] * (width / [*known][1]) ** 2,
        ),
        ("That is what is kept at width 0.", lambda width, known: on_a_line(0, known)),
        ("That is the slope, in MiB per channel.", lambda width, known: on_a_line(1, known) - on_a_line(0, known)),
        ("You went the wrong way along the line: a wider network keeps more.", lambda width, known: 2 * next(iter(known.values())) - on_a_line(width, known)),
    ],
)  # fmt: skip
def predict_mib(definition):
    """what a side network of another width keeps"""
    try:
        return [definition(64, {192: 171.0, 320: 265.0}), definition(512, {100: 90.0, 130: 105.5})]
    except KeyError as error:
        raise MistakeError(f"`known` does not always have the width {error}: it may hold any two.") from error
