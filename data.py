"""Which frames of a video a model sees, what training does to their pixels, where the datasets are, and exact decoding.

The file follows a clip backwards, from the model to the disk: choosing frames (segments, strided), changing their
pixels (train_transform, spatial_views), clips as tensors (VideoDataset), datasets (find_clips), and last, because it is
the hardest, giving exactly the frames that were asked for (Video).

    python data.py check --data k400 --data-root /data/k400    reads every video once and says what is wrong
    python data.py show CLIP.mp4 frames.png                    draws the frames that a model would see
    python data.py shrink --data k400 --data-root SRC --out DST    videos of 256 pixels that decode fast
"""

import bisect
import csv
import json
import os
import re
import signal
from collections import namedtuple
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2


def segments(num_frames, T, rng=None, view=0, views=1):
    """One frame number from each of T equal segments of the video -> (T,)  (TSN, Wang et al., ECCV 2016)

    With `rng` the place in a segment is random, else it is place `view` of `views` evenly spread ones, the middle of 1.
    A video with fewer than T frames repeats some.
    """
    edges = np.linspace(0, num_frames, T + 1)
    place = rng.random(T) if rng is not None else (view + 0.5) / views
    return np.minimum(edges[:-1] + place * np.diff(edges), num_frames - 1).astype(int)


def strided(num_frames, T, stride, rng=None, view=0, views=1):
    """T frame numbers, `stride` apart -> (T,)

    With `rng` the start is random, else it is start `view` of `views` evenly spread ones: the centre for 1.
    A video that is too short repeats its last frame.
    """
    room = max(num_frames - (T - 1) * stride - 1, 0)
    place = 0.5 if views == 1 else view / (views - 1)
    start = rng.integers(room + 1) if rng is not None else int(place * room)
    return np.minimum(start + stride * np.arange(T), num_frames - 1)


def rand_augment(clip, operations, magnitude):
    """Random changes of colours and geometry (RandAugment, Cubuk et al., 2020): uint8 (T, 3, H, W) -> (T, 3, H, W)

    By torchvision's operations, as the released codes do it by timm's `rand-m{magnitude}-n{operations}-mstd0.5`:
    each operation happens with probability 1/2, and its magnitude, out of 10, is drawn from N(magnitude, 0.5).
    """
    for draw in torch.rand(operations).tolist():
        if draw < 0.5:
            drawn = min(max(magnitude + 0.5 * torch.randn(()).item(), 0), 10)
            clip = RandAugment(1, round(10 * drawn), num_magnitude_bins=101, fill=128)(clip)
    return clip


GEOMETRY = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


class RandAugment(v2.RandAugment):
    """torchvision's. A clip has the same pixels afterwards, but sooner."""

    def _apply_image_or_video_transform(self, clip, name, magnitude, interpolation, fill):
        apply = partial(super()._apply_image_or_video_transform, transform_id=name, magnitude=magnitude)
        if name == "Solarize":  # x -> 255 - x, all eight bits turned, from a brightness on
            return clip ^ (clip >= 255 * magnitude).view(torch.uint8).neg()
        if name not in GEOMETRY:
            # Sharpening is a convolution, which is fastest where the channels of a pixel lie side by side.
            layout = torch.channels_last if name == "Sharpness" else torch.contiguous_format
            return apply(clip.contiguous(memory_format=layout), interpolation=interpolation, fill=fill)
        # An image of the numbers of its pixels says where each pixel comes from, once for all frames and channels.
        T, C, H, W = clip.shape
        numbers = torch.arange(1.0, H * W + 1).view(1, H, W)  # 0 will stand for what lies outside
        source = apply(numbers, interpolation=interpolation, fill={torch.Tensor: 0}).long().flatten()  # H W
        pixels = v2.functional.pad(clip.permute(2, 3, 0, 1).reshape(1, H * W, T * C), [0, 1, 0, 0], fill=self.fill)[0]
        return pixels.index_select(0, source).T.reshape(clip.shape)


def train_transform(
    size, crop=(0.0, 0.0), short_side=(0.0, 0.0), flip=0.0, jitter=0.0, gray=0.0, randaugment=(0, 0.0), erasing=0.0
):
    """What training does to a clip -> a function of uint8 (T, 3, H, W) -> (T, 3, size, size), alike for all frames.

    crop            smallest and largest area of the random resized crop, as a share of the frame
    short_side      range of the short side, in units of `size`, before a random crop; without both, cut as in testing
    flip            how often a clip is mirrored; VideoDataset does it, because it may change the label
    jitter          how much brightness, contrast and saturation change
    gray, erasing   how often a clip loses its colours, or a random rectangle of it turns black
    randaugment     the number of operations, and their magnitude from 0 to 10
    """
    if any(crop) and any(short_side):
        raise ValueError("crop and short_side are two ways to cut a random square: give one of them")
    if any(crop):
        cut = v2.RandomResizedCrop(size, scale=crop)
    elif any(short_side):
        shortest, longest = (round(size * side) for side in short_side)
        cut = v2.Compose([v2.RandomShortestSize(list(range(shortest, longest + 1))), v2.RandomCrop(size)])
    else:
        cut = v2.Compose([v2.Resize(size), v2.CenterCrop(size)])
    color = v2.ColorJitter(brightness=jitter, contrast=jitter, saturation=jitter)
    augment = partial(rand_augment, operations=randaugment[0], magnitude=randaugment[1])
    return v2.Compose([cut, color, v2.RandomGrayscale(gray), augment, v2.RandomErasing(erasing)])


def spatial_views(clip, size, views=1):
    """Squares spread evenly along the long side, or the one at the centre: (T, 3, H, W) -> (views, T, 3, size, size)"""
    clip = v2.functional.resize(clip, [size])
    H, W = clip.shape[-2:]
    places = [0.5] if views == 1 else [view / (views - 1) for view in range(views)]
    corners = [(round((H - size) * place), round((W - size) * place)) for place in places]
    return torch.stack([v2.functional.crop(clip, top, left, size, size) for top, left in corners])


Clip = namedtuple("Clip", "path label")
TRIES = 16  # how many videos in a row may be broken before training gives up on an item
IGNORED = -100  # the label of what could not be read: torch's cross_entropy leaves it out


class VideoDataset(Dataset):
    """Clips as tensors. An item is (video, label, path, problem).

    Training (`augment` is a dict of keywords of train_transform): video is uint8 (T, 3, S, S).
    Testing (`augment` is None): video is uint8 (V, T, 3, S, S), with V = temporal views x spatial views.
    Items are numbered across the whole training: item i is clip i % len(self), drawn for the (i // len(self))-th time.
    The random choices depend on `seed` and i alone, whatever the number of loader workers.

    A video that cannot be read raises nothing: `problem` says why, and is "" when all is well. In training a random
    other video takes its place, with its own label and path. In testing, and after TRIES broken ones in a row, the
    pixels are zero and the label is IGNORED.

    num_frames, size: T and S.
    span: how many frames of the video a clip covers, T of which are read; 0: one from each of T segments of the video.
    flip: what a mirror image does to the labels: () nothing, {86: 87, 87: 86} swaps two; None: no clip is mirrored.
    keep: holds the decoded videos in memory; for small sets of tiny videos, without loader workers.
    """

    def __init__(self, clips, num_frames, size, span=0, views=(1, 1), augment=None, seed=0, keep=False, flip=()):
        self.clips, self.T, self.size, self.views, self.seed = clips, num_frames, size, views, seed
        self.sample = partial(strided, stride=max(span // num_frames, 1)) if span else segments
        self.transform = None if augment is None else train_transform(size, **augment)
        self.flip, self.flip_rate = dict(flip or ()), augment.get("flip", 0.0) if augment and flip is not None else 0.0
        self.kept = {} if keep else None

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        draw, asked = divmod(i, len(self.clips))
        seeds, problem = [self.seed, draw, asked], ""
        for attempt in range(TRIES if self.transform else 1):
            chosen = np.random.default_rng([*seeds, attempt]).integers(len(self.clips)) if attempt else asked
            path, label = self.clips[chosen]
            try:
                if self.transform is None:
                    return self.test_views(path), label, path, problem
                return *self.train_clip(path, label, np.random.default_rng(seeds)), path, problem
            except VideoError as error:
                problem = problem or str(error)
        views = () if self.transform else (self.views[0] * self.views[1],)
        nothing = torch.zeros(*views, self.T, 3, self.size, self.size, dtype=torch.uint8)
        return nothing, IGNORED, self.clips[asked].path, problem

    def train_clip(self, path, label, rng):
        frames = self.read(path, rng)  # (T, 3, H, W)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.default_generator.manual_seed(int(rng.integers(2**63)))
            frames = self.transform(frames)  # (T, 3, S, S)
        if rng.random() < self.flip_rate:
            return frames.flip(-1), self.flip.get(label, label)
        return frames, label

    def test_views(self, path):
        clips = self.read(path).split(self.T)  # one (T, 3, H, W) for each temporal view
        return torch.cat([spatial_views(clip, self.size, self.views[1]) for clip in clips])  # (V, T, 3, S, S)

    def read(self, path, rng=None):
        """The frames of a random clip, or without `rng` those of all temporal views -> uint8 (n, 3, H, W)"""
        # A random crop may take a part of a frame only. Twice the model's size leaves enough of it, and more is slower.
        keep, short_side = self.kept is not None, 2 * self.size
        video = self.kept[path] if keep and path in self.kept else open_video(path)
        if keep and path not in self.kept:
            video = self.kept[path] = video.read(range(len(video)), short_side)  # (all frames, H, W, 3)
        if rng is not None:
            numbers = self.sample(len(video), self.T, rng=rng)  # (T,)
        else:
            views = self.views[0]
            numbers = np.concatenate([self.sample(len(video), self.T, view=v, views=views) for v in range(views)])
        pixels = video[numbers] if keep else video.read(numbers, short_side)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)  # (n, H, W, 3) -> (n, 3, H, W)


def datasets(run, splits, split, size):
    """The training set and the testing set, over `split`, that the settings of a run describe -> two VideoDataset"""
    shape = dict(num_frames=run["num_frames"], size=size, span=run["span"], keep=splits.small)
    training = dict(augment=run["augment"], seed=run["seed"], flip=splits.flip)
    test_set = VideoDataset(getattr(splits, split), views=run["views"], **shape)
    return VideoDataset(splits.train, **training, **shape), test_set


def train_batches(run, num_clips, rank, size, epoch, step):
    """Yields the items of each forward pass of one process, from `step` of `epoch` to the end of the run.

    A step sees the same clips for any number of processes and of accumulated passes. The draws of repeated sampling
    (Hoffer et al., CVPR 2020) stand beside each other in a batch.
    """
    batch, shape = run["batch_size"], (-1, run["accumulate"], size, run["batch_size"] // (run["accumulate"] * size))
    for e in range(epoch, run["epochs"]):
        order = torch.randperm(num_clips, generator=torch.Generator().manual_seed(1_000_003 * run["seed"] + e))
        draws = e * run["repeat"] + torch.arange(run["repeat"])
        items = (order[:, None] + num_clips * draws).flatten()
        items = items[: len(items) // batch * batch].view(shape)[:, :, rank]  # steps x passes x clips
        for passes in items[step if e == epoch else 0 :].tolist():
            yield from passes


def loader(dataset, batches, workers):
    """A DataLoader of the items in `batches`, an iterable of lists; a small set in memory needs no other processes."""
    workers, pin = 0 if dataset.kept is not None else workers, torch.cuda.is_available()
    return DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, pin_memory=pin, worker_init_fn=outlive_a_signal
    )


GRACE = 600  # seconds that a loader's process lives after SIGTERM: the step, which may be long, still needs its batch


def outlive_a_signal(worker):
    """Ctrl-C and a scheduler's SIGTERM reach every process, but it is the training process that ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda signum, frame: os._exit(0))
    signal.signal(signal.SIGTERM, lambda signum, frame: signal.alarm(GRACE))


class Clips(Sequence):
    """A list of Clip as two arrays, which loader workers share; of 240,000 Python objects each would make a copy."""

    def __init__(self, clips):
        clips = list(clips)
        self.paths = np.array([os.fsencode(path) for path, _ in clips])
        self.labels = np.array([label for _, label in clips])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        return Clip(os.fsdecode(self.paths[i]), int(self.labels[i]))


@dataclass
class Data:
    """What `find_clips` found. A label is an index into `classes`.

    Of data for retrieval, it is the number of one of the video's captions: training has a clip for each pair of a video
    and a caption, val and test have one for each video.
    """

    train: Clips
    val: Clips
    test: Clips
    classes: list
    groups: dict = field(default_factory=dict)  # names of classes whose accuracy is reported by itself
    small: bool = False  # few and tiny videos, which can be kept in memory
    flip: dict | None = field(default_factory=dict)  # what a mirror image does to the labels, as in VideoDataset
    missing: tuple = ()  # one sentence for each split of which videos are missing
    captions: dict = field(default_factory=dict)  # for retrieval: path -> the captions of this video
    mirrors: dict = field(default_factory=dict)  # path -> that of the same video played backwards


def find_clips(data, root="", val_data="", annotations="", fold=1, skip=""):
    """The clips of a dataset -> Data. An empty string means "not given".

    data: "toy", a name of DATASETS, a folder with train/CLASS and val/CLASS, or a list file for training.
    root: where the videos of a named dataset are, at any depth; where toy is written; where the paths of a list start.
    val_data: the list file for evaluation, if `data` is a list file.
    annotations: where the annotation files of a named dataset are, if they are not below `root`.
    fold: which of the three splits of UCF101 and HMDB51.
    skip: a file of videos to leave out, one `path` or `path: why` per line.
    """
    classes, missing, source, more = [], (), DATASETS.get(data, Source()), {}
    if data in ("toy", "toy_captions"):
        from colab import toy

        listed = class_folders(toy.write_toy(Path(root or Path(__file__).resolve().parent / "datasets") / "toy"))
        more = dict(groups=toy.GROUPS, small=True, flip=None)
        if source.captions:
            listed, more["mirrors"] = toy.captioned(listed)
    elif data in DATASETS:
        listed, classes, missing = named_dataset(source, root, annotations, fold)
    elif os.path.isdir(data):
        listed = class_folders(Path(data))
    elif val_data:
        listed = {"train": list_file(Path(data), root), "val": list_file(Path(val_data), root)}
    else:
        known = ", ".join(["toy", *DATASETS])
        raise FileNotFoundError(f"--data {data}: neither {known} nor a folder; a list file needs --val-data as well")

    lines = Path(skip).read_text("utf-8", "surrogateescape").splitlines() if skip else []
    unwanted = {os.path.abspath(path) for line in lines for path in (line, line.partition(": ")[0])}
    if source.captions:
        clips, more["captions"] = captioned(listed)
    else:
        classes, clips = labelled(data, source, listed, classes)
    clips = {
        split: Clips(c for c in clips.get(split, ()) if os.path.abspath(c.path) not in unwanted) for split in SPLITS
    }
    return Data(**clips, classes=classes, missing=missing, **(dict(flip=source.flip) | more))


def captioned(listed):
    """-> {split: [Clip(path, number of the caption), ...]}, {path: its captions}; val and test have each video once"""
    clips, captions = {}, {}
    for split, pairs in listed.items():
        there = [(caption, path) for caption, path in pairs if path]
        for caption, path in there:
            captions.setdefault(path, []).append(caption)
        paths = dict.fromkeys(path for _, path in there)
        clips[split] = [Clip(p, k) for p in paths for k in range(len(captions[p]) if split == "train" else 1)]
    return clips, captions


def labelled(data, source, listed, classes):
    """The classes of `listed` are names, or numbers in a list file: they become labels -> names, clips by split"""
    names = {name for name, _ in listed["train"]}
    if isinstance(min(names), int):
        classes = classes or [str(i) for i in range(max(source.num_classes, 1 + max(names)))]
        label_of = {i: i for i in range(len(classes))}
    else:
        classes = classes or sorted(names)
        label_of = {name: i for i, name in enumerate(classes)}
    for split, pairs in listed.items():
        unknown = {name for name, _ in pairs} - label_of.keys()
        if unknown:
            raise ValueError(f"--data {data}: {split} has the class {unknown.pop()!r}, not one of the {len(classes)}")
    return classes, {split: [Clip(p, label_of[name]) for name, p in pairs if p] for split, pairs in listed.items()}


def class_folders(folder):
    """folder/train/CLASS/VIDEO, folder/val/CLASS/VIDEO, and test/ if it is there -> {split: [(class, path), ...]}"""
    listed = {}
    for split in SPLITS:
        places = [p for p in sorted((folder / split).glob("*")) if p.is_dir() and not p.name.startswith(HIDDEN)]
        listed[split] = [(place.name, path) for place in places for path in walk(place)[0]]
        if not listed[split] and split != "test":
            raise FileNotFoundError(f"no videos for {split}: {folder} must hold train/CLASS/*.mp4 and val/CLASS/*.mp4")
        empty = {place.name for place in places} - {name for name, _ in listed[split]}
        if empty and split == "train":
            raise ValueError(f"{folder / split / empty.pop()} holds no videos: add some, or remove the folder")
    return listed


def list_file(file, root):
    """A list file, whose paths start at the root (without one, at the list's folder), or at a folder in it."""
    pairs, start = list(read_list(file)), Path(root or file.parent)
    sample = pairs[:: max(1, len(pairs) // 100)]  # the first videos may be missing
    for folder in (start, *sorted(entry.path for entry in os.scandir(start) if entry.is_dir())):
        if any(os.path.exists(os.path.join(folder, path)) for _, path in sample):
            return [(label, os.path.join(folder, path)) for label, path in pairs]
    raise FileNotFoundError(f"{file}: none of its {len(pairs):,} videos exists below {start}; is --data-root right?")


def named_dataset(source, root, annotations, fold):
    """A dataset whose annotation files name videos, which lie anywhere below the root.

    -> {split: [(class, path or "" for a missing video), ...]}; the names of all classes, if a file has them; a sentence
    for each split that misses videos
    """
    videos, files = walk(root)
    files = walk(annotations)[1] if annotations else files
    path_of, listed, missing = {VIDEO.sub("", os.path.basename(path)): path for path in videos}, {}, []
    for split in SPLITS:
        own = getattr(source, split).format(fold).split()
        if not own and split == "test":
            continue
        lists = [f"{source.lists}_{split}_list_videos.txt", f"{split}.csv", f"{split}.txt", f"{split}_list.txt"]
        file = next((files[name] for name in [*own, *lists] if name in files), None)
        if file is None:
            where = annotations or root or "--data-root, which was not given"
            raise FileNotFoundError(f"no annotations for {split} below {where}: looked for {', '.join([*own, *lists])}")
        try:
            is_list = file.name in lists and re.search(r"[ ,\t]\d+$", lines_of(file)[0])
            read = read_list if is_list else source.read
            pairs = [(label, VIDEO.sub("", os.path.basename(name))) for label, name in read(file, split)]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{file} is not an annotation file as the dataset's site gives it ({error!r})") from error
        listed[split], names = [(label, path_of.get(name, "")) for label, name in pairs], {name for _, name in pairs}
        absent = names - path_of.keys()
        if absent == names:
            raise FileNotFoundError(f"none of the {len(names):,} videos that {file} names is below {root}")
        if absent:
            missing.append(f"{split}: {len(absent):,} of {len(names):,} videos are missing")
    names_file = next((files[name] for name in source.class_names.split() if name in files), None)
    return listed, class_names(names_file) if names_file else [], tuple(missing)


SPLITS = ("train", "val", "test")
VIDEO = re.compile(r"\.(mp4|m4v|mov|mkv|webm|avi|mpg|mpeg|ts|mts|wmv|flv|3gp|ogv)$", re.IGNORECASE)
HIDDEN = (".", "__MACOSX")  # how the names begin that desktops and notebooks leave in folders


def walk(root):
    """Looks through a folder, to any depth -> (paths of its videos in order, {name: path of the first such other file})

    A folder that holds .jpg files and no video files is one video, and is not searched further.
    """
    videos, others = [], {}
    for folder, folders, files in os.walk(root, followlinks=True):
        names = [name for name in files if not name.startswith(HIDDEN)]
        here = [name for name in names if VIDEO.search(name)]
        if not here and any(name.lower().endswith(".jpg") for name in names):
            videos.append(folder)
            folders.clear()  # os.walk then goes no deeper
            continue
        videos += [os.path.join(folder, name) for name in here]
        for name in set(names).difference(here):
            others.setdefault(name, Path(folder, name))
        folders[:] = sorted(name for name in folders if not name.startswith(HIDDEN))
    return sorted(videos), others


def video_files_in(places):
    """The paths of all videos in `places`: files, folders of .jpg frames, or folders that hold such at any depth."""
    found = []
    for place in map(str, places):
        videos = walk(place)[0] if os.path.isdir(place) else [place] if os.path.exists(place) else []
        if not videos:
            raise FileNotFoundError(f"{place}: there is no such file, or no video in this folder")
        found += videos
    return found


# The readers of annotation files. reader(file, split) yields the class of each video of the split, and the name of its
# file or folder, with or without a suffix. A class is a name, or a number from 0.


def lines_of(file):
    # Surrogates stand for the bytes of a name that is not UTF-8, so that its file is found all the same.
    return [line.strip() for line in file.read_text("utf-8-sig", "surrogateescape").splitlines() if line.strip()]


def read_list(file, split=None):
    """`path label` or `path,label` per line. A path may hold blanks: the label follows the last one."""
    for line in lines_of(file):
        found = re.fullmatch(r"(.*\S)\s*[ ,\t]\s*(\d+)", line)
        if not found:
            raise ValueError(f"{file}: expected `path label` with a number as label, found {line[:80]!r}")
        yield int(found[2]), found[1]


def kinetics(file, split):
    for row in csv.DictReader(lines_of(file)):  # label,youtube_id,time_start,time_end,split
        start, end = int(float(row["time_start"])), int(float(row["time_end"]))
        yield row["label"], f"{row['youtube_id']}_{start:06d}_{end:06d}"


def something_v2(file, split):
    for clip in json.loads(file.read_text("utf-8")):  # [{"id": "1", "template": "Holding [something]"}, ...]
        yield re.sub(r"[\[\]]", "", clip["template"]), str(clip["id"])


def something_v1(file, split):
    for line in lines_of(file):  # id;class
        yield line.split(";")[::-1]


def diving(file, split):
    for clip in json.loads(file.read_text("utf-8")):  # [{"vid_name": "a", "label": 0}, ...]
        yield int(clip["label"]), clip["vid_name"]


def ucf(file, split):
    for line in lines_of(file):  # CLASS/NAME.avi, in the training list followed by the class's number
        yield line.split()[0].split("/")


def hmdb(file, split):
    # `file` is the first class's; all lie beside it. NAME.avi, and what it is for: 1 training, 2 testing, 0 nothing.
    end = file.name.removeprefix("brush_hair")
    for one in sorted(file.parent.glob(f"*{end}")):
        for name, use in (line.rsplit(maxsplit=1) for line in lines_of(one)):
            if int(use) == {"train": 1, "val": 2}[split]:
                yield one.name.removesuffix(end), name


# For retrieval a video has captions in place of a class. They lie in files beside that which names the split's videos.


def msrvtt(file, split):
    rows = list(csv.DictReader(lines_of(file)))
    if "sentence" in rows[0]:  # key,vid_key,video_id,sentence: the list for testing has one caption for each video
        yield from ((row["sentence"], row["video_id"]) for row in rows)
        return
    whole, halves = "MSRVTT_data.json", ("train_val_videodatainfo.json", "test_videodatainfo.json")
    captions = {}
    for name in [whole] if file.with_name(whole).is_file() else halves:
        for sentence in json.loads(file.with_name(name).read_text("utf-8"))["sentences"]:
            captions.setdefault(sentence["video_id"], []).append(sentence["caption"])
    for row in rows:
        yield from ((caption, row["video_id"]) for caption in captions[row["video_id"]])


def msvd(file, split):
    captions = {}
    for line in lines_of(file.with_name("AllVideoDescriptions.txt")):  # id caption, below comments that begin with #
        name, _, caption = line.partition(" ")
        captions.setdefault(name, []).append(caption)
    for name in lines_of(file):
        yield from ((caption, name) for caption in captions[name])


def vatex(file, split):
    official, captions = file.suffix == ".json", {}
    for path in [file] if official else sorted(file.parent.glob("vatex*.json")):
        clips = json.loads(path.read_text("utf-8"))  # [{"videoID": id, "enCap": [...]}, ...], or {id: {"enCap": [...]}}
        clips = clips if isinstance(clips, dict) else {clip["videoID"]: clip for clip in clips}
        captions |= {name: clip.get("enCap", []) for name, clip in clips.items()}
    for name in captions if official else lines_of(file):
        yield from ((caption, name) for caption in captions[name])


@dataclass
class Source:
    """A dataset of the field. To add one, write a reader, and an entry of DATASETS."""

    read: Callable = None  # the reader of its annotation files
    train: str = ""  # what these may be called; {} stands for the fold
    val: str = ""
    class_names: str = ""  # what the file of class names may be called
    num_classes: int = 0
    lists: str = ""  # what its list files are called, before `_train_list_videos.txt`
    recipe: str = "k400"  # the dataset whose training settings are used
    sampling: dict = field(default_factory=dict)  # the settings that differ from them
    flip: dict | None = field(default_factory=dict)  # what a mirror image does to the labels, as in VideoDataset
    test: str = ""  # what the files of a third split may be called
    captions: bool = False  # for retrieval: the reader yields a caption in place of the class


UNIFORM = dict(span=0, views=(1, 1))  # one frame from each of T segments, and one test view
SIDES = {86: 87, 87: 86, 93: 94, 94: 93, 166: 167, 167: 166}  # left to right is right to left (ZeroI2V, released code)
SSV1, SSV2 = "something-something-v1", "something-something-v2"
DATASETS = {
    "k400": Source(kinetics, "kinetics_400_train.csv", "kinetics_400_val.csv validate.csv",
                   "kinetics_label_map_k400.txt", 400, "kinetics400"),
    "k700": Source(kinetics, "kinetics_700_train.csv", "kinetics_700_val.csv validate.csv",
                   "kinetics_label_map_k700.txt", 700, "kinetics700", "k700"),
    "ssv2": Source(something_v2, f"{SSV2}-train.json train.json", f"{SSV2}-validation.json validation.json",
                   f"{SSV2}-labels.json labels.json", 174, "sthv2", "ssv2", flip=SIDES),
    "ssv1": Source(something_v1, f"{SSV1}-train.csv", f"{SSV1}-validation.csv", "", 174, "sthv1", "ssv2", flip=None),
    "diving48": Source(diving, "Diving48_V2_train.json", "Diving48_V2_test.json",
                       "", 48, "diving48", "diving48", UNIFORM),
    "ucf101": Source(ucf, "trainlist0{}.txt", "testlist0{}.txt", "classInd.txt", 101, "ucf101", "ucf101", UNIFORM),
    "hmdb51": Source(hmdb, "brush_hair_test_split{}.txt", "brush_hair_test_split{}.txt",
                     "", 51, "hmdb51", "hmdb51", UNIFORM),
    "msrvtt": Source(msrvtt, "MSRVTT_train.9k.csv MSRVTT_train.7k.csv", "MSRVTT_JSFUSION_test.csv",
                     recipe="msrvtt", captions=True),  # the split 1k-A: val is what papers test on
    "msvd": Source(msvd, "train_list.txt", "val_list.txt", test="test_list.txt", recipe="msrvtt", captions=True),
    "vatex": Source(vatex, "train_list.txt vatex_training_v1.0.json", "val_list.txt vatex_validation_v1.0.json",
                    test="test_list.txt vatex_public_test_english_v1.1.json", recipe="msrvtt", captions=True),
    "toy_captions": Source(captions=True),
}  # fmt: skip


def class_names(file):
    """The names of a file: JSON {name: number}, or one name per line, after its number or without it."""
    if file.suffix == ".json":
        numbers = json.loads(file.read_text("utf-8"))
        return sorted(numbers, key=lambda name: int(numbers[name]))
    return [re.sub(r"^\d+ ", "", line) for line in lines_of(file)]


class VideoError(ValueError):
    """A video cannot give the frames that were asked for; the text says which video, and why."""


@contextmanager
def one_error(path, what):
    """Makes a VideoError of whatever goes wrong inside: damaged bytes can bring any error out of any line below."""
    try:
        yield
    except VideoError:
        raise
    except Exception as error:
        raise VideoError(f"{path}: {what} ({type(error).__name__}: {error})") from error


def open_video(path):
    with one_error(path, "cannot be opened as a video"):
        return FrameFolder(path) if os.path.isdir(path) else Video(path)


class FrameFolder:
    """A video that is a folder of JPEG frames, 00001.jpg, 00002.jpg, ...; it is read like Video."""

    def __init__(self, path):
        names = [name for name in os.listdir(path) if name.lower().endswith(".jpg")]
        names.sort(key=lambda name: (len(name), name))  # 10.jpg comes after 9.jpg
        self.path, self.files = path, [os.path.join(path, name) for name in names]
        if not names:
            raise VideoError(f"{path}: the folder holds no .jpg frames")

    def __len__(self):
        return len(self.files)

    def read(self, numbers, short_side=None):
        with one_error(self.path, "damaged"):
            return np.stack([Video(self.files[n]).read([0], short_side)[0] for n in numbers])


# These containers store when a frame is shown; others, AVI above all, when it is decoded. The two differ with B-frames,
# which also refer to a later frame, so that the later one is decoded first.
STORES_PRESENTATION_TIMES = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts", "flv"}


class Video:
    """A video file whose frames are read by number. Frame i is the i-th that a player shows.

    A file is a sequence of packets, one compressed frame each, in the order of decoding. Most frames store only what
    changed; decoding can start at a keyframe, which stands for itself. Opening lists the packets' times. Sorted, they
    number the frames, and tell from which keyframe to decode. Where they cannot be trusted (no presentation times,
    missing or equal ones, no keyframe, a decoder that disagrees) frames are decoded from the first one on, and counted.
    """

    def __init__(self, path):
        self.path, self.reformatter = path, VideoReformatter()  # one for all frames, because setting it up takes time
        if not os.path.isfile(path):
            raise VideoError(f"{path}: there is no such file")
        with self.open() as container:
            streams = container.streams.video
            packets = [p for p in container.demux(video=0) if p.size and not p.is_discard] if streams else []
            if not packets:
                raise VideoError(f"{path}: the file holds no video")
            times, keys = [p.pts for p in packets], [p.pts for p in packets if p.is_keyframe]
            shown = not streams[0].codec_context.has_b_frames or container.format.name in STORES_PRESENTATION_TIMES
        self.num_frames, self.times, self.keyframes = len(packets), None, [0]  # no times: the frames must be counted
        if shown and keys and None not in times and len(set(times)) == len(times):
            self.times = sorted(times)
            self.keyframes = sorted({0, *(bisect.bisect_left(self.times, time) for time in keys)})

    def __len__(self):
        return self.num_frames

    def read(self, numbers, short_side=None):
        """Frames by number, in any order, repeated at will -> uint8 (n, H, W, 3), RGB, upright. Raises VideoError.

        Frames whose short side is longer than `short_side` are scaled down to it while they are converted to RGB.
        """
        wanted = sorted({int(n) for n in numbers})
        if wanted[0] < 0 or wanted[-1] >= len(self):
            raise VideoError(f"{self.path}: frames {wanted[0]} to {wanted[-1]} were asked for, it has {len(self)}")
        with one_error(self.path, "damaged"):
            frames = self.decode(wanted, short_side)
            if len(frames) < len(wanted):
                raise VideoError(f"{self.path}: damaged, not all of its {len(self)} frames can be decoded")
            return np.stack([frames[int(n)] for n in numbers])

    def decode(self, wanted, short_side):
        """Decodes from the last keyframe before each wanted frame, or goes on from the one before -> {number: pixels}

        On the way, frames to which no other refers are left out: half of them, in a usual H.264 file.
        """
        number = {time: i for i, time in enumerate(self.times or ())}
        wanted_times = {self.times[n] for n in wanted} if self.times else ()
        frames, sizes, position = {}, set(), -1  # position: the number of the last decoded frame
        with self.open() as container:

            def decoded():
                for packet in container.demux(video=0):
                    skip = self.times and packet.pts not in wanted_times
                    packet.stream.codec_context.skip_frame = "NONREF" if skip else "DEFAULT"
                    yield from packet.decode()

            decoder = decoded()
            for n in wanted:
                key = self.keyframes[bisect.bisect_right(self.keyframes, n) - 1]
                if key > position + 1:
                    container.seek(self.times[key], stream=container.streams.video[0])
                    decoder, position = decoded(), -1
                for frame in decoder:
                    reached = number.get(frame.pts, -1) if self.times else position + 1
                    if reached <= position or reached > n:  # out of order, or the seek ended after the frame
                        self.times, self.keyframes = None, [0]
                        return self.decode(wanted, short_side)
                    position = reached
                    if reached == n:
                        frames[n] = self.upright_rgb(frame, short_side)
                        sizes.add((frame.width, frame.height))
                        break
        if len(sizes) > 1:
            raise VideoError(f"{self.path}: its frames differ in size")
        return frames

    def upright_rgb(self, frame, short_side):
        """av.VideoFrame -> uint8 (H, W, 3), turned as the file's rotation says"""
        scale = min(1, (short_side or np.inf) / min(frame.width, frame.height))
        size = dict(width=round(frame.width * scale), height=round(frame.height * scale))
        pixels = self.reformatter.reformat(frame, format="rgb24", **size).to_ndarray()
        return np.rot90(pixels, round(frame.rotation / 90) % 4)

    def open(self):
        # A title in another encoding is no reason to refuse a file. PyAV 19 dropped the keyword.
        lenient = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
        container = av.open(str(self.path), **lenient)
        for stream in container.streams.video:
            stream.codec_context.thread_count = 1  # loader workers already fill the cores
        return container


if __name__ == "__main__":
    from colab.videos import main

    main()
