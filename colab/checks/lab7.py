"""Checks of lab 7: text-video retrieval."""

import re

import torch
import torch.nn.functional as F

from colab.check import MistakeError, exercise, progress, same, solution  # noqa: F401  for the notebook

MAX = "max along a dimension gives two things, the values and their places: take amax, or max(...).values."


def two_maxima(cosine, mask, w, u, padded=0.0, weights="masked", parts=(0.5, 0.5), over=torch.amax, frames="softmax"):
    """padded: the similarity of a padded token, None for its cosine. over: what takes the place of the maximum."""
    c = cosine if padded is None else torch.where(mask[:, None], cosine, torch.full_like(cosine, padded))
    if weights == "masked":
        w = w.masked_fill(~mask, -torch.inf).softmax(0)
    elif weights == "after":
        w = w.softmax(0) * mask
    elif weights == "zero":
        w = (w * mask).softmax(0)
    elif weights == "all":
        w = w.softmax(0)
    elif weights == "mean":
        w = mask / mask.sum()
    u = u.softmax(0) if frames == "softmax" else torch.full_like(u, 1 / len(u)) if frames == "mean" else u
    first = torch.where(w > 0, w * over(c, 1), 0) if weights == "masked" else w * over(c, 1)
    return parts[0] * first.sum() + parts[1] * (u * over(c, 0)).sum()


def valid_only(cosine, mask, w, u):
    return two_maxima(cosine[mask], mask[mask], w[mask], u)


def misfit(definition):
    """What is wrong with a definition whose sizes do not fit, found where L = T -> a sentence, or None"""
    cosine, mask, w, u = 2 * torch.rand(6, 6) - 1, torch.arange(6) < 4, torch.randn(6), torch.randn(6)
    given = definition(cosine.clone(), mask.clone(), w.clone(), u.clone())
    w, u = w.masked_fill(~mask, -torch.inf).softmax(0), u.softmax(0)
    for across in (False, True):
        for swapped in (False, True):
            c = cosine * (mask if across else mask[:, None])
            wrong = 0.5 * ((w * c.amax(0 if swapped else 1)).sum() + (u * c.amax(1 if swapped else 0)).sum())
            if torch.is_tensor(given) and same([given], [wrong]):
                if across:
                    return (
                        "The mask is one of tokens, the rows of cosine: mask[:, None] has the shape (L, 1), which fits."
                    )
                return "w belongs to the tokens: the maximum over frames, dimension 1 of c. u belongs to the frames: dimension 0."


@exercise(
    reference=two_maxima,
    mistakes=[
        (
            "A padded token has the similarity 0, not -inf: a frame whose cosines are all negative gets the maximum 0. You left the padded tokens out.",
            valid_only,
        ),
        (
            "Padded tokens take part in the maximum of a frame: set their similarity to 0.",
            lambda *a: two_maxima(*a, padded=None),
        ),
        (
            "Padded tokens took part in the softmax of w: the weights of the others do not add up to 1. Put -inf there before the softmax.",
            lambda *a: two_maxima(*a, weights="all"),
        ),
        (
            "Padded tokens took part in the softmax of w: the weights of the others do not add up to 1. Put -inf there before the softmax.",
            lambda *a: two_maxima(*a, weights="after"),
        ),
        (
            "A 0 that goes into a softmax comes out as a weight, for exp(0) = 1: use -inf there.",
            lambda *a: two_maxima(*a, weights="zero"),
        ),
        (
            "Neither w nor the cosines know the mask: padded tokens take part in everything.",
            lambda *a: two_maxima(*a, padded=None, weights="all"),
        ),
        *(
            (
                "Padded tokens take part twice: set their similarity to 0 before the maximum, and put -inf into the softmax of w.",
                lambda *a, weights=weights: two_maxima(*a, padded=None, weights=weights),
            )
            for weights in ("after", "zero")
        ),
        (
            "You set the similarity of the caption's own tokens to 0: the mask is True up to [end].",
            lambda cosine, mask, w, u: two_maxima(cosine.masked_fill(mask[:, None], 0), mask, w, u, padded=None),
        ),
        ("The factor 1/2 is missing.", lambda *a: two_maxima(*a, parts=(1, 1))),
        ("Only the half of the tokens is there; the half of the frames is missing.", lambda *a: two_maxima(*a, parts=(0.5, 0))),
        ("Only the half of the tokens is there; the half of the frames is missing.", lambda *a: two_maxima(*a, parts=(1, 0))),
        ("Only the half of the frames is there; the half of the tokens is missing.", lambda *a: two_maxima(*a, parts=(0, 0.5))),
        ("Only the half of the frames is there; the half of the tokens is missing.", lambda *a: two_maxima(*a, parts=(0, 1))),
        ("You took means over tokens and frames; the weights add up to 1 already, therefore take sums.", lambda cosine, mask, w, u: 0.5 * (two_maxima(cosine, mask, w, u, parts=(1, 0)) / len(w) + two_maxima(cosine, mask, w, u, parts=(0, 1)) / len(u))),
        ("There is no maximum: each token looks for its *best* frame, each frame for its best token.", lambda cosine, mask, w, u: w.masked_fill(~mask, -torch.inf).softmax(0) @ (cosine * mask[:, None]) @ u.softmax(0)),
        ("You took means where maxima are wanted.", lambda *a: two_maxima(*a, over=torch.mean)),
        ("The weights need a softmax: w and u are what goes into it.", lambda *a: two_maxima(*a, weights="raw", frames="raw")),
        ("The frame weights u need a softmax.", lambda *a: two_maxima(*a, frames="raw")),
        ("The token weights w need a softmax.", lambda *a: two_maxima(*a, weights="raw")),
        ("You gave all frames the same weight: use u.", lambda *a: two_maxima(*a, frames="mean")),
        ("You gave all tokens the same weight: use w.", lambda *a: two_maxima(*a, weights="mean")),
        ("You gave all tokens and all frames the same weight: use w and u.", lambda *a: two_maxima(*a, weights="mean", frames="mean")),
    ],
)  # fmt: skip
def match(definition):
    """the two weighted maxima"""
    results = []
    for valid in (4, 7, 5):
        cosine = 2 * torch.rand(7, 5) - 1
        cosine[:, 2] = cosine[:, 2].abs()
        cosine[:valid, 2] *= -1  # a frame that no token of the caption fits
        mask = torch.arange(7) < valid
        try:
            result = definition(cosine.clone(), mask.clone(), torch.randn(7), torch.randn(5))
        except RuntimeError as error:
            if not isinstance(error, NotImplementedError) and (sentence := misfit(definition)):
                raise MistakeError(sentence) from error
            raise
        except TypeError as error:
            if "return_types" in str(error) or "converted to an index" in str(error):
                raise MistakeError(MAX) from error
            raise
        if torch.is_tensor(result) and result.isnan().any():
            if mask.all():  # no token is padded, and all have -inf
                raise MistakeError(
                    "The caption's own tokens got -inf: the mask is True up to [end], ~mask is the padding."
                )
            raise MistakeError("It gives nan: 0 times -inf. A padded token has the similarity 0, and the weight 0.")
        results.append(result)
    return results


def ranks_of(similarity):
    own = similarity.diag()[:, None]
    return 1 + (similarity > own).sum(1)


def within(ranks, K):
    return 100 * (ranks <= K).double().mean()


@exercise(
    reference=lambda similarity, K: within(ranks_of(similarity), K),
    mistakes=[
        ("That is video-to-text: each caption, a row, asks among all videos.", lambda s, K: within(ranks_of(s.T), K)),
        ("That is a share of 1, not percent.", lambda s, K: within(ranks_of(s), K) / 100),
        ("That is a number of captions, not percent.", lambda s, K: within(ranks_of(s), K) * len(s) / 100),
        ("Ranks start at 1: you have room for one place too many.", lambda s, K: within(ranks_of(s), K + 1)),
        ("Rank K still counts: you have one place too few.", lambda s, K: within(ranks_of(s), K - 1)),
        ("A large similarity is a good one: you sorted upwards.", lambda s, K: within(ranks_of(-s), K)),
        (
            "argsort gives the clip at each place, and not the place of each clip: count the similarities that are greater.",
            lambda s, K: within(s.argsort(1, descending=True).diag() + 1, K),
        ),
        (
            "argsort gives the clip at each place, and not the place of each clip: count the similarities that are greater.",
            lambda s, K: within(s.argsort(1, descending=True).diag(), K),
        ),
        ("Each row has its own right score, therefore compare with diag()[:, None]; you compared each column with one.", lambda s, K: 100 * ((s > s.diag()).sum(1) < K).double().mean()),
        ("Ranks up to K count, not rank K alone.", lambda s, K: 100 * (ranks_of(s) == K).double().mean()),
        ("Each caption has one right clip: do not divide by K.", lambda s, K: within(ranks_of(s), K) / K),
        ("That is the share of captions whose video is *not* found.", lambda s, K: 100 - within(ranks_of(s), K)),
    ],
)  # fmt: skip
def recall_at(definition):
    """R@K of a matrix"""
    similarity = torch.randn(60, 60) + 1.5 * torch.eye(60)
    return [definition(similarity.clone(), K) for K in (1, 3, 7)]


EQUALLY = "The videos do not have equally many captions: `captions` says how many each has."


def best_of_each(similarity, captions, how=lambda rows: rows.amax(0)):
    return torch.stack([how(rows) for rows in similarity.split(captions)]).T


@exercise(
    reference=best_of_each,
    mistakes=[
        ("The table is transposed: a row belongs to the video that asks.", lambda s, c: best_of_each(s, c).T),
        ("You took the mean of the captions of a video; the best of them counts.", lambda s, c: best_of_each(s, c, lambda rows: rows.mean(0))),
        ("You took the first caption of a video; the best of them counts.", lambda s, c: best_of_each(s, c, lambda rows: rows[0])),
        ("You took the worst caption of a video; the best of them counts.", lambda s, c: best_of_each(s, c, lambda rows: rows.amin(0))),
        ("You took the maximum with 0, too: start from -inf, for a similarity may be negative.", lambda s, c: best_of_each(s, c).clamp(min=0)),
        ("That is the number of the best caption, argmax; its similarity is wanted.", lambda s, c: best_of_each(s, c, lambda rows: rows.argmax(0))),
        ("You added the captions of a video up; the best of them counts.", lambda s, c: best_of_each(s, c, lambda rows: rows.sum(0))),
        (EQUALLY, lambda s, c: best_of_each(s, c[0])),
        (EQUALLY, lambda s, c: best_of_each(s[: len(s) // len(c) * len(c)], len(s) // len(c))),
    ],
)  # fmt: skip
def best_caption(definition):
    """the best caption of each video"""
    try:
        return [definition(torch.randn(sum(counts), len(counts)), counts) for counts in ([3, 1, 2, 5], [2, 2, 1])]
    except TypeError as error:
        if "return_types" in str(error):
            raise MistakeError(MAX) from error
        raise
    except RuntimeError as error:
        if "equal size" in str(error):
            raise MistakeError(
                "The groups have different sizes: take the maximum over the captions, dimension 0, before the stack."
            ) from error
        if "invalid for input of size" in str(error):
            raise MistakeError(EQUALLY) from error
        raise


EXP = "`scale` is already the number to multiply with; you took exp of it."


def symmetric(similarity, scale, rows=0.5, columns=0.5, reduction="mean"):
    target = torch.arange(len(similarity))
    parts = [F.cross_entropy(scale * x, target, reduction=reduction) for x in (similarity, similarity.T)]
    return rows * parts[0] + columns * parts[1]


@exercise(
    reference=symmetric,
    mistakes=[
        ("Only the rows are there: each video must find its caption, too.", lambda s, k: symmetric(s, k, 1, 0)),
        ("Only the columns are there: each caption must find its video, too.", lambda s, k: symmetric(s, k, 0, 1)),
        ("Only half of the rows' loss is there; the columns are missing.", lambda s, k: symmetric(s, k, 0.5, 0)),
        ("Only half of the columns' loss is there; the rows are missing.", lambda s, k: symmetric(s, k, 0, 0.5)),
        ("That is the sum of the two losses; take half of it.", lambda s, k: symmetric(s, k, 1, 1)),
        ("`scale` is missing.", lambda s, k: symmetric(s, 1)),
        ("Multiply with `scale`; you divided by it.", lambda s, k: symmetric(s, 1 / k)),
        (EXP, lambda s, k: symmetric(s, torch.tensor(k).exp())),
        ("`scale` belongs into the softmax: multiply the similarities, not the loss.", lambda s, k: k * symmetric(s, 1)),
        ("cross_entropy takes the mean over the batch already: do not divide by B again.", lambda s, k: symmetric(s, k) / len(s)),
        ("The log is missing: the loss is -log of the probability of the right pair.", lambda s, k: -0.5 * ((k * s).softmax(1).diag().mean() + (k * s).softmax(0).diag().mean())),
        ("You added the losses of the batch up; take their mean.", lambda s, k: symmetric(s, k, reduction="sum")),
        (
            "That is the probability of the right pair; the loss is -log of it.",
            lambda s, k: 0.5 * ((k * s).softmax(1).diag().mean() + (k * s).softmax(0).diag().mean()),
        ),
        (
            "cross_entropy takes the softmax itself: give it scale * similarity, not probabilities.",
            lambda s, k: symmetric((k * s).softmax(1), 1, 0.5, 0) + symmetric((k * s).softmax(0), 1, 0, 0.5),
        ),
        ("The softmax is missing: take cross_entropy, or log_softmax before the diagonal.", lambda s, k: -k * s.diag().mean()),
        (
            "The right pair belongs to the sum below the fraction as well: you left it out there.",
            lambda s, k: 0.5 * sum(((k * x).masked_fill(torch.eye(len(s)) > 0, -torch.inf).logsumexp(1) - k * x.diag()).mean() for x in (s, s.T)),
        ),
        ("The sign is wrong: the loss is -log of a probability.", lambda s, k: -symmetric(s, k)),
        (
            "The target is the number of the row, 0 to B - 1: the diagonal. You always took the first column.",
            lambda s, k: 0.5 * sum(F.cross_entropy(k * x, torch.zeros(len(s), dtype=torch.long)) for x in (s, s.T)),
        ),
    ],
)  # fmt: skip
def symmetric_loss(definition):
    """the symmetric cross-entropy"""
    try:
        return [definition(torch.rand(B, B) + 0.3 * torch.eye(B), scale) for B, scale in ((5, 4.0), (7, 2.5))]
    except (AttributeError, TypeError) as error:
        if re.search(r"\bexp\b", str(error)):  # of a number, which is no tensor
            raise MistakeError(EXP) from error
        raise
    except RuntimeError as error:
        if "Long" in str(error) and "Float" in str(error):
            raise MistakeError("The targets are whole numbers, 0 to B - 1: torch.arange(B).") from error
        raise
