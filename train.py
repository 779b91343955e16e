"""Train, evaluate and use the video models: one plain loop for every method and every dataset.

python train.py --method aim --data toy                            a result within minutes, nothing to download
python train.py --method aim --data k400 --data-root /data/k400    a dataset as its site provides it
torchrun --nproc_per_node 8 train.py --method aim --data ...       the same on eight GPUs
python train.py --resume --out runs/aim-toy                        continues a run that was stopped or killed
python train.py --init FILE --data ...                             starts from a checkpoint, ours or the authors'
python train.py --eval --checkpoint FILE                           measures the accuracy of a checkpoint
python train.py --predict VIDEO FOLDER --checkpoint FILE           names the five likeliest classes of each video
python train.py --search SENTENCE --videos FOLDER --checkpoint FILE    finds the five videos that fit it best

Data with captions (msrvtt, msvd, vatex, toy_captions) train text-video retrieval, of which only side4video has a model.
"""

import argparse
import contextlib
import csv
import inspect
import json
import math
import os
import re
import signal
import sys
import time
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler
from tqdm import tqdm

import aim
import common
import data
import side4video
import st_adapter
import zeroi2v

# The baselines are trained as AIM is; with all weights tuned, at a tenth of the rate (ZeroI2V, appendix A.2).
BASELINE = {name: recipe | {"model": {}} for name, recipe in aim.RECIPES.items()}
BASELINE["toy"]["model"] = {"dropout": 0.0}
FINETUNE = {name: recipe | {"lr": recipe["lr"] / 10} for name, recipe in BASELINE.items()}
METHODS = {  # name: (class, recipes by dataset, reader of its authors' checkpoints, a pattern among their keys)
    "aim": (aim.AIM, aim.RECIPES, aim.load_official, r"\.T_Adapter\."),
    "zeroi2v": (zeroi2v.ZeroI2V, zeroi2v.RECIPES, zeroi2v.load_official, r"\.(S|MLP)_Adapter"),
    "st_adapter": (st_adapter.STAdapter, st_adapter.RECIPES, st_adapter.load_official, r"\.adapter_pre_"),
    "side4video_retrieval": (
        side4video.Side4VideoRetrieval,
        side4video.RETRIEVAL_RECIPES,
        side4video.load_official,
        r"\.side_proj",
    ),
    "side4video": (side4video.Side4Video, side4video.RECIPES, side4video.load_official, r"\.side_"),
    "linear_probe": (partial(common.SpaceOnly, tune="head"), BASELINE, None, None),
    "partial_finetune": (partial(common.SpaceOnly, tune="last"), BASELINE, None, None),
    "finetune": (partial(common.SpaceOnly, tune="all"), FINETUNE, None, None),
}

RETRIEVAL = {"side4video": "side4video_retrieval"}  # what a method becomes where the data are captions

# A recipe replaces these defaults, a checkpoint the recipe, and the command line everything.
SETTINGS = {
    "method": ("", f"what to train: {', '.join(METHODS)}"),
    "recipe": ("", "the dataset whose training settings are used; otherwise those of --data, or else of k400"),
    "data": ("", f"toy, {', '.join(data.DATASETS)}, a folder that holds train/CLASS and val/CLASS, or a list file"),
    "data_root": ("", "the folder of a named dataset's videos, of the paths in list files, or where toy is written"),
    "val_data": ("", "the list file to evaluate on, if --data is a list file"),
    "annotations": ("", "the folder of a named dataset's annotation files, if it is not --data-root"),
    "fold": (1, "which of the three folds of ucf101 and hmdb51"),
    "skip": ("", "a file of videos to leave out, as `python data.py check` writes it"),
    "backbone": ("ViT-B-16", "a plain CLIP ViT of open_clip or ViT of timm; the ending -quickgelu asks for QuickGELU"),
    "pretrained": ("openai", "open_clip's tag of the weights, a local file, or none for random weights"),
    "image_size": (0, "height and width of a frame in pixels; 0 is what the backbone was trained with"),
    "num_frames": (8, "frames per clip"),
    "model": ({}, "keywords of the method's class, such as ratio=0.125"),
    "epochs": (30, "passes over the training videos"),
    "warmup_epochs": (3.0, "epochs in which the learning rate rises to its peak; a cosine to 0 follows"),
    "batch_size": (64, "clips per step, over all processes and accumulated passes together"),
    "lr": (3e-4, "the peak learning rate of AdamW"),
    "lr_batch": (0, "the batch size that --lr is meant for, in proportion to which it is scaled; 0 does not scale it"),
    "embedding_lr": (1.0, "the learning rate of learned embeddings of time and place, as a multiple of --lr"),
    "clip_lr": (1.0, "the learning rate of what is tuned of CLIP itself, as a multiple of --lr"),
    "betas": ((0.9, 0.999), "of AdamW: how slowly its two running means move"),
    "weight_decay": (0.05, "of AdamW; biases, norms and embeddings do not decay"),
    "clip_grad": (0.0, "the largest norm of the gradient; 0 does not clip it"),
    "label_smoothing": (0.0, "the share of the target that is spread over all classes"),
    "augment": ({}, "keywords of data.train_transform, such as crop=0.5,1 erasing=0.25 randaugment=4,7"),
    "repeat": (1, "clips drawn from each video per epoch (repeated sampling)"),
    "span": (0, "video frames that a clip covers, at even steps; 0 takes one frame from each of T equal segments"),
    "views": ((1, 1), "test views per video: temporal x spatial; their class probabilities are averaged"),
    "precision": ("auto", "bf16, fp16 or fp32; auto is fp32 on a CPU, bf16 on a GPU that has it, and fp16 on others"),
    "accumulate": (1, "forward and backward passes per step: less memory for the same batch"),
    "recompute": (False, "compute activations again in the backward pass: less memory, more time"),
    "compile": (False, "compile the training step: minutes at the start, faster steps afterwards"),
    "seed": (0, "of new weights, of the order of the clips and of the augmentation"),
    "eval_every": (1, "epochs between evaluations; the last epoch is always evaluated"),
}
JOB = {  # what is to be done, which no checkpoint remembers
    "eval": (False, "evaluate --checkpoint"),
    "predict": ([], "name the classes of these videos or folders of videos, with --checkpoint"),
    "search": ("", "a sentence: finds the five of --videos that fit it best, with --checkpoint, trained with captions"),
    "videos": ([], "the videos or folders of videos in which to search"),
    "checkpoint": ("", "the file to evaluate or to predict with: a checkpoint.pt, or a file of the method's authors"),
    "save": ("", "the file into which --predict writes features and class probabilities by video, with torch.save"),
    "split": ("val", "the split that --eval measures: val or test"),
    "init": ("", "start from the weights of this checkpoint: a checkpoint.pt, or a file of the method's authors"),
    "resume": (False, "continue the run in --out from its last checkpoint, if there is one"),
    "out": ("", "the folder of the run, runs/METHOD-DATA if it is not given; where --eval writes its table"),
    "workers": (min(8, os.cpu_count()), "processes that load videos, per process that trains; none for toy"),
    "device": ("auto", "cpu, or auto: a GPU if there is one"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHOICES = {"method": METHODS, "precision": ("auto", *DTYPES), "device": ("auto", "cpu"), "split": ("val", "test")}
LOG_EVERY = 10  # steps between two lines of log.jsonl, where the processes meet
SAVE_EVERY = 600  # seconds between checkpoints; the end of an epoch always saves one
FAILURES = 0.05  # the share of unreadable videos above which training stops


def parameter_groups(model, run):
    """The groups of AdamW: biases, norms and embeddings do not decay; `rate` is a multiple of the learning rate."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decay = 0.0 if p.ndim < 2 or "embedding" in name else run["weight_decay"]
            rate = run["embedding_lr"] if "embedding" in name else 1.0
            rate *= run.get("clip_lr", 1.0) if name.startswith(("vit.", "text.")) else 1.0
            groups.setdefault((decay, rate), []).append(p)
    return [{"params": ps, "weight_decay": decay, "rate": rate} for (decay, rate), ps in groups.items()]


def warmup_cosine(step, steps, warmup):
    """The share of the peak learning rate at `step`: a line from 0 to 1, then half a cosine from 1 to 0."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def train(run, model, splits, train_set, val_set, out, world, checkpoint=None):
    """The training loop -> (the result of the last evaluation, why videos were skipped). checkpoint: the one to resume.
    Writes log.jsonl, checkpoint.pt, best.pt and val_classes.csv into `out`."""
    steps_per_epoch = len(train_set) * run["repeat"] // run["batch_size"]
    steps, warmup = run["epochs"] * steps_per_epoch, run["warmup_epochs"] * steps_per_epoch
    peak = run["lr"] * (run["batch_size"] / run["lr_batch"] if run["lr_batch"] else 1)
    optimizer = torch.optim.AdamW(parameter_groups(model, run), betas=run["betas"], fused=True)
    scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)
    at = dict(epoch=0, step=0, clips=0, failed=0, log=0, best=-1.0, result={}, skipped=[])  # how far the run is
    if checkpoint:
        at = checkpoint["progress"]
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
    forward = DistributedDataParallel(model, gradient_as_bucket_view=True) if world.size > 1 else model
    forward = torch.compile(forward) if run["compile"] else forward
    batches = data.train_batches(run, len(train_set), world.rank, world.size, at["epoch"], at["step"])
    batches = (batch for batch in data.loader(train_set, batches, world.workers))  # closing it ends the workers

    def contents():
        # Random frozen weights are in no other file, so that the checkpoint must hold them.
        state = model.state_dict() if run["pretrained"] == "none" else common.tuned_state(model)
        known = {"run": run, "classes": splits.classes, "state": state, "progress": at}
        return known | {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}

    watch = Watch(out, run, at, steps_per_epoch, world, contents)
    with contextlib.closing(watch), contextlib.closing(batches):
        for epoch in range(at["epoch"], run["epochs"]):
            model.train()
            for i in range(at["step"], steps_per_epoch):
                step = epoch * steps_per_epoch + i
                torch.manual_seed((1_000_003 * run["seed"] + step) * 1009 + world.rank)  # dropout, also after resuming
                rate = peak * warmup_cosine(step, steps, warmup)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["rate"]

                for _ in range(run["accumulate"]):
                    video, label, paths, problems = next(batches)  # uint8 B x T x 3 x H x W, B
                    texts = [splits.captions[path][max(k, 0)] for path, k in zip(paths, label) if splits.captions]
                    ids = [model.text.tokenize(texts)] if texts else []  # for retrieval, B x L
                    video, label, *ids = (x.to(world.device, non_blocking=True) for x in (video, label, *ids))
                    with world.autocast():
                        output = forward(common.normalize(video, model.vit), *ids)
                        loss = model.loss(output, label, run["label_smoothing"])  # B
                    scaler.scale(loss.mean() / run["accumulate"]).backward()
                    watch.forward(loss, output, label, paths, problems)
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run["clip_grad"] or math.inf)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                watch.step(norm, rate)  # every LOG_EVERY steps it writes a line; it may save, or end the run

            if (epoch + 1) % run["eval_every"] == 0 or epoch + 1 == run["epochs"]:
                watch.save()  # a run that is killed while it evaluates has lost no step
                result = evaluate(model, val_set, splits, run, world, out / "val_classes.csv", watch.signals)
                watch.evaluated(*result)
            at |= dict(epoch=epoch + 1, step=0, clips=0, failed=0)
            watch.save()
    return at["result"], at["skipped"]


@torch.no_grad()
def outputs(model, dataset, run, world, signals=()):
    """Runs the model over this process's share of a testing VideoDataset, until a signal comes.

    Yields features of all views, (B, V, D) or for retrieval (B, V, T, E); labels (B,), paths, problems.
    """
    model.eval()
    batch_size = max(run["batch_size"] // (world.size * run["accumulate"] * math.prod(run["views"])), 1)
    batches = BatchSampler(range(world.rank, len(dataset), world.size), batch_size, drop_last=False)
    batches = data.loader(dataset, batches, world.workers)
    for video, label, paths, problems in tqdm(batches, "evaluating", leave=False, disable=world.rank > 0 or None):
        if signals:
            return
        views = video.to(world.device, non_blocking=True).flatten(0, 1)  # B*V x T x 3 x H x W
        with world.autocast():
            features = model.features(common.normalize(views, model.vit))
        yield features.unflatten(0, video.shape[:2]), label, paths, problems


@torch.no_grad()
def classify(model, features, world):
    """features (B, V, D) of V views -> probabilities (B, num_classes), their mean over the views"""
    with world.autocast():
        return model.head(features).float().softmax(-1).mean(1).cpu()


def evaluate(model, dataset, splits, run, world, table, signals=()):
    """Over a testing VideoDataset, each video by exactly one process -> (result, why videos were skipped)

    result: top-1 and top-5 in percent, `top1 GROUP` for each group of classes, and the number of videos. table: the
    CSV file for one row per true class: videos, top-1, and how often each class was predicted. Where videos have
    captions in place of classes, see colab/retrieval.py."""
    if splits.captions:
        from colab import retrieval

        found = outputs(model, dataset, run, world, signals)
        return retrieval.evaluate(model, found, len(dataset), splits, world, table.with_stem("ranks"))
    C, top5, skipped = len(splits.classes), 0, []
    confusion = torch.zeros(C, C, dtype=torch.long)  # true class x predicted class
    for features, label, _, problems in outputs(model, dataset, run, world, signals):
        skipped += filter(None, problems)
        best = classify(model, features, world).topk(min(5, C)).indices[label >= 0]
        label = label[label >= 0]
        confusion.index_put_((label, best[:, 0]), torch.tensor(1), accumulate=True)
        top5 += (best == label[:, None]).sum().item()
    confusion, top5, skipped = zip(*world.gather((confusion, top5, skipped)))
    confusion, top5, skipped = sum(confusion), sum(top5), list(chain(*skipped))
    videos, right = confusion.sum(1), confusion.diag()
    if not videos.any() and (skipped or not len(dataset)):
        raise data.VideoError(f"there is no video to evaluate on{''.join(f'; {why}' for why in skipped[:1])}")

    shares = {"top1": (right.sum(), videos.sum()), "top5": (top5, videos.sum())}
    for group, names in splits.groups.items():
        chosen = [splits.classes.index(name) for name in names]
        shares[f"top1 {group}"] = right[chosen].sum(), videos[chosen].sum()
    result = {name: 100 * float(part) / max(float(whole), 1) for name, (part, whole) in shares.items()}
    if world.rank == 0:
        shown = ", ".join(f"{name} {value:.1f} %" for name, value in result.items())
        tqdm.write(f"{table.stem.split('_')[0]}: {shown} of {videos.sum()} videos")
        with open(table, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = csv.writer(file)
            rows.writerow(["class", "videos", "top1", *splits.classes])
            for c, (name, row) in enumerate(zip(splits.classes, confusion.tolist())):
                rows.writerow([name, sum(row), f"{100 * row[c] / max(sum(row), 1):.2f}", *row])
    return result | {"videos": int(videos.sum())}, skipped


def predict(model, dataset, classes, run, world, save_to=""):
    """Prints the five likeliest classes of each video. Raises VideoError, after all others, for unreadable videos.
    save_to: a file for {"classes": names, "videos": {path: {"features": (D,), "probabilities": (num_classes,)}}}."""
    found, failed = {}, []
    for features, label, paths, problems in outputs(model, dataset, run, world):
        failed += filter(None, problems)
        features, probabilities = features.float().mean(1).cpu(), classify(model, features, world)
        for k in (label >= 0).nonzero()[:, 0].tolist():
            found[paths[k]] = {"features": features[k].clone(), "probabilities": probabilities[k].clone()}
            best = probabilities[k].topk(min(5, len(classes))).indices.tolist()
            shares = (f"{100 * probabilities[k, c]:5.1f} %  {classes[c]}" for c in best)
            print(paths[k], *shares, sep="\n  ", flush=True)
    if save_to:
        common.save({"classes": classes, "videos": found}, Path(save_to))
    if failed:
        raise data.VideoError("\n  ".join(failed))


class Stop(Exception):
    """Ends a run for a reason that all processes know. Arguments: a sentence, and the exit code."""


class Watch:
    """Owns log.jsonl, the progress bar and the checkpoints, and lets the processes meet every LOG_EVERY steps.

    Losses stay on the device until then, so that the loop never waits for a step, and only what has passed a meeting is
    saved. at: how far the run is. contents: gives what a checkpoint holds. signals: SIGINT and SIGTERM, as they came.
    """

    def __init__(self, out, run, at, steps_per_epoch, world, contents):
        self.out, self.run, self.at, self.steps_per_epoch, self.world = out, run, at, steps_per_epoch, world
        self.log, self.contents, self.saved, self.signals = out / "log.jsonl", contents, time.monotonic(), []
        if world.rank == 0:
            with self.log.open("ab") as file:
                file.truncate(min(at["log"], file.tell()))  # what was logged after the last checkpoint is done again
        noted = (signal.SIGINT, signal.SIGTERM)
        self.handlers = {s: signal.signal(s, lambda signum, frame: self.signals.append(signum)) for s in noted}
        rare = {} if sys.stderr.isatty() else {"mininterval": 30}
        done, steps = at["epoch"] * steps_per_epoch + at["step"], run["epochs"] * steps_per_epoch
        self.bar = tqdm(initial=done, total=steps, unit="step", disable=world.rank > 0, dynamic_ncols=True, **rare)
        self.clear()

    def close(self):
        self.bar.close()
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)

    def clear(self):
        self.losses, self.right, self.paths, self.problems, self.norms = [], [], [], [], []
        self.began = time.monotonic()

    def forward(self, loss, output, label, paths, problems):
        """After a forward pass: loss and label (B,), output the logits (B, num_classes), or for retrieval features."""
        self.losses.append(loss.detach())
        self.right += [output.argmax(-1) == label] if torch.is_tensor(output) else []
        self.paths += paths
        self.problems += filter(None, problems)

    def step(self, norm, rate):
        """After a step: the norm of its gradient and its learning rate."""
        self.norms.append(norm)
        self.bar.update()
        self.at["step"] += 1
        due = self.at["step"] % LOG_EVERY == 0 or self.at["step"] == self.steps_per_epoch
        if due or (self.signals and self.world.size == 1):
            self.meet(rate)
            self.stop_after_a_signal()
            if time.monotonic() - self.saved > SAVE_EVERY:
                self.save()

    def meet(self, rate):
        """Reads the losses of all processes, writes a line of log.jsonl, and ends a run that cannot continue."""
        at, own, steps = self.at, len(self.paths), len(self.norms)
        losses, norms = torch.cat(self.losses).tolist(), torch.stack(self.norms).tolist()
        right = torch.cat(self.right).tolist() if self.right else []
        gathered = zip(*self.world.gather((losses, right, self.paths, self.problems)))
        losses, right, paths, problems = (list(chain(*parts)) for parts in gathered)
        at["clips"], at["failed"] = at["clips"] + len(losses), at["failed"] + len(problems)
        at["skipped"] = list(dict.fromkeys(at["skipped"] + problems))

        done = at["epoch"] * self.steps_per_epoch + at["step"]
        bad = [(k % own // (own // steps), paths[k]) for k, loss in enumerate(losses) if not math.isfinite(loss)]
        steep = [k for k, norm in enumerate(norms) if not math.isfinite(norm)]
        if bad:
            step, clips = min(bad)[0], ", ".join(path for step, path in bad if step == min(bad)[0])
            raise Stop(f"the loss is not finite at step {done - steps + 1 + step} for {clips}; try a smaller --lr", 2)
        if steep and self.world.dtype != torch.float16:  # whose scaler leaves such steps out
            raise Stop(f"the gradient is not finite at step {done - steps + 1 + steep[0]}; try a smaller --lr", 2)
        if at["failed"] > max(FAILURES * at["clips"], 10) or at["failed"] == at["clips"]:
            few = f"{at['failed']} of {at['clips']} training videos cannot be read"
            raise Stop(f"{few}, more than {FAILURES:.0%}; the last: {at['skipped'][-1]}", 2)

        loss, top1 = sum(losses) / len(losses), 100 * sum(right) / len(losses) if right else None
        line = {"epoch": at["epoch"] + 1, "step": done, "loss": loss, "top1": top1, "lr": rate}
        line |= {"grad_norm": None if steep else norms[-1], "overflows": len(steep)}
        self.write(line | {"clips_per_second": (pace := len(losses) / (time.monotonic() - self.began))})
        shown = f"loss {loss:.3f}, top-1 {top1:.1f} %" if right else f"loss {loss:.3f}"
        where = f"epoch {line['epoch']}/{self.run['epochs']}, {shown}, {pace:.3g} clips/s"
        self.bar.set_postfix_str(where, refresh=False)
        self.clear()

    def stop_after_a_signal(self):
        """Saves and ends the run if a signal came to any process."""
        signals = list(chain(*self.world.gather(self.signals)))
        if signals:
            self.save()
            where = f"stopped and saved after step {self.at['step']} of epoch {self.at['epoch'] + 1}"
            raise Stop(f"{where}; continue with\n    train.py --resume --out {self.out}", 128 + max(signals))

    def evaluated(self, result, skipped):
        """After an evaluation that ends an epoch: writes its line, and best.pt if it was the best."""
        self.stop_after_a_signal()
        at, epoch = self.at, self.at["epoch"] + 1
        at |= {"result": result, "skipped": list(dict.fromkeys(at["skipped"] + skipped))}
        self.write({"epoch": epoch, "step": epoch * self.steps_per_epoch, "val": result})
        score = next(iter(result.values()))  # top-1, or the R@1 of text-to-video
        if score > at["best"]:
            at["best"] = score
            self.save("best.pt")
        self.clear()  # the time of evaluating is not that of the next steps

    def save(self, name="checkpoint.pt"):
        if self.world.rank == 0:
            self.at["log"], self.saved = self.log.stat().st_size, time.monotonic()
            common.save(self.contents(), self.out / name)

    def write(self, line):
        if self.world.rank == 0:
            with self.log.open("a") as file:
                file.write(json.dumps(line) + "\n")


class World(NamedTuple):
    """This process among all of a run: where and in which dtype it computes, and how it talks to the others."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    workers: int = 0  # the processes that load videos for this one
    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls, device="auto", precision="auto", workers=0):
        """The process as torchrun started it, or the only one."""
        gpu = device != "cpu" and torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
        if gpu:
            torch.cuda.set_device(device)
        if precision == "auto":
            precision = "fp32" if not gpu else "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
        if "RANK" not in os.environ:
            return cls(device, DTYPES[precision], workers)
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=2))  # they wait for slow disks
        return cls(device, DTYPES[precision], workers, dist.get_rank(), dist.get_world_size())

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def gather(self, value):
        """The values of all processes, as a list."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values


def read(path):
    """A checkpoint of this file, or one that a method's authors released, which is recognised by its keys. The latter
    comes as {"run": {"method": ...}, "classes": numbers, "official": what the file holds}. No code in it is run."""
    checkpoint = common.read_checkpoint(path)
    if {"run", "classes", "state"} <= checkpoint.keys():
        return checkpoint
    rest = {key: value for key, value in checkpoint.items() if key != "clip"}  # ST-Adapter's has CLIP beside it
    tensors = common.tensors_of(checkpoint) | common.tensors_of(rest)
    keys = "\n".join(tensors)
    method = next((name for name, (*_, pattern) in METHODS.items() if pattern and re.search(pattern, keys)), None)
    head = next((t for key, t in tensors.items() if re.search(r"(^|\.)fc(_cls)?\.weight$", key)), ())
    if method is None or (method not in RETRIEVAL.values() and not len(head)):
        raise ValueError(f"{path} is neither a checkpoint of train.py nor one that the authors of a method released")
    # A file that holds the frozen weights as well needs no others, and no name leads to them.
    whole = {"pretrained": "none"} if re.search(r"(class_embedding|cls_token)$", keys, re.MULTILINE) else {}
    return {"run": {"method": method} | whole, "classes": [str(c) for c in range(len(head))], "official": checkpoint}


def build(run, classes, checkpoint=None, init=False):
    """The model of a run, on the CPU, with the checkpoint's weights; init: other classes have a new classifier."""
    torch.manual_seed(run["seed"])
    pretrained = None if run["pretrained"] == "none" else run["pretrained"]
    clip = common.load_clip(run["backbone"], pretrained, run["image_size"] or None, run["method"] in RETRIEVAL.values())
    cls, _, load_official, _ = METHODS[run["method"]]
    known = checkpoint["classes"] if checkpoint else classes
    parts = clip if run["method"] in RETRIEVAL.values() else (clip, len(known))  # both towers, or the number of classes
    model = cls(*parts, num_frames=run["num_frames"], **run["model"])
    if checkpoint and "official" in checkpoint:
        load_official(model, checkpoint["official"])
        known = classes if len(known) == len(classes) else known  # such files do not name their classes
    elif checkpoint:
        common.load_tuned(model, checkpoint["state"], "that was named")
    if known != classes and not init:
        raise ValueError(f"the checkpoint knows {len(known)} classes, which are not the {len(classes)} of the data")
    if known != classes:
        torch.manual_seed(run["seed"])
        model.head = common.classifier(model.head.in_features, len(classes))
    return model


def load_model(path, **flags):
    """A trained model for use in Python -> (model in eval mode on the CPU, names of its classes)

    path: ours or released; flags: what the latter does not tell, such as backbone="ViT-L-14". The model takes
    `common.normalize(video, model.vit)` of uint8 video (B, T, 3, H, W).
    """
    checkpoint = read(path)
    return build(settings(flags, checkpoint), checkpoint["classes"], checkpoint).eval(), checkpoint["classes"]


SHAPE = ("method", "backbone", "pretrained", "image_size", "num_frames", "model")  # what --init takes over
RESUMED = (*SHAPE, "recipe", "seed", "batch_size", "repeat", "weight_decay", "embedding_lr")  # --resume: no change
PLACES = ("data_root", "val_data", "annotations", "skip", "fold")  # what belongs to --data


def recipe_of(method, name, backbone, recipe=""):
    """The method's settings for the dataset `name` and the backbone, as its paper or its authors' code has them."""
    recipes, source = METHODS[method][1], data.DATASETS.get(name)
    names = [recipe] if recipe else [name, source.recipe if source else "", *recipes]  # other videos are as Kinetics
    name = next((name for name in names if name in recipes), None)
    if name is None:
        raise ValueError(f"{method} has no recipe {recipe!r}; it has {', '.join(k for k in recipes if ' ' not in k)}")
    sized = next(
        (key for key in recipes if " " in key and f"{name} {backbone.replace('/', '-')}".startswith(key)), name
    )
    return recipes[sized] | (source.sampling if source else {})


def settings(flags, checkpoint=None, init=False, resume=False):
    """defaults | recipe | the checkpoint's run | flags -> the run, a dict of plain values with the keys of SETTINGS. In
    flags, `model` and `augment` are lists of KEY=VALUE. Raises ValueError."""
    named = {"toy", *data.DATASETS}  # all other places are kept whole, so that a checkpoint can be used from any folder
    for name in {"data", "pretrained", *PLACES} & flags.keys() - {"fold"}:
        if name == "data_root" or (flags[name] not in named and os.path.exists(flags[name])):
            flags[name] = os.path.abspath(flags[name])
    theirs = checkpoint["run"] if checkpoint else {}
    left = set(theirs) - set(SHAPE) if init else set(PLACES) if "data" in flags else set()
    theirs = {name: value for name, value in theirs.items() if name not in left}
    method, source, backbone, recipe = ((theirs | flags).get(k, "") for k in ("method", "data", "backbone", "recipe"))
    if method not in METHODS:
        raise ValueError("say what to train with --method and --data, or name a file with --checkpoint or --init")

    captions = source in data.DATASETS and data.DATASETS[source].captions
    if captions and method in RETRIEVAL:
        method = flags["method"] = RETRIEVAL[method]
    if source and captions != (method in RETRIEVAL.values()):
        raise ValueError(
            f"{method} does not fit {source}: captions are for {', '.join(RETRIEVAL)}, classes for the others"
        )

    run = {name: default for name, (default, _) in SETTINGS.items()}
    run |= recipe_of(method, source, backbone, recipe)
    run |= theirs
    run["lr_batch"] = 0 if "lr" in flags else run["lr_batch"]  # the rate that was asked for is the rate
    for name, function in (("model", METHODS[method][0]), ("augment", data.train_transform)):
        parameters = inspect.signature(function).parameters
        known = {key: p.default for key, p in parameters.items() if p.default is not p.empty and key != "num_frames"}
        for key, _, text in (item.partition("=") for item in flags.pop(name, [])):
            if key not in known:
                raise ValueError(f"{key!r} cannot be set; what can be set as KEY=VALUE: {', '.join(known)}")
            run[name] = run[name] | {key: literal(text, known[key], key)}
    run |= flags
    if checkpoint and "official" in checkpoint and re.fullmatch(r"ViT-\w-\d+(-\d+)?", run["backbone"]):
        run["backbone"] += "-quickgelu"  # the authors start from OpenAI's CLIP, which their files do not say
    fixed = {"method", "backbone"} | set(RESUMED if resume else ())
    fixed |= {"pretrained"} if theirs.get("pretrained") == "none" else set()
    for name in fixed & theirs.keys():
        if run[name] not in (theirs[name], str(theirs[name]).removesuffix("-quickgelu")):
            raise ValueError(f"the checkpoint was made with {name} {theirs[name]}, which cannot become {run[name]}")
        run[name] = theirs[name]
    return run


def literal(text, default, name):
    """What `text` means for a setting with this default: a value of the same kind, or ValueError."""
    try:
        if isinstance(default, tuple):
            return tuple(type(part)(one) for part, one in zip(default, text.split(","), strict=True))
        return {"true": True, "false": False}[text] if isinstance(default, bool) else type(default)(text)
    except (KeyError, ValueError):
        raise ValueError(f"{name} cannot be {text!r}; an example of a value is {default}") from None


def parse(argv):
    """The command line -> (what to do, with all keys of JOB; the settings that were given)"""
    how = dict(formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    usage = "python train.py --method NAME --data DATA [...]; --help has the rest"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__, allow_abbrev=False, **how)
    for name, (default, text) in (JOB | SETTINGS).items():
        flag = "--set" if name == "model" else f"--{name.replace('_', '-')}"
        kind = dict(action="store_true") if default is False else dict(choices=CHOICES.get(name), metavar="VALUE")
        kind |= dict(nargs="+") if isinstance(default, (list, dict)) else {}
        parser.add_argument(flag, dest=name, help=f"{text} (default: {default!r})", **kind)
    given = vars(parser.parse_args(argv))
    for name in [name for name, text in given.items() if isinstance(text, str)]:
        given[name] = literal(given[name], (JOB | SETTINGS)[name][0], name)
    return {name: given.pop(name, default) for name, (default, _) in JOB.items()}, given


def unlabelled(paths, classes=()):
    """Videos of which nothing is known, as a split to evaluate"""
    return data.Data(train=[], val=[data.Clip(path, 0) for path in paths], test=[], classes=classes)


def start(job, flags):
    """Does the job -> the result of the evaluation (None for --predict and --search). Raises ValueError and OSError."""
    training = not (job["eval"] or job["predict"] or job["search"])
    checkpoint = None if training and not job["init"] else read(job["init"] if training else job["checkpoint"])
    method = flags.get("method") or (checkpoint["run"]["method"] if checkpoint else "")
    out = Path(job["out"] or f"runs/{method}-{Path(flags.get('data', '')).stem}")
    resume = training and job["resume"] and (out / "checkpoint.pt").exists()
    checkpoint, init = read(out / "checkpoint.pt") if resume else checkpoint, training and not resume
    run = settings(flags, checkpoint, init, resume)

    if job["predict" if run["method"] in RETRIEVAL.values() else "search"]:
        raise ValueError("--search is for checkpoints that were trained with captions, --predict is for all others")

    world = World.here(job["device"], run["precision"], job["workers"])
    if job["predict"] or job["search"]:
        paths = data.video_files_in(job["predict"] or job["videos"])
        splits = unlabelled(paths, checkpoint["classes"])
    else:
        splits = data.find_clips(run["data"], **{name.replace("data_root", "root"): run[name] for name in PLACES})
    if world.rank == 0 and splits.missing:
        print(*splits.missing, sep="\n", flush=True)
    model = build(run, splits.classes, checkpoint, init).to(world.device)
    common.cast_frozen(model, world.dtype)
    if run["recompute"]:
        common.recompute(model)

    if job["search"]:
        from colab import retrieval

        def found(paths):
            return outputs(model, data.datasets(run, unlabelled(paths), "val", model.vit.image_size)[1], run, world)

        return retrieval.search(model, job["search"], paths, found, job["checkpoint"], run, world)
    train_set, test_set = data.datasets(run, splits, job["split"], model.vit.image_size)
    if job["predict"]:
        return predict(model, test_set, splits.classes, run, world, job["save"])
    out = out if training or job["out"] else Path(job["checkpoint"]).parent
    out.mkdir(parents=True, exist_ok=True)
    if job["eval"]:
        result, skipped = evaluate(model, test_set, splits, run, world, out / f"{job['split']}_classes.csv")
    else:
        clips, passes = len(train_set) * run["repeat"], world.size * run["accumulate"]
        if run["batch_size"] % passes or clips < run["batch_size"]:
            rule = f"a multiple of {passes} (processes x accumulated passes) and at most the {clips} clips of an epoch"
            raise ValueError(f"--batch-size {run['batch_size']} must be {rule}")
        if world.rank == 0:
            with open(out / "run.json", "w" if job["resume"] else "x") as file:  # the folder of a run belongs to it
                json.dump(run, file, indent=1)
            print(*(f"{name}={value}" for name, value in run.items() if value != ""), flush=True)
        result, skipped = train(run, model, splits, train_set, test_set, out, world, checkpoint if resume else None)
    if world.rank == 0:
        total, tuned = (f"{n / 1e6:.2f} M" for n in common.count_parameters(model))
        (out / "skipped.txt").write_bytes(os.fsencode("".join(f"{why}\n" for why in skipped)))
        print(f"{tuned} of {total} parameters tuned; {len(skipped)} videos could not be read; the rest is in {out}")
    return result


def main(argv=None):
    """Does what the command line says -> the result of the evaluation, a dict (None with --predict)"""
    try:
        return start(*parse(argv))
    except Stop as stop:
        sentence, code = stop.args
        sentence = sentence if int(os.environ.get("RANK", 0)) == 0 else ""  # the first process tells it
    except FileExistsError as error:
        sentence, code = f"{error.filename} is of another run: --resume continues it, another --out begins a new one", 2
    except (ValueError, OSError) as error:
        sentence, code = error, 2
    except KeyboardInterrupt:
        sentence, code = "stopped", 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    print(f"\ntrain.py: {sentence}" if sentence else "", file=sys.stderr, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
