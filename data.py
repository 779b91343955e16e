"""Videos: exact decoding, frame sampling, augmentation, datasets, and the toy dataset that is made on the spot.

path, label --Video--> chosen frames --transform--> uint8 (T, 3, H, W) --loader--> the device, where they become floats

Video          frame i of any file that FFmpeg reads, in presentation order, upright; Frames: of a folder of JPEGs
segments       one frame from each of T equal segments          strided     T frames, every `stride`-th
VideoDataset   clips for training (random) and testing (centred, several views); a broken video never stops it
DATASETS       the field's datasets: what their annotation files are called, and who reads them
find_clips     the clips of one of these, of `toy`, of a folder of class folders, of a `path label` list file

    python data.py check --data k400 --data-root /data/k400        reads every video once and says what is wrong
    python data.py show CLIP.mp4 frames.png                        draws the frames that a model would see
"""

import argparse
import bisect
import collections
import csv
import json
import os
import re
import signal
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.utils import save_image
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
        self.reformatter, self.short_side = VideoReformatter(), None  # a frame's own would be set up for each frame
        if not self.path.is_file():
            raise VideoError(f"{path}: no such file")
        try:
            with self.open() as container:
                if not container.streams.video:
                    raise VideoError(f"{path}: the file holds no video stream")
                stream = container.streams.video[0]
                if stream.codec_context is None:
                    raise VideoError(f"{path}: damaged, or in a codec that this FFmpeg does not know")
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

    def read(self, numbers, short_side=None):
        """Frames by number, in any order, repeats allowed -> uint8 (T, H, W, 3), RGB, upright.

        short_side: frames with a longer one are scaled down to it, in libswscale, as they are converted.
        """
        self.short_side = short_side
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
        """Decodes from the last keyframe before each wanted frame, unless going on from the last one is as near.

        On the way, frames that no other refers to are not decoded: half of them, in a usual H.264 file.
        """
        number = {t: i for i, t in enumerate(self.times)}
        wanted_times = {self.times[n] for n in wanted}
        frames, position = {}, -1
        with self.open() as container:
            stream = self.stream(container)

            def decode():
                for packet in container.demux(stream):
                    stream.codec_context.skip_frame = "DEFAULT" if packet.pts in wanted_times else "NONREF"
                    yield from packet.decode()

            decoder = decode()
            for n in wanted:
                key = self.keyframes[bisect.bisect_right(self.keyframes, n) - 1] if n >= self.keyframes[0] else 0
                if key > position + 1:
                    container.seek(self.times[key], stream=stream)
                    decoder, position = decode(), -1
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
        scale = (self.short_side or np.inf) / min(frame.width, frame.height)
        size = {} if scale >= 1 else dict(width=round(frame.width * scale), height=round(frame.height * scale))
        pixels = self.reformatter.reformat(frame, format="rgb24", **size).to_ndarray()
        return np.rot90(pixels, round(frame.rotation / 90) % 4)

    def open(self):
        # A title in another encoding is no reason to refuse; PyAV 19 dropped the keyword.
        lenient = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
        return av.open(str(self.path), **lenient)

    def stream(self, container):
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # loader workers already fill the cores
        return stream


class Frames:
    """A video that is a folder of JPEG frames, 00001.jpg, 00002.jpg, ... (Something-Something v1); reads as `Video`."""

    def __init__(self, path):
        self.files = sorted(str(file) for file in Path(path).glob("*.jpg"))
        if not self.files:
            raise VideoError(f"{path}: the folder holds no .jpg frames")

    def __len__(self):
        return len(self.files)

    def read(self, numbers, short_side=None):
        return np.stack([Video(self.files[int(n)]).read([0], short_side)[0] for n in numbers])


def open_video(path):
    return Frames(path) if Path(path).is_dir() else Video(path)


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


class RandAugment(v2.Transform):
    """RandAugment as the papers' `rand-mM-nN-mstdS-inc1` means it, of torchvision's operations.

    Each of num_ops operations is done with probability one half, at a magnitude drawn from N(magnitude, std) out of 10
    (Cubuk et al., 2020, in timm's variant).
    """

    def __init__(self, num_ops, magnitude, std=0.5):
        super().__init__()
        self.num_ops, self.magnitude, self.std = num_ops, magnitude, std

    def forward(self, clip):
        for draw in torch.rand(self.num_ops).tolist():
            if draw < 0.5:
                level = min(max(self.magnitude + self.std * torch.randn(()).item(), 0), 10)
                clip = v2.RandAugment(1, round(10 * level), num_magnitude_bins=101, fill=128)(clip)
        return clip


def train_transform(size, augment):
    """What training does to a clip, uint8 (T, 3, H, W) -> (T, 3, size, size); one draw serves all frames.

    augment: a dict with any of `crop` (area range of the random resized crop), or `short_side` (range of the short side
    over `size`, before a random crop), `gray`, `erasing` (probabilities), `jitter` (of brightness, contrast and
    saturation), `randaugment` (keywords of RandAugment). With neither crop, as in testing. VideoDataset does `flip`.
    """
    if "crop" in augment:
        steps = [v2.RandomResizedCrop(size, scale=augment["crop"])]
    elif "short_side" in augment:
        least, most = (round(size * share) for share in augment["short_side"])
        steps = [v2.RandomShortestSize(list(range(least, most + 1))), v2.RandomCrop(size)]
    else:
        steps = [test_transform(size)]
    if "jitter" in augment:
        steps.append(v2.ColorJitter(*[augment["jitter"]] * 3))
    if "gray" in augment:
        steps.append(v2.RandomGrayscale(augment["gray"]))
    if "randaugment" in augment:
        steps.append(RandAugment(**augment["randaugment"]))
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


class Clips(collections.abc.Sequence):
    """A list of Clip in three arrays, which loader workers share: a list of Python objects each would come to copy."""

    def __init__(self, clips):
        paths, labels = [], []
        for path, label in clips:
            paths.append(os.fsencode(path))
            labels.append(label)
        self.labels = np.array(labels, dtype=np.int64)
        self.ends = np.cumsum([len(path) for path in paths], dtype=np.int64)
        self.text = np.frombuffer(b"".join(paths), dtype=np.uint8)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        path = self.text[self.ends[i - 1] if i else 0 : self.ends[i]].tobytes()
        return Clip(os.fsdecode(path), int(self.labels[i]))

    def __eq__(self, other):
        return list(self) == list(other)


class VideoDataset(Dataset):
    """Clips as uint8 tensors; item i is (video, label, problem).

    Training (`augment` is a dict): video (T, 3, S, S), drawn from (seed, epoch, i) alone, with any number of workers.
    Item i + k len(self) is clip i again, drawn anew, for repeated sampling (Hoffer et al., CVPR 2020).
    Testing (`augment` is None): video (V, T, 3, S, S), V = temporal x spatial `views`.
    A video that cannot be read does not raise: `problem` then says why ("" when all is well). In training another takes
    its place, at random; in testing, and when TRIES in a row are broken, the pixels are 0 and the label is -1.

    span: video frames that a clip spans, T of them at even steps; 0 for one from each of T segments of the whole video.
    flip: what a mirror image does to labels: {} nothing, {86: 87, 87: 86} swaps two, None forbids `augment`'s flip.
    keep: hold decoded videos in memory; for small sets of tiny videos, without loader workers.
    """

    def __init__(self, clips, num_frames, size, span=0, views=(1, 1), augment=None, seed=0, keep=False, flip=None):
        self.clips, self.T, self.size, self.span, self.views = clips, num_frames, size, span, views
        self.transform = None if augment is None else train_transform(size, augment)
        self.flip, self.flip_rate = flip or {}, 0 if flip is None or not augment else augment.get("flip", 0)
        self.seed, self.epoch = seed, 0
        self.kept = {} if keep else None

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        problem = ""
        for k in range(TRIES if self.transform else 1):
            other = np.random.default_rng([self.seed, self.epoch, i, k]).integers(len(self.clips))
            path, label = self.clips[other if k else i % len(self.clips)]
            try:
                return *(self.train_view(path, label, i) if self.transform else (self.test_views(path), label)), problem
            except VideoError as error:
                problem = problem or str(error)
        views = () if self.transform else (self.views[0] * self.views[1],)
        return torch.zeros(*views, self.T, 3, self.size, self.size, dtype=torch.uint8), -1, problem

    def train_view(self, path, label, i):
        rng = np.random.default_rng([self.seed, self.epoch, i])
        frames = self.frames(path, lambda num_frames: self.numbers(num_frames, rng=rng))
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.default_generator.manual_seed(int(rng.integers(2**63)))
            frames = self.transform(frames)
        if rng.random() < self.flip_rate:
            return frames.flip(-1), self.flip.get(label, label)
        return frames, label

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
            video = open_video(path)
            self.kept[path] = video.read(range(len(video)))
        video = open_video(path) if self.kept is None else self.kept[path]
        if len(video) < self.T:
            few = f"{len(video)} frames, the model reads {self.T}"
            raise VideoError(f"{path}: too short: {few} (train it with fewer --frames)")
        numbers = choose(len(video))
        # A crop may still take a third of the side; larger frames would be scaled down in any case.
        pixels = video.read(numbers, short_side=2 * self.size) if self.kept is None else video[numbers]
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)


class Data(NamedTuple):
    """What `find_clips` found. groups: classes to report by themselves; small: few tiny videos, kept in memory."""

    train: list
    val: list
    test: list
    classes: list
    groups: dict = {}  # noqa: RUF012
    small: bool = False
    flip: dict | None = {}  # noqa: RUF012  what a mirror image does to labels, as in VideoDataset
    missing: tuple = ()  # a sentence for each split that lacks videos


def find_clips(data, root=None, val_data=None, annotations=None, fold=1, skip=None):
    """The clips of `data`: a name of DATASETS, "toy", a folder with train/CLASS and val/CLASS, or a list file.

    root: where the videos are, at any depth; where toy is written; what the paths of list files start at (default: the
    list's own folder). val_data: the list to evaluate on. annotations: where a named dataset's annotation files are, if
    not in root. fold: of UCF101's and HMDB51's three. skip: a file of paths to leave out, as `check` writes,
    or `path: why`, as a run does.
    Raises ValueError or FileNotFoundError that say what was looked for.
    """
    path = Path(data)
    if data == "toy":
        from colab import toy

        folder = toy.write_toy(Path(root or Path(__file__).resolve().parent / "datasets") / "toy")
        found = class_folders(folder)._replace(groups=toy.GROUPS, small=True)
    elif data in DATASETS:
        found = named(DATASETS[data], data, root, annotations, fold)
    elif path.is_dir():
        found = class_folders(path)
    elif path.is_file():
        if val_data is None:
            raise ValueError(f"--data {data} is a list file; name the list to evaluate on with --val-data")
        found = list_files(path, Path(val_data), root)
    else:
        known = ", ".join(["toy", *DATASETS])
        raise FileNotFoundError(f"unknown data {data!r}: neither one of {known} nor an existing folder or list file")
    if skip:
        named_there = [line for line in Path(skip).read_text(encoding="utf-8").splitlines() if line]
        unwanted = {os.path.abspath(path) for line in named_there for path in (line, line.partition(": ")[0])}
        every = {split: getattr(found, split) for split in SPLITS}
        kept = {split: Clips(c for c in every[split] if os.path.abspath(c.path) not in unwanted) for split in SPLITS}
        if named_there and all(len(kept[split]) == len(every[split]) for split in SPLITS):
            raise ValueError(f"--skip {skip}: none of its {len(named_there)} lines is the path of a video of {data}")
        found = found._replace(**kept)
    return found


SPLITS = ("train", "val", "test")


class Source(NamedTuple):
    """A dataset of the field as it lies on people's disks.

    read(file) gives ((a video's names), class) for each video of an annotation file; a class is a number or a name.
    train, val: what that file may be called, "{}" stands for the fold. names: the file of class names. recipe: whose
    training settings to use; sampling: what differs. flip: as in VideoDataset. lists: what mmaction2 calls the dataset.
    """

    read: callable
    train: str
    val: str
    names: str = ""
    num_classes: int = 0
    recipe: str = "k400"
    sampling: dict = {}  # noqa: RUF012
    flip: dict | None = {}  # noqa: RUF012
    lists: str = ""


def list_names(source, split):
    """What a `path label` list may be called."""
    return f"{source.lists}_{split}_list_videos.txt {split}.csv {split}.txt {split}_list.txt".split()


def kinetics(file):
    """label,youtube_id,time_start,time_end,split: files are ID_START_END.mp4, or sometimes ID.mp4."""
    for row in csv.DictReader(file.open(encoding="utf-8-sig", newline="")):
        start, end = (int(float(row[key])) for key in ("time_start", "time_end"))
        yield (f"{row['youtube_id']}_{start:06d}_{end:06d}", row["youtube_id"]), row["label"]


def something(file):
    """[{"id": "1", "template": "Holding [something]"}, ...]: the template without its brackets is the class."""
    for clip in json.loads(file.read_text(encoding="utf-8")):
        yield (str(clip["id"]),), re.sub(r"[\[\]]", "", clip["template"])


def something_v1(file):
    """id;class: the clips are folders of frames."""
    for line in file.read_text(encoding="utf-8-sig").splitlines():
        name, _, label = line.partition(";")
        yield (name,), label


def diving(file):
    for clip in json.loads(file.read_text(encoding="utf-8")):
        yield (clip["vid_name"],), int(clip["label"])


def ucf(file):
    """CLASS/NAME.avi, followed by a number for training."""
    for line in file.read_text().splitlines():
        label, _, name = line.split()[0].partition("/")
        yield (Path(name).stem,), label


def hmdb(file, use):
    """NAME.avi and 1 for training, 2 for testing, 0 for neither, in a file for each class and fold."""
    label = re.sub(r"_test_split\d$", "", file.stem)
    for line in file.read_text().splitlines():
        name, number = line.rsplit(maxsplit=1)
        if int(number) == use:
            yield (Path(name).stem,), label


def class_names(file):
    """The class names of a file: JSON {name: number}, or a name a line, with its number beside it or without."""
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix == ".json":
        numbers = json.loads(text)
        return sorted(numbers, key=lambda name: int(numbers[name]))
    lines = [re.sub(r"^\d+[ ,]|,\d+$", "", line).strip() for line in text.splitlines()]
    return [line for line in lines if line and line not in ("id,name", "name")]


UNIFORM = dict(span=0, views=(1, 1))  # one frame from each of T segments, one view
SIDES = {86: 87, 87: 86, 93: 94, 94: 93, 166: 167, 167: 166}  # from left to right, from right to left
SSV1, SSV2, DIVING48 = "something-something-v1", "something-something-v2", "Diving48_V2"
DATASETS = {
    "k400": Source(
        kinetics, "kinetics_400_train.csv", "kinetics_400_val.csv validate.csv",
        "kinetics_400_labels.csv kinetics_label_map_k400.txt", 400, lists="kinetics400",
    ),
    "k700": Source(
        kinetics, "kinetics_700_train.csv", "kinetics_700_val.csv validate.csv",
        "kinetics_700_labels.csv kinetics_label_map_k700.txt", 700, "k700", lists="kinetics700",
    ),
    "ssv2": Source(
        something, f"{SSV2}-train.json train.json", f"{SSV2}-validation.json validation.json",
        f"{SSV2}-labels.json labels.json", 174, "ssv2", flip=SIDES, lists="sthv2",
    ),
    "ssv1": Source(
        something_v1, f"{SSV1}-train.csv", f"{SSV1}-validation.csv validation.csv", "", 174, "ssv2",
        flip=None, lists="sthv1",
    ),
    "diving48": Source(
        diving, f"{DIVING48}_train.json", f"{DIVING48}_test.json", "", 48, "diving48", UNIFORM, lists="diving48"
    ),
    "ucf101": Source(
        ucf, "trainlist0{}.txt", "testlist0{}.txt", "classInd.txt", 101, "ucf101", UNIFORM, lists="ucf101"
    ),
    "hmdb51": Source(hmdb, "*_test_split{}.txt", "*_test_split{}.txt", "", 51, "hmdb51", UNIFORM, lists="hmdb51"),
}  # fmt: skip


def named(source, data, root, annotations, fold):
    """The clips of a dataset by name: its annotation files, and the videos wherever below root they are."""
    if root is None:
        raise ValueError(
            f"--data {data}: say where its videos are with --data-root (and its files, with --annotations)"
        )
    root, notes = Path(root), Path(annotations or root)
    for folder in (root, notes):
        if not folder.is_dir():
            raise FileNotFoundError(f"--data {data}: there is no folder {folder}")

    folders = sorted(folders_below(notes, depth=2), key=lambda folder: len(folder.parts))

    def look(names):
        for name in names:
            found = [file for folder in folders for file in sorted(folder.glob(name.format(fold)))]
            if found:
                return found if "*" in name else found[:1]
        return []

    wanted, lists = {}, {}
    for split, names, use in (("train", source.train, 1), ("val", source.val, 2)):
        names = names.split() + list_names(source, split)
        files = look(names)
        if not files:
            known = ", ".join(name.format(fold) for name in names)
            raise FileNotFoundError(
                f"--data {data}: no annotations for {split}; looked in {notes} and below for {known}"
            )
        try:
            if files[0].name in list_names(source, split) and is_list(files[0]):
                lists[split] = files[0]
            elif source.read is hmdb:
                wanted[split] = [pair for file in files for pair in hmdb(file, use)]
            else:
                wanted[split] = list(source.read(files[0]))
        except (ValueError, KeyError, IndexError, TypeError) as e:
            raise ValueError(f"{files[0]} is not an annotation file of {data} as its site gives it ({e!r})") from e
    names = look(source.names.split())
    classes = class_names(names[0]) if names else None
    if lists and wanted:
        raise ValueError(f"--data {data}: {next(iter(lists.values()))} is a list, and the other split's file is not")
    if lists:
        found = list_files(lists["train"], lists["val"], root, min_classes=source.num_classes)
        classes = classes if classes and len(classes) == len(found.classes) else found.classes
        return found._replace(classes=classes, flip=source.flip)

    labels = {label for _, label in wanted["train"]}
    if all(isinstance(label, int) for label in labels):
        classes = [str(i) for i in range(max(source.num_classes, 1 + max(labels)))]
        number = {i: i for i in range(len(classes))}
    else:
        classes = classes or sorted(labels)
        number = {name: i for i, name in enumerate(classes)}
    videos = frame_folders(root, wanted["train"]) if source.read is something_v1 else video_files(root)
    splits, missing = {}, []
    for split, pairs in wanted.items():
        unknown = next((label for _, label in pairs if label not in number), None)
        if unknown is not None:
            raise ValueError(f"--data {data}: class {unknown!r} of {split} is not among the {len(classes)} classes")
        found = [(next(filter(None, map(videos.get, stems)), None), number[label]) for stems, label in pairs]
        splits[split] = Clips((path, label) for path, label in found if path)
        lack = len(found) - len(splits[split])
        if lack == len(found):
            raise FileNotFoundError(
                f"--data {data}: none of the {lack} videos of {split} is below {root}, {pairs[0][0][0]} for one"
            )
        if lack:
            missing.append(f"{split}: {lack:,} of {len(found):,} videos are not below {root}")
    return Data(**splits, test=[], classes=classes, flip=source.flip, missing=tuple(missing))


def is_list(file):
    """Whether it is a `path label` list, whose labels are numbers, and not an annotation file of the site."""
    with file.open(encoding="utf-8-sig") as lines:
        first = next((line.strip() for line in lines if line.strip()), "")
    return bool(re.search(r"[ ,\t]\d+$", first)) and ";" not in first


def video_files(root):
    """Every video below root by its name without the suffix: layouts differ (flat, by class, train/ and val/)."""
    videos = {}
    for folder, _, files in os.walk(root, followlinks=True):
        for file in files:
            stem, suffix = os.path.splitext(file)
            if suffix.lower() in VIDEO_SUFFIXES:
                videos[stem] = os.path.join(folder, file)
    return videos


def folders_below(root, depth):
    yield root
    for entry in os.scandir(root) if depth else ():
        if entry.is_dir():
            yield from folders_below(Path(entry.path), depth - 1)


def frame_folders(root, pairs):
    """The folders of frames by name; all lie beside the first ones, root/NAME or root/*/NAME."""
    for depth in (0, 1):
        parents = [p for p in folders_below(root, depth) if len(p.parts) == len(root.parts) + depth]
        for (name,), _ in pairs[:100]:
            for parent in parents:
                if (parent / name).is_dir():
                    return {entry.name: entry.path for entry in os.scandir(parent) if entry.is_dir()}
    return {}


VIDEO_SUFFIXES = set(
    [".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".wmv", ".flv", ".3gp", ".ogv"]
)


def class_folders(folder):
    """folder/train/CLASS/VIDEO and folder/val/CLASS/VIDEO (test/ too, if there); classes in alphabetical order."""
    if not (folder / "train").is_dir() or not (folder / "val").is_dir():
        lacking = "val" if (folder / "train").is_dir() else "train"
        raise FileNotFoundError(f"{folder} must hold train/CLASS/*.mp4 and val/CLASS/*.mp4; it has no {lacking}/")
    hidden = re.compile(r"\.|__MACOSX$")  # what desktops and notebooks leave behind
    classes = sorted(d.name for d in (folder / "train").iterdir() if d.is_dir() and not hidden.match(d.name))
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
        shown = {clip.label for clip in clips}
        empty = [name for label, name in enumerate(classes) if label not in shown]
        if empty and split == "train":
            raise ValueError(f"{folder / split / empty[0]} holds no video: add some, or remove the folder")
    return Data(**{split: Clips(clips) for split, clips in splits.items()}, classes=classes)


def list_files(train_list, val_list, root=None, min_classes=0):
    """List files, `path label` or `path,label` a line; paths may hold blanks, the label follows the last."""
    train = read_list(train_list, root)
    num_classes = max(1 + int(train.labels.max()), min_classes)
    val = read_list(val_list, root, num_classes)
    return Data(train, val, [], [str(i) for i in range(num_classes)])


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
        clips.append(Clip(path.strip(), int(label)))
    if not clips:
        raise ValueError(f"the list file {file} is empty")
    sample = clips[:: max(1, len(clips) // 100)]
    # The paths of a list start at its own folder or the root, or at a folder there, such as videos_train/.
    starts = [folder, *sorted(d for d in folder.iterdir() if d.is_dir())] if folder.is_dir() else [folder]
    start = next((d for d in starts if any((d / path).exists() for path, _ in sample)), None)
    if start is None:
        raise FileNotFoundError(f"no video of {file} is there, {folder / clips[0].path} for one; is --data-root right?")
    return Clips((os.path.join(start, path), label) for path, label in clips)


MINUTE = 60  # the longest that a video may take to be checked


def inspect(path):
    """Decodes a whole video -> (frames, "width x height", frames a second or 0, what is wrong or "")"""
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, too_long)
        signal.alarm(MINUTE)
    try:
        video = open_video(path)
        if isinstance(video, Frames):
            height, width = video.read(range(len(video))).shape[1:3]
            return len(video), f"{width} x {height}", 0, ""
        with video.open() as container:
            stream = video.stream(container)
            sizes = collections.Counter(f"{frame.width} x {frame.height}" for frame in container.decode(stream))
            rate = round(float(stream.average_rate or 0), 2)
        frames = sizes.total()
        lack = "" if frames == len(video) else f"{path}: damaged, {frames} of its {len(video)} frames can be decoded"
        return frames, sizes.most_common(1)[0][0] if sizes else "", rate, lack
    except (VideoError, av.FFmpegError, OSError, ValueError, MemoryError) as error:
        return 0, "", 0, str(error) if isinstance(error, VideoError) else f"{path}: damaged ({error})"
    finally:
        if hasattr(signal, "SIGALRM"):
            signal.alarm(0)


def too_long(*_):
    raise VideoError(f"decoding takes more than {MINUTE} s")


def inspect_all(paths, workers):
    """(path, `inspect`'s answer) for every path, in any order. A video that kills its process is found and survived."""
    for start in range(0, len(paths), 1024):
        lost = []
        with ProcessPoolExecutor(workers) as pool:
            jobs = {pool.submit(inspect, path): path for path in paths[start : start + 1024]}
            for job in as_completed(jobs):
                try:
                    yield jobs[job], job.result()
                except BrokenProcessPool:
                    lost.append(jobs[job])
        for path in lost:  # one of them did it: alone, each shows whether it was the one
            try:
                with ProcessPoolExecutor(1) as pool:
                    yield path, pool.submit(inspect, path).result()
            except BrokenProcessPool:
                yield path, (0, "", 0, f"{path}: kills the process that decodes it")


def check(args):
    """Reads every video of a dataset once -> how many are broken"""
    found = find_clips(args.data, args.data_root, args.val_data, args.annotations, args.fold)
    print(f"{args.data}: {len(found.classes)} classes", *found.missing, sep="\n")
    broken = []
    for split in SPLITS:
        paths = sorted({clip.path for clip in getattr(found, split)})
        if not paths:
            continue
        frames, sizes, rates = [], collections.Counter(), collections.Counter()
        answers = inspect_all(paths, args.workers)
        for path, (count, size, rate, problem) in tqdm(answers, total=len(paths), desc=split, dynamic_ncols=True):
            if problem:
                broken.append((path, problem))
            else:
                frames.append(count)
                sizes[size] += 1
                rates[rate] += 1
        print(f"{split}: {len(paths):,} videos, {len(paths) - len(frames):,} of them broken")
        if frames:
            print(f"  frames: {min(frames)} to {max(frames)}, median {int(np.median(frames))}")
            for what, counter in (("size", sizes), ("frames a second", rates)):
                common = ", ".join(f"{value} ({n:,})" for value, n in counter.most_common(4))
                print(f"  {what}: {common}{' ...' if len(counter) > 4 else ''}")
    if broken:
        args.out.write_text("".join(f"{os.path.abspath(path)}\n" for path, _ in broken), encoding="utf-8")
        print(f"{len(broken):,} broken videos, listed in {args.out}; train.py --skip {args.out} leaves them out:")
        print(*(f"  {problem}" for _, problem in broken[:10]), sep="\n")
    return len(broken)


def show(args):
    """Draws the T frames of a clip as in testing, then three times as in training."""
    augment = dict(crop=(0.08, 1.0), flip=0.5, randaugment=dict(num_ops=4, magnitude=7), erasing=0.25)
    clips, shape = [Clip(str(args.clip), 0)], dict(num_frames=args.frames, size=args.size, span=args.span)
    tested, _, problem = VideoDataset(clips, **shape)[0]
    if problem:
        raise VideoError(problem)
    trained = VideoDataset(clips, augment=augment, **shape)
    rows = [tested[0], *(trained[i][0] for i in range(3))]
    save_image(torch.cat(rows) / 255, args.out, nrow=args.frames, pad_value=1.0)
    print(f"{args.out}: {args.frames} frames as in testing, and three times as in training")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="data.py", description="Look at videos, one or all.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("check", help="read every video of a dataset once and say what is wrong")
    p.add_argument("--data", required=True, help=f"{', '.join(DATASETS)}, toy, a folder, or a list file")
    p.add_argument("--data-root", help="where its videos are")
    p.add_argument("--val-data", help="the list file to evaluate on, if --data is one")
    p.add_argument("--annotations", help="where its annotation files are (default: --data-root)")
    p.add_argument("--fold", type=int, choices=(1, 2, 3), default=1, help="of UCF101 and HMDB51 (default: 1)")
    p.add_argument("--out", type=Path, default=Path("broken.txt"), help="the list of broken ones (default: broken.txt)")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    p = commands.add_parser("show", help="draw the frames that a model would see")
    p.add_argument("clip", type=Path)
    p.add_argument("out", type=Path, help="the .png file to write")
    p.add_argument("--frames", type=int, default=8)
    p.add_argument("--size", type=int, default=224)
    p.add_argument("--span", type=int, default=0, help="video frames that a clip spans; 0: one from each of T segments")
    args = parser.parse_args(argv)
    try:
        {"check": check, "show": show}[args.command](args)
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\ndata.py: stopped")


if __name__ == "__main__":
    main()
