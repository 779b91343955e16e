"""Exact decoding, sampling, augmentation, clips as tensors, the toy world, and what becomes of broken videos."""

import json
import re
import subprocess
import sys
from pathlib import Path

import av
import damage
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import data
from colab import toy, videos
from colab.toy import write_video
from data import IGNORED, Clip, Clips, VideoDataset, VideoError, find_clips, open_video, segments, strided

VIDEOS = Path(__file__).parent / "videos"
REFERENCE = json.loads((VIDEOS / "reference.json").read_text())


def noise(frames=20, height=48, width=64, seed=0):
    """Frames that all differ, smooth enough for a codec."""
    rng = np.random.default_rng(seed)
    small = torch.from_numpy(rng.uniform(0, 255, (frames, 3, 4, 4)))
    return torch.nn.functional.interpolate(small, (height, width)).permute(0, 2, 3, 1).numpy().astype(np.uint8)


def encode(path, frames, codec, pixels="yuv420p", times=None, title="", **options):
    """Writes frames with a codec; times: the presentation times of the packets, if not 0, 1, 2, ..."""
    with av.open(str(path), "w") as container:
        container.metadata["title"] = title
        stream = container.add_stream(codec, rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        packets = [p for f in frames for p in stream.encode(av.VideoFrame.from_ndarray(f, format="rgb24"))]
        packets += stream.encode()
        for packet, time in zip(packets, times or [packet.pts for packet in packets]):
            packet.pts = time
            container.mux(packet)
    return path


def in_sequence(path):
    """All frames of a file, decoded from the first on, whatever their times."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def tile_means(frame):
    rows = np.array_split(frame, 4)
    return np.array([[tile.reshape(-1, 3).mean(0) for tile in np.array_split(row, 4, axis=1)] for row in rows])


@pytest.mark.parametrize("name", REFERENCE)
def test_frames_are_those_of_ffmpeg(name):
    """Number, size upright, and pixels, to 2 grey levels: H.264, HEVC, MPEG-4; mp4, mkv, avi, mov; one is rotated."""
    video, expected = open_video(VIDEOS / name), REFERENCE[name]
    assert len(video) == expected["frames"]
    numbers = [int(n) for n in expected["mean_rgb_4x4"]]
    frames = video.read(numbers)
    assert frames.shape == (len(numbers), expected["height"], expected["width"], 3)
    for frame, tiles in zip(frames, expected["mean_rgb_4x4"].values()):
        assert np.abs(tile_means(frame) - np.array(tiles)).max() <= 2


@pytest.mark.parametrize(("name", "step"), [("h265_video.mp4", 1), ("mm_test.avi", 13), ("flipping_a_pancake.mkv", 41)])
def test_a_frame_read_alone_is_the_frame_read_in_sequence(name, step):
    frames = in_sequence(VIDEOS / name)
    for n in range(0, len(frames), step):
        assert np.array_equal(open_video(VIDEOS / name).read([n])[0], frames[n])


def test_frames_come_in_the_order_asked_for_with_repeats():
    video = open_video(VIDEOS / "h265_video.mp4")
    frames = video.read([7, 2, 7, 0])
    assert np.array_equal(frames[0], frames[2]) and not np.array_equal(frames[0], frames[1])
    assert np.array_equal(frames[3], video.read([0])[0])


class Watched:
    """An open container that notes the packets that are decoded, and how many frames they give."""

    late = 0  # how much later than asked for a seek lands

    def __init__(self, *args, **kwargs):
        self.container = Watched.open(*args, **kwargs)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        Watched.threads = self.container.streams.video[0].codec_context.thread_count
        self.container.close()

    def demux(self, **which):
        for packet in self.container.demux(**which):
            self.packet = packet
            yield self

    def decode(self):
        Watched.packets.append(self.packet.pts)
        frames = self.packet.decode()
        Watched.frames += len(frames)
        return frames

    def seek(self, time, **how):
        self.container.seek(time + Watched.late, **how)

    def __getattr__(self, name):
        return getattr(self.packet if name in ("pts", "stream", "size") else self.container, name)


@pytest.fixture
def watched(monkeypatch):
    monkeypatch.setattr(Watched, "open", av.open, raising=False)
    monkeypatch.setattr(Watched, "packets", [], raising=False)
    monkeypatch.setattr(Watched, "frames", 0, raising=False)
    yield Watched
    Watched.late = 0


def test_a_late_frame_costs_its_group_of_pictures_and_no_more(watched, monkeypatch):
    """The last of 280 frames is reached by a seek, on one thread; frames to which no other refers are left out."""
    video = open_video(VIDEOS / "arm_wrestling.mp4")
    monkeypatch.setattr(av, "open", watched)
    last = video.keyframes[-1]
    assert video.read([279]).shape == (1, 256, 340, 3) and 100 < last < 279
    assert len(watched.packets) <= 281 - last and watched.frames < 0.8 * (280 - last) and watched.threads == 1
    watched.packets.clear()
    video.read([5, 3])
    assert 6 <= len(watched.packets) <= 12  # B-frames follow the frames they refer to


def test_a_seek_that_lands_too_late_gives_the_right_frame_all_the_same(watched, monkeypatch):
    video, expected = open_video(VIDEOS / "arm_wrestling.mp4"), open_video(VIDEOS / "arm_wrestling.mp4").read([200])
    monkeypatch.setattr(av, "open", watched)
    watched.late = video.times[video.keyframes[-1]] - video.times[200]
    assert video.keyframes[-1] > 200 > video.keyframes[1] > 0
    assert np.array_equal(video.read([200]), expected)


@pytest.mark.parametrize("numbers", [[2], [3, 4], [3, 5, 7]])
def test_where_frames_do_not_come_in_the_order_of_their_times_they_are_counted(tmp_path, numbers):
    """Frames 2 and 3 have each other's time, which the decoder does not sort."""
    times = [10, 11, 13, 12, *range(14, 30)]
    path = encode(tmp_path / "swapped.mkv", noise(), "mpeg4", times=[100 * time for time in times], qscale="2", g="30")
    video = open_video(path)
    assert video.times and video.keyframes[1] > 7
    expected = in_sequence(path)
    assert all(np.array_equal(frame, expected[n]) for frame, n in zip(video.read(numbers), numbers))


def test_a_file_in_which_no_packet_is_a_keyframe_gives_frames_or_one_clear_error(tmp_path):
    outcomes = set()
    for i, clip in enumerate(sorted(VIDEOS.glob("*.[ma]*"))):
        path = tmp_path / f"{i}.mkv"
        path.write_bytes(damage.without_keyframes(clip, np.random.default_rng(i)))
        with av.open(str(path)) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
        assert packets and not any(packet.is_keyframe for packet in packets)
        _, label, _, problem = VideoDataset([Clip(str(path), 0)], 8, 32)[0]
        assert (label == 0 and not problem) or (label == IGNORED and str(path) in problem)
        outcomes.add(label)
    assert outcomes == {0, IGNORED}


def test_a_video_without_keyframe_flags_is_decoded_from_its_start(tmp_path):
    with av.open(str(VIDEOS / "h265_video.mp4")) as source, av.open(str(tmp_path / "clip.mkv"), "w") as target:
        copy = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream, packet.is_keyframe = copy, False
                target.mux(packet)
    video = open_video(tmp_path / "clip.mkv")
    assert video.times is None and len(video) == 10
    assert np.array_equal(video.read([9, 4]), open_video(VIDEOS / "h265_video.mp4").read([9, 4]))


@pytest.mark.parametrize("error", [IndexError, KeyError, MemoryError, OverflowError, ZeroDivisionError, RuntimeError])
def test_whatever_goes_wrong_in_a_file_is_a_video_error(monkeypatch, tmp_path, error):
    def fail(*args, **kwargs):
        raise error("inside")

    path = VIDEOS / "h265_video.mp4"
    video = open_video(path)
    monkeypatch.setattr(data.Video, "upright_rgb", fail)
    with pytest.raises(VideoError, match=rf"h265_video\.mp4: damaged \({error.__name__}: .?inside"):
        video.read([0])
    monkeypatch.setattr(av, "open", fail)
    with pytest.raises(VideoError, match=rf"h265_video\.mp4: cannot be opened .*{error.__name__}"):
        open_video(path)
    monkeypatch.setattr(data.os, "listdir", fail)
    with pytest.raises(VideoError, match="cannot be opened"):
        open_video(tmp_path)


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
    frames = noise()
    video = open_video(encode(tmp_path / f"clip.{suffix}", frames, codec, pixels, crf="10", qscale="2", g="5"))
    assert len(video) == 20
    for n in (0, 19, 7, 12):
        error = np.abs(video.read([n])[0].astype(int) - frames).mean(axis=(1, 2, 3))
        assert error.argmin() == n and error[n] < 15  # another frame differs by 60 and more


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nothing.mp4", "there is no such file"),
        ("empty.mp4", "cannot be opened"),
        ("text.mp4", "cannot be opened"),
        ("sound.wav", "holds no video"),
        ("folder", "holds no .jpg frames"),
    ],
)
def test_what_is_no_video_says_so(tmp_path, name, says):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is no video\n" * 100)
    (tmp_path / "sound.wav").write_bytes(damage.silence())
    (tmp_path / "folder").mkdir()
    with pytest.raises(VideoError, match=f"{name}.*{says}"):
        open_video(tmp_path / name)


def test_damaged_videos_give_frames_or_one_clear_error(tmp_path):
    damaged = open_video(VIDEOS / "corrupted.mp4")
    assert damaged.read([0, 5]).shape == (2, 720, 1280, 3)
    with pytest.raises(VideoError, match=r"corrupted\.mp4: damaged"):
        damaged.read([49])
    whole = (VIDEOS / "mm_test.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VideoError, match=r"cut\.mp4"):
        video = open_video(tmp_path / "cut.mp4")
        video.read([len(video) - 1])
    with pytest.raises(VideoError, match="frames 3 to 300 were asked for, it has 300"):
        open_video(VIDEOS / "mm_test.mp4").read([300, 3])
    for name, size in (("a", 48), ("b", 64)):
        write_video(tmp_path / f"{name}.ts", noise(10, size, size))
    (tmp_path / "both.ts").write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    for short_side in (None, 16):  # and `check` says what training says
        with pytest.raises(VideoError, match=r"both\.ts: its frames differ in size"):
            open_video(tmp_path / "both.ts").read([0, 19], short_side)
    assert "both.ts: its frames differ in size" in videos.inspect(str(tmp_path / "both.ts"))[1]


def test_a_title_in_another_encoding_is_no_reason_to_refuse(tmp_path):
    path = encode(tmp_path / "title.avi", noise(4), "mpeg4", title="Caf-title")
    path.write_bytes(path.read_bytes().replace(b"Caf-title", b"Caf\xe9title"))
    assert len(open_video(path)) == 4


def test_folders_of_frames_are_read_in_the_order_of_their_numbers(tmp_path):
    frames = noise(12)
    for n, frame in enumerate(frames, 1):
        encode(tmp_path / f"{n}.jpg", frame[None], "mjpeg", "yuvj420p", qscale="2")
    video = open_video(tmp_path)
    assert len(video) == 12
    for n in (0, 1, 9, 11):  # 10.jpg comes after 9.jpg
        error = np.abs(video.read([n])[0].astype(int) - frames).mean(axis=(1, 2, 3))
        assert error.argmin() == n
    (tmp_path / "5.jpg").write_bytes(b"no picture")
    with pytest.raises(VideoError, match=r"5\.jpg"):
        video.read([3, 4])
    encode(tmp_path / "5.jpg", noise(1, 32, 32), "mjpeg", "yuvj420p")
    with pytest.raises(VideoError, match="damaged"):
        video.read([3, 4])


def test_segments_take_one_frame_from_each_part():
    assert segments(16, 8).tolist() == [1, 3, 5, 7, 9, 11, 13, 15]
    assert segments(80, 8).tolist() == [5, 15, 25, 35, 45, 55, 65, 75]
    assert segments(8, 8).tolist() == list(range(8))
    rng = np.random.default_rng(0)
    draws = np.array([segments(80, 8, rng=rng) for _ in range(500)])
    assert (draws // 10 == np.arange(8)).all()
    assert all(set(draws[:, t] % 10) == set(range(10)) for t in range(8))
    assert [segments(80, 8, view=v, views=2).tolist()[0] for v in (0, 1)] == [2, 7]
    assert [segments(n, 4).tolist() for n in (1, 3)] == [[0, 0, 0, 0], [0, 1, 1, 2]]  # too short: some repeat
    short = np.array([segments(3, 8, rng=rng) for _ in range(200)])
    assert short.min() == 0 and short.max() == 2 and (np.diff(short) >= 0).all()


def test_strided_clips_start_anywhere_in_training_and_spread_out_in_testing():
    assert strided(300, 8, 16).tolist() == list(range(93, 93 + 8 * 16, 16))
    assert [strided(300, 8, 16, view=v, views=3)[0] for v in range(3)] == [0, 93, 187]
    rng = np.random.default_rng(0)
    assert {strided(20, 4, 4, rng=rng)[0] for _ in range(500)} == set(range(8))  # the last frame is 12 later
    assert strided(13, 4, 4, rng=rng).tolist() == [0, 4, 8, 12]
    assert strided(20, 8, 4).tolist() == [0, 4, 8, 12, 16, 19, 19, 19]  # too short: the last frame again
    assert strided(1, 4, 2, rng=rng).tolist() == strided(1, 4, 2, view=1, views=3).tolist() == [0] * 4


AUGMENT = dict(crop=(0.3, 1.0), flip=0.5, jitter=0.4, gray=0.2, randaugment=(2, 7.0), erasing=0.5)


def drawn(seeds=200, size=32, height=48, width=64, **augment):
    """One frame eight times, as train_transform changes it with each seed -> (seeds, T, 3, size, size)"""
    frame = torch.from_numpy(noise(1, height, width)).permute(0, 3, 1, 2).expand(8, -1, -1, -1)
    transform, clips = data.train_transform(size, **augment), []
    for seed in range(seeds):
        torch.manual_seed(seed)
        clips.append(transform(frame))
    return torch.stack(clips)


def test_every_frame_of_a_clip_is_augmented_alike():
    clips = drawn(20, **AUGMENT)
    assert clips.shape == (20, 8, 3, 32, 32) and clips.dtype == torch.uint8
    assert (clips == clips[:, :1]).all() and len({clip.numpy().tobytes() for clip in clips}) == 20


def test_without_augmentation_training_cuts_as_testing_does():
    frame = torch.from_numpy(noise(1)).permute(0, 3, 1, 2)
    assert (drawn(4) == data.spatial_views(frame, 32, 1)[0]).all()
    with pytest.raises(ValueError, match="crop and short_side"):
        data.train_transform(32, crop=(0.1, 1.0), short_side=(1.0, 1.2))


@pytest.mark.parametrize(("name", "rate"), [("gray", 0.3), ("erasing", 0.3)])
def test_gray_and_erasing_happen_as_often_as_they_should(name, rate):
    clips, plain = drawn(400, **{name: rate})[:, 0], drawn(1)[0, 0]
    changed = (clips != plain).flatten(1).any(1)
    assert abs(changed.float().mean() - rate) < 0.08
    if name == "gray":
        assert all((clip[0] == clip[1]).all() and (clip[1] == clip[2]).all() for clip in clips[changed])
    else:
        assert all((clip[:, (clip != plain).any(0)] == 0).all() for clip in clips[changed])


def test_jitter_changes_brightness_contrast_and_saturation_within_its_range():
    def measured(clips):
        """Mean, spread of the brightness over the mean, spread of the colours over that of the brightness."""
        gray = clips.mean(1)
        spread, colors = gray.std((1, 2)), (clips - gray[:, None]).std((1, 2, 3))
        return torch.stack([gray.mean((1, 2)), spread / gray.mean((1, 2)), colors / spread])

    ratios = measured(drawn(150, jitter=0.4)[:, 0].float()) / measured(drawn(1)[:, 0].float())
    for least, most in zip(ratios.amin(1), ratios.amax(1)):
        assert 0.5 < least < 0.8 and 1.2 < most < 1.6


def test_the_short_side_before_the_random_crop_is_drawn_from_its_range():
    """A ramp of brightness tells by its slope how wide the frame became before it was cut."""
    ramp = torch.linspace(0, 255, 128).to(torch.uint8).expand(1, 3, 64, 128)
    transform, widths, starts = data.train_transform(32, short_side=(1.0, 1.5)), [], set()
    for seed in range(200):
        torch.manual_seed(seed)
        row = transform(ramp)[0, 0, 16].float()
        widths.append(255 * 31 / (row[-1] - row[0]).item())
        starts.add(row[0].item())
    assert 58 < min(widths) < 70 and 88 < max(widths) < 106 and len(starts) > 20  # 2 x 32 to 2 x 48, wherever


def test_the_area_of_the_random_crop_is_drawn_from_its_range():
    """Red rises to the right and green downwards, so that both tell how much of the frame is left."""
    ramp = torch.linspace(0, 255, 256).to(torch.uint8)
    frame = torch.stack([ramp.expand(256, 256), ramp.expand(256, 256).T, ramp.expand(256, 256)])[None]
    transform, areas = data.train_transform(32, crop=(0.2, 0.5)), []
    for seed in range(200):
        torch.manual_seed(seed)
        red, green, _ = transform(frame)[0].float()
        areas.append(((red[0, -1] - red[0, 0]) * (green[-1, 0] - green[0, 0])).item() / (255 * 31 / 32) ** 2)
    assert 0.18 < min(areas) < 0.24 and 0.46 < max(areas) < 0.53


def test_randaugment_does_each_operation_half_of_the_time_at_the_magnitude(monkeypatch):
    levels = []

    class Operation(torch.nn.Module):
        def __init__(self, num_ops, magnitude, num_magnitude_bins, fill):
            super().__init__()
            assert num_ops == 1
            levels.append(10 * magnitude / (num_magnitude_bins - 1))

        def forward(self, clip):
            return clip

    monkeypatch.setattr(data, "RandAugment", Operation)
    drawn(500, randaugment=(4, 7.0))
    assert abs(len(levels) / 2000 - 0.5) < 0.05
    assert abs(np.mean(levels) - 7) < 0.1 and abs(np.std(levels) - 0.5) < 0.05
    levels.clear()
    drawn(500, randaugment=(1, 10.0))
    assert max(levels) == 10


@pytest.mark.parametrize("height, width", [(40, 56), (56, 40)])
def test_randaugment_gives_the_pixels_of_torchvisions(monkeypatch, height, width):
    clip = torch.randint(256, (4, height, width, 3), dtype=torch.uint8).permute(0, 3, 1, 2)  # as a file is read
    names, theirs = set(), data.v2.RandAugment._apply_image_or_video_transform
    seen = lambda self, x, name, *args, **kwargs: (names.add(name), theirs(self, x, name, *args, **kwargs))[1]  # noqa: E731
    for seed in range(120):
        magnitude = seed % 101
        torch.manual_seed(seed)
        with monkeypatch.context() as patch:
            patch.setattr(data.v2.RandAugment, "_apply_image_or_video_transform", seen)
            expected = data.v2.RandAugment(1, magnitude, num_magnitude_bins=101, fill=128)(clip)
        for memory in (clip, clip.contiguous()):
            torch.manual_seed(seed)
            assert torch.equal(data.RandAugment(1, magnitude, num_magnitude_bins=101, fill=128)(memory), expected)
    assert len(names) == 14


def test_randaugment_varies_with_the_clip_and_its_magnitude_matters():
    plain, weak, strong = drawn(1)[0], drawn(60, randaugment=(4, 1.0)), drawn(60, randaugment=(4, 9.0))
    assert len({clip.numpy().tobytes() for clip in strong}) > 40 and (strong == strong[:, :1]).all()
    assert (strong.float() - plain).abs().mean() > 1.5 * (weak.float() - plain).abs().mean()


def test_test_views_cut_the_long_side():
    clip = torch.arange(64, dtype=torch.uint8).expand(4, 3, 32, 64)  # each column holds its own number
    views = data.spatial_views(clip, 32, 3)
    assert views.shape == (3, 4, 3, 32, 32)
    assert [int(view[0, 0, 0, 0]) for view in views] == [0, 16, 32]
    assert int(data.spatial_views(clip, 32, 1)[0, 0, 0, 0, 0]) == 16
    upright = data.spatial_views(clip.transpose(2, 3), 32, 3)
    assert torch.equal(upright, views.transpose(3, 4))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Eight clips of two classes: real H.264 files of different sizes and lengths."""
    root = tmp_path_factory.mktemp("videos")
    for i in range(8):
        write_video(root / f"{i}.mp4", noise(12 + i, 48, 64 + 16 * i, seed=i))
    return [Clip(str(root / f"{i}.mp4"), i % 2) for i in range(8)]


def test_clips_depend_on_seed_and_item_alone(clips):
    def epoch(workers, epoch=0, seed=0, keep=False):
        dataset = VideoDataset(clips, 4, 32, augment=AUGMENT, seed=seed, keep=keep)
        items = range(epoch * len(clips), (epoch + 1) * len(clips))
        return torch.cat([batch[0] for batch in DataLoader(dataset, 3, sampler=items, num_workers=workers)])

    state = torch.get_rng_state()
    expected = epoch(0)
    assert expected.shape == (8, 4, 3, 32, 32) and expected.dtype == torch.uint8
    assert torch.equal(expected, epoch(2)) and torch.equal(expected, epoch(0, keep=True))
    assert not torch.equal(expected, epoch(0, epoch=1)) and not torch.equal(expected, epoch(0, seed=1))
    dataset = VideoDataset(clips, 4, 32, augment=AUGMENT)
    assert len(dataset) == 8 and torch.equal(dataset[5][0], dataset[5][0])  # in any order, as often as one likes
    assert not torch.equal(dataset[5][0], dataset[8 + 5][0]) and dataset[8 + 5][2] == clips[5].path
    fresh = VideoDataset(clips, 4, 32, augment=dict(crop=(0.3, 1.0)))
    torch.set_rng_state(state)
    fresh[0]
    assert torch.equal(torch.get_rng_state(), state)  # the program's own draws are left alone


def test_large_videos_are_kept_as_they_are_read(tmp_path):
    """Both ways scale frames down to twice the model's size."""
    write_video(tmp_path / "large.mp4", noise(8, 120, 160))
    for augment in (None, AUGMENT):
        one, two = (
            VideoDataset([Clip(str(tmp_path / "large.mp4"), 0)], 4, 32, augment=augment, keep=k) for k in (0, 1)
        )
        assert torch.equal(one[0][0], two[0][0]) and torch.equal(two[0][0], two[0][0])
    assert open_video(tmp_path / "large.mp4").read([0], short_side=64).shape == (1, 64, 85, 3)


def test_testing_gives_all_views_in_order(clips):
    video, label, path, problem = VideoDataset(clips, 4, 32, span=8, views=(2, 3))[6]
    assert video.shape == (6, 4, 3, 32, 32) and (label, path, problem) == (0, clips[6].path, "")
    one = VideoDataset(clips, 4, 32, span=8, views=(2, 1))[6][0]
    assert torch.equal(video[1], one[0]) and torch.equal(video[4], one[1]) and not torch.equal(one[0], one[1])
    whole = torch.from_numpy(open_video(path).read(strided(18, 4, 2, view=1, views=2))).permute(0, 3, 1, 2)
    assert torch.equal(one[1], data.spatial_views(whole, 32, 1)[0])
    middle = torch.from_numpy(open_video(path).read(segments(18, 4))).permute(0, 3, 1, 2)
    assert torch.equal(VideoDataset(clips, 4, 32)[6][0], data.spatial_views(middle, 32, 1))


def test_a_mirrored_clip_changes_its_label_where_the_dataset_says_so(clips):
    shape, one = dict(num_frames=4, size=32, augment=dict(flip=0.5)), [Clip(clips[0].path, 86)]
    plain, swapped = VideoDataset(one, **shape, flip=None), VideoDataset(one, **shape, flip={86: 87})
    unchanged, labels = VideoDataset(one, **shape), []
    for draw in range(40):
        (a, label_a, *_), (b, label_b, *_), (c, label_c, *_) = plain[draw], swapped[draw], unchanged[draw]
        assert label_a == label_c == 86 and torch.equal(b, a.flip(-1) if label_b == 87 else a) and torch.equal(b, c)
        labels.append(label_b)
    assert 10 < labels.count(87) < 30


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("span", [0, 16])
def test_a_video_shorter_than_the_clip_repeats_frames(tmp_path, frames, span):
    path = tmp_path / "short.mp4"
    write_video(path, noise(frames))
    whole = torch.from_numpy(open_video(path).read(range(frames))).permute(0, 3, 1, 2)
    whole = data.spatial_views(whole, 48, 1)[0]
    for augment in (None, {}):
        video, label, _, problem = VideoDataset([Clip(str(path), 1)], 8, 48, span, augment=augment)[0]
        video = video.reshape(8, 3, 48, 48)
        assert (label, problem) == (1, "") and all(any(torch.equal(frame, w) for w in whole) for frame in video)
    assert videos.inspect(str(path)) == (frames, "")


def test_broken_videos_are_replaced_in_training_and_left_out_of_testing(clips, tmp_path):
    (tmp_path / "broken.mp4").write_text("broken")
    broken = Clip(str(tmp_path / "broken.mp4"), 1)
    training = VideoDataset([broken, clips[0], clips[2]], 4, 32, augment={})
    stand_ins = set()
    for draw in range(12):
        video, label, path, problem = training[3 * draw]
        assert label == 0 and "broken.mp4" in problem and torch.equal(video, training[3 * draw][0])
        stand_ins.add(path)
    assert stand_ins == {clips[0].path, clips[2].path} and training[1][2:] == (clips[0].path, "")
    (tmp_path / "worse.mp4").write_text("worse")
    worse = [Clip(str(tmp_path / "worse.mp4"), 1)] * 3
    for draw in range(8):  # after other broken videos one is found, and the problem is that of the video asked for
        _, label, path, problem = VideoDataset([broken, *worse, clips[0]], 4, 32, augment={})[5 * draw]
        assert (label, path) == (0, clips[0].path) and "broken.mp4" in problem and "worse.mp4" not in problem
    damaged = VideoDataset([Clip(str(VIDEOS / "corrupted.mp4"), 1), clips[0]], 16, 32, augment={})
    assert all("corrupted.mp4: damaged" in damaged[2 * draw][3] for draw in range(4))  # whichever frames were drawn
    testing = VideoDataset([broken, clips[0]], 4, 32, views=(2, 3))
    video, label, path, problem = testing[0]
    assert video.shape == (6, 4, 3, 32, 32) and not video.any() and label == IGNORED == -100
    assert path == broken.path and "broken.mp4" in problem and testing[1][1] == 0
    video, label, path, problem = VideoDataset([broken] * 3, 4, 32, augment={})[1]
    assert video.shape == (4, 3, 32, 32) and (label, path) == (IGNORED, broken.path) and "broken.mp4" in problem
    logits, labels = torch.randn(3, 5), torch.tensor([1, label, 4])
    loss = torch.nn.functional.cross_entropy(logits, labels)
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(logits[[0, 2]], labels[[0, 2]]))


def test_a_long_list_is_compact_and_reads_as_a_list():
    pairs = [Clip(f"/data/klasse ü/\udcff{i}.mp4", i % 400) for i in range(1000)]
    found = Clips(pairs)
    assert len(found) == 1000 and found[-1] == pairs[-1] and found[10:13] == pairs[10:13] and list(found) == pairs
    with pytest.raises(IndexError):
        found[1000]
    assert found.paths.nbytes <= 1000 * 32 and found.labels.nbytes == 8000 and list(Clips([])) == []


def test_toy_classes_are_mirrors_in_time():
    mirrored = {**toy.PAIRS, **{b: a for a, b in toy.PAIRS.items()}}
    assert sorted(mirrored) == sorted(name for group in toy.GROUPS.values() for name in group)
    for seed in range(5):
        for name, mirror in toy.PAIRS.items():
            forward, backward = (toy.clip(n, np.random.default_rng(seed)) for n in (name, mirror))
            assert np.array_equal(forward, backward[::-1]) and forward.shape == (toy.FRAMES, toy.SIZE, toy.SIZE, 3)
        ((x, _, _),) = toy.motion("moves right", np.random.default_rng(seed))
        assert (np.diff(x) > 0).all() and x[0] > 0 and x[-1] < toy.SIZE
        ((_, y, _),) = toy.motion("moves down", np.random.default_rng(seed))
        assert (np.diff(y) > 0).all()
        ((_, _, r),) = toy.motion("grows", np.random.default_rng(seed))
        assert (np.diff(r) > 0).all()
        (x1, y1, _), (x2, y2, _) = toy.motion("two part", np.random.default_rng(seed))
        assert (np.diff(np.hypot(x1 - x2, y1 - y2)) > 0).all()


def test_no_frame_tells_jumping_from_resting():
    """At every time the place has one distribution, so that each frame is as likely under the mirror class; twice as
    many neighbouring frames differ in the first half as in the second."""
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
    assert found.small and found.groups == toy.GROUPS and found.flip is None
    for name, mirror in toy.PAIRS.items():
        for path in sorted((tmp_path / "toy" / "train" / name).iterdir()):
            forward, backward = (
                open_video(p).read(range(16)).astype(int) for p in (path, tmp_path / "toy/train" / mirror / path.name)
            )
            assert np.abs(forward - backward[::-1]).mean() < 0.7 * np.abs(forward - backward).mean()
    first = (tmp_path / "toy/val/grows").iterdir().__next__().stat()
    assert list(find_clips("toy", tmp_path).val) == list(found.val) and first.st_size > 500
    assert (tmp_path / "toy/train/grows/0002.mp4").read_bytes() != (tmp_path / "toy/val/grows/0002.mp4").read_bytes()


def test_the_toy_videos_stay_what_they_are():
    """A few pixels of the first clip of each class, so that results over them can be compared for years."""
    sums = [int(toy.clip(name, np.random.default_rng([0, i])).astype(int).sum()) for i, name in enumerate(toy.PAIRS)]
    assert sums == [15211463, 20093641, 21499229, 21720442, 23965718]


def test_an_import_changes_nothing_outside_the_module():
    code = "import atexit, signal, sys; n = atexit._ncallbacks(); h = [signal.getsignal(s) for s in (2, 14, 15)]; "
    code += "import torch, torchvision, av; import random; r = random.getstate(), torch.get_rng_state().sum(); "
    code += "n = atexit._ncallbacks(); import data; assert atexit._ncallbacks() == n; "
    code += "assert [signal.getsignal(s) for s in (2, 14, 15)] == h; assert 'colab' not in sys.modules; "
    code += "assert r == (random.getstate(), torch.get_rng_state().sum())"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(data.__file__).parent, timeout=120)


def test_damaged_copies_give_frames_or_one_clear_error_in_their_own_process():
    clips = [VIDEOS / name for name in ("h265_video.mp4", "video_0.mov", "unordered.mov", "corrupted.mp4")]
    command = [sys.executable, Path(__file__).parent / "damage.py", VIDEOS / "mm_test.avi", *clips, "--copies", "110"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no keyframes:" in done.stdout and float(re.search(r"grew by (-?[\d.]+) MB", done.stdout)[1]) < 32
