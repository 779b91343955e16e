"""The training loop as its users meet it: real videos, real processes, wrong flags."""

import csv
import fcntl
import json
import os
import pty
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

import aim
import common
import data
import train
from colab import toy

ROOT = Path(train.__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A learnable handful: toy videos of two classes, 24 to train, 8 to evaluate."""
    root = tmp_path_factory.mktemp("data") / "motions"
    for seed, (split, pairs) in enumerate({"train": 12, "val": 4}.items()):
        for name in ("grows", "shrinks"):
            (root / split / name).mkdir(parents=True)
        for i in range(pairs):
            frames = toy.clip("grows", np.random.default_rng([seed, i]))
            toy.write_video(root / split / "grows" / f"{i}.mp4", frames)
            toy.write_video(root / split / "shrinks" / f"{i}.mp4", frames[::-1])
    return root


def flags(folder, out, *more):
    fixed = "--method aim --recipe toy --batch-size 8 --epochs 2 --warmup-epochs 0.5 --eval-every 1 --num-frames 4"
    fixed += " --workers 0 --device cpu"
    return [*fixed.split(), "--data", str(folder), "--out", str(out), *map(str, more)]


def run(*argv, processes=1):
    command = [sys.executable, "train.py"]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.run([*command, *map(str, argv)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500)


def lines(out, key="train_loss"):
    """Of log.jsonl: an epoch's have "train_loss", those within an epoch "loss"."""
    return [line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if key in line]


def state(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)["state"]


def assert_same_state(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(tolerance or dict(rtol=0, atol=0)))


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = run(*flags(folder, out))
    assert done.returncode == 0, done.stderr
    return out, done


def test_a_run_leaves_a_summary_a_log_and_a_small_checkpoint(trained):
    out, done = trained
    for words in ("val top-1", "on 8 videos", "M tunable of", "checkpoint", "use it: python train.py --predict"):
        assert words in done.stdout
    assert [line["epoch"] for line in lines(out)] == [1, 2]
    epoch = {"epoch", "step", "train_loss", "train_top1", "top1", "top5", "videos", "seconds", "overflows"}
    window = {"epoch", "step", "loss", "top1", "lr", "grad_norm", "overflows", "skipped"}
    window |= {"clips_per_second", "data_wait", "memory_mb"}
    assert lines(out)[0].keys() == epoch and lines(out, "loss")[0].keys() == window
    assert [line["step"] for line in lines(out, "loss")] == [3, 6]
    assert not any(name.startswith("vit.") and "ln_post" not in name for name in state(out))
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    assert json.loads((out / "run.json").read_text()) == json.loads(json.dumps(checkpoint["run"]))
    assert checkpoint["classes"] == ["grows", "shrinks"]
    assert torch.__version__.startswith(checkpoint["versions"]["torch"])
    tuned = sum(tensor.numel() for tensor in checkpoint["state"].values())
    _, tunable = common.count_parameters(train.build(checkpoint["run"], 2, torch.device("cpu")))
    moments = sum(entry["exp_avg"].numel() for entry in checkpoint["optimizer"]["state"].values())
    assert tuned == moments == tunable


def test_a_run_says_what_it_is_about_to_do_and_shows_plain_lines_without_a_terminal(trained):
    _, done = trained
    for words in ("aim on", "recipe toy", "lr=0.008", "epochs=2", "drop_path=0", "24 videos to train on", "2 classes"):
        assert words in done.stdout
    for words in ("step 3/6", "epoch 1/2", "loss ", "top-1 ", "clips/s", "% data wait", " GB", " left"):
        assert words in done.stdout
    assert "\r" not in done.stdout + done.stderr


def test_a_terminal_gets_a_progress_bar(folder, tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    command = [sys.executable, "train.py", *flags(folder, tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    assert process.wait() == 0
    for words in (b"6/6", b"epoch 2/2", b"loss ", b"clips/s", b"% data wait", b"GB", b"\r"):
        assert words in shown


def test_eval_and_predict_use_the_checkpoint(trained, folder, monkeypatch):
    out, done = trained
    result = train.main(["--eval", "--checkpoint", str(out / "checkpoint.pt"), "--workers", "0"])
    last = lines(out)[-1]
    assert result["top1"] == pytest.approx(last["top1"]) and result["videos"] == 8

    seen, real = [], train.probabilities

    def watched(model, video, *more):
        seen.append(tuple(video.shape[:3]))
        return real(model, video, *more)

    monkeypatch.setattr(train, "probabilities", watched)
    more = train.main(["--eval", "--checkpoint", str(out / "checkpoint.pt"), "--workers", "0", "--views", "2", "3"])
    assert more["videos"] == 8 and seen == [(1, 6, 4)] * 8  # videos, views, frames
    video = folder / "val" / "grows" / "0.mp4"
    done = run("--predict", video, video, "--checkpoint", out / "checkpoint.pt")
    assert done.returncode == 0 and done.stdout.count("grows") >= 2 and done.stdout.count("%") == 4


def test_a_resumed_run_ends_with_the_same_bits(trained, folder, tmp_path, monkeypatch):
    out = tmp_path / "stopped"
    real = train.save

    def save_once(checkpoint, path):
        real(checkpoint, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "save", save_once)
    torch.set_num_threads(1)
    with pytest.raises(SystemExit) as stop:
        train.main(flags(folder, out))
    assert stop.value.code == 130
    assert torch.load(out / "checkpoint.pt", weights_only=True)["progress"]["step"] == 3
    monkeypatch.setattr(train, "save", real)
    done = run(*flags(folder, out, "--resume"))
    assert done.returncode == 0, done.stderr
    assert_same_state(state(out), state(trained[0]))


@pytest.mark.parametrize(
    "method", ["st_adapter", "zeroi2v", "side4video", "linear_probe", "partial_finetune", "finetune"]
)
def test_every_method_trains_resumes_and_evaluates(method, folder, tmp_path):
    argv = flags(folder, tmp_path, "--epochs", 1, "--method", method)
    first = train.main(argv)
    again = train.main(["--eval", "--checkpoint", str(tmp_path / "checkpoint.pt"), "--workers", "0"])
    assert again == first
    train.main([*argv, "--epochs", "2", "--resume"])
    assert [line["epoch"] for line in lines(tmp_path)] == [1, 2]


@pytest.mark.parametrize("method", ["aim", "st_adapter", "zeroi2v", "side4video"])
def test_recomputing_trains_to_the_same_weights(method, folder, tmp_path):
    argv = ["--epochs", 1, "--method", method]
    for name, more in (("kept", []), ("redone", ["--recompute"])):
        train.main(flags(folder, tmp_path / name, *argv, *more))
    assert_same_state(state(tmp_path / "kept"), state(tmp_path / "redone"), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_steps_train_to_the_same_weights(folder, tmp_path, monkeypatch):
    """And it is the compiled model that takes them."""
    steps, real = [], torch.compile

    def watched(function):
        compiled = real(function)
        return lambda x: steps.append(function) or compiled(x)

    monkeypatch.setattr(torch, "compile", watched)
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        train.main(flags(folder, tmp_path / name, "--epochs", 1, "--set", "dropout=0", "--lr", "1e-3", *more))
        assert sum(isinstance(function, aim.AIM) for function in steps) == (3 if more else 0)
    assert_same_state(state(tmp_path / "eager"), state(tmp_path / "compiled"), rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "compiled" / "run.json").read_text())["compile"]


PAPERS = {  # method, data, backbone: epochs, warm-up, batch, rate at that batch, decay, smoothing, span, views, repeat
    ("aim", "k400", "ViT-B-16"): (30, 3, 64, 3e-4, 0.05, 0.0, 128, (3, 1), 1),
    ("aim", "k700", "ViT-L-14"): (30, 3, 64, 3e-4, 0.05, 0.0, 128, (3, 1), 1),
    ("aim", "ssv2", "ViT-B-16"): (50, 3, 64, 3e-4, 0.05, 0.1, 0, (1, 3), 1),
    ("aim", "diving48", "ViT-L-14"): (50, 3, 64, 3e-4, 0.05, 0.0, 0, (1, 1), 1),
    ("st_adapter", "k400", "ViT-B-16"): (12, 2, 192, 7.5e-4, 0.01, 0.0, 128, (3, 1), 1),
    ("st_adapter", "ssv2", "ViT-B-16"): (50, 2, 256, 1e-3, 0.01, 0.0, 0, (1, 3), 1),
    ("zeroi2v", "k400", "ViT-L-14"): (40, 2.5, 64, 3e-4, 0.05, 0.0, 128, (3, 1), 1),
    ("zeroi2v", "ssv2", "ViT-B-16"): (50, 2.5, 64, 3e-4, 0.05, 0.1, 0, (1, 3), 1),
    ("side4video", "k400", "ViT-B-16"): (30, 4, 256, 1e-3, 0.15, 0.1, 0, (4, 3), 1),
    ("side4video", "k400", "EVA02-E-14"): (20, 4, 128, 1e-4, 0.15, 0.1, 0, (4, 3), 1),
    ("side4video", "ssv1", "ViT-B-16"): (40, 4, 128, 1e-3, 0.15, 0.1, 0, (2, 3), 2),
    ("side4video", "ssv1", "EVA02-E-14"): (30, 6, 64, 1e-4, 0.15, 0.1, 0, (2, 3), 2),
    ("side4video", "ssv2", "ViT-L-14"): (30, 4, 128, 1e-4, 0.15, 0.1, 0, (2, 3), 2),
}
CROP, RANDOM = dict(crop=(0.08, 1.0)), dict(randaugment=dict(num_ops=4, magnitude=7))
CROP_FLIP = CROP | dict(flip=0.5)
AUGMENT = {
    ("aim", "k400"): CROP_FLIP,
    ("aim", "k700"): CROP_FLIP,
    ("aim", "ssv2"): CROP | RANDOM | dict(erasing=0.25),
    ("aim", "diving48"): CROP_FLIP,
    ("st_adapter", "k400"): dict(short_side=(1.0, 1.15), flip=0.5),
    ("st_adapter", "ssv2"): CROP | RANDOM,
    ("zeroi2v", "k400"): CROP_FLIP | RANDOM,
    ("zeroi2v", "ssv2"): CROP_FLIP | RANDOM | dict(erasing=0.25),
    ("side4video", "k400"): CROP_FLIP | dict(gray=0.2),
    ("side4video", "ssv1"): CROP_FLIP | RANDOM,
    ("side4video", "ssv2"): CROP_FLIP | RANDOM,
}


@pytest.mark.parametrize("key", PAPERS, ids=" ".join)
def test_the_flags_pick_the_papers_whole_recipe(key):
    method, name, backbone = key
    run = train.settings(train.parse(["--method", method, "--data", name, "--backbone", backbone]))
    found = [run[k] for k in ("epochs", "warmup_epochs", "batch_size")] + [train.peak_rate(run)]
    found += [run[k] for k in ("weight_decay", "label_smoothing", "span", "views", "repeat")]
    assert tuple(found) == PAPERS[key]
    only_large = RANDOM if key == ("side4video", "k400", "EVA02-E-14") else {}  # table 12
    assert run["augment"] == AUGMENT[method, name] | only_large


def test_adapters_and_head_offsets_follow_data_backbone_and_frames():
    def model(text):
        run = train.settings(train.parse([*text.split(), "--pretrained", "none"]))
        with torch.device("meta"):
            return train.METHODS[run["method"]][0](
                common.ViT(**common.B16), 400, num_frames=run["num_frames"], **run["model"]
            )

    assert model("--method aim --data ssv2").adapters["0"].drop_path.p == 0.0
    assert model("--method aim --data k400").adapters["11"].drop_path.p == 0.2
    assert "temporal_in.fc1.weight" in model("--method aim --data ssv2").adapters["0"].state_dict()
    assert "attn" in model("--method st_adapter --data ssv2").adapters[0]
    assert "attn" not in model("--method st_adapter --data k400").adapters[0]
    for text, adapters, offsets in (
        ("--data ssv2 --frames 8", 6, [-1, 1]),
        ("--data ssv2 --frames 16", 4, [-1, 1, -2, 2]),
        ("--data k400 --frames 16", 4, [-1, 1, 2]),
        ("--data k400 --frames 32", 4, [-1, 1, -2, 2, 3]),
    ):
        block = model(f"--method zeroi2v {text}").blocks[0]
        assert len(block.adapters) == adapters
        assert sorted(dt for dt, _ in block.groups if dt) == sorted(offsets)


def test_the_rate_follows_the_batch_where_the_paper_has_it_so():
    def rate(text):
        return train.peak_rate(train.settings(train.parse(text.split())))

    assert rate("--method st_adapter --data k400 --batch-size 64") == pytest.approx(2.5e-4)
    assert rate("--method st_adapter --data k400 --batch-size 64 --lr 1e-3") == 1e-3
    assert rate("--method aim --data k400 --batch-size 8") == 3e-4
    assert rate("--method aim --data k400 --batch-size 8 --lr-batch 64") == pytest.approx(3.75e-5)


def test_augmentation_can_be_overridden():
    base = "--method aim --data ssv2 --augment crop=0.5x1 randaugment=none erasing=0 gray=0.2"
    assert train.settings(train.parse(base.split()))["augment"] == dict(crop=(0.5, 1.0), erasing=0.0, gray=0.2)
    assert train.settings(train.parse(["--method", "aim", "--data", "ssv2"]))["augment"]["erasing"] == 0.25
    base = "--method aim --data k400 --augment randaugment=2x9"
    assert train.settings(train.parse(base.split()))["augment"]["randaugment"] == dict(num_ops=2, magnitude=9.0)


def test_help_is_grouped_and_has_the_papers_values_as_defaults(capsys):
    def text(argv):
        with pytest.raises(SystemExit) as stop:
            train.main([*argv.split(), "--help"])
        assert stop.value.code == 0
        return " ".join(capsys.readouterr().out.split())

    shown = text("--method side4video --data ssv2 --backbone ViT-L-14")
    for words in ("what to do:", "data:", "model:", "recipe:", "device:"):
        assert words in shown
    for words in ("AdamW (default: 0.0001)", "(default: 30)", "0.15)", "width=512", "(repeated sampling) (default: 2)"):
        assert words in shown
    assert "AdamW (default: 0.0003)" in text("") and "crop=0.08x1 flip=0.5" in text("")
    settings = set(train.DEFAULTS) - {"model", "quick_gelu"} | {"epochs", "warmup_epochs", "lr", "batch_size", "set"}
    assert all(f"--{name.replace('_', '-')}" in shown for name in settings)


def test_a_backbone_may_have_its_own_recipe_and_a_kernel_its_own_form():
    def settings(text):
        return train.settings(train.parse(text.split()))

    base = "--method side4video --data videos --recipe k400"
    assert settings(base)["lr"] == 1e-3 and settings(base)["model"] == {}
    large = settings(base + " --backbone ViT-L-14")
    assert (large["lr"], large["model"], large["batch_size"]) == (1e-4, {"width": 512}, 256)
    for same in ("ViT-L/14", "ViT-L-14-336", "ViT-L-14-quickgelu"):
        assert settings(f"{base} --backbone {same}")["model"] == {"width": 512}
    assert settings(base + " --backbone ViT-B-16")["lr"] == 1e-3
    assert settings(base + " --backbone EVA02-E-14")["model"] == {"width": 576, "side_layers": 32}
    kernel = settings("--method st_adapter --data videos --set kernel=3x3x3")["model"]["kernel"]
    assert kernel == (3, 3, 3)
    with pytest.raises(ValueError, match="numbers like 3x1x1"):
        settings("--method st_adapter --data videos --set kernel=3,1")


# Nothing depends on them, since a softmax or a batch norm takes them away again: their gradients are rounding errors,
# which AdamW makes as large as any other. (And the mean that the batch norm behind them takes away.)
CANCELS = ("k.fc2.bias", "in_proj_bias", "out_proj.bias", "mlp.2.bias", "stem.bias", "running_mean")


def free_port():
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def train_as(rank, world, ports, commands, reduced):
    """One of `world` processes: trains with each command line, logging every step; counts the gradients it reduces."""
    torch.set_num_threads(1)
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1")
    train.LOG_EVERY = 1

    class Parallel(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            tuned = sum(p.numel() for p in self.module.parameters() if p.requires_grad)
            reduced.put((self._get_ddp_logging_data()["total_parameter_size_bytes"], 4 * tuned))

    train.DistributedDataParallel = Parallel
    for port, argv in zip(ports, commands):
        os.environ["MASTER_PORT"] = str(port)
        train.main(argv)


def test_two_processes_or_four_passes_train_as_one(folder, tmp_path):
    """The same losses and weights after six steps; every video evaluated once; only what is tuned is reduced."""
    methods, commands = ("aim", "st_adapter", "zeroi2v", "side4video"), {}
    for name in ("one", "two", "four passes"):
        for method in methods:
            more = ["--epochs", 1, "--batch-size", 4, "--method", method, "--set", "dropout=0", "--lr", "3e-4"]
            more += ["--accumulate", 4] if name == "four passes" else []
            commands.setdefault(name, []).append(flags(folder, tmp_path / name / method, *more))
    context = torch.multiprocessing.get_context("spawn")
    reduced = context.SimpleQueue()
    jobs = [(train_as, (1, range(8), commands["one"] + commands["four passes"], reduced), 1)]
    jobs += [(train_as, (2, [free_port() for _ in methods], commands["two"], reduced), 2)]
    for processes in [torch.multiprocessing.start_processes(*job, join=False) for job in jobs]:
        while not processes.join():
            pass
    sizes = [reduced.get() for _ in range(2 * len(methods))]
    assert all(sent == tuned for sent, tuned in sizes)
    for method in methods:
        one = tmp_path / "one" / method
        for other in ("two", "four passes"):
            if (other, method) == ("four passes", "side4video"):
                continue  # its batch norms see a pass at a time
            there = tmp_path / other / method
            losses = [[line["loss"] for line in lines(out, "loss")] for out in (one, there)]
            assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], abs=1e-5)
            a, b = ({k: v for k, v in state(out).items() if not k.endswith(CANCELS)} for out in (one, there))
            assert_same_state(a, b, rtol=0, atol=1e-5)
            assert lines(there)[0]["videos"] == 8
            for table in ("val_classes.csv", "val_confusion.csv"):
                assert (there / table).read_text() == (one / table).read_text()


def test_a_crash_while_saving_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    train.save({"run": {}, "classes": [], "state": {"a": torch.ones(3)}}, path)

    def crash(checkpoint, file):
        file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        train.save({"run": {}, "state": {"a": torch.zeros(3)}}, path)
    assert train.load(path)["state"]["a"].sum() == 3


def test_no_decay_on_biases_norms_and_embeddings():
    settings = train.settings(train.parse(["--method", "aim", "--data", "toy", "--weight-decay", "0.1"]))
    model = train.build(settings, 10, torch.device("cpu"))
    names = {p: name for name, p in model.named_parameters()}
    decayed = {names[p]: g["weight_decay"] for g in train.parameter_groups(model, settings) for p in g["params"]}
    assert decayed.keys() == set(common.tuned_state(model))
    for name, decay in decayed.items():
        assert decay == (0.1 if name.endswith("weight") and "ln_" not in name else 0)


def test_the_rate_warms_up_and_falls_as_a_cosine():
    rates = [train.warmup_cosine(step, 100, 10) for step in range(101)]
    assert rates[0] == 0 and rates[5] == 0.5 and rates[10] == 1
    assert rates[55] == pytest.approx(0.5) and rates[100] == pytest.approx(0)
    assert train.warmup_cosine(0, 100, 0) == 1


def test_broken_videos_are_skipped_counted_and_listed(folder, tmp_path):
    lists = {}
    for split in ("train", "val"):
        paths = [f"{p} {int(p.parent.name == 'shrinks')}" for p in sorted((folder / split).rglob("*.mp4"))]
        broken = tmp_path / f"{split}-broken.mp4"
        broken.write_text("no video")
        lists[split] = tmp_path / f"{split}.txt"
        lists[split].write_text("\n".join([*paths[:-1], f"{broken} 1"]))
    out = tmp_path / "run"
    done = run(*flags(lists["train"], out, "--val-data", lists["val"], "--epochs", 1))
    assert done.returncode == 0, done.stderr
    assert "on 7 videos" in done.stdout and "2 videos were skipped" in done.stdout
    assert "train-broken.mp4" in done.stdout and "val-broken.mp4" in (out / "skipped.txt").read_text()
    done = run(*flags(lists["train"], out, "--val-data", lists["val"], "--epochs", 2, "--batch-size", 1, "--resume"))
    assert done.returncode == 0, done.stderr  # a batch of one that is broken, too
    assert "2 videos were skipped" in done.stdout


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("", "say what to train"),
        ("--method aim", "say what to train"),
        ("--method aimm --data toy", "invalid choice: 'aimm'"),
        ("--method aim --data toy --epoch 3", "unrecognized arguments: --epoch"),
        ("--method aim --data toy --epochs 0", "must be a whole number, 1 or more, not '0'"),
        ("--method aim --data toy --lr fast", "must be a number, 0 or more, not 'fast'"),
        ("--method aim --data FOLDER --recipe toy --set ratio=much", "must be of type float"),
        ("--method aim --data nowhere", "unknown data 'nowhere'"),
        ("--method aim --data EMPTY", "it has no train/"),
        ("--method aim --data FOLDER --backbone ViT-B-61", "unknown backbone 'ViT-B-61'"),
        ("--method aim --data FOLDER --recipe k401", "no recipe 'k401'"),
        ("--method aim --data FOLDER --recipe toy --pretrained nothing.pt", "neither a file nor"),
        ("--method aim --data FOLDER --recipe toy --set rate=1", "ratio"),
        ("--method aim --data FOLDER --recipe toy --set temporal=off", "must be true or false"),
        ("--method aim --data FOLDER --recipe toy --set drop_path=2", "it is a probability"),
        ("--method aim --data FOLDER --recipe toy --set ratio=0", "ratio is 0.0"),
        ("--method zeroi2v --data FOLDER --recipe toy --set ratio=inf", "ratio is inf"),
        ("--method st_adapter --data FOLDER --recipe toy --set bottleneck=-4", "bottleneck is -4"),
        ("--method aim --data FOLDER --recipe toy --workers -1", "0 or more, not '-1'"),
        ("--method aim --data FOLDER --recipe toy --device gpu", "invalid choice: 'gpu'"),
        ("--method aim --data FOLDER --recipe toy --split test", "--split goes with --eval"),
        ("--method aim --data FOLDER --recipe toy --out TEXT", "is a file"),
        (
            "--method aim --data FOLDER --out RUN --resume --weight-decay 0",
            "is of --weight-decay 0.05, not 0.0: --resume cannot",
        ),
        ("--method aim --data FOLDER --out RUN --resume --epochs 1", "has done 2 already"),
        ("--method aim --data FOLDER --out RUN --resume --set ratio=0.5", "begun with model"),
        ("--eval --checkpoint TRAINED --set ratio=0.5", "--set is fixed by the checkpoint"),
        ("--eval --resume --checkpoint TRAINED", "take no --resume"),
        ("--method aim --data FOLDER --recipe toy --set blocks=some", "every second"),
        ("--method aim --data FOLDER --recipe toy --batch-size 1000", "do not fill a batch"),
        ("--method aim --data FOLDER --recipe toy --batch-size 8 --accumulate 3", "no multiple"),
        (
            "--method aim --data FOLDER --out RUN --resume --backbone ViT-S-32",
            "is of --backbone ViT-Toy-16, not ViT-S-32",
        ),
        ("--method zeroi2v --data FOLDER --out RUN --resume", "is of --method aim, not zeroi2v"),
        ("--method aim --data FOLDER --recipe toy --augment crop=1", "--augment crop=1: write crop=AxB"),
        ("--method aim --data FOLDER --recipe toy --augment zoom=1", "--augment zoom=1: write crop=AxB"),
        ("--method aim --data FOLDER --init WEIGHTS", "neither a checkpoint of train.py nor one that the authors"),
        ("--method zeroi2v --data FOLDER --init TRAINED", "is of --method aim, not zeroi2v"),
        ("--data FOLDER --init TRAINED --backbone ViT-B-32", "is of --backbone ViT-Toy-16, not ViT-B-32"),
        ("--data FOLDER --init nothing.pt", "there is no checkpoint"),
        ("--eval --init TRAINED --checkpoint TRAINED", "use one"),
        ("--eval --init TRAINED --data FOUR", "knows 2 classes, which are not the 4"),
        ("--predict CLIP.mp4 --init TRAINED", "need --checkpoint"),
        ("--method aim --data FOLDER --recipe toy --device cuda", "finds no GPU"),
        ("--method aim --data FOLDER --recipe toy --num-frames 17 --out OUT", "16 training videos in a row"),
        ("--eval", "need --checkpoint"),
        ("--eval --checkpoint TRAINED --weight-decay 0", "--weight-decay means nothing to --eval"),
        ("--eval --checkpoint TRAINED --compile", "--compile means nothing to --eval"),
        ("--predict CLIP.mp4 --checkpoint TRAINED --skip x", "--skip means nothing to --predict"),
        ("--eval --init TRAINED --set ratio=0.5", "fixed by the checkpoint"),
        ("--method aim --data FOLDER --out RUN --resume --pretrained none", "is of --pretrained shipped, not none"),
        ("--method aim --data FOLDER --recipe toy --clip-grad -1", "must be a number, 0 or more, not '-1'"),
        ("--method side4video --data FOLDER --recipe toy --compile --recompute", "do not go together"),
        ("--method aim --data FOLDER --out RUN --resume --seed 1", "is of --seed 0, not 1"),
        ("--method aim --data FOLDER --out RUN --resume --init x.pt", "is of --init None, not x.pt"),
        ("--method aim --data FOLDER --recipe toy --val-data x.txt", "--val-data means nothing to --data"),
        ("--method aim --data FOLDER --recipe toy --fold 2", "--fold means nothing to --data"),
        ("--method aim --data FOLDER --recipe toy --augment crop=1x0.5", "--augment crop=1x0.5: numbers from 0 to 1"),
        ("--method aim --data FOLDER --recipe toy --augment short_side=0.5x2", "numbers from 1 to inf"),
        ("--method aim --data FOLDER --recipe toy --augment randaugment=2.5x9", "a whole number of operations"),
        ("--method aim --data FOLDER --recipe toy --label-smoothing 2", "must be a number from 0 to 1"),
        ("--method aim --data FOLDER --recipe toy --seed 4294967296", "must be less than 4294967296"),
        ("--method aim --data FOLDER --recipe toy --skip TEXT", "none of its 1 lines is the path of a video"),
        ("--eval --checkpoint TRAINED --pretrained none", "was trained on --pretrained shipped"),
        ("--eval --checkpoint nothing.pt", "there is no checkpoint"),
        ("--eval --checkpoint WEIGHTS", "is not a checkpoint of train.py"),
        ("--eval --checkpoint TEXT", "is not a checkpoint that can be read safely"),
        ("--eval --checkpoint TRAINED --data FOUR", "2 classes"),
        ("--eval --checkpoint TRAINED --method linear_probe", "is of --method aim, not linear_probe"),
        ("--eval --checkpoint TRAINED --backbone ViT-S-32 --pretrained none", "is of --backbone ViT-Toy-16"),
        ("--eval --checkpoint TRAINED --split test", "no test split"),
        ("--predict nothing.mp4 --checkpoint TRAINED", "no such file"),
        ("--method aim --data FOLDER --recipe toy --out RUN", "holds a run already"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence_with_exit_code_2(trained, folder, tmp_path, capsys, argv, says):
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    four = tmp_path / "four"
    for split in ("train", "val"):
        for name in "abcd":
            (four / split / name).mkdir(parents=True)
            (four / split / name / "0.mp4").touch()
    torch.save({"weights": torch.zeros(2)}, tmp_path / "weights.pt")
    (tmp_path / "text.pt").write_text("text")
    (tmp_path / "empty").mkdir()
    places = dict(
        FOLDER=folder, EMPTY=tmp_path / "empty", OUT=tmp_path / "out", WEIGHTS=tmp_path / "weights.pt", RUN=trained[0]
    )
    places.update(TEXT=tmp_path / "text.pt", TRAINED=trained[0] / "checkpoint.pt", FOUR=four)
    with pytest.raises(SystemExit) as stop:
        train.main([str(places.get(word, word)) for word in argv.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and "Traceback" not in error
    assert len(error.strip().splitlines()[-1]) < 400
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


KILLS = """
import os, signal, sys, torch
sys.path.insert(0, {root!r})
import train
torch.set_num_threads(1)
train.LOG_EVERY = 2
where, calls = {where!r}, 0

def killed(function, at, half_written=False):
    def wrapped(*args, **kwargs):
        global calls
        calls += 1
        if calls == at:
            if half_written:
                args[1].write(b"half of a checkpoint")
                args[1].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped

if where == "step":
    train.warmup_cosine = killed(train.warmup_cosine, 6)
elif where == "save":
    torch.save = killed(torch.save, 2, half_written=True)
elif where == "evaluation":
    train.probabilities = killed(train.probabilities, 1)
train.main({argv!r})
"""


def start(where, argv, **options):
    code = KILLS.format(root=str(ROOT), where=where, argv=list(map(str, argv)))
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes, **options)


def test_killed_anywhere_a_resumed_run_ends_with_the_same_bits(folder, tmp_path):
    """SIGKILL of real processes: in a step, half-way through a save, while evaluating; then the end."""
    whole, out = tmp_path / "whole", tmp_path / "killed"

    def argv(out):
        return flags(folder, out, "--batch-size", 4, "--save-every", 0, "--set", "dropout=0.5", "drop_path=0.2")

    done = start("nowhere", argv(whole))
    for where in ("step", "save", "evaluation", "step"):
        process = start(where, [*argv(out), "--resume"])
        said = process.communicate()[1]
        assert process.returncode == -signal.SIGKILL, said
        if (out / "checkpoint.pt").exists():
            assert train.load(out / "checkpoint.pt")["progress"]["epoch"] < 2
    process = start("nowhere", [*argv(out), "--resume"])
    assert process.wait() == 0 and done.wait() == 0, process.stderr.read()
    assert_same_state(state(out), state(whole))
    assert train.load(out / "checkpoint.pt")["optimizer"]["state"][0]["step"] == 12
    fixed = ("step", "epoch", "loss", "top1", "lr", "grad_norm", "train_loss", "train_top1", "videos")
    logs = [[{k: line[k] for k in fixed if k in line} for line in lines(o, "epoch")] for o in (out, whole)]
    assert logs[0] == logs[1] and len(logs[0]) == 6 + 2


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_with_the_same_bits(folder, tmp_path, kills=8):
    rng = np.random.default_rng(0)

    def argv(out):
        return flags(folder, out, "--epochs", 20, "--batch-size", 4, "--save-every", 0, "--set", "dropout=0.5")

    whole = start("nowhere", argv(tmp_path / "whole"))
    assert whole.wait() == 0, whole.stderr.read()
    out, moments = tmp_path / "killed", []
    while True:
        process = start("nowhere", [*argv(out), "--resume"])
        while process.poll() is None and "videos to train on" not in process.stdout.readline():
            pass
        if len(moments) == kills:
            break
        time.sleep(rng.uniform(0, 1))
        assert process.poll() is None, process.stderr.read()
        process.kill()
        process.wait()
        at = train.load(out / "checkpoint.pt")["progress"] if (out / "checkpoint.pt").exists() else {}
        moments.append((at.get("epoch", 0), at.get("step", 0)))
    _, error = process.communicate()
    assert process.returncode == 0, error
    print("killed when the checkpoint was at (epoch, step)", *moments)
    assert moments == sorted(moments) and moments[-1] > (0, 0)
    assert_same_state(state(out), state(tmp_path / "whole"))
    steps = [[line["step"] for line in lines(o, "loss")] for o in (out, tmp_path / "whole")]
    assert steps[0] == steps[1] == list(range(2, 121, 2))


@pytest.mark.parametrize(("signum", "workers"), [(signal.SIGINT, 2), (signal.SIGTERM, 0)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(folder, tmp_path, signum, workers):
    """Also when it goes to every process of the group, as Ctrl-C does, and twice, as through `timeout`."""
    out = tmp_path / "run"
    argv = flags(folder, out, "--epochs", 500, "--batch-size", 4, "--eval-every", 500, "--workers", workers)
    process = start("nowhere", argv, start_new_session=True)
    while not (out / "log.jsonl").exists() or not lines(out, "loss"):
        time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()
    time.sleep(0.5)
    os.killpg(process.pid, signum)
    os.kill(process.pid, signum)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    at = train.load(out / "checkpoint.pt")["progress"]
    assert f"after step {at['step']} of epoch {at['epoch'] + 1}" in error and "Traceback" not in error
    assert f"--out {out}" in error and error.rstrip().endswith("--resume")
    steps = 6 * at["epoch"] + at["step"]
    assert steps > 2 and train.load(out / "checkpoint.pt")["optimizer"]["state"][0]["step"] == steps


def test_signals_that_come_together_are_one_and_a_later_ctrl_c_stops_at_once(monkeypatch):
    clock = iter([100.0, 100.02, 102.0])
    monkeypatch.setattr(train.time, "monotonic", lambda: next(clock))
    with train.noted_signals(train.Place(torch.device("cpu"), 0, 1, 0)) as noted:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert noted == [signal.SIGINT] * 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_process_ends_though_its_loaders_outlive_a_signal():
    code = f"""
import sys, torch
sys.path.insert(0, {str(ROOT)!r})
import train
place = train.Place(torch.device("cpu"), 0, 1, workers=2)
batches = iter(place.batches(list(range(100)), list(range(100)), 1))
next(batches)
print([worker.pid for worker in batches._workers])
batches._shutdown_workers = lambda: None  # whatever keeps it from saying goodbye
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    pids = json.loads(done.stdout)
    assert len(pids) == 2 and "Traceback" not in done.stderr

    def runs(pid):
        try:  # a dead process whose parent is gone may stay listed
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    end = time.monotonic() + 60
    while any(map(runs, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(runs, pids))


def test_a_signal_while_evaluating_stops_and_what_was_trained_is_kept(folder, tmp_path, monkeypatch, capsys):
    real = train.probabilities

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(train, "probabilities", interrupted)
    with pytest.raises(SystemExit) as stop:
        train.main(flags(folder, tmp_path / "run"))
    assert stop.value.code == 143 and "after step 3 of epoch 1" in capsys.readouterr().err
    monkeypatch.setattr(train, "probabilities", real)
    train.main(flags(folder, tmp_path / "run", "--resume"))
    assert [line["epoch"] for line in lines(tmp_path / "run")] == [1, 2]


def test_the_batch_size_of_an_epoch_that_has_begun_stays(folder, tmp_path, monkeypatch, capsys):
    real = train.probabilities
    monkeypatch.setattr(train, "probabilities", lambda *args: os.kill(os.getpid(), signal.SIGINT) or real(*args))
    with pytest.raises(SystemExit):
        train.main(flags(folder, tmp_path / "run"))
    with pytest.raises(SystemExit) as stop:
        train.main(flags(folder, tmp_path / "run", "--resume", "--batch-size", 4))
    assert stop.value.code == 2 and "is of --batch-size 8, not 4: it stopped inside epoch 1" in capsys.readouterr().err


@pytest.mark.parametrize("processes", [1, 2])
def test_a_loss_that_is_not_finite_stops_at_once_and_names_step_and_clip(folder, tmp_path, processes):
    """And keeps the last good checkpoint."""
    out = tmp_path / "run"
    code = f"""
import sys, torch
sys.path.insert(0, {str(ROOT)!r})
import train
train.LOG_EVERY = 2
real, calls = train.F.cross_entropy, 0

def broken(*args, **kwargs):
    global calls
    calls += 1
    loss = real(*args, **kwargs)
    return loss * torch.tensor([1.0, float("nan")]).repeat(len(loss) // 2) if calls == 5 else loss

train.F.cross_entropy = broken
train.main()
"""
    (tmp_path / "broken.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    argv = flags(folder, out, "--batch-size", 4, "--save-every", 0)
    done = subprocess.run(
        [*command, str(tmp_path / "broken.py"), *argv],
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode and "the loss is not finite at step 5 for" in done.stderr
    clips = data.find_clips(str(folder)).train
    run = dict(seed=0, batch_size=4, repeat=1)
    order = train.epoch_order(run, 24, 0, train.Place(torch.device("cpu"), 0, 1, 0), 4)[16:20]
    said = next(line for line in done.stderr.splitlines() if "not finite" in line)
    assert [clips[i].path in said for i in order] == [False, True, False, True]
    at = train.load(out / "checkpoint.pt")["progress"]
    assert (at["epoch"], at["step"]) == (0, 4) and "checkpoint.pt" in done.stderr
    assert all(tensor.isfinite().all() for tensor in state(out).values())


def golden_config(golden, name):
    """A golden file's tower under a name of open_clip, its checkpoint's method's keywords -> flags"""
    c = golden["config"]
    vision = dict(image_size=c["resolution"], patch_size=c["patch"], width=c["width"], layers=c["layers"])
    vision["head_width"] = c["width"] // c["heads"]
    text = dict(context_length=8, vocab_size=8, width=32, heads=2, layers=1)
    return dict(embed_dim=16, vision_cfg=vision, text_cfg=text)


RELEASED = {
    "aim_k400": ("aim", ""),
    "aim_ssv2": ("aim", "temporal_in=true"),
    "st_adapter_3x3x3": ("st_adapter", "bottleneck=12 kernel=3x3x3 before_attention=true"),
    "st_adapter_k400": ("st_adapter", "bottleneck=12"),
    "zeroi2v_16f": ("zeroi2v", "offsets=-1,1,-2,2"),
    "zeroi2v_6adapters": ("zeroi2v", "offsets=-1,1 scale=1 adapt=q,k,v,o,up,down"),
    "side4video": ("side4video", "width=64"),
}


@pytest.mark.parametrize("name", RELEASED)
def test_init_takes_the_authors_checkpoints_by_their_keys(name, tmp_path, monkeypatch):
    method, switches = RELEASED[name]
    golden = torch.load(ROOT / "tests" / "golden" / f"{name}.pt", weights_only=True)
    (tmp_path / "ViT-B-Golden.json").write_text(json.dumps(golden_config(golden, name)))
    open_clip.add_model_config(tmp_path)
    torch.save(golden["checkpoint"], tmp_path / "released.pth")
    c = golden["config"]
    argv = f"--data k400 --init {tmp_path}/released.pth --backbone ViT-B-Golden --pretrained none --device cpu"
    args = train.parse(
        [*argv.split(), "--frames", str(c["num_frames"]), *(["--set", *switches.split()] if switches else [])]
    )
    checkpoint = train.read(Path(args.init))
    run = train.settings_to_start_from(checkpoint, args)
    assert run["method"] == method and run["quick_gelu"]
    model = train.start_from(checkpoint, run, args, list("abcde"), torch.device("cpu")).eval()
    torch.testing.assert_close(model(golden["video"]), golden["logits"], atol=1e-4, rtol=0)
    assert run["pretrained"] is None  # its own backbone must go into our checkpoint
    new = train.start_from(checkpoint, run, args, list("abc"), torch.device("cpu")).eval()
    assert new(golden["video"]).shape[1] == 3
    torch.testing.assert_close(new.features(golden["video"]), golden["features"], atol=1e-4, rtol=0)


def test_init_goes_on_from_ours_and_says_when_the_classifier_is_new(trained, folder, tmp_path, capsys, monkeypatch):
    """It reads the file once, which may be of gigabytes."""
    checkpoint = trained[0] / "checkpoint.pt"
    reads, real = [], train.read
    monkeypatch.setattr(train, "read", lambda path: reads.append(path) or real(path))
    again = train.main(
        ["--eval", "--init", str(checkpoint), "--data", str(folder), "--workers", "0", "--out", str(tmp_path)]
    )
    assert again["top1"] == pytest.approx(lines(trained[0])[-1]["top1"])
    three = tmp_path / "three"
    for split in ("train", "val"):
        for name, there in zip("xyz", ("grows", "shrinks", "grows")):
            (three / split / name).mkdir(parents=True)
            for clip in (folder / split / there).iterdir():
                (three / split / name / clip.name).symlink_to(clip)
    argv = flags(three, tmp_path / "run", "--epochs", 1, "--init", checkpoint, "--lr", "1e-9")
    del argv[:2]  # the checkpoint knows the method
    train.main(argv)
    assert reads == [checkpoint, checkpoint]  # by --eval --init, and by --init
    assert "knows 2 classes, which are not the 3" in capsys.readouterr().out
    ours, theirs = state(tmp_path / "run"), state(trained[0])
    assert len(ours["head.weight"]) == 3 and ours.keys() == theirs.keys()
    for key in set(ours) - {"head.weight", "head.bias"}:
        torch.testing.assert_close(ours[key], theirs[key], atol=1e-6, rtol=0)
    assert train.load(tmp_path / "run" / "checkpoint.pt")["run"]["init"] == str(checkpoint)


@pytest.mark.parametrize("method", ["st_adapter", "zeroi2v", "side4video"])
def test_init_takes_ours_of_every_method(method, folder, tmp_path):
    train.main(flags(folder, tmp_path / "first", "--epochs", 1, "--method", method))
    checkpoint = tmp_path / "first" / "checkpoint.pt"
    train.main(flags(folder, tmp_path / "next", "--epochs", 1, "--method", method, "--init", checkpoint, "--lr", 0))
    a, b = ({k: v for k, v in state(tmp_path / name).items() if "running" not in k} for name in ("first", "next"))
    a, b = ({k: v for k, v in x.items() if "batches_tracked" not in k} for x in (a, b))
    assert_same_state(a, b)


def test_a_backbone_that_came_with_init_stays_when_the_run_is_resumed(folder, tmp_path):
    argv = flags(folder, tmp_path / "first", "--epochs", 1, "--pretrained", "none", "--backbone", "ViT-Toy-16")
    train.main(argv)
    checkpoint = tmp_path / "first" / "checkpoint.pt"
    argv = flags(folder, tmp_path / "next", "--init", checkpoint, "--pretrained", "shipped")
    train.main([*argv, "--epochs", "1"])
    assert train.load(tmp_path / "next" / "checkpoint.pt")["run"]["pretrained"] is None
    train.main([*argv, "--epochs", "2", "--resume"])
    assert train.load(tmp_path / "next" / "checkpoint.pt")["run"]["pretrained"] is None
    frozen = "vit.transformer.resblocks.0.mlp.c_fc.weight"
    torch.testing.assert_close(state(tmp_path / "next")[frozen], state(tmp_path / "first")[frozen])


def test_init_takes_the_recipe_of_the_checkpoints_backbone(tmp_path):
    run = {**train.DEFAULTS, "method": "side4video", "backbone": "ViT-L-14", "model": dict(width=512)}
    torch.save({"run": run, "state": {}, "classes": []}, tmp_path / "large.pt")
    args = train.parse(["--data", "k400", "--init", str(tmp_path / "large.pt")])
    assert train.settings_to_start_from(train.read(tmp_path / "large.pt"), args)["lr"] == 1e-4


def test_a_finished_run_says_so_and_is_left_alone(trained, folder, capsys):
    out, _ = trained
    before = (out / "run.json").read_text(), (out / "checkpoint.pt").read_bytes()
    result = train.main(flags(folder, out, "--resume", "--views", 2, 3))
    assert "this run is finished" in capsys.readouterr().out
    assert result["top1"] == lines(out)[-1]["top1"]
    assert before == ((out / "run.json").read_text(), (out / "checkpoint.pt").read_bytes())


@pytest.mark.slow
def test_two_processes_stop_together_at_a_signal(folder, tmp_path):
    """The others wait until process 0 has saved; what is printed and kept is one thing."""
    out = tmp_path / "run"
    argv = flags(folder, out, "--epochs", 500, "--eval-every", 500, "--batch-size", 4)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    process = subprocess.Popen([*command, *argv], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    while not (out / "log.jsonl").exists() or len(lines(out, "loss")) < 3:
        time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()
    process.terminate()
    _, error = process.communicate(timeout=60)
    at = train.load(out / "checkpoint.pt")["progress"]
    assert f"stopped and saved after step {at['step']} of epoch {at['epoch'] + 1}" in error
    assert error.count("go on with") == 1 and "FileNotFoundError" not in error
    done = run(*flags(folder, out, "--epochs", at["epoch"] + 1, "--batch-size", 4, "--resume"), processes=2)
    assert done.returncode == 0, done.stderr
    assert lines(out)[-1]["videos"] == 8


def test_accuracy_by_class_and_confusion_are_tables(trained, tmp_path):
    out, _ = trained
    train.main(
        ["--eval", "--checkpoint", str(out / "checkpoint.pt"), "--workers", "0", "--out", str(tmp_path / "tables")]
    )
    for place in (out, tmp_path / "tables"):
        with open(place / "val_classes.csv", newline="") as file:
            classes = list(csv.DictReader(file))
        with open(place / "val_confusion.csv", newline="") as file:
            header, *rows = csv.reader(file)
        assert [row["class"] for row in classes] == header[1:] == [row[0] for row in rows] == ["grows", "shrinks"]
        counts = torch.tensor([[int(cell) for cell in row[1:]] for row in rows])
        assert counts.sum(1).tolist() == [int(row["videos"]) for row in classes] == [4, 4]
        assert [float(row["top1"]) for row in classes] == [25.0 * n for n in counts.diag().tolist()]
        assert 100 * counts.diag().sum() / 8 == lines(out)[-1]["top1"]


def test_a_rate_that_is_too_large_stops_the_run(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(flags(folder, tmp_path / "run", "--lr", "1e30"))
    assert stop.value.code == 2 and "not finite at step" in capsys.readouterr().err


def test_fp16_overflows_are_the_scalers_affair_and_counted(folder, tmp_path, monkeypatch):
    """A scale that is too large by far: steps are left out until it has come down, and the log says how many."""
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **more: real(*args, init_scale=2.0**120, **more))
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    train.main(flags(folder, tmp_path / "run", "--precision", "fp16", "--epochs", 1))
    overflows = [line["overflows"] for line in lines(tmp_path / "run", "loss")]
    assert overflows == [1, 2, 3] and lines(tmp_path / "run")[0]["overflows"] == 3
    before = train.build(train.load(tmp_path / "run" / "checkpoint.pt")["run"], 2, torch.device("cpu"))
    assert_same_state(common.tuned_state(before), state(tmp_path / "run"))


def test_a_second_run_takes_the_next_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = train.parse(["--method", "aim", "--data", "toy"])
    assert train.run_folder(args) == Path("runs/aim-toy")
    Path("runs/aim-toy").mkdir(parents=True)
    Path("runs/aim-toy/checkpoint.pt").touch()
    assert train.run_folder(args) == Path("runs/aim-toy-2")
    args.resume = True
    assert train.run_folder(args) == Path("runs/aim-toy")
    Path("runs/aim-toy-3").mkdir()  # the second was removed
    assert train.run_folder(args) == Path("runs/aim-toy-3")
    args.resume = None
    assert train.run_folder(args) == Path("runs/aim-toy-4")
    for name in ("mine.v1", "mine.v2"):
        Path(name).mkdir()
        args.data = name
        assert train.run_folder(args) == Path(f"runs/aim-{name}")


def test_runs_that_begin_at_once_share_no_folder_and_each_is_told_its_own_to_go_on(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    argv = [flag for flag in flags(folder, "OUT") if flag not in ("--out", "OUT")]
    first = train.prepare(train.parse(argv))[1]["out"]
    args = train.parse(argv)
    answers = iter([first, Path(f"{first}-2")])  # another run takes the first meanwhile
    monkeypatch.setattr(train, "run_folder", lambda args: next(answers))
    second = train.prepare(args)[1]["out"]
    assert (first, second) == (Path(f"runs/aim-{folder.name}"), Path(f"runs/aim-{folder.name}-2"))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)

    real = train.probabilities
    monkeypatch.setattr(train, "probabilities", lambda *args: os.kill(os.getpid(), signal.SIGINT) or real(*args))
    with pytest.raises(SystemExit):
        train.main(argv)
    assert capsys.readouterr().err.rstrip().endswith(f"--out runs/aim-{folder.name}-3 --resume")


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(folder, tmp_path, monkeypatch, capsys):
    out, real = tmp_path / "run", torch.save

    def full(checkpoint, file):
        if checkpoint["progress"]["epoch"]:
            file.write(b"half")
            raise RuntimeError("unexpected pos")  # what torch.save makes of it
        real(checkpoint, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as stop:
        train.main(flags(folder, out))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "is the disk full?" in error and "what it had learned before is in" in error
    assert not (out / "checkpoint.partial").exists() and train.load(out / "checkpoint.pt")["progress"]["step"] == 3


def test_a_run_goes_on_with_its_own_videos_wherever_they_lie(folder, tmp_path, capsys):
    """The same clips under another path are the same; other clips, or other labels, are not."""
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(folder, moved)
    shutil.copytree(folder, other)
    (other / "train" / "grows" / "0.mp4").rename(other / "train" / "grows" / "100.mp4")
    out = tmp_path / "run"
    train.main(flags(folder, out))
    with pytest.raises(SystemExit) as stop:
        train.main(flags(other, out, "--resume", "--epochs", 3))
    assert stop.value.code == 2 and "other training videos" in capsys.readouterr().err
    train.main(flags(moved, out, "--resume", "--epochs", 3))
    assert [line["epoch"] for line in lines(out)] == [1, 2, 3]


def test_bf16_trains_close_to_float32(folder, tmp_path):
    still = ["--set", "dropout=0.0", "drop_path=0.0", "--epochs", 1]
    for precision in ("fp32", "bf16"):
        train.main(flags(folder, tmp_path / precision, *still, "--precision", precision))
    losses = [lines(tmp_path / p)[0]["train_loss"] for p in ("fp32", "bf16")]
    assert losses[0] == pytest.approx(losses[1], rel=0.03) and losses[0] != losses[1]


@pytest.mark.slow
def test_the_readmes_training_command_learns(tmp_path):
    """`python train.py --method aim --data toy`, whole, in a fresh place: at least 90 % over the monotone classes."""
    done = run("--method", "aim", "--data", "toy", "--data-root", tmp_path, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    result = lines(tmp_path / "run")[-1]
    assert result["top1 monotone"] >= 90 and result["videos"] == toy.CLIPS["val"]
