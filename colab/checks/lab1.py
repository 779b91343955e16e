"""Checks of lab 1: what a single frame cannot tell."""

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

import data
from colab.check import exercise, progress, solution  # noqa: F401  for the notebook

conv2d = F.conv2d


def edges(num_frames, T):
    return np.linspace(0, num_frames, T + 1)


def rounded_edges(num_frames, T, view=0, views=1):
    return np.arange(T) * (num_frames // T) + int((view + 0.5) / views * (num_frames // T))


@exercise(
    reference=data.segments,
    mistakes=[
        (
            "You took the first frame of each segment, not the frame at (view + 0.5) / views of it.",
            lambda n, T, view=0, views=1: edges(n, T)[:-1].astype(int),
        ),
        (
            "You spread the frames from the first to the last of the video; each belongs inside of its own segment.",
            lambda n, T, view=0, views=1: np.linspace(0, n - 1, T).astype(int),
        ),
        (
            "You took the middle of each segment for every view; the place depends on `view` and `views`.",
            lambda n, T, view=0, views=1: (edges(n, T)[:-1] + n / T / 2).astype(int),
        ),
        (
            "You took the place view / views of each segment, its edge for view 0; it is (view + 0.5) / views.",
            lambda n, T, view=0, views=1: (edges(n, T)[:-1] + view / views * n / T).astype(int),
        ),
        (
            "You rounded the length of a segment too early: the last frames of the video are never read.",
            rounded_edges,
        ),
        (
            "You rounded the length of a segment too early, and took the middle of each segment for every view.",
            lambda n, T, view=0, views=1: np.arange(T) * (n // T) + n // T // 2,
        ),
        (
            "You rounded to the nearest number; a frame's number is rounded down.",
            lambda n, T, view=0, views=1: np.rint(edges(n, T)[:-1] + (view + 0.5) / views * n / T),
        ),
        (
            "The numbers are right but not rounded: frame 2.5 does not exist.",
            lambda n, T, view=0, views=1: edges(n, T)[:-1] + (view + 0.5) / views * n / T,
        ),
    ],
)
def segments(definition):
    """which frames a view reads"""
    return [
        definition(17, 5),
        definition(60, 8),
        definition(101, 7, view=1, views=3),
        definition(16, 8, view=0, views=2),
    ]


def convolution(images, weight):
    return rearrange(conv2d(images, weight, stride=weight.shape[-1]), "b d h w -> b (h w) d")


def cut(pattern):
    def wrong(images, weight):
        P = weight.shape[-1]
        return rearrange(images, pattern, p=P, q=P) @ weight.flatten(1).T

    return wrong


@exercise(
    reference=convolution,
    mistakes=[
        (
            "The numbers in a patch stand in the order row, column, channel; the weight has channel, row, column.",
            cut("b c (h p) (w q) -> b (h w) (p q c)"),
        ),
        (
            "The patches come column by column; they must come row by row: (h w), not (w h).",
            cut("b c (h p) (w q) -> b (w h) (c p q)"),
        ),
        (
            "Row and column are exchanged inside of each patch: (c p q), where p counts rows, not (c q p).",
            cut("b c (h p) (w q) -> b (h w) (c q p)"),
        ),
        (
            "You took every (H / P)-th pixel together, not neighbours: write (h p), which has the pixel's place last.",
            cut("b c (p h) (q w) -> b (h w) (c p q)"),
        ),
        (
            "You only reshaped the images: that puts pixels of one channel and of whole rows together, not of a patch.",
            lambda images, weight: images.reshape(len(images), -1, weight[0].numel()) @ weight.flatten(1).T,
        ),
        (
            "The output is (B, D, N); tokens are rows: (B, N, D).",
            lambda images, weight: convolution(images, weight).transpose(1, 2),
        ),
    ],
)
def patch_tokens(definition):
    """tokens from pixels, without a convolution"""
    return definition(torch.randn(2, 3, 12, 20), torch.randn(8, 3, 4, 4))


@exercise(
    reference=lambda logits: logits.softmax(-1).mean(1),
    mistakes=[
        (
            "You took the mean of the logits, and the softmax afterwards; it is the mean of the probabilities.",
            lambda logits: logits.mean(1).softmax(-1),
        ),
        ("These are mean logits: the softmax is missing.", lambda logits: logits.mean(1)),
        ("These are the probabilities of each view; their mean is missing.", lambda logits: logits.softmax(-1)),
        (
            "The softmax runs over the views; it must run over the classes, which are the last dimension.",
            lambda logits: logits.softmax(1).mean(1),
        ),
        (
            "The softmax runs over the clips; it must run over the classes, which are the last dimension.",
            lambda logits: logits.softmax(0).mean(1),
        ),
        (
            "You took the mean over the clips, the first dimension; the views are the second.",
            lambda logits: logits.softmax(-1).mean(0),
        ),
        (
            "You added the probabilities of the views; their rows sum to V, and the mean is needed.",
            lambda logits: logits.softmax(-1).sum(1),
        ),
        (
            "You let the views vote; the mean of their probabilities is needed.",
            lambda logits: F.one_hot(logits.argmax(-1), logits.shape[-1]).double().mean(1),
        ),
    ],
)
def join_views(definition):
    """one prediction from several views"""
    return definition(4 * torch.randn(5, 3, 7))


def ceiling(labels, groups):
    best = [labels[groups == g].bincount().max() for g in groups.unique()]
    return sum(best) / len(labels)


def mean_of_groups(labels, groups):
    shares = [labels[groups == g].bincount().max() / (groups == g).sum() for g in groups.unique()]
    return sum(shares) / len(shares)


@exercise(
    reference=ceiling,
    mistakes=[
        (
            "That is the share of the groups. A group is worth as many clips as its most frequent label has.",
            lambda labels, groups: len(groups.unique()) / len(labels),
        ),
        (
            "You took the mean over groups; a large group holds more clips than a small one: count clips.",
            mean_of_groups,
        ),
        ("That is one half whatever the labels are; compute it from them.", lambda labels, groups: 0.5),
        (
            "That is one prediction for all clips; each group may have its own.",
            lambda labels, groups: labels.bincount().max() / len(labels),
        ),
        (
            "That is chance, one over the number of classes; a model may still use what the groups tell.",
            lambda labels, groups: 1 / len(labels.unique()),
        ),
        (
            "That is a number of clips; divide it by all clips.",
            lambda labels, groups: ceiling(labels, groups) * len(labels),
        ),
        (
            "The result is in percent; a share from 0 to 1 is asked for.",
            lambda labels, groups: 100 * ceiling(labels, groups),
        ),
    ],
)
def order_blind_ceiling(definition):
    """the best accuracy without the order of frames"""
    labels, groups = torch.randint(4, (58,)), torch.randint(13, (58,))  # 59 clips in all: never one half
    return definition(torch.cat([labels, labels.new_tensor([3])]), torch.cat([groups, groups.new_tensor([20])]))
