"""Side4Video against its paper's tables, the authors' released behaviour, and its own claims."""

import copy
import inspect
import re
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import common
import side4video
from colab import tables
from common import B16, E14, L14, ViT
from side4video import BatchNorm, Down, PostNormSideBlock, Side4Video, SideBlock, TemporalConv

GOLDEN = Path(__file__).parent / "golden"
EVA = dict(post_norm=True, patch_bias=True, ln_pre=False, eps=1e-6, mlp_ratio=2.5)
E14_KIND = dict(vit=EVA, post_norm=True, side_layers=2, width=128)
VARIANTS = [{}, dict(temporal="attention"), dict(cls_shift=False, fusion="top", side_layers=3), E14_KIND]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny(num_frames=4, layers=4, vit_width=48, vit=None, **switches):
    vit = ViT(32, 8, vit_width, layers, 4, **(vit or dict(quick_gelu=True)))
    return Side4Video(vit, 5, num_frames, **dict(dict(width=64), **switches))


@torch.no_grad()
def randomize(module):
    """No branch may hide behind a zero; norms and their statistics stay near 1, so that answers do not vanish."""
    for name, x in [*module.named_parameters(), *module.named_buffers()]:
        if "running_var" in name or (
            re.search(r"(^|\.)(\w*bn|\w*bn_\d|ln|ln_\w+)\.", name) and name.endswith("weight")
        ):
            x.uniform_(0.5, 1.5)
        elif x.is_floating_point():
            x.normal_(std=0.15)
    return module


def clips(num_frames=4, count=2):
    return torch.randn(count, num_frames, 3, 32, 32)


@pytest.mark.parametrize(
    ("size", "switches", "tunable", "gflops"),
    [
        (B16, dict(side_layers=6, width=192), 4_496_832, 148.2),
        (B16, {}, 21_056_832, 175.7),
        (L14, dict(side_layers=12), 21_892_416, 696.7),
        (L14, dict(width=512), 102_019_584, 869.3),
        (E14, dict(width=576, side_layers=32, post_norm=True), 183_273_408, 9451.4),
    ],
)
def test_parameters_and_gflops_are_the_papers(size, switches, tunable, gflops):
    with torch.device("meta"):
        model = Side4Video(ViT(**size), 400, **switches).eval()
        assert common.count_parameters(model)[1] == tunable + 400 * (model.head.in_features + 1)
        model.head = nn.Identity()
        assert tables.gflops(model, torch.empty(1, 8, 3, 224, 224)) == pytest.approx(gflops, abs=0.15)
    assert common.count_parameters(model)[1] == tunable


def test_the_counts_of_e14_are_the_released_codes():
    with torch.device("meta"):
        model = Side4Video(ViT(**E14), 400, **side4video.RECIPES["k400 EVA02-E-14"]["model"]).eval()
        gflops = [tables.gflops(model, torch.empty(1, T, 3, 224, 224)) for T in (8, 16)]
        vit = 8 * tables.gflops(ViT(**E14), torch.empty(1, 3, 224, 224))
    total, tunable = common.count_parameters(model)
    head, key_biases = (
        1_836_032,
        64 * 1792,
    )  # theirs has the ViT's head, and no biases of its keys, which are zeros here
    assert (total, tunable) == (4_534_061_136 - head + key_biases, 183_504_208)
    assert gflops == pytest.approx([9451.4, 18_902.8], abs=0.15)
    assert vit == pytest.approx(9057.3, abs=0.15)


def test_the_papers_gflops_of_vit_e_leave_out_q_k_v_and_the_products_inside_attention():
    T, n, L, D, side_layers, d = 8, 257, 64, 1792, 32, 576
    vit = L * 3 * D * D * n * T + 2 * L * n * n * D * T
    side = side_layers * 3 * d * d * n * T + 2 * side_layers * (n - 1) * n * d * T
    assert 9451.35 - (vit + side) / 1e9 == pytest.approx(7980, rel=0.002)


OWN = "PyTorch's"  # uniform within 1 / sqrt(fan-in)


@pytest.mark.parametrize(
    ("post_norm", "starts"),
    [
        (
            False,
            {
                r"position_embedding": 0.01,
                r"(head|downs.\d.fc|blocks.\d.(attn.out_proj|mlp.[02])).weight": 0.02,
                r"(head|downs.\d.fc|blocks.\d.(attn.out_proj|mlp.[02])).bias|blocks.\d.attn.in_proj_bias": 0.0,
                r"blocks.\d.temporal.point_(in|out).weight": 0.02,
                r"blocks.\d.(temporal.depth.weight|attn.in_proj_weight)": 256**-0.5,
                r"stem.(weight|bias)|blocks.\d.temporal.(point_in|point_out|depth).bias": OWN,
            },
        ),
        (
            True,
            {
                r"position_embedding": 0.02,
                r"(stem|head|downs.\d.fc|blocks.\d.(temporal.\w+|attn.out_proj|mlp.[02])).(weight|bias)": OWN,
                r"blocks.\d.attn.in_proj_(weight|bias)": OWN,
            },
        ),
    ],
)
def test_initial_values_and_constants_are_the_released_ones(post_norm, starts):
    model = Side4Video(ViT(64, 4, 80, 2, 4), 400, width=256, post_norm=post_norm)
    fan_in = {"stem": 3 * 3 * 4 * 4, "downs": 80, "depth": 3, "mlp.2": 1024}
    for name, p in model.state_dict().items():
        if name.startswith("vit.") or name in dict(model.named_buffers()):
            continue
        norm = re.search(r"\.ln\.|bn\.|bn_\d|ln_\d", name)
        start = float(name.endswith("weight")) if norm else next(v for k, v in starts.items() if re.fullmatch(k, name))
        if norm or not start:
            assert (p == start).all(), name
        elif start == OWN:
            bound = next((n for part, n in fan_in.items() if part in name), 256) ** -0.5
            assert 0.9 * bound < p.abs().max() <= bound, name
            assert p.std() == pytest.approx(bound / 3**0.5, rel=0.15 if p.dim() == 1 else 0.02), name
        else:
            assert p.std() == pytest.approx(start, rel=0.05), name
            assert p.abs().max() > 2.5 * start, name  # normal, not uniform
            assert p.mean().abs() < 5 * start * p.numel() ** -0.5, name
    for name, module in model.named_modules():
        if isinstance(module, BatchNorm):
            assert (module.eps, module.momentum) == (1e-5, 0.1), name
        elif isinstance(module, nn.LayerNorm) and not name.startswith("vit."):
            assert module.eps == 1e-5, name


FLIP, RANDOM = dict(crop=(0.08, 1.0), flip=0.5), dict(randaugment=(4, 7))
L14_SWITCHES, E14_SWITCHES = dict(width=512), dict(width=576, side_layers=32, post_norm=True)


@pytest.mark.parametrize(
    ("recipe", "epochs", "warmup", "batch", "lr", "views", "repeat", "augment", "model"),
    [
        ("k400", 30, 4, 256, 1e-3, (4, 3), 1, FLIP | dict(gray=0.2), {}),
        ("k400 ViT-L-14", 30, 4, 256, 1e-4, (4, 3), 1, FLIP | dict(gray=0.2), L14_SWITCHES),
        ("k400 EVA02-E-14", 20, 4, 128, 1e-4, (4, 3), 1, FLIP | dict(gray=0.2) | RANDOM, E14_SWITCHES),
        ("ssv1", 40, 4, 128, 1e-3, (2, 3), 2, FLIP | RANDOM, {}),
        ("ssv1 ViT-L-14", 40, 4, 128, 1e-4, (2, 3), 2, FLIP | RANDOM, L14_SWITCHES),
        ("ssv1 EVA02-E-14", 30, 6, 64, 1e-4, (2, 3), 2, FLIP | RANDOM, E14_SWITCHES),
        ("ssv2", 30, 4, 128, 1e-3, (2, 3), 2, FLIP | RANDOM, {}),
        ("ssv2 ViT-L-14", 30, 4, 128, 1e-4, (2, 3), 2, FLIP | RANDOM, L14_SWITCHES),
        ("ssv2 EVA02-E-14", 25, 6, 64, 1e-4, (2, 3), 2, FLIP | RANDOM, E14_SWITCHES),
    ],
)
def test_recipes_are_those_of_table_12(recipe, epochs, warmup, batch, lr, views, repeat, augment, model):
    """Released, not in table 12: the views, and RandAugment for E/14 on K400."""
    wanted = dict(epochs=epochs, warmup_epochs=warmup, batch_size=batch, lr=lr, views=views, augment=augment)
    wanted |= dict(weight_decay=0.15, label_smoothing=0.1, repeat=repeat, model=model)
    assert dict(repeat=1, model={}) | side4video.RECIPES[recipe] == wanted


def test_the_defaults_are_those_of_b16_and_the_loss_is_cross_entropy():
    defaults = {name: p.default for name, p in inspect.signature(Side4Video).parameters.items()}
    assert defaults["width"] == 320 and defaults["side_layers"] == 0 and not defaults["post_norm"]
    assert (defaults["fusion"], defaults["temporal"], defaults["cls_shift"]) == ("interval", "conv", True)
    model, label = tiny(), torch.tensor([1, 4])
    logits = model(clips())
    assert model.dropout.p == 0 and logits.shape == (2, 5)
    wanted = F.cross_entropy(logits, label, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(model.loss(logits, label, 0.1), wanted)


# The released checkpoints


def golden(name):
    data = torch.load(GOLDEN / f"{name}.pt", weights_only=True)
    if name == "side4video_e14":  # its side blocks, most of its tensors, have a file of their own
        blocks = torch.load(GOLDEN / "side4video_e14_blocks.pt", weights_only=True)
        data["checkpoint"]["model_state_dict"] |= blocks
    return data


def model_of(golden):
    c = golden["config"]
    vit = dict(EVA, mlp_ratio=c["mlp_width"] / c["width"]) if "mlp_width" in c else dict(quick_gelu=True)
    vit = ViT(c["resolution"], c["patch"], c["width"], c["layers"], c["heads"], **vit)
    switches = dict(width=c["side_width"], side_layers=c["layers"] // c["side_every"], post_norm="mlp_width" in c)
    return Side4Video(vit, c["num_classes"], c["num_frames"], **switches).eval()


@pytest.mark.parametrize("name", ["side4video", "side4video_light", "side4video_e14"])
def test_released_checkpoints_answer_as_the_authors_code(name):
    data = golden(name)
    model = model_of(data)
    side4video.load_official(model, data["checkpoint"])
    torch.testing.assert_close(model.features(data["video"]), data["features"], atol=1e-4, rtol=0)
    torch.testing.assert_close(model(data["video"]), data["logits"], atol=1e-4, rtol=0)


def test_released_checkpoints_load_under_any_prefix_and_with_what_recognition_leaves_out():
    data = golden("side4video_light")
    model, state = model_of(data), data["checkpoint"]["model_state_dict"]
    ln_post = {"visual.ln_post.weight": torch.rand(32), "visual.ln_post.bias": torch.rand(32)}
    state = {**state, **ln_post, "visual.proj": torch.randn(32, 16)}
    nested = {
        "epoch": 3,
        "step": torch.tensor(7),
        "model": {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    }
    side4video.load_official(model, nested)
    torch.testing.assert_close(model(data["video"]), data["logits"], atol=1e-4, rtol=0)
    assert torch.equal(model.vit.ln_post.weight, ln_post["visual.ln_post.weight"])


def test_released_checkpoints_load_strictly():
    data = golden("side4video")
    model, state = model_of(data), data["checkpoint"]["model_state_dict"]
    for gone, ours in (
        ("visual.transformer.side_transformer.1.conv.1.bias", "blocks.1.temporal.depth.bias"),
        ("visual.transformer.side_lns.0.weight", "downs.0.ln.weight"),
        ("visual.side_post_bn.running_var", "post_bn.running_var"),
        ("visual.transformer.resblocks.1.ln_2.bias", "vit.transformer.resblocks.1.ln_2.bias"),
    ):
        with pytest.raises(ValueError, match="misses " + re.escape(ours)):
            side4video.load_official(model, {k: v for k, v in state.items() if k != gone})
    with pytest.raises(ValueError, match=r"unexpected vit\.stranger"):
        side4video.load_official(model, {**state, "visual.stranger": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"unexpected vit\.transformer\.resblocks\.2"):
        side4video.load_official(model, golden("side4video_light")["checkpoint"])
    with pytest.raises(ValueError, match="differs in shape: position_embedding is"):
        other = dict(state)
        other["visual.transformer.side_spatial_position_embeddings"] = torch.zeros(49, 64)
        side4video.load_official(model, other)


def test_released_checkpoints_of_e14_load_strictly_under_any_prefix():
    data = golden("side4video_e14")
    model, state = model_of(data), data["checkpoint"]["model_state_dict"]
    side4video.load_official(model, {"model": {f"module.{key}": x for key, x in state.items()}})
    torch.testing.assert_close(model(data["video"]), data["logits"], atol=1e-4, rtol=0)
    assert torch.equal(model.vit.ln_post.bias, state["visual.norm.bias"])  # though nothing uses it
    for gone, ours in (
        ("visual.side_blocks.1.attn.k_proj.bias", "blocks.1.attn.in_proj_bias"),
        ("visual.side_blocks.0.attn.q_proj.weight", "blocks.0.attn.in_proj_weight"),
        ("visual.side_blocks.0.bn_2.running_mean", "blocks.0.bn_2.running_mean"),
        ("visual.side_lns.1.weight", "downs.1.ln.weight"),
        ("visual.blocks.3.norm2.weight", "vit.transformer.resblocks.3.mlp.norm.weight"),
        ("visual.blocks.0.attn.q_bias", "vit.transformer.resblocks.0.attn.in_proj_bias"),
        ("fc.bias", "head.bias"),
    ):
        with pytest.raises(ValueError, match="misses " + re.escape(ours)):
            side4video.load_official(model, {key: x for key, x in state.items() if key != gone})
    for stranger, ours in (
        ("visual.side_post_bn.weight", "post_bn.weight"),
        ("visual.side_blocks.2.bn_1.weight", "blocks.2.bn_1.weight"),
        ("visual.blocks.4.norm1.weight", "vit.transformer.resblocks.4.attn.norm.weight"),
        ("text.stranger", "text.stranger"),
    ):
        with pytest.raises(ValueError, match="unexpected " + re.escape(ours)):
            side4video.load_official(model, {**state, stranger: torch.zeros(128)})
    with pytest.raises(ValueError, match="misses post_bn"):
        side4video.load_official(tiny(layers=4, side_layers=2, vit=EVA, width=128), state)


VIT_OF_EVA = (  # our names, theirs
    (r"class_embedding", "cls_token"),
    (r"positional_embedding", "pos_embed"),
    (r"conv1\.", "patch_embed.proj."),
    (r"ln_post\.", "norm."),
    (r"transformer\.resblocks\.", "blocks."),
    (r"\.attn\.norm\.", ".norm1."),
    (r"\.mlp\.norm\.", ".norm2."),
    (r"\.in_proj_", ".qkv."),
    (r"\.out_proj\.", ".proj."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
)


def released(model):
    """The model's state as the authors' checkpoint would hold it."""
    e14, state = isinstance(model.post_bn, nn.Identity), {}
    side, blocks = ("visual.", "side_blocks") if e14 else ("visual.transformer.", "side_transformer")
    for key, tensor in model.state_dict().items():
        if e14 and key.startswith("vit."):
            for ours, theirs in VIT_OF_EVA:
                key = re.sub(ours, theirs, key)
        for ours, theirs in (
            (r"^vit\.", "visual."),
            (r"^stem\.", "visual.side_conv1."),
            (r"^stem_bn\.", "visual.side_pre_bn3d."),
            (r"^post_bn\.", "visual.side_post_bn."),
            ("^position_embedding", f"{side}side_spatial_position_embeddings"),
            (r"^downs\.(\d+)\.ln\.", rf"{side}side_lns.\1."),
            (r"^downs\.(\d+)\.fc\.", rf"{side}side_linears.\1."),
            (r"^blocks\.(\d+)\.", rf"{side}{blocks}.\1."),
            (r"\.temporal\.point_in\.", ".conv.0."),
            (r"\.temporal\.depth\.", ".conv.1."),
            (r"\.temporal\.point_out\.", ".conv.2."),
            (r"(side_transformer\.\d+\.mlp)\.0\.", r"\1.fc1."),
            (r"(side_transformer\.\d+\.mlp)\.2\.", r"\1.fc2."),
            (r"(side_blocks\.\d+\.attn)\.out_proj\.", r"\1.proj."),
            (r"^head\.", "fc."),
        ):
            key = re.sub(ours, theirs, key)
        if re.search(r"side_\w+\.\d+\.conv\.\d\.weight", key):
            tensor = tensor.reshape(*tensor.shape[:2], -1, 1, 1)  # of Conv3d
        state[key] = tensor[None, None] if key.endswith("cls_token") else tensor[None] if "pos_embed" in key else tensor
    for key in [key for key in state if e14 and (".in_proj_" in key or ".qkv.bias" in key)]:
        q, k, v = state.pop(key).chunk(3)
        if "side_" in key:
            names = [key.replace("in_proj_", f"{part}_proj.") for part in "qkv"]
            state |= dict(zip(names, (q, k, v), strict=True))
        else:
            assert not k.any()
            state |= {key.replace("qkv.bias", "q_bias"): q, key.replace("qkv.bias", "v_bias"): v}
    return state


@pytest.mark.parametrize(
    "switches",
    [
        dict(width=128, num_frames=6),
        dict(width=192, layers=6, side_layers=2, vit_width=80),
        dict(layers=3, num_frames=1),
        dict(E14_KIND, num_frames=6, layers=6, vit_width=80),
        dict(E14_KIND, num_frames=1, width=192, side_layers=4),
    ],
)
def test_checkpoints_of_other_sizes_load(switches):
    ours, video = randomize(tiny(**switches)).eval(), clips(switches.get("num_frames", 4))
    if "post_norm" in switches:
        for block in ours.vit.blocks:
            block.attn.in_proj_bias.data.chunk(3)[1].zero_()  # EVA's keys have no bias
    fresh = tiny(**switches).eval()
    side4video.load_official(fresh, released(ours))
    assert not torch.allclose(fresh(video)[0], fresh(video)[1], atol=1e-3)
    assert torch.equal(fresh(video), ours(video))


# The ViT stays out of the graph


def bytes_saved(model, video):
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(video)
    return sum(x.untyped_storage().nbytes() for x in storages.values())


@pytest.mark.parametrize("recompute", [False, True])
def test_more_blocks_of_the_vit_take_no_more_memory(recompute):
    kept = []
    for layers in (2, 8):
        model = tiny(layers=layers, fusion="top", side_layers=2)
        model.vit.requires_grad_(True)  # frozen or not
        if recompute:
            common.recompute(model)
        kept.append(bytes_saved(model, clips()))
    assert kept[0] == kept[1] > 0


@pytest.mark.parametrize("switches", VARIANTS)
def test_no_gradient_reaches_the_vit_even_if_it_asks_for_one(switches):
    model = randomize(tiny(**switches))
    model.vit.requires_grad_(True)
    assert not any(z.requires_grad for z in model.outputs(clips()))
    model(clips()).square().sum().backward()
    assert all(p.grad is None for p in model.vit.parameters())
    for name, p in model.named_parameters():
        if not name.startswith("vit."):
            assert p.grad.isfinite().all() and p.grad.abs().max() > 0, name


@pytest.mark.parametrize("vit", [dict(quick_gelu=True), EVA])
def test_the_side_network_reads_the_outputs_of_the_vits_blocks(vit):
    model, video = randomize(tiny(vit=vit, side_layers=2)).eval(), clips()
    outputs = []
    for block in model.vit.blocks:
        block.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    answer = model.vit(video.flatten(0, 1))  # its projection is dropped
    wanted = [outputs[i].unflatten(0, (2, 4)) for i in (1, 3)]
    read = list(model.outputs(video))
    torch.testing.assert_close(read, wanted)
    torch.testing.assert_close(model.vit.ln_post(read[-1][:, :, 0]), answer.unflatten(0, (2, 4)))
    assert model(video).shape == (2, 5) and model(video).isfinite().all()


@pytest.mark.parametrize(
    ("switches", "read"),
    [
        ({}, list(range(1, 13))),
        (dict(side_layers=6), [2, 4, 6, 8, 10, 12]),
        (dict(side_layers=6, post_norm=True), [2, 4, 6, 8, 10, 12]),
        (dict(side_layers=4), [3, 6, 9, 12]),
        (dict(side_layers=1), [12]),
        (dict(side_layers=4, fusion="top"), [9, 10, 11, 12]),
        (dict(side_layers=5, fusion="top"), [8, 9, 10, 11, 12]),
    ],
)
def test_fusion_chooses_the_blocks_that_are_read(switches, read):
    with torch.device("meta"):
        model = tiny(layers=12, **switches)
        fused = []
        for i, block in enumerate(model.vit.blocks):
            block.register_forward_hook(lambda _, inputs, output, i=i: fused.append(f"ViT {i + 1}"))
        for down in model.downs:
            down.register_forward_hook(lambda *_: fused.append("side"))
        model(clips())
    assert [int(a.split()[1]) for a, b in pairwise(fused) if b == "side"] == read
    assert len(model.downs) == len(model.blocks) == fused.count("side") == len(read)


@pytest.mark.parametrize(
    "switches",
    [dict(side_layers=3), dict(side_layers=5), dict(side_layers=-1), dict(side_layers=5, fusion="top"),
     dict(fusion="bottom"), dict(temporal="none"), dict(width=96), dict(width=32)],
)  # fmt: skip
def test_wrong_choices_are_refused(switches):
    with pytest.raises(ValueError, match=f"{next(iter(switches))} is {next(iter(switches.values()))!r}"):
        tiny(**switches)


# The parts


def assert_same_gradients(ours, theirs, x, theirs_of, upstream):
    """ours, theirs: answers; x: lists of tensors in the same order."""
    gradients = torch.autograd.grad(ours, x, upstream)
    for a, b in zip(gradients, torch.autograd.grad(theirs, theirs_of, upstream)):
        torch.testing.assert_close(a, b.view_as(a), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("eps", [1e-5, 1e-1])
def test_down_is_a_projection_of_the_norm(eps):
    down, z = randomize(Down(48, 64)), torch.randn(2, 4, 17, 48) * 3 + 2
    assert down.ln.eps == 1e-5
    down.ln.eps = eps
    reference = copy.deepcopy(down)
    ours, theirs = down(z), reference.fc(reference.ln(z))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert len(list(down.parameters())) == 4
    assert_same_gradients(ours, theirs, list(down.parameters()), list(reference.parameters()), torch.randn_like(ours))


def test_batch_norm_is_that_of_3d():
    ours, theirs = BatchNorm(6), nn.BatchNorm3d(6)
    theirs.load_state_dict(randomize(ours).state_dict())
    for training in (True, True, False):
        x, channels_second = torch.randn(2, 4, 9, 6) + 1, lambda x: rearrange(x, "b t (h w) c -> b c t h w", h=3)
        answer = channels_second(ours.train(training)(x))
        torch.testing.assert_close(answer, theirs.train(training)(channels_second(x)))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    assert ours.num_batches_tracked == 2


@pytest.mark.parametrize("T", [1, 5])
def test_temporal_conv_is_three_conv3d(T):
    conv = randomize(TemporalConv(6))
    layers = nn.Conv3d(6, 6, 1), nn.Conv3d(6, 6, (3, 1, 1), padding=(1, 0, 0), groups=6), nn.Conv3d(6, 6, 1)
    reference = nn.Sequential(*layers)
    with torch.no_grad():
        for p, q in zip(reference.parameters(), conv.parameters(), strict=True):
            p.copy_(q.view_as(p))
    x = torch.randn(2, T, 4, 6, requires_grad=True)
    ours, theirs = conv(x), reference(x.movedim(-1, 1)[..., None]).squeeze(-1).movedim(1, -1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    tensors = [[x, *module.parameters()] for module in (conv, reference)]
    assert_same_gradients(ours, theirs, *tensors, torch.randn_like(ours))


@pytest.mark.parametrize("cls_shift", [True, False])
def test_attention_adds_the_class_tokens_of_the_neighbouring_frames(cls_shift):
    T, n, d = 4, 6, 128
    block = randomize(SideBlock(d, "conv", cls_shift))
    mha = nn.MultiheadAttention(d, 2, batch_first=True)
    mha.load_state_dict(block.attn.state_dict())
    x, cls, positions = torch.randn(2, T, n, d), torch.randn(2, T, 1, d), torch.randn(1 + n, d)
    read = block.tokens(cls, x, positions)
    answer = block.attention(read)
    for t in range(T):
        added = cls[:, t].clone()
        if cls_shift:
            added[..., :64] = cls[:, t + 1, :, :64] if t + 1 < T else 0
            added[..., 64:] = cls[:, t - 1, :, 64:] if t > 0 else 0
        tokens = torch.cat([added, x[:, t]], 1) + positions
        assert torch.equal(read[:, t], tokens)
        torch.testing.assert_close(answer[:, t], mha(tokens[:, 1:], tokens, tokens)[0], atol=1e-4, rtol=1e-4)


def norm(layer, x):
    """LayerNorm, or BatchNorm in evaluation, written out."""
    mean, var = (layer.running_mean, layer.running_var) if isinstance(layer, BatchNorm) else (None, None)
    if mean is None:
        mean, var = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    return (x - mean) * (var + 1e-5).rsqrt() * layer.weight + layer.bias


@pytest.mark.parametrize("kind", [SideBlock, PostNormSideBlock])
def test_a_block_is_fusion_temporal_convolution_attention_and_mlp(kind):
    block = randomize(kind(64, "conv", True)).eval()
    s, z, positions = torch.randn(2, 4, 6, 64), torch.randn(2, 4, 7, 64), torch.randn(7, 64)
    post = kind is PostNormSideBlock

    def branch(layer, function, x):
        return norm(layer, function(x)) if post else function(norm(layer, x))

    x = (s + z[:, :, 1:]) / 2
    x = x + branch(block.bn_1, block.temporal, x)
    x = x + branch(block.ln_1, block.attention, block.tokens(z[:, :, :1], x, positions))
    x = x + branch(block.bn_2, lambda x: block.mlp[2](F.gelu(block.mlp[0](x))), x)
    torch.testing.assert_close(block(s, z, positions), x, atol=1e-5, rtol=1e-5)


def test_temporal_attention_sees_one_patch_in_all_frames():
    attention = randomize(SideBlock(128, "attention", True)).temporal
    mha = nn.MultiheadAttention(128, 2, batch_first=True)
    mha.load_state_dict(attention.state_dict())
    x = torch.randn(2, 4, 6, 128)
    wanted = torch.stack([mha(x[:, :, n], x[:, :, n], x[:, :, n])[0] for n in range(6)], dim=2)
    torch.testing.assert_close(attention(x), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("temporal", "on", "cls_shift", "changed"),
    [
        ("conv", True, False, [1, 2, 3]),
        ("attention", True, False, [0, 1, 2, 3, 4]),
        ("conv", False, True, [1, 2, 3]),
        ("conv", False, False, [2]),
    ],
)
def test_frames_see_each_other_through_the_temporal_module_and_the_shift(temporal, on, cls_shift, changed):
    block = randomize(SideBlock(64, temporal, cls_shift)).eval()
    if not on:
        block.temporal = nn.Identity()
    s, z = torch.randn(2, 5, 6, 64), torch.randn(2, 5, 7, 64)
    frame = torch.arange(5).view(5, 1, 1) == 2
    s[1], z[1] = torch.where(frame, s[1], s[0]), torch.where(frame, z[1], z[0])  # two clips that differ in frame 2
    answer = block(s, z, torch.randn(7, 64))
    difference = (answer[0] - answer[1]).abs().amax((1, 2))
    assert [t for t in range(5) if difference[t] > 1e-5] == changed


# The model


@pytest.mark.parametrize("switches", VARIANTS)
def test_any_variant_answers_any_number_of_frames_and_sees_their_order(switches):
    model, other = randomize(tiny(4, **switches)).eval(), tiny(16, **switches).eval()
    other.load_state_dict(model.state_dict())
    for num_frames in (1, 4, 7):
        video = clips(num_frames)
        assert torch.equal(model(video), other(video)) and model(video).isfinite().all()
        assert num_frames == 1 or not torch.allclose(model(video), model(video.flip(1)), atol=1e-3)


@pytest.mark.parametrize("switches", [{}, E14_KIND])
def test_the_side_network_starts_at_the_stem_and_ends_in_the_mean_over_frames_and_patches(switches):
    model, entered, left = randomize(tiny(**switches)).eval(), [], []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: entered.append(inputs))
        block.register_forward_hook(lambda _, inputs, output: left.append(output))
    video = clips()
    features, read = model.features(video), list(model.outputs(video))
    conv = F.conv3d(video.transpose(1, 2), model.stem.weight, model.stem.bias, (1, 8, 8), (1, 0, 0))
    torch.testing.assert_close(entered[0][0], norm(model.stem_bn, conv.flatten(3).permute(0, 2, 3, 1)))
    for i, (down, (s, z, positions)) in enumerate(zip(model.downs, entered, strict=True)):
        wanted = norm(down.ln, down.fc(read[i])) if "post_norm" in switches else down.fc(norm(down.ln, read[i]))
        torch.testing.assert_close(z, wanted, atol=1e-4, rtol=1e-4)
        assert not positions[0].any() and torch.equal(positions[1:], model.position_embedding)  # [CLS] has none
        assert i == 0 or s is left[i - 1]
    last = left[-1] if "post_norm" in switches else norm(model.post_bn, left[-1])  # E/14 has no norm here
    torch.testing.assert_close(features, last.flatten(1, 2).mean(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("switches", VARIANTS)
def test_training_changes_what_is_tuned_and_nothing_else(switches):
    model = tiny(**switches)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    # No weight decay: what changes does so by its gradient.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0)
    for _ in range(3):
        model(clips()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == set(common.tuned_state(model)) == {k for k in before if not k.startswith("vit.")}
    assert {"stem_bn.running_var", "blocks.1.bn_2.num_batches_tracked"} <= changed


# Memory


@pytest.mark.parametrize("switches", VARIANTS)
def test_recomputed_gradients_and_statistics_are_the_same(switches):
    kept, video = randomize(tiny(**switches)), clips()
    redone, before = copy.deepcopy(kept), {k: v.clone() for k, v in kept.named_buffers()}
    common.recompute(redone)
    assert redone.recompute and not kept.recompute
    for model in (kept, redone):
        for _ in range(2):
            model(video).square().sum().backward()
    tuned = [{k: p.grad for k, p in m.named_parameters() if p.requires_grad} for m in (kept, redone)]
    torch.testing.assert_close(*tuned)
    torch.testing.assert_close(*(dict(m.named_buffers()) for m in (kept, redone)), atol=0, rtol=0)
    for name, buffer in redone.named_buffers():
        assert not torch.equal(buffer, before[name])
        assert "tracked" not in name or buffer == 2
    assert bytes_saved(redone, video) < 0.5 * bytes_saved(kept, video)


def test_activations_take_less_memory_than_the_released_codes():
    released = 329 * 2**20  # the authors' code, measured with the same hooks
    with FakeTensorMode():
        model, video = Side4Video(ViT(), 400), torch.empty(1, 8, 3, 224, 224)
        common.cast_frozen(model, torch.bfloat16)
        assert tables.activation_bytes(model, video) <= 0.9 * released
        common.recompute(model)
        assert tables.activation_bytes(model, video) <= 0.25 * released


# Several processes


def recomputing(model):
    common.recompute(model)
    return model


SHARED = {
    "batch norm": lambda: BatchNorm(6),
    "batch norm, bfloat16": lambda: BatchNorm(6),
    "model": lambda: tiny(),
    "model, recomputed": lambda: recomputing(tiny()),
    "E/14's": lambda: tiny(**E14_KIND),
    "E/14's, recomputed": lambda: recomputing(tiny(**E14_KIND)),
}


def shared_pass(name, part, dtype=None):
    """Output, gradients and buffers after a pass in training through `part` of the batch, and the bytes kept for it."""
    torch.manual_seed(5)
    module = randomize(SHARED[name]())
    if "norm" in name:
        x, upstream = (
            torch.randn(4, 3, 50, 6) * torch.linspace(0.1, 3, 6) + torch.linspace(-3, 3, 6),
            torch.randn(4, 3, 50, 6),
        )
        x[:2] += 1  # other means in the two processes
        x, upstream = (tensor.to(torch.bfloat16 if "bf" in name else torch.float32) for tensor in (x, upstream))
    else:
        x, upstream = clips(count=4), torch.randn(4, 5)
    if dtype:
        module, x, upstream = module.to(dtype), x.to(dtype), upstream.to(dtype)
    x = x[part].clone().requires_grad_()
    kept = bytes_saved(copy.deepcopy(module), x)
    y = module(x)
    y.backward(upstream[part])
    grads = {key: p.grad for key, p in module.named_parameters() if p.grad is not None}
    return y.detach(), x.grad, grads, dict(module.named_buffers()), kept


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    with warnings.catch_warnings(action="error"):
        found = {name: shared_pass(name, slice(2 * rank, 2 * rank + 2)) for name in SHARED}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    """Output, gradients and running statistics, of the batch norm and of models with it."""
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name in SHARED:
        is_norm, is_half = "norm" in name, "bfloat16" in name
        y, x_grad, grads, buffers, _ = shared_pass(name, slice(None), torch.float64 if is_norm else None)
        (y0, x_grad0, grads0, buffers0, kept), (y1, x_grad1, grads1, buffers1, _) = ranks[0][name], ranks[1][name]
        for ours, theirs in ((torch.cat([y0, y1]), y), (torch.cat([x_grad0, x_grad1]), x_grad)):
            assert ours.dtype == (torch.bfloat16 if is_half else torch.float32)
            tolerance = dict(atol=0.02, rtol=0.01) if is_half else dict(atol=2e-6 if is_norm else 1e-5, rtol=1e-5)
            torch.testing.assert_close(ours.to(theirs.dtype), theirs, **tolerance)
        for key, grad in grads.items():
            error = (grads0[key] + grads1[key] - grad).abs().max()
            assert error <= 1e-5 * (1 + grad.abs().max()), key
        for key, buffer in buffers.items():  # in float32, also of halves
            for ours in (buffers0[key], buffers1[key]):
                torch.testing.assert_close(ours.to(buffer.dtype), buffer, atol=1e-6, rtol=1e-6)
        if is_norm:
            assert kept <= y0.nbytes + 500  # of the activations, x alone


# Other batch sizes than the example's


@pytest.mark.parametrize("switches", VARIANTS)
def test_exported_and_traced_models_take_any_batch(switches):
    model, dynamic = randomize(tiny(**switches)).eval(), {"video": {0: torch.export.Dim("batch", min=1, max=64)}}
    exported = torch.export.export(model, (clips(),), dynamic_shapes=dynamic).module()
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        traced = torch.jit.trace(model, clips())
    for count in (1, 5):
        video = clips(count=count)
        for other in (exported, traced):
            torch.testing.assert_close(other(video), model(video), atol=1e-5, rtol=1e-5)
