"""Train, evaluate and use the video models: one plain loop for all methods and datasets.

    python train.py --method aim --data toy                              a result in minutes, nothing to download
    python train.py --method aim --data k400 --data-root /data/k400      a dataset as its site or a mirror gives it
    python train.py --method aim --data my_videos                        my_videos/{train,val}/CLASS/*.mp4
    python train.py --method aim --data train.txt --val-data val.txt     list files, `path label` a line
    torchrun --nproc_per_node 8 train.py --method aim --data ...         the same on eight GPUs
    python train.py ... --resume                                         goes on with a run that was stopped or killed
    python train.py ... --init FILE                                      starts from a checkpoint, ours or the authors'
    python train.py --eval --checkpoint runs/aim-toy/checkpoint.pt       its accuracy again, on any data or split
    python train.py --predict CLIP.mp4 --checkpoint runs/aim-toy/checkpoint.pt

Every setting comes from the method's recipe for the data and the backbone (`RECIPES` in its file); flags override it.
The defaults below are those of --method METHOD --data DATA; name yours before --help to see them.
"""

import argparse
import atexit
import collections
import contextlib
import csv
import importlib.metadata
import inspect
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import signal
import sys
import textwrap
import time
import zlib
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import aim
import common
import side4video
import st_adapter
import zeroi2v
from data import DATASETS, TRIES, Clip, VideoDataset, VideoError, find_clips

# The baselines are trained as AIM is; with all weights tuned, at a tenth of the rate (ZeroI2V, appendix A.2).
BASELINE = {name: {**recipe, "model": {}} for name, recipe in aim.RECIPES.items()}
BASELINE["toy"]["model"] = {"dropout": 0.0}
METHODS = {  # name: (class, recipes)
    "aim": (aim.AIM, aim.RECIPES),
    "st_adapter": (st_adapter.STAdapter, st_adapter.RECIPES),
    "zeroi2v": (zeroi2v.ZeroI2V, zeroi2v.RECIPES),
    "side4video": (side4video.Side4Video, side4video.RECIPES),
    "linear_probe": (partial(common.SpaceOnly, tune="head"), BASELINE),
    "partial_finetune": (partial(common.SpaceOnly, tune="last"), BASELINE),
    "finetune": (
        partial(common.SpaceOnly, tune="all"),
        {name: dict(recipe, lr=recipe["lr"] / 10) for name, recipe in BASELINE.items()},
    ),
}
RELEASED = {  # what only the authors' checkpoints of a method have among their keys, and who reads them
    "aim": (r"\.T_Adapter\.", aim.load_official),
    "zeroi2v": (r"\.(S_Adapter|T_Adapter_in\w*|MLP_Adapter\w*)\.", zeroi2v.load_official),
    "st_adapter": (r"\.adapter_pre_(attn|mlp)\.", st_adapter.load_official),
    "side4video": (r"\.side_\w+\.", side4video.load_official),
}
DEFAULTS = dict(  # of everything that a recipe may leave open
    backbone="ViT-B-16", pretrained="openai", image_size=None, quick_gelu=None, num_frames=8, model={}, init=None,
    data_root=None, val_data=None, annotations=None, fold=1, skip=None, span=0, views=(1, 1), augment={}, repeat=1,
    lr_batch=0, temporal_lr=1.0, clip_grad=0.0, label_smoothing=0.0, accumulate=1, eval_every=1, save_every=10.0,
    precision=None, recompute=False, compile=False, seed=0,
)  # fmt: skip
FAILURES = 0.05  # the share of unreadable videos above which training stops
LOG_EVERY = 10  # steps
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class RunError(Exception):
    """Why a run cannot go on."""


class Stopped(Exception):
    """Signals asked the run to stop, and it is saved. Arguments: how far it is, the signals that each process got."""


# ---- Training


def parameter_groups(model, run):
    """AdamW's groups: no decay on biases, norms and embeddings; `rate`, a multiple of the learning rate."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decay = 0.0 if p.ndim < 2 or "embedding" in name else run["weight_decay"]
            rate = run["temporal_lr"] if "temporal_embedding" in name else 1.0
            groups.setdefault((decay, rate), []).append(p)
    return [{"params": ps, "weight_decay": decay, "rate": rate} for (decay, rate), ps in groups.items()]


def warmup_cosine(step, steps, warmup):
    """The fraction of the peak learning rate at `step`: a line from 0 to 1, then half a cosine down to 0."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def peak_rate(run):
    return run["lr"] * (run["batch_size"] / run["lr_batch"] if run["lr_batch"] else 1)


def epoch_order(run, num_clips, epoch, place, micro):
    """This process's clips in this epoch, in order; a global batch holds the same clips for any number of processes."""
    generator = torch.Generator().manual_seed(1_000_003 * run["seed"] + epoch)
    order = torch.randperm(num_clips, generator=generator)
    again = num_clips * torch.arange(run["repeat"])  # repeated sampling: item i + k num_clips is clip i, drawn anew
    order = (order[:, None] + again).flatten()
    order = order[: len(order) // run["batch_size"] * run["batch_size"]]
    return order.view(-1, place.world, micro)[:, place.rank].flatten().tolist()


# How far a run is: epochs, steps of the epoch and what they saw, and where log.jsonl ended.
START = dict(epoch=0, step=0, clips=0, loss=0.0, right=0, failed=0, seconds=0.0, overflows=0, log=0)


def train(run, model, train_set, val_set, data, out, place, resumed=None):
    """The loop -> (last evaluation, videos that were skipped); run.json, log.jsonl and checkpoint.pt go to `out`."""
    device, rank, world = place.device, place.rank, place.world
    micro = run["batch_size"] // (world * run["accumulate"])
    steps_per_epoch = len(train_set) * run["repeat"] // run["batch_size"]
    steps, warmup = run["epochs"] * steps_per_epoch, run["warmup_epochs"] * steps_per_epoch
    optimizer = torch.optim.AdamW(parameter_groups(model, run), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=run["precision"] == "fp16")
    at = resumed["progress"] if resumed else dict(START, skipped=[], result={})
    if at["epoch"] == run["epochs"]:
        return at["result"], at["skipped"]
    at |= {"data": run["data"], "videos": fingerprint(data.train)}
    if resumed:
        optimizer.load_state_dict(resumed["optimizer"])
        if scaler.is_enabled() and resumed["scaler"]:
            scaler.load_state_dict(resumed["scaler"])
    tuned = [p for group in optimizer.param_groups for p in group["params"]]
    parallel = forward = model
    if world > 1:  # reduces the gradients of what is tuned; batch norms share their statistics themselves
        gpu = [device.index] if device.type == "cuda" else None
        parallel = forward = DistributedDataParallel(model, gpu, gradient_as_bucket_view=True)
    if run["compile"]:
        forward = torch.compile(forward)
    log, seen = Log(out, run, steps_per_epoch, at, rank), Seen(train_set, run)

    def keep():
        if rank == 0:
            at["log"] = log.size()
            # A random backbone is in no file but this one.
            state = model.state_dict() if run["pretrained"] is None else common.tuned_state(model)
            names = {"classes": data.classes, "groups": data.groups, "result": at["result"], "versions": versions()}
            progress = {"progress": at, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            save({"run": run, "state": state, **names, **progress}, out / "checkpoint.pt")

    with log, noted_signals(place) as signals:
        for epoch in range(at["epoch"], run["epochs"]):
            model.train()
            train_set.epoch = epoch
            order = epoch_order(run, len(train_set), epoch, place, micro)
            share = micro * run["accumulate"]  # of a step's clips, this process's
            batches = iter(place.batches(train_set, order[share * at["step"] :], micro))
            saved = time.monotonic()
            seen.reset()
            for i in range(at["step"], steps_per_epoch):
                step = epoch * steps_per_epoch + i
                torch.manual_seed((1_000_003 * run["seed"] + step) * 1009 + rank)  # a resumed run drops out the same
                rate = peak_rate(run) * warmup_cosine(step, steps, warmup)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["rate"]
                with seen.waiting():
                    passes = [next(batches) for _ in range(run["accumulate"])]
                seen.videos(passes)
                if place.agree(bool(seen.trouble or signals)):  # all processes go on, or none
                    log.window(at, seen.meet(at, place, scaler), rate, device)
                    keep()
                    raise Stopped(at, place.gather(signals))

                for k, (video, label, _) in enumerate(passes, 1):
                    video, label = video.to(device, non_blocking=True), label.to(device, non_blocking=True)
                    reduce = world == 1 or k == run["accumulate"]
                    with contextlib.nullcontext() if reduce else parallel.no_sync():
                        with autocast(run, device):
                            logits = forward(common.normalize(video, model.vit)).float()
                            smoothing = run["label_smoothing"]
                            loss = F.cross_entropy(logits, label, reduction="none", label_smoothing=smoothing)
                        scaler.scale(loss.mean() / run["accumulate"]).backward()
                    seen.forward(loss, logits, label)
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(tuned, run["clip_grad"] or math.inf)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()

                seen.step(step + 1, norm, order[share * i : share * (i + 1)])
                at["step"] = i + 1
                log.tick()
                if at["step"] % LOG_EVERY == 0 or at["step"] == steps_per_epoch:
                    # Waits for this step; elsewhere the loop waits for the step before, the next one queued.
                    log.window(at, seen.meet(at, place, scaler), rate, device)
                    if time.monotonic() - saved > 60 * run["save_every"]:
                        keep()
                        saved = time.monotonic()

            line = {"epoch": epoch + 1, "step": (epoch + 1) * steps_per_epoch}
            line |= {"train_loss": at["loss"] / at["clips"], "train_top1": 100 * at["right"] / at["clips"]}
            if (epoch + 1) % run["eval_every"] == 0 or epoch + 1 == run["epochs"]:
                keep()  # killed while it evaluates, a run has lost no step
                began = time.perf_counter()
                evaluated = evaluate(model, val_set, data, run, place, signals)
                if evaluated is None:
                    raise Stopped(at, place.gather(signals))
                at["result"], at["seconds"] = evaluated.result, at["seconds"] + time.perf_counter() - began
                at["skipped"] = list(dict.fromkeys(at["skipped"] + evaluated.skipped))
                line |= evaluated.result
                if rank == 0:
                    write_tables(evaluated, data.classes, out, "val")
            log.epoch(line | {"seconds": round(at["seconds"], 1), "overflows": at["overflows"]})
            at |= dict(START, epoch=epoch + 1, overflows=at["overflows"])
            keep()
    return at["result"], at["skipped"]


# ---- Evaluating and predicting


class Evaluated(NamedTuple):
    """result: top-1 and top-5 in percent, videos counted, and `top1 GROUP` over each group of classes. skipped: why and
    which videos are not counted. confusion (true class, predicted class) and among_five (true class): videos.
    """

    result: dict
    skipped: list
    confusion: torch.Tensor
    among_five: torch.Tensor


@torch.no_grad()
def evaluate(model, dataset, data, run, place, signals=()):
    """Over a testing VideoDataset, each video counted once, by one process -> Evaluated; None if a signal came."""
    model.eval()
    views, C = math.prod(run["views"]), len(data.classes)
    device = place.device
    own = range(place.rank, len(dataset), place.world)
    batches = place.batches(dataset, own, max(run["batch_size"] // (place.world * run["accumulate"] * views), 1))
    confusion, among_five = torch.zeros(C, C, device=device), torch.zeros(C, device=device)
    skipped = []
    hidden = None if place.rank == 0 else True  # None: no bar where there is no terminal
    for video, label, problems in tqdm(batches, desc="evaluating", leave=False, disable=hidden, dynamic_ncols=True):
        if signals:
            break
        skipped += filter(None, problems)
        readable = label >= 0
        if not readable.any():
            continue
        label = label[readable].to(device, non_blocking=True)
        video = video if readable.all() else video[readable]
        best = probabilities(model, video, run, device).topk(min(5, C)).indices
        confusion.view(-1).index_add_(0, label * C + best[:, 0], torch.ones_like(label, dtype=torch.float32))
        among_five.index_add_(0, label, (best == label[:, None]).any(1).float())
    if place.agree(bool(signals)):
        return None
    parts = place.gather((skipped, confusion.cpu().long(), among_five.cpu().long()))
    skipped = list(dict.fromkeys(text for part in parts for text in part[0]))
    confusion, among_five = sum(part[1] for part in parts), sum(part[2] for part in parts)

    videos, right = confusion.sum(1), confusion.diag()
    if not videos.sum():
        raise VideoError(f"none of the {len(dataset)} videos to evaluate can be read; the first: {skipped[0]}")
    top1, top5 = (100 * counts.sum().item() / videos.sum().item() for counts in (right, among_five))
    result = {"top1": top1, "top5": top5, "videos": videos.sum().item()}
    for group, names in data.groups.items():
        chosen = [data.classes.index(name) for name in names]
        result[f"top1 {group}"] = 100 * right[chosen].sum().item() / max(videos[chosen].sum().item(), 1)
    return Evaluated(result, skipped, confusion, among_five)


def probabilities(model, video, run, device):
    """uint8 video (B, V, T, 3, H, W) -> class probabilities (B, num_classes), the mean over the V views"""
    video = video.to(device, non_blocking=True)
    with autocast(run, device):
        logits = model(common.normalize(video.flatten(0, 1), model.vit))
    return logits.float().softmax(-1).unflatten(0, video.shape[:2]).mean(1)


@torch.no_grad()
def predict(run, model, videos, classes, device):
    """Prints the five likeliest classes of each video; VideoError, after the others, for those that are broken."""
    model.eval()
    clips = [Clip(video, 0) for video in videos]
    dataset = VideoDataset(clips, run["num_frames"], model.vit.image_size, run["span"], run["views"])
    problems = []
    for clip, (video, _, problem) in zip(clips, dataset):
        if problem:
            problems.append(problem)
            continue
        p, best = probabilities(model, video[None], run, device)[0].topk(min(5, len(classes)))
        shares = (f"{100 * share:5.1f} %  {classes[c]}" for share, c in zip(p.tolist(), best.tolist()))
        print(clip.path, *shares, sep="\n  ", flush=True)
    if problems:
        raise VideoError("\n  ".join(problems))


def write_tables(evaluated, classes, folder, split):
    """SPLIT_classes.csv: accuracy by class; SPLIT_confusion.csv: a row for each true class, a column for each guess."""
    folder.mkdir(parents=True, exist_ok=True)
    confusion, among_five = evaluated.confusion.tolist(), evaluated.among_five.tolist()
    with open(folder / f"{split}_classes.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(["class", "videos", "top1", "top5"])
        for c, name in enumerate(classes):
            videos = sum(confusion[c])
            shares = [f"{100 * count / videos:.2f}" if videos else "" for count in (confusion[c][c], among_five[c])]
            table.writerow([name, videos, *shares])
    with open(folder / f"{split}_confusion.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(["true \\ predicted", *classes])
        table.writerows([name, *row] for name, row in zip(classes, confusion))


def describe(result):
    """The top-1, with that of each group of classes, or else the top-5."""
    parts = [f"{key.removeprefix('top1 ')} {value:.1f} %" for key, value in result.items() if key.startswith("top1 ")]
    parts = parts or [f"top-5 {result['top5']:.1f} %"]
    return f"top-1 {result['top1']:.1f} % ({', '.join(parts)})"


# ---- What is seen of a run


class Seen:
    """What this process's steps saw since the processes last met; losses come from the device when they are ready."""

    def __init__(self, dataset, run):
        self.dataset, self.scaled = dataset, run["precision"] == "fp16"
        self.trouble, self.parts, self.coming = "", [], collections.deque()
        self.reset()

    def reset(self):
        self.skipped, self.clips, self.loss, self.right = [], 0, 0.0, 0
        self.waited, self.norm, self.overflows, self.began = 0.0, 0.0, 0, time.perf_counter()

    @contextlib.contextmanager
    def waiting(self):
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def videos(self, passes):
        for _, label, problems in passes:
            self.skipped += filter(None, problems)
            if label.min() < 0:
                self.trouble = f"{TRIES} training videos in a row cannot be read; the first: {self.skipped[-1]}"

    def forward(self, loss, logits, label):
        """Of one pass: loss (B,)"""
        self.parts.append(torch.stack([loss.detach(), (logits.argmax(1) == label).float()]))

    def step(self, step, norm, items):
        """Of one step: the gradient's norm, and the items that were in it."""
        here = torch.cat(self.parts, dim=1).to("cpu", non_blocking=True), norm.to("cpu", non_blocking=True)
        event = torch.cuda.Event() if norm.is_cuda else None
        if event:
            event.record()
        self.parts = []
        self.coming.append((event, step, items, *here))
        self.look(behind=1 if event else 0)

    def look(self, behind=0):
        """Waits for all steps but so many. With one behind, the device always has a step before it."""
        while len(self.coming) > behind:
            event, step, items, (loss, right), norm = self.coming.popleft()
            if event:
                event.synchronize()
            self.clips += len(loss)
            self.loss += loss.sum().item()
            self.right += int(right.sum())
            self.norm = norm.item()
            bad = [i for i, finite in zip(items, loss.isfinite()) if not finite]
            if bad:  # named is what the epoch asked for: a broken video's stand-in goes by its name
                paths = [self.dataset.clips[i % len(self.dataset)].path for i in bad]
                few = ", ".join(paths[:8]) + f" and {len(paths) - 8} more" * (len(paths) > 8)
                self.trouble = self.trouble or f"the loss is not finite at step {step} for {few}; try a smaller --lr"
            elif not math.isfinite(self.norm) and self.scaled:
                self.overflows += 1  # the scaler has left this step out, and halves its scale
            elif not math.isfinite(self.norm):
                self.trouble = self.trouble or f"the gradient is not finite at step {step}; try a smaller --lr"

    def meet(self, at, place, scaler):
        """Adds to `at` what all processes saw since they last met -> the part of each; RunError if one cannot go on."""
        self.look()
        keys = ("trouble", "skipped", "clips", "loss", "right", "waited", "norm", "overflows")
        parts = place.gather({key: getattr(self, key) for key in keys} | {"seconds": time.perf_counter() - self.began})
        self.reset()
        for key in ("clips", "loss", "right"):
            at[key] += sum(part[key] for part in parts)
        for key in ("overflows", "seconds"):
            at[key] += parts[0][key]
        skipped = [text for part in parts for text in part["skipped"]]
        at["failed"] += len(skipped)
        at["skipped"] = list(dict.fromkeys(at["skipped"] + skipped))

        troubles = dict.fromkeys(part["trouble"] for part in parts if part["trouble"])
        if troubles:
            raise RunError("; ".join(troubles))
        if scaler.is_enabled() and scaler.get_scale() < 1e-6:
            raise RunError("fp16 overflows at every scale of the loss; try --precision bf16 or fp32")
        if at["failed"] > max(FAILURES * at["clips"], 10):
            few = f"{at['failed']} of {at['clips']} training videos cannot be read"
            raise RunError(f"{few}, more than {FAILURES:.0%}; the last: {at['skipped'][-1]}")
        return parts


class Log:
    """log.jsonl, and what is seen of a run: a bar on a terminal, elsewhere a line now and then. Process 0 writes."""

    def __init__(self, out, run, steps_per_epoch, at, rank):
        self.run, self.steps = run, run["epochs"] * steps_per_epoch
        self.first = self.done = at["epoch"] * steps_per_epoch + at["step"]
        self.file, self.began, self.shown = None, time.monotonic(), -math.inf
        if rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            (out / "run.json").write_text(json.dumps(run, indent=1) + "\n")
            self.file = (out / "log.jsonl").open("ab")
            if self.file.tell() > at["log"]:
                self.file.truncate(at["log"])  # what a killed run logged after its last checkpoint is done again
        hidden = None if rank == 0 else True  # None: no bar where there is no terminal
        self.bar = tqdm(total=self.steps, initial=self.done, disable=hidden, unit="step", dynamic_ncols=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()
        if self.file:
            self.file.close()

    def size(self):
        return self.file.seek(0, os.SEEK_END)

    def write(self, line):
        self.file.write(json.dumps(line).encode() + b"\n")
        self.file.flush()

    def tick(self):
        self.done += 1
        self.bar.update()

    def window(self, at, parts, rate, device):
        """The steps since the processes last met, `parts` from each of them."""
        clips, loss, right, waited = (sum(part[key] for part in parts) for key in ("clips", "loss", "right", "waited"))
        if not (self.file and clips):
            return
        seconds, norm = parts[0]["seconds"], parts[0]["norm"]
        line = dict(
            step=self.done,
            epoch=at["epoch"] + 1,
            loss=loss / clips,
            top1=100 * right / clips,
            lr=rate,
            grad_norm=norm if math.isfinite(norm) else None,
            clips_per_second=clips / seconds,
            data_wait=waited / len(parts) / seconds,
            memory_mb=memory_mb(device),
            overflows=at["overflows"],
            skipped=len(at["skipped"]),
        )
        self.write(line)
        where = f"epoch {line['epoch']}/{self.run['epochs']}, loss {line['loss']:.3f}, top-1 {line['top1']:.1f} %"
        pace = f"{line['clips_per_second']:.3g} clips/s, {line['data_wait']:.0%} data wait"
        pace += f", {line['memory_mb'] / 1024:.1f} GB"
        self.bar.set_postfix_str(f"{where}, {pace}")
        now = time.monotonic()
        if self.bar.disable and now - self.shown > 30:
            left = (self.steps - self.done) * (now - self.began) / max(self.done - self.first, 1)
            print(f"step {self.done}/{self.steps}, {where}, {pace}, {tqdm.format_interval(left)} left", flush=True)
            self.shown = now

    def epoch(self, line):
        if self.file:
            self.write(line)
            val = f", val {describe(line)}" if "top1" in line else ""
            took = tqdm.format_interval(line["seconds"])
            train = f"train loss {line['train_loss']:.3f}, top-1 {line['train_top1']:.1f} %"
            self.bar.write(f"epoch {line['epoch']}: {train}{val}, {took}")


def memory_mb(device):
    """The most that was in use: of the GPU's memory by tensors, or of the computer's by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ---- Processes, and the signals that stop them


class Place(NamedTuple):
    """Where this process computes, which of how many it is, and how they talk beside the gradients: over the CPU."""

    device: torch.device
    rank: int
    world: int
    workers: int
    group: dist.ProcessGroup | None = None

    def batches(self, dataset, indices, batch_size):
        return DataLoader(
            Subset(dataset, indices),
            batch_size,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=outlive_signals,
        )

    def agree(self, code):
        """The largest code of all processes."""
        if self.world > 1:
            code = torch.tensor(code)
            dist.all_reduce(code, dist.ReduceOp.MAX, group=self.group)
        return int(code)

    def gather(self, value):
        """The values of all processes."""
        values = [value]
        if self.world > 1:
            values = [None] * self.world
            dist.all_gather_object(values, value, group=self.group)
        return values


def outlive_signals(worker):
    """Ctrl-C and many a scheduler signal every process; a loader must live until the step has its batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def dismiss_loaders():
    """A process ends its children by SIGTERM and waits for them: loaders would keep it waiting."""
    loaders = multiprocessing.active_children()
    if loaders:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's own would call their end an error
    for loader in loaders:
        loader.kill()


@contextlib.contextmanager
def noted_signals(place):
    """The list of SIGINT and SIGTERM that came, for the loop to look at; a Ctrl-C a second later stops at once."""
    noted, first = [], math.inf

    def note(signum, frame):
        nonlocal first
        now = (
            time.monotonic()
        )  # what wraps a command may pass on what the terminal has sent it too; torchrun repeats it
        if signum == signal.SIGINT and now > first + 1 and place.world == 1:
            raise KeyboardInterrupt
        first = min(first, now)
        noted.append(signum)

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


# ---- What a run is


def recipe_of(args):
    """The method's settings for this data and backbone, as its paper or its authors' code has them."""
    _, recipes = METHODS[args.method]
    source = DATASETS.get(args.data)
    names = [args.recipe] if args.recipe else [args.data, source.recipe if source else args.data, "k400"]
    name = next((name for name in names if name in recipes), None)  # what no paper tells is done as on Kinetics
    if name is None:
        known = ", ".join(key for key in recipes if " " not in key)
        raise ValueError(f"{args.method} has no recipe {args.recipe!r}; choose from {known}")
    backbone = f"{name} {args.backbone}".replace("/", "-")
    own = [key for key in recipes if " " in key and backbone.startswith(key)]  # some ViTs have their own
    recipe = recipes[own[0] if own else name]
    sampling = source.sampling if source and name not in (args.data, source.recipe) else {}
    run = {**DEFAULTS, **recipe, **sampling, "method": args.method, "data": args.data, "recipe": name}
    run["model"], run["augment"] = dict(run["model"]), dict(run["augment"])
    return run


def settings(args):
    """A run's whole description as plain values, for its checkpoint: the method's recipe, overridden by flags."""
    run = recipe_of(args)
    if args.backbone and args.backbone != run["backbone"]:
        run["pretrained"] = DEFAULTS["pretrained"]
    override(run, args)
    return run


def override(run, args):
    """Flags that were given replace the values of `run`."""
    settable = run.keys() - {"model", "augment", "method", "recipe"}
    run.update((key, value) for key, value in vars(args).items() if key in settable and value is not None)
    run["model"] |= read_set(run["method"], args.set or [])
    for key, value in read_augment(args.augment or []).items():
        for old in {"crop": ("crop", "short_side"), "short_side": ("crop", "short_side")}.get(key, (key,)):
            run["augment"].pop(old, None)
        run["augment"] |= {} if value is None else {key: value}
    if args.lr is not None and args.lr_batch is None:
        run["lr_batch"] = 0  # the rate that was asked for is the rate
    if run["pretrained"] == "none":
        run["pretrained"] = None
    if run["precision"] is None and device_of(args).type == "cpu":
        run["precision"] = "fp32"
    elif run["precision"] is None:
        run["precision"] = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def keywords_of(cls):
    """The switches of a method's class, with their defaults."""
    known = {key: p.default for key, p in inspect.signature(cls).parameters.items() if p.default is not p.empty}
    return {key: value for key, value in known.items() if key not in ("num_frames", "tune")}


def read_set(method, items):
    """["ratio=0.125", "blocks=top"] -> {"ratio": 0.125, "blocks": "top"}"""
    allowed, values = {key: type(value) for key, value in keywords_of(METHODS[method][0]).items()}, {}
    readers = {bool: {"true": True, "false": False}.__getitem__, tuple: lambda text: tuple(map(int, text.split("x")))}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or key not in allowed:
            raise ValueError(f"--set {item}: KEY=VALUE, where {method} knows the keys {', '.join(sorted(allowed))}")
        try:
            values[key] = readers.get(allowed[key], allowed[key])(value)
        except (KeyError, ValueError):
            kinds = {bool: "true or false", tuple: "numbers like 3x1x1"}
            kind = kinds.get(allowed[key], f"of type {allowed[key].__name__}")
            raise ValueError(f"--set {item}: the value must be {kind}") from None
    return values


def read_augment(items):
    """["crop=0.5x1", "randaugment=4x7", "gray=none"] -> keywords of data.train_transform, None for what is dropped"""
    pair, rate, values = 2, 1, {}
    sizes = dict(crop=pair, short_side=pair, randaugment=pair, flip=rate, gray=rate, erasing=rate, jitter=rate)
    for item in items:
        key, _, text = item.partition("=")
        try:
            numbers = None if text == "none" else [float(part) for part in text.split("x")]
            if key not in sizes or not (numbers is None or len(numbers) == sizes[key]):
                raise ValueError
        except ValueError:
            how = ", ".join(f"{name}={'AxB' if size == pair else 'A'}" for name, size in sizes.items())
            raise ValueError(f"--augment {item}: write {how}, with numbers, or none to drop one") from None
        low, high = {"jitter": (0, math.inf), "short_side": (1, math.inf)}.get(key, (0, 1))
        rule = f"numbers from {low} to {high}, the smaller one first"
        right = numbers is None or low <= numbers[0] <= numbers[-1] <= high
        if key == "crop" and numbers:
            right = right and numbers[0] > 0
        if key == "randaugment" and numbers:
            rule = "a whole number of operations, and a magnitude from 0 to 30"
            right = numbers[0] >= 1 and numbers[0].is_integer() and 0 <= numbers[1] <= 30
        if not right:
            raise ValueError(f"--augment {item}: {rule}")
        if key == "randaugment" and numbers:
            values[key] = dict(num_ops=int(numbers[0]), magnitude=numbers[1])
        else:
            values[key] = numbers and (tuple(numbers) if len(numbers) == pair else numbers[0])
    return values


def device_of(args):
    if args.device == "cpu" or not (args.device or torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch finds no GPU; leave the flag out to run on the CPU")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def build(run, num_classes, device):
    """The model that `run` describes; frozen weights in half precision where it computes in that."""
    torch.manual_seed(run["seed"])
    clip = common.load_clip(run["backbone"], run["pretrained"], run["image_size"], run["quick_gelu"])
    cls, _ = METHODS[run["method"]]
    model = cls(clip, num_classes, num_frames=run["num_frames"], **run["model"]).to(device)
    if run["recompute"]:
        common.recompute(model)
    if run["precision"] != "fp32":
        common.cast_frozen(model, DTYPES[run["precision"]])
    return model


def autocast(run, device):
    return torch.autocast(device.type, DTYPES[run["precision"]], enabled=run["precision"] != "fp32")


# ---- Checkpoints


def versions():
    packages = ("torch", "torchvision", "open_clip_torch", "timm", "av")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def save(checkpoint, path):
    """Writes beside `path`, then renames: if anything stops the writing, the old checkpoint is still whole."""
    beside = path.with_suffix(".partial")
    try:
        with open(beside, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a full disk into the latter
        beside.unlink(missing_ok=True)
        why = (error.strerror or error) if isinstance(error, OSError) else "is the disk full?"
        raise OSError(f"{path} cannot be written: {why}") from error


def read(path):
    """Whatever torch.load can read without running any code of it -> dict"""
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        tensors(checkpoint)
    except Exception as e:  # whatever the unpickler says of a file that is not ours
        raise ValueError(f"{path} is not a checkpoint that can be read safely, or it is damaged") from e
    return checkpoint


def tensors(checkpoint):
    """All tensors of a checkpoint by their whole names, however deeply nested."""
    found = {}
    for key, value in checkpoint.items():
        nested = tensors(value) if isinstance(value, dict) else {}
        found |= {f"{key}.{name}": tensor for name, tensor in nested.items()}
        found |= {str(key): value} if isinstance(value, torch.Tensor) else {}
    return found


def is_ours(checkpoint):
    return {"run", "state", "classes"} <= checkpoint.keys()


def load(path):
    """A checkpoint of ours."""
    return as_ours(read(path), path)


def as_ours(checkpoint, path):
    if not is_ours(checkpoint):
        raise ValueError(f"{path} is not a checkpoint of train.py; --init reads those of the methods' authors")
    checkpoint["run"] = {**DEFAULTS, **checkpoint["run"]}  # an older one lacks newer settings
    return checkpoint


def unlike(path, known, classes, data):
    """How the classes of a checkpoint differ from those of the data."""
    text = f"{path} knows {len(known)} classes, which are not the {len(classes)} of {data}"
    first = next((f" (the first that differs: {a!r}, {b!r})" for a, b in zip(known, classes) if a != b), "")
    return text + first


def refuse(path, run, args, keys, why):
    """ValueError if a flag asks for another method, backbone, ... than the checkpoint has."""
    for key in keys:
        asked, there = getattr(args, key), run[key]
        if asked is not None and str(asked).replace("/", "-") != str(there).replace("/", "-"):
            flag = f"--{key.replace('_', '-')}"
            raise ValueError(f"{path} is of {flag} {there}, not {asked}: {why}")


def start_from(checkpoint, run, args, classes, device):
    """`build` with the weights of --init's checkpoint: ours, or one that a method's authors released -> model

    With other classes than `classes`, the classifier is new. ValueError if the rest does not fit.
    """
    path = args.init
    ours = is_ours(checkpoint)
    names = r"^head\.weight$" if ours else r"(^|\.)(fc|fc_cls)\.weight$"
    found = tensors(checkpoint["state"] if ours else checkpoint)
    head = next((tensor for name, tensor in found.items() if re.search(names, name)), None)
    if head is None:
        raise ValueError(f"{path} has no classifier among its keys: neither ours nor one of the authors' checkpoints")
    model = build(run, len(head), device)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    if ours:
        common.load_tuned(model, checkpoint["state"], path)
    else:
        _, load_official = RELEASED[run["method"]]
        try:
            load_official(model, checkpoint)
        except ValueError as e:
            raise ValueError(f"{path}: {e} (is it of another --recipe, --backbone or --frames?)") from e
    if any(not torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen):
        run["pretrained"] = None  # it brought a backbone of its own, which no name leads to
    known = [str(i) for i in range(len(head))]
    if ours:
        known = checkpoint["classes"]
    elif len(head) == len(classes):
        known = classes  # released files name none
    if known != classes:
        difference = unlike(path, known, classes, run["data"])
        if args.eval:
            raise ValueError(difference)
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{difference}: the classifier is new")
        torch.manual_seed(run["seed"])
        model.head = common.classifier(model.head.in_features, len(classes)).to(device)
    return model


def method_of(checkpoint, path):
    """Ours tells its method; that of the authors is found out by its keys."""
    if is_ours(checkpoint):
        return checkpoint["run"]["method"]
    keys = "\n".join(tensors(checkpoint))
    for method, (pattern, _) in RELEASED.items():
        if re.search(pattern, keys):
            return method
    raise ValueError(f"{path} is neither a checkpoint of train.py nor one that the authors of a method released")


def settings_to_start_from(checkpoint, args):
    """`settings` for the method of --init's checkpoint; ours also brings its backbone and the method's keywords."""
    path = args.init
    if is_ours(checkpoint):
        theirs = {**DEFAULTS, **checkpoint["run"]}
        refuse(path, theirs, args, ("method", "backbone", "num_frames", "image_size"), "--init takes over its shape")
        args.method, args.backbone = theirs["method"], theirs["backbone"]
        run = settings(args)
        run |= {key: theirs[key] for key in ("image_size", "quick_gelu", "num_frames")}
        run["pretrained"] = theirs["pretrained"] if args.pretrained is None else run["pretrained"]
        run["model"] = theirs["model"] | read_set(args.method, args.set or [])
        return run
    method = method_of(checkpoint, path)
    refuse(path, {"method": method}, args, ("method",), "its keys tell")
    args.method = method
    run = settings(args)
    if run["quick_gelu"] is None and run["backbone"].replace("/", "-").startswith(("ViT-B-", "ViT-L-")):
        run["quick_gelu"] = True  # the authors start from OpenAI's CLIP, which their files do not say
    return run


# ---- The command line


def natural(text, least=0):
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number, {least} or more, not {text!r}")
    return int(text)


def number(text):
    return natural(text, least=1)


def real(text):
    try:
        if 0 <= float(text) < math.inf:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a number, 0 or more, not {text!r}")


def share(text):
    if real(text) > 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, not {text!r}")
    return float(text)


def seed(text):
    if natural(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be less than {2**32}, not {text!r}")
    return int(text)


def parse(argv):
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--method", "--data", "--backbone", "--recipe"):
        first.add_argument(name)
    known, _ = first.parse_known_args(argv)
    known.method = known.method if known.method in METHODS else "aim"
    known.data = known.data or known.recipe or "k400"
    try:
        shown = recipe_of(known)
    except ValueError:
        known.recipe = None
        shown = recipe_of(known)
    cls, _ = METHODS[known.method]
    switches = " ".join(f"{key}={plain(value)}" for key, value in (keywords_of(cls) | shown["model"]).items())
    augment = " ".join(f"{key}={plain(value)}" for key, value in shown["augment"].items()) or "none"

    text = __doc__.replace("METHOD", known.method).replace("DATA", known.data)
    as_is = argparse.RawDescriptionHelpFormatter
    usage = "python train.py --method NAME --data DATA [...]; --help has the rest"
    p = argparse.ArgumentParser(usage=usage, description=text, formatter_class=as_is, allow_abbrev=False)

    def flag(group, names, text, default=None, **more):
        """A flag, whose default stands in its help only, so that what was given can be told."""
        key = names.split()[0].removeprefix("--").replace("-", "_")
        default = shown.get(key) if default is None and shown.get(key) is not False else default
        text += f" (default: {plain(default)})" if default not in (None, "") else ""
        group.add_argument(*names.split(), help=text.replace("%", "%%"), default=None, **more)

    job = p.add_argument_group("what to do")
    flag(job, "--method", "train this method", "", choices=METHODS)
    flag(job, "--eval", "evaluate --checkpoint, or --init, instead", action="store_true")
    flag(job, "--predict", "name the five likeliest classes by --checkpoint", nargs="+", metavar="VIDEO")
    flag(job, "--checkpoint", "the checkpoint.pt to evaluate or to predict with", type=Path)
    text = "start from its weights: a checkpoint.pt, or a file released by the method's authors, known by its keys"
    flag(job, "--init", text, metavar="FILE")
    text = "go on with the last run of this name, or the one in --out, from its last checkpoint, or else begin"
    flag(job, "--resume", text, action="store_true")
    text = "the run's folder, or where --eval writes its tables"
    flag(job, "--out", text, "runs/METHOD-DATA, numbered if taken; beside the checkpoint", type=Path)
    flag(job, "--seed", "of the new weights, the order and the augmentation", type=seed)

    data = p.add_argument_group("data")
    names = ", ".join(["toy", *DATASETS])
    flag(data, "--data", f"{names}, a folder with train/CLASS and val/CLASS, or a list file", "")
    flag(data, "--val-data", "the list file to evaluate on, if --data is one")
    text = "where a named dataset's videos are, what list files' paths start at, where toy is written"
    flag(data, "--data-root", text, "the list's folder; datasets")
    flag(data, "--annotations", "where a named dataset's annotation files are", "--data-root")
    flag(data, "--fold", "of UCF101's and HMDB51's three", type=number, choices=(1, 2, 3))
    flag(data, "--skip", "a file of videos to leave out, as `python data.py check` writes")
    flag(data, "--split", "what --eval evaluates on", "val", choices=("val", "test"))
    flag(data, "--workers", "loader processes", "a core each, at most 8; toy: none", type=natural)

    model = p.add_argument_group("model")
    flag(model, "--backbone", "a plain-ViT CLIP of open_clip, or a plain ViT of timm: ViT-B-16, ViT-L-14, ...")
    flag(model, "--pretrained", "open_clip's tag of its weights, a local file, or none: random weights")
    flag(model, "--num-frames --frames", "frames a clip", type=number, metavar="T")
    flag(model, "--image-size", "pixels a side", "what the backbone was trained at", type=number)
    flag(model, "--set", "keywords of the method's class", switches, nargs="+", metavar="KEY=VALUE")

    recipe = p.add_argument_group("recipe")
    text = f"whose settings to start from: {', '.join(key for key in METHODS[known.method][1] if ' ' not in key)}"
    flag(recipe, "--recipe", text, shown["recipe"])
    flag(recipe, "--epochs", "passes over the training videos", type=number)
    flag(recipe, "--warmup-epochs", "a line from 0 to the peak, then a cosine to 0, both by step", type=real)
    flag(recipe, "--batch-size", "clips a step, over all processes and accumulated passes", type=number)
    flag(recipe, "--lr", "peak learning rate of AdamW", type=real)
    text = "clips for which --lr is meant: it is scaled in proportion to the batch; 0: it is as it is"
    flag(recipe, "--lr-batch", text, type=natural)
    flag(recipe, "--temporal-lr", "the temporal embedding's learning rate, as a multiple of --lr", type=real)
    flag(recipe, "--weight-decay", "none on biases, norms and embeddings", type=real)
    flag(recipe, "--clip-grad", "largest gradient norm; 0: no clipping", type=real)
    flag(recipe, "--label-smoothing", "share of the target spread over all classes", type=share)
    text = "crop=LEASTxMOST, or short_side, gray, erasing, jitter, randaugment=OPSxMAGNITUDE, flip; KEY=none drops one"
    flag(recipe, "--augment", text, augment, nargs="+", metavar="KEY=VALUE")
    flag(recipe, "--repeat", "clips drawn from a video an epoch (repeated sampling)", type=number)
    text = "video frames that a clip spans, T at even steps; 0: one from each of T segments of the video"
    flag(recipe, "--span", text, type=natural)
    views, pair = " ".join(map(str, shown["views"])), ("TEMPORAL", "SPATIAL")
    flag(recipe, "--views", "evaluation views a video", views, nargs=2, type=number, metavar=pair)
    flag(recipe, "--eval-every", "evaluate every N epochs and after the last", type=number, metavar="N")
    flag(recipe, "--save-every", "save after so long, beside each epoch's end", type=real, metavar="MINUTES")

    device = p.add_argument_group("device")
    flag(device, "--device", "where to compute", "cuda if there is one", choices=("cuda", "cpu"))
    flag(device, "--precision", "of autocast", "bf16 or fp16 on a GPU, else fp32", choices=DTYPES)
    text = "keep a fifth to a third for the backward pass and compute the rest again, in a fifth to a third more time"
    flag(device, "--recompute", text, action="store_true")
    text = "compile the training step: minutes at the start, faster steps after"
    flag(device, "--compile", text, action="store_true")
    text = "passes a step: less memory, same batch (batch norm sees a pass)"
    flag(device, "--accumulate", text, type=number, metavar="N")
    return checked(p, p.parse_args(argv))


HEARD = {  # by evaluating and predicting; all else is of training
    "--predict": "checkpoint method backbone pretrained num_frames image_size span views device precision predict",
    "--eval": """checkpoint method backbone pretrained num_frames image_size span views device precision eval init out
        data val_data data_root annotations fold skip split workers batch_size seed recipe set""",
}


def checked(p, args):
    """Flags that do not go together are an error."""
    given = [key for key, value in vars(args).items() if value is not None]
    job = "--predict" if args.predict else "--eval" if args.eval else None
    if job and args.resume:
        p.error("--eval and --predict take no --resume")
    if job and not args.checkpoint and not (args.eval and args.init):
        p.error("--eval and --predict need --checkpoint FILE (--eval also takes --init FILE)")
    if args.checkpoint and not job:
        p.error("--checkpoint goes with --eval or --predict; to go on with a run use --resume, to start from it --init")
    if args.checkpoint and args.init:
        p.error("--checkpoint and --init both name a checkpoint: use one")
    for key in given:
        flag = f"--{key.replace('_', '-')}"
        if args.checkpoint and key in ("set", "recipe"):
            p.error(f"{flag} is fixed by the checkpoint")
        if job and key not in HEARD[job].split():
            p.error(f"{flag} means nothing to {job}")
    kind = "named" if args.data in DATASETS else "toy" if args.data == "toy" else "list"
    if kind == "list" and args.data and Path(args.data).is_dir():
        kind = "folder"
    heard = {
        "data_root": ("named", "toy", "list"),
        "val_data": ("list",),
        "annotations": ("named",),
        "fold": ("named",),
    }
    for key in heard.keys() & given if args.data else ():
        if kind not in heard[key]:
            p.error(f"--{key.replace('_', '-')} means nothing to --data {args.data}")
    if args.split and not args.eval:
        p.error("--split goes with --eval: training is watched on val")
    if not job and not (args.data and (args.method or args.init)):
        p.error("say what to train: --method NAME --data DATA (or --eval / --predict with --checkpoint FILE)")
    args.split = args.split or "val"
    return args


def plain(value):
    """A setting as it would stand on the command line."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return "x".join(map(plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


# ---- From the command line to the job


def run_folder(args):
    """Where the run lives: --out, or runs/METHOD-DATA with the first free number, or the last taken one to resume."""
    if args.out:
        if args.out.is_file():
            raise ValueError(f"--out {args.out} is a file; name a folder")
        if (args.out / "checkpoint.pt").exists() and not args.resume:
            raise ValueError(f"{args.out} holds a run already: --resume goes on with it, or choose another --out")
        return args.out
    data = Path(args.data).resolve()
    base = Path("runs") / f"{args.method}-{data.name if data.is_dir() else data.stem}"
    numbered = re.compile(re.escape(base.name) + r"(?:-(\d+))?")
    found = (numbered.fullmatch(path.name) for path in (base.parent.iterdir() if base.parent.is_dir() else ()))
    last = max((int(match[1] or 1) for match in found if match), default=0)
    number = max(last, 1) if args.resume else last + 1
    return base if number == 1 else base.with_name(f"{base.name}-{number}")


def check_resumable(path, checkpoint, args):
    """Flags may lengthen a resumed run or change its rate; what its checkpoint fixes they may only repeat."""
    run = checkpoint["run"]
    if "data" not in checkpoint.get("progress", ()):
        raise ValueError(f"{path} can be evaluated, but not resumed: it is merged, or older than this train.py")
    keys = ("method", "backbone", "num_frames", "image_size", "recipe", "weight_decay", "temporal_lr", "init")
    refuse(path, run, args, (*keys, "seed", "fold", "repeat"), "--resume cannot change that")
    if run["init"] is None and args.pretrained is not None and args.pretrained != (run["pretrained"] or "none"):
        raise ValueError(f"{path} is of --pretrained {run['pretrained'] or 'none'}, not {args.pretrained}")
    args.pretrained = None  # after --init, the backbone is in the checkpoint
    asked = run["model"] | read_set(run["method"], args.set or [])
    if asked != run["model"]:
        raise ValueError(f"this run was begun with model {run['model']}, not {asked}: --resume cannot change that")
    at = checkpoint["progress"]
    if args.epochs and args.epochs != run["epochs"] and args.epochs <= at["epoch"]:
        raise ValueError(f"--epochs {args.epochs}: this run has done {at['epoch']} already")
    if at["step"]:
        refuse(path, run, args, ["batch_size"], f"it stopped inside epoch {at['epoch'] + 1}")


def sources(args):
    """A job's files, each read once -> (the run's folder, the checkpoint to use or to go on with, that of --init)"""
    start = None
    if args.init and not (args.resume and args.method):  # else its own checkpoint may be all that a run needs
        start = read(Path(args.init))
        args.method = args.method or method_of(start, args.init)
    if args.eval and args.init:
        if is_ours(start):
            if args.set or args.recipe:
                raise ValueError("--set and --recipe are fixed by the checkpoint")
            args.checkpoint, args.init = Path(args.init), None
            return None, as_ours(start, args.checkpoint), None
        if not args.data:
            raise ValueError("--eval --init: say on which --data")
        return None, None, start
    if args.checkpoint:
        return None, load(args.checkpoint), None
    out = run_folder(args)
    path = out / "checkpoint.pt"
    if args.resume and path.exists():
        return out, load(path), None
    if args.resume and int(os.environ.get("RANK", 0)) == 0:
        print(f"{path} is not there yet: the run begins from the start")
    return out, None, read(Path(args.init)) if args.init and start is None else start


def setting(args, path, checkpoint, start):
    """What the command line and a checkpoint say together -> run"""
    if start is not None:
        return settings_to_start_from(start, args)
    if checkpoint is None:
        return settings(args)
    run = checkpoint["run"]
    if args.resume:
        check_resumable(path, checkpoint, args)
    else:
        refuse(path, run, args, ("method", "backbone"), "leave the flag out")
        if args.pretrained == "none" and run["pretrained"] is not None:
            raise ValueError(f"{path} was trained on --pretrained {run['pretrained']}: random weights do not fit it")
        run["compile"] = False
        if device_of(args).type == "cpu":
            run["precision"] = None  # a GPU's is no choice for a CPU
        if args.data:
            run |= dict(data_root=None, val_data=None, annotations=None, skip=None)  # were of the checkpoint's data
    override(run, args)
    return run


def prepare(args):
    """All that can go wrong before the first step -> (job, its keywords). Writes toy videos, takes a folder."""
    rank, world, device = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), device_of(args)
    out, checkpoint, start = sources(args)
    path = args.checkpoint or (out and out / "checkpoint.pt")
    run = setting(args, path, checkpoint, start)
    if out and run["batch_size"] % (world * run["accumulate"]):
        passes = f"{world * run['accumulate']} (processes x accumulated passes)"
        raise ValueError(f"--batch-size {run['batch_size']} is no multiple of {passes}")
    if run["compile"] and run["recompute"] and run["method"] == "side4video":
        raise ValueError("--compile and --recompute do not go together here: PyTorch cannot compile what is recomputed")
    if run["compile"]:
        check_compiler(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    group = None
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        group = dist.new_group(backend="gloo", timeout=timedelta(hours=2))  # one may wait for another's disk

    data = None
    if not args.predict:
        for turn in (0, 1):  # process 0 first: it may have to write the toy videos
            if turn == min(rank, 1):
                where = {key: run[key] for key in ("val_data", "annotations", "fold", "skip")}
                data = find_clips(run["data"], run["data_root"], **where)
            if world > 1:
                dist.barrier(group)
        if checkpoint and checkpoint["classes"] != data.classes:
            raise ValueError(unlike("the checkpoint", checkpoint["classes"], data.classes, run["data"]))
        if not getattr(data, args.split):
            raise ValueError(f"{run['data']} has no {args.split} split")

    classes = checkpoint["classes"] if checkpoint else data.classes
    if start is not None:
        model = start_from(start, run, args, classes, device)
    else:
        model = build(run, len(classes), device)
        if checkpoint:
            common.load_tuned(model, checkpoint["state"], path)
    if args.predict:
        return predict, dict(run=run, model=model, videos=args.predict, classes=classes, device=device)

    workers = args.workers if args.workers is not None else 0 if data.small else min(8, os.cpu_count())
    place = Place(device, rank, world, workers, group)
    shape = dict(num_frames=run["num_frames"], size=model.vit.image_size, span=run["span"], keep=data.small)
    eval_set = VideoDataset(getattr(data, args.split), views=run["views"], **shape)
    job = dict(run=run, model=model, data=data, place=place)
    if args.eval:
        return evaluate, dict(job, dataset=eval_set)
    if data.missing and rank == 0:
        print(*data.missing, sep="\n", file=sys.stderr)
    train_set = VideoDataset(data.train, augment=run["augment"], seed=run["seed"], flip=data.flip, **shape)
    at = checkpoint["progress"] if checkpoint else START
    if checkpoint and at["videos"] != fingerprint(data.train) and (at["step"] or at["data"] != run["data"]):
        where = "inside an epoch of" if at["step"] else "after an epoch of"
        raise ValueError(f"the run stopped {where} other training videos than those of --data {run['data']}")
    if len(train_set) * run["repeat"] < run["batch_size"]:
        there, batch = len(train_set), run["batch_size"]
        raise ValueError(f"{there} training videos do not fill a batch of {batch}: choose a smaller --batch-size")
    run["image_size"] = model.vit.image_size
    if rank == 0 and at["epoch"] == run["epochs"]:
        print("this run is finished; with more --epochs it would go on")
    elif rank == 0:
        while not (args.out or args.resume):
            try:
                out.mkdir(parents=True)
                break
            except FileExistsError:  # another run has taken it meanwhile
                out = run_folder(args)
        introduce(run, model, data, place, out)
    return train, dict(job, train_set=train_set, val_set=eval_set, out=out, resumed=checkpoint)


def fingerprint(clips):
    """Of the clips' names and labels in their order, wherever they lie."""
    names = "\n".join(f"{Path(clip.path).name} {clip.label}" for clip in clips)
    return zlib.crc32(names.encode(errors="surrogateescape"))


def check_compiler(device):
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    except Exception as e:  # each backend raises its own
        raise ValueError(f"--compile does not work here ({type(e).__name__}); on Linux it needs gcc or g++") from e


def introduce(run, model, data, place, out):
    """The recipe that the run uses, as run.json in its folder has it."""
    total, tunable = (n / 1e6 for n in common.count_parameters(model))
    apart = ("method", "data", "recipe", "model", "augment")
    own = {key: value for key, value in run.items() if key not in apart and value is not None and value is not False}
    words = [f"{key}={plain(value)}" for key, value in own.items()]
    words += [f"{key}={plain(value)}" for name in ("augment", "model") for key, value in run[name].items()]
    if run["lr_batch"]:
        words.append(f"peak_lr={peak_rate(run):g}")
    print(f"{run['method']} on {run['data']}, recipe {run['recipe']}, into {out}")
    print(textwrap.fill(" ".join(words), 110, initial_indent="  ", subsequent_indent="  "))
    videos = f"{len(data.train):,} videos to train on, {len(data.val):,} to evaluate on, {len(data.classes)} classes"
    tuned = f"{tunable:.2f} of {total:.2f} M parameters tuned"
    print(f"  {videos}; {tuned}, on {place.world} x {place.device.type}", flush=True)


def main(argv=None):
    """Does what the command line says -> the evaluation's result (None for --predict)"""
    argv = sys.argv[1:] if argv is None else argv
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
    try:
        args = parse(argv)
        job, keywords = prepare(args)
    except (ValueError, OSError) as error:
        stop(error)
    except KeyboardInterrupt:
        stop("stopped before the first step", code=130)
    saved = keywords.get("out") and keywords["out"] / "checkpoint.pt"
    try:
        answer = job(**keywords)
    except (VideoError, RunError, OSError) as error:
        kept = f"\nwhat it had learned before is in {saved}" if saved and saved.exists() else ""
        stop(f"{error}{kept}", alone=not isinstance(error, OSError))
    except Stopped as stopped:
        at, signals = stopped.args
        out = [] if args.out else ["--out", str(keywords["out"])]
        again = shlex.join(["train.py", *argv, *out, *(["--resume"] if "--resume" not in argv else [])])
        launcher = "python" if keywords["place"].world == 1 else "torchrun ..."
        where = f"stopped and saved after step {at['step']} of epoch {at['epoch'] + 1}"
        stop(f"{where}; go on with\n    {launcher} {again}", 128 + max(map(max, filter(None, signals))), alone=True)
    except KeyboardInterrupt:
        stop("stopped" + "; with --resume it goes on from the last checkpoint" * bool(saved and saved.exists()), 130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if job is predict or keywords["place"].rank > 0:
        return None if job is predict else answer[0]
    result, skipped = answer[:2]
    report(args, keywords, result, skipped)
    if job is evaluate:
        folder = args.out or (args.checkpoint or Path(args.init)).parent
        try:
            write_tables(answer, keywords["data"].classes, folder, args.split)
            print(f"by class: {folder}/{args.split}_classes.csv and {args.split}_confusion.csv")
        except OSError as error:
            print(f"the tables by class could not be written to {folder} ({error.strerror}); name another --out")
    return result


def stop(error, code=2, alone=False):
    """Exits with a sentence: of each process, or, where all stop for one reason, of process 0 alone."""
    rank = int(os.environ.get("RANK", 0))
    if rank == 0 or not alone:
        print(f"\ntrain.py: {f'process {rank}: ' if rank else ''}{error}", file=sys.stderr, flush=True)
    sys.exit(code)


def report(args, keywords, result, skipped):
    """The last words of a run."""
    print(f"{args.split} {describe(result)} on {result['videos']} videos")
    if skipped:
        print(f"{len(skipped)} videos were skipped:", *skipped[:10], sep="\n  ")
        if len(skipped) > 10:
            print(f"  and {len(skipped) - 10} more")
    if out := keywords.get("out"):
        (out / "skipped.txt").write_bytes(os.fsencode("".join(f"{text}\n" for text in skipped)))
        path, (total, tunable) = out / "checkpoint.pt", common.count_parameters(keywords["model"])
        print(f"{tunable / 1e6:.2f} M tunable of {total / 1e6:.2f} M parameters")
        print(f"checkpoint {path} ({path.stat().st_size / 1e6:.1f} MB)")
        print(f"use it: python train.py --predict VIDEO --checkpoint {shlex.quote(str(path))}")


if __name__ == "__main__":
    main()
