"""AIM against its paper's table, the authors' released behaviour, and its own claims."""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import aim
import common
from aim import AIM
from colab import tables
from common import ViT

GOLDEN = Path(__file__).parent / "golden"
B16, L14 = (224, 16, 768, 12, 12), (224, 14, 1024, 24, 16)


def tiny(num_frames=4, num_classes=5, **switches):
    torch.manual_seed(0)
    return AIM(ViT(32, 8, 64, 4, 4, quick_gelu=True), num_classes, num_frames, **switches)


def randomize(model):
    """No branch may hide behind a zero."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize(
    ("size", "recipe", "num_frames", "total", "tunable", "gflops"),
    [
        (B16, "k400", 8, 96_456_960, 10_659_072, 202.1),
        (B16, "k400", 16, None, None, 404.6),
        (B16, "k400", 32, None, None, 811.1),
        (B16, "ssv2", 8, 100_007_424, 14_209_536, 207.7),
        (L14, "k400", 8, 341_028_864, 37_851_136, 933.5),
        (L14, "ssv2", 8, 353_642_496, 50_464_768, 959.3),
    ],
)
def test_parameters_and_gflops_are_the_papers(size, recipe, num_frames, total, tunable, gflops):
    with torch.device("meta"):
        model = AIM(ViT(*size), 400, num_frames, **aim.RECIPES[recipe]["model"]).eval()
        assert tables.gflops(model, torch.empty(1, num_frames, 3, 224, 224)) == pytest.approx(gflops, abs=0.06)
        model.head = torch.nn.Identity()
    if total:
        assert common.count_parameters(model) == (total, tunable)


@pytest.mark.parametrize(
    ("switches", "millions"),
    [
        (dict(blocks="bottom"), 5.6),  # table 7, with its 400-class head
        (dict(blocks="top"), 5.6),
        (dict(blocks="every second"), 5.6),
        (dict(ratio=0.0625), 3),  # table 8
        (dict(ratio=0.125), 5.6),
        (dict(ratio=0.5), 21.6),  # the paper prints 21
    ],
)
def test_ablations_have_the_papers_tunable_parameters(switches, millions):
    with torch.device("meta"):
        model = AIM(ViT(*B16), 400, **switches)
    assert common.count_parameters(model)[1] / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(
    ("switches", "total", "tunable"),
    [  # table 1: each adaptation added to the one before, with its 174-class head
        (dict(temporal=False, joint=False, temporal_embedding=False), 89, 3.7),
        (dict(joint=False, temporal_in=True), 97, 10.8),
        (dict(temporal_in=True), 100, 14.3),
    ],
)
def test_table_1_has_the_papers_parameters(switches, total, tunable):
    with torch.device("meta"):
        model = AIM(ViT(*B16), 174, **switches)
    counts = [n / 1e6 for n in common.count_parameters(model)]
    assert counts == [pytest.approx(total, abs=0.6), pytest.approx(tunable, abs=0.06)]


def golden(name):
    return torch.load(GOLDEN / f"aim_{name}.pt", weights_only=True)


def model_of(golden):
    c = golden["config"]
    vit = ViT(c["resolution"], c["patch"], c["width"], c["layers"], c["heads"], quick_gelu=True)
    return AIM(vit, c["num_classes"], c["num_frames"], temporal_in=c["adapters_before_tmsa"], scale=c["scale"]).eval()


@pytest.mark.parametrize("name", ["k400", "ssv2"])
def test_released_checkpoints_answer_as_the_authors_code(name):
    data = golden(name)
    model = model_of(data)
    aim.load_official(model, data["checkpoint"])
    torch.testing.assert_close(model.features(data["video"]), data["features"], atol=1e-4, rtol=0)
    torch.testing.assert_close(model(data["video"]), data["logits"], atol=1e-4, rtol=0)


def test_released_checkpoints_load_under_any_prefix_and_strictly():
    data = golden("ssv2")
    model, state = model_of(data), data["checkpoint"]["state_dict"]
    aim.load_official(
        model, {"meta": {"epoch": 3}, "step": torch.tensor(7), "model": {f"module.{k}": v for k, v in state.items()}}
    )
    torch.testing.assert_close(model(data["video"]), data["logits"], atol=1e-4, rtol=0)
    missing = {k: v for k, v in state.items() if "0.S_Adapter.D_fc1.bias" not in k}
    with pytest.raises(ValueError, match=r"misses adapters\.0\.spatial\.fc1\.bias"):
        aim.load_official(model, missing)
    with pytest.raises(ValueError, match=r"unexpected vit\.stranger"):
        aim.load_official(model, {**state, "backbone.stranger": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"unexpected adapters\.0\.temporal_in"):
        aim.load_official(model_of(golden("k400")), data["checkpoint"])


def test_aim_starts_as_the_frozen_image_model_on_each_frame():
    video = torch.randn(2, 4, 3, 32, 32)
    for switches in ({}, dict(temporal_in=True), dict(joint=False), dict(spatial=False)):
        model = tiny(**switches).eval()
        plain = common.SpaceOnly(model.vit, 5, 4).eval()
        # The adapter before T-MSA and the temporal adapter cannot show yet: everything new ends in a zero.
        torch.testing.assert_close(model.features(video), plain.features(video))


def test_training_changes_what_is_tuned_and_nothing_else():
    model = tiny(temporal_in=True, dropout=0.0, drop_path=0.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(torch.randn(2, 4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == set(common.tuned_state(model))
    assert {k for k in changed if k.startswith("vit.")} == {"vit.ln_post.weight", "vit.ln_post.bias"}


def moves_with_time(model):
    video = torch.randn(2, 4, 3, 32, 32)
    return not torch.allclose(model(video), model(video.flip(1)), atol=1e-4)


def test_only_temporal_adaptation_lets_frames_see_each_other():
    video = torch.randn(1, 4, 3, 32, 32)
    other = torch.cat([video[:, :3], torch.randn(1, 1, 3, 32, 32)], dim=1)  # another last frame
    for switches, sees in ((dict(), True), (dict(temporal=False), False), (dict(temporal=False, joint=False), False)):
        model = randomize(tiny(**switches)).eval()
        z = [model.vit.ln_pre(model.vit.embed(v.flatten(0, 1)).unflatten(0, (1, 4))) for v in (video, other)]
        for i, block in enumerate(model.vit.blocks):
            z = [model.adapters[str(i)](x, block) for x in z]
        assert torch.allclose(z[0][:, 0], z[1][:, 0], atol=1e-5) != sees
    assert moves_with_time(randomize(tiny()).eval())
    assert not moves_with_time(randomize(tiny(temporal=False, temporal_embedding=False)).eval())


def test_block_choice_and_scale():
    assert list(tiny(blocks="bottom").adapters) == ["0", "1"]
    assert list(tiny(blocks="top").adapters) == ["2", "3"]
    assert list(tiny(blocks="every second").adapters) == ["1", "3"]
    with pytest.raises(ValueError, match="every second"):
        tiny(blocks="some")

    video = torch.randn(1, 4, 3, 32, 32)
    model = randomize(tiny()).eval()
    answers = {}
    for scale in (0.0, 0.5, 1.0):
        for block in model.adapters.values():
            block.scale = scale
        answers[scale] = model(video)
    for block in model.adapters.values():
        block.joint = None
    torch.testing.assert_close(model(video), answers[0.0])
    assert not torch.allclose(answers[0.5], answers[1.0])


def test_stochastic_depth_rises_over_the_blocks_and_rests_in_evaluation():
    model = tiny(drop_path=0.3)
    assert [block.drop_path.p for block in model.adapters.values()] == pytest.approx([0, 0.1, 0.2, 0.3])
    randomize(model)
    video = torch.randn(1, 4, 3, 32, 32).expand(64, -1, -1, -1, -1)
    model.eval()
    assert torch.allclose(model.features(video)[0], model.features(video)[1])
    model.train()
    features = model.features(video)
    assert not torch.allclose(features[0], features[1]) or not torch.allclose(features[0], features[2])


def test_a_clip_of_another_length_is_refused():
    with pytest.raises(ValueError, match="8 frames, the model was built for num_frames=4"):
        tiny()(torch.randn(1, 8, 3, 32, 32))


def test_activations_are_few():
    with FakeTensorMode():
        model, video = AIM(ViT(), 400), torch.empty(1, 8, 3, 224, 224)
        assert tables.activation_bytes(model, video) <= 0.75 * 746 * 2**20
        common.recompute(model)
        assert tables.activation_bytes(model, video) <= 0.25 * 746 * 2**20
