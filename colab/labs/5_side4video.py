"""Lab 5, as a source for colab/build.py, which explains its directives."""

# ruff: noqa: F821

# %% [markdown]
# # Lab 5. Side4Video: learn beside, not through
#
# **What you will learn.** What a training step keeps in memory, and why a network *beside* a frozen image transformer keeps less than
# adapters *inside* it. The paper is *Side4Video* (Yao et al., 2023, [arXiv 2311.15769](https://arxiv.org/abs/2311.15769)). What is
# shown together is the file `side4video.py`, for action recognition.
#
# **How long.** 45 minutes of reading and 3 minutes of computing on two CPU cores. A GPU is used if there is one; the memory is counted
# without one.
#
# **What you need.** Lab 1: tokens, the toy videos and the tiny CLIP.
#
# **How to work.** Run the cells in order. Write down each **guess** before you run the experiment. There are four **exercises**;
# until your code is right, the notebook goes on with the project's own. If you edit a class that is shown here, run the cells
# below it again.

# %%
import inspect
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import aim
import common
import side4video
import st_adapter
import train
import zeroi2v
from colab import draw, lab, tables
from colab.checks import lab5 as check

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
T = 8  # frames of a clip

# %% [markdown]
# ## 1. What backward keeps
#
# A linear layer computes y = W x + b. Its backward pass gets dL/dy, and needs
#
# - x, for the gradient of W: dL/dW = dL/dy · xᵀ
# - W, for the gradient of x: dL/dx = Wᵀ · dL/dy
#
# Therefore the forward pass must **keep** x until backward has used it. Such *activations* fill most of a GPU while it trains. PyTorch
# shows each tensor that it keeps to `saved_tensors_hooks`. We count the bytes, without parameters, and note in whose module each was kept.


# %%
def kept(model, *inputs, image=None, bf16=False):
    """Calls the model -> {"frozen ViT": bytes, "new layers": bytes} that autograd keeps; image: the ViT"""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    inside, running, storages = set(image.modules() if image else ()), [], {}
    count = {"frozen ViT": 0, "new layers": 0}

    def enter(module, inputs):
        running.append(module)

    def leave(module, inputs, output):
        running.pop()

    def keep(tensor):
        storage = tensor.untyped_storage()  # two views of the same memory count once
        if storage._cdata not in parameters and storage._cdata not in storages:
            storages[storage._cdata] = storage
            count["frozen ViT" if running and running[-1] in inside else "new layers"] += (
                storage.nbytes()
            )
        return tensor

    hooks = [module.register_forward_pre_hook(enter) for module in model.modules()]
    hooks += [module.register_forward_hook(leave) for module in model.modules()]
    saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with saved, torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=bf16):
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return count


# %% [markdown]
# **Guess.** Five layers get the same input. Which keep something if the input needs no gradient? And if it needs one, because
# something that learns stands before it?

# %%
frozen_linear, frozen_norm, frozen_attention = (
    layer.requires_grad_(False)
    for layer in (nn.Linear(96, 96), nn.LayerNorm(96), common.Attention(96, 3))
)
layers = {
    "linear layer,\ntuned": nn.Linear(96, 96),
    "linear layer,\nfrozen": frozen_linear,
    "GELU": nn.GELU(),
    "layer norm,\nfrozen": frozen_norm,
    "attention,\nfrozen": frozen_attention,
}
one_layer = {}
for name, layer in layers.items():
    row = one_layer[name] = {}
    for needs in (False, True):
        x = torch.randn(8, 17, 96, requires_grad=needs)
        row[f"input {'needs' if needs else 'without'} gradient"] = (
            sum(kept(layer, x).values()) / x.untyped_storage().nbytes()
        )
alone, passed = one_layer["attention,\nfrozen"].values()
draw.bars(
    one_layer,
    "Figure 1. What one layer keeps, in units of its input. Frozen attention: "
    f"{alone:.1f} if its input needs no gradient, {passed:.1f} if it does.",
    ylabel="kept (size of the input = 1)",
    digits=1,
    width=7.5,
    height=2.8,
)

# %% [markdown]
# To freeze a layer saves little by itself: whatever is not linear keeps its input as long as a gradient has to pass *through* it. An
# adapter in block 1 sends its gradient through the frozen blocks 2, 3, and so on. Where no gradient passes, nothing is kept.
#
# ## 2. Four methods
#
# Side4Video puts everything that learns outside, and no gradient ever enters the ViT:
#
# ```
# frames --- block --- block --- block --- block       frozen ViT
#              | Z       | Z       | Z       | Z
#            Down      Down      Down      Down        D -> d
#              | z       | z       | z       | z
# pixels --- side ---- side ---- side ---- side ---- mean --- classifier
# ```
#
# **Guess.** Here are the four trained toy models. Rank them by what they keep, per clip. How much is the ViT's part in each?


# %%
def per_clip(model, video, **how):
    """What a further clip adds: kept for two clips less kept for one -> {part: bytes}"""
    one, two = (kept(model, video.expand(n, -1, -1, -1, -1).contiguous(), **how) for n in (1, 2))
    return {part: two[part] - one[part] for part in one}


names = {"aim": "AIM", "st_adapter": "ST-Adapter", "zeroi2v": "ZeroI2V", "side4video": "Side4Video"}
tiny = {}
for file, name in names.items():
    trained, _ = train.load_model(project / "colab" / "checkpoints" / f"{file}.pt")
    found = per_clip(trained.train(), torch.randn(1, T, 3, 64, 64), image=trained.vit)
    tiny[name] = {part: count / 2**20 for part, count in found.items()}
draw.bars(
    tiny,
    "Figure 2. Kept per clip by the toy models, float32, by the module in which it is kept. Side4Video's ViT: "
    f"{tiny['Side4Video']['frozen ViT']:.1f} MiB.",
    ylabel="MiB per clip",
    digits=2,
)

# %% [markdown]
# (ZeroI2V calls the ViT's matrices from its own class, which counts as new here.) Side4Video's ViT keeps nothing. Yet the total is no
# triumph: the side network keeps *its own* activations, and it is 64 wide where the tiny ViT is 96 wide.
#
# ViT-B/16 is 768 wide and its side network 320. We need no GPU for it: under `FakeTensorMode` PyTorch runs all operations with
# shapes alone.
#
# **Guess.** Rank the four again, for B/16.


# %%
def b16_mib(build, **how):
    """build: common.ViT -> a video model. MiB that ViT-B/16 keeps per clip of 8 x 224 x 224, bf16"""
    with FakeTensorMode():
        model = build(common.ViT(**common.B16))
        common.cast_frozen(model, torch.bfloat16)
        found = per_clip(model, torch.empty(1, T, 3, 224, 224), image=model.vit, bf16=True)
    return {part: count / 2**20 for part, count in found.items()}


big = {
    "AIM": b16_mib(lambda vit: aim.AIM(vit, 174)),
    "ST-Adapter": b16_mib(lambda vit: st_adapter.STAdapter(vit, 174)),
    "ZeroI2V": b16_mib(lambda vit: zeroi2v.ZeroI2V(vit, 174)),
    "Side4Video": b16_mib(lambda vit: side4video.Side4Video(vit, 174)),
    "Side4Video light": b16_mib(
        lambda vit: side4video.Side4Video(vit, 174, width=192, side_layers=6)
    ),
}
total = {name: sum(parts.values()) for name, parts in big.items()}
draw.bars(
    big,
    "Figure 3. Kept per clip by ViT-B/16, bf16, in the layouts for Kinetics-400. In all: "
    f"{', '.join(f'{name} {mib:.0f}' for name, mib in total.items())} MiB.",
    ylabel="MiB per clip",
)

# %% [markdown]
# Table 2 measures whole GPUs with 32 clips:

# %%
paper = {"AIM": 35.2, "ST-Adapter": 28.8, "Side4Video": 18.8, "Side4Video light": 8.9}
draw.bars(
    {
        name: {"here, activations": 32 * total[name] / 1024, "paper, all": gb}
        for name, gb in paper.items()
    },
    "Figure 4. Memory of 32 clips, ViT-B/16; the paper's from its table 2. Side4Video needs "
    f"{100 * total['Side4Video'] / total['AIM']:.0f} % of AIM's here, {100 * 18.8 / 35.2:.0f} % there.",
    ylabel="GiB (paper: G)",
    digits=1,
)
ssv2 = b16_mib(lambda vit: st_adapter.STAdapter(vit, 174, **st_adapter.SSV2["model"]))
print(
    f"ST-Adapter in its layout for Something-Something v2: {sum(ssv2.values()):.0f} MiB per clip;",
    end=" ",
)
print(
    f"Side4Video needs {100 * total['Side4Video'] / sum(ssv2.values()):.0f} % of that, "
    f"and {100 * total['Side4Video'] / total['ST-Adapter']:.0f} % of the one above; paper {100 * 18.8 / 28.8:.0f} %"
)

# %% [markdown]
# The paper's numbers hold weights, gradients, the optimizer and temporary memory as well. The authors' layers also keep more than this project's, which are
# written to keep little. Compare the *ratios*: AIM's is near; ST-Adapter's depends on its layout (printed above), and the paper does not
# say which it measured.
#
# ## 3. Down, and the sum
#
# Two equations bring the ViT's tokens into the side network:
#
# $$z^l_{out} = \text{Down}(\text{Norm}(Z^l_{out}))\qquad(1)$$
#
# $$s^l_{in} = s^{l-1}_{out} + z^l_{out}\qquad(2)$$
#
# Z are the tokens after a block of the ViT, D wide; z and s are d wide. Down is a linear layer. The released code takes the mean of s and z
# instead of their sum, and so does the file.

# %%
# SHOW side4video.Down

# %% [markdown]
# **Guess.** The class moves the norm's weights into the linear layer. What does it keep, and what would
# the plain `fc(ln(Z))` keep, for a clip of B/16?

# %%
down = Down(768, 320)
nn.init.normal_(down.ln.weight, 1.0, 0.2)
nn.init.normal_(down.ln.bias, 0.0, 0.2)
Z = torch.randn(1, T, 197, 768)  # bf16 below, as the frozen ViT gives it
plain_down = nn.Sequential(down.ln, down.fc)
gap = (down(Z) - plain_down(Z)).abs().max().item()
down_mib = {
    "fc(ln(Z))": kept(plain_down, Z.bfloat16(), bf16=True),
    "Down": kept(down, Z.bfloat16(), bf16=True),
}
down_mib = {name: sum(parts.values()) / 2**20 for name, parts in down_mib.items()}
draw.bars(
    down_mib,
    f"Figure 5. What eq. (1) keeps per clip and block, bf16. Largest difference of the outputs in float32: {gap:.0e}.",
    ylabel="MiB",
    digits=1,
    width=4.5,
)

# %% [markdown]
# Down is where the ViT's width still costs something: one tensor that is D wide for each block that is read.
#
# Which blocks are those? All; or every second, third, ... one, called *interval*; or the last ones, *top*. In table 9(a)
# interval has 64.7 % and top 64.0 % (E/14, a ViT of 64 blocks; Something-Something v1).
#
# **Exercise 1.** Which blocks are read?


# %%
# EXERCISE
def layers_read(layers, side_layers, fusion):
    """layers: blocks of the ViT; side_layers: side blocks; fusion: "interval" or "top"

    -> a list of `side_layers` numbers of blocks in rising order, where 0 is the first block. Interval:
    `side_layers` divides `layers`, and the last block is read. Top: the last blocks are read.
    """
    raise NotImplementedError


# %%
layers_read = check.layers_read(layers_read)


# %%
# SOLUTION
def layers_read(layers, side_layers, fusion):
    if fusion == "top":
        return list(range(layers - side_layers, layers))
    step = layers // side_layers
    return list(range(step - 1, layers, step))


# %% [markdown]
# ## 4. A side block
#
# A side block has three residual branches: a convolution over time (1 x 1 x 1, then depthwise 3 x 1 x 1 as in lab 3, then 1 x 1 x 1), attention within
# each frame, and an MLP. The side network has **no [CLS] token** (the paper's name for [class]) of its own. Its attention gets the ViT's as one more key and value,
# *shifted in time*: half of the channels from the next frame and half from the one before.
#
# **Exercise 2.** Write the shift. Outside of the clip stand zeros (released code).


# %%
# EXERCISE
def cls_shift(cls):
    """cls (B, T, 1, d) -> the same shape; cls itself stays as it is

    At frame t, the first half of the channels is that of frame t + 1, and the second half that of
    frame t - 1. Where there is no such frame, zeros.
    """
    raise NotImplementedError


# %%
cls_shift = check.cls_shift(cls_shift)


# %%
# SOLUTION
def cls_shift(cls):
    half, out = cls.shape[-1] // 2, torch.zeros_like(cls)
    out[:, :-1, :, :half] = cls[:, 1:, :, :half]
    out[:, 1:, :, half:] = cls[:, :-1, :, half:]
    return out


# %%
number = torch.arange(1.0, T + 1)[None, :, None, None].expand(1, T, 1, 2)  # a frame's number, d = 2
source = cls_shift(number)[0, :, 0].T  # (2, T)
draw.matrices(
    {"the frame that a channel comes from": source.numpy()},
    f"Figure 6. The shifted [CLS] tokens of {T} frames; empty is zero. {int((source == 0).sum())} entries are empty.",
    xlabel="frame t",
    rows=["first half", "second half"],
    columns=range(1, T + 1),
    digits=0,
    size=(5.6, 2.2),
)

# %% [markdown]
# The whole block: before the convolution and before the MLP stand **batch norms**:
# each channel is normalised with its mean and variance over all clips, frames and patches of the batch, and at test time with running
# averages of them.

# %%
# SHOW side4video.BatchNorm, side4video.TemporalConv, side4video.TemporalAttention, side4video.SideBlock

# %% [markdown]
# Only patches have queries: [CLS] is read and never written. Table 9(c) has 57.9 % without the shift and 58.5 % with it, both with 18.8 G.
#
# ## 5. The whole model
#
# At the left end stands a **stem**: a convolution over 3 frames and P x P pixels makes s₀ from the *pixels*. At the right end
#
# $$\text{class scores} = W\,\frac{1}{TN}\sum_{t,n} s_{t,n} + b$$
#
# (eq. 3). The authors' side network for E/14 has its norms in other places (`PostNormSideBlock` in the file); it and retrieval are left out here.

# %%
# SHOW side4video.Side4Video, side4video.initialize

# %%
with torch.device("meta"):  # shapes only
    video, costs = torch.empty(1, T, 3, 224, 224), {}
    how = {"Side4Video": {}, "Side4Video, light": dict(width=192, side_layers=6)}
    for name, options in how.items():
        b16 = Side4Video(common.ViT(), 174, **options)
        tuned = common.count_parameters(b16)[1] - sum(p.numel() for p in b16.head.parameters())
        costs[name] = tuned / 1e6, 3 * tables.gflops(b16, video)
    plain = 3 * tables.gflops(common.SpaceOnly(common.ViT(), 174), video)
for name, printed in (("Side4Video", "21 M, 528"), ("Side4Video, light", "4 M, 445")):
    print(
        f"{name:18} {costs[name][0]:5.1f} M tuned, {costs[name][1]:.0f} GFLOPs of three views; table 2: {printed}"
    )
print(f"plain ViT: {plain:.0f} GFLOPs")


def new_model(pretrained="shipped"):
    """Side4Video beside the tiny CLIP, as the toy recipe has it; None: beside a ViT of random weights"""
    torch.manual_seed(0)
    return Side4Video(common.load_clip("ViT-Toy-16", pretrained), 10, width=64).to(device)


# %% [markdown]
# ## 6. What exactly saves the memory?
#
# `outputs` carries a `@torch.no_grad()`. It seems to be what saves the memory.
#
# **Guess.** Take the decorator away: how much is kept? Then let a *single vector* at the ViT's input learn, its [class] embedding. How much now?


# %%
class Through(Side4Video):
    outputs = inspect.unwrap(Side4Video.outputs)  # the same method without its decorator


def one_vector_learns(vit):
    model = Through(vit, 174)
    model.vit.class_embedding.requires_grad_(True)
    return model


through = {
    "as it is": b16_mib(lambda vit: Side4Video(vit, 174)),
    "without no_grad": b16_mib(lambda vit: Through(vit, 174)),
    "[class] embedding learns": b16_mib(one_vector_learns),
}
draw.bars(
    through,
    "Figure 7. Kept per clip by the same B/16 model. One vector of 768 numbers that learns costs "
    f"{through['[class] embedding learns']['frozen ViT']:.0f} MiB in the ViT.",
    ylabel="MiB per clip",
    width=6.5,
)

# %% [markdown]
# The decorator changes nothing: the ViT is frozen and its input needs no gradient, therefore autograd keeps nothing anyway. What counts is the
# *place* of the first thing that learns. One vector at the input, and all twelve blocks keep their activations.
#
# ## 7. Train it
#
# The side network gets the ViT's tokens, and the pixels themselves through the stem. We train three versions for
# one pass over the training clips: as it is, with the stem's s₀ set to zero, and beside a ViT of *random* weights.
#
# **Guess.** Chance is 10 %, and without order 50 % is the limit (lab 1). Which version learns monotone motions, which jumping ones?


# %%
class Silent(nn.Module):
    """Zeros in place of what a module gives"""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return 0 * self.module(x)


def fit(model, videos, labels, steps, batch=12, lr=4e-3):
    """Trains on videos uint8 (M, T, 3, 64, 64), as the toy recipe does"""
    run = dict(weight_decay=0.05, embedding_lr=12.0)
    optimizer = torch.optim.AdamW(train.parameter_groups(model.train(), run), fused=True)
    order = torch.cat(
        [torch.randperm(len(labels)) for _ in range(1 + steps * batch // len(labels))]
    )
    for step in range(steps):
        chosen = order[step * batch :][:batch]
        for group in optimizer.param_groups:
            group["lr"] = lr * group["rate"] * train.warmup_cosine(step, steps, 0.1 * steps)
        logits = model(common.normalize(videos[chosen].to(device), model.vit))
        loss = F.cross_entropy(logits, labels[chosen].to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval().requires_grad_(False)


# %%
def predict(model, videos):
    """videos uint8 (M, T, 3, 64, 64) -> logits (M, 10)"""
    with torch.no_grad():
        parts = [model(common.normalize(part.to(device), model.vit)) for part in videos.split(50)]
    return torch.cat(parts).cpu()


def by_motion(logits):
    right = 100 * (logits.argmax(-1) == labels).float()
    return {"monotone": right[~jumping].mean().item(), "jumping": right[jumping].mean().item()}


STEPS = (
    6 if FAST else 250
)  # 1,500 in the recipe of `python train.py --method side4video --data toy`
train_videos, train_labels, _ = lab.load("train", range(1, 16, 2), 72 if FAST else None, fast=FAST)
videos, labels, _ = lab.load("val", range(1, 16, 2), 120 if FAST else None, fast=FAST)
jumping = torch.tensor(["rests" in lab.CLASSES[label] for label in labels])

# %%
versions = {"as it is": new_model(), "without s₀": new_model(), "random ViT": new_model(None)}
versions["without s₀"].stem_bn = Silent(versions["without s₀"].stem_bn)
short = {}
for name, version in versions.items():
    start = time.time()
    short[name] = by_motion(predict(fit(version, train_videos, train_labels, STEPS), videos))
    print(f"{name}: {time.time() - start:.0f} s")
draw.bars(
    short,
    f"Figure 8. Right after {STEPS} steps of 12 clips. Monotone motions: as it is {short['as it is']['monotone']:.0f} %, "
    f"beside a random ViT {short['random ViT']['monotone']:.0f} %.",
    ylabel="right, of ten classes (%)",
    lines={"ceiling without order": 50, "chance": 10},
    top=109,
    width=6.5,
)

# %% [markdown]
# Beside a random ViT one pass teaches nothing, although stem and side blocks see the same pixels: it is the *pretrained tokens* that make learning fast.
# Without s₀ it learns no slower. One short run does not say where a long one ends.
#
# ## 8. What does the trained model rest on?
#
# From here on we use the model that comes along, trained for six passes. We switch off one part at a time, *without* training
# again: s₀, each z, the [CLS] shift, and the outer two weights of the temporal convolutions.
#
# **Guess.** Which part hurts most? Is any part needed for one kind of motion only?

# %%
shipped, _ = train.load_model(project / "colab" / "checkpoints" / "side4video.pt")
model = new_model()
common.load_tuned(model, common.tuned_state(shipped), "that was shipped")
model.eval().requires_grad_(False)
outer = [0, 2]  # the weights of frame t - 1 and frame t + 1


def without(*parts):
    """Top-1 of a copy of the trained model without these parts: "s0", 0 to 3 for a z, "shift", "conv" """
    copy = new_model().eval().requires_grad_(False)
    copy.load_state_dict(model.state_dict())
    for part in parts:
        if part == "s0":
            copy.stem_bn = Silent(copy.stem_bn)
        elif part == "shift":
            for block in copy.blocks:
                block.cls_shift = False
        elif part == "conv":
            for block in copy.blocks:
                block.temporal.depth.weight[:, :, outer] = 0
        else:
            copy.downs[part] = Silent(copy.downs[part])
    return by_motion(predict(copy, videos))


# %%
rests = {
    "nothing": without(),
    "s₀": without("s0"),
    "z of\nblock 1": without(0),
    "z of\nblock 2": without(1),
    "z of\nblock 3": without(2),
    "z of\nblock 4": without(3),
    "every z": without(0, 1, 2, 3),
    "[CLS] shift": without("shift"),
    "conv's\nneighbours": without("conv"),
}
draw.bars(
    rests,
    "Figure 9. The trained model with one part switched off. Monotone motions: "
    f"{rests['nothing']['monotone']:.0f} % as trained, {rests['s₀']['monotone']:.0f} % without s₀, "
    f"{rests['every z']['monotone']:.0f} % without any z.",
    ylabel="right, of ten classes (%)",
    lines={"chance": 10},
    top=109,
    width=9,
)

# %% [markdown]
# The stem hardly matters: the trained network reads motion from the ViT's tokens. Order comes mostly through the temporal convolutions.
# Without their neighbours jumping stays near 50 %: the model still sees *that* something jumps, but not whether it jumps first or
# last. The [CLS] shift carries a part of the monotone motions.
#
# The paper retrains for each row of its table 9, where the shift is worth 0.6 points. Switching off shows what a model *uses*, and
# retraining shows what it *needs*.
#
# ## 9. An exact map
#
# The paper's figure 6 shows "attention maps" of CLIP and of Side4Video on a basketball player; the side network looks more precisely at what
# moves. Here a map exists that needs no interpretation, because the last steps are linear. With s after its last norm (`post_bn`),
#
# $$\text{logit}_c = w_c\cdot\frac{1}{TN}\sum_{t,n}s_{t,n} + b_c = \frac{1}{TN}\sum_{t,n}\left(w_c\cdot s_{t,n} + b_c\right)$$
#
# **Exercise 3.** Write the numbers on the right-hand side as a map.


# %%
# EXERCISE
def class_map(s, weight, bias, c, h):
    """s (B, T, N, d), weight (classes, d), bias (classes,), c: a class, h: rows of patches -> (B, T, h, w)

    The mean of the map of a clip is the logit of class c. Patches stand row by row.
    """
    raise NotImplementedError


# %%
class_map = check.class_map(class_map)


# %%
# SOLUTION
def class_map(s, weight, bias, c, h):
    return (s @ weight[c] + bias[c]).unflatten(-1, (h, -1))


# %%
@torch.no_grad()
def look(name, count=1):
    """Clips of a class -> frames, masks, s (B, T, N, d), and attention: of the ViT's [class] in its last block
    to patches (B, T, 4, 4); in each side block to [CLS], mean over patches, in percent"""
    pair = lab.PAIRED.index(name) // 2  # a scene's number modulo 5 is its pair
    frames, masks = zip(*(lab.scene(name, 5 * i + pair) for i in range(count)))
    frames, masks = (lab.np.stack(x)[:, 1::2] for x in (frames, masks))  # 8 of 16 frames
    video = torch.from_numpy(frames).permute(0, 1, 4, 2, 3).to(device)
    normed, on_cls = [], []
    hooks = [b.ln_1.register_forward_hook(lambda m, x, y: normed.append(y)) for b in model.blocks]
    with lab.attention_weights(model.vit) as of_vit:
        s, _ = model.side(
            common.normalize(video, model.vit), F.pad(model.position_embedding, (0, 0, 1, 0))
        )
    for hook, block, x in zip(hooks, model.blocks, normed):
        hook.remove()
        q, k, _ = F.linear(x, block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, -1)
        weights = (q[:, :, 1:] @ k.transpose(-1, -2) / 8).softmax(-1)  # one head of width 64
        on_cls.append(100 * weights[..., 0].mean().item())
    by_class = of_vit["transformer.resblocks.3.attn"][0].mean(1)[
        :, 0, 1:
    ]  # (BT, N), mean over heads
    return frames, masks, s.cpu(), by_class.view(count, T, 4, 4), on_cls


# %%
W, b = model.head.weight.cpu(), model.head.bias.cpu()
NAME = "moves right"  # any of lab.CLASSES
c = lab.CLASSES.index(NAME)
frames, masks, s, by_class, _ = look(NAME)
exact = class_map(s, W, b, c, 4)[0]  # (T, 4, 4)
logit = predict(model, torch.from_numpy(frames).permute(0, 1, 4, 2, 3))[0, c].item()
draw.strips(
    dict.fromkeys(("clip", "CLIP's [class]", "exact map"), frames[0]),
    f"Figure 10. {NAME!r}: the attention of CLIP's [class] in the last block, and the exact map "
    f"(its positive part; light is much). Mean of the whole map: {exact.mean():.4f}; logit: {logit:.4f}.",
    maps={"CLIP's [class]": by_class[0].numpy(), "exact map": exact.clamp(min=0).numpy()},
    masks={"CLIP's [class]": masks[0], "exact map": masks[0]},
    numbers=range(1, T + 1),
)

# %% [markdown]
# **Guess.** Over many clips, which share of each lies on the shape's patches? We take the map of a class *less* that of its mirror.

# %%
count = 6 if FAST else 40
evidence, shares, on_cls = {}, {}, []
for name in lab.CLASSES:
    _, masks, s, by_class, attention = look(name, count)
    on = torch.stack([torch.from_numpy(lab.on_patches(mask)) for mask in masks])  # (B, T, 4, 4)
    difference = class_map(s, W, b, lab.CLASSES.index(name), 4)
    difference = difference - class_map(s, W, b, lab.CLASSES.index(lab.MIRROR[name]), 4)
    evidence[name] = difference.mean((0, 2, 3))  # (T,)
    on_cls.append(attention)
    for key, x in {
        "CLIP": by_class,
        "map": difference.clamp(min=0),
        "area": torch.ones(on.shape),
    }.items():
        shares[key] = shares.get(key, 0) + 10 * ((x * on).sum() / x.sum()).item()  # ten classes
names = {
    "CLIP": "CLIP's [class]",
    "map": "exact map,\npositive part",
    "area": "area of\nthe patches",
}
draw.bars(
    {names[key]: share for key, share in shares.items()},
    f"Figure 11. The share on the shape's patches, {count} clips of each class. The map: {shares['map']:.0f} %.",
    ylabel="on the shape (%)",
    width=5,
)

# %%
on_cls = torch.tensor(on_cls).reshape(-1, 4).mean(0).tolist()
draw.bars(
    {f"side block {i + 1}": share for i, share in enumerate(on_cls)},
    f"Figure 12. The attention of patches to the shifted [CLS], of 100 % in all: in the last block {on_cls[-1]:.0f} %.",
    ylabel="on [CLS] (%)",
    width=5,
    height=2.4,
)

# %% [markdown]
# The paper's figure promises more. CLIP looks at the shapes already, since it was trained to name them. The exact map does
# not: it says where the side network *writes* its evidence. Figure 12 shows one reason. In the last block all patches of a frame attend to [CLS], and add
# the same vector. Only the mean over patches is asked for, so that it does not matter on which patch evidence stands.
#
# *When* is it found? The shift and the convolutions reach a few frames only, therefore time is kept better than place.
#
# **Guess.** In "jumps then rests" the shape jumps in frames 1 to 4 and rests in frames 5 to 8. In which half stands the evidence against
# "rests then jumps"?

# %%
half = {
    name: evidence[name].view(2, 4).mean(1).tolist()
    for name in ("jumps then rests", "rests then jumps")
}
curves = {"the class named above": lambda name: name, "its mirror": lambda name: lab.MIRROR[name]}
draw.lines(
    {
        name: {label: (range(1, T + 1), evidence[which(name)]) for label, which in curves.items()}
        for name in ("jumps then rests", "grows")
    },
    "Figure 13. The map of a class less that of its mirror, mean over patches and clips; the mean of a "
    "curve is a difference of two logits. 'jumps then rests' has {:.0f} in frames 1 to 4 and {:.0f} in "
    "frames 5 to 8; 'rests then jumps' has {:.0f} and {:.0f}.".format(
        *half["jumps then rests"], *half["rests then jumps"]
    ),
    xlabel="frame t",
    ylabel="evidence",
    width=9,
)

# %% [markdown]
# In both orders most of the evidence stands where the shape *rests*.
#
# ## 10. Predict the memory
#
# What the side network keeps are tensors that are d wide, and a few that do not depend on d: one of the ViT's width in each Down,
# and the pixels for the stem. Weights do not count as activations.
#
# **Exercise 4.** Given what two widths keep, predict a third.


# %%
# EXERCISE
def predict_mib(width, known):
    """known: {width: MiB per clip} of two widths -> MiB per clip of a side network of this `width`"""
    raise NotImplementedError


# %%
predict_mib = check.predict_mib(predict_mib)


# %%
# SOLUTION
def predict_mib(width, known):
    (d1, m1), (d2, m2) = known.items()
    slope = (m2 - m1) / (d2 - d1)
    return m1 + slope * (width - d1)


# %%
def side_mib(**options):
    return sum(b16_mib(lambda vit: Side4Video(vit, 174, **options)).values())


widths = {d: side_mib(width=d) for d in (128, 192, 320, 512)}
depths = {n: side_mib(side_layers=n) for n in (4, 6)} | {12: widths[320]}
known = {d: widths[d] for d in (192, 320)}
predicted, measured = predict_mib(64, known), side_mib(width=64)
print(f"width 64: predicted {predicted:.1f} MiB, measured {measured:.1f}")
print(f"width 0, by the same line: {predict_mib(0, known):.1f} MiB")

# %% [markdown]
# **Guess.** Is memory better used for more side blocks or for wider ones? Table 9(e, f) has 12 blocks of width 128 at 56.7 % with
# 11.3 G, and 6 of width 320 at 56.9 % with 11.0 G.

# %%
gib = lambda table: (list(table), [32 * mib / 1024 for mib in table.values()])  # noqa: E731
draw.lines(
    {
        "12 side blocks, by width": {
            "here, activations": gib({64: measured} | widths),
            "paper, all": ([128, 320, 512], [11.3, 18.8, 26.5]),
        },
        "width 320, by side blocks": {
            "here, activations": gib(depths),
            "paper, all": ([4, 6, 12], [8.4, 11.0, 18.8]),
        },
    },
    "Figure 14. Memory of 32 clips, ViT-B/16; the paper's from table 9(e, f). Here each 64 channels more cost "
    f"{64 * 32 * (widths[320] - widths[192]) / 128 / 1024:.1f} GiB, in the paper {64 * (18.8 - 11.3) / 192:.1f} G.",
    xlabel="width d, or number of side blocks",
    ylabel="GiB (paper: G)",
    width=9,
)

# %% [markdown]
# Both are straight lines, with other slopes: the paper's layers keep more per channel. Width 512 costs more than 320 and is *worse* there (57.8 and
# 58.5 %); the paper prefers fewer, wider blocks.
#
# ## 11. What to take along
#
# - Backward keeps the inputs of whatever a gradient passes through. Frozen is not the same as free: the *place* of what learns decides.
# - A side network keeps tensors of its own width d, and one of width D for each block that it reads.
# - A linear end gives an exact map. Exact does not mean that it shows where the model looked.
#
# **An open question.** The trained model hardly uses its stem (figure 9). Would you remove it? Which videos could you write with
# `colab/toy.py` whose motion a frozen ViT's tokens do not show, and three frames of pixels do?

# %%
check.progress()

# %%
# TEST
row = one_layer["attention,\nfrozen"]
assert row["input without gradient"] == 0 and row["input needs gradient"] > 3, row
assert all(v["input without gradient"] == 0 for name, v in one_layer.items() if "tuned" not in name)
assert one_layer["linear layer,\nfrozen"]["input needs gradient"] == 0
assert tiny["Side4Video"]["frozen ViT"] == big["Side4Video"]["frozen ViT"] == 0, (tiny, big)
assert all(tiny[name]["frozen ViT"] > 0.5 for name in ("AIM", "ST-Adapter", "ZeroI2V")), tiny
assert (
    total["Side4Video light"]
    < total["Side4Video"]
    < total["ST-Adapter"]
    < total["ZeroI2V"]
    < total["AIM"]
)
assert abs(total["Side4Video"] / sum(ssv2.values()) - 18.8 / 28.8) < 0.04, ssv2
with FakeTensorMode():
    b16 = Side4Video(common.ViT(**common.B16), 174)
    common.cast_frozen(b16, torch.bfloat16)
    counted = tables.activation_bytes(b16, torch.empty(1, T, 3, 224, 224)) / 2**20
assert abs(counted - total["Side4Video"]) < 0.01, counted
assert gap < 1e-4 and down_mib["Down"] < down_mib["fc(ln(Z))"], down_mib
assert source.tolist() == [[2, 3, 4, 5, 6, 7, 8, 0], [0, 1, 2, 3, 4, 5, 6, 7]]
assert abs(costs["Side4Video"][0] - 21) < 0.5 and abs(costs["Side4Video"][1] - 528) < 1, costs
assert (
    abs(costs["Side4Video, light"][0] - 4) < 0.5 and abs(costs["Side4Video, light"][1] - 445) < 1
), costs
assert through["without no_grad"] == through["as it is"]
assert through["[class] embedding learns"]["frozen ViT"] > 200, through
assert list(new_model().read) == layers_read(4, 4, "interval")
assert FAST or short["without s₀"]["jumping"] > short["random ViT"]["jumping"] + 20, short
assert FAST or short["as it is"]["monotone"] > short["random ViT"]["monotone"] + 10, short
assert rests["nothing"]["monotone"] > 85 and rests["nothing"]["jumping"] > 85, rests
assert rests["s₀"]["monotone"] > 80 and rests["every z"]["monotone"] < 30, rests
assert (
    rests["conv's\nneighbours"]["monotone"] < 30 and rests["conv's\nneighbours"]["jumping"] < 60
), rests
assert rests["[CLS] shift"]["monotone"] < rests["nothing"]["monotone"] - 5, rests
assert abs(exact.mean().item() - logit) < 1e-3, (exact.mean(), logit)
assert shares["CLIP"] > 2 * shares["area"], shares
assert shares["map"] < 1.5 * shares["area"], shares
assert abs(predicted - measured) < 1, (predicted, measured)
assert on_cls[-1] > 90 > 50 > max(on_cls[:-1]), on_cls
assert half["jumps then rests"][1] > half["jumps then rests"][0], half
assert half["rests then jumps"][0] > half["rests then jumps"][1], half
