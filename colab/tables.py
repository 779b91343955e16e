"""Compares a paper's table with this code: parameters, GFLOPs and training memory, without weights, data or a GPU."""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import TextTower, ViT, cast_frozen, count_parameters, recompute


def gflops(model, video):
    """GFLOPs of one forward pass as the papers count them: a multiply-add is one. Works on the meta device too."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(video)
    return counter.get_total_flops() / 2 / 1e9


def activation_bytes(model, video):
    """Bytes that autograd keeps for the backward pass per clip like `video` (1, T, 3, H, W), under bf16 autocast.

    This is the sum of the distinct storages that saved_tensors_hooks see, without parameters, for two clips less the
    sum for one. Under FakeTensorMode nothing is computed, and the number is the same.
    """
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}

    def kept(clips):
        storages = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage  # it is held here so that no other storage gets its address
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast(video.device.type, torch.bfloat16):
            model(video.expand(clips, -1, -1, -1, -1).contiguous())
        return sum(s.nbytes() for address, s in storages.items() if address not in parameters)

    return kept(2) - kept(1)


class Row(NamedTuple):
    """One row of a paper's table: a model, and what the paper prints of it, or None where it prints nothing."""

    label: str
    clip: dict  # keywords of ViT
    model: dict = {}  # keywords of the method  # noqa: RUF012
    frames: int | None = 8  # None: only the parameters are compared
    total: float | None = None  # parameters in millions
    tunable: float | None = None
    gflops: float | None = None  # per view
    training: bool = True  # whether the activations are measured as well


def compare(method, rows):
    """Prints each row of a paper's table beside what is measured. Every CPU core measures one row at a time.

    Parameters are counted without the classifier. The last two columns are the MiB of activations that training keeps
    per clip of 224 x 224 pixels, without and with --recompute.
    """
    rows = [Row(*row) for row in rows]
    cell = "{:>8} |{:>8}".format
    header = [cell("paper", name) for name in ("total M", "tuned M", "GFLOPs")]
    print(f"{'':40}", *header, f"{'MiB per clip':>12} {'recomputed':>10}", flush=True)
    with ProcessPoolExecutor(min(len(rows), os.cpu_count(), 8), mp_context=get_context("spawn")) as pool:
        for row, (*measured, memory) in zip(rows, pool.map(measure, repeat(method), rows)):
            printed = row.total, row.tunable, row.gflops
            texts = [["-" if x is None else f"{x:.1f}" for x in pair] for pair in zip(printed, measured)]
            print(f"{row.label:40}", *(cell(*text) for text in texts), *(f"{m:11.0f}" for m in memory), flush=True)


def measure(method, row):
    """-> total and tunable parameters (M), GFLOPs per view or None, MiB per clip ([], or [kept, with recompute])"""
    from torch._subclasses.fake_tensor import FakeTensorMode

    frames, memory = row.frames or 8, []
    with torch.device("meta"):
        model = method(ViT(**row.clip), 400, num_frames=frames, **row.model).eval()
        flops = gflops(model, torch.empty(1, frames, 3, 224, 224)) if row.frames else None
        model.head = nn.Identity()
        total, tunable = (n / 1e6 for n in count_parameters(model))
    if row.frames and row.training:
        with FakeTensorMode():
            model = method(ViT(**row.clip), 400, num_frames=frames, **row.model)
            cast_frozen(model, torch.bfloat16)
            video = torch.empty(1, frames, 3, 224, 224)
            memory = [activation_bytes(model, video) / 2**20]
            recompute(model)
            memory.append(activation_bytes(model, video) / 2**20)
    return total, tunable, flops, memory


def compare_retrieval(cls, rows):
    """Prints what `rows` say of retrieval models, as in side4video.py, beside what is measured."""
    heads = ("total M", "theirs", "tuned M", "theirs", "GFLOPs", "theirs", "caption", "theirs")
    print(f"{'':40}", *(f"{head:>9}" for head in heads))
    for label, vit, text, *expected in rows:
        with torch.device("meta"):
            model = cls(ViT(**vit), TextTower(**text))
            video, ids = torch.empty(1, 12, 3, 224, 224), torch.zeros(1, 32, dtype=torch.long)
            found = [count / 1e6 for count in count_parameters(model)]
            found += [gflops(model.features, video), gflops(model.text, ids)]
        pairs = (number for two in zip(found, expected) for number in two)
        print(f"{label:40}", *(f"{number:9.1f}" for number in pairs))
