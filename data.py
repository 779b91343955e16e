"""Videos: exact decoding, frame sampling, augmentation, datasets, and the toy dataset that is made on the spot.

path, label --Video--> chosen frames --transform--> uint8 (T, 3, H, W) --loader--> the device, where they become floats

Video          frame i of any file that FFmpeg reads, in presentation order, upright
segments       one frame from each of T equal segments          strided     T frames, every `stride`-th
VideoDataset   clips for training (random) and testing (centred, several views); a broken video never stops it
find_clips     the clips of `toy`, of a folder of class folders, of a `path label` list file
"""

import bisect
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch.utils.data import Dataset
from torchvision.transforms import v2
from tqdm import tqdm


class VideoError(ValueError):
    """This file cannot give the frames asked for; the text says which file and why."""


class OrderError(Exception):
    """The packets' timestamps do not number the frames of this file."""


# Other containers, AVI above all, store when a packet is decoded: with B-frames that is not when it is shown.
STORES_PRESENTATION_TIMES = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts", "flv"}


class Video:
    """A video file whose frames are read by number. Frame i is the i-th that a player shows.

    Opening reads the packets' timestamps, not their pictures: sorted, they number the frames, and they tell from which
    keyframe to decode. Where they cannot be trusted (no presentation times, missing or doubled stamps, a decoder that
    disagrees) the frames are decoded in sequence and counted. Raises VideoError.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.reformatter = VideoReformatter()  # a frame's own would be set up anew for each frame
        if not self.path.is_file():
            raise VideoError(f"{path}: no such file")
        try:
            with self.open() as container:
                if not container.streams.video:
                    raise VideoError(f"{path}: the file holds no video stream")
                stream = container.streams.video[0]
                packets = [(p.pts, p.is_keyframe) for p in container.demux(stream) if p.size and not p.is_discard]
                in_order = not stream.codec_context.has_b_frames or container.format.name in STORES_PRESENTATION_TIMES
        except (av.FFmpegError, OSError, ValueError) as e:
            if isinstance(e, VideoError):
                raise
            raise VideoError(f"{path}: cannot be opened as a video ({e})") from e
        stamps = [pts for pts, _ in packets]
        numbered = in_order and None not in stamps and len(set(stamps)) == len(stamps)
        self.times = sorted(stamps) if numbered else None
        self.keyframes = sorted(bisect.bisect_left(self.times, t) for t, key in packets if key) if numbered else [0]
        self.num_frames = len(packets)
        if not packets:
            raise VideoError(f"{path}: the file holds no frames")

    def __len__(self):
        return self.num_frames

    def read(self, numbers):
        """Frames by number, in any order, repeats allowed -> uint8 (T, H, W, 3), RGB, upright."""
        wanted = sorted({int(n) for n in numbers})
        if wanted[0] < 0 or wanted[-1] >= len(self):
            raise VideoError(f"{self.path}: frame {wanted[-1]} asked for, the video has {len(self)}")
        try:
            try:
                frames = self.seek(wanted) if self.times else self.count(wanted)
            except OrderError:
                frames = self.count(wanted)
        except (av.FFmpegError, OSError, ValueError) as e:
            raise VideoError(f"{self.path}: damaged, decoding stops with: {e}") from e
        if len(frames) < len(wanted):
            raise VideoError(f"{self.path}: damaged, not all of its {len(self)} frames can be decoded")
        if len({frame.shape for frame in frames.values()}) > 1:
            raise VideoError(f"{self.path}: its frames differ in size")
        return np.stack([frames[int(n)] for n in numbers])

    def seek(self, wanted):
        """Decodes from the last keyframe before each wanted frame, unless going on from the last one is as near."""
        number = {t: i for i, t in enumerate(self.times)}
        frames, position = {}, -1
        with self.open() as container:
            stream = self.stream(container)
            decoder = container.decode(stream)
            for n in wanted:
                key = self.keyframes[bisect.bisect_right(self.keyframes, n) - 1] if n >= self.keyframes[0] else 0
                if key > position + 1:
                    container.seek(self.times[key], stream=stream)
                    decoder, position = container.decode(stream), -1
                for frame in decoder:
                    reached = number.get(frame.pts, -1)
                    if reached <= position or reached > n:  # out of order, or the seek landed behind the frame
                        raise OrderError
                    position = reached
                    if reached == n:
                        frames[n] = self.upright_rgb(frame)
                        break
        return frames

    def count(self, wanted):
        """Decodes from the start and counts."""
        frames = {}
        with self.open() as container:
            for n, frame in enumerate(container.decode(self.stream(container))):
                if n in wanted:
                    frames[n] = self.upright_rgb(frame)
                if n == wanted[-1]:
                    break
        return frames

    def upright_rgb(self, frame):
        """An av.VideoFrame -> uint8 (H, W, 3), turned as the file's rotation says."""
        pixels = self.reformatter.reformat(frame, format="rgb24").to_ndarray()
        return np.rot90(pixels, round(frame.rotation / 90) % 4)

    def open(self):
        # A title in another encoding is no reason to refuse; PyAV 19 dropped the keyword.
        lenient = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
        return av.open(str(self.path), **lenient)

    def stream(self, container):
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # loader workers already fill the cores
        return stream


def segments(num_frames, T, rng=None, view=0, views=1):
    """One frame from each of T equal segments (TSN, Wang et al., ECCV 2016) -> (T,)

    Random in its segment with `rng`; else the middle, or the `view`-th of `views` evenly spread places.
    """
    edges = np.linspace(0, num_frames, T + 1)
    place = rng.random(T) if rng is not None else (view + 0.5) / views
    return np.minimum(edges[:-1] + place * np.diff(edges), num_frames - 1).astype(int)


def strided(num_frames, T, stride, rng=None, view=0, views=1):
    """T frames, every `stride`-th -> (T,). A video shorter than that repeats its last frame.

    The start is random with `rng`; else the `view`-th of `views` evenly spread ones, the centre if there is one.
    """
    room = max(num_frames - (T - 1) * stride - 1, 0)
    place = 0.5 if views == 1 else view / (views - 1)
    start = rng.integers(room + 1) if rng is not None else int(place * room)
    return np.minimum(start + stride * np.arange(T), num_frames - 1)


def train_transform(size, augment):
    """What training does to a clip, uint8 (T, 3, H, W) -> (T, 3, size, size); one draw serves all frames.

    augment: a dict with any of `crop` (area range of the random resized crop), or `short_side` (range of the short side
    over `size`, before a random crop), `flip`, `gray` (probabilities), `randaugment` (keywords of v2.RandAugment),
    `erasing` (probability). With neither crop, as in testing.
    """
    if "crop" in augment:
        steps = [v2.RandomResizedCrop(size, scale=augment["crop"])]
    elif "short_side" in augment:
        least, most = (round(size * share) for share in augment["short_side"])
        steps = [v2.RandomShortestSize(list(range(least, most + 1))), v2.RandomCrop(size)]
    else:
        steps = [test_transform(size)]
    if "flip" in augment:
        steps.append(v2.RandomHorizontalFlip(augment["flip"]))
    if "gray" in augment:
        steps.append(v2.RandomGrayscale(augment["gray"]))
    if "randaugment" in augment:
        steps.append(v2.RandAugment(**augment["randaugment"]))
    if "erasing" in augment:
        steps.append(v2.RandomErasing(augment["erasing"]))
    return v2.Compose(steps)


def test_transform(size):
    """Short side to `size`, centre crop."""
    return v2.Compose([v2.Resize(size), v2.CenterCrop(size)])


def spatial_views(clip, size, views):
    """clip (T, 3, H, W) -> (views, T, 3, size, size), crops spread evenly along the long side; one is the centre."""
    clip = v2.functional.resize(clip, [size])
    H, W = clip.shape[-2:]
    places = [0.5] if views == 1 else [view / (views - 1) for view in range(views)]
    return torch.stack(
        [v2.functional.crop(clip, round((H - size) * p), round((W - size) * p), size, size) for p in places]
    )


TRIES = 16


class Clip(NamedTuple):
    path: str
    label: int


class VideoDataset(Dataset):
    """Clips as uint8 tensors; item i is (video, label, problem).

    Training (`augment` is a dict): video (T, 3, S, S), drawn from (seed, epoch, i) alone, with any number of workers.
    Testing (`augment` is None): video (V, T, 3, S, S), V = temporal x spatial `views`.
    A video that cannot be read does not raise: `problem` then says why ("" when all is well). In training another takes
    its place, at random; in testing, and when TRIES in a row are broken, the pixels are 0 and the label is -1.

    span: video frames that a clip spans, T of them at even steps; 0 for one from each of T segments of the whole video.
    keep: hold decoded videos in memory; for small sets of tiny videos, without loader workers.
    """

    def __init__(self, clips, num_frames, size, span=0, views=(1, 1), augment=None, seed=0, keep=False):
        self.clips, self.T, self.size, self.span, self.views = clips, num_frames, size, span, views
        self.transform = None if augment is None else train_transform(size, augment)
        self.seed, self.epoch = seed, 0
        self.kept = {} if keep else None

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        problem = ""
        for k in range(TRIES if self.transform else 1):
            other = np.random.default_rng([self.seed, self.epoch, i, k]).integers(len(self.clips))
            path, label = self.clips[other if k else i]
            try:
                return self.train_view(path, i) if self.transform else self.test_views(path), label, problem
            except VideoError as error:
                problem = problem or str(error)
        views = () if self.transform else (self.views[0] * self.views[1],)
        return torch.zeros(*views, self.T, 3, self.size, self.size, dtype=torch.uint8), -1, problem

    def train_view(self, path, i):
        rng = np.random.default_rng([self.seed, self.epoch, i])
        frames = self.frames(path, lambda num_frames: self.numbers(num_frames, rng=rng))
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.default_generator.manual_seed(int(rng.integers(2**63)))
            return self.transform(frames)

    def test_views(self, path):
        temporal, spatial = self.views
        frames = self.frames(
            path, lambda n: np.concatenate([self.numbers(n, view=v, views=temporal) for v in range(temporal)])
        )
        return torch.cat([spatial_views(clip, self.size, spatial) for clip in frames.split(self.T)])

    def numbers(self, num_frames, **which):
        if self.span:
            return strided(num_frames, self.T, max(self.span // self.T, 1), **which)
        return segments(num_frames, self.T, **which)

    def frames(self, path, choose):
        """The frames of a video that `choose` picks, told how many there are -> uint8 (n, 3, H, W)"""
        if self.kept is not None and path not in self.kept:
            video = Video(path)
            self.kept[path] = video.read(range(len(video)))
        video = Video(path) if self.kept is None else self.kept[path]
        if len(video) < self.T:
            few = f"{len(video)} frames, the model reads {self.T}"
            raise VideoError(f"{path}: too short: {few} (train it with fewer --frames)")
        numbers = choose(len(video))
        pixels = video.read(numbers) if self.kept is None else video[numbers]
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)


class Data(NamedTuple):
    """What `find_clips` found. groups: classes to report by themselves; small: few tiny videos, kept in memory."""

    train: list
    val: list
    test: list
    classes: list
    groups: dict
    small: bool


def find_clips(data, root=None, val_data=None):
    """The clips of `data`: "toy", a folder with train/CLASS and val/CLASS, or a list file (with another, `val_data`).

    root: where toy is written, or what the paths of list files start at (default: the list's own folder).
    Raises ValueError or FileNotFoundError that say what was looked for.
    """
    if data == "toy":
        folder = write_toy(Path(root or "datasets") / "toy")
        return class_folders(folder)._replace(groups=TOY_GROUPS, small=True)
    path = Path(data)
    if path.is_dir():
        return class_folders(path)
    if path.is_file():
        if val_data is None:
            raise ValueError(f"--data {data} is a list file; name the list to evaluate on with --val-data")
        return list_files(path, Path(val_data), root)
    raise FileNotFoundError(f"unknown data {data!r}: neither toy nor an existing folder or list file")


VIDEO_SUFFIXES = set(
    [".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".wmv", ".flv", ".3gp", ".ogv"]
)


def class_folders(folder):
    """folder/train/CLASS/VIDEO and folder/val/CLASS/VIDEO (test/ too, if there); classes in alphabetical order."""
    if not (folder / "train").is_dir() or not (folder / "val").is_dir():
        lacking = "val" if (folder / "train").is_dir() else "train"
        raise FileNotFoundError(f"{folder} must hold train/CLASS/*.mp4 and val/CLASS/*.mp4; it has no {lacking}/")
    classes = sorted(d.name for d in (folder / "train").iterdir() if d.is_dir())
    splits = {}
    for split in ("train", "val", "test"):
        splits[split] = clips = []
        for d in sorted((folder / split).iterdir()) if (folder / split).is_dir() else []:
            if d.is_dir():
                videos = sorted(v for v in d.iterdir() if v.suffix.lower() in VIDEO_SUFFIXES)
                if videos and d.name not in classes:
                    raise ValueError(f"{d} is a class that {folder / 'train'} does not have")
                clips += [Clip(str(v), classes.index(d.name)) for v in videos]
        if not clips and split != "test":
            raise FileNotFoundError(
                f"no videos in the class folders of {folder / split} (looked for {' '.join(sorted(VIDEO_SUFFIXES))})"
            )
    return Data(**splits, classes=classes, groups={}, small=False)


def list_files(train_list, val_list, root=None):
    """List files, `path label` or `path,label` a line; paths may hold blanks, the label follows the last."""
    train = read_list(train_list, root)
    num_classes = 1 + max(clip.label for clip in train)
    val = read_list(val_list, root, num_classes)
    return Data(train, val, [], [str(i) for i in range(num_classes)], {}, False)


def read_list(file, root=None, num_classes=None):
    if not file.is_file():
        raise FileNotFoundError(f"the list file {file} does not exist")
    folder, clips = Path(root or file.parent), []
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text file with `path label` a line") from error
    for line, text in enumerate(lines, 1):
        if not text.strip():
            continue
        path, _, label = text.strip().replace("\t", " ").rpartition(" ")
        if not (path and label.isdigit()):
            path, _, label = text.strip().rpartition(",")
        if not (path and label.isdigit()):
            raise ValueError(
                f"{file}, line {line}: expected `path label` with a number for a label, found {text.strip()!r}"
            )
        if num_classes is not None and int(label) >= num_classes:
            classes = f"the {num_classes} classes of the training list (0 to {num_classes - 1})"
            raise ValueError(f"{file}, line {line}: label {label} is outside {classes}")
        clips.append(Clip(str(folder / path.strip()), int(label)))
    if not clips:
        raise ValueError(f"the list file {file} is empty")
    sample = clips[:: max(1, len(clips) // 100)]
    if not any(Path(clip.path).exists() for clip in sample):
        raise FileNotFoundError(f"no video of {file} is there, {clips[0].path} for one; is --data-root right?")
    return clips


TOY_SIZE, TOY_FRAMES = 64, 16
TOY_CLIPS = {"train": 3000, "val": 800, "test": 800}
TOY_PAIRS = {  # each class with its mirror in time
    "moves right": "moves left",
    "moves down": "moves up",
    "grows": "shrinks",
    "two part": "two meet",
    "jumps then rests": "rests then jumps",
}
# Monotone motions show in a sum over frames of a function of (frame, time). Jumping and resting does not: at every time
# the shape is anywhere, under both classes. Then the mean of any such sum is the same for both, and by Jensen's
# inequality none brings the cross-entropy below chance: frames must be compared with each other.
TOY_GROUPS = {
    "monotone": [name for pair in list(TOY_PAIRS.items())[:4] for name in pair],
    "jumping": ["jumps then rests", "rests then jumps"],
}
TOY_COLORS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 50),
    "cyan": (60, 210, 220),
    "magenta": (215, 60, 200),
    "orange": (245, 140, 30),
    "white": (240, 240, 240),
}
TOY_SHAPES = {  # signed distance in pixels from the outline of a shape of radius r, negative inside
    "circle": lambda x, y, r: np.hypot(x, y) - r,
    "square": lambda x, y, r: np.maximum(abs(x), abs(y)) - 0.85 * r,
    "diamond": lambda x, y, r: (abs(x) + abs(y) - 1.15 * r) / 2**0.5,
    "triangle": lambda x, y, r: np.maximum((abs(x) - 0.6 * (y + r)) * 0.86, y - 0.6 * r),
    "ring": lambda x, y, r: abs(np.hypot(x, y) - 0.75 * r) - 0.3 * r,
    "cross": lambda x, y, r: np.maximum(np.minimum(abs(x), abs(y)) - 0.33 * r, np.maximum(abs(x), abs(y)) - r),
}


def toy_paint(frames, shape, color, x, y, r):
    """Paints a shape into float frames (T, S, S, 3); centre x, y and radius r in pixels, numbers or (T,)"""
    x, y, r = (np.broadcast_to(np.float32(v), len(frames)).reshape(-1, 1, 1) for v in (x, y, r))
    pixel = np.arange(TOY_SIZE, dtype=np.float32) + 0.5
    cover = np.clip(0.5 - TOY_SHAPES[shape](pixel - x, pixel[:, None] - y, r), 0, 1)[..., None]
    frames += (np.float32(TOY_COLORS[color]) - frames) * cover


def toy_background(rng, num_frames):
    """A cloudy ground of one colour with up to two small shapes that do not move -> float (T, S, S, 3)"""
    clouds = v2.functional.resize(torch.from_numpy(rng.uniform(-25, 25, (1, 5, 5))), [TOY_SIZE, TOY_SIZE]).numpy()[
        0, ..., None
    ]
    grain = rng.normal(0, 4, (TOY_SIZE, TOY_SIZE, 1))
    frames = np.repeat(np.float32(rng.uniform(60, 150, 3) + clouds + grain)[None], num_frames, 0)
    for _ in range(rng.integers(3)):
        toy_paint(frames[:1], *toy_look(rng), *rng.uniform(4, TOY_SIZE - 4, 2), rng.uniform(2, 3.5))
    frames[1:] = frames[0]
    return frames


def toy_look(rng):
    """A random shape and color"""
    return rng.choice(list(TOY_SHAPES)), rng.choice(list(TOY_COLORS))


def toy_motion(name, rng):
    """The paths of a class's shapes: a list of x, y, r, each a number or (T,)"""
    t, middle = np.linspace(0, 1, TOY_FRAMES), TOY_SIZE / 2
    r = rng.uniform(6, 9)
    if name.startswith("moves"):
        length = rng.uniform(32, 46)
        along = rng.uniform(r, TOY_SIZE - r - length) + length * t
        across = rng.uniform(r, TOY_SIZE - r)
        return [(along, across, r) if name == "moves right" else (across, along, r)]
    if name == "grows":
        return [
            (*rng.uniform(middle - 14, middle + 14, 2), np.linspace(rng.uniform(4, 6), rng.uniform(13, 17), TOY_FRAMES))
        ]
    if name == "two part":
        angle, center, r = rng.uniform(0, 2 * np.pi), rng.uniform(middle - 5, middle + 5, 2), rng.uniform(5, 7)
        distance = np.linspace(rng.uniform(4, 8), rng.uniform(19, 24), TOY_FRAMES)
        return [
            (center[0] + s * distance * np.cos(angle), center[1] + s * distance * np.sin(angle), r) for s in (1, -1)
        ]
    if name == "jumps then rests":  # a new place every two frames, the last of them for the second half
        places = rng.uniform(r, TOY_SIZE - r, (2, 5)).repeat([2, 2, 2, 2, 8], axis=1)
        return [(*places, r)]
    raise KeyError(name)


def toy_video(name, rng):
    """One clip of a class, a key of TOY_PAIRS -> uint8 (T, S, S, 3); played backwards it is of the mirror class."""
    frames = toy_background(rng, TOY_FRAMES)
    for path in toy_motion(name, rng):
        toy_paint(frames, *toy_look(rng), *path)
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
    for split in TOY_CLIPS:
        for name in TOY_GROUPS["monotone"] + TOY_GROUPS["jumping"]:
            (unfinished / split / name).mkdir(parents=True)

    def write_pair(job):
        seed, split, number = job
        name = list(TOY_PAIRS)[number % len(TOY_PAIRS)]
        frames = toy_video(name, np.random.default_rng([seed, number]))
        write_video(unfinished / split / name / f"{number:04d}.mp4", frames)
        write_video(unfinished / split / TOY_PAIRS[name] / f"{number:04d}.mp4", frames[::-1])

    jobs = [(seed, split, n) for seed, split in enumerate(TOY_CLIPS) for n in range(TOY_CLIPS[split] // 2)]
    with ThreadPoolExecutor() as pool:
        for _ in tqdm(
            pool.map(write_pair, jobs), total=len(jobs), desc=f"writing {folder}", unit="pair", dynamic_ncols=True
        ):
            pass
    unfinished.rename(folder)
    return folder
