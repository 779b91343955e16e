"""The toy world: small videos of moving shapes, made on the spot, whose classes no single frame can tell apart.

Each class has a mirror in time: its videos, played backwards, are videos of the other class. Every clip lies beside its
own mirror image in time, in the same split. A model that ignores the order of the frames therefore gives both the same
class, and is right at most half of the time.

    rng = np.random.default_rng(0)
    motion("grows", rng)     where the shapes are at each frame        clip("grows", rng)      the frames, painted
    write_toy(folder)        the whole dataset as H.264 files, which `python train.py --data toy` trains on
"""

import os
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torchvision.transforms import v2
from tqdm import tqdm

SIZE, FRAMES = 64, 16  # S, the side of a frame in pixels, and T, the frames of a clip
CLIPS = {"train": 3000, "val": 800, "test": 800}
PAIRS = {  # each class with its mirror in time
    "moves right": "moves left",
    "moves down": "moves up",
    "grows": "shrinks",
    "two part": "two meet",
    "jumps then rests": "rests then jumps",
}
# In a monotone class the place or size of the shape says how late it is: a shape that moves right is on the left in
# early frames. A model may look at each frame alone, as long as it knows the frame's time, and average what it finds.
# In a jumping class this is not enough. At each time the shape is anywhere, with equal chance in both classes, so that
# a frame together with its time says nothing. Only frames that are compared with each other show whether it rests.
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
SHAPES = {  # distance in pixels of the point (x, y) from the outline of a shape of radius r at (0, 0); negative inside
    "circle": lambda x, y, r: np.hypot(x, y) - r,
    "square": lambda x, y, r: np.maximum(abs(x), abs(y)) - 0.85 * r,
    "diamond": lambda x, y, r: (abs(x) + abs(y) - 1.15 * r) / 2**0.5,
    "triangle": lambda x, y, r: np.maximum((abs(x) - 0.6 * (y + r)) * 0.86, y - 0.6 * r),
    "ring": lambda x, y, r: abs(np.hypot(x, y) - 0.75 * r) - 0.3 * r,
    "cross": lambda x, y, r: np.maximum(np.minimum(abs(x), abs(y)) - 0.33 * r, np.maximum(abs(x), abs(y)) - r),
}


def motion(name, rng):
    """Where the shapes of a random clip are -> a list with one array (3, T) per shape: x, y and radius, in pixels

    name: a class. x grows to the right, y downwards. All shapes stay inside the frame, or almost.
    """
    if name not in PAIRS:  # a mirror: the same motion backwards
        return [path[:, ::-1] for path in motion({mirror: name for name, mirror in PAIRS.items()}[name], rng)]
    time, middle = np.linspace(0, 1, FRAMES), SIZE / 2
    radius = rng.uniform(6, 9)
    if name in ("moves right", "moves down"):
        length = rng.uniform(32, 46)
        along = rng.uniform(radius, SIZE - radius - length) + length * time
        across = rng.uniform(radius, SIZE - radius)
        paths = [(along, across, radius) if name == "moves right" else (across, along, radius)]
    elif name == "grows":
        x, y = rng.uniform(middle - 14, middle + 14, 2)
        paths = [(x, y, np.linspace(rng.uniform(4, 6), rng.uniform(13, 17), FRAMES))]
    elif name == "two part":  # two shapes move away from a centre, in opposite directions
        angle, (x, y), radius = rng.uniform(0, 2 * np.pi), rng.uniform(middle - 5, middle + 5, 2), rng.uniform(5, 7)
        distance = np.linspace(rng.uniform(4, 8), rng.uniform(19, 24), FRAMES)
        paths = [(x + s * distance * np.cos(angle), y + s * distance * np.sin(angle), radius) for s in (1, -1)]
    else:  # "jumps then rests": at a new place every two frames, and at the last one for the second half
        x, y = rng.uniform(radius, SIZE - radius, (2, 5)).repeat([2, 2, 2, 2, 8], axis=1)
        paths = [(x, y, radius)]
    return [np.stack(np.broadcast_arrays(*path)) for path in paths]


def look(rng):
    """A random shape and colour -> a key of SHAPES, a key of COLORS"""
    return rng.choice(list(SHAPES)), rng.choice(list(COLORS))


def paint(frames, shape, color, x, y, r):
    """Paints a shape into `frames`, in place.

    frames: float (T, S, S, 3), RGB from 0 to 255. x, y, r: its centre and radius in pixels, numbers or (T,)
    """
    x, y, r = (np.broadcast_to(np.float32(v), len(frames)).reshape(-1, 1, 1) for v in (x, y, r))  # (T, 1, 1)
    pixel = np.arange(SIZE, dtype=np.float32) + 0.5  # the centres of the pixels, (S,)
    inside = 0.5 - SHAPES[shape](pixel - x, pixel[:, None] - y, r)  # (T, S, S), above 1 well inside, below 0 outside
    cover = np.clip(inside, 0, 1)[..., None]  # share of a pixel that the shape covers, (T, S, S, 1)
    frames += (np.float32(COLORS[color]) - frames) * cover


def background(rng, num_frames):
    """A cloudy ground of one colour, with up to two small shapes that do not move -> float32 (T, S, S, 3)"""
    clouds = v2.functional.resize(torch.from_numpy(rng.uniform(-25, 25, (1, 5, 5))), [SIZE, SIZE])  # (1, S, S)
    grain = rng.normal(0, 4, (SIZE, SIZE, 1))
    ground = rng.uniform(60, 150, 3) + clouds.numpy()[0, ..., None] + grain  # (S, S, 3)
    frames = np.repeat(np.float32(ground)[None], num_frames, axis=0)  # (T, S, S, 3)
    for _ in range(rng.integers(3)):
        paint(frames[:1], *look(rng), *rng.uniform(4, SIZE - 4, 2), rng.uniform(2, 3.5))
    frames[1:] = frames[0]
    return frames


def clip(name, rng):
    """A random clip of a class -> uint8 (T, S, S, 3), RGB"""
    frames = background(rng, FRAMES)
    for x, y, r in motion(name, rng):
        paint(frames, *look(rng), x, y, r)
    return frames.clip(0, 255).astype(np.uint8)


def subject(name, rng):
    """What moves in the clip that `clip(name, rng)` paints, such as "a red ring"; the draws are the same"""
    background(rng, 1)
    shapes = [look(rng) for _ in motion(name, rng)]
    looks = [f"{color} {shape}" for shape, color in shapes]
    article = "an" if looks[0][0] in "aeiou" else "a"
    return " and ".join(looks) if len(looks) > 1 else f"{article} {looks[0]}"


def captioned(listed):
    """Captions such as "a red ring moves left" -> {split: [(caption, path), ...]}, {path: that of its mirror in time}

    listed: {split: [(class, path), ...]} of the folder that `write_toy` writes. In val and test no two clips have the
    same caption, so that one clip is right for it: of several, the first stays.
    """
    captions, mirrors, mirror_of = {}, {}, PAIRS | {mirror: name for name, mirror in PAIRS.items()}
    for seed, split in enumerate(CLIPS):
        found = {}
        for name, path in listed[split]:
            folder, file = os.path.split(path)
            mirrors[path] = os.path.join(os.path.dirname(folder), mirror_of[name], file)
            rng = np.random.default_rng([seed, int(file.removesuffix(".mp4"))])  # as write_toy has it
            original = name if name in PAIRS else mirror_of[name]  # the clip was painted, and its mirror looks the same
            text = f"{subject(original, rng)} {name.removeprefix('two ')}"
            found.setdefault((text, path) if split == "train" else text, (text, path))
        captions[split] = list(found.values())
    return captions, mirrors


# The words of captions. Those that the tiny CLIP has read come first; the others are in PAIRS, or join two shapes.
PLACES = "a tiny small large huge top upper middle lower bottom leftmost left center right rightmost"
WORDS = " ".join([PLACES, *COLORS, *SHAPES, *PAIRS, *PAIRS.values(), "an and"]).split()


@cache
def number_words(vocabulary):
    """A number from 1 to vocabulary - 3 for each of WORDS: a hash, or the next number that no word before it has"""
    numbers = {}
    for word in dict.fromkeys(WORDS):
        numbers[word] = 1 + zlib.crc32(word.encode()) % (vocabulary - 3)
        while list(numbers.values()).count(numbers[word]) > 1:
            numbers[word] = 1 + numbers[word] % (vocabulary - 3)
    return numbers


def tokenize(captions, context_length=8, vocabulary=1024):
    """Texts -> numbers of their words (B, context_length), between a start and an end token

    A word that the toy world does not know has a hash as its number, which may be that of another word.
    """
    tokens, known = torch.zeros(len(captions), context_length, dtype=torch.long), number_words(vocabulary)
    for row, caption in zip(tokens, captions):
        words = [known.get(word, 1 + zlib.crc32(word.encode()) % (vocabulary - 3)) for word in caption.split()]
        if len(words) > context_length - 2:
            raise ValueError(f"{caption!r} has more than {context_length - 2} words")
        row[: len(words) + 2] = torch.tensor([vocabulary - 2, *words, vocabulary - 1])
    return tokens


def write_video(path, frames, rate=8):
    """Writes uint8 frames (T, H, W, 3), RGB, as an H.264 file. rate: frames per second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "18", "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.thread_count, reformatter = 1, VideoReformatter()
        for frame in frames:
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(reformatter.reformat(rgb, format="yuv420p")))
        container.mux(stream.encode())  # what the encoder still holds


def write_toy(folder):
    """Writes all toy videos as folder/SPLIT/CLASS/NUMBER.mp4, unless the folder exists -> folder, a Path

    The clip and its mirror in time have the same number. Each depends on its split and number alone.
    """
    if folder.is_dir():
        return folder
    # What is interrupted is not taken for the dataset, and several processes may write at once.
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    for split in CLIPS:
        for name in GROUPS["monotone"] + GROUPS["jumping"]:
            (unfinished / split / name).mkdir(parents=True)

    def write_pair(job):
        seed, split, number = job
        name = list(PAIRS)[number % len(PAIRS)]
        frames = clip(name, np.random.default_rng([seed, number]))
        write_video(unfinished / split / name / f"{number:04d}.mp4", frames)
        write_video(unfinished / split / PAIRS[name] / f"{number:04d}.mp4", frames[::-1])

    jobs = [(seed, split, number) for seed, split in enumerate(CLIPS) for number in range(CLIPS[split] // 2)]
    with ThreadPoolExecutor() as pool:
        pairs = pool.map(write_pair, jobs)
        list(tqdm(pairs, total=len(jobs), desc=f"writing {folder}", unit="pair", dynamic_ncols=True))
    try:
        unfinished.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(unfinished)
    return folder
