"""AIM against its paper's table, the authors' released behaviour, and its own claims."""

import inspect
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


def test_initial_values_are_the_papers_and_the_released_codes():
    model = tiny(temporal_in=True)
    for block in model.adapters.values():
        for adapter in (block.spatial, block.temporal, block.temporal_in, block.joint):
            assert adapter.fc1.weight.std() > 0.01  # "randomly initialized", appendix A
            assert not adapter.fc2.weight.any() and not adapter.fc2.bias.any()
    assert model.temporal_embedding.shape == (1, 4, 64) and not model.temporal_embedding.any()


def test_recipes_are_the_papers():
    k400 = dict(epochs=30, warmup_epochs=3, batch_size=64, lr=3e-4, weight_decay=0.05, span=128, views=(3, 1))
    k400 |= dict(augment=dict(crop=(0.08, 1.0), flip=0.5), model=dict(drop_path=0.2))
    ssv2 = k400 | dict(epochs=50, span=0, views=(1, 3), label_smoothing=0.1)
    ssv2["augment"] = dict(crop=(0.08, 1.0), randaugment=(4, 7), erasing=0.25)  # no flip
    ssv2["model"] = dict(drop_path=0.2, temporal_in=True)
    assert aim.RECIPES["k400"] == aim.RECIPES["k700"] == k400
    assert aim.RECIPES["ssv2"] == ssv2
    assert aim.RECIPES["diving48"] == k400 | dict(epochs=50, span=0, views=(1, 1))
    defaults = {key: p.default for key, p in inspect.signature(AIM).parameters.items()}
    assert defaults | dict(ratio=0.25, scale=0.5, drop_path=0.2, dropout=0.5, temporal_in=False) == defaults


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


def test_stochastic_depth_drops_the_temporal_branch_and_the_joint_adapter_and_nothing_else():
    video = torch.randn(2, 4, 3, 32, 32)
    model = randomize(tiny(dropout=0.0)).train()
    for block in model.adapters.values():
        block.drop_path.p = 1.0
    dropped = model(video)
    for block in model.adapters.values():
        block.temporal = block.joint = None
    torch.testing.assert_close(model(video), dropped)
    for block in model.adapters.values():
        block.spatial = torch.nn.Identity()
    assert not torch.allclose(model(video), dropped, atol=1e-3)


def test_dropout_stands_before_the_classifier():
    model, video = randomize(tiny(drop_path=0.0, dropout=1.0)).train(), torch.randn(2, 4, 3, 32, 32)
    torch.testing.assert_close(model(video), model.head.bias.expand(2, -1))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_an_exported_or_traced_model_takes_any_batch():
    model = randomize(AIM(ViT(32, 8, 64, 1, 4), 5, 4, temporal_in=True)).eval()
    video = torch.randn(3, 4, 3, 32, 32)
    dynamic = {"video": {0: torch.export.Dim("batch", min=1)}}
    exported = torch.export.export(model, (video[:2],), dynamic_shapes=dynamic).module()
    for frozen in (exported, torch.jit.trace(model, video[:2])):
        for count in (1, 3):
            torch.testing.assert_close(frozen(video[:count]), model(video[:count]))


def test_recomputed_gradients_are_the_same():
    gradients, video = [], torch.randn(2, 4, 3, 32, 32)
    for again in (False, True):
        model = randomize(tiny(temporal_in=True, dropout=0.0, drop_path=0.0))
        if again:
            common.recompute(model)
        runs = []
        for block in model.vit.blocks:
            block.mlp.c_proj.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        model(video).square().sum().backward()
        assert len(runs) == 4  # once per block: recomputation stops before W_down
        gradients.append({k: p.grad for k, p in model.named_parameters() if p.requires_grad})
    assert all(g.abs().max() > 0 for g in gradients[0].values())
    torch.testing.assert_close(*gradients)


def test_a_clip_of_another_length_is_refused():
    with pytest.raises(ValueError, match="8 frames, the model was built for num_frames=4"):
        tiny()(torch.randn(1, 8, 3, 32, 32))


def test_activations_are_few():
    with FakeTensorMode():
        model, video = AIM(ViT(), 400), torch.empty(1, 8, 3, 224, 224)
        assert tables.activation_bytes(model, video) <= 0.75 * 746 * 2**20
        common.recompute(model)
        assert tables.activation_bytes(model, video) <= 0.25 * 746 * 2**20
