"""Checks of lab 6: the four methods side by side, and your own clip."""

import math

import torch
import torch.nn.functional as F

from colab.check import MistakeError, exercise, progress, solution  # noqa: F401  for the notebook


def right_direction(predictions, labels, mirror):
    right, turned = predictions == labels, predictions == mirror[labels]
    return right.sum() / (right | turned).sum()


@exercise(
    reference=right_direction,
    mistakes=[
        (
            "You divided by all clips; count only those whose predicted class is the true one or its mirror.",
            lambda predictions, labels, mirror: (predictions == labels).float().mean(),
        ),
        (
            "That is the share of clips with the right pair; among those, count the right direction.",
            lambda predictions, labels, mirror: (
                ((predictions == labels) | (predictions == mirror[labels])).float().mean()
            ),
        ),
        (
            "That is the share of the wrong direction; one minus it is asked for.",
            lambda predictions, labels, mirror: 1 - right_direction(predictions, labels, mirror),
        ),
        (
            "You divided the right clips by the clips with the mirror class; divide by the two together.",
            lambda predictions, labels, mirror: (predictions == labels).sum() / (predictions == mirror[labels]).sum(),
        ),
        (
            "You divided by all clips but those of the mirror class; divide by those of the true class or its mirror.",
            lambda predictions, labels, mirror: (predictions == labels).sum() / (predictions != mirror[labels]).sum(),
        ),
        (
            "You divided the clips of the mirror class by all errors; the right clips among both classes are asked for.",
            lambda predictions, labels, mirror: (predictions == mirror[labels]).sum() / (predictions != labels).sum(),
        ),
        (
            "The mirror of class c is mirror[c]; that a pair has the numbers 2 k and 2 k + 1 is not said.",
            lambda predictions, labels, mirror: (predictions == labels).sum() / (predictions // 2 == labels // 2).sum(),
        ),
        (
            "The result is in percent; a share from 0 to 1 is asked for.",
            lambda predictions, labels, mirror: 100 * right_direction(predictions, labels, mirror),
        ),
        (
            "That is a number of clips; divide it by the clips whose pair is right.",
            lambda predictions, labels, mirror: (predictions == labels).sum(),
        ),
    ],
)
def direction(definition):
    """the right direction, if the pair is right"""
    results = []
    for _ in range(3):  # one set alone may give a wrong formula the right number
        labels = torch.randint(6, (101,))
        predictions = torch.where(torch.rand(101) < 0.4, labels, torch.randint(6, (101,)))
        results.append(definition(predictions, labels, torch.tensor([3, 5, 4, 0, 2, 1])))
    return results


def beaten(better, cheaper):
    """A definition of `unbeaten` that differs in how two methods are compared."""

    def wrong(accuracy, costs):
        accurate = better(accuracy[:, None], accuracy[None])  # (M, M): row i against column j
        cheap = cheaper(costs[:, None], costs[None])
        return ~(accurate & cheap).any(0)

    return wrong


def unbeaten(accuracy, costs):
    no_worse = (accuracy[:, None] >= accuracy) & (costs[:, None] <= costs).all(-1)  # i is no worse than j
    better = (accuracy[:, None] > accuracy) | (costs[:, None] < costs).any(-1)  # i is better in something
    return ~(no_worse & better).any(0)


def ties_beat(accuracy, costs):
    no_worse = (accuracy[:, None] >= accuracy) & (costs[:, None] <= costs).all(-1)
    return ~(no_worse & ~torch.eye(len(accuracy), dtype=torch.bool)).any(0)


@exercise(
    reference=unbeaten,
    mistakes=[
        (
            "You let a method beat itself: it must also be strictly better in at least one thing.",
            beaten(torch.ge, lambda a, b: (a <= b).all(-1)),
        ),
        (
            "You ask for strictly better in everything; equal in some things and better in one beats as well.",
            beaten(torch.gt, lambda a, b: (a < b).all(-1)),
        ),
        (
            "You ask for strictly higher accuracy; with equal accuracy, lower costs beat as well.",
            beaten(torch.gt, lambda a, b: (a <= b).all(-1)),
        ),
        (
            "You let a method win that is cheaper in one of the costs; it must be no dearer in all of them.",
            beaten(torch.ge, lambda a, b: (a < b).any(-1)),
        ),
        (
            "You compare the sum of the costs; they have different units, so compare each with its own.",
            lambda accuracy, costs: unbeaten(accuracy, costs.sum(-1, keepdim=True)),
        ),
        (
            "You took high costs for good ones: a method wins by costs that are lower.",
            lambda accuracy, costs: unbeaten(accuracy, -costs),
        ),
        (
            "You let one of two equal methods beat the other; it must also be strictly better in at least one thing.",
            ties_beat,
        ),
        (
            "You ask for a lower cost in any case; with equal costs, higher accuracy beats as well.",
            beaten(torch.ge, lambda a, b: (a <= b).all(-1) & (a < b).any(-1)),
        ),
        (
            "You ask for strictly better in everything; equal in some things and better in one beats as well.",
            beaten(torch.ge, lambda a, b: (a < b).all(-1)),
        ),
        (
            "You compare the costs alone; who beats must have at least the same accuracy, too.",
            lambda accuracy, costs: unbeaten(0 * accuracy, costs),
        ),
        (
            "You marked the methods that beat nobody; mark those that nobody beats.",
            lambda accuracy, costs: unbeaten(-accuracy, -costs),
        ),
        (
            "You marked the best in a single thing; a method between them may be unbeaten too.",
            lambda accuracy, costs: (accuracy == accuracy.max()) | (costs == costs.min(0).values).any(-1),
        ),
        ("You marked the beaten methods; mark the others.", lambda accuracy, costs: ~unbeaten(accuracy, costs)),
        (
            "You marked only the most accurate method; a cheaper one with less accuracy may be unbeaten too.",
            lambda accuracy, costs: accuracy == accuracy.max(),
        ),
    ],
)
def front(definition):
    """which methods no other one beats"""
    # Beaten are the fourth to the sixth and the last. The third is beaten too by whoever adds the costs, in any units.
    accuracy = torch.tensor([91.0, 92.0, 60.0, 91.0, 88.0, 55.0, 95.0, 95.0, 90.0])
    costs = torch.tensor([[1, 8], [8, 1], [5, 5], [1, 9], [1, 8.5], [6, 7], [9, 9], [9, 9], [1, 8]])

    def marks(accuracy, costs):
        found = torch.as_tensor(definition(accuracy, costs))
        if found.dtype != torch.bool:
            raise MistakeError(
                "One True or False per method is asked for; you return the numbers of methods, or 0 and 1."
            )
        return found

    sets = [(accuracy, costs * (1 + 10 * torch.rand(2)))]
    sets += [(torch.randint(60, 65, (7,)).float(), torch.randint(1, 5, (7, 3)).float()) for _ in range(6)]
    return [marks(*some) for some in sets]


def names_of_clip(images, texts, scale):
    clip = F.normalize(F.normalize(images, dim=-1).mean(0), dim=-1)
    return (scale * F.normalize(texts, dim=-1) @ clip).softmax(-1)


@exercise(
    reference=names_of_clip,
    mistakes=[
        (
            "You left the frames' vectors as long as they are; give each length 1 before the mean.",
            lambda images, texts, scale: (
                scale * F.normalize(texts, dim=-1) @ F.normalize(images.mean(0), dim=-1)
            ).softmax(-1),
        ),
        (
            "F.normalize ran along dim=0, over the frames; a frame's vector is a row: dim=-1.",
            lambda images, texts, scale: names_of_clip(F.normalize(images, dim=0).mean(0)[None], texts, scale),
        ),
        (
            "The texts' vectors still have their own lengths; a cosine needs length 1.",
            lambda images, texts, scale: (
                scale * texts @ F.normalize(F.normalize(images, dim=-1).mean(0), dim=-1)
            ).softmax(-1),
        ),
        (
            "Nothing has length 1 here; these are products, not cosines.",
            lambda images, texts, scale: (scale * texts @ images.mean(0)).softmax(-1),
        ),
        (
            "The mean of the frames' vectors is shorter than 1; give it length 1 again.",
            lambda images, texts, scale: (
                scale * F.normalize(texts, dim=-1) @ F.normalize(images, dim=-1).mean(0)
            ).softmax(-1),
        ),
        (
            "`scale` stands inside of the softmax, where it multiplies the cosines.",
            lambda images, texts, scale: scale * names_of_clip(images, texts, 1.0),
        ),
        (
            "Multiply the cosines with `scale`; you divided by it.",
            lambda images, texts, scale: names_of_clip(images, texts, 1 / scale),
        ),
        (
            "`scale` is the factor itself; you took its exponential.",
            lambda images, texts, scale: names_of_clip(images, texts, math.exp(scale)),
        ),
        (
            "The softmax runs over the texts, and there is one vector for the clip; yours runs over the frames.",
            lambda images, texts, scale: (
                (scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T).softmax(0).mean(0)
            ),
        ),
        (
            "Only the first frame is used; take the mean of all.",
            lambda images, texts, scale: names_of_clip(images[:1], texts, scale),
        ),
        (
            "F.normalize ran along dim=0 of the texts; a text's vector is a row: dim=-1.",
            lambda images, texts, scale: (
                scale * F.normalize(texts, dim=0) @ F.normalize(F.normalize(images, dim=-1).mean(0), dim=-1)
            ).softmax(-1),
        ),
        (
            "These are logarithms of probabilities: softmax, not log_softmax.",
            lambda images, texts, scale: names_of_clip(images, texts, scale).log(),
        ),
        (
            "`scale` is missing: cosines lie between -1 and 1, and their softmax is nearly uniform.",
            lambda images, texts, scale: names_of_clip(images, texts, 1.0),
        ),
        (
            "These are cosines times `scale`; the softmax over the texts is missing.",
            lambda images, texts, scale: (
                scale * F.normalize(texts, dim=-1) @ F.normalize(F.normalize(images, dim=-1).mean(0), dim=-1)
            ),
        ),
        (
            "These are the probabilities of each frame; one vector for the clip is asked for.",
            lambda images, texts, scale: (scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T).softmax(
                -1
            ),
        ),
        (
            "You took the mean of the frames' probabilities; take the mean of their vectors first.",
            lambda images, texts, scale: (
                (scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T).softmax(-1).mean(0)
            ),
        ),
    ],
)
def zero_shot(definition):
    """the words that fit a clip, untrained"""
    long, longer = torch.arange(1, 6)[:, None] / 4, torch.arange(2, 9)[:, None] / 8  # vectors of all lengths
    return [definition(torch.randn(5, 8) * long, torch.randn(7, 8) * longer, 2.5) for _ in range(3)]


def with_mirrors(videos, labels):
    return torch.cat([videos, videos.flip(1)]), torch.cat([2 * labels, 2 * labels + 1])


def flipped(dimension):
    return lambda videos, labels: (
        torch.cat([videos, videos.flip(dimension)]),
        torch.cat([2 * labels, 2 * labels + 1]),
    )


@exercise(
    reference=with_mirrors,
    mistakes=[
        ("You mirrored the picture from left to right; the time, dimension 1, must run backwards.", flipped(-1)),
        ("You turned the picture upside down; the time, dimension 1, must run backwards.", flipped(-2)),
        ("You reversed the order of the clips; inside of each clip, dimension 1, time must run backwards.", flipped(0)),
        ("You reversed the colours; the time, dimension 1, must run backwards.", flipped(2)),
        ("The copies are not reversed: videos.flip(1).", lambda v, y: (torch.cat([v, v]), with_mirrors(v, y)[1])),
        (
            "The reversed copies have the labels of the clips as filmed; they are classes of their own, 2 k + 1.",
            lambda v, y: (with_mirrors(v, y)[0], torch.cat([2 * y, 2 * y])),
        ),
        (
            "The labels are k for clips and k + 1 for copies, so that a copy shares the next gesture's label.",
            lambda v, y: (with_mirrors(v, y)[0], torch.cat([y, y + 1])),
        ),
        (
            "The labels are exchanged: clips as filmed have 2 k, reversed copies 2 k + 1.",
            lambda v, y: (with_mirrors(v, y)[0], torch.cat([2 * y + 1, 2 * y])),
        ),
        (
            "You numbered the copies after all gestures, k + C; gesture k and its mirror are 2 k and 2 k + 1.",
            lambda v, y: (with_mirrors(v, y)[0], torch.cat([y, y + 1 + y.max()])),
        ),
        (
            "Clips and copies take turns; all clips as filmed come first, then their copies.",
            lambda v, y: tuple(torch.stack(list(some.chunk(2)), 1).flatten(0, 1) for some in with_mirrors(v, y)),
        ),
        (
            "Both halves are reversed; the clips as filmed come first.",
            lambda v, y: (torch.cat([v.flip(1)] * 2), with_mirrors(v, y)[1]),
        ),
        (
            "The reversed copies come first; the clips as filmed should.",
            lambda v, y: (torch.cat([v.flip(1), v]), torch.cat([2 * y + 1, 2 * y])),
        ),
        (
            "The videos are exchanged: their labels say that the clips as filmed come first.",
            lambda v, y: (torch.cat([v.flip(1), v]), with_mirrors(v, y)[1]),
        ),
        (
            "The labels take turns (2 k, 2 k + 1, ...), the videos do not: first all clips as filmed, then all copies.",
            lambda v, y: (with_mirrors(v, y)[0], torch.stack([2 * y, 2 * y + 1], 1).flatten()),
        ),
        (
            "Both copies have the label k; as filmed it is 2 k, reversed 2 k + 1.",
            lambda v, y: (with_mirrors(v, y)[0], torch.cat([y, y])),
        ),
        (
            "Only the copies have new labels; a clip as filmed has 2 k, not k.",
            lambda v, y: (with_mirrors(v, y)[0], torch.cat([y, 2 * y + 1])),
        ),
        (
            "The labels say only whether a clip is reversed; the gesture counts as well: 2 k and 2 k + 1.",
            lambda v, y: (with_mirrors(v, y)[0], torch.cat([0 * y, 0 * y + 1])),
        ),
        (
            "You joined along time, dimension 1; the copies are more clips, dimension 0.",
            lambda v, y: (torch.cat([v, v.flip(1)], 1), with_mirrors(v, y)[1]),
        ),
        ("The videos come first, then the labels.", lambda v, y: with_mirrors(v, y)[::-1]),
        ("The clips as filmed are missing; return both.", lambda v, y: (v.flip(1), 2 * y + 1)),
    ],
)
def mirrors(definition):
    """gestures, and the same backwards"""
    result = definition(torch.randn(4, 3, 2, 5, 6), torch.tensor([0, 2, 1, 2]))
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise MistakeError("Return two things: the videos and their labels.")
    return list(result)
