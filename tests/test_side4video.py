"""Side4Video against its paper's tables, the authors' released behaviour, and its own claims."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import common
import side4video
from common import B16, E14, L14, ViT
from side4video import BatchNorm, Down, Side4Video, SideBlock, TemporalConv

GOLDEN = Path(__file__).parent / "golden"


def tiny(**switches):
    torch.manual_seed(0)
    return Side4Video(ViT(32, 8, 64, 4, 4, quick_gelu=True), 5, 4, **(dict(width=64) | switches))


def randomize(model):
    """No branch may hide behind a zero."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    for b in model.buffers():
        b.fill_(3) if b.ndim == 0 else b.copy_(torch.rand_like(b) + 0.5)
    return model


@pytest.mark.parametrize(
    ("size", "switches", "tunable", "gflops"),
    [
        (B16, dict(side_layers=6, width=192), 4_496_832, 148.2),
        (B16, {}, 21_056_832, 175.7),
        (L14, dict(side_layers=12), 21_892_416, 696.7),
        (L14, side4video.L14_MODEL, 102_019_584, 869.3),
    ],
)
def test_parameters_and_gflops_are_the_papers(size, switches, tunable, gflops):
    with torch.device("meta"):
        model = Side4Video(ViT(**size), 400, **switches).eval()
        assert common.gflops(model, torch.empty(1, 8, 3, 224, 224)) == pytest.approx(gflops, abs=0.15)
        model.head = nn.Identity()
    assert common.count_parameters(model)[1] == tunable


def test_vit_e_costs_what_the_paper_prints_plus_what_its_counter_leaves_out():
    with torch.device("meta"):
        model = Side4Video(ViT(**E14), 400, **side4video.E14_MODEL).eval()
        counted = common.gflops(model, torch.empty(1, 8, 3, 224, 224))
    T, n, uncounted = 8, 257, 0
    for layers, width, queries in ((64, 1792, n), (32, 576, n - 1)):  # the q, k, v projections and both products
        uncounted += layers * T * (3 * width**2 * n + 2 * queries * n * width)
    assert counted - uncounted / 1e9 == pytest.approx(7980, rel=1e-3)
    assert sum(p.numel() for p in model.vit.parameters()) == pytest.approx(4.4e9, rel=0.015)


def golden(name):
    return torch.load(GOLDEN / f"{name}.pt", weights_only=True)


def model_of(golden):
    c = golden["config"]
    vit = ViT(c["resolution"], c["patch"], c["width"], c["layers"], c["heads"], quick_gelu=True)
    layers = c["layers"] // c["side_every"]
    return Side4Video(vit, c["num_classes"], c["num_frames"], width=c["side_width"], side_layers=layers).eval()


@pytest.mark.parametrize("name", ["side4video", "side4video_light"])
def test_released_checkpoints_answer_as_the_authors_code(name):
    data = golden(name)
    model = model_of(data)
    side4video.load_official(model, data["checkpoint"])
    torch.testing.assert_close(model.features(data["video"]), data["features"], atol=1e-4, rtol=0)
    torch.testing.assert_close(model(data["video"]), data["logits"], atol=1e-4, rtol=0)


def test_released_checkpoints_load_under_any_prefix_and_strictly():
    data = golden("side4video")
    model, state = model_of(data), data["checkpoint"]["model_state_dict"]
    more = {
        "visual.proj": torch.zeros(32, 8),
        "visual.ln_post.weight": torch.ones(32),
        "visual.ln_post.bias": torch.zeros(32),
    }
    side4video.load_official(model, {"epoch": 3, "model": {f"module.{k}": v for k, v in (state | more).items()}})
    torch.testing.assert_close(model(data["video"]), data["logits"], atol=1e-4, rtol=0)
    missing = {k: v for k, v in state.items() if k != "visual.side_post_bn.running_var"}
    with pytest.raises(ValueError, match=r"misses post_bn\.running_var"):
        side4video.load_official(model, missing)
    with pytest.raises(ValueError, match=r"unexpected vit\.stranger"):
        side4video.load_official(model, {**state, "visual.stranger": torch.zeros(1)})
    with pytest.raises(ValueError, match="does not fit"):
        side4video.load_official(model_of(golden("side4video_light")), state)


def released_names(state):
    """The inverse of load_official's renaming."""
    renamed = {}
    for key, tensor in state.items():
        if "temporal.point" in key and key.endswith("weight"):
            tensor = tensor[:, :, None, None, None]
        if key.endswith("temporal.depth.weight"):
            tensor = tensor[..., None, None]
        for ours, theirs in (
            (".temporal.point_in.", ".conv.0."),
            (".temporal.depth.", ".conv.1."),
            (".temporal.point_out.", ".conv.2."),
            (".mlp.0.", ".mlp.fc1."),
            (".mlp.2.", ".mlp.fc2."),
        ):
            key = key.replace(ours, theirs) if key.startswith("blocks.") else key
        for ours, theirs in (
            ("stem_bn.", "visual.side_pre_bn3d."),
            ("stem.", "visual.side_conv1."),
            ("post_bn.", "visual.side_post_bn."),
            ("position_embedding", "visual.transformer.side_spatial_position_embeddings"),
            ("blocks.", "visual.transformer.side_transformer."),
            ("vit.", "visual."),
            ("head.", "fc."),
        ):
            if key.startswith(ours):
                key = theirs + key.removeprefix(ours)
                break
        if key.startswith("downs."):
            _, i, part, name = key.split(".")
            key = f"visual.transformer.side_{ {'ln': 'lns', 'fc': 'linears'}[part] }.{i}.{name}".replace(" ", "")
        renamed[key] = tensor
    return renamed


def test_released_names_of_other_sizes_load():
    def build():
        return Side4Video(ViT(24, 8, 48, 6, 6), 7, 6, width=128, side_layers=3).eval()

    source, model, video = randomize(build()), build(), torch.randn(2, 6, 3, 24, 24)
    side4video.load_official(model, {"state": released_names(source.state_dict())})
    assert torch.equal(model(video), source(video))


def test_the_graph_of_the_vit_is_never_built():
    video = torch.randn(1, 4, 3, 32, 32)
    kept = {}
    for layers in (4, 16):
        model = Side4Video(ViT(32, 8, 64, layers, 4), 5, 4, width=64, side_layers=4)
        kept[layers] = common.activation_bytes(model, video)
    assert kept[4] == kept[16]
    model = tiny()
    model.vit.requires_grad_(True)  # even so
    assert not any(z.requires_grad for z in model.outputs(video))
    model(video).square().sum().backward()
    assert all(p.grad is None for p in model.vit.parameters())
    assert all(p.grad is not None for n, p in model.named_parameters() if not n.startswith("vit."))


def test_the_layers_read_and_no_further():
    def read(**switches):
        model, seen = Side4Video(ViT(16, 8, 64, 12, 4), 5, width=64, **switches), []
        for i, block in enumerate(model.vit.blocks):
            block.register_forward_hook(lambda *_, i=i: seen.append(i))
        model.eval()(torch.randn(1, 2, 3, 16, 16))
        assert seen == list(range(12)) and len(model.blocks) == len(model.read)
        return [i + 1 for i in model.read]

    assert read() == list(range(1, 13))
    assert read(side_layers=6) == [2, 4, 6, 8, 10, 12]
    assert read(side_layers=4) == [3, 6, 9, 12]
    assert read(side_layers=4, fusion="top") == [9, 10, 11, 12]
    for wrong, says in (
        (dict(side_layers=5), "cannot be read so"),
        (dict(side_layers=13, fusion="top"), "cannot be read so"),
        (dict(fusion="some"), "interval, top"),
        (dict(temporal="none"), "conv, attention"),
        (dict(representation="cls"), "gap, vit, own"),
        (dict(width=100), "multiple of 64"),
    ):
        with pytest.raises(ValueError, match=says):
            Side4Video(ViT(16, 8, 64, 12, 4), 5, **(dict(width=64) | wrong))


def test_down_is_a_norm_and_a_projection():
    down = randomize(Down(16, 8, 1e-5)).double()
    z, weights = torch.randn(2, 3, 5, 16, dtype=torch.double), list(down.parameters())
    answers = [(y, *torch.autograd.grad(y.square().sum(), weights)) for y in (down(z), down.fc(down.ln(z)))]
    for ours, plain in zip(*answers):
        torch.testing.assert_close(ours, plain)


def test_batch_norm_and_temporal_convolution_are_the_3d_ones():
    x = torch.randn(2, 4, 9, 6)  # B, T, N = 3 x 3, d
    volume = x.view(2, 4, 3, 3, 6).permute(0, 4, 1, 2, 3)
    ours, theirs = BatchNorm(6), nn.BatchNorm3d(6)
    expected = theirs(volume).permute(0, 2, 3, 4, 1).flatten(2, 3)
    torch.testing.assert_close(ours(x), expected)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-4, atol=1e-5)

    conv, shape = randomize(TemporalConv(6)), (3, 1, 1)
    parts = nn.Conv3d(6, 6, 1), nn.Conv3d(6, 6, shape, padding=(1, 0, 0), groups=6), nn.Conv3d(6, 6, 1)
    for part, own in zip(parts, (conv.point_in, conv.depth, conv.point_out)):
        part.weight.data, part.bias.data = own.weight.data.reshape(part.weight.shape), own.bias.data
    expected = parts[2](parts[1](parts[0](volume))).permute(0, 2, 3, 4, 1).flatten(2, 3)
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize("cls_shift", [True, False])
def test_keys_and_values_begin_with_the_class_token_shifted_in_time(cls_shift):
    block = randomize(SideBlock(64, 2, "conv", cls_shift))
    x, cls, positions = torch.randn(2, 4, 9, 64), torch.randn(2, 4, 1, 64), torch.randn(9, 64)
    theirs = nn.MultiheadAttention(64, 2, batch_first=True)
    theirs.load_state_dict(block.attn.state_dict())
    answer = block.attention(x, cls, positions)
    for t in range(4):
        token = cls[:, t].clone()
        if cls_shift:
            token[..., :32] = cls[:, t + 1, :, :32] if t < 3 else 0
            token[..., 32:] = cls[:, t - 1, :, 32:] if t > 0 else 0
        tokens = block.ln_1(torch.cat([token, x[:, t] + positions], dim=1))
        expected, _ = theirs(tokens[:, 1:], tokens, tokens)
        torch.testing.assert_close(answer[:, t], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "switches",
    [
        {},
        dict(temporal="attention"),
        dict(representation="vit"),
        dict(representation="own"),
        dict(fusion="top", side_layers=2),
        dict(temporal="attention", cls_shift=False, representation="own"),
    ],
)
def test_every_variant_learns_in_all_its_parts_and_sees_time(switches):
    model = randomize(tiny(**switches))
    for num_frames in (4, 3):  # no weight depends on it
        video = torch.randn(2, num_frames, 3, 32, 32)
        model.zero_grad()
        model(video).square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in gradients.values())
    model.eval()
    assert (model(video) - model(video.flip(1))).abs().max() > 1e-5


def test_the_carried_token_starts_as_the_vits_and_is_what_is_read():
    model, video = randomize(tiny(representation="vit")).eval(), torch.randn(1, 4, 3, 32, 32)
    seen = []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs))
    model.post_bn.register_forward_hook(lambda module, inputs, output: seen.append(output))
    features = model.features(video)
    (s, z, _), out = seen
    assert torch.equal(s[:, :, 0], z[:, :, 0]) and s.shape[2] == 17
    torch.testing.assert_close(features, out[:, :, 0].mean(1))


def test_training_changes_what_is_tuned_and_nothing_else():
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(torch.randn(2, 4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == set(common.tuned_state(model))
    assert any(k.endswith("running_mean") for k in changed) and not any(k.startswith("vit.") for k in changed)


def test_recomputing_gives_the_same_gradients_and_batch_statistics():
    video, states, gradients = torch.randn(2, 4, 3, 32, 32), [], []
    for redo in (False, True):
        model = tiny()
        if redo:
            common.recompute(model)
        for _ in range(2):
            model(video).square().sum().backward()
        states.append(model.state_dict())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert states[1]["blocks.0.bn_1.num_batches_tracked"] == 2
    for a, b in (states, gradients):
        for name in a:
            torch.testing.assert_close(a[name], b[name], msg=name)


def test_activations_are_few():
    with FakeTensorMode():
        model, video = Side4Video(ViT(), 400), torch.empty(1, 8, 3, 224, 224)
        assert common.activation_bytes(model, video) <= 0.9 * 329 * 2**20
        common.recompute(model)
        assert common.activation_bytes(model, video) <= 0.25 * 329 * 2**20
