"""What the labs share besides pictures and checks: toy clips in memory, where a shape is, attention weights."""

import base64
import logging
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from colab import toy

HERE = Path(__file__).resolve().parent
CLASSES = sorted([*toy.PAIRS, *toy.PAIRS.values()])  # as data.find_clips numbers them
PAIRED = [name for pair in toy.PAIRS.items() for name in pair]  # each class beside its mirror, for pictures
MIRROR = {**toy.PAIRS, **{mirror: name for name, mirror in toy.PAIRS.items()}}
SPLITS = list(toy.CLIPS)


def load(split, numbers=range(toy.FRAMES), limit=None, fast=False):
    """Toy clips of a split -> videos uint8 (B, T, 3, 64, 64), labels (B,), pairs (B,)

    numbers: the T frames that are read. limit: so many clips at most, mirrors counted. Clips with the same number in
    `pairs` are mirror images in time of each other. fast: the clips are painted in memory, not written and decoded.
    """
    from data import find_clips, open_video

    numbers = np.asarray(numbers)
    if fast:
        pairs = range((limit or toy.CLIPS[split]) // 2)
        frames = [scene(PAIRED[2 * (i % len(toy.PAIRS))], i, split)[0] for i in pairs]
        names = [name for i in pairs for name in PAIRED[2 * (i % len(toy.PAIRS)) :][:2]]
        videos = np.stack([clip for f in frames for clip in (f[numbers], f[::-1][numbers])])
        pairs = np.repeat(pairs, 2)
    else:
        clips = sorted(
            (int(Path(c.path).stem), Path(c.path).parent.name, c.path) for c in getattr(find_clips("toy"), split)
        )
        pairs, names, paths = zip(*clips[:limit])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            videos = np.stack(list(pool.map(lambda path: open_video(path).read(numbers), paths)))
    labels = torch.tensor([CLASSES.index(name) for name in names])
    return torch.from_numpy(videos).permute(0, 1, 4, 2, 3), labels, torch.as_tensor(pairs)


def scene(name, number, split="val"):
    """Paints clip `number` of a class -> frames uint8 (16, 64, 64, 3), mask bool (16, 64, 64): where its shapes are.

    The clip on disk is the same but for its compression: number % 5 tells the pair that a numbered file belongs to.
    """
    if name in toy.PAIRS.values():
        frames, mask = scene(MIRROR[name], number, split)
        return frames[::-1], mask[::-1]
    rng = np.random.default_rng([SPLITS.index(split), number])  # the draws of toy.clip, in its order
    frames, cover = toy.background(rng, toy.FRAMES), np.zeros((toy.FRAMES, toy.SIZE, toy.SIZE, 3), np.float32)
    for path in toy.motion(name, rng):
        shape, color = toy.look(rng)
        toy.paint(frames, shape, color, *path)
        toy.paint(cover, shape, "white", *path)
    return frames.clip(0, 255).astype(np.uint8), cover[..., 0] > 120


def on_patches(mask, patch_size=16):
    """mask bool (T, H, W) -> bool (T, h, w): the patches on which at least one pixel of the shape lies."""
    return rearrange(mask, "t (h p) (w q) -> t h w (p q)", p=patch_size, q=patch_size).any(-1)


def load_toy_clip():
    """The tiny CLIP with both its towers, an open_clip model; its `visual` is a `common.ViT`."""
    import open_clip
    from safetensors.torch import load_file

    from common import load_clip

    visual = load_clip("ViT-Toy-16", "shipped")
    logging.disable(logging.WARNING)  # open_clip would warn that the weights are still random
    clip = open_clip.create_model("ViT-Toy-16")
    logging.disable(logging.NOTSET)
    clip.visual = visual
    clip.load_state_dict({name: t.float() for name, t in load_file(HERE / "ViT-Toy-16.safetensors").items()})
    return clip.eval().requires_grad_(False)


@contextmanager
def attention_weights(model):
    """Recomputes softmax(Q K^T / sqrt(d)) of every Attention of `model` that is called in the `with` block.

    Gives a dict: name of the module -> list with one tensor (..., heads, n, n) per call, in order. PyTorch's
    scaled_dot_product_attention does not return the weights. AIM calls the same module along time and along space; the
    length n tells them apart.
    """
    kept, hooks = {}, []

    def keep(name):
        def hook(module, inputs, output):
            qkv = F.linear(inputs[0], module.in_proj_weight, module.in_proj_bias)
            q, k, _ = rearrange(qkv, "... n (three h d) -> three ... h n d", three=3, h=module.heads)
            weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)  # softmax(Q K^T / sqrt(d))
            kept.setdefault(name, []).append(weights.detach().cpu())

        return hook

    for name, module in model.named_modules():
        if hasattr(module, "in_proj_weight") and hasattr(module, "heads"):
            hooks.append(module.register_forward_hook(keep(name)))
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def online(host="huggingface.co", seconds=4):
    """Whether a connection to `host` can be opened. It takes `seconds` at most, however slow the name is looked up."""
    found = []

    def connect():
        with suppress(OSError), socket.create_connection((host, 443), seconds):
            found.append(True)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(found)


def film(name, numbers, split, folder):
    """Writes toy clips of a class as video files, as if each had been filmed -> their paths"""
    folder = Path(folder, split, name)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:04d}.mp4" for number in numbers]
    for number, path in zip(numbers, paths):
        toy.write_video(path, scene(name, number, split)[0])
    return paths


def upload():
    """In Colab, asks for files -> their paths"""
    from google.colab import files

    return [Path(name) for name in files.upload()]


def record(path, seconds=4):
    """In Colab, films with the browser's camera after a click -> path"""
    from google.colab import output

    path = Path(path)
    path.write_bytes(base64.b64decode(output.eval_js(CAMERA % (1000 * seconds))))
    return path


CAMERA = """(async () => {
  const button = document.createElement("button");
  button.textContent = "film";
  document.body.append(button);
  await new Promise(click => (button.onclick = click));
  const stream = await navigator.mediaDevices.getUserMedia({video: {width: 640, height: 480}});
  const recorder = new MediaRecorder(stream), parts = [];
  recorder.ondataavailable = event => parts.push(event.data);
  const stopped = new Promise(stop => (recorder.onstop = stop));
  recorder.start();
  button.textContent = "filming";
  setTimeout(() => recorder.stop(), %d);
  await stopped;
  stream.getTracks().forEach(track => track.stop());
  button.remove();
  const bytes = new Uint8Array(await new Blob(parts).arrayBuffer());
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text);
})()"""


def captions(split, labels, pairs):
    """Captions of the toy clips that `load` gives, such as "a red ring moves left"; they are those of toy.captioned."""
    texts = []
    for label, number in zip(labels.tolist(), pairs.tolist()):
        name = CLASSES[label]
        painted = name if name in toy.PAIRS else MIRROR[name]  # the clip that was painted; its mirror looks the same
        rng = np.random.default_rng([SPLITS.index(split), number])
        texts.append(f"{toy.subject(painted, rng)} {name.removeprefix('two ')}")
    return texts
