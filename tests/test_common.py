"""The image tower and its loader against open_clip, with random weights."""

import importlib
import json

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

import common
from aim import AIM
from colab import tables
from common import ViT, load_clip
from side4video import Side4Video
from st_adapter import STAdapter
from zeroi2v import ZeroI2V

NAME = "ViT-S-32"  # small enough to build with its text tower in a test


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return {quick: open_clip.create_model(NAME, force_quick_gelu=quick).eval() for quick in (False, True)}


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same_features(ours, theirs, images):
    expected = theirs.visual(images)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(ours.eval()(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("form", ["whole.pt", "visual.pt", "nested.pt", "whole.safetensors"])
def test_features_equal_open_clips_from_every_kind_of_file(theirs, images, tmp_path, form, quick_gelu):
    clip, path = theirs[quick_gelu], tmp_path / form
    if form == "whole.safetensors":
        save_file(clip.state_dict(), path)
    else:
        nested = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in clip.state_dict().items()}}
        torch.save(
            {"whole.pt": clip.state_dict(), "visual.pt": clip.visual.state_dict(), "nested.pt": nested}[form], path
        )
    # open_clip has no model of this name with the ending.
    assert_same_features(load_clip(NAME + "-quickgelu" if quick_gelu else NAME, path), clip, images)


class Archive(torch.nn.Module):
    """Holds tensors under dotted names, as the modules of OpenAI's TorchScript archives do."""

    def __init__(self, state):
        super().__init__()
        for name, tensor in state.items():
            *folders, last = name.split(".")
            module = self
            for folder in folders:
                if not hasattr(module, folder):
                    module.add_module(folder, torch.nn.Module())
                module = getattr(module, folder)
            module.register_buffer(last, tensor)

    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_openais_torchscript_archive_loads_with_quick_gelu(theirs, images, tmp_path):
    path = tmp_path / "ViT-S-32.pt"
    state = theirs[True].state_dict()
    torch.jit.save(torch.jit.script(Archive(state)), path)
    assert_same_features(load_clip(NAME, path), theirs[True], images)
    # As a state dict that somebody took out of it:
    torch.save({**state, "input_resolution": torch.tensor(224), "context_length": torch.tensor(77)}, path)
    assert_same_features(load_clip(NAME, path), theirs[True], images)


@pytest.mark.parametrize(
    ("name", "tag", "quick"),
    [
        ("ViT-B-16", "openai", True),
        ("ViT-L-14-336", "openai", True),
        ("ViT-B-16", "laion2b_s34b_b88k", False),
        ("ViT-B-16", "datacomp_xl_s13b_b90k", False),
        ("ViT-L-14", "laion2b_s32b_b82k", False),
        ("ViT-B-32-quickgelu", "laion400m_e32", True),
        ("ViT-B-16", "metaclip_400m", True),
    ],
)
def test_activation_follows_the_weights(monkeypatch, name, tag, quick):
    state = {}
    monkeypatch.setattr(open_clip, "download_pretrained", lambda cfg: __file__)
    monkeypatch.setattr(common, "read_checkpoint", lambda path: state)
    monkeypatch.setattr(common, "image_tower", lambda state, shape: state)
    monkeypatch.setattr(common, "load_strict", lambda *args: None)
    with torch.device("meta"):
        vit = load_clip(name, tag)
    assert isinstance(vit.blocks[0].mlp.gelu, common.QuickGELU) == quick
    recorded = open_clip.get_pretrained_cfg(name, tag)
    assert (vit.mean, vit.std) == (recorded["mean"], recorded["std"])


@pytest.mark.parametrize(
    ("name", "quick"),
    [
        ("ViT-S-32", False),
        ("ViT-S-32-quickgelu", True),  # open_clip has no model of this name with the ending,
        ("ViT-B/16-quickgelu", True),  # but of this
        ("vit_base_patch16_224.augreg_in21k", False),
        ("vit_base_patch16_224.augreg_in21k-quickgelu", True),
        ("EVA02-E-14-quickgelu", True),
    ],
)
def test_a_name_that_ends_in_quickgelu_means_it(name, quick):
    with torch.device("meta"):
        vit = load_clip(name, None)
    assert {type(block.mlp.gelu) for block in vit.blocks} == {common.QuickGELU if quick else torch.nn.GELU}


def test_positions_are_resized_as_open_clip_does(theirs, tmp_path):
    path = tmp_path / "clip.pt"
    torch.save(theirs[False].state_dict(), path)
    larger = load_clip(NAME, path, image_size=320)
    expected = open_clip.create_model(NAME, force_image_size=320)
    state = theirs[False].state_dict()
    open_clip.model.resize_pos_embed(state, expected)
    torch.testing.assert_close(
        larger.positional_embedding.detach(), state["visual.positional_embedding"], atol=1e-5, rtol=0
    )
    assert larger(torch.randn(1, 3, 320, 320)).shape == (1, 384)


@pytest.mark.parametrize(
    "name", ["ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "ViT-g-14", "ViT-bigG-14"]
)
def test_every_plain_vit_has_open_clips_shapes(name):
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        ours = load_clip(name, pretrained=None).state_dict()
        theirs = open_clip.model._build_vision_tower(config["embed_dim"], config["vision_cfg"]).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_slash_in_a_name_is_fine():
    assert load_clip("ViT-S/32", None).patch_size == 32


def test_the_shipped_clip_loads_and_is_small():
    vit = load_clip("ViT-Toy-16", "shipped")
    assert vit(torch.randn(1, 3, 64, 64)).shape == (1, 64)
    assert (common.SHIPPED / "ViT-Toy-16.safetensors").stat().st_size < 5e6
    text = open_clip.create_model("ViT-Toy-16", pretrained=str(common.SHIPPED / "ViT-Toy-16.safetensors"))
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(vit(image), text.visual(image), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "pretrained", "error", "says"),
    [
        ("ViT-B-61", None, ValueError, "did you mean"),
        ("RN50", None, ValueError, "no plain ViT"),
        ("ViT-B-16-SigLIP", None, ValueError, "no plain ViT"),
        ("coca_ViT-B-32", None, ValueError, "no plain ViT"),
        ("ViT-B-16", "openia", FileNotFoundError, "openai"),
        ("ViT-B-16", "no/such/file.pt", FileNotFoundError, "neither a file"),
    ],
)
def test_what_cannot_be_loaded_is_said(name, pretrained, error, says):
    with pytest.raises(error, match=says):
        load_clip(name, pretrained)


def test_a_download_that_fails_is_said(monkeypatch):
    def offline(cfg):
        raise ConnectionError("no route")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with pytest.raises(FileNotFoundError, match=r"cannot download openai of ViT-B-16 \(ConnectionError\)"):
        load_clip("ViT-B-16", "openai")


def test_weights_of_another_model_name_what_differs(theirs, tmp_path):
    path = tmp_path / "clip.pt"
    torch.save(theirs[False].state_dict(), path)
    with pytest.raises(ValueError, match=r"class_embedding is \(384,\), not \(768,\)"):
        load_clip("ViT-B-32", path)
    state = {k: v for k, v in theirs[False].state_dict().items() if k != "visual.ln_post.bias"}
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"misses ln_post.bias"):
        load_clip(NAME, path)
    for without in ({"a": torch.zeros(1)}, {}):
        torch.save(without, path)
        with pytest.raises(ValueError, match="no CLIP image tower"):
            load_clip(NAME, path)
    for path in (tmp_path / "text.pt", tmp_path / "text.safetensors", tmp_path / "empty.pt"):
        path.write_text("" if path.stem == "empty" else json.dumps({"not": "weights"}))
        with pytest.raises(ValueError, match="can be read safely"):
            load_clip(NAME, path)


def test_quick_gelu_is_openais():
    x = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(common.QuickGELU()(x), x * torch.sigmoid(1.702 * x))


def test_the_loss_is_cross_entropy_per_clip_in_float32_and_0_for_clips_that_could_not_be_read():
    logits, label = torch.randn(4, 5).bfloat16(), torch.tensor([3, 0, -100, 4])
    log_p = torch.log_softmax(logits.float(), 1)
    for smoothing in (0.0, 0.3):
        target = (1 - smoothing) * F.one_hot(label.clamp(min=0), 5) + smoothing / 5
        loss = common.SpaceOnly.loss(logits, label, smoothing)
        torch.testing.assert_close(loss, -(target * log_p).sum(1) * torch.tensor([1, 1, 0, 1]))


def test_frozen_weights_in_half_precision_answer_alike():
    torch.manual_seed(0)
    vit = ViT(32, 8, 64, 3, 4)
    model = common.SpaceOnly(vit, 5, 4).eval()
    video = torch.randn(2, 4, 3, 32, 32)
    exact = model(video)
    common.cast_frozen(model, torch.bfloat16)
    assert vit.conv1.weight.dtype == vit.ln_pre.weight.dtype == torch.bfloat16
    assert model.head.weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert vit.ln_pre(vit.embed(video[0])).dtype == torch.bfloat16  # no float32 copy on the way
        torch.testing.assert_close(model(video).float(), exact, atol=0.02, rtol=0.05)


def test_the_space_only_model_is_blind_to_order():
    model = common.SpaceOnly(ViT(32, 8, 64, 2, 4), 5, 4).eval()
    video = torch.randn(2, 4, 3, 32, 32)
    torch.testing.assert_close(model(video), model(video.flip(1)))
    assert common.count_parameters(model)[1] == 64 * 5 + 5


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_an_exported_or_traced_model_takes_any_batch():
    model, video = common.SpaceOnly(ViT(32, 8, 64, 1, 4), 5, 4).eval(), torch.randn(3, 4, 3, 32, 32)
    dynamic = {"video": {0: torch.export.Dim("batch", min=1)}}
    exported = torch.export.export(model, (video[:2],), dynamic_shapes=dynamic).module()
    for frozen in (exported, torch.jit.trace(model, video[:2])):
        for count in (1, 3):
            torch.testing.assert_close(frozen(video[:count]), model(video[:count]))


def test_the_classifiers_initial_values_are_the_released_codes():
    head = common.SpaceOnly(ViT(32, 8, 64, 1, 4), 1000).head
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert head.weight.mean().abs() < 1e-3 and not head.bias.any()


def test_gflops_of_the_plain_vit_are_the_papers():
    with torch.device("meta"):
        for args, paper in (((224, 16, 768, 12, 12), 422), ((224, 14, 1024, 24, 16), 1946)):
            model, video = common.SpaceOnly(ViT(*args), 400), torch.empty(1, 8, 3, 224, 224)
            assert 3 * tables.gflops(model, video) == pytest.approx(paper, rel=2e-3)


@pytest.fixture(scope="module")
def small_trunks(tmp_path_factory):
    """Small copies of timm's architectures, made known to timm and open_clip: EVA02-E-14's, and ImageNet-21K's ViT."""
    from timm.models import eva, register_model, vision_transformer

    sizes = dict(img_size=56, patch_size=14, embed_dim=64, depth=3, num_heads=4)

    def small_eva_enormous(pretrained=False, **kwargs):
        like = "eva02_enormous_patch14_clip_224"
        return eva._create_eva(like, **(sizes | dict(mlp_ratio=5.5, use_post_norm=True, global_pool="token") | kwargs))

    def small_vit_in21k(pretrained=False, **kwargs):
        return vision_transformer._create_vision_transformer("vit_base_patch16_224", **(sizes | kwargs))

    for build in (small_eva_enormous, small_vit_in21k):
        build.__module__ = "timm.models.eva"
        register_model(build)
    config = open_clip.get_model_config("EVA02-E-14")
    config["vision_cfg"].update(image_size=56, timm_model_name="small_eva_enormous")
    config["text_cfg"].update(width=64, heads=2, layers=1)
    config["embed_dim"] = 48
    path = tmp_path_factory.mktemp("configs") / "EVA-Small-14.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    return sizes


def randomize(model):
    """No branch may hide behind a zero."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def test_evas_post_norm_tower_answers_as_open_clips(small_trunks, tmp_path):
    theirs, path = randomize(open_clip.create_model("EVA-Small-14")), tmp_path / "eva.pt"
    torch.save(theirs.state_dict(), path)
    ours = load_clip("EVA-Small-14", path)
    assert ours.blocks[0].mlp.c_fc.out_features == 352 and not ours.blocks[0].attn.in_proj_bias[64:128].any()
    assert_same_features(ours, theirs, torch.randn(2, 3, 56, 56))
    torch.save(theirs.visual.state_dict(), path)
    assert_same_features(load_clip("EVA-Small-14", path), theirs, torch.randn(2, 3, 56, 56))


def test_the_real_eva_enormous_has_open_clips_shapes():
    with torch.device("meta"):
        vit = load_clip("EVA02-E-14", None)
        trunk = timm.create_model("eva02_enormous_patch14_clip_224", num_classes=1024)
    k_biases = 64 * 1792  # ours are there, and zero
    parameters = sum(p.numel() for p in trunk.parameters())
    assert common.count_parameters(vit)[0] == parameters + k_biases
    assert len(vit.blocks) == 64 and vit.heads == 16 and isinstance(vit.blocks[0].ln_1, torch.nn.Identity)


@torch.no_grad()
def test_imagenets_vit_answers_as_timms(small_trunks, tmp_path):
    theirs, path = randomize(timm.create_model("small_vit_in21k", num_classes=21)), tmp_path / "vit.pt"
    torch.save(theirs.state_dict(), path)
    ours, images = load_clip("small_vit_in21k", path), torch.randn(2, 3, 56, 56)
    tokens = theirs.forward_features(images)
    torch.testing.assert_close(ours.eval()(images), tokens[:, 0], atol=1e-5, rtol=1e-5)
    larger = load_clip("small_vit_in21k", path, image_size=84)
    assert larger(torch.randn(1, 3, 84, 84)).shape == (1, 64)


def test_imagenets_pixels_and_norms_are_its_own(monkeypatch):
    name = "vit_base_patch16_224.augreg_in21k"
    with torch.device("meta"):
        vit = load_clip(name, None)
    assert (vit.mean, vit.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert vit.ln_post.eps == vit.blocks[0].ln_1.eps == 1e-6
    with torch.device("meta"):
        openais = load_clip("vit_base_patch16_clip_224.openai", None)  # timm's name is of a GELU model
    assert isinstance(openais.blocks[0].mlp.gelu, common.QuickGELU) and openais.mean == common.CLIP_MEAN
    assert isinstance(vit.ln_pre, torch.nn.Identity) and vit.proj is None and vit.conv1.bias is not None

    def offline(*args, pretrained=False, create=timm.create_model, **kwargs):
        if pretrained:
            raise ConnectionError("no route")
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(FileNotFoundError, match=r"cannot download .*ConnectionError"):
        load_clip(name)


@pytest.mark.parametrize(
    "name", ["EVA02-B-16", "EVA02-L-14", "vit_base_patch14_dinov2", "deit3_base_patch16_224", "flexivit_small"]
)
def test_towers_with_extras_are_refused_by_name(name):
    with pytest.raises(ValueError, match="no plain ViT"):
        load_clip(name, None)


def test_every_method_adapts_every_kind_of_tower(small_trunks):
    video = torch.randn(2, 4, 3, 56, 56)
    for name in ("EVA-Small-14", "small_vit_in21k"):
        for build in (
            lambda clip: AIM(clip, 5, 4),
            lambda clip: STAdapter(clip, 5, 4, before_attention=True),
            lambda clip: ZeroI2V(clip, 5, 4, temporal="none"),
        ):
            model = build(load_clip(name, None)).eval()
            plain = common.SpaceOnly(model.vit, 5, 4).eval()
            expected = plain.features(video)
            if isinstance(model, STAdapter):  # the mean over frames before the norm
                z = model.vit.ln_pre(model.vit.embed(video.flatten(0, 1)))
                for block in model.vit.blocks:
                    z = block(z)
                expected = model.vit.ln_post(z[:, 0].unflatten(0, (2, 4)).mean(1))
            torch.testing.assert_close(model.features(video), expected, atol=1e-5, rtol=1e-5)
        assert Side4Video(load_clip(name, None), 5, 4, width=64)(video).shape == (2, 5)


def test_the_baselines_tune_what_they_say():
    with torch.device("meta"):
        models = {tune: common.SpaceOnly(ViT(), 400, tune=tune) for tune in ("head", "last", "all")}
    tuned = {tune: common.count_parameters(model)[1] for tune, model in models.items()}
    head, block, ln_post = 768 * 400 + 400, 12 * 768**2 + 13 * 768, 2 * 768
    assert tuned == {"head": head, "last": head + block + ln_post, "all": common.count_parameters(models["all"])[0]}
    assert tuned["last"] / 1e6 == pytest.approx(7.40, abs=0.005)  # ST-Adapter's poster
    names = {name.partition(".resblocks.11.")[0] for name in common.tuned_state(models["last"])}
    assert names == {"vit.transformer", "vit.ln_post.weight", "vit.ln_post.bias", "head.weight", "head.bias"}
    with pytest.raises(ValueError, match="head, last or all"):
        common.SpaceOnly(ViT(32, 8, 64, 2, 4), 5, tune="some")


@pytest.mark.parametrize(
    ("blocks", "chosen"),
    [("all", [0, 1, 2, 3]), ("top", [2, 3]), ("every second", [1, 3]), ("3, 0", [3, 0]), ([1], [1])],
)
def test_blocks_are_chosen_by_name_or_number(blocks, chosen):
    assert common.choose_blocks(blocks, 4) == chosen
    for wrong in ("none", "4", "-1", []):
        with pytest.raises(ValueError, match="numbers from 0 to 3"):
            common.choose_blocks(wrong, 4)


def test_tuned_tensors_load_strictly_and_leave_the_frozen_ones():
    saved, model = (common.SpaceOnly(ViT(32, 8, 64, 2, 4), 5, tune="last") for _ in range(2))
    frozen, state = model.vit.conv1.weight.clone(), common.tuned_state(saved)
    common.load_tuned(model, state, "here")
    assert torch.equal(model.vit.conv1.weight, frozen) and torch.equal(model.head.weight, saved.head.weight)
    common.load_tuned(model, saved.state_dict(), "here")  # with the frozen tensors in it
    assert torch.equal(model.vit.conv1.weight, saved.vit.conv1.weight)
    for wrong, says in (
        ({k: v for k, v in state.items() if k != "head.bias"}, "here does not fit: it misses head.bias$"),
        (state | {"stranger": torch.zeros(1)}, "it has unexpected stranger$"),
        (state | {"head.bias": torch.zeros(6)}, r"it differs in shape: head.bias is \(6,\), not \(5,\)$"),
    ):
        with pytest.raises(ValueError, match=says):
            common.load_tuned(model, wrong, "here")


def test_pixels_are_normalised_with_the_towers_own_mean_and_deviation():
    vit, video = ViT(32, 8, 64, 1, 4), torch.randint(0, 256, (2, 3, 3, 4, 4), dtype=torch.uint8)
    vit.mean, vit.std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    for channel in range(3):
        expected = (video[:, :, channel] / 255 - vit.mean[channel]) / vit.std[channel]
        torch.testing.assert_close(common.normalize(video, vit)[:, :, channel], expected)


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_pickle_is_run(tmp_path):
    path, made = tmp_path / "clip.pt", tmp_path / "made"
    torch.save({"visual.class_embedding": torch.zeros(3), "more": Runs(made)}, path)
    with pytest.raises(ValueError, match="can be read safely"):
        load_clip(NAME, path)
    assert not made.exists()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_attention_of_a_few_tokens_is_that_of_many(monkeypatch, dtype, tolerance):
    attn, results = common.Attention(64, 4).to(dtype), []
    for p in attn.parameters():
        torch.nn.init.normal_(p, std=0.1)
    for short in (0, 16):
        monkeypatch.setattr(common, "SHORT", short)
        torch.manual_seed(0)
        x = torch.randn(6, 8, 64).to(dtype).requires_grad_()
        y = attn(x)
        y.float().square().sum().backward()
        results.append((y.float(), x.grad.float()))
    for a, b in zip(*results):
        assert not torch.equal(a, b), "both took the same way"
        torch.testing.assert_close(a, b, atol=tolerance * b.abs().max().item(), rtol=0)


def test_recomputing_gives_the_same_gradients_and_keeps_less():
    torch.manual_seed(0)
    video, kept, gradients = torch.randn(2, 4, 3, 32, 32), [], []
    for redo in (False, True):
        torch.manual_seed(1)
        model = common.SpaceOnly(ViT(32, 8, 64, 3, 4), 5, 4, tune="all", dropout=0.0)
        if redo:
            common.recompute(model)
        model(video).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        kept.append(tables.activation_bytes(model, video[:1]))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)
    assert kept[1] < 0.3 * kept[0]


def test_activation_bytes_are_those_of_a_real_pass_and_of_a_sum_by_hand():
    video = torch.zeros(1, 4, 3, 32, 32)
    real = tables.activation_bytes(AIM(ViT(32, 8, 64, 2, 4), 5, 4, drop_path=0.0), video)
    with FakeTensorMode():
        assert tables.activation_bytes(AIM(ViT(32, 8, 64, 2, 4), 5, 4, drop_path=0.0), torch.zeros(video.shape)) == real
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32 * 4, 100), torch.nn.GELU())
    # The input in bf16 for the weights' gradient, and the GELU's.
    assert tables.activation_bytes(model, video) == 2 * (3 * 32 * 32 * 4 + 100)


def test_a_papers_table_is_printed_beside_what_is_measured(capsys):
    rows = [tables.Row("plain", common.B16, total=86, gflops=422 / 3, training=False)]
    rows.append(tables.Row("its parameters", common.B16, frames=None, total=86))
    tables.compare(common.SpaceOnly, rows)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].split() == [
        "plain",
        "86.0",
        "|",
        "85.8",
        "-",
        "|",
        "0.0",
        "140.7",
        "|",
        "140.5",
    ]
    assert lines[2].endswith("- |       -")


@pytest.mark.parametrize("method", [AIM, STAdapter, ZeroI2V, Side4Video])
def test_what_the_tables_measure_is_what_the_papers_print(method):
    for row in (tables.Row(*row) for row in importlib.import_module(method.__module__).PAPER):
        if row.clip != common.B16 or (row.frames or 8) > 8:
            continue  # the method's own tests have these
        total, tunable, flops, _ = tables.measure(method, row._replace(training=False))
        for measured, printed, rounding in (
            (total, row.total, 0.6),
            (tunable, row.tunable, 1.4),
            (flops, row.gflops, 0.7),
        ):
            assert printed is None or measured == pytest.approx(printed, abs=rounding), row.label
