"""`python data.py shrink`: the same frames in the same order, smaller and faster to decode, at the same places."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest

import data
from colab import toy, videos

HERE = Path(__file__).resolve().parent
CLIPS = HERE / "videos"


def shrink(*argv):
    videos.main(["shrink", *map(str, argv)])


def frames(path, short_side=None):
    video = data.open_video(path)
    return video.read(range(len(video)), short_side)


def keyframes(path):
    with av.open(str(path)) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        return [packet.is_keyframe for packet in container.demux(video=0) if packet.size]


@pytest.fixture
def tree(tmp_path):
    """A tree of classes: videos of several codecs and containers, one upright by rotation, and a damaged one."""
    root = tmp_path / "source"
    for place, names in (
        ("train/a", ["video_90.mov", "corrupted.mp4"]),
        ("train/b", ["arm_wrestling.mp4", "h265_video.mp4"]),
        ("val/a", ["unordered.mov"]),
        ("val/b", ["mm_test.avi"]),
    ):
        (root / place).mkdir(parents=True)
        for name in names:
            shutil.copy(CLIPS / name, root / place)
    (root / "classes.txt").write_text("a\nb\n")
    return root


def test_every_frame_keeps_its_number_and_the_tree_its_shape(tree, tmp_path, capsys):
    out = tmp_path / "small"
    shrink("--data", tree, "--out", out, "--workers", 2)
    printed = capsys.readouterr().out
    assert "5 of 6 videos" in printed and "corrupted.mp4" in printed and "clips per second of one core" in printed
    assert (out / "classes.txt").read_text() == "a\nb\n" and not list(out.rglob("*.partial"))
    old, new = data.find_clips(str(tree), skip=""), data.find_clips(str(out))
    assert new.classes == old.classes and len(new.train) == len(old.train) - 1 and len(new.val) == len(old.val)
    for clip in [*new.train, *new.val]:
        source = tree / Path(clip.path).relative_to(out)
        expected, found = frames(source, 256), frames(clip.path)
        assert expected.shape == found.shape and min(found.shape[1:3]) <= 256
        difference = np.abs(expected.astype(int) - found).mean((1, 2, 3))
        assert difference.max() < 8  # of 255: each frame is that frame
        keys = keyframes(clip.path)
        assert keys == [n % 16 == 0 for n in range(len(found))]  # packets stand in the order of decoding


def test_every_frame_is_a_keyframe_if_asked_and_nothing_is_enlarged(tree, tmp_path):
    shrink("--data", tree, "--out", tmp_path / "small", "--keyframes", 1, "--short-side", 120, "--workers", 1)
    path = tmp_path / "small/train/b/arm_wrestling.mp4"
    assert all(keyframes(path)) and frames(path).shape == (280, 120, 160, 3)
    assert frames(tmp_path / "small/val/a/unordered.mov").shape[1:] == (50, 50, 3)


def test_it_goes_on_after_an_interruption_and_writes_files_whole_or_not_at_all(tree, tmp_path):
    for i in range(8):
        shutil.copy(CLIPS / "arm_wrestling.mp4", tree / f"train/b/{i}.mp4")
    out = tmp_path / "small"
    command = [sys.executable, "data.py", "shrink", "--data", str(tree), "--out", str(out), "--workers", "2"]
    how = dict(cwd=HERE.parent, stderr=subprocess.PIPE, text=True, start_new_session=True)
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    process = subprocess.Popen(command, preexec_fn=heard, **how)
    while not list(out.rglob("*.mp4")):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches the whole group
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "stopped" in said and "Traceback" not in said
    done = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    assert 0 < len(done) < 10 and all(len(frames(path)) in (10, 280) for path in done)
    shrink("--data", tree, "--out", out)
    assert all(path.stat().st_mtime_ns == at for path, at in done.items())
    assert len(list(out.rglob("train/b/*.mp4"))) == 10 and not list(out.rglob("*.partial"))


def folder_of_frames(folder, seed, count=9):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    pictures = np.repeat(np.repeat(rng.integers(0, 256, (count, 5, 7, 3), dtype=np.uint8), 9, 1), 9, 2)  # 45 x 63: odd
    for n, picture in enumerate(pictures):
        with av.open(str(folder / f"{n + 1:05d}.jpg"), "w", format="image2") as container:
            stream = container.add_stream("mjpeg", rate=1)
            stream.width, stream.height, stream.pix_fmt = 63, 45, "yuvj420p"
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux([*stream.encode(frame), *stream.encode()])


def test_folders_of_frames_become_videos_that_their_dataset_finds(tmp_path):
    root, out = tmp_path / "ssv1", tmp_path / "small"
    for i in (1, 2, 3):
        folder_of_frames(root / "frames" / str(i), i)
    (root / "something-something-v1-train.csv").write_text("1;Holding\n2;Moving\n")
    (root / "something-something-v1-validation.csv").write_text("3;Moving\n")
    shrink("--data", "ssv1", "--data-root", root, "--out", out)
    found = data.find_clips("ssv1", str(out))
    assert [Path(clip.path).name for clip in found.train] == ["1.mp4", "2.mp4"] and len(found.val) == 1
    expected, small = frames(root / "frames/1"), frames(found.train[0].path)
    assert small.shape == (9, 46, 64, 3)  # H.264 has even sides
    order = [np.abs(expected.astype(int).mean((1, 2)) - one.mean((0, 1))).sum(-1).argmin() for one in small]
    assert order == list(range(9))


def test_lists_keep_their_paths(tmp_path):
    root, out = tmp_path / "videos", tmp_path / "small"
    (root / "deep").mkdir(parents=True)
    shutil.copy(CLIPS / "unordered.mov", root / "deep/a.mov")
    folder_of_frames(root / "b", 0)
    (root / "train.txt").write_text("deep/a.mov 0\nb 1\n")
    (root / "val.txt").write_text("deep/a.mov 0\n")
    shrink("--data", root / "train.txt", "--val-data", root / "val.txt", "--out", out)
    found = data.find_clips(str(out / "train.txt"), val_data=str(out / "val.txt"))
    assert [len(frames(clip.path)) for clip in found.train] == [4, 9]
    shutil.copy(CLIPS / "unordered.mov", tmp_path / "else.mov")
    (root / "train.txt").write_text(f"{tmp_path / 'else.mov'} 0\ndeep/a.mov 1\n")
    with pytest.raises(SystemExit):
        shrink("--data", root / "train.txt", "--val-data", root / "val.txt", "--out", tmp_path / "other")


def test_what_cannot_be_asked_for_is_refused_in_a_sentence(tree, capsys):
    for argv, says in (
        (["--data", tree, "--out", tree / "small"], "must not lie inside"),
        (["--data", tree / "nothing", "--out", tree.parent / "small"], "neither"),
        (["--data", tree, "--out", tree.parent / "small", "--keyframes", 0], "--keyframes"),
    ):
        with pytest.raises(SystemExit) as stopped:
            shrink(*argv)
        assert stopped.value.code == 2 and says in capsys.readouterr().err


def test_annotations_of_a_named_dataset_come_along(tmp_path):
    root, out = tmp_path / "diving", tmp_path / "small"
    (root / "rgb").mkdir(parents=True)
    for name in ("x", "y"):
        toy.write_video(root / f"rgb/{name}.mp4", toy.clip("grows", np.random.default_rng(0)))
    (root / "Diving48_V2_train.json").write_text(json.dumps([{"vid_name": "x", "label": 3}]))
    (root / "Diving48_V2_test.json").write_text(json.dumps([{"vid_name": "y", "label": 4}]))
    shrink("--data", "diving48", "--data-root", root, "--out", out)
    found = data.find_clips("diving48", str(out))
    assert found.train[0] == (str(out / "rgb/x.mp4"), 3) and len(frames(found.val[0].path)) == 16
