"""The toy world: small videos of moving shapes, made on the spot, whose classes no single frame tells apart.

Each class has a mirror in time, and every clip lies beside its own mirror image in time in the same split. A model that
ignores the order of the frames is therefore right at most half of the time.
"""

import shutil
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torchvision.transforms import v2
from tqdm import tqdm

SIZE, FRAMES = 64, 16
CLIPS = {"train": 3000, "val": 800, "test": 800}
PAIRS = {  # each class with its mirror in time
    "moves right": "moves left",
    "moves down": "moves up",
    "grows": "shrinks",
    "two part": "two meet",
    "jumps then rests": "rests then jumps",
}
# Monotone motions show in a sum over frames of a function of (frame, time). Jumping and resting does not: at every time
# the shape is anywhere, under both classes. Then the mean of any such sum is the same for both, and by Jensen's
# inequality none brings the cross-entropy below chance: frames must be compared with each other.
GROUPS = {
    "monotone": [name for pair in list(PAIRS.items())[:4] for name in pair],
    "jumping": ["jumps then rests", "rests then jumps"],
}
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 50),
    "cyan": (60, 210, 220),
    "magenta": (215, 60, 200),
    "orange": (245, 140, 30),
    "white": (240, 240, 240),
}
SHAPES = {  # signed distance in pixels from the outline of a shape of radius r, negative inside
    "circle": lambda x, y, r: np.hypot(x, y) - r,
    "square": lambda x, y, r: np.maximum(abs(x), abs(y)) - 0.85 * r,
    "diamond": lambda x, y, r: (abs(x) + abs(y) - 1.15 * r) / 2**0.5,
    "triangle": lambda x, y, r: np.maximum((abs(x) - 0.6 * (y + r)) * 0.86, y - 0.6 * r),
    "ring": lambda x, y, r: abs(np.hypot(x, y) - 0.75 * r) - 0.3 * r,
    "cross": lambda x, y, r: np.maximum(np.minimum(abs(x), abs(y)) - 0.33 * r, np.maximum(abs(x), abs(y)) - r),
}


def paint(frames, shape, color, x, y, r):
    """Paints a shape into float frames (T, S, S, 3); centre x, y and radius r in pixels, numbers or (T,)"""
    x, y, r = (np.broadcast_to(np.float32(v), len(frames)).reshape(-1, 1, 1) for v in (x, y, r))
    pixel = np.arange(SIZE, dtype=np.float32) + 0.5
    cover = np.clip(0.5 - SHAPES[shape](pixel - x, pixel[:, None] - y, r), 0, 1)[..., None]
    frames += (np.float32(COLORS[color]) - frames) * cover


def background(rng, num_frames):
    """A cloudy ground of one colour with up to two small shapes that do not move -> float (T, S, S, 3)"""
    clouds = v2.functional.resize(torch.from_numpy(rng.uniform(-25, 25, (1, 5, 5))), [SIZE, SIZE]).numpy()[0, ..., None]
    grain = rng.normal(0, 4, (SIZE, SIZE, 1))
    frames = np.repeat(np.float32(rng.uniform(60, 150, 3) + clouds + grain)[None], num_frames, 0)
    for _ in range(rng.integers(3)):
        paint(frames[:1], *look(rng), *rng.uniform(4, SIZE - 4, 2), rng.uniform(2, 3.5))
    frames[1:] = frames[0]
    return frames


def look(rng):
    """A random shape and color"""
    return rng.choice(list(SHAPES)), rng.choice(list(COLORS))


def motion(name, rng):
    """The paths of a class's shapes: a list of x, y, r, each a number or (T,)"""
    t, middle = np.linspace(0, 1, FRAMES), SIZE / 2
    r = rng.uniform(6, 9)
    if name.startswith("moves"):
        length = rng.uniform(32, 46)
        along = rng.uniform(r, SIZE - r - length) + length * t
        across = rng.uniform(r, SIZE - r)
        return [(along, across, r) if name == "moves right" else (across, along, r)]
    if name == "grows":
        return [
            (*rng.uniform(middle - 14, middle + 14, 2), np.linspace(rng.uniform(4, 6), rng.uniform(13, 17), FRAMES))
        ]
    if name == "two part":
        angle, center, r = rng.uniform(0, 2 * np.pi), rng.uniform(middle - 5, middle + 5, 2), rng.uniform(5, 7)
        distance = np.linspace(rng.uniform(4, 8), rng.uniform(19, 24), FRAMES)
        return [
            (center[0] + s * distance * np.cos(angle), center[1] + s * distance * np.sin(angle), r) for s in (1, -1)
        ]
    if name == "jumps then rests":  # a new place every two frames, the last of them for the second half
        places = rng.uniform(r, SIZE - r, (2, 5)).repeat([2, 2, 2, 2, 8], axis=1)
        return [(*places, r)]
    raise KeyError(name)


def clip(name, rng):
    """One clip of a class, a key of PAIRS -> uint8 (T, S, S, 3); played backwards it is of the mirror class."""
    frames = background(rng, FRAMES)
    for path in motion(name, rng):
        paint(frames, *look(rng), *path)
    return frames.clip(0, 255).astype(np.uint8)


def write_video(path, frames, rate=8):
    """uint8 (T, H, W, 3) -> an H.264 file"""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "18", "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.thread_count, reformatter = 1, VideoReformatter()
        for frame in frames:
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(reformatter.reformat(rgb, format="yuv420p")))
        container.mux(stream.encode())


def write_toy(folder):
    """Writes the toy videos as folder/SPLIT/CLASS/NUMBER.mp4, unless they are there -> folder

    Every clip has its mirror in time in the same split: frames without their order are worth 50 % at most.
    """
    if folder.is_dir():
        return folder
    unfinished = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    for split in CLIPS:
        for name in GROUPS["monotone"] + GROUPS["jumping"]:
            (unfinished / split / name).mkdir(parents=True)

    def write_pair(job):
        seed, split, number = job
        name = list(PAIRS)[number % len(PAIRS)]
        frames = clip(name, np.random.default_rng([seed, number]))
        write_video(unfinished / split / name / f"{number:04d}.mp4", frames)
        write_video(unfinished / split / PAIRS[name] / f"{number:04d}.mp4", frames[::-1])

    jobs = [(seed, split, n) for seed, split in enumerate(CLIPS) for n in range(CLIPS[split] // 2)]
    with ThreadPoolExecutor() as pool:
        for _ in tqdm(
            pool.map(write_pair, jobs), total=len(jobs), desc=f"writing {folder}", unit="pair", dynamic_ncols=True
        ):
            pass
    unfinished.rename(folder)
    return folder
