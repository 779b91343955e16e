"""Every dataset of the field in every layout, with real encoded videos: found, trained on for a step, evaluated."""

import json

import av
import numpy as np
import pytest
import torch
from torchvision.transforms.functional import to_pil_image

import data
import train
from data import DATASETS, Clips, find_clips

WORDS = {".mp4": ("libx264", "yuv420p"), ".webm": ("libvpx-vp9", "yuv420p"), ".avi": ("mpeg4", "yuv420p")}


def write(path, seed=0):
    """16 frames of noise that moves, in the codec that belongs to the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
    frames = [np.roll(picture, 2 * t, axis=1) for t in range(16)]
    if path.suffix == "":  # a folder of JPEGs
        path.mkdir()
        for t, frame in enumerate(frames, 1):
            to_pil_image(frame).save(path / f"{t:05d}.jpg")
        return
    codec, form = WORDS[path.suffix]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, form
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def kinetics(root, layout, count=400):
    lines = {"train": ["label,youtube_id,time_start,time_end,split,is_cc"]}
    lines["val"] = lines["train"][:]
    for split in lines:
        for i, label in enumerate(("riding a bike", "abseiling", "yoga")):
            name = f"{split}{i:02d}-x_yz"
            lines[split].append(f"{label},{name},{i + 1},{i + 11},{split},0")
            folder = {"flat": root, "by class": root / label, "splits": root / split / label}[layout]
            write(folder / f"{name}_{i + 1:06d}_{i + 11:06d}.mp4", i)
        lines[split].append(f"yoga,gone,5,15,{split},0")  # no longer on the net
    (root / "train.csv").write_text("\n".join(lines["train"]))
    (root / "validate.csv").write_text("\n".join(lines["val"]))
    return ["abseiling", "riding a bike", "yoga"]


def something(root, new):
    names = (
        ("train", "validation", "labels")
        if new
        else [f"something-something-v2-{n}" for n in ("train", "validation", "labels")]
    )
    notes = root / "labels"
    notes.mkdir(parents=True)
    templates = {"Pushing something from left to right": "1", "Holding something": "0"}
    (notes / f"{names[2]}.json").write_text(json.dumps(templates))
    for split, first in ((names[0], 10), (names[1], 20)):
        rows = []
        for i, template in enumerate(templates):
            bracketed = template.replace("something", "[something]")
            rows.append({"id": str(first + i), "label": "a cup", "template": bracketed, "placeholders": ["a cup"]})
            write(root / "20bn-something-something-v2" / f"{first + i}.webm", i)
        (notes / f"{split}.json").write_text(json.dumps(rows))
    return ["Holding something", "Pushing something from left to right"]


def something_v1(root):
    root.mkdir()
    for split, first in (("train", 10), ("validation", 20)):
        rows = [f"{first};Turning a cup", f"{first + 1};Holding a cup"]
        (root / f"something-something-v1-{split}.csv").write_text("\n".join(rows))
        for i in range(2):
            (root / "20bn-something-something-v1").mkdir(exist_ok=True)
            write(root / "20bn-something-something-v1" / str(first + i), i)
    return ["Holding a cup", "Turning a cup"]


def diving(root):
    for split, first in (("train", 0), ("test", 10)):
        rows = [{"vid_name": f"clip{first + i}", "label": 40 * i, "start_frame": 0, "end_frame": 9} for i in range(2)]
        for row in rows:
            write(root / "rgb" / f"{row['vid_name']}.mp4")
        (root / f"Diving48_V2_{split}.json").write_text(json.dumps(rows))
    return [str(i) for i in range(48)]


def ucf(root):
    notes = root / "ucfTrainTestlist"
    notes.mkdir(parents=True)
    (notes / "classInd.txt").write_text("1 ApplyEyeMakeup\n2 YoYo\n")
    for fold in (1, 2, 3):
        lists = {"train": [], "test": []}
        for i, label in enumerate(("ApplyEyeMakeup", "YoYo"), 1):
            for split, clip in (("train", fold), ("test", fold + 3)):
                name = f"{label}/v_{label}_g01_c{clip:02d}.avi"
                write(root / "UCF-101" / name)
                lists[split].append(name + (f" {i}" if split == "train" else ""))
        (notes / f"trainlist0{fold}.txt").write_text("\n".join(lists["train"]))
        (notes / f"testlist0{fold}.txt").write_text("\n".join(lists["test"]))
    return ["ApplyEyeMakeup", "YoYo"]


def hmdb(root):
    notes = root / "testTrainMulti_7030_splits"
    notes.mkdir(parents=True)
    for label in ("brush_hair", "wave"):
        for name in ("a (1)", "b", "c"):
            write(root / "videos" / label / f"{label} {name}.avi")
        for fold in (1, 2, 3):
            uses = [1, 2, 0][fold - 1 :] + [1, 2, 0][: fold - 1]
            lines = (f"{label} {name}.avi {use} " for name, use in zip(("a (1)", "b", "c"), uses))
            (notes / f"{label}_test_split{fold}.txt").write_text("\n".join(lines))
    return ["brush_hair", "wave"]


def lists(root):
    for split in ("train", "val"):
        lines = []
        for i, label in enumerate(("riding a bike", "yoga")):
            write(root / f"videos_{split}" / label / f"{split}{i}.mp4", i)
            lines.append(f"{label}/{split}{i}.mp4 {288 * i}")
        (root / f"kinetics400_{split}_list_videos.txt").write_text("\n".join(lines))
    return [str(i) for i in range(400)]


LAYOUTS = {
    "k400 flat": lambda root: kinetics(root, "flat"),
    "k400 by class": lambda root: kinetics(root, "by class"),
    "k700 in splits": lambda root: kinetics(root, "splits"),
    "k400 lists": lists,
    "ssv2 old names": lambda root: something(root, new=False),
    "ssv2 new names": lambda root: something(root, new=True),
    "ssv1": something_v1,
    "diving48": diving,
    "ucf101": ucf,
    "hmdb51": hmdb,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_named_dataset_is_found_trained_on_and_evaluated(layout, tmp_path):
    root, name = tmp_path / "data", layout.split()[0]
    classes = LAYOUTS[layout](root)
    found = find_clips(name, root)
    assert found.classes == classes
    assert len(found.train) == len(found.val) == (3 if "bike" in classes[1] else 2)
    assert not {c.path for c in found.train} & {c.path for c in found.val}
    assert found.missing == (
        ()
        if len(found.train) == 2
        else tuple(f"{split}: 1 of 4 videos are not below {root}" for split in ("train", "val"))
    )
    flags = f"--method aim --data {name} --data-root {root} --backbone ViT-Toy-16 --pretrained none --epochs 1"
    flags += f" --warmup-epochs 0 --batch-size 2 --frames 4 --span 0 --workers 0 --device cpu --out {tmp_path / 'run'}"
    result = train.main(flags.split())
    assert result["videos"] == len(found.val)


def test_labels_follow_the_annotations(tmp_path):
    something(tmp_path / "ssv2", new=True)
    found = find_clips("ssv2", tmp_path / "ssv2")
    assert [(c.path.rpartition("/")[2], c.label) for c in found.train] == [("10.webm", 1), ("11.webm", 0)]
    assert found.flip[86] == 87 and found.flip[167] == 166
    ucf(tmp_path / "ucf")
    one, two = (find_clips("ucf101", tmp_path / "ucf", fold=fold) for fold in (1, 2))
    assert [c.label for c in one.train] == [0, 1] and one.train != two.train
    hmdb(tmp_path / "hmdb")
    assert [c.path.rpartition("/")[2] for c in find_clips("hmdb51", tmp_path / "hmdb").train] == [
        "brush_hair a (1).avi",
        "wave a (1).avi",
    ]
    diving(tmp_path / "diving")
    assert [c.label for c in find_clips("diving48", tmp_path / "diving").val] == [0, 40]


def test_annotations_may_lie_elsewhere(tmp_path):
    ucf(tmp_path / "a")
    (tmp_path / "a" / "ucfTrainTestlist").rename(tmp_path / "notes")
    with pytest.raises(
        FileNotFoundError, match=r"no annotations for train; looked in .*a and below for trainlist01.txt"
    ):
        find_clips("ucf101", tmp_path / "a")
    assert len(find_clips("ucf101", tmp_path / "a", annotations=tmp_path / "notes").train) == 2


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(ValueError, match="--data-root"):
        find_clips("k400")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        find_clips("k400", tmp_path / "nothing")
    for name, source in DATASETS.items():
        with pytest.raises(FileNotFoundError, match="no annotations for train") as error:
            find_clips(name, tmp_path)
        assert source.train.split()[0].format(1) in str(error.value) and str(tmp_path) in str(error.value)
    kinetics(tmp_path / "k", "flat")
    for video in (tmp_path / "k").glob("*.mp4"):
        video.unlink()
    with pytest.raises(FileNotFoundError, match="none of the 4 videos of train is below"):
        find_clips("k400", tmp_path / "k")
    (tmp_path / "k" / "train.csv").write_text("no,kinetics\n1,2\n")
    with pytest.raises(ValueError, match=r"train\.csv"):
        find_clips("k400", tmp_path / "k")


def test_recipes_follow_the_dataset():
    def run(text):
        return train.settings(train.parse(text.split()))

    assert run("--method aim --data ssv2")["model"] == {"drop_path": 0.2, "temporal_in": True}
    assert run("--method st_adapter --data ssv1")["batch_size"] == 256  # Something-Something's
    diving = run("--method st_adapter --data diving48")
    assert (diving["recipe"], diving["span"], diving["views"], diving["epochs"]) == ("k400", 0, (1, 1), 12)
    assert run("--method aim --data diving48")["epochs"] == 50  # AIM has its own
    assert run("--method side4video --data ssv2")["repeat"] == 2


def test_a_mirrored_clip_changes_its_label_where_the_dataset_says_so(tmp_path):
    path = tmp_path / "clip.mp4"
    write(path)
    shape = dict(num_frames=4, size=32, augment=dict(flip=0.5))
    plain = data.VideoDataset([data.Clip(str(path), 86)], **shape, flip=None)
    swapped = data.VideoDataset([data.Clip(str(path), 86)], **shape, flip={86: 87})
    labels = set()
    for epoch in range(16):
        plain.epoch = swapped.epoch = epoch
        (a, label_a, _), (b, label_b, _) = plain[0], swapped[0]
        assert label_a == 86 and torch.equal(b, a.flip(-1) if label_b == 87 else a)
        labels.add(label_b)
    assert labels == {86, 87}


def test_repeated_sampling_draws_each_clip_anew_in_one_batch(tmp_path):
    run, place = dict(seed=0, batch_size=4, repeat=2), train.Place(torch.device("cpu"), 0, 1, 0)
    order = train.epoch_order(run, 6, 0, place, 4)
    assert len(order) == 12 and sorted(i % 6 for i in order) == sorted([*range(6)] * 2)
    assert all(order[k] % 6 == order[k + 1] % 6 and order[k] != order[k + 1] for k in range(0, 12, 2))
    path = tmp_path / "clip.mp4"
    write(path)
    clips = data.VideoDataset([data.Clip(str(path), 0)] * 6, 4, 32, augment=dict(crop=(0.1, 0.5)))
    assert not torch.equal(clips[1][0], clips[1 + 6][0]) and torch.equal(clips[1][0], clips[1][0])


def test_a_long_list_is_compact_and_reads_as_a_list():
    pairs = [data.Clip(f"/data/klasse ü/{i}.mp4", i % 400) for i in range(1000)]
    clips = Clips(pairs)
    assert len(clips) == 1000 and clips[-1] == pairs[-1] and clips[10:13] == pairs[10:13] and list(clips) == pairs
    with pytest.raises(IndexError):
        clips[1000]
    held = clips.text.nbytes + clips.ends.nbytes + clips.labels.nbytes
    assert held <= sum(len(p.path.encode()) + 16 for p in pairs)


def test_check_finds_what_is_broken_and_training_can_leave_it_out(tmp_path, capsys):
    root, out = tmp_path / "data", tmp_path / "broken.txt"
    kinetics(root, "flat")
    bad = sorted(root.glob("train*.mp4"))[0]
    bad.write_bytes(bad.read_bytes()[:400])
    data.main(["check", "--data", "k400", "--data-root", str(root), "--out", str(out), "--workers", "2"])
    said = capsys.readouterr().out
    assert "train: 3 videos, 1 of them broken" in said and "val: 3 videos, 0 of them broken" in said
    assert "1 of 4 videos are not below" in said and "frames: 16 to 16" in said and "64 x 48 (2)" in said
    assert out.read_text() == f"{bad}\n"
    found = find_clips("k400", root, skip=out)
    assert len(found.train) == 2 and len(found.val) == 3


def kill(path):
    import os

    if "killer" in path:
        os._exit(9)
    return 16, "64 x 48", 8, ""


def test_check_survives_a_video_that_kills_its_process(monkeypatch):
    monkeypatch.setattr(data, "inspect", kill)
    answers = dict(data.inspect_all([f"{i}.mp4" for i in range(5)] + ["killer.mp4"], workers=2))
    assert len(answers) == 6 and "kills the process" in answers["killer.mp4"][3]
    assert all(answers[f"{i}.mp4"][0] == 16 for i in range(5))


def test_show_draws_frames(tmp_path, capsys):
    write(tmp_path / "clip.mp4")
    data.main(["show", str(tmp_path / "clip.mp4"), str(tmp_path / "frames.png"), "--frames", "4", "--size", "32"])
    assert (tmp_path / "frames.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="no such file"):
        data.main(["show", str(tmp_path / "no.mp4"), str(tmp_path / "frames.png")])


def test_training_stops_when_too_many_videos_are_broken(tmp_path, capsys):
    for split in ("train", "val"):
        for i in range(40):
            path = tmp_path / "data" / split / "ab"[i % 2] / f"{i}.mp4"
            write(path) if i < 14 or split == "val" else path.write_text("no video")
            if split == "val" and i > 2:
                break
    flags = (
        f"--method aim --recipe toy --data {tmp_path / 'data'} --pretrained none --epochs 1 --batch-size 4 --frames 4"
    )
    with pytest.raises(SystemExit):
        train.main([*flags.split(), "--workers", "0", "--device", "cpu", "--out", str(tmp_path / "run")])
    assert "more than 5%" in capsys.readouterr().err


def test_randaugment_varies_with_the_clip_and_serves_all_frames_alike():
    clip = torch.randint(0, 255, (1, 3, 32, 32), dtype=torch.uint8).expand(4, -1, -1, -1)
    torch.manual_seed(0)
    answers = [data.RandAugment(num_ops=4, magnitude=7)(clip) for _ in range(8)]
    assert all((a[0] == a).all() for a in answers)
    assert len({tuple(a.flatten().tolist()) for a in answers}) > 4


def test_class_folders_without_videos_are_refused_and_hidden_ones_passed_over(tmp_path):
    for split in ("train", "val"):
        for name in "ab":
            write(tmp_path / split / name / "0.mp4")
        (tmp_path / split / ".ipynb_checkpoints").mkdir()
    assert find_clips(str(tmp_path)).classes == ["a", "b"]
    (tmp_path / "train" / "c").mkdir()
    with pytest.raises(ValueError, match="c holds no video"):
        find_clips(str(tmp_path))


@pytest.mark.parametrize("line", ["{path}", "{relative}", "{path}: damaged at frame 3"])
def test_skip_takes_paths_and_a_runs_own_list(tmp_path, monkeypatch, line):
    for name in "01":
        write(tmp_path / "train" / "a" / f"{name}.mp4")
    write(tmp_path / "val" / "a" / "0.mp4")
    monkeypatch.chdir(tmp_path)
    relative = "train/a/1.mp4"
    (tmp_path / "skip.txt").write_text(line.format(path=tmp_path / relative, relative=relative) + "\n")
    found = find_clips(str(tmp_path), skip="skip.txt")
    assert [clip.path for clip in found.train] == [str(tmp_path / "train/a/0.mp4")] and len(found.val) == 1
