"""Exact decoding, sampling, augmentation, datasets, and what becomes of broken videos."""

import json
import re
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import data
from colab import toy
from colab.toy import write_video
from data import Clip, Video, VideoDataset, VideoError, find_clips, segments, strided

VIDEOS = Path(__file__).parent / "videos"
REFERENCE = json.loads((VIDEOS / "reference.json").read_text())
RNG = np.random.default_rng(0)


def noise(frames=20, height=48, width=64, seed=0):
    """Frames that all differ, smooth enough for a codec."""
    rng = np.random.default_rng(seed)
    small = torch.from_numpy(rng.uniform(0, 255, (frames, 3, 4, 4)))
    return torch.nn.functional.interpolate(small, (height, width)).permute(0, 2, 3, 1).numpy().astype(np.uint8)


def tile_means(frame):
    rows = np.array_split(frame, 4)
    return np.array([[tile.reshape(-1, 3).mean(0) for tile in np.array_split(row, 4, axis=1)] for row in rows])


@pytest.mark.parametrize("name", REFERENCE)
def test_frames_are_those_of_ffmpeg(name):
    """Number, size upright, and pixels, to 2 grey levels: H.264, HEVC, MPEG-4; mp4, mkv, avi, mov; one is rotated."""
    video, expected = Video(VIDEOS / name), REFERENCE[name]
    assert len(video) == expected["frames"]
    numbers = [int(n) for n in expected["mean_rgb_4x4"]]
    frames = video.read(numbers)
    assert frames.shape == (len(numbers), expected["height"], expected["width"], 3)
    for frame, tiles in zip(frames, expected["mean_rgb_4x4"].values()):
        assert np.abs(tile_means(frame) - np.array(tiles)).max() <= 2


@pytest.mark.parametrize(("name", "step"), [("h265_video.mp4", 1), ("mm_test.avi", 13), ("flipping_a_pancake.mkv", 41)])
def test_a_frame_read_alone_is_the_frame_read_in_sequence(name, step):
    video = Video(VIDEOS / name)
    all_frames = video.count(range(len(video)))
    for n in range(0, len(video), step):
        assert np.array_equal(video.read([n])[0], all_frames[n])


def test_frames_come_in_the_order_asked_for_with_repeats():
    video = Video(VIDEOS / "h265_video.mp4")
    frames = video.read([7, 2, 7, 0])
    assert np.array_equal(frames[0], frames[2]) and not np.array_equal(frames[0], frames[1])
    assert np.array_equal(frames[3], video.read([0])[0])


def test_a_late_frame_is_reached_by_a_seek(monkeypatch):
    """The last of 280 frames costs its group of pictures, not the whole file."""
    video, decoded = Video(VIDEOS / "arm_wrestling.mp4"), []
    open_file = av.open

    class Counting:
        """The container, counting the packets that are decoded."""

        def __init__(self, *args, **kwargs):
            self.container = open_file(*args, **kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.container.close()

        def demux(self, stream):
            for packet in self.container.demux(stream):
                decoded.append(packet.pts)
                yield packet

        def __getattr__(self, name):
            return getattr(self.container, name)

    monkeypatch.setattr(av, "open", Counting)
    last = video.keyframes[-1]
    assert video.read([279]).shape == (1, 256, 340, 3) and 100 < last < 279
    assert len(decoded) <= 281 - last
    decoded.clear()
    video.read([5, 3])
    assert 6 <= len(decoded) <= 12  # B-frames follow the frames they refer to


@pytest.mark.parametrize(
    ("codec", "suffix", "pixels"),
    [
        ("libx264", "mp4", "yuv420p"),
        ("libx264", "mkv", "yuv444p"),
        ("libx265", "mp4", "yuv420p10le"),
        ("mpeg4", "avi", "yuv420p"),
        ("libvpx-vp9", "webm", "yuv420p"),
        ("mjpeg", "mov", "yuvj420p"),
    ],
)
def test_containers_and_codecs_in_the_wild(tmp_path, codec, suffix, pixels):
    frames, path = noise(), tmp_path / f"clip.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options={"crf": "10", "qscale": "2", "g": "5"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, pixels
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    video = Video(path)
    assert len(video) == 20
    for n in (0, 19, 7, 12):
        error = np.abs(video.read([n])[0].astype(int) - frames).mean(axis=(1, 2, 3))
        assert error.argmin() == n and error[n] < 15  # another frame differs by 60 and more


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nothing.mp4", "no such file"),
        ("empty.mp4", "cannot be opened"),
        ("text.mp4", "cannot be opened"),
        ("sound.mp4", "no video stream"),
    ],
)
def test_what_is_no_video_says_so(tmp_path, name, says):
    path = tmp_path / name
    if name == "empty.mp4":
        path.touch()
    elif name == "text.mp4":
        path.write_text("this is no video\n" * 100)
    elif name == "sound.mp4":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=16000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
    with pytest.raises(VideoError, match=f"{name}.*{says}"):
        Video(path)


def test_damaged_videos_give_frames_or_one_clear_error(tmp_path):
    damaged = Video(VIDEOS / "corrupted.mp4")
    assert damaged.read([0, 5]).shape == (2, 720, 1280, 3)
    with pytest.raises(VideoError, match="damaged"):
        damaged.read([49])
    whole = (VIDEOS / "mm_test.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VideoError, match=r"cut\.mp4"):
        video = Video(tmp_path / "cut.mp4")
        video.read([len(video) - 1])
    with pytest.raises(VideoError, match="frame 300 asked for, the video has 300"):
        Video(VIDEOS / "mm_test.mp4").read([300])


def test_frames_that_differ_in_size_are_one_clear_error(tmp_path):
    for name, size in (("a", 48), ("b", 64)):
        write_video(tmp_path / f"{name}.ts", noise(10, size, size))
    (tmp_path / "both.ts").write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    video = Video(tmp_path / "both.ts")
    with pytest.raises(VideoError, match=r"both\.ts: its frames differ in size|both\.ts: damaged"):
        video.read([0, len(video) - 1])


def test_a_title_in_another_encoding_is_no_reason_to_refuse(tmp_path):
    path = tmp_path / "title.avi"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "Caf-title"
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for frame in noise(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes().replace(b"Caf-title", b"Caf\xe9title"))
    assert len(Video(path)) == 4


def test_segments_take_one_frame_from_each_part():
    assert segments(16, 8).tolist() == [1, 3, 5, 7, 9, 11, 13, 15]
    assert segments(80, 8).tolist() == [5, 15, 25, 35, 45, 55, 65, 75]
    assert segments(8, 8).tolist() == list(range(8))
    draws = np.array([segments(80, 8, rng=RNG) for _ in range(500)])
    assert (draws // 10 == np.arange(8)).all()
    assert all(set(draws[:, t] % 10) == set(range(10)) for t in range(8))
    assert [segments(80, 8, view=v, views=2).tolist()[0] for v in (0, 1)] == [2, 7]


def test_strided_clips_start_anywhere_in_training_and_spread_out_in_testing():
    assert strided(300, 8, 16).tolist() == list(range(93, 93 + 8 * 16, 16))
    assert [strided(300, 8, 16, view=v, views=3)[0] for v in range(3)] == [0, 93, 187]
    starts = {strided(20, 4, 4, rng=RNG)[0] for _ in range(500)}
    assert starts == set(range(8))
    assert strided(20, 8, 4).tolist() == [0, 4, 8, 12, 16, 19, 19, 19]  # too short: the last frame again


AUGMENT = dict(crop=(0.3, 1.0), flip=0.5, gray=0.2, randaugment=dict(num_ops=2, magnitude=7), erasing=0.5)


def test_every_frame_of_a_clip_is_augmented_alike():
    frame = torch.from_numpy(noise(1)).permute(0, 3, 1, 2)
    for seed in range(20):
        torch.manual_seed(seed)
        clip = data.train_transform(32, AUGMENT)(frame.expand(8, -1, -1, -1))
        assert clip.shape == (8, 3, 32, 32) and clip.dtype == torch.uint8
        assert (clip == clip[0]).all()


def test_test_views_cut_the_long_side():
    clip = torch.arange(64, dtype=torch.uint8).expand(4, 3, 32, 64)  # each column holds its own number
    views = data.spatial_views(clip, 32, 3)
    assert views.shape == (3, 4, 3, 32, 32)
    assert [int(view[0, 0, 0, 0]) for view in views] == [0, 16, 32]
    assert int(data.spatial_views(clip, 32, 1)[0, 0, 0, 0, 0]) == 16
    assert torch.equal(data.test_transform(32)(clip), data.spatial_views(clip, 32, 1)[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes, train and val, real H.264 files of different sizes."""
    root = tmp_path_factory.mktemp("videos")
    for split, number in (("train", 4), ("val", 2)):
        for c, name in enumerate(("riding a bike", "surfing")):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                write_video(root / split / name / f"{i}.mp4", noise(12 + i, 48, 64 + 16 * i, seed=10 * c + i))
    return root


def test_a_folder_of_class_folders(folder):
    found = find_clips(str(folder))
    assert found.classes == ["riding a bike", "surfing"]
    assert [len(found.train), len(found.val), len(found.test)] == [8, 4, 0]
    assert {clip.label for clip in found.train} == {0, 1} and "surfing" in found.train[-1].path


def test_list_files_with_blanks_tabs_and_commas(folder, tmp_path):
    train, val = tmp_path / "train.txt", tmp_path / "val.txt"
    train.write_text("train/riding a bike/0.mp4 0\ntrain/surfing/0.mp4\t1\n\ntrain/surfing/1.mp4,1\n")
    val.write_text("val/riding a bike/0.mp4 0\n")
    found = find_clips(str(train), folder, str(val))
    assert [clip.label for clip in found.train] == [0, 1, 1] and len(found.classes) == 2
    assert found.train[0].path == str(folder / "train/riding a bike/0.mp4")


@pytest.mark.parametrize(
    ("train", "val", "says"),
    [
        ("train/surfing/0.mp4 0\n", "val/surfing/0.mp4 1\n", r"val.txt, line 1: label 1 is outside the 1 classes"),
        ("train/surfing/0.mp4 0\ntrain/surfing/1.mp4 surfing\n", "", r"train.txt, line 2: expected `path label`"),
        ("", "", "train.txt is empty"),
        ("elsewhere/0.mp4 0\n", "", "is --data-root right"),
    ],
)
def test_list_files_that_are_wrong_say_where(folder, tmp_path, train, val, says):
    (tmp_path / "train.txt").write_text(train)
    (tmp_path / "val.txt").write_text(val)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        find_clips(str(tmp_path / "train.txt"), folder, str(tmp_path / "val.txt"))


def test_folders_and_names_that_are_wrong_say_so(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="unknown data 'kinetics'"):
        find_clips("kinetics")
    with pytest.raises(FileNotFoundError, match="it has no train/"):
        find_clips(str(tmp_path))
    for split in ("train", "val"):
        (tmp_path / split / "surfing").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no videos in the class folders"):
        find_clips(str(tmp_path))
    with pytest.raises(ValueError, match="--val-data"):
        (tmp_path / "train.txt").write_text("a.mp4 0\n")
        find_clips(str(tmp_path / "train.txt"))
    (tmp_path / "train" / "surfing" / "0.mp4").touch()
    (tmp_path / "val" / "sailing").mkdir()
    (tmp_path / "val" / "sailing" / "0.mp4").touch()
    with pytest.raises(ValueError, match="sailing is a class that"):
        find_clips(str(tmp_path))


def test_clips_depend_on_seed_epoch_and_number_alone(folder):
    def epoch(workers, epoch=0, seed=0, keep=False):
        dataset = VideoDataset(find_clips(str(folder)).train, 4, 32, augment=AUGMENT, seed=seed, keep=keep)
        dataset.epoch = epoch
        return torch.cat([video for video, _, _ in DataLoader(dataset, 3, num_workers=workers)])

    expected = epoch(0)
    assert expected.shape == (8, 4, 3, 32, 32) and expected.dtype == torch.uint8
    assert torch.equal(expected, epoch(2)) and torch.equal(expected, epoch(0, keep=True))
    assert not torch.equal(expected, epoch(0, epoch=1)) and not torch.equal(expected, epoch(0, seed=1))


def test_testing_gives_all_views_in_order(folder):
    clips = find_clips(str(folder)).val
    video, label, problem = VideoDataset(clips, 4, 32, span=8, views=(2, 3))[0]
    assert video.shape == (6, 4, 3, 32, 32) and (label, problem) == (0, "")
    one = VideoDataset(clips, 4, 32, span=8, views=(2, 1))[0][0]
    assert torch.equal(video[1], one[0]) and torch.equal(video[4], one[1])


def test_broken_videos_are_replaced_in_training_and_left_out_of_testing(folder, tmp_path):
    (tmp_path / "broken.mp4").write_text("broken")
    write_video(tmp_path / "short.mp4", noise(3))
    clips = [
        Clip(str(tmp_path / "broken.mp4"), 1),
        Clip(str(tmp_path / "short.mp4"), 1),
        *find_clips(str(folder)).train[:1],
    ]
    training = VideoDataset(clips, 4, 32, augment={})
    video, label, problem = training[0]
    assert label == 0 and "broken.mp4" in problem and torch.equal(video, training[0][0])
    assert "too short: 3 frames, the model reads 4" in training[1][2] and training[2][2] == ""
    clips[1:2] = [Clip(str(VIDEOS / "corrupted.mp4"), 1)]
    training = VideoDataset(clips, 16, 32, augment={})
    problems = set()
    for training.epoch in range(4):
        problems.add(training[1][2])
    assert len(problems) == 1 and "corrupted.mp4: damaged" in problems.pop()  # whichever frames were drawn
    clips[1:2] = [Clip(str(tmp_path / "short.mp4"), 1)]
    testing = VideoDataset(clips, 4, 32)
    assert [testing[i][1] for i in range(3)] == [-1, -1, 0] and "short.mp4" in testing[1][2]
    hopeless = VideoDataset(clips[:2], 4, 32, augment={})[0]
    assert hopeless[0].shape == (4, 3, 32, 32) and hopeless[1] == -1 and "broken.mp4" in hopeless[2]


def test_toy_classes_are_mirrors_in_time():
    mirrored = {**toy.PAIRS, **{b: a for a, b in toy.PAIRS.items()}}
    assert sorted(mirrored) == sorted(name for group in toy.GROUPS.values() for name in group)
    for seed in range(5):
        ((x, _, _),) = toy.motion("moves right", np.random.default_rng(seed))
        assert (np.diff(x) > 0).all() and x[0] > 0 and x[-1] < toy.SIZE
        ((_, y, _),) = toy.motion("moves down", np.random.default_rng(seed))
        assert (np.diff(y) > 0).all()
        ((_, _, r),) = toy.motion("grows", np.random.default_rng(seed))
        assert (np.diff(r) > 0).all()
        (x1, y1, _), (x2, y2, _) = toy.motion("two part", np.random.default_rng(seed))
        assert (np.diff(np.hypot(x1 - x2, y1 - y2)) > 0).all()


def test_no_frame_tells_jumping_from_resting():
    """At every time the place has one distribution, so that each frame is as likely under the mirror class; twice as many
    neighbouring frames differ in the first half as in the second."""
    paths = [toy.motion("jumps then rests", np.random.default_rng(i))[0][:2] for i in range(4000)]
    places = np.array(paths)  # 4000 x 2 x T
    for moment in (places.mean(axis=0), (places**2).mean(axis=0) ** 0.5):
        assert np.ptp(moment, axis=1).max() < 1.5
    moved = (np.diff(places, axis=2) != 0).any(axis=1).mean(axis=0)
    assert moved[[1, 3, 5, 7]].min() > 0.99 and moved[8:].max() == 0


def test_toy_is_written_as_videos_with_each_clip_beside_its_mirror(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "CLIPS", {"train": 20, "val": 10, "test": 10})
    found = find_clips("toy", tmp_path)
    assert [len(found.train), len(found.val), len(found.test)] == [20, 10, 10] and len(found.classes) == 10
    for name, mirror in toy.PAIRS.items():
        for path in sorted((tmp_path / "toy" / "train" / name).iterdir()):
            forward, backward = (
                Video(p).read(range(16)).astype(int) for p in (path, tmp_path / "toy/train" / mirror / path.name)
            )
            assert np.abs(forward - backward[::-1]).mean() < 0.7 * np.abs(forward - backward).mean()
    first = (tmp_path / "toy/val/grows").iterdir().__next__().stat()
    assert find_clips("toy", tmp_path).val == found.val and first.st_size > 500
    assert (tmp_path / "toy/train/grows/0002.mp4").read_bytes() != (tmp_path / "toy/val/grows/0002.mp4").read_bytes()


def test_damaged_copies_give_frames_or_one_clear_error_in_their_own_process():
    clips = [VIDEOS / name for name in ("h265_video.mp4", "video_0.mov", "unordered.mov", "corrupted.mp4")]
    command = [sys.executable, Path(__file__).parent / "damage.py", VIDEOS / "mm_test.avi", *clips, "--copies", "108"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert float(re.search(r"grew by (-?[\d.]+) MB", done.stdout)[1]) < 32
