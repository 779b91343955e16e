"""ST-Adapter against its paper's tables, the authors' released behaviour, and its own claims."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import common
import st_adapter
from colab import tables
from common import B16, L14, ViT
from st_adapter import DWConv3D, SpatioTemporalAdapter, STAdapter

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny(num_frames=4, layers=4, width=64, heads=4, **switches):
    vit = ViT(32, 8, width, layers, heads, quick_gelu=True)
    return STAdapter(vit, 5, num_frames, **dict(dict(bottleneck=24), **switches))


@torch.no_grad()
def randomize(module):
    """No branch may hide behind a zero; norms stay near 1, so that answers do not shrink to nothing."""
    for name, p in module.named_parameters():
        is_norm = ".ln_" in name and name.endswith("weight")
        torch.nn.init.normal_(p, mean=float(is_norm), std=0.2)
    return module


def clips(num_frames=4, count=2):
    return torch.randn(count, num_frames, 3, 32, 32)


@pytest.mark.parametrize(
    ("size", "switches", "total", "tunable", "gflops"),
    [
        (B16, {}, 93_217_168, 7_417_744, 151.6),
        (B16, dict(before_attention=True), 100_327_312, 14_527_888, 162.7),
        (L14, {}, 322_534_800, 19_355_024, 686.8),
    ],
)
def test_parameters_and_gflops_are_the_papers(size, switches, total, tunable, gflops):
    with torch.device("meta"):
        model = STAdapter(ViT(**size), 400, **switches).eval()
        assert tables.gflops(model, torch.empty(1, 8, 3, 224, 224)) == pytest.approx(gflops, abs=0.06)
    assert common.count_parameters(model) == (total, tunable)


# The released checkpoints


def golden(name):
    return torch.load(GOLDEN / f"st_adapter_{name}.pt", weights_only=True)


def model_of(golden):
    c = golden["config"]
    vit = ViT(c["resolution"], c["patch"], c["width"], c["layers"], c["heads"], quick_gelu=True)
    switches = {k: c[k] for k in ("bottleneck", "kernel", "before_attention", "before_mlp")}
    return STAdapter(vit, c["num_classes"], c["num_frames"], **switches).eval()


@pytest.mark.parametrize("name", ["k400", "ssv2", "3x3x3"])
def test_released_checkpoints_answer_as_the_authors_code(name):
    data = golden(name)
    model = model_of(data)
    st_adapter.load_official(model, data["checkpoint"])
    torch.testing.assert_close(model.features(data["video"]), data["features"], atol=1e-4, rtol=0)
    torch.testing.assert_close(model(data["video"]), data["logits"], atol=1e-4, rtol=0)


def test_released_checkpoints_load_under_any_prefix_and_with_the_rest_of_clip():
    data = golden("ssv2")
    model, (tuned, clip) = model_of(data), (data["checkpoint"][k] for k in ("model", "clip"))
    clip = {f"module.{k}": v for k, v in clip.items()}
    others = {
        "transformer.resblocks.0.attn.in_proj_weight": torch.randn(96, 32),
        "positional_embedding": torch.randn(77, 32),
        "ln_final.weight": torch.randn(32),
        "logit_scale": torch.tensor(1.0),
        "module.visual.proj": torch.randn(32, 16),
    }
    nested = {
        "clip": {"epoch": 3, "state_dict": {**clip, **others}},
        "step": torch.tensor(7),
        "state": {"model": {f"module.backbone.{k}": v for k, v in tuned.items()}, "epoch": 3},
    }
    st_adapter.load_official(model, nested)
    torch.testing.assert_close(model(data["video"]), data["logits"], atol=1e-4, rtol=0)


def test_without_clip_in_the_checkpoint_the_frozen_weights_stay():
    data = golden("k400")
    for checkpoint in ({"model": data["checkpoint"]["model"]}, data["checkpoint"]["model"]):
        model = randomize(model_of(data))
        frozen = {k: v.clone() for k, v in model.vit.state_dict().items()}
        st_adapter.load_official(model, checkpoint)
        assert all(torch.equal(v, frozen[k]) for k, v in model.vit.state_dict().items())
        model.vit.load_state_dict({k.removeprefix("visual."): v for k, v in data["checkpoint"]["clip"].items()})
        torch.testing.assert_close(model(data["video"]), data["logits"], atol=1e-4, rtol=0)


def test_released_checkpoints_load_strictly():
    data = golden("k400")
    model, tuned, clip = model_of(data), data["checkpoint"]["model"], data["checkpoint"]["clip"]
    missing = {k: v for k, v in tuned.items() if "0.adapter_pre_mlp.conv.bias" not in k}
    with pytest.raises(ValueError, match=r"misses adapters\.0\.mlp\.conv\.bias"):
        st_adapter.load_official(model, {"model": missing, "clip": clip})
    with pytest.raises(ValueError, match="unexpected stranger"):
        st_adapter.load_official(model, {"model": {**tuned, "stranger": torch.zeros(1)}, "clip": clip})
    with pytest.raises(ValueError, match=r"unexpected vit\.stranger"):
        st_adapter.load_official(model, {"model": tuned, "clip": {**clip, "visual.stranger": torch.zeros(1)}})
    with pytest.raises(ValueError, match=r"unexpected adapters\.0\.attn"):
        st_adapter.load_official(model, golden("ssv2")["checkpoint"])
    with pytest.raises(ValueError, match=r"misses adapters\.0\.attn"):
        st_adapter.load_official(model_of(golden("ssv2")), data["checkpoint"])
    with pytest.raises(ValueError, match=r"conv\.weight is \(12, 1, 3, 3, 3\), not \(12, 1, 3, 1, 1\)"):
        st_adapter.load_official(model_of(golden("ssv2")), golden("3x3x3")["checkpoint"])


def released(model):
    """The model's state as the authors' checkpoint would hold it."""
    state = model.state_dict()
    tuned = {}
    for key in (k for k in state if not k.startswith("vit.")):
        name = re.sub(r"^adapters\.(\d+)\.(attn|mlp)\.", r"transformer.resblocks.\1.adapter_pre_\2.", key)
        name = name.replace(".down.", ".fc1.").replace(".up.", ".fc2.").replace("head.", "fc.")
        tuned[name] = state[key]
    return {"model": tuned, "clip": {"visual." + k[4:]: v for k, v in state.items() if k.startswith("vit.")}}


@pytest.mark.parametrize(
    "switches",
    [
        dict(kernel=(5, 1, 1), bottleneck=8, num_frames=6),
        dict(kernel=(3, 3, 3), width=96, heads=2, layers=3, before_attention=True),
        dict(kernel=(1, 3, 3), bottleneck=40, before_attention=True, before_mlp=False),
        dict(layers=5, num_frames=1, blocks="every second"),
    ],
)
def test_checkpoints_of_other_sizes_load(switches):
    ours, video = randomize(tiny(**switches)).eval(), clips(switches.get("num_frames", 4))
    fresh = tiny(**switches).eval()
    st_adapter.load_official(fresh, released(ours))
    assert not torch.allclose(fresh(video)[0], fresh(video)[1], atol=1e-3)
    assert torch.equal(fresh(video), ours(video))


# The adapter


@pytest.mark.parametrize("kernel", [(3, 1, 1), (5, 1, 1), (1, 3, 3), (3, 3, 3), (3, 5, 1)])
@pytest.mark.parametrize("T", [2, 5])
def test_the_convolution_is_a_depthwise_conv3d(kernel, T):
    conv = randomize(DWConv3D(6, kernel))
    ours, theirs = (torch.randn(2, T, 3, 4, 6, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    upstream, tensors = torch.randn_like(ours), [conv.weight, conv.bias]
    y = conv(ours.requires_grad_())
    padding = [k // 2 for k in kernel]
    reference = F.conv3d(theirs.requires_grad_().movedim(-1, 1), *tensors, padding=padding, groups=6).movedim(1, -1)
    torch.testing.assert_close(y, reference, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(y, [ours, *tensors], upstream)
    torch.testing.assert_close(
        gradients, torch.autograd.grad(reference, [theirs, *tensors], upstream), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("kernel", [(2, 1, 1), (3, 3, 4), (0, 1, 1), (-1, 1, 1), (3, 1), (3, 1, 1, 1)])
def test_a_kernel_that_cannot_keep_the_shape_is_refused(kernel):
    with pytest.raises(ValueError, match="three odd numbers"):
        tiny(kernel=kernel)


@pytest.mark.parametrize(
    ("activation", "f"), [("none", lambda x: x), ("relu", lambda x: x.clamp(min=0)), ("gelu", F.gelu)]
)
def test_the_adapter_is_eq_1_on_patches_and_nothing_on_the_class_token(activation, f):
    adapter = randomize(SpatioTemporalAdapter(16, 6, (3, 3, 1), activation))
    p = dict(adapter.named_parameters())
    z = torch.randn(2, 4, 1 + 2 * 3, 16)  # patches in 2 rows of 3
    x = (z[:, :, 1:] @ p["down.weight"].T + p["down.bias"]).unflatten(2, (2, 3)).movedim(-1, 1)
    x = F.conv3d(x, p["conv.weight"], p["conv.bias"], padding=(1, 1, 0), groups=6).movedim(1, -1).flatten(2, 3)
    answer = adapter(z, 2)
    torch.testing.assert_close(answer[:, :, 1:], z[:, :, 1:] + f(x) @ p["up.weight"].T + p["up.bias"])
    assert torch.equal(answer[:, :, 0], z[:, :, 0])


def test_initial_values_are_the_released_codes():
    for adapters in tiny(before_attention=True, kernel=(3, 3, 3)).adapters:
        for adapter in adapters.values():
            zero = {name for name, p in adapter.named_parameters() if not p.any()}
            assert zero == {"conv.weight", "conv.bias", "down.bias", "up.bias"}
            for fc, inputs in ((adapter.down, 64), (adapter.up, 24)):  # PyTorch's own: uniform within 1 / sqrt(inputs)
                assert 0.9 < fc.weight.abs().max() * inputs**0.5 <= 1


def test_recipes_are_the_released_ones():
    k400 = dict(epochs=12, warmup_epochs=2, batch_size=192, lr=1e-3, lr_batch=256, weight_decay=1e-2, span=128)
    k400 |= dict(views=(3, 1), augment=dict(short_side=(1.0, 1.15), flip=0.5))
    ssv2 = k400 | dict(epochs=50, batch_size=256, span=0, views=(1, 3), model=dict(before_attention=True))
    ssv2["augment"] = dict(crop=(0.08, 1.0), randaugment=(4, 7))  # no flip
    assert st_adapter.RECIPES["k400"] == k400 and st_adapter.RECIPES["ssv2"] == ssv2
    defaults = {key: p.default for key, p in inspect.signature(STAdapter).parameters.items()}
    released = dict(bottleneck=384, kernel=(3, 1, 1), before_attention=False, before_mlp=True, activation="none")
    assert defaults | released | dict(dropout=0.5, blocks="all") == defaults


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="none, relu, gelu"):
        tiny(activation="tanh")


# The model


@pytest.mark.parametrize(
    "switches",
    [{}, dict(before_attention=True), dict(before_mlp=False, before_attention=True, kernel=(3, 3, 3)),
     dict(activation="gelu", blocks="top")],
)  # fmt: skip
def test_it_starts_as_the_frozen_image_model_on_each_frame(switches):
    model, video = tiny(**switches).eval(), clips()
    z = model.vit.ln_pre(model.vit.embed(video.flatten(0, 1)))
    for block in model.vit.blocks:
        z = block(z)
    plain = model.vit.ln_post(z[:, 0].unflatten(0, (2, 4)).mean(1))
    torch.testing.assert_close(model.features(video), plain)
    randomize(model.adapters)
    assert not torch.allclose(model.features(video), plain, atol=1e-2)


@pytest.mark.parametrize(
    ("blocks", "chosen"),
    [("all", [0, 1, 2, 3]), ("bottom", [0, 1]), ("top", [2, 3]), ("every second", [1, 3]), ("0 2", [0, 2]),
     ([0, 2], [0, 2])],
)  # fmt: skip
def test_adapters_stand_in_the_chosen_blocks_and_nowhere_else(blocks, chosen):
    for before_attention, places in ((False, ["mlp"]), (True, ["attn", "mlp"])):
        model = tiny(blocks=blocks, before_attention=before_attention).eval()
        assert [list(a) for a in model.adapters] == [places if i in chosen else [] for i in range(4)]
        called = []
        for i, adapters in enumerate(model.adapters):
            for place, adapter in adapters.items():
                adapter.register_forward_hook(lambda *_, called=called, name=(i, place): called.append(name))
        model(clips())
        assert called == [(i, place) for i in chosen for place in places]


@pytest.mark.parametrize("blocks", ["some", "4", [-1], [], "0 x"])
def test_a_wrong_choice_of_blocks_is_refused(blocks):
    with pytest.raises(ValueError, match="every second, or numbers from 0 to 3"):
        tiny(blocks=blocks)


@pytest.mark.parametrize(
    ("kernel", "blocks", "changed"),
    [
        ((3, 1, 1), [0], [2, 3, 4]),
        ((5, 1, 1), [0], [1, 2, 3, 4, 5]),
        ((3, 1, 1), [0, 1], [1, 2, 3, 4, 5]),
        ((1, 3, 3), [0, 1], [3]),
        ((3, 3, 3), [0], [2, 3, 4]),
    ],
)
def test_frames_see_each_other_through_the_kernels_time_extent_alone(kernel, blocks, changed):
    model = randomize(tiny(7, layers=2, kernel=kernel, blocks=blocks)).eval()
    last = []
    model.vit.blocks[-1].mlp.register_forward_hook(lambda _, inputs, output: last.append(output))  # B x T x N+1 x D
    video = clips(7, count=1)
    other = video.clone()
    other[:, 3] = torch.randn(3, 32, 32)
    model(torch.cat([video, other]))
    difference = (last[0][0] - last[0][1]).abs().amax((1, 2))
    assert [t for t in range(7) if difference[t] > 1e-4] == changed
    ordered = torch.allclose(model(video), model(video[:, torch.randperm(7)]), atol=1e-4)
    assert ordered == (kernel[0] == 1)


def test_no_weight_depends_on_the_number_of_frames():
    short, long = randomize(tiny(4)).eval(), tiny(16).eval()
    long.load_state_dict(short.state_dict())
    for num_frames in (1, 4, 7):
        video = clips(num_frames)
        assert torch.equal(short(video), long(video)) and short(video).isfinite().all()


def test_training_changes_what_is_tuned_and_nothing_else():
    model = tiny(before_attention=True, dropout=0.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    # No weight decay: what changes does so by its gradient. Four blocks, all of whose convolutions start at zero.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0)
    for _ in range(3):
        model(clips()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    unchanged = {k for k, v in model.state_dict().items() if torch.equal(v, before[k])}
    # The [class] token of the last block is all that is read, and the adapter before its MLP acts on patches.
    dead = {k for k in before if k.startswith("adapters.3.mlp.")}
    assert unchanged == {k for k in before if k.startswith("vit.")} | dead
    assert set(common.tuned_state(model)) == {k for k in before if not k.startswith("vit.")}


def test_dropout_stands_before_the_classifier():
    model = randomize(tiny(dropout=1.0)).train()
    torch.testing.assert_close(model(clips()), model.head.bias.expand(2, -1))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kernel", [(3, 1, 1), (3, 3, 3)])
def test_an_exported_or_traced_model_takes_any_batch(kernel):
    model, video = randomize(tiny(layers=2, kernel=kernel, before_attention=True)).eval(), clips(count=3)
    dynamic = {"video": {0: torch.export.Dim("batch", min=1)}}
    exported = torch.export.export(model, (video[:2],), dynamic_shapes=dynamic).module()
    for frozen in (exported, torch.jit.trace(model, video[:2])):
        for count in (1, 3):
            torch.testing.assert_close(frozen(video[:count]), model(video[:count]))


# Memory


@pytest.mark.parametrize("switches", [{}, dict(before_attention=True), dict(blocks="top"), dict(blocks="2")])
def test_nothing_before_the_first_tuned_tensor_builds_a_graph(switches):
    model, enters = tiny(**switches), []
    for module in model.modules():
        if isinstance(module, SpatioTemporalAdapter):
            module.register_forward_pre_hook(lambda _, inputs: enters.append(inputs[0].requires_grad))
    model(clips())
    assert enters == [False] + [True] * (len(enters) - 1)


def test_recomputed_gradients_are_the_same():
    model, video = randomize(tiny(before_attention=True, dropout=0.0)), clips()
    gradients = []
    for again in (False, True):
        model.zero_grad()
        if again:
            common.recompute(model)
            assert all(block.recompute for block in model.vit.blocks)
        model(video).square().sum().backward()
        gradients.append(
            {k: p.grad for k, p in model.named_parameters() if not k.startswith(("vit.", "adapters.3.mlp"))}
        )
    assert all(g.abs().max() > 0 for g in gradients[0].values())
    torch.testing.assert_close(*gradients)


def test_activations_take_less_memory_than_the_released_codes():
    released = 486 * 2**20  # the authors' code, measured with the same hooks
    with FakeTensorMode():
        model, video = STAdapter(ViT(), 400), torch.empty(1, 8, 3, 224, 224)
        common.cast_frozen(model, torch.bfloat16)
        assert tables.activation_bytes(model, video) <= 0.72 * released
        common.recompute(model)
        assert tables.activation_bytes(model, video) <= 0.25 * released


def test_a_clip_beside_the_checkpoint_is_read_strictly_and_with_any_prefix():
    data = golden("k400")
    model, tuned, clip = model_of(data), data["checkpoint"]["model"], data["checkpoint"]["clip"]
    bare = {k.removeprefix("visual."): v for k, v in clip.items()}
    st_adapter.load_official(model, {"model": tuned, "clip": {"state_dict": bare}})
    torch.testing.assert_close(model(data["video"]), data["logits"], atol=1e-4, rtol=0)
    lacking = {k: v for k, v in clip.items() if "ln_pre.bias" not in k}
    with pytest.raises(ValueError, match=r"misses vit\.ln_pre\.bias"):
        st_adapter.load_official(model, {"model": tuned, "clip": lacking})
