"""Train, evaluate and use the video models: one plain loop for all methods and datasets.

    python train.py --method aim --data toy                              a result in minutes, nothing to download
    python train.py --method aim --data k400 --data-root /data/k400      a dataset as its site or a mirror gives it
    python train.py --method aim --data my_videos                        my_videos/{train,val}/CLASS/*.mp4
    python train.py --method aim --data train.txt --val-data val.txt     list files, `path label` a line
    torchrun --nproc_per_node 8 train.py --method aim --data ...         the same on eight GPUs
    python train.py --eval --checkpoint runs/aim-toy/checkpoint.pt       its accuracy again, on any data or split
    python train.py --predict CLIP.mp4 --checkpoint runs/aim-toy/checkpoint.pt

Every setting comes from the method's recipe (`RECIPES` in its file); flags override it.
"""

import argparse
import contextlib
import inspect
import json
import math
import os
import sys
import time
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
DEFAULTS = dict(  # of everything that a recipe may leave open
    backbone="ViT-B-16", pretrained="openai", image_size=None, quick_gelu=None, num_frames=8, model={},
    data_root=None, val_data=None, annotations=None, fold=1, skip=None, span=0, views=(1, 1), augment={}, repeat=1,
    temporal_lr=1.0, clip_grad=0.0, label_smoothing=0.0, accumulate=1, eval_every=1,
    precision=None, recompute=False, seed=0,
)  # fmt: skip
FAILURES = 0.05  # the share of unreadable videos above which training stops
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def natural(text, least=0):
    if int(text) < least:
        raise argparse.ArgumentTypeError(f"must be {least} or more")
    return int(text)


number = partial(natural, least=1)


def parse(argv):
    as_is = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=as_is, allow_abbrev=False)
    job = p.add_argument_group("what to do")
    job.add_argument("--method", choices=METHODS, help="train this method")
    job.add_argument("--eval", action="store_true", help="evaluate --checkpoint instead")
    job.add_argument("--predict", nargs="+", metavar="VIDEO", help="name the five likeliest classes by --checkpoint")
    job.add_argument("--checkpoint", type=Path, help="the checkpoint.pt to evaluate or to predict with")
    job.add_argument("--resume", action="store_true", help="go on with the last run of this name, or the one in --out")
    job.add_argument("--out", type=Path, help="the run's folder (default: runs/METHOD-DATA, numbered if taken)")
    job.add_argument("--seed", type=natural, help="of the new weights, the order and the augmentation (default: 0)")

    data = p.add_argument_group("data")
    names = ", ".join(["toy", *DATASETS])
    data.add_argument("--data", help=f"{names}, a folder with train/CLASS and val/CLASS, or a list file")
    data.add_argument("--val-data", help="the list file to evaluate on, if --data is one")
    root = (
        "where a named dataset's videos are, what list files' paths start at, where toy is written (default: datasets)"
    )
    data.add_argument("--data-root", help=root)
    data.add_argument("--annotations", help="where a named dataset's annotation files are (default: --data-root)")
    data.add_argument("--fold", type=number, choices=(1, 2, 3), help="of UCF101's and HMDB51's three (default: 1)")
    data.add_argument("--skip", help="a file of videos to leave out, as `python data.py check` writes")
    data.add_argument("--split", choices=("val", "test"), default="val", help="what --eval evaluates on (default: val)")
    data.add_argument("--workers", type=natural, help="loader processes (default: a core each, at most 8; toy: none)")

    model = p.add_argument_group("model (default: the recipe's)")
    model.add_argument("--backbone", help="a plain-ViT CLIP of open_clip: ViT-B-16, ViT-L-14, ...")
    model.add_argument("--pretrained", help="open_clip's tag of its weights, a local file, or none: random weights")
    model.add_argument("--num-frames", "--frames", type=number, metavar="T", help="frames a clip")
    model.add_argument("--image-size", type=number, help="pixels a side (default: what the backbone was trained at)")
    keywords = "keywords of the method's class: ratio=0.125 blocks=top"
    model.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help=keywords)

    recipe = p.add_argument_group("recipe (default: the method's for this data)")
    recipe.add_argument("--recipe", help="whose settings to start from: k400, ssv2, ... (default for own data: k400)")
    for name, kind, text in (
        ("epochs", number, None),
        ("warmup-epochs", float, "linear warm-up from 0, then a cosine to 0, both by step"),
        ("batch-size", number, "clips a step, over all processes and accumulated passes"),
        ("lr", float, "peak learning rate of AdamW"),
        ("temporal-lr", float, "the temporal embedding's learning rate, as a multiple of --lr"),
        ("weight-decay", float, "none on biases, norms and embeddings"),
        ("clip-grad", float, "largest gradient norm; 0: no clipping"),
        ("label-smoothing", float, None),
        (
            "span",
            natural,
            "video frames that a clip spans, T at even steps; 0: one from each of T segments of the video",
        ),
    ):
        recipe.add_argument(f"--{name}", type=kind, help=text)
    recipe.add_argument(
        "--views", nargs=2, type=number, metavar=("TEMPORAL", "SPATIAL"), help="evaluation views a video"
    )
    recipe.add_argument("--eval-every", type=number, metavar="N", help="evaluate every N epochs and after the last")

    device = p.add_argument_group("device")
    device.add_argument("--device", choices=("cuda", "cpu"), help="(default: cuda if there is one)")
    device.add_argument("--precision", choices=DTYPES, help="of autocast (default: bf16 or fp16 on a GPU, else fp32)")
    redo = "keep a fifth to a third for the backward pass and compute the rest again, in a fifth to a third more time"
    device.add_argument("--recompute", action="store_true", default=None, help=redo)
    device.add_argument(
        "--accumulate", type=number, metavar="N", help="passes a step: less memory, same batch (batch norm sees a pass)"
    )
    args = p.parse_args(argv)

    fixed = [flag for flag in ("set", "recipe", "weight_decay", "temporal_lr") if getattr(args, flag) not in (None, [])]
    if fixed and args.checkpoint:
        p.error(f"--{fixed[0].replace('_', '-')} is fixed by the checkpoint")
    if args.eval or args.predict:
        if args.checkpoint is None or args.resume:
            p.error("--eval and --predict need --checkpoint FILE, and take no --resume")
    elif args.split != "val":
        p.error("--split goes with --eval: training is watched on val")
    elif args.checkpoint:
        p.error("--checkpoint goes with --eval or --predict; to go on with a run use --resume")
    elif args.method is None or args.data is None:
        p.error("say what to train: --method NAME --data DATA (or --eval / --predict with --checkpoint FILE)")
    return args


def settings(args):
    """A run's whole description as plain values, for its checkpoint: the method's recipe, overridden by flags."""
    cls, recipes = METHODS[args.method]
    source = DATASETS.get(args.data)
    name = args.recipe or (source.recipe if source else args.data)
    if name not in recipes and args.recipe is None:
        name = "k400"  # what a method's paper does not tell is done as on Kinetics, but for the sampling
    if name not in recipes:
        raise ValueError(f"{args.method} has no recipe {name!r}; choose from {', '.join(recipes)}")
    backbone = f"{name} {args.backbone}".replace("/", "-")
    own = [key for key in recipes if " " in key and backbone.startswith(key)]  # some ViTs have their own
    recipe = recipes[own[0] if own else name]
    sampling = source.sampling if source and name != source.recipe else {}
    run = {**DEFAULTS, **recipe, **sampling, "method": args.method, "data": args.data, "recipe": name}
    run["model"] = dict(run["model"])
    if args.backbone and args.backbone != run["backbone"]:
        run["pretrained"] = DEFAULTS["pretrained"]
    override(run, args)
    allowed = {k: type(p.default) for k, p in inspect.signature(cls).parameters.items() if p.default is not p.empty}
    allowed = {k: kind for k, kind in allowed.items() if k not in ("num_frames", "tune")}
    readers = {bool: {"true": True, "false": False}.__getitem__, tuple: lambda text: tuple(map(int, text.split("x")))}
    for item in args.set:
        key, equals, value = item.partition("=")
        if not equals or key not in allowed:
            raise ValueError(
                f"--set {item}: KEY=VALUE, where {args.method} knows the keys {', '.join(sorted(allowed))}"
            )
        try:
            value = readers.get(allowed[key], allowed[key])(value)
        except (KeyError, ValueError):
            kinds = {bool: "true or false", tuple: "numbers like 3x1x1"}
            kind = kinds.get(allowed[key], f"of type {allowed[key].__name__}")
            raise ValueError(f"--set {item}: the value must be {kind}") from None
        run["model"][key] = value
    return run


def override(run, args):
    """Flags that were given replace the values of `run`."""
    run.update({key: value for key, value in vars(args).items() if key in run and key != "model" and value is not None})
    if run["pretrained"] == "none":
        run["pretrained"] = None
    if run["precision"] is None:
        on_gpu = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp16"
        run["precision"] = on_gpu if device_of(args).type == "cuda" else "fp32"


def device_of(args):
    if args.device == "cpu" or not (args.device or torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch finds no GPU; leave the flag out to run on the CPU")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def build(run, num_classes, device):
    """The model that `run` describes; frozen weights in half precision where a GPU computes in it."""
    torch.manual_seed(run["seed"])
    clip = common.load_clip(run["backbone"], run["pretrained"], run["image_size"], run["quick_gelu"])
    cls, _ = METHODS[run["method"]]
    model = cls(clip, num_classes, num_frames=run["num_frames"], **run["model"]).to(device)
    if run["recompute"]:
        common.recompute(model)
    if device.type == "cuda" and run["precision"] != "fp32":
        common.cast_frozen(model, DTYPES[run["precision"]])
    return model


def autocast(run, device):
    return torch.autocast(device.type, DTYPES[run["precision"]], enabled=run["precision"] != "fp32")


class Place(NamedTuple):
    """Where this process computes, and which of how many it is."""

    device: torch.device
    rank: int
    world: int
    workers: int

    def batches(self, dataset, indices, batch_size):
        pin = self.device.type == "cuda"
        return DataLoader(Subset(dataset, indices), batch_size, num_workers=self.workers, pin_memory=pin)


def sum_over_processes(tensor):
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(texts):
    """The texts of all processes, each once."""
    parts = [texts]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, texts)
    return list(dict.fromkeys(text for part in parts for text in part))


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


def epoch_order(run, num_clips, epoch, place, micro):
    """This process's clips in this epoch, in order; a global batch holds the same clips for any number of processes."""
    generator = torch.Generator().manual_seed(1_000_003 * run["seed"] + epoch)
    order = torch.randperm(num_clips, generator=generator)
    again = num_clips * torch.arange(run["repeat"])  # repeated sampling: item i + k num_clips is clip i, drawn anew
    order = (order[:, None] + again).flatten()
    order = order[: len(order) // run["batch_size"] * run["batch_size"]]
    return order.view(-1, place.world, micro)[:, place.rank].flatten().tolist()


def train(run, model, train_set, val_set, data, out, place, resumed=None):
    """The loop; a checkpoint and a line of log.jsonl each epoch -> (last evaluation, videos that were skipped)"""
    device, rank, world, _ = place
    micro = run["batch_size"] // (world * run["accumulate"])
    steps_per_epoch = len(train_set) * run["repeat"] // run["batch_size"]
    steps, warmup = run["epochs"] * steps_per_epoch, run["warmup_epochs"] * steps_per_epoch
    optimizer = torch.optim.AdamW(parameter_groups(model, run), lr=run["lr"], fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=run["precision"] == "fp16")
    first_epoch, result, skipped = 0, {}, []
    if resumed:
        optimizer.load_state_dict(resumed["optimizer"])
        scaler.load_state_dict(resumed["scaler"])
        first_epoch, result, skipped = resumed["epoch"], resumed["result"], resumed["skipped"]
    parallel = model
    if world > 1:
        parallel = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)

    bar = tqdm(total=steps, initial=first_epoch * steps_per_epoch, disable=rank > 0, unit="step", dynamic_ncols=True)
    for epoch in range(first_epoch, run["epochs"]):
        started = time.time()
        model.train()
        train_set.epoch = epoch
        batches = iter(place.batches(train_set, epoch_order(run, len(train_set), epoch, place, micro), micro))
        seen = failed = 0
        totals = torch.zeros(3, device=device)  # clips, summed loss, clips classified rightly
        for i in range(steps_per_epoch):
            step = epoch * steps_per_epoch + i
            torch.manual_seed((1_000_003 * run["seed"] + step) * 1009 + rank)  # a resumed run drops out the same
            for group in optimizer.param_groups:
                group["lr"] = run["lr"] * group["rate"] * warmup_cosine(step, steps, warmup)
            for accumulated in range(run["accumulate"]):
                video, label, problems = next(batches)
                skipped += filter(None, problems)
                seen, failed = seen + micro, failed + sum(map(bool, problems))
                if label.min() < 0:
                    raise VideoError(f"{TRIES} training videos in a row cannot be read; the first: {skipped[-1]}")
                if failed > max(FAILURES * seen, 10):
                    few = f"{failed} of {seen} training videos cannot be read"
                    raise VideoError(f"{few}, more than {FAILURES:.0%}; the last: {skipped[-1]}")
                video, label = video.to(device, non_blocking=True), label.to(device, non_blocking=True)
                reduce = world == 1 or accumulated == run["accumulate"] - 1
                with autocast(run, device), contextlib.nullcontext() if reduce else parallel.no_sync():
                    logits = parallel(common.normalize(video, model.vit))
                    loss = F.cross_entropy(logits.float(), label, label_smoothing=run["label_smoothing"])
                    scaler.scale(loss / run["accumulate"]).backward()
                right = (logits.argmax(1) == label).sum()
                totals += torch.stack([torch.full_like(loss, micro), loss.detach() * micro, right])
            scaler.unscale_(optimizer)
            if run["clip_grad"]:
                torch.nn.utils.clip_grad_norm_(model.parameters(), run["clip_grad"])
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            bar.update()
            if i % 10 == 9 or i == steps_per_epoch - 1:  # nowhere else does the loop wait for the device
                clips, loss_sum, right = totals.tolist()
                if not math.isfinite(loss_sum):
                    raise FloatingPointError(f"the loss is not finite at step {step}; try a smaller --lr")
                where = f"epoch {epoch + 1}/{run['epochs']}"
                bar.set_postfix_str(f"{where}, loss {loss_sum / clips:.3f}, top-1 {100 * right / clips:.1f} %")

        clips, loss_sum, right = sum_over_processes(totals).tolist()
        line = {"epoch": epoch + 1, "train_loss": loss_sum / clips, "train_top1": 100 * right / clips}
        if (epoch + 1) % run["eval_every"] == 0 or epoch + 1 == run["epochs"]:
            result, problems = evaluate(model, val_set, data, run, place)
            skipped += problems
            line |= result
        skipped = gather(skipped)
        line |= {"lr": optimizer.param_groups[0]["lr"], "seconds": round(time.time() - started, 1)}
        if rank == 0:
            # A random backbone is in no file but this one.
            state = model.state_dict() if run["pretrained"] is None else common.tuned_state(model)
            progress = {
                "epoch": epoch + 1,
                "skipped": skipped,
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
            }
            names = {"classes": data.classes, "groups": data.groups}
            out.mkdir(parents=True, exist_ok=True)
            (out / "run.json").write_text(json.dumps(run, indent=1))
            save({"run": run, "state": state, "result": result, **names, **progress}, out / "checkpoint.pt")
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            val = f", val {describe(result)}" if "top1" in line else ""
            lost = f", {failed} videos skipped by this process" if failed else ""
            bar.write(
                f"epoch {epoch + 1}: train loss {line['train_loss']:.3f}, top-1 {line['train_top1']:.1f} %{val}{lost}"
            )
    bar.close()
    return result, skipped


def save(checkpoint, path):
    """Writes beside `path`, then renames: if anything stops the writing, the old checkpoint is still whole."""
    beside = path.with_suffix(".partial")
    with open(beside, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def load(path):
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["run"] = {**DEFAULTS, **checkpoint["run"]}  # an older one lacks newer settings
        checkpoint["state"]
    except Exception as e:  # whatever the unpickler says of a file that is not ours
        raise ValueError(f"{path} is not a checkpoint of train.py, or it is damaged") from e
    return checkpoint


@torch.no_grad()
def evaluate(model, dataset, data, run, place):
    """Top-1 and top-5 in percent over a testing VideoDataset, every video counted once -> (result, skipped videos)

    `result` also has the top-1 over each of `data.groups`: clips of those classes, predicted among all classes.
    """
    model.eval()
    if dist.is_initialized():  # each process has its own statistics of batch norms; the checkpoint has the first's
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    views = math.prod(run["views"])
    device, rank, world, _ = place
    own = range(rank, len(dataset), world)
    batches = place.batches(dataset, own, max(run["batch_size"] // (world * views), 1))
    counts = torch.zeros(3, len(data.classes), device=device)  # by class: videos, right at first, right among five
    problems = []
    for video, label, problem in tqdm(batches, desc="evaluating", leave=False, disable=rank > 0, dynamic_ncols=True):
        problems += filter(None, problem)
        readable = label >= 0
        if not readable.any():
            continue
        label = label[readable].to(device)
        best = probabilities(model, video[readable], run, device).topk(min(5, len(data.classes))).indices
        hits = best == label[:, None]
        for row, hit in zip(counts, (torch.ones_like(label), hits[:, 0], hits.any(1))):
            row.index_add_(0, label, hit.float())
    counts = sum_over_processes(counts).cpu()
    problems = gather(problems)

    videos, right, among_five = counts.sum(1).tolist()
    if not videos:
        raise VideoError(f"none of the {len(dataset)} videos to evaluate can be read; the first: {problems[0]}")
    result = {"top1": 100 * right / videos, "top5": 100 * among_five / videos, "videos": int(videos)}
    for group, names in data.groups.items():
        videos, right, _ = counts[:, [data.classes.index(name) for name in names]].sum(1).tolist()
        result[f"top1 {group}"] = 100 * right / max(videos, 1)
    return result, problems


def probabilities(model, video, run, device):
    """uint8 video (B, V, T, 3, H, W) -> class probabilities (B, num_classes), the mean over the V views"""
    video = video.to(device, non_blocking=True)
    with autocast(run, device):
        logits = model(common.normalize(video.flatten(0, 1), model.vit))
    return logits.float().softmax(-1).unflatten(0, video.shape[:2]).mean(1)


def describe(result):
    """The top-1, with that of each group of classes, or else the top-5."""
    parts = [f"{key.removeprefix('top1 ')} {value:.1f} %" for key, value in result.items() if key.startswith("top1 ")]
    parts = parts or [f"top-5 {result['top5']:.1f} %"]
    return f"top-1 {result['top1']:.1f} % ({', '.join(parts)})"


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
        print(
            clip.path,
            *(f"{100 * share:5.1f} %  {classes[c]}" for share, c in zip(p.tolist(), best.tolist())),
            sep="\n  ",
        )
    if problems:
        raise VideoError("; ".join(problems))


def run_folder(args):
    """Where the run lives: --out, or runs/METHOD-DATA with the first free number, or the last taken one to resume."""
    if args.out:
        if args.out.is_file():
            raise ValueError(f"--out {args.out} is a file; name a folder")
        if (args.out / "checkpoint.pt").exists() and not args.resume:
            raise ValueError(f"{args.out} holds a run already: --resume goes on with it, or choose another --out")
        return args.out
    base = Path("runs") / f"{args.method}-{Path(args.data).stem}"
    last, count, out = None, 1, base
    while (out / "checkpoint.pt").exists():
        last, count = out, count + 1
        out = base.with_name(f"{base.name}-{count}")
    if args.resume and last is None:
        raise FileNotFoundError(f"--resume: there is no {base / 'checkpoint.pt'} yet")
    return last if args.resume else out


def check_resumable(checkpoint, args):
    """Flags may lengthen a resumed run or change its rate; what its checkpoint fixes they may only repeat."""
    if "optimizer" not in checkpoint:
        raise ValueError("a merged checkpoint can be evaluated, but not resumed: it has no optimiser state")
    run, asked = checkpoint["run"], settings(args)
    given = {
        "recipe": args.recipe,
        "model": args.set,
        "weight_decay": args.weight_decay,
        "temporal_lr": args.temporal_lr,
    }
    for key, flag in given.items():
        if flag not in (None, []) and asked[key] != run[key]:
            raise ValueError(f"this run was begun with {key} {run[key]}, not {asked[key]}: --resume cannot change that")
    if args.epochs and args.epochs < checkpoint["epoch"]:
        raise ValueError(f"--epochs {args.epochs}: this run has done {checkpoint['epoch']} already")


def prepare(args):
    """All that can go wrong before the first step -> (job, its keywords). Writes nothing but the toy videos."""
    rank, world, device = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), device_of(args)
    out = None if args.eval or args.predict else run_folder(args)
    path = out / "checkpoint.pt" if args.resume else args.checkpoint
    checkpoint = load(path) if path else None
    if checkpoint:
        run = checkpoint["run"]
        if args.method not in (None, run["method"]):
            raise ValueError(f"this checkpoint is of --method {run['method']}, not {args.method}")
        if args.resume:
            check_resumable(checkpoint, args)
        if device.type == "cpu" and not args.resume:
            run["precision"] = None  # a GPU's is no choice for a CPU
        if args.data:
            run.update(
                data_root=None, val_data=None, annotations=None, skip=None
            )  # those were of the data of the checkpoint
        override(run, args)
    else:
        run = settings(args)
    passes = world * run["accumulate"]
    if run["batch_size"] % passes:
        raise ValueError(
            f"--batch-size {run['batch_size']} is no multiple of {passes} (processes x accumulated passes)"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    if not args.predict:
        for turn in (0, 1):  # process 0 first: it may have to write the toy videos
            if turn == min(rank, 1):
                where = {key: run[key] for key in ("val_data", "annotations", "fold", "skip")}
                data = find_clips(run["data"], run["data_root"], **where)
            if world > 1:
                dist.barrier()
        if checkpoint and checkpoint["classes"] != data.classes:
            known, there = len(checkpoint["classes"]), len(data.classes)
            raise ValueError(f"the checkpoint knows {known} classes, which are not the {there} of {run['data']}")
        if not getattr(data, args.split):
            raise ValueError(f"{run['data']} has no {args.split} split")

    classes = checkpoint["classes"] if checkpoint else data.classes
    model = build(run, len(classes), device)
    if checkpoint:
        common.load_tuned(model, checkpoint["state"], path)
    if args.predict:
        return predict, dict(run=run, model=model, videos=args.predict, classes=classes, device=device)

    workers = args.workers if args.workers is not None else 0 if data.small else min(8, os.cpu_count())
    place = Place(device, rank, world, workers)
    shape = dict(num_frames=run["num_frames"], size=model.vit.image_size, span=run["span"], keep=data.small)
    eval_set = VideoDataset(getattr(data, args.split), views=run["views"], **shape)
    job = dict(run=run, model=model, data=data, place=place)
    if args.eval:
        return evaluate, dict(job, dataset=eval_set)
    if data.missing and rank == 0:
        print(*data.missing, sep="\n", file=sys.stderr)
    train_set = VideoDataset(data.train, augment=run["augment"], seed=run["seed"], flip=data.flip, **shape)
    if len(train_set) < run["batch_size"]:
        there, batch = len(train_set), run["batch_size"]
        raise ValueError(f"{there} training videos do not fill a batch of {batch}: choose a smaller --batch-size")
    return train, dict(job, train_set=train_set, val_set=eval_set, out=out, resumed=checkpoint)


def main(argv=None):
    """Does what the command line says -> the evaluation's result (None for --predict)"""
    args = parse(argv)
    try:
        job, keywords = prepare(args)
    except (ValueError, FileNotFoundError) as error:
        stop(error)
    except KeyboardInterrupt:
        stop("stopped before the first step", code=130)
    try:
        answer = job(**keywords)
    except (VideoError, FloatingPointError) as error:
        stop(error)
    except KeyboardInterrupt:
        begun = job is train and (keywords["out"] / "checkpoint.pt").exists()
        stop("stopped" + "; with --resume it goes on after the last whole epoch" * begun, code=130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if answer is None:
        return None
    result, skipped = answer
    if keywords["place"].rank == 0:
        report(keywords["run"], args.split, keywords["model"], result, skipped, keywords.get("out"))
    return result


def stop(error, code=2):
    print(f"\ntrain.py: {error}", file=sys.stderr)
    sys.exit(code)


def report(run, split, model, result, skipped, out):
    """The last words of a run."""
    print(f"{split} {describe(result)} on {result['videos']} videos")
    if skipped:
        print(f"{len(skipped)} videos were skipped:", *skipped[:10], sep="\n  ")
        if len(skipped) > 10:
            print(f"  and {len(skipped) - 10} more")
    if out:
        (out / "skipped.txt").write_text("".join(f"{text}\n" for text in skipped), encoding="utf-8")
        path, (total, tunable) = out / "checkpoint.pt", common.count_parameters(model)
        print(f"{tunable / 1e6:.2f} M tunable of {total / 1e6:.2f} M parameters")
        print(f"checkpoint {path} ({path.stat().st_size / 1e6:.1f} MB)")
        print(f"use it: python train.py --predict VIDEO --checkpoint {path}")


if __name__ == "__main__":
    main()
