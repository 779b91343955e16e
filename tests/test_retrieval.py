"""Text-video retrieval: CLIP's text tower, the model, its matching and its loss, as the authors' code has them."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F

import common
import side4video
from colab import tables
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
        f, g = model(data["video"], data["text"])
        similarity = model.similarity(g, data["text"], f)
        loss = model.loss(f, g, data["text"])
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
    loss = model.loss(*model(data["video"], data["text"]), data["text"]).mean()
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
        f, g = model(video, ids)
        torch.testing.assert_close(f, model.vit(video.flatten(0, 1)).unflatten(0, (2, 4)))
        assert torch.equal(g, model.text(ids))
    end = g[torch.arange(3), ids.argmax(1)]
    expected = F.normalize(end, dim=-1) @ F.normalize(f.mean(1), dim=-1).T
    torch.testing.assert_close(model.similarity(g, ids, f), expected)


def test_only_what_is_said_is_tuned_and_nothing_else_has_a_gradient():
    model = tiny()
    video, ids = torch.randn(3, 4, 3, 32, 32), captions()
    torch.nn.init.normal_(model.up, std=0.1)
    model.loss(*model(video, ids), ids).mean().backward()
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
    torch.testing.assert_close(model.loss(f, g, ids).mean(), expected)
    matched = model.loss(g[:, :4], g, ids).mean()
    assert matched < model.loss(g[:, :4].roll(1, 0), g, ids).mean()


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
