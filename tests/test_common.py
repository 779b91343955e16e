"""The image tower and its loader against open_clip, with random weights."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file

import common
from common import ViT, load_clip

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
    assert_same_features(load_clip(NAME, path, quick_gelu=quick_gelu), clip, images)


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
    sizes = {"input_resolution": torch.tensor(224), "context_length": torch.tensor(77)}
    torch.jit.save(torch.jit.script(Archive({**theirs[True].state_dict(), **sizes})), path)
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
    monkeypatch.setattr(common, "read_weights", lambda path: (state, False))
    monkeypatch.setattr(common, "image_tower", lambda state, shape: state)
    monkeypatch.setattr(common, "load_strict", lambda *args: None)
    with torch.device("meta"):
        vit = load_clip(name, tag)
    assert isinstance(vit.blocks[0].mlp.gelu, common.QuickGELU) == quick
    recorded = open_clip.get_pretrained_cfg(name, tag)
    assert (vit.mean, vit.std) == (recorded["mean"], recorded["std"])


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
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no CLIP image tower"):
        load_clip(NAME, path)
    for path in (tmp_path / "text.pt", tmp_path / "text.safetensors", tmp_path / "empty.pt"):
        path.write_text("" if path.stem == "empty" else json.dumps({"not": "weights"}))
        with pytest.raises(ValueError, match="can be read safely"):
            load_clip(NAME, path)


def test_quick_gelu_is_openais():
    x = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(common.QuickGELU()(x), x * torch.sigmoid(1.702 * x))


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


def test_gflops_of_the_plain_vit_are_the_papers():
    with torch.device("meta"):
        for args, paper in (((224, 16, 768, 12, 12), 422), ((224, 14, 1024, 24, 16), 1946)):
            model, video = common.SpaceOnly(ViT(*args), 400), torch.empty(1, 8, 3, 224, 224)
            assert 3 * common.gflops(model, video) == pytest.approx(paper, rel=2e-3)
