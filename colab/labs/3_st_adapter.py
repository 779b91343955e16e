"""Lab 3, as a source for colab/build.py, which explains its directives."""

# ruff: noqa: F821

# %% [markdown]
# # Lab 3. ST-Adapter: a convolution between two projections
#
# **What you will learn.** How one cheap operator, a depthwise convolution over time, lets the frames of a frozen image transformer
# see each other; what it costs; and how far a frame's influence spreads from block to block. The paper is *ST-Adapter* (Pan et al.,
# NeurIPS 2022, [arXiv 2206.13559](https://arxiv.org/abs/2206.13559)); its equation and its figures are quoted here from the authors'
# **poster**. What is shown together is the file `st_adapter.py`.
#
# **How long.** 35 minutes of reading and 3 minutes of computing on two CPU cores. A GPU is used if there is one.
#
# **What you need.** Lab 1: tokens, the toy videos and the tiny CLIP. Lab 2 helps, but you can do without it.
#
# **How to work.** Run the cells in order; if a name is unknown, run all cells above. Write down each **guess** before you run the experiment. There are four **exercises**;
# until your code is right, the notebook goes on with the project's own. If you edit a class that is shown here, run the cells
# below it again.

# %%
import time

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import common
import train
from colab import draw, lab, tables
from colab.checks import lab3 as check

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
T = 8  # frames of a clip
KERNELS = [(1, 1, 1), (1, 3, 3), (3, 1, 1), (3, 3, 3)]  # time, height, width

# %% [markdown]
# ## 1. The idea
#
# An **adapter** (Houlsby et al., 2019) is a small detour beside a frozen layer: project the D numbers of a token down to C, do something, project them up
# again, and add the result. An ST-Adapter does its something in *space and time*:
#
# $$\text{ST-Adapter}(X) = X + f\big(\text{DWConv3D}(X W_{down})\big)\,W_{up}\qquad(1)$$
#
# X are the patch tokens of a whole clip, laid out as a volume of T frames with H rows and W columns. DWConv3D is a **depthwise**
# convolution: each of the C channels has a kernel of its own, and channels are not mixed. (Mixing is what the two matrices do.) f is an
# activation function. The authors' released code uses a kernel of 3 frames and 1 x 1 patches, and the identity for f.
#
# ## 2. A convolution over time is three shifts
#
# Take one patch position and one channel: T numbers, x(1) to x(T). A kernel of three weights turns them into
#
# $$y(t) = b + w_{-1}\,x(t-1) + w_0\,x(t) + w_{+1}\,x(t+1)$$
#
# with 0 for what lies outside of the clip. That is three copies of the clip, shifted by one frame, each multiplied with a number. No library is
# needed, and on a CPU this way is faster than PyTorch's own Conv3d, as you will measure.
#
# **Exercise 1.** Write it for all patches and channels at once.


# %%
# EXERCISE
def temporal_conv(x, weight, bias):
    """x (B, T, N, C), weight (C, 3), bias (C,) -> the same shape as x

    weight[:, 0] belongs to frame t - 1, weight[:, 1] to frame t, weight[:, 2] to frame t + 1. Frames
    outside of the clip are zero. Channels do not mix, nor do patches.
    """
    raise NotImplementedError


# %%
temporal_conv = check.temporal_conv(temporal_conv)


# %%
# SOLUTION
def temporal_conv(x, weight, bias):
    T = x.shape[1]
    x = F.pad(x, (0, 0, 0, 0, 1, 1))  # one frame of zeros before the clip, and one after it
    return bias + sum(weight[:, i] * x[:, i : i + T] for i in range(3))


# %% [markdown]
# For a single patch and channel this is a T x T matrix. Here it is, for three kernels:

# %%
examples = {
    "each frame alone\n(0, 1, 0)": [0.0, 1, 0],
    "a mean of neighbours\n(1/3, 1/3, 1/3)": [1 / 3] * 3,
    "a change\n(-1/2, 0, 1/2)": [-0.5, 0, 0.5],
}
time_matrices = {}
for name, kernel in examples.items():
    one_frame = torch.eye(T)[:, :, None, None]  # clip i is 1 at frame i and 0 elsewhere
    output = temporal_conv(one_frame, torch.tensor([kernel]), torch.zeros(1))  # (T, T, 1, 1)
    time_matrices[name] = output[..., 0, 0].T.numpy()
draw.matrices(
    {name: abs(matrix) for name, matrix in time_matrices.items()},
    "Figure 1. What three kernels do along time: the size of the weight with which an output frame "
    "(row) takes an input frame (column). No kernel of 3 reaches further than 1 frame.",
    xlabel="input frame",
    ylabel="output frame",
    rows=range(1, T + 1),
    columns=range(1, T + 1),
)

# %% [markdown]
# The last kernel compares the next frame with the one before: it answers to motion. Nobody tells the adapter to learn such a kernel; the loss does, if motion matters.
#
# The file has the same for kernels of any size:

# %%
# SHOW st_adapter.DWConv3D

# %% [markdown]
# **Guess.** Which patches does a patch see through each of the four kernels (1, 1, 1), (1, 3, 3), (3, 1, 1), (3, 3, 3)? How many?

# %%
seen = {}
for kernel in KERNELS:
    conv = DWConv3D(1, kernel)
    nn.init.ones_(conv.weight)
    volume = torch.zeros(1, 3, 5, 5, 1)
    volume[0, 1, 2, 2] = 1  # one patch in the middle of 3 frames of 5 x 5
    with torch.no_grad():
        seen[f"{kernel}"] = conv(volume)[0, ..., 0]  # (3, 5, 5)
draw.sheets(
    {name: (0.1 + 0.8 * (patches > 0)).numpy() for name, patches in seen.items()},
    "Figure 2. The patches that the middle patch of frame 2 reaches through one convolution, dark: "
    f"{', '.join(str(int((patches > 0).sum())) for patches in seen.values())}.",
)

# %% [markdown]
# ## 3. From tokens to a volume and back
#
# A transformer keeps a frame as a list of 1 + N tokens. The convolution over space needs rows and columns, and [class] has no place in
# them. It passes by unchanged.
#
# **Exercise 2.** Lay the patch tokens out as a volume, apply a function to it, and return to the list.


# %%
# EXERCISE
def through_volume(z, H, operation):
    """z (B, T, 1 + H W, D), [class] first, patches row by row -> the same shape

    operation: takes a volume (B, T, H, W, D) and gives one of the same shape. [class] stays.
    """
    raise NotImplementedError


# %%
through_volume = check.through_volume(through_volume)


# %%
# SOLUTION
def through_volume(z, H, operation):
    cls, patches = z[:, :, :1], z[:, :, 1:]
    volume = operation(rearrange(patches, "b t (h w) d -> b t h w d", h=H))
    return torch.cat([cls, rearrange(volume, "b t h w d -> b t (h w) d")], dim=2)


# %% [markdown]
# With both pieces, eq. (1) is five lines. Compare your two functions with the class of the file:

# %%
# SHOW st_adapter.SpatioTemporalAdapter

# %% [markdown]
# And this is the model. The adapter stands before the MLP of every block (the layout for Kinetics), and before the attention as well (the
# layout for Something-Something, where motion matters more).

# %%
# SHOW st_adapter.STAdapter

# %% [markdown]
# ## 4. A start that changes nothing
#
# The released code sets the convolution and the biases of both projections to zero. Then the detour gives 0, and the model *is* the
# image model on each frame. W_down and W_up keep random values: were they zero too, each of the three would multiply the
# gradient of the other two by zero, and none would ever be learned.
#
# **Guess.** Make one of these random: the convolution's weight, the bias of W_down, or the bias of W_up. With which of them does the
# model still start as the image model?

# %%
videos, labels, _ = lab.load("val", range(1, 16, 2), 120 if FAST else None, fast=FAST)
jumping = torch.tensor(["rests" in lab.CLASSES[label] for label in labels])
sample = videos[:20].to(device)


def new_model(kernel=(3, 1, 1), pretrained="shipped"):
    """ST-Adapter on the tiny CLIP, as the toy recipe has it"""
    torch.manual_seed(0)
    clip = common.load_clip("ViT-Toy-16", pretrained)
    how = dict(bottleneck=48, before_attention=True, dropout=0.0, kernel=kernel)
    return STAdapter(clip, 10, **how).to(device)


# %%
def distance_at_start(*parts):
    """How far the features are from the image model's, in percent, if these parts are random"""
    model = new_model().eval()
    with torch.no_grad():
        for name, p in model.adapters.named_parameters():
            if any(name.endswith(part) for part in parts):
                nn.init.normal_(p, std=0.1)
        features = model.features(common.normalize(sample, model.vit))
        z = model.vit.ln_pre(model.vit.embed(common.normalize(sample, model.vit).flatten(0, 1)))
        for block in model.vit.blocks:
            z = block(z)
        expected = model.vit.ln_post(z[:, 0].unflatten(0, (-1, T)).mean(1))
    return 100 * ((features - expected).norm() / expected.norm()).item()


# %%
starts = {
    "as released": distance_at_start(),
    "conv.weight\nrandom": distance_at_start("conv.weight"),
    "bias of W_down\nrandom": distance_at_start("down.bias"),
    "bias of W_up\nrandom": distance_at_start("up.bias"),
}
draw.bars(
    starts,
    "Figure 3. The distance to the image model before training, if one part is random. As released: "
    f"{starts['as released']:.1f} %.",
    ylabel="distance to the image model (%)",
    digits=1,
)

# %% [markdown]
# A random bias of W_down does no harm as long as the kernel is zero; it is zero all the same, since the kernel will not stay so. The other two move the
# model away from CLIP before it has seen a single clip.
#
# ## 5. What it costs
#
# **Exercise 3.** Count the multiply-adds of a depthwise convolution over a whole clip. Count those at the borders as well, as all
# counters do.


# %%
# EXERCISE
def depthwise_flops(T, H, W, C, kernel):
    """kernel: (time, height, width) -> the number of multiply-adds, a whole number"""
    raise NotImplementedError


# %%
depthwise_flops = check.depthwise_flops(depthwise_flops)


# %%
# SOLUTION
def depthwise_flops(T, H, W, C, kernel):
    kt, kh, kw = kernel
    return T * H * W * C * kt * kh * kw


# %% [markdown]
# **Guess.** In the adapters of ViT-B/16 (D = 768, C = 384, 8 frames of 14 x 14 patches), which share of the work is the convolution's, and
# which the projections'? For 3 frames, and for 3 x 3 x 3?

# %%
layers, patches = 12, 14 * 14
projections = layers * T * patches * 2 * 768 * 384 / 1e9  # W_down and W_up
cost = {}
for kernel in KERNELS:
    conv = layers * depthwise_flops(T, 14, 14, 384, kernel) / 1e9
    cost[f"{kernel}"] = {"projections": projections, "convolution": conv}
with torch.device("meta"):
    plain = tables.gflops(common.SpaceOnly(common.ViT(), 400), torch.empty(1, T, 3, 224, 224))
    b16 = STAdapter(common.ViT(), 400)
    whole = tables.gflops(b16, torch.empty(1, T, 3, 224, 224))
    tuned = common.count_parameters(b16)[1] / 1e6
draw.bars(
    cost,
    "Figure 4. GFLOPs of the 12 adapters of ViT-B/16 per view. The plain ViT has "
    f"{plain:.0f} GFLOPs, so that the released kernel adds {100 * cost['(3, 1, 1)']['convolution'] / plain:.2f} %.",
    ylabel="GFLOPs (a multiply-add is one)",
    digits=2,
)
print(
    f"three views: {3 * whole:.0f} GFLOPs with adapters, {3 * plain:.0f} without; poster: 455 and 419"
)
print(
    f"tuned: {tuned - 400 * 769 / 1e6:.1f} M parameters in the adapters, {tuned:.1f} M with a classifier of "
    "400 classes; poster: 7.2"
)

# %% [markdown]
# Seeing other frames is nearly free: the two projections are the price of any adapter, and the poster's plain adapter pays it as well.
# (The poster does not say how it counted, and does not agree to the digit.) FLOPs are not milliseconds, though. A depthwise
# convolution does little arithmetic with much memory, and libraries differ.
#
# **Guess.** How much time does the file's way of shifts take, and how much nn.Conv3d, for the same numbers?

# %%
conv = nn.Conv3d(48, 48, (3, 1, 1), padding=(1, 0, 0), groups=48)
ours = DWConv3D(48, (3, 1, 1))
ours.load_state_dict(conv.state_dict())
x = torch.randn(4, T, 14, 14, 48)


# %%
def conv3d(x):
    return rearrange(conv(rearrange(x, "b t h w c -> b c t h w")), "b c t h w -> b t h w c")


def milliseconds(function, repeats=3 if FAST else 15):
    """The median time of forward and backward"""
    times = []
    for _ in range(repeats):
        inputs = x.clone().requires_grad_()
        start = time.perf_counter()
        function(inputs).sum().backward()
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times)[repeats // 2]


same = (conv3d(x) - ours(x)).abs().max().item()
speed = {"shifts (the file's)": milliseconds(ours), "nn.Conv3d": milliseconds(conv3d)}
draw.bars(
    speed,
    "Figure 5. Forward and backward of one convolution, 4 clips, on this machine's CPU. Largest difference of "
    f"the outputs: {same:.0e}.",
    ylabel="milliseconds",
    digits=1,
    width=4.5,
)

# %% [markdown]
# ## 6. Train the four kernels
#
# Each kernel gets the same short training: all adapters and the classifier, from the same tiny CLIP.
#
# **Guess.** Chance is 10 %, and without order 50 % is the limit (lab 1). What does each kernel reach? Does the convolution over
# space help?


# %%
def fit(model, videos, labels, steps, batch=12, lr=8e-3):
    """Trains on videos uint8 (M, T, 3, 64, 64), as the toy recipe does"""
    run = dict(weight_decay=0.01, embedding_lr=1.0)
    optimizer = torch.optim.AdamW(train.parameter_groups(model.train(), run), fused=True)
    for step in range(steps):
        chosen = torch.randint(len(labels), (batch,))
        for group in optimizer.param_groups:
            group["lr"] = lr * train.warmup_cosine(step, steps, 0.08 * steps)
        logits = model(common.normalize(videos[chosen].to(device), model.vit))
        loss = F.cross_entropy(logits, labels[chosen].to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
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


# %%
STEPS = (
    8 if FAST else 300
)  # 1,000 in the recipe of `python train.py --method st_adapter --data toy`
clips = lab.load("train", range(1, 16, 2), 96 if FAST else None, fast=FAST)
train_videos, train_labels, _ = clips
kernels, models, turned = {}, {}, {}
for kernel in KERNELS:
    start = time.time()
    model = models[kernel] = fit(new_model(kernel), train_videos, train_labels, STEPS)
    logits = predict(model, videos)
    kernels[f"{kernel}"] = by_motion(logits)
    turned[kernel] = (predict(model, videos.flip(1)) - logits).abs().max().item()
    print(
        kernel,
        f"{time.time() - start:.0f} s, reversing a clip changes a logit by up to {turned[kernel]:.0e}",
    )
draw.bars(
    kernels,
    f"Figure 6. Four kernels (time, height, width) after {STEPS} steps. From (1, 1, 1) to (3, 1, 1): "
    f"{kernels['(1, 1, 1)']['monotone']:.0f} to {kernels['(3, 1, 1)']['monotone']:.0f} % of the monotone clips.",
    ylabel="right, of ten classes (%)",
    lines={"ceiling without order": 50},
    top=109,
)

# %% [markdown]
# Without a kernel over time no logit depends on the order of the frames, whatever is learned: the printed differences are rounding. The
# convolution over space alone cannot help there. (Less than 10 % of jumping clips: such a model rarely predicts a jumping
# class, and then it is the wrong one half of the time.)
# Whether space helps *beside* time is not settled by one short run: compare the last two kernels for both kinds of motion.
#
# The poster's benchmark asks the same on real videos, Kinetics-400 (K400) and Something-Something v2 (SSv2): the plain adapter beside
# the ST-Adapter, with about as many tuned parameters (6.8 and 7.2 million).

# %%
paper = {
    "linear probe": {"K400": 76.6, "SSv2": 21.9},
    "adapter\n(no time)": {"K400": 81.6, "SSv2": 46.2},
    "ST-Adapter": {"K400": 82.0, "SSv2": 66.3},
    "all tuned,\nno time": {"K400": 81.0, "SSv2": 44.0},
    "all tuned, with\ntemporal attention": {"K400": 81.7, "SSv2": 66.1},
}
draw.bars(
    paper,
    "Figure 7. The poster's benchmark (ViT-B/16 of CLIP, top-1): on Something-Something v2 time adds "
    f"{66.3 - 46.2:.1f} points to the adapter, on Kinetics-400 {82.0 - 81.6:.1f}.",
    ylabel="top-1 (%)",
    digits=1,
    top=99,
    width=8.5,
)

# %% [markdown]
# Our videos and SSv2 agree: an adapter needs to see other frames. They differ in size: the toy classes differ in *nothing but* motion, so that time is
# worth far more. On Kinetics-400, where objects and scenes betray the action, it is worth almost nothing. And with 7 million tuned
# parameters the ST-Adapter reaches what tuning everything, temporal attention included, needs 122 million for.
#
# ## 7. How far does a frame reach?
#
# One convolution of three frames reaches one frame to each side. The next one starts from tokens that already hold their neighbours.
# Each of our four blocks has two adapters.
#
# **Exercise 4.** After a number of such convolutions, how many frames can a token depend on, its own included? Take a token in the
# middle of a clip that is long enough.


# %%
# EXERCISE
def frames_seen(convolutions, kernel):
    """convolutions: how many follow each other; kernel: frames of each, an odd number -> frames"""
    raise NotImplementedError


# %%
frames_seen = check.frames_seen(frames_seen)


# %%
# SOLUTION
def frames_seen(convolutions, kernel):
    return 1 + convolutions * (kernel - 1)


# %% [markdown]
# Now measure it: paint one frame s of a clip grey, and see how much the tokens of each frame t change after each block, in percent of what they
# were. (More than 100 % is possible: the change can be larger than the tokens.) The model is the one that comes with the
# project, which was trained for 1,000 steps.
#
# **Guess.** Draw the T x T pattern after block 1 and after block 4. Does every frame see every other?

# %%
shipped, _ = train.load_model(project / "colab" / "checkpoints" / "st_adapter.pt")
model = new_model().eval().requires_grad_(False)
common.load_tuned(model, common.tuned_state(shipped), "that was shipped")


def tokens_after_blocks(video):
    """video uint8 (B, T, 3, 64, 64) -> the tokens (B, T, N+1, D) after each block"""
    kept, vit = [], model.vit
    z = vit.ln_pre(vit.embed(common.normalize(video.to(device), vit).flatten(0, 1)))
    z = z.unflatten(0, (-1, T))
    for adapters, block in zip(model.adapters, vit.blocks):
        z = adapters["attn"](z, 4)
        z = z + block.msa(z)
        z = adapters["mlp"](z, 4)
        z = z + block.ffn(z)
        kept.append(z)
    return kept


# %%
count = 8 if FAST else 40
influence = torch.zeros(len(model.vit.blocks), T, T)  # block x frame t x grey frame s
with torch.no_grad():
    before = tokens_after_blocks(videos[:count])
    for s in range(T):
        blanked = videos[:count].clone()
        blanked[:, s] = 128
        for b, (a, z) in enumerate(zip(tokens_after_blocks(blanked), before)):
            influence[b, :, s] = (a - z).norm(dim=(2, 3)).mean(0) / z.norm(dim=(2, 3)).mean(0)
draw.matrices(
    {f"block {b + 1}": 100 * influence[b].cpu().numpy() for b in range(4)},
    "Figure 8. How much the tokens of frame t change if frame s is grey, in percent (empty: less than half a "
    "percent). Each block widens the band by two frames to each side: "
    f"{int((influence[0] > 1e-6).sum())} pairs of 64 change after block 1, {int((influence[3] > 1e-6).sum())} after block 4.",
    xlabel="grey frame s",
    ylabel="frame t",
    rows=range(1, T + 1),
    columns=range(1, T + 1),
    digits=0,
    size=(13, 4.2),
)
print(
    "after two convolutions a token can see",
    frames_seen(2, 3),
    "frames; after eight",
    frames_seen(8, 3),
)

# %% [markdown]
# The band has sharp edges, because a convolution has; attention over time would fill the square at once, and pay for it (lab 2). It is
# strong near the diagonal: far frames are reached as well, but less of them arrives.
#
# ## 8. What have the kernels learned?
#
# In a still clip all frames are equal, and a kernel only multiplies them by the sum of its weights. The difference of its two outer weights
# acts only where frames differ. Compare the sizes of these two numbers.
#
# **Guess.** Do the trained kernels sum their three frames, or do they compare them? Which share would kernels of random weights have?

# %%
parts = {}
for b, adapters in enumerate(model.adapters):
    for place, name in (("attn", "before attention"), ("mlp", "before the MLP")):
        w = adapters[place].conv.weight[:, 0, :, 0, 0].cpu()  # (C, 3)
        still, moving = w.sum(1).abs(), (w[:, 2] - w[:, 0]).abs()
        share = 100 * (moving / (still + moving)).mean().item()
        parts.setdefault(f"block {b + 1}", {})[name] = share
w = torch.randn(100_000, 3)  # kernels that learned nothing
chance = (
    100 * ((w[:, 2] - w[:, 0]).abs() / (w.sum(1).abs() + (w[:, 2] - w[:, 0]).abs())).mean().item()
)
idle = model.adapters[3]["mlp"].conv.weight.abs().max().item()
draw.bars(
    parts,
    "Figure 9. The share of |w+1 - w-1| in |w+1 - w-1| + |w-1 + w0 + w+1|, mean over the trained kernels. 0: only "
    f"sums; 100: only differences. Largest weight of the last adapter: {idle:.3f}.",
    ylabel="share of comparison (%)",
    lines={f"random weights: {chance:.0f} %": chance},
    top=109,
)

# %% [markdown]
# Both, and nearly as random weights would: the kernels of block 1 sum a little more, those of block 3 compare a little more. Without the line of
# random weights one might have read a discovery into the bars.
#
# The very last adapter stays at zero: after it no attention follows that could carry its patches to [class], which alone is read. It
# gets no gradient, and figure 9 has no bar for it. The released files hold it all the same, and so does our class, with a comment.
#
# ## 9. What to take along
#
# - A depthwise convolution over time is three shifted multiply-adds, far below one percent of the work.
# - A detour whose convolution and last bias are zero is silent; the random matrices around it let it learn.
# - A frame's influence spreads with each block, here by two frames to each side; the band of figure 8 is the price of an operator
#   that is this cheap.
#
# **An open question.** A kernel of 3 with a *dilation* of 2 takes frames t - 2, t and t + 2, for the same price. Edit `DWConv3D`
# above (how many zero frames does it need at each end, and which frames does step i take?) and run all cells from there on. Which
# classes gain, and which lose? Which frames can no longer meet, however many blocks there are (figure 8)?

# %%
check.progress()

# %%
# TEST
assert [int((patches > 0).sum()) for patches in seen.values()] == [1, 9, 3, 27]
assert starts["as released"] < 1e-3 and starts["bias of W_down\nrandom"] < 1e-3, starts
assert min(starts["conv.weight\nrandom"], starts["bias of W_up\nrandom"]) > 1, starts
assert abs(3 * whole - 455) < 1 and abs(3 * plain - 419) < 4 and abs(tuned - 7.42) < 0.01
assert cost["(3, 1, 1)"]["convolution"] < 0.01 * projections
assert same < 1e-5
assert max(turned[(1, 1, 1)], turned[(1, 3, 3)]) < 1e-3, turned
assert FAST or min(turned[(3, 1, 1)], turned[(3, 3, 3)]) > 1, turned
assert FAST or max(kernels["(1, 1, 1)"]["monotone"], kernels["(1, 3, 3)"]["monotone"]) <= 50, (
    kernels
)
assert FAST or kernels["(3, 1, 1)"]["monotone"] > 65, kernels
trained = by_motion(predict(model, videos))
assert trained["monotone"] > 90 and trained["jumping"] > 90, trained
for b in range(4):
    far = (torch.arange(T)[:, None] - torch.arange(T)).abs() > frames_seen(2 * b + 2, 3) // 2
    assert influence[b][far].abs().max() < 1e-6 if far.any() else True
    assert (influence[b][~far] > 0).all()
assert idle < 1e-6, idle
assert 45 < chance < 48 and max(parts["block 1"].values()) < chance < min(parts["block 3"].values())
