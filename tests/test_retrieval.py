"""Text-video retrieval: CLIP's text tower, the model, its matching and its loss, as the authors' code has them."""

import csv
import json
import math
import os
import socket
import zlib
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

import common
import data
import side4video
import train
from colab import retrieval, tables, toy, train_toy_clip
from common import L14, TextTower, ViT
from side4video import Side4VideoRetrieval, load_official

GOLDEN = Path(__file__).parent / "golden/side4video_retrieval.pt"
NAMES = {  # of the gradients in the golden file
    "clip.visual.side_proj": "up",
    "clip.visual.proj": "vit.proj",
    "clip.visual.ln_post.weight": "vit.ln_post.weight",
    "clip.ln_final.weight": "text.ln_final.weight",
    "clip.logit_scale": "text.logit_scale",
    "clip.visual.transformer.side_spatial_position_embeddings": "position_embedding",
    "clip.positional_embedding": "text.positional_embedding",
    "text_weight_fc.0.bias": "weigh.text.0.bias",
    "video_weight_fc.0.bias": "weigh.video.0.bias",
}


def tiny(matching="wti", frames=4, size=32, patch=8, width=64, layers=2, output_dim=32, words=64, context=16, side=0):
    torch.manual_seed(0)
    vit = ViT(size, patch, width, layers, 2, output_dim=output_dim, quick_gelu=True)
    text = TextTower(words, context, 64, 2, 2, output_dim, quick_gelu=True)
    return Side4VideoRetrieval(vit, text, frames, 64, side_layers=side, matching=matching)


def captions(count=3, length=12, ends=(3, 11, 6), words=64):
    """Ids that end in the highest one, after which 0 follows; 0 also stands inside of one of them."""
    ids = torch.randint(1, words - 2, (count, length))
    for row, end in zip(ids, ends):
        row[0], row[end], row[end + 1 :] = words - 2, words - 1, 0
    ids[1, 4] = 0
    return ids


@pytest.fixture(scope="module")
def golden():
    data = torch.load(GOLDEN, weights_only=True)
    c = data["config"]
    vit = ViT(
        c["resolution"], c["patch"], c["width"], c["layers"], c["heads"], output_dim=c["embed_dim"], quick_gelu=True
    )
    sizes = c["vocab_size"], c["context_length"], c["text_width"], c["text_layers"], c["text_heads"], c["embed_dim"]
    text = TextTower(*sizes, quick_gelu=True)
    side_layers = c["layers"] // c["side_every"]
    model = Side4VideoRetrieval(vit, text, c["num_frames"], c["side_width"], side_layers, c["interaction"])
    load_official(model, data["checkpoint"])
    return model, data


def test_released_checkpoint_answers_as_the_authors_code(golden):
    model, data = golden
    model.eval()
    with torch.no_grad():
        output = f, g, _ = model(data["video"], data["text"])
        similarity = model.similarity(g, data["text"], f)
        loss = model.loss(output, torch.zeros(len(f)))
        logits = model.text.logit_scale.exp() * similarity
    mask = torch.arange(data["text"].shape[1]) <= data["text"].argmax(1)[:, None]
    assert torch.equal(mask.long(), data["text_mask"])
    weights = model.weigh["text"](g)[..., 0].masked_fill(~mask, -torch.inf).softmax(1)
    for ours, theirs in (
        (f, "frame_features"), (g, "text_features"), (weights, "text_weights"), (similarity, "similarity"),
        (model.weigh["video"](f)[..., 0].softmax(1), "video_weights"), (logits, "logits"), (loss.mean(), "loss"),
    ):  # fmt: skip
        torch.testing.assert_close(ours, data[theirs], atol=1e-4, rtol=0, msg=theirs)


def test_in_training_loss_and_gradients_are_the_authors(golden):
    model, data = golden
    model.train()
    model.zero_grad()
    loss = model.loss(model(data["video"], data["text"]), torch.zeros(len(data["video"]))).mean()
    loss.backward()
    torch.testing.assert_close(loss.detach(), data["train_loss"], atol=1e-5, rtol=0)
    own = dict(model.named_parameters())
    assert data["train_grads"].keys() == NAMES.keys()
    for theirs, gradient in data["train_grads"].items():
        torch.testing.assert_close(own[NAMES[theirs]].grad, gradient, atol=1e-5, rtol=1e-3, msg=theirs)


def test_released_checkpoint_is_read_strictly(golden):
    model, data = golden
    checkpoint = dict(data["checkpoint"])
    left = checkpoint.pop("text_weight_fc.2.bias")
    with pytest.raises(ValueError, match=r"it misses weigh\.text\.2\.bias"):
        load_official(model, checkpoint)
    with pytest.raises(ValueError, match=r"unexpected text\.stranger"):
        load_official(model, checkpoint | {"text_weight_fc.2.bias": left, "clip.stranger": left})


SIZES = {  # side layers, total, tunable, side network with W_up, text and scale, ln_post and projection, MLPs, GFLOPs
    "ViT-B/32": (dict(patch_size=32), {}, 175_271_363, 87_816_899, 23_467_712, 63_428_097, 394_752, 526_338, 66.8, 1.2),
    "ViT-B/16": ({}, {}, 171_449_987, 85_652_099, 21_302_912, 63_428_097, 394_752, 526_338, 263.6, 1.2),
    "ViT-L/14": (
        L14 | dict(output_dim=768), dict(width=768, heads=12, output_dim=768),
        472_264_067, 169_086_339, 43_464_832, 123_650_305, 788_480, 1_182_722, 1116.2, 2.7,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_gflops_are_the_facts(name):
    shape, text, total, tunable, side, of_text, projection, mlps, gflops, gflops_text = SIZES[name]
    with torch.device("meta"):
        model = Side4VideoRetrieval(ViT(**shape), TextTower(**text))
        assert common.count_parameters(model) == (total, tunable)
        parts = [model.text, model.weigh, model.vit.ln_post]
        count = [common.count_parameters(part)[1] for part in parts]
        assert count[:2] == [of_text, mlps] and count[2] + model.vit.proj.numel() == projection
        assert tunable - of_text - mlps - projection == side
        # The released code computes queries for [CLS] as well, which nothing reads: 0.01 % more.
        assert tables.gflops(model.features, torch.empty(1, 12, 3, 224, 224)) == pytest.approx(gflops, rel=4e-4)
        assert tables.gflops(model.text, torch.zeros(1, 32, dtype=torch.long)) == pytest.approx(gflops_text, abs=0.06)


@torch.no_grad()
def test_it_starts_as_zero_shot_clip_of_each_frame():
    for matching in ("wti", "mean"):
        model = tiny(matching).eval()
        video, ids = torch.randn(2, 4, 3, 32, 32), captions()
        f, g, _ = model(video, ids)
        torch.testing.assert_close(f, model.vit(video.flatten(0, 1)).unflatten(0, (2, 4)))
        assert torch.equal(g, model.text(ids))
    end = g[torch.arange(3), ids.argmax(1)]
    expected = F.normalize(end, dim=-1) @ F.normalize(f.mean(1), dim=-1).T
    torch.testing.assert_close(model.similarity(g, ids, f), expected)


def test_only_what_is_said_is_tuned_and_nothing_else_has_a_gradient():
    model = tiny()
    video, ids = torch.randn(3, 4, 3, 32, 32), captions()
    torch.nn.init.normal_(model.up, std=0.1)
    model.loss(model(video, ids), torch.zeros(3)).mean().backward()
    frozen = {name for name, p in model.named_parameters() if p.grad is None}
    vit = {f"vit.{name}" for name, _ in model.vit.named_parameters()}
    assert frozen == vit - {"vit.ln_post.weight", "vit.ln_post.bias", "vit.proj"}
    assert not model.up.new_tensor([p.requires_grad for n, p in model.named_parameters() if n in frozen]).any()


def test_initial_values_are_the_released_ones():
    model = tiny(size=64, width=128, output_dim=128).requires_grad_(False)
    assert not model.up.any()
    assert model.position_embedding.shape == (65, 64)
    assert model.position_embedding.std() == pytest.approx(0.01, rel=0.05)
    for name, p in model.weigh.named_parameters():
        assert not p.any() if p.dim() == 1 else p.std() == pytest.approx(0.02, rel=0.2), name


def test_similarity_is_a_plain_loop_over_captions_and_videos():
    model = tiny()
    ids = captions()
    g, f = torch.randn(3, 12, 32), torch.randn(5, 4, 32)
    f[2] = -f[2].abs()
    g[0, :4] = g[0, :4].abs()  # a short caption whose cosines with video 2 are all negative
    expected = torch.empty(3, 5)
    for a in range(3):
        n = int(ids[a].argmax()) + 1
        w = model.weigh["text"](g[a, :n])[:, 0].softmax(0)
        for b in range(5):
            u = model.weigh["video"](f[b])[:, 0].softmax(0)
            c = F.normalize(g[a, :n], dim=1) @ F.normalize(f[b], dim=1).T  # n x T
            padded = c if n == 12 else torch.cat([c, torch.zeros(12 - n, 4)])
            expected[a, b] = 0.5 * ((w * c.amax(1)).sum() + (u * padded.amax(0)).sum())
    torch.testing.assert_close(model.similarity(g, ids, f), expected)


def test_the_loss_is_symmetric_and_falls_when_pairs_match():
    model, ids = tiny(), captions()
    f, g = torch.randn(3, 4, 32), torch.randn(3, 12, 32)
    logits = model.text.logit_scale.exp() * model.similarity(g, ids, f)
    target = torch.arange(3)
    expected = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
    torch.testing.assert_close(model.loss((f, g, ids), torch.zeros(3)).mean(), expected)
    matched = model.loss((g[:, :4], g, ids), torch.zeros(3)).mean()
    assert matched < model.loss((g[:, :4].roll(1, 0), g, ids), torch.zeros(3)).mean()
    unreadable = model.loss((f, g, ids), torch.tensor([0, -100, 0]))
    assert unreadable[1] == 0 and (unreadable[[0, 2]] > 0).all()


def test_the_scale_is_at_most_a_hundred():
    model, ids = tiny(), captions()
    with torch.no_grad():
        model.text.logit_scale.fill_(5.0)
    model.loss((torch.randn(3, 4, 32), torch.randn(3, 12, 32), ids), torch.zeros(3)).mean().backward()
    assert model.text.logit_scale.item() == pytest.approx(math.log(100)) and model.text.logit_scale.grad


@pytest.mark.parametrize("quick", [False, True])
@torch.no_grad()
def test_text_features_equal_open_clips(tmp_path, quick):
    torch.manual_seed(0)
    name = "ViT-Captions-8"
    config = dict(image_size=32, patch_size=8, width=64, layers=2, head_width=32)
    text = dict(context_length=77, vocab_size=49408, width=64, heads=2, layers=2)
    theirs = open_clip.CLIP(48, config, text, quick_gelu=quick).eval()
    for p in theirs.parameters():
        p += 0.05 * torch.randn_like(p)
    open_clip.add_model_config(write_config(tmp_path, name, dict(embed_dim=48, vision_cfg=config, text_cfg=text)))
    torch.save(theirs.state_dict(), tmp_path / "clip.pt")
    vit, tower = common.load_clip(name + "-quickgelu" * quick, tmp_path / "clip.pt", text=True)
    ids = open_clip.get_tokenizer("ViT-B-16")(["a red ring moves left", "two part!", ""])
    g = tower(ids)
    ours = g[torch.arange(3), ids.argmax(1)]
    torch.testing.assert_close(ours, theirs.encode_text(ids), atol=1e-5, rtol=0)
    torch.testing.assert_close(tower(ids[:, :32]), g[:, :32], atol=1e-5, rtol=0)  # causal: what follows changes nothing
    assert tower.logit_scale == theirs.logit_scale
    texts = ["A red ring!", "moves " * 40]  # of 32 tokens, cut so that [end] is the last
    assert torch.equal(tower.tokenize(texts), open_clip.get_tokenizer("ViT-B-16", context_length=32)(texts))
    assert tower.tokenize(texts).argmax(1).tolist() == [5, 31]
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(vit(images), theirs.encode_image(images), atol=1e-5, rtol=0)


def write_config(folder, name, config):
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    return path


def test_the_table_of_retrieval_is_printed_beside_the_facts(capsys):
    tables.compare_retrieval(Side4VideoRetrieval, side4video.RETRIEVAL)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(text in lines[2] for text in ("ViT-B/16", "171.4", "85.7", "263.5", "263.6", "1.2"))


def test_text_towers_that_are_not_clips_are_refused():
    for name in ("vit_base_patch16_224.augreg_in21k", "roberta-ViT-B-32"):
        with torch.device("meta"), pytest.raises(ValueError, match=r"text tower .* is not CLIP's"):
            common.load_clip(name, None, text=True)
    with pytest.raises(ValueError, match="wti or mean"):
        tiny("max")


# Evaluation


def test_metrics_are_those_of_the_authors_code():
    golden = torch.load(GOLDEN.with_name("retrieval_metrics.pt"), weights_only=True)
    for kind in ("single", "multi", "ties"):
        given = golden[kind]
        similarity = given["similarity"].double()
        owner = given.get("video_of_caption", torch.arange(len(similarity)))
        metrics, ranks = retrieval.recall(similarity[owner.argsort(stable=True)], owner.bincount().tolist())
        for direction, theirs in zip(retrieval.DIRECTIONS, (given["t2v"], given["v2t"])):
            names = {"R1": "R@1", "R5": "R@5", "R10": "R@10", "MedianR": "MdR", "MeanR": "MnR"}
            for name, value in theirs.items():
                assert metrics[f"{direction} {names[name]}"] == pytest.approx(value, rel=1e-7), (kind, direction, name)
        assert len(ranks["text-to-video"]) == len(similarity) and min(ranks["video-to-text"]) == 1


def test_a_group_of_captions_is_as_good_as_its_best_and_an_even_number_of_captions_has_the_lower_median():
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.3], [0.5, 0.4]])  # the first two captions are of the first video
    metrics, ranks = retrieval.recall(scores, [2, 1])
    assert ranks == {"text-to-video": [1, 2, 2], "video-to-text": [1, 1]}
    assert metrics["text-to-video R@1"] == pytest.approx(100 / 3) and metrics["video-to-text MnR"] == 1
    metrics, _ = retrieval.recall(torch.tensor([[0.9, 0.1], [0.8, 0.1], [0.5, 0.4], [0.6, 0.5]]), [2, 2])
    assert metrics["text-to-video MdR"] == 1  # of the ranks 1 1 2 2
    metrics, _ = retrieval.recall(torch.tensor([[0.9, 0.1], [0.5, 0.4]]), [1, 1])
    assert metrics["text-to-video MdR"] == 1.5


def test_scores_in_chunks_are_those_of_the_whole():
    vit, text = common.load_clip("ViT-Toy-16", "shipped", text=True)
    model, world = Side4VideoRetrieval(vit, text, 8, 64), train.World.here("cpu")
    texts, f = [f"a {color} ring grows" for color in toy.COLORS], torch.randn(5, 8, 64)
    whole = retrieval.scores(model, texts, f, world)
    assert whole.shape == (8, 5)
    torch.testing.assert_close(retrieval.scores(model, texts, f, world, numbers=2 * 5 * 8 * 8), whole)
    one = model.similarity(text(text.tokenize(texts[3:4])), text.tokenize(texts[3:4]), f)[0]
    torch.testing.assert_close(whole[3], one.detach())


# Toy captions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which the toy videos are a handful."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "CLIPS", {"train": 40, "val": 20, "test": 20})
        toy.write_toy(folder / "toy")
    return folder


def test_a_toy_caption_says_what_was_painted(folder, monkeypatch):
    found = data.find_clips("toy_captions", folder)
    assert (len(found.train), len(found.val), len(found.test)) == (40, 20, 20) and found.classes == []
    looks, look = [], toy.look
    monkeypatch.setattr(toy, "look", lambda rng: looks.append(look(rng)) or looks[-1])
    for seed, split in enumerate(toy.CLIPS):
        for path, label in getattr(found, split):
            name, (caption,) = Path(path).parent.name, found.captions[path]
            original = name if name in toy.PAIRS else Path(found.mirrors[path]).parent.name
            toy.clip(original, np.random.default_rng([seed, int(Path(path).stem)]))
            shapes = 2 if name.startswith("two ") else 1
            for shape, color in looks[-shapes:]:
                assert f"{color} {shape}" in caption
            assert caption.endswith(name.removeprefix("two ")) and label == 0
            mirror = found.captions[found.mirrors[path]][0]
            assert found.mirrors[found.mirrors[path]] == path and mirror != caption
            assert mirror.split()[:3] == caption.split()[:3]
    assert toy.subject("grows", np.random.default_rng([0, 2])).split()[0] in ("a", "an")


def test_no_two_words_have_the_same_number_and_the_tiny_clips_words_keep_theirs(folder):
    captions = data.find_clips("toy_captions", folder).captions.values()
    read = ["a", *train_toy_clip.SIZES, *train_toy_clip.ROWS, *train_toy_clip.COLUMNS, *toy.COLORS, *toy.SHAPES]
    words = sorted({word for texts in captions for text in texts for word in text.split()} | set(read))
    numbers = toy.tokenize(words)[:, 1].tolist()
    assert len(set(numbers)) == len(words) > 35 and max(numbers) < 1022
    hashes = [1 + zlib.crc32(word.encode()) % 1021 for word in read]  # its embeddings were trained with these
    assert toy.tokenize(read)[:, 1].tolist() == hashes
    assert toy.tokenize(["a strange ring"])[0, 4] == 1023 and toy.tokenize([""]).tolist() == [[1022, 1023, *6 * [0]]]


def test_clips_with_the_same_caption_are_tested_once(folder, monkeypatch):
    monkeypatch.setattr(toy, "subject", lambda name, rng: "a red ring")
    found = data.find_clips("toy_captions", folder)
    assert (len(found.train), len(found.val), len(found.test)) == (40, 10, 10)
    assert all(found.mirrors[path] in found.captions for path, _ in found.val)


# Training


def flags(folder, out, *more):
    fixed = "--method side4video --data toy_captions --batch-size 8 --num-frames 4 --epochs 2 --eval-every 1"
    fixed += " --warmup-epochs 0.5 --betas 0.9,0.98 --workers 0 --device cpu"
    return [*fixed.split(), "--data-root", str(folder), "--out", str(out), *map(str, more)]


def log(out, key):
    return [line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if key in line]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "captions"
    return out, train.main(flags(folder, out))


def test_captions_train_the_retrieval_model_and_its_ranks_are_written(trained, folder, tmp_path, capsys):
    out, result = trained
    run = train.read(out / "checkpoint.pt")["run"]
    assert (run["method"], run["clip_lr"], run["data"]) == ("side4video_retrieval", 0.25, "toy_captions")
    names = [f"{d} {name}" for d in retrieval.DIRECTIONS for name in ("R@1", "R@5", "R@10", "MdR", "MnR")]
    assert list(result) == [*names, "over the mirror", "videos"] and result["videos"] == 20
    assert [line["val"] for line in log(out, "val")][-1] == result
    assert all(line["top1"] is None and line["loss"] > 0 for line in log(out, "loss"))
    with open(out / "ranks.csv") as file:
        rows = list(csv.DictReader(file))
    ranks = [int(row["rank"]) for row in rows if row["direction"] == "text-to-video"]
    assert len(ranks) == 20 and len(rows) == 40
    assert result["text-to-video MnR"] == pytest.approx(np.mean(ranks), abs=0.2)  # ties have all their ranks
    assert (
        train.main(f"--eval --checkpoint {out}/checkpoint.pt --workers 0 --device cpu --out {tmp_path}".split())
        == result
    )
    assert (tmp_path / "ranks.csv").read_text() == (out / "ranks.csv").read_text()
    best = max(line["val"]["text-to-video R@1"] for line in log(out, "val"))
    assert train.read(out / "best.pt")["progress"]["best"] == best


def test_the_mirror_share_counts_the_captions_that_prefer_their_own_video(folder, tmp_path):
    checkpoint = Path(train.__file__).parent / "colab" / "checkpoints" / "retrieval.pt"
    model, _ = train.load_model(checkpoint)
    found, run, world = data.find_clips("toy_captions", folder), train.read(checkpoint)["run"], train.World.here("cpu")
    paths = [path for path, _ in found.val]
    pixels = np.stack([data.open_video(path).read(data.segments(16, 8)) for path in paths])
    with torch.no_grad():
        f = model.features(common.normalize(torch.from_numpy(pixels).permute(0, 1, 4, 2, 3), model.vit))
        ids = model.text.tokenize([found.captions[path][0] for path in paths])
        scores = model.similarity(model.text(ids), ids, f)  # captions x videos
    mirror = [paths.index(found.mirrors[path]) for path in paths]
    share = 100 * (scores.diag() > scores[range(len(paths)), mirror]).float().mean().item()
    dataset = data.VideoDataset(found.val, 8, 64)
    result, _ = train.evaluate(model, dataset, found, run, world, tmp_path / "val_classes.csv")
    assert result["over the mirror"] == pytest.approx(share, abs=0.1) and share > 60
    # A signal ends an evaluation before all videos are seen: there is no result, and the loop stops.
    assert train.evaluate(model, dataset, found, run, world, tmp_path / "val_classes.csv", [2]) == ({}, [])


def test_a_resumed_run_ends_with_the_same_weights(trained, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "evaluate", stop_once(train.evaluate))
    with pytest.raises(OSError, match="once"):
        train.start(*train.parse(flags(folder, tmp_path / "b")))
    train.main(flags(folder, tmp_path / "b", "--resume"))
    ours, theirs = (train.read(out / "checkpoint.pt")["state"] for out in (trained[0], tmp_path / "b"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def stop_once(function):
    calls = []

    def run(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise OSError("once")
        return function(*args, **kwargs)

    return run


def test_the_recipe_is_the_papers():
    run = train.settings({"method": "side4video", "data": "vatex"})
    assert (run["method"], run["epochs"], run["batch_size"], run["num_frames"]) == ("side4video_retrieval", 5, 128, 12)
    assert (run["lr"], run["clip_lr"], run["betas"]) == (1e-4, 1e-3, (0.9, 0.98))
    assert (run["weight_decay"], run["clip_grad"], run["warmup_epochs"], run["augment"]) == (0.2, 1.0, 0.5, {})


def test_what_is_tuned_of_clip_has_a_rate_of_its_own(trained):
    checkpoint = train.read(trained[0] / "checkpoint.pt")
    model, classes = train.load_model(trained[0] / "checkpoint.pt")
    groups = train.parameter_groups(model, checkpoint["run"])
    rates = {id(p): group["rate"] for group in groups for p in group["params"]}
    assert classes == []
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert rates[id(p)] == (0.25 if name.startswith(("vit.", "text.")) else 1.0), name
    assert {group["betas"] for group in checkpoint["optimizer"]["param_groups"]} == {(0.9, 0.98)}


def train_as(rank, world, port, commands):
    torch.set_num_threads(1)
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    train.LOG_EVERY = 1
    train.main(commands[world])


def test_two_processes_train_as_one(folder, tmp_path):
    """The negatives of the whole batch, with the true gradient: the same losses, weights and ranks."""
    more = ("--epochs", 1, "--set", "width=64", "--lr", "3e-4", "--clip-lr", 1, "--batch-size", 4)
    commands = {world: flags(folder, tmp_path / str(world), *more) for world in (1, 2)}
    with socket.create_server(("", 0)) as one, socket.create_server(("", 0)) as two:
        ports = {1: one.getsockname()[1], 2: two.getsockname()[1]}
    jobs = [
        torch.multiprocessing.start_processes(train_as, (world, ports[world], commands), world, join=False)
        for world in (1, 2)
    ]
    for job in jobs:
        while not job.join():
            pass
    one, two = (log(tmp_path / str(world), "loss") for world in (1, 2))
    assert len(one) == 10 and [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], abs=1e-5)
    norms = [[line["grad_norm"] for line in lines] for lines in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    ours, theirs = (train.read(tmp_path / str(world) / "checkpoint.pt")["state"] for world in (1, 2))
    for name in ours:
        if not any(end in name for end in CANCELS):
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=0, msg=name)
    assert (tmp_path / "1/ranks.csv").read_text() == (tmp_path / "2/ranks.csv").read_text()


# Their gradients are rounding errors, which AdamW makes as large as any other: a softmax, a batch norm or the cosine
# takes away what they add.
CANCELS = ("in_proj_bias", "out_proj.bias", "mlp.2.bias", "stem.bias", "running_mean", "2.bias")


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--method", "aim"], "aim does not fit toy_captions: captions are for side4video"),
        (["--method", "side4video_retrieval", "--data", "toy"], "side4video_retrieval does not fit toy"),
        (["--batch-size", "3000"], "at most the 40 clips"),
        (["--predict", "VIDEOS", "--checkpoint", "CHECKPOINT"], "--search is for checkpoints that were trained with"),
        (["--search", "a ring", "--checkpoint", "CHECKPOINT"], "say with --videos where to search"),
        (["--search", "a ring", "--videos", "nowhere", "--checkpoint", "CHECKPOINT"], "no such file"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(more, sentence, trained, folder, tmp_path, capsys):
    places = {"CHECKPOINT": str(trained[0] / "checkpoint.pt"), "VIDEOS": str(folder)}
    argv = [places.get(word, word) for word in more]
    with pytest.raises(SystemExit) as stop:
        train.main(argv if "--checkpoint" in argv else flags(folder, tmp_path / "run", *argv))
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_released_files_become_models_by_their_keys(golden, tmp_path):
    """A flat file with fp16 and fp32 weights, as the authors' training writes it; it holds the whole model."""
    _, data = golden
    c = data["config"]
    vision = dict(image_size=c["resolution"], patch_size=c["patch"], width=c["width"], layers=c["layers"])
    text = dict(context_length=c["context_length"], vocab_size=c["vocab_size"], width=c["text_width"])
    text |= dict(heads=c["text_heads"], layers=c["text_layers"])
    config = dict(
        embed_dim=c["embed_dim"], vision_cfg=vision | dict(head_width=c["width"] // c["heads"]), text_cfg=text
    )
    open_clip.add_model_config(write_config(tmp_path, "ViT-R-8", config))
    mixed = {
        k: v.half() if k.endswith((".attn.in_proj_weight", "text_projection")) else v
        for k, v in data["checkpoint"].items()
    }
    torch.save(mixed, tmp_path / "pytorch_model.bin.4")
    settings = dict(backbone="ViT-R-8", num_frames=c["num_frames"])
    switches = [f"width={c['side_width']}", f"side_layers={c['layers'] // c['side_every']}"]
    model, classes = train.load_model(tmp_path / "pytorch_model.bin.4", **settings, model=switches)
    assert isinstance(model, Side4VideoRetrieval) and classes == []
    f, _, _ = model(data["video"], data["text"])
    torch.testing.assert_close(f, data["frame_features"], atol=2e-3, rtol=0)


# Search


def search(capsys, checkpoint, sentence, *videos):
    train.main(
        ["--search", sentence, "--videos", *map(str, videos), "--checkpoint", str(checkpoint), "--device", "cpu"]
    )
    return [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]


def test_search_names_the_five_best_and_computes_features_once(trained, folder, tmp_path, capsys, monkeypatch):
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes((trained[0] / "checkpoint.pt").read_bytes())
    videos = folder / "toy" / "val" / "grows", folder / "toy" / "val" / "shrinks", folder / "toy" / "val" / "moves up"
    seen, outputs = [], train.outputs

    def counted(model, dataset, run, world, signals=()):
        for features, label, paths, problems in outputs(model, dataset, run, world, signals):
            seen.extend(paths)
            yield features, label, paths, problems

    monkeypatch.setattr(train, "outputs", counted)
    first = search(capsys, checkpoint, "a red ring grows", *videos)
    paths = [str(path) for folder in videos for path in sorted(folder.iterdir())]
    assert sorted(seen) == sorted(paths) and len(paths) == 6 and len(first) == 5
    values = [float(value) for value, _ in first]
    assert values == sorted(values, reverse=True) and {path for _, path in first} <= set(paths)

    model, _ = train.load_model(checkpoint)
    pixels = np.stack([data.open_video(path).read(data.segments(16, 4)) for path in paths])
    with torch.no_grad():
        f = model.features(common.normalize(torch.from_numpy(pixels).permute(0, 1, 4, 2, 3), model.vit))
        ids = model.text.tokenize(["a red ring grows"])
        expected = model.similarity(model.text(ids), ids, f)[0]
    assert first[0][1] == paths[int(expected.argmax())] and values[0] == pytest.approx(expected.max().item(), abs=1e-3)

    seen.clear()
    assert search(capsys, checkpoint, "a red ring grows", *videos) == first and seen == []
    os.utime(paths[2], ns=(0, 0))
    assert search(capsys, checkpoint, "a red ring grows", *videos) == first and seen == [paths[2]]
    seen.clear()
    os.utime(checkpoint, ns=(0, 0))  # another checkpoint at the same place
    assert search(capsys, checkpoint, "a red ring grows", *videos) == first and len(seen) == 6


def test_search_says_which_videos_are_broken_after_it_has_found_the_others(trained, folder, tmp_path, capsys):
    (tmp_path / "broken.mp4").write_text("no video")
    with pytest.raises(SystemExit) as stop:
        search(capsys, trained[0] / "checkpoint.pt", "a ring", tmp_path, folder / "toy" / "val" / "grows")
    said = capsys.readouterr()
    assert stop.value.code == 2 and "broken.mp4" in said.err and len(said.out.splitlines()) == 2
