"""The training loop as its users meet it: real videos, real processes, wrong flags."""

import csv
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
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
METHODS = ("aim", "st_adapter", "zeroi2v", "side4video")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A learnable handful: toy videos of two classes, 24 to train, 7 to evaluate."""
    root = tmp_path_factory.mktemp("data") / "motions"
    for seed, (split, pairs) in enumerate({"train": 12, "val": 4}.items()):
        for name in ("grows", "shrinks"):
            (root / split / name).mkdir(parents=True)
        for i in range(pairs):
            frames = toy.clip("grows", np.random.default_rng([seed, i]))
            toy.write_video(root / split / "grows" / f"{i}.mp4", frames)
            toy.write_video(root / split / "shrinks" / f"{i}.mp4", frames[::-1])
    (root / "val" / "shrinks" / "3.mp4").unlink()  # an odd number, which two processes cannot share evenly
    return root


def flags(folder, out, *more):
    fixed = "--method aim --recipe toy --batch-size 8 --epochs 2 --warmup-epochs 0.5 --eval-every 1 --num-frames 4"
    fixed += " --workers 0 --device cpu"
    return [*fixed.split(), "--data", str(folder), "--out", str(out), *map(str, more)]


def cpu(*argv):
    return train.main([*map(str, argv), "--workers", "0", "--device", "cpu"])


def start(argv, code=None, processes=1, **options):
    """A real process: of train.py, or of `code`."""
    command = [sys.executable, *(["train.py"] if code is None else ["-c", f"import train\n{code}"])]
    if processes > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
        command = [*torchrun, "--nproc_per_node", str(processes), *command]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | options
    return subprocess.Popen([*command, *argv], cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"), **options)


def finish(process, code=0):
    """-> what a process says of its errors, when it has ended, and all those that it has started with it."""
    errors = process.communicate(timeout=1200)[1]
    assert process.returncode == code and "Traceback" not in errors, errors
    return errors


def lines(out, key="val"):
    """Of log.jsonl: an evaluation's lines have "val", those of training "loss"."""
    return [line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if key in line]


def wait_for_lines(out, process, count):
    while not (out / "log.jsonl").exists() or len(lines(out, "loss")) < count:
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()[1]


def settings(text):
    return train.settings(train.parse(text.split())[1])


def refused(argv, capsys):
    """What train.py says of a command line that it refuses."""
    with pytest.raises(SystemExit) as stop:
        train.main(list(map(str, argv)))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    return error.strip().splitlines()[-1]


def read(out, name="checkpoint.pt"):
    return train.read(out / name)


def assert_same_state(a, b, rtol=0.0, atol=0.0, without=()):
    assert a["state"].keys() == b["state"].keys()
    for name in [name for name in a["state"] if not name.endswith(without)]:
        torch.testing.assert_close(a["state"][name], b["state"][name], rtol=rtol, atol=atol)


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A whole run at a terminal -> its folder, what it printed, what the terminal showed"""
    out, (ours, theirs) = tmp_path_factory.mktemp("runs") / "whole", pty.openpty()
    subprocess.run(["stty", "cols", "160", "rows", "40"], stdin=theirs)
    process = start(flags(folder, out), stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while more := os.read(ours, 4096):
            shown += more
    except OSError:  # the other end is closed
        pass
    printed = process.communicate()[0]
    assert process.returncode == 0, shown
    return out, printed, shown.decode()


def test_a_run_shows_a_bar_and_leaves_a_log_its_settings_a_table_and_a_small_checkpoint(trained):
    out, printed, shown = trained
    assert all(words in shown for words in ("0/6", "6/6", "epoch 2/2", "loss ", "top-1 ", "clips/s", "\r"))
    assert re.search(r"\[\d+:\d\d<\d+:\d\d", shown)  # the time that has passed, and the time left
    for words in ("lr=0.008", "epochs=2", "'drop_path': 0.0", "val: top1", "of 7 videos", "M parameters tuned"):
        assert words in printed
    files = {"best.pt", "checkpoint.pt", "log.jsonl", "run.json", "skipped.txt", "val_classes.csv"}
    assert {path.name for path in out.iterdir()} == files
    window = {"epoch", "step", "loss", "top1", "lr", "grad_norm", "overflows", "clips_per_second"}
    assert all(line.keys() == window for line in lines(out, "loss"))
    assert [line["step"] for line in lines(out, "loss")] == [line["step"] for line in lines(out)] == [3, 6]
    assert all(line.keys() == {"epoch", "step", "val"} for line in lines(out))
    checkpoint = read(out)
    assert not any(name.startswith("vit.") and "ln_post" not in name for name in checkpoint["state"])
    assert json.loads((out / "run.json").read_text()) == json.loads(json.dumps(checkpoint["run"]))
    _, tunable = common.count_parameters(train.build(checkpoint["run"], ["grows", "shrinks"]))
    tuned = sum(tensor.numel() for tensor in checkpoint["state"].values())
    moments = sum(entry["exp_avg"].numel() for entry in checkpoint["optimizer"]["state"].values())
    assert tuned == moments == tunable


def test_evaluation_sees_all_views_of_each_video_once_and_writes_a_table_of_the_classes(trained, tmp_path, monkeypatch):
    seen, real = [], aim.AIM.features
    monkeypatch.setattr(aim.AIM, "features", lambda self, video: seen.append(video.shape[:2]) or real(self, video))
    ask, last = (
        ["--eval", "--checkpoint", trained[0] / "checkpoint.pt", "--out", tmp_path],
        lines(trained[0])[-1]["val"],
    )
    assert cpu(*ask, "--views", "2,3").keys() == last.keys() == {"top1", "top5", "videos"}
    assert seen == [(6, 4)] * 7  # one video per batch, of 6 views and 4 frames
    assert cpu(*ask) == last and last["videos"] == 7
    for place in (trained[0], tmp_path):
        with open(place / "val_classes.csv", newline="") as file:
            header, *rows = csv.reader(file)
        assert header == ["class", "videos", "top1", "grows", "shrinks"] and [row[0] for row in rows] == header[3:]
        counts = torch.tensor([[int(cell) for cell in row[3:]] for row in rows])
        assert counts.sum(1).tolist() == [int(row[1]) for row in rows] == [4, 3]
        assert [row[2] for row in rows] == [f"{100 * counts[c, c] / counts[c].sum():.2f}" for c in (0, 1)]
        assert 100 * counts.diag().sum() / 7 == pytest.approx(last["top1"])


def test_predict_saves_the_mean_of_the_views_probabilities_of_the_loaded_model(trained, folder, tmp_path, capsys):
    sharp, one = read(trained[0]), str(folder / "train" / "shrinks" / "0.mp4")
    model, _ = train.load_model(trained[0] / "checkpoint.pt")
    views = data.VideoDataset([data.Clip(one, 0)], 4, 64, views=(3, 2))[0][0]
    with torch.no_grad():
        features = model.features(common.normalize(views, model.vit))
    weight = 100 * sharp["state"]["head.weight"]  # so that a mean of logits would be something else
    sharp["state"] |= {"head.weight": weight, "head.bias": -weight @ features.mean(0)}
    torch.save(sharp, tmp_path / "sharp.pt")
    model, classes = train.load_model(tmp_path / "sharp.pt")
    logits = model.head(features).detach()
    assert (logits.softmax(-1).mean(0) - logits.mean(0).softmax(-1)).abs().max() > 1e-3

    ask = ["--checkpoint", tmp_path / "sharp.pt", "--views", "3,2", "--save", tmp_path / "saved.pt", "--predict"]
    cpu(*ask, one, folder / "val")
    printed, likeliest = capsys.readouterr().out, logits.softmax(-1).mean(0).max()
    assert printed.count("%") == 2 * 8 and f"{one}\n  {100 * likeliest:5.1f} %  " in printed
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    assert len(saved["videos"]) == 8 and saved["classes"] == classes == ["grows", "shrinks"] and not model.training
    torch.testing.assert_close(saved["videos"][one]["probabilities"], logits.softmax(-1).mean(0))
    torch.testing.assert_close(saved["videos"][one]["features"], features.mean(0))
    (tmp_path / "broken.mp4").write_text("no video")
    assert "broken.mp4" in refused([*ask, tmp_path / "broken.mp4", one], capsys)
    assert torch.load(tmp_path / "saved.pt", weights_only=True)["videos"].keys() == {one}  # the others are done first


@pytest.mark.parametrize("method", [*METHODS[1:], "linear_probe", "partial_finetune", "finetune"])
def test_every_method_trains_resumes_and_evaluates(method, folder, tmp_path):
    first = train.main(flags(folder, tmp_path, "--epochs", 1, "--method", method))
    assert cpu("--eval", "--checkpoint", tmp_path / "checkpoint.pt") == first
    cpu("--resume", "--out", tmp_path, "--epochs", 2)
    assert [line["epoch"] for line in lines(tmp_path)] == [1, 2]


@pytest.mark.parametrize("method", METHODS)
def test_recomputing_trains_to_the_same_weights(method, folder, tmp_path, monkeypatch):
    recomputed, real = [], common.recompute
    monkeypatch.setattr(common, "recompute", lambda model: recomputed.append(model) or real(model))
    for name, more in (("kept", []), ("redone", ["--recompute"])):
        train.main(flags(folder, tmp_path / name, "--epochs", 1, "--method", method, *more))
    assert_same_state(read(tmp_path / "kept"), read(tmp_path / "redone"), rtol=1e-4, atol=1e-5)
    assert len(recomputed) == 1


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
    assert_same_state(read(tmp_path / "eager"), read(tmp_path / "compiled"), atol=1e-5)


CROP, RANDOM = dict(crop=(0.08, 1.0)), dict(randaugment=(4, 7))
CROP_FLIP, SHORT = CROP | dict(flip=0.5), dict(short_side=(1.0, 1.15), flip=0.5)
PAPERS = {  # method, data, backbone: epochs, warm-up, batch, rate at that batch, decay, smoothing, span, views, repeat
    "aim k400 ViT-B-16": (30, 3, 64, 3e-4, 0.05, 0.0, 128, (3, 1), 1, CROP_FLIP),
    "aim k700 ViT-L-14": (30, 3, 64, 3e-4, 0.05, 0.0, 128, (3, 1), 1, CROP_FLIP),
    "aim ssv2 ViT-B-16": (50, 3, 64, 3e-4, 0.05, 0.1, 0, (1, 3), 1, CROP | RANDOM | dict(erasing=0.25)),
    "aim diving48 ViT-L-14": (50, 3, 64, 3e-4, 0.05, 0.0, 0, (1, 1), 1, CROP_FLIP),
    "st_adapter k400 ViT-B-16": (12, 2, 192, 7.5e-4, 0.01, 0.0, 128, (3, 1), 1, SHORT),
    "st_adapter ssv2 ViT-B-16": (50, 2, 256, 1e-3, 0.01, 0.0, 0, (1, 3), 1, CROP | RANDOM),
    "zeroi2v k400 ViT-L-14": (40, 2.5, 64, 3e-4, 0.05, 0.0, 128, (3, 1), 1, CROP_FLIP | RANDOM),
    "zeroi2v ssv2 ViT-B-16": (50, 2.5, 64, 3e-4, 0.05, 0.1, 0, (1, 3), 1, CROP_FLIP | RANDOM | dict(erasing=0.25)),
    "side4video k400 ViT-B-16": (30, 4, 256, 1e-3, 0.15, 0.1, 0, (4, 3), 1, CROP_FLIP | dict(gray=0.2)),
    "side4video k400 EVA02-E-14": (20, 4, 128, 1e-4, 0.15, 0.1, 0, (4, 3), 1, CROP_FLIP | RANDOM | dict(gray=0.2)),
    "side4video ssv1 ViT-B-16": (40, 4, 128, 1e-3, 0.15, 0.1, 0, (2, 3), 2, CROP_FLIP | RANDOM),
    "side4video ssv1 EVA02-E-14": (30, 6, 64, 1e-4, 0.15, 0.1, 0, (2, 3), 2, CROP_FLIP | RANDOM),
    "side4video ssv2 ViT-L-14": (30, 4, 128, 1e-4, 0.15, 0.1, 0, (2, 3), 2, CROP_FLIP | RANDOM),
}


@pytest.mark.parametrize("key", PAPERS)
def test_method_data_and_backbone_pick_the_papers_whole_recipe(key):
    run = settings("--method {} --data {} --backbone {}".format(*key.split()))
    run["lr"] *= run["batch_size"] / run["lr_batch"] if run["lr_batch"] else 1
    names = (
        "epochs",
        "warmup_epochs",
        "batch_size",
        "lr",
        "weight_decay",
        "label_smoothing",
        "span",
        "views",
        "repeat",
    )
    assert tuple(run[name] for name in (*names, "augment")) == PAPERS[key]


def test_settings_are_defaults_then_recipe_then_checkpoint_then_flags():
    assert settings("--method aim --data ssv2")["epochs"] == 50 and train.SETTINGS["epochs"][0] == 30
    theirs = {"run": settings("--method aim --data ssv2 --epochs 7 --set ratio=0.125"), "classes": []}
    run = train.settings({"views": (2, 2)}, theirs)
    assert (run["epochs"], run["model"]["ratio"], run["views"], run["seed"]) == (7, 0.125, (2, 2), 0)
    begun = train.settings({"data": "k400"}, theirs, init=True)  # the recipe is that of the new data
    assert (begun["epochs"], begun["model"]["ratio"], begun["method"]) == (30, 0.125, "aim")
    theirs["run"] = settings("--method side4video --data ssv2 --backbone ViT-L-14")
    assert train.settings({"data": "k400"}, theirs, init=True)["lr"] == 1e-4  # and that of the checkpoint's backbone
    assert settings("--method st_adapter --data k400 --lr 1e-3")["lr_batch"] == 0  # the rate is what was asked for
    assert settings("--method st_adapter --data k400 --lr 1e-3 --lr-batch 64")["lr_batch"] == 64
    fine = settings("--method finetune --data k400")
    assert fine["lr"] == pytest.approx(3e-5)  # a tenth of AIM's (ZeroI2V, appendix A.2)
    assert settings("--method st_adapter --data ssv1")["batch_size"] == 256  # Something-Something's recipe
    diving = settings("--method st_adapter --data diving48")
    assert (diving["span"], diving["views"], diving["epochs"]) == (0, (1, 1), 12)  # Kinetics' recipe, its own sampling
    for name in ("ViT-L/14", "ViT-L-14-336", "ViT-L-14-quickgelu"):  # a backbone may have its own
        assert settings(f"--method side4video --data videos --recipe k400 --backbone {name}")["model"] == {"width": 512}
    for text, switches in (
        ("aim --data k400", dict(drop_path=0.2)),
        ("aim --data ssv2", dict(drop_path=0.2, temporal_in=True)),
        ("st_adapter --data videos", {}),
        ("st_adapter --data ssv2", dict(before_attention=True)),
        ("zeroi2v --data k700", {}),
        ("zeroi2v --data ssv1", dict(dataset="ssv2", scale=1.0)),
        ("side4video --data videos", {}),
    ):
        assert settings(f"--method {text}")["model"] == switches


def test_items_override_single_keywords_of_the_augmentation_and_of_the_model():
    text = "--method aim --data ssv2 --augment crop=0.5,1 randaugment=2,9 gray=0.2 --set temporal=false blocks=top"
    assert settings(text)["augment"] == dict(crop=(0.5, 1.0), randaugment=(2, 9.0), erasing=0.25, gray=0.2)
    assert settings(text)["model"] == dict(drop_path=0.2, temporal_in=True, temporal=False, blocks="top")
    assert settings("--method st_adapter --data videos --set kernel=3,3,3")["model"]["kernel"] == (3, 3, 3)


def test_help_lists_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, (default, text) in (train.JOB | train.SETTINGS).items():
        flag = "--set" if name == "model" else f"--{name.replace('_', '-')}"
        assert flag in shown and f"{' '.join(text.split())} (default: {default!r})" in shown


# Nothing depends on them, since a softmax or a batch norm takes them away again: their gradients are rounding errors,
# which AdamW makes as large as any other. (And the mean that the batch norm behind them takes away.)
CANCELS = ("k.fc2.bias", "in_proj_bias", "out_proj.bias", "mlp.2.bias", "stem.bias", "running_mean")


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
    commands = {}
    for name in ("one", "two", "four passes"):
        for method in METHODS:
            more = ["--epochs", 1, "--batch-size", 4, "--method", method, "--set", "dropout=0", "--lr", "3e-4"]
            more += ["--accumulate", 4] if name == "four passes" else []
            commands.setdefault(name, []).append(flags(folder, tmp_path / name / method, *more))
    sockets = [socket.create_server(("", 0)) for _ in METHODS]
    ports = [(s.getsockname()[1], s.close())[0] for s in sockets]
    context = torch.multiprocessing.get_context("spawn")
    reduced = context.SimpleQueue()
    jobs = [(train_as, (1, range(8), commands["one"] + commands["four passes"], reduced), 1)]
    jobs += [(train_as, (2, ports, commands["two"], reduced), 2)]
    for processes in [torch.multiprocessing.start_processes(*job, join=False) for job in jobs]:
        while not processes.join():
            pass
    sizes = [reduced.get() for _ in range(2 * len(METHODS))]
    assert all(sent == tuned for sent, tuned in sizes)
    pairs = [(method, other) for method in METHODS for other in ("two", "four passes")]
    pairs.remove(("side4video", "four passes"))  # its batch norms see a pass at a time
    for method, other in pairs:
        one, there = tmp_path / "one" / method, tmp_path / other / method
        losses = [[line["loss"] for line in lines(out, "loss")] for out in (one, there)]
        assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], abs=1e-5)
        assert_same_state(read(one), read(there), atol=1e-5, without=CANCELS)
        assert lines(there)[0]["val"]["videos"] == 7
        assert (there / "val_classes.csv").read_text() == (one / "val_classes.csv").read_text()


def test_no_decay_on_biases_norms_and_embeddings_whose_rate_is_their_own():
    for method, embedding in (("aim", "temporal_embedding"), ("side4video", "position_embedding")):
        run = settings(f"--method {method} --data toy --weight-decay 0.1 --embedding-lr 7")
        model = train.build(run, ["a", "b"])
        names = {p: name for name, p in model.named_parameters()}
        groups = [(names[p], group) for group in train.parameter_groups(model, run) for p in group["params"]]
        assert sorted(name for name, _ in groups) == sorted(names[p] for p in names if p.requires_grad)
        for name, group in groups:
            norm = any(part in name for part in ("ln", "bn", "norm", "gamma"))
            assert group["weight_decay"] == (0.1 if name.endswith("weight") and not norm else 0), name
            assert group["rate"] == (7 if name == embedding else 1)


def test_the_rate_warms_up_and_falls_as_a_cosine():
    rates = [train.warmup_cosine(step, 100, 10) for step in range(101)]
    assert rates[0] == 0 and rates[5] == 0.5 and rates[10] == 1
    assert rates[55] == pytest.approx(0.5) and rates[100] == pytest.approx(0)
    assert train.warmup_cosine(0, 100, 0) == 1


def test_rates_decay_clipping_and_accumulation_reach_the_step(folder, tmp_path, monkeypatch):
    steps, real = [], torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        norm = torch.stack([p.grad.norm() for group in self.param_groups for p in group["params"]]).norm().item()
        steps.append(({group["rate"]: group["lr"] for group in self.param_groups}, norm))
        return real(self, *args, **kwargs)

    def first(name, *more):
        steps.clear()
        still = ["--epochs", 1, "--set", "dropout=0", "--embedding-lr", 3, "--warmup-epochs", 0, "--lr", 0.002]
        train.main(flags(folder, tmp_path / name, *still, "--clip-grad", 0, *more))
        return *steps[0], lines(tmp_path / name, "loss")[0]["loss"]

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    rates, norm, loss = first("plain")
    assert rates == {1.0: 0.002, 3.0: 0.006} and norm > 0.1
    assert first("clipped", "--clip-grad", 0.05)[1] == pytest.approx(0.05, rel=1e-3)
    assert first("four", "--accumulate", 4)[1:] == (pytest.approx(norm, rel=1e-3), pytest.approx(loss, rel=1e-4))
    assert first("scaled", "--lr-batch", 16)[0] == {1.0: 0.001, 3.0: 0.003}  # a batch of 8
    first("decayed", "--weight-decay", 100, "--lr", 1e-2)
    weight = "adapters.0.spatial.fc1.weight"
    assert read(tmp_path / "decayed")["state"][weight].norm() < 0.1 * read(tmp_path / "plain")["state"][weight].norm()


def test_the_loss_is_the_models_and_label_smoothing_is_in_it(folder, tmp_path, monkeypatch):
    logits, label = torch.randn(4, 5), torch.tensor([0, 1, 2, -100])
    log = logits.log_softmax(-1)
    smooth = -0.9 * log[range(3), label[:3]] - 0.1 * log[:3].mean(-1)
    torch.testing.assert_close(common.cross_entropy(logits, label, 0.1), torch.cat([smooth, torch.zeros(1)]))
    asked, real = [], aim.AIM.loss
    loss = staticmethod(lambda *args: asked.append(args[2]) or real(*args) + 100)
    monkeypatch.setattr(aim.AIM, "loss", loss)
    train.main(flags(folder, tmp_path, "--epochs", 1, "--label-smoothing", 0.3))
    assert asked == [0.3] * 3 and lines(tmp_path, "loss")[0]["loss"] > 100


def test_repeated_sampling_draws_each_clip_anew_in_one_batch():
    run = dict(seed=0, batch_size=4, repeat=2, accumulate=1, epochs=2)

    def batches(rank=0, size=1, step=0):
        return list(data.train_batches(run, 6, rank, size, 0, step))

    whole = batches()
    assert sorted(i for batch in whole for i in batch) == list(range(24)) and len(whole) == 6  # each clip, four times
    assert all(a % 6 == b % 6 and b - a == 6 for batch in whole for a, b in zip(batch[::2], batch[1::2]))
    assert batches(step=2) == whole[2:]
    run["accumulate"] = 2
    parts = zip(batches(0, 2)[::2], batches(1, 2)[::2], batches(0, 2)[1::2], batches(1, 2)[1::2])
    assert [[*a, *b, *c, *d] for a, b, c, d in parts] == whole


def test_broken_videos_are_skipped_counted_and_listed_and_too_many_stop_the_run(folder, tmp_path, capsys):
    def argv(broken, batch_size):
        for split, count in (("train", broken), ("val", 1)):
            good = [f"{p} {int(p.parent.name == 'shrinks')}" for p in sorted((folder / split).rglob("*.mp4"))]
            bad = [tmp_path / f"{split}-broken-{i}.mp4" for i in range(count)]
            for path in bad:
                path.write_text("no video")
            (tmp_path / f"{split}.txt").write_text("\n".join([*good, *(f"{path} 1" for path in bad)]))
        more = ["--val-data", tmp_path / "val.txt", "--epochs", 1, "--batch-size", batch_size]
        return flags(tmp_path / "train.txt", tmp_path / f"{broken}", *more)

    for broken, batch_size in ((1, 1), (10, 2)):  # one that is a batch of its own, and ten, which are still forgiven
        train.main(argv(broken, batch_size))
        printed, skipped = capsys.readouterr().out, (tmp_path / f"{broken}" / "skipped.txt").read_text().splitlines()
        assert "of 7 videos" in printed and f"{broken + 1} videos could not be read" in printed
        assert ["train-broken" in line for line in skipped] == [True] * broken + [False]
        assert "val-broken-0.mp4" in skipped[-1]
    assert "more than 5%" in refused(argv(14, 2), capsys)


WRONG = {
    "": "say what to train",
    "--method aim": "toy, k400, k700",
    "--method aimm --data toy": "invalid choice: 'aimm'",
    "--method aim --data toy --epoch 3": "unrecognized arguments: --epoch",
    "--method aim --data toy --lr fast": "lr cannot be 'fast'",
    "--method aim --data toy --set rate=1": "'rate' cannot be set",
    "--method aim --data toy --set temporal=off": "temporal cannot be 'off'",
    "--method aim --data FOLDER --recipe toy --set blocks=some": "every second",
    "--method aim --data toy --augment zoom=1": "'zoom' cannot be set",
    "--method aim --data toy --augment crop=1": "crop cannot be '1'",
    "--method aim --data nowhere": "nowhere",
    "--method aim --data EMPTY": "must hold train/CLASS",
    "--method aim --data FOLDER --backbone ViT-B-61": "unknown backbone 'ViT-B-61'",
    "--method aim --data FOLDER --recipe k401": "no recipe 'k401'",
    "--method aim --data FOLDER --recipe toy --pretrained nothing.pt": "neither a file nor",
    "--method aim --data FOLDER --recipe toy --batch-size 1000": "at most the 24 clips",
    "--method aim --data FOLDER --recipe toy --batch-size 8 --accumulate 3": "a multiple of 3",
    "--method aim --data FOLDER --recipe toy --out RUN": "of another run",
    "--resume --out RUN --weight-decay 0.5": "made with weight_decay 0.05, which cannot become 0.5",
    "--resume --out RUN --set ratio=0.5": "made with model",
    "--resume --out RUN --seed 1": "made with seed 0",
    "--resume --out RUN --batch-size 4": "made with batch_size 8",
    "--method zeroi2v --data FOLDER --init TRAINED": "made with method aim",
    "--data FOLDER --init TRAINED --backbone ViT-B-32": "made with backbone ViT-Toy-16, which cannot become ViT-B-32",
    "--data FOLDER --init WEIGHTS": "neither a checkpoint of train.py nor one that the authors",
    "--eval --checkpoint nothing.pt": "there is no checkpoint",
    "--eval --checkpoint TEXT": "that can be read safely",
    "--eval --checkpoint TRAINED --data THREE": "knows 2 classes, which are not the 3",
    "--eval --checkpoint TRAINED --method linear_probe": "made with method aim",
    "--eval --checkpoint TRAINED --split test": "no video to evaluate on",
    "--predict nothing.mp4 --checkpoint TRAINED": "nothing.mp4",
}


@pytest.mark.parametrize("argv", WRONG)
def test_what_is_wrong_is_said_in_a_sentence_with_exit_code_2(argv, trained, folder, three, tmp_path, capsys):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "weights.pt")
    (tmp_path / "text.pt").write_text("text")
    places = dict(WEIGHTS=tmp_path / "weights.pt", TEXT=tmp_path / "text.pt", TRAINED=trained[0] / "checkpoint.pt")
    places |= dict(FOLDER=folder, THREE=three, EMPTY=tmp_path, RUN=trained[0])
    before = places["TRAINED"].read_bytes()
    said = refused([places.get(word, word) for word in argv.split()], capsys)
    assert WRONG[argv] in said and len(said) < 400 and before == places["TRAINED"].read_bytes()


def test_a_crash_while_saving_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    common.save({"run": {}, "classes": [], "state": {"a": 3}}, tmp_path / "checkpoint.pt")

    def crash(checkpoint, file):
        file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        common.save({"run": {}, "classes": [], "state": {"a": 4}}, tmp_path / "checkpoint.pt")
    assert read(tmp_path)["state"]["a"] == 3


OFTEN = "train.LOG_EVERY, train.SAVE_EVERY = 2, 0\n"
KILLED = """
import os, signal, torch
owner, name, at = {}
real, calls = getattr(owner, name), []

def killed(*args):
    calls.append(args)
    if len(calls) == at:
        if name == "save":
            args[1].write(b"half of a checkpoint")
            args[1].flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)

setattr(owner, name, killed)
train.main()
"""


def test_killed_anywhere_a_resumed_run_ends_with_the_same_bits(folder, tmp_path):
    """SIGKILL of real processes: in a step, half-way through a save, while evaluating; then the end."""
    whole, out = tmp_path / "whole", tmp_path / "killed"

    def begin(out, code, workers=0):
        more = ["--batch-size", 4, "--set", "dropout=0.5", "drop_path=0.2", "--workers", workers, "--resume"]
        return start(flags(folder, out, *more), OFTEN + code)

    once = begin(whole, "train.main()")
    step = "train, 'warmup_cosine', 6"
    for where, workers in ((step, 0), ("torch, 'save', 1", 0), ("train, 'outputs', 1", 0), (step, 2)):
        killed = begin(out, KILLED.format(where), workers)
        said = killed.communicate(timeout=300)[1]  # returns when its loaders have ended as well
        assert killed.returncode == -signal.SIGKILL, said
        assert not (out / "checkpoint.pt").exists() or read(out)["progress"]["epoch"] < 2
    finish(begin(out, "train.main()"))
    finish(once)
    assert_same_state(read(out), read(whole))
    assert read(out)["optimizer"]["state"][0]["step"] == 12
    logs = [[line | {"clips_per_second": 0} for line in lines(o, "epoch")] for o in (out, whole)]
    assert logs[0] == logs[1] and len(logs[0]) == 6 + 2


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_with_the_same_bits(folder, tmp_path, kills=8):
    rng, out, moments = np.random.default_rng(0), tmp_path / "killed", []

    def begin(out):
        argv = flags(folder, out, "--epochs", 20, "--batch-size", 4, "--set", "dropout=0.5", "--resume")
        return start(argv, f"{OFTEN}train.main()")

    finish(begin(tmp_path / "whole"))
    for _ in range(kills):
        process = begin(out)
        while process.poll() is None and "method=aim" not in process.stdout.readline():
            pass
        time.sleep(rng.uniform(0, 1))
        assert process.poll() is None, process.stderr.read()
        process.kill()
        process.wait()
        at = read(out)["progress"] if (out / "checkpoint.pt").exists() else {}
        moments.append((at.get("epoch", 0), at.get("step", 0)))
    finish(begin(out))
    print("killed when the checkpoint was at (epoch, step)", *moments)
    assert moments == sorted(moments) and moments[-1] > (0, 0)
    assert_same_state(read(out), read(tmp_path / "whole"))
    steps = [[line["step"] for line in lines(o, "loss")] for o in (out, tmp_path / "whole")]
    assert steps[0] == steps[1] == list(range(2, 121, 2))


@pytest.mark.parametrize(("signum", "workers"), [(signal.SIGINT, 2), (signal.SIGTERM, 2), (signal.SIGTERM, 0)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(folder, tmp_path, signum, workers):
    """Also when it goes to every process of the group, as Ctrl-C does, and twice, as through `timeout`."""
    out = tmp_path / "run"
    argv = flags(folder, out, "--epochs", 500, "--batch-size", 4, "--eval-every", 500, "--workers", workers)
    process = start(argv, start_new_session=True)
    wait_for_lines(out, process, 2)
    began = time.monotonic()
    os.killpg(process.pid, signum)
    os.kill(process.pid, signum)
    error = finish(process, 128 + signum)
    assert time.monotonic() - began < 30  # its loaders, which outlive the signal, have ended
    at = read(out)["progress"]
    assert f"stopped and saved after step {at['step']} of epoch {at['epoch'] + 1}" in error
    assert error.rstrip().endswith(f"train.py --resume --out {out}")
    assert read(out)["optimizer"]["state"][0]["step"] == 6 * at["epoch"] + at["step"] > 2


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_stop_together_at_a_signal(folder, tmp_path, signum):
    """Ctrl-C reaches the loaders too, which are needed until the processes meet. What is said and kept is one thing."""
    out = tmp_path / "run"
    argv = flags(folder, out, "--eval-every", 500, "--batch-size", 2, "--workers", 1)
    process = start([*argv, "--epochs", "500"], "train.main()", processes=2, start_new_session=True)
    wait_for_lines(out, process, 3)
    target = process.pid if signum == signal.SIGTERM else -process.pid  # a process, or its group
    os.kill(target, signum)
    error = process.communicate(timeout=60)[1]
    at = read(out)["progress"]
    assert f"stopped and saved after step {at['step']} of epoch {at['epoch'] + 1}" in error
    assert error.count("continue with") == 1 and "FileNotFoundError" not in error and "loader" not in error.lower()
    finish(start([*argv, "--epochs", str(at["epoch"] + 1), "--resume"], "train.main()", processes=2))
    assert lines(out)[-1]["val"]["videos"] == 7


def test_a_signal_while_evaluating_stops_and_what_was_trained_is_kept(folder, tmp_path, monkeypatch, capsys):
    def interrupted(self, video):
        if not self.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, video)

    real, before = aim.AIM.features, signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(aim.AIM, "features", interrupted)
    with pytest.raises(SystemExit) as stop:
        train.main(flags(folder, tmp_path / "run"))
    assert stop.value.code == 143 and "after step 3 of epoch 1" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.setattr(aim.AIM, "features", real)
    cpu("--resume", "--out", tmp_path / "run")
    assert [line["epoch"] for line in lines(tmp_path / "run")] == [1, 2]


def test_a_run_that_ends_while_it_evaluates_has_lost_no_step(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "outputs", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(flags(folder, tmp_path))
    assert (read(tmp_path)["progress"]["epoch"], read(tmp_path)["progress"]["step"]) == (0, 3)


def test_importing_train_changes_nothing_outside_itself():
    code = """
import atexit, multiprocessing, signal, sys, threading
import av, open_clip, timm, torch, torchvision.transforms.v2, tqdm

def seen():
    handlers, random = [signal.getsignal(s) for s in signal.valid_signals()], torch.get_rng_state().tolist()
    return atexit._ncallbacks(), multiprocessing.active_children(), threading.active_count(), handlers, random

before = seen()
import train
assert before == seen()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_loss_that_is_not_finite_stops_at_once_and_names_step_and_clips(folder, tmp_path, processes):
    """And keeps the last good checkpoint."""
    out = tmp_path / "run"
    code = """
import torch
real, calls = train.aim.AIM.loss, []

def broken(*args):
    calls.append(args)
    loss = real(*args)
    return loss * torch.tensor([1.0, float("nan")]).repeat(len(loss) // 2) if len(calls) == 5 else loss

train.aim.AIM.loss = staticmethod(broken)
train.main()
"""
    process = start(flags(folder, out, "--batch-size", 4, "--workers", 1), OFTEN + code, processes)
    error = process.communicate(timeout=600)[1]
    assert process.returncode and "the loss is not finite at step 5 for" in error
    clips = data.find_clips(str(folder)).train
    run = dict(seed=0, batch_size=4, repeat=1, accumulate=1, epochs=1)
    order = list(data.train_batches(run, 24, 0, 1, 0, 0))[4]
    said = next(line for line in error.splitlines() if "not finite" in line)
    assert [clips[i].path in said for i in order] == [False, True, False, True] and said.count(".mp4") == 2
    assert (read(out)["progress"]["epoch"], read(out)["progress"]["step"]) == (0, 4)
    assert all(tensor.isfinite().all() for tensor in read(out)["state"].values())


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_saves(folder, tmp_path, capsys, monkeypatch):
    assert "not finite at step" in refused(flags(folder, tmp_path / "fast", "--lr", "1e30"), capsys)
    real, steps = torch.nn.utils.clip_grad_norm_, []

    def norm(parameters, largest):
        steps.append(1)
        return real(parameters, largest) * (float("inf") if len(steps) == 5 else 1)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", norm)
    assert "the gradient is not finite at step 5" in refused(flags(folder, tmp_path / "run"), capsys)
    assert read(tmp_path / "run")["progress"]["epoch"] == 1


def test_fp16_overflows_are_left_out_and_counted(folder, tmp_path, monkeypatch):
    """A scale that is too large by far: steps are left out until it has come down, and the log says how many."""
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **more: real(*args, init_scale=2.0**120, **more))
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    train.main(flags(folder, tmp_path, "--precision", "fp16", "--epochs", 1))
    assert [line["overflows"] for line in lines(tmp_path, "loss")] == [1, 1, 1]
    before = train.build(read(tmp_path)["run"], ["grows", "shrinks"])
    assert_same_state({"state": common.tuned_state(before)}, read(tmp_path))
    cpu("--resume", "--out", tmp_path, "--epochs", 2)
    assert read(tmp_path)["scaler"]["scale"] == 2.0 ** (120 - 3 - 3)


def test_bf16_trains_close_to_float32_and_has_the_frozen_weights_in_bf16(folder, tmp_path, monkeypatch):
    cast, real = [], common.cast_frozen
    monkeypatch.setattr(common, "cast_frozen", lambda model, dtype: cast.append(dtype) or real(model, dtype))
    for precision in ("fp32", "bf16"):
        train.main(flags(folder, tmp_path / precision, "--epochs", 1, "--precision", precision))
    losses = [lines(tmp_path / precision, "loss")[0]["loss"] for precision in ("fp32", "bf16")]
    assert losses[0] == pytest.approx(losses[1], rel=0.03) and losses[0] != losses[1]
    assert cast == [torch.float32, torch.bfloat16]


RELEASED = {
    "aim_k400": ("aim", []),
    "aim_ssv2": ("aim", ["temporal_in=true"]),
    "st_adapter_3x3x3": ("st_adapter", ["bottleneck=12", "kernel=3,3,3", "before_attention=true"]),
    "st_adapter_k400": ("st_adapter", ["bottleneck=12"]),
    "zeroi2v_16f": ("zeroi2v", ["offsets=-1,1,-2,2"]),
    "zeroi2v_6adapters": ("zeroi2v", ["offsets=-1,1", "scale=1", "adapt=q,k,v,o,up,down"]),
    "side4video": ("side4video", ["width=64"]),
}


@pytest.mark.parametrize("name", RELEASED)
def test_init_and_load_model_take_the_authors_files_by_their_keys(name, tmp_path):
    golden = torch.load(ROOT / "tests" / "golden" / f"{name}.pt", weights_only=True)
    c, (method, switches) = golden["config"], RELEASED[name]
    vision = dict(image_size=c["resolution"], patch_size=c["patch"], width=c["width"], layers=c["layers"])
    text = dict(context_length=8, vocab_size=8, width=32, heads=2, layers=1)
    tower = dict(embed_dim=16, vision_cfg=vision | dict(head_width=c["width"] // c["heads"]), text_cfg=text)
    given = dict(backbone=f"ViT-Z-{list(RELEASED).index(name)}", num_frames=c["num_frames"])
    (tmp_path / f"{given['backbone']}.json").write_text(json.dumps(tower))
    open_clip.add_model_config(tmp_path)
    torch.save(golden["checkpoint"], tmp_path / "released.pth")
    checkpoint = read(tmp_path, "released.pth")
    run = train.settings(given | {"data": "k400", "model": switches}, checkpoint, init=True)
    assert (run["method"], run["backbone"], run["pretrained"]) == (method, f"{given['backbone']}-quickgelu", "none")
    loaded, classes = train.load_model(tmp_path / "released.pth", **given, model=switches)
    assert classes == list("01234")
    for model in (loaded, train.build(run, list("abcde"), checkpoint, init=True).eval()):
        torch.testing.assert_close(model(golden["video"]), golden["logits"], atol=1e-4, rtol=0)
    new = train.build(run, list("abc"), checkpoint, init=True).eval()
    assert new(golden["video"]).shape[1] == 3
    torch.testing.assert_close(new.features(golden["video"]), golden["features"], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="5 classes, which are not the 3"):
        train.build(run, list("abc"), checkpoint)


@pytest.fixture(scope="module")
def three(folder, tmp_path_factory):
    """The same videos and more, of three classes."""
    root = shutil.copytree(folder, tmp_path_factory.mktemp("data") / "three")
    for split in ("train", "val"):
        shutil.copytree(folder / split / "grows", root / split / "x")
    return root


@pytest.mark.parametrize("method", METHODS)
def test_init_starts_from_ours_with_a_new_classifier_for_other_classes(method, folder, three, tmp_path, monkeypatch):
    """And reads the file, which may be of gigabytes, once."""
    reads, real = [], common.read_checkpoint
    monkeypatch.setattr(common, "read_checkpoint", lambda path: reads.append(Path(path).name) or real(path))
    train.main(flags(folder, tmp_path / "first", "--epochs", 1, "--method", method))
    for place in (folder, three):
        argv = flags(place, tmp_path / place.name, "--epochs", 1, "--lr", 0)
        train.main([*argv[2:], "--init", str(tmp_path / "first" / "checkpoint.pt")])  # it knows the method
    assert reads.count("checkpoint.pt") == 2
    a, same, other = (read(tmp_path / name)["state"] for name in ("first", "motions", "three"))
    assert a.keys() == same.keys() == other.keys() and len(other["head.weight"]) == 3
    for key in [key for key in a if "running" not in key and "tracked" not in key]:
        assert torch.equal(a[key], same[key]) and (key.startswith("head.") or torch.equal(a[key], other[key]))


def test_a_random_backbone_is_in_the_checkpoint_and_stays_when_a_run_starts_from_it(folder, tmp_path):
    train.main(flags(folder, tmp_path / "first", "--epochs", 1, "--pretrained", "none"))
    argv = flags(folder, tmp_path / "next", "--seed", 3, "--init", tmp_path / "first" / "checkpoint.pt")
    train.main([*argv, "--epochs", "1"])
    train.main([*argv, "--epochs", "2", "--resume"])
    assert read(tmp_path / "next")["run"]["pretrained"] == "none"
    frozen = "vit.transformer.resblocks.0.mlp.c_fc.weight"
    assert torch.equal(*(read(tmp_path / name)["state"][frozen] for name in ("first", "next")))
    assert cpu("--eval", "--checkpoint", tmp_path / "next" / "checkpoint.pt") == lines(tmp_path / "next")[-1]["val"]


def test_a_finished_run_is_left_alone_and_gives_its_result(trained):
    before = [(trained[0] / name).read_bytes() for name in ("checkpoint.pt", "log.jsonl", "run.json")]
    assert cpu("--resume", "--out", trained[0]) == lines(trained[0])[-1]["val"]
    assert before == [(trained[0] / name).read_bytes() for name in ("checkpoint.pt", "log.jsonl", "run.json")]


def test_the_best_checkpoint_lies_beside_the_last_one(folder, tmp_path, monkeypatch):
    top1, real = iter([50.0, 75.0, 62.5]), train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *args: ({"top1": next(top1)}, real(*args)[1]))
    train.main(flags(folder, tmp_path, "--epochs", 5, "--eval-every", 2))
    assert [line["epoch"] for line in lines(tmp_path)] == [2, 4, 5]
    for name, steps in (("best.pt", 4 * 3), ("checkpoint.pt", 5 * 3)):
        assert read(tmp_path, name)["optimizer"]["state"][0]["step"] == steps


def test_a_checkpoint_serves_in_any_folder_and_a_run_goes_on_where_its_videos_lie_now(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    train.main(flags(folder.name, tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    assert cpu("--eval", "--checkpoint", "run/checkpoint.pt")["videos"] == 7
    shutil.copytree(folder, "moved")
    cpu("--resume", "--out", "run", "--data", "moved", "--epochs", 3)
    assert [line["epoch"] for line in lines(tmp_path / "run")] == [1, 2, 3]
    assert read(tmp_path / "run")["run"]["data"] == str(tmp_path / "moved")


def test_of_two_jobs_that_start_with_the_same_folder_one_runs_and_one_says_a_sentence(folder, tmp_path):
    jobs = [start(flags(folder, tmp_path / "run", "--epochs", 1)) for _ in range(2)]
    said = {job.communicate()[1]: job.returncode for job in jobs}
    assert sorted(said.values()) == [0, 2], said
    assert ["is of another run" in error for error, code in said.items() if code] == [True]
    assert len(lines(tmp_path / "run")) == 1


@pytest.mark.slow
def test_the_readmes_training_command_learns(tmp_path):
    """`python train.py --method aim --data toy`, whole, in a fresh place: at least 90 % over the monotone classes."""
    finish(start(["--method", "aim", "--data", "toy", "--data-root", str(tmp_path), "--out", str(tmp_path / "run")]))
    result = lines(tmp_path / "run")[-1]["val"]
    assert result["top1 monotone"] >= 90 and result["videos"] == toy.CLIPS["val"]
