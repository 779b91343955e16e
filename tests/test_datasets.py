"""Every dataset of the field in every layout, with real encoded videos: found, checked, trained on, evaluated."""

import json
import os
import shutil
import time

import av
import numpy as np
import pytest
from torchvision.transforms.functional import to_pil_image

import data
import train
from colab import toy, videos
from data import DATASETS, find_clips, video_files_in

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


def names(clips):
    return [clip.path.rpartition("/")[2] for clip in clips]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_named_dataset_is_found(layout, tmp_path):
    root = tmp_path / "data"
    classes = LAYOUTS[layout](root)
    found = find_clips(layout.split()[0], root)
    gone = "bike" in classes[1]  # Kinetics lists a video that is no longer on the net
    assert found.classes == classes and len(found.train) == len(found.val) == (3 if gone else 2)
    assert not {c.path for c in found.train} & {c.path for c in found.val} and len(found.test) == 0
    assert found.missing == (("train: 1 of 4 videos are missing", "val: 1 of 4 videos are missing") if gone else ())
    assert found.flip == DATASETS[layout.split()[0]].flip and not found.small and not found.groups
    for clip in (*found.train, *found.val):
        assert len(data.open_video(clip.path)) == 16


def test_labels_follow_the_annotations(tmp_path):
    something(tmp_path / "ssv2", new=True)
    found = find_clips("ssv2", tmp_path / "ssv2")
    assert [(c.path.rpartition("/")[2], c.label) for c in found.train] == [("10.webm", 1), ("11.webm", 0)]
    assert found.flip == {86: 87, 87: 86, 93: 94, 94: 93, 166: 167, 167: 166}
    assert DATASETS["ssv1"].flip is None and DATASETS["k400"].flip == {}
    kinetics(tmp_path / "k400", "flat")
    assert [c.label for c in find_clips("k400", tmp_path / "k400").val] == [1, 0, 2]
    something_v1(tmp_path / "ssv1")
    assert [(c.path.rpartition("/")[2], c.label) for c in find_clips("ssv1", tmp_path / "ssv1").train] == [
        ("10", 1),
        ("11", 0),
    ]
    diving(tmp_path / "diving")
    assert [c.label for c in find_clips("diving48", tmp_path / "diving").val] == [0, 40]


def test_the_folds_of_ucf_and_hmdb_are_their_own(tmp_path):
    ucf(tmp_path / "ucf")
    hmdb(tmp_path / "hmdb")
    for fold in (1, 2, 3):
        found = find_clips("ucf101", tmp_path / "ucf", fold=fold)
        assert names(found.train) == [f"v_{name}_g01_c0{fold}.avi" for name in ("ApplyEyeMakeup", "YoYo")]
        assert names(found.val) == [f"v_{name}_g01_c0{fold + 3}.avi" for name in ("ApplyEyeMakeup", "YoYo")]
        assert [c.label for c in found.train] == [c.label for c in found.val] == [0, 1]
        found = find_clips("hmdb51", tmp_path / "hmdb", fold=fold)
        use = {1: ("a (1)", "b"), 2: ("c", "a (1)"), 3: ("b", "c")}[fold]
        for clips, name in zip((found.train, found.val), use):
            assert names(clips) == [f"brush_hair {name}.avi", f"wave {name}.avi"] and [c.label for c in clips] == [0, 1]


def test_annotations_may_lie_elsewhere(tmp_path):
    ucf(tmp_path / "a")
    (tmp_path / "a" / "ucfTrainTestlist").rename(tmp_path / "notes")
    with pytest.raises(FileNotFoundError, match=r"no annotations for train below .*a: looked for trainlist01.txt"):
        find_clips("ucf101", tmp_path / "a")
    assert len(find_clips("ucf101", tmp_path / "a", annotations=tmp_path / "notes").train) == 2


def test_of_two_annotation_files_the_higher_one_is_taken(tmp_path):
    kinetics(tmp_path, "flat")
    (tmp_path / "a" / "old").mkdir(parents=True)
    (tmp_path / "a" / "old" / "train.csv").write_text("label,youtube_id,time_start,time_end,split\n")
    assert len(find_clips("k400", tmp_path).train) == 3


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data-root"):
        find_clips("k400")
    for name, source in [(name, source) for name, source in DATASETS.items() if name != "toy_captions"]:
        with pytest.raises(FileNotFoundError, match="no annotations for train") as error:
            find_clips(name, tmp_path)
        assert source.train.split()[0].format(1) in str(error.value) and str(tmp_path) in str(error.value)
    kinetics(tmp_path / "k", "flat")
    (tmp_path / "k" / "validate.csv").write_text("label,youtube_id,time_start,time_end,split\nzorbing,a,1,2,val\n")
    write(tmp_path / "k" / "a_000001_000002.mp4")
    with pytest.raises(ValueError, match="val has the class 'zorbing', not one of the 3"):
        find_clips("k400", tmp_path / "k")
    for video in (tmp_path / "k").glob("*.mp4"):
        video.unlink()
    with pytest.raises(FileNotFoundError, match=r"none of the 4 videos that .*train\.csv names is below"):
        find_clips("k400", tmp_path / "k")
    for text in ("no,kinetics\n1,2\n", "", "label,youtube_id,time_start,time_end,split\n"):
        (tmp_path / "k" / "train.csv").write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=r"train\.csv"):
            find_clips("k400", tmp_path / "k")


@pytest.fixture
def folder(tmp_path):
    """train and val with two classes each; each has a file, a file deeper down, and a folder of frames."""
    for split in ("train", "val"):
        for c, name in enumerate(("riding a bike", "surfing")):
            write(tmp_path / split / name / "0.mp4", c)
            write(tmp_path / split / name / "more" / "1.mp4", c)
            write(tmp_path / split / name / "2", c)
        (tmp_path / split / ".ipynb_checkpoints").mkdir()
        (tmp_path / split / "surfing" / "._0.mp4").write_text("what macOS leaves")
        (tmp_path / split / "readme.txt").write_text("no class")
    return tmp_path


def test_a_folder_of_class_folders(folder):
    found = find_clips(str(folder))
    assert found.classes == ["riding a bike", "surfing"] and found.flip == {} and found.missing == ()
    assert [len(found.train), len(found.val), len(found.test)] == [6, 6, 0]
    assert names(found.train) == ["0.mp4", "2", "1.mp4"] * 2 and [c.label for c in found.val] == [0, 0, 0, 1, 1, 1]
    shutil.copytree(folder / "val", folder / "test")
    assert len(find_clips(str(folder)).test) == 6
    (folder / "val" / "sailing").mkdir()
    write(folder / "val" / "sailing" / "0.mp4")
    with pytest.raises(ValueError, match="val has the class 'sailing', not one of the 2"):
        find_clips(str(folder))
    (folder / "train" / "sailing").mkdir()
    with pytest.raises(ValueError, match="sailing holds no videos"):
        find_clips(str(folder))
    (folder / "train" / "sailing").rmdir()
    shutil.rmtree(folder / "val")
    with pytest.raises(FileNotFoundError, match=r"no videos for val: .* must hold train/CLASS"):
        find_clips(str(folder))


def test_list_files_with_blanks_tabs_and_commas(folder):
    train, val = folder / "train.txt", folder / "val.txt"
    train.write_text("train/riding a bike/0.mp4 0\ntrain/surfing/0.mp4\t1\n\ntrain/surfing/2,1\n")
    val.write_text("val/riding a bike/0.mp4 0\n")
    found = find_clips(str(train), val_data=str(val))  # paths start at the list's own folder
    assert [clip.label for clip in found.train] == [0, 1, 1] and found.classes == ["0", "1"] and len(found.val) == 1
    assert found.train[0].path == str(folder / "train/riding a bike/0.mp4")
    assert len(data.open_video(found.train[2].path)) == 16  # a folder of frames
    val.write_text("val/surfing/0.mp4 2\n")
    with pytest.raises(ValueError, match="val has the class 2, not one of the 2"):
        find_clips(str(train), folder, str(val))
    with pytest.raises(FileNotFoundError, match="--val-data"):
        find_clips(str(train))


def test_the_root_of_a_list_is_found_though_its_first_videos_are_missing(folder):
    lines = [f"surfing/gone{i}.mp4 0" for i in range(50)] + ["surfing/0.mp4 0"] * 3
    (folder / "train.txt").write_text("\n".join(lines))
    (folder / "val.txt").write_text("surfing/0.mp4 0")
    found = find_clips(str(folder / "train.txt"), folder, str(folder / "val.txt"))
    assert len(found.train) == 53 and found.train[-1].path == str(folder / "train/surfing/0.mp4")


@pytest.mark.parametrize(
    ("train", "says"),
    [
        (
            "train/surfing/0.mp4 0\ntrain/surfing/1.mp4 surfing\n",
            "train.txt: expected `path label` .* found .*surfing'",
        ),
        ("", "train.txt: none of its 0 videos"),
        ("elsewhere/0.mp4 0\n", "is --data-root right"),
    ],
)
def test_list_files_that_are_wrong_say_where(folder, train, says):
    (folder / "train.txt").write_text(train)
    (folder / "val.txt").write_text("val/surfing/0.mp4 0\n")
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        find_clips(str(folder / "train.txt"), folder, str(folder / "val.txt"))
    with pytest.raises(FileNotFoundError, match=r"--data kinetics: neither toy, k400, .* nor a folder"):
        find_clips("kinetics")


def test_a_file_whose_name_is_not_text_is_read(folder):
    name = os.fsdecode(b"caf\xe9.mp4")
    shutil.copy(folder / "train/surfing/0.mp4", folder / name)
    (folder / "train.txt").write_bytes(os.fsencode(name) + b" 0\n")
    found = find_clips(str(folder / "train.txt"), folder, str(folder / "train.txt"))
    assert len(data.open_video(found.train[0].path)) == 16


def test_folders_of_frames_are_found_for_every_dataset(tmp_path):
    """Each video becomes a folder of JPEGs with its name: the clips are the same, in the same order."""
    for layout in LAYOUTS:
        root, name = tmp_path / layout.replace(" ", "-"), layout.split()[0]
        LAYOUTS[layout](root)
        files = [find_clips(name, root).train, find_clips(name, root).val]
        for path in sorted(path for path in root.rglob("*") if path.suffix in WORDS):
            path.unlink()
            write(path.with_suffix(""))
        for line, clips in zip(files, (find_clips(name, root).train, find_clips(name, root).val)):
            assert [os.path.splitext(clip.path)[0] for clip in line] == [clip.path for clip in clips]
            assert [clip.label for clip in line] == [clip.label for clip in clips]


def test_a_picture_beside_videos_makes_no_folder_of_frames(folder):
    shutil.copy(folder / "train/surfing/2/00001.jpg", folder / "train/surfing/0.jpg")
    assert len(find_clips(str(folder)).train) == 6


def test_a_tree_with_a_hundred_thousand_pictures_is_walked_in_a_moment(tmp_path):
    for i in range(2000):
        (tmp_path / str(i)).mkdir()
        for n in range(50):
            os.symlink("nothing", tmp_path / str(i) / f"{n:05d}.jpg")  # nobody looks inside
    started = time.monotonic()
    videos, others = data.walk(tmp_path)
    assert len(videos) == 2000 and not others and time.monotonic() - started < 3


def test_predictions_take_files_and_folders(folder):
    surfing, file = folder / "val" / "surfing", folder / "val" / "riding a bike" / "0.mp4"
    expected = [str(file), *(str(surfing / name) for name in ("0.mp4", "2", "more/1.mp4"))]
    assert video_files_in([str(file), surfing]) == expected
    assert video_files_in([surfing / "2"]) == [str(surfing / "2")] and len(video_files_in([folder])) == 12
    (folder / "empty").mkdir()
    for place in (folder / "empty", folder / "nowhere.mp4"):
        with pytest.raises(FileNotFoundError, match=place.name):
            video_files_in([file, place])


@pytest.mark.parametrize("line", ["{path}", "{relative}", "{path}: damaged at frame 3"])
@pytest.mark.parametrize("video", ["0.mp4", "2"])
def test_skip_takes_paths_and_a_runs_own_list(folder, monkeypatch, line, video):
    monkeypatch.chdir(folder)
    relative = f"train/surfing/{video}"
    (folder / "skip.txt").write_text(line.format(path=folder / relative, relative=relative) + "\n")
    found = find_clips(str(folder), skip="skip.txt")
    assert len(found.train) == 5 and str(folder / relative) not in {clip.path for clip in found.train}
    assert len(found.val) == 6 and found.missing == ()


def test_check_finds_what_is_broken_and_training_can_leave_it_out(tmp_path, capsys):
    root, out = tmp_path / "data", tmp_path / "broken.txt"
    kinetics(root, "flat")
    bad = sorted(root.glob("train*.mp4"))[0]
    bad.write_bytes(bad.read_bytes()[:400])
    write(root / "frames" / "val02-x_yz_000003_000013")
    (root / "val02-x_yz_000003_000013.mp4").unlink()
    videos.main(["check", "--data", "k400", "--data-root", str(root), "--out", str(out), "--workers", "2"])
    said = capsys.readouterr().out
    assert "k400: 3 classes; videos: 3 train, 3 val, 0 test" in said and "1 of 4 videos are missing" in said
    assert "frames per video: 16 to 16, median 16" in said and "1 of 6 videos are broken" in said
    assert f"{bad}: " in said and out.read_text() == f"{bad}\n"
    found = find_clips("k400", root, skip=out)
    assert len(found.train) == 2 and len(found.val) == 3


def kill(path):
    if "killer" in path:
        os._exit(9)
    if "hangs" in path:
        videos.alarm(1)
        time.sleep(60)
    return 16, ""


def test_check_survives_videos_that_kill_or_hold_up_their_process(monkeypatch):
    monkeypatch.setattr(videos, "inspect", kill)
    paths = [f"{i}.mp4" for i in range(5)] + ["killer.mp4", "hangs.mp4", "5.mp4"]
    results = list(videos.inspect_all(paths, workers=2))
    assert [frames for frames, _ in results] == [16] * 5 + [0, 0, 16]
    assert all(f"{path}: it ends the process" in results[i][1] for i, path in ((5, "killer.mp4"), (6, "hangs.mp4")))


def test_a_video_that_takes_too_long_is_given_up(tmp_path, monkeypatch):
    write(tmp_path / "clip.mp4")
    monkeypatch.setattr(videos, "LIMIT", 1)
    monkeypatch.setattr(data.Video, "upright_rgb", lambda *_: time.sleep(60))
    ((frames, problem),) = videos.inspect_all([str(tmp_path / "clip.mp4")], workers=1)
    assert frames == 0 and "takes over 1 s" in problem


def test_show_draws_frames(tmp_path, capsys):
    write(tmp_path / "clip.mp4")
    videos.main(["show", str(tmp_path / "clip.mp4"), str(tmp_path / "frames.png"), "--frames", "4", "--size", "32"])
    assert (tmp_path / "frames.png").stat().st_size > 1000
    with pytest.raises(SystemExit) as stop:
        videos.main(["show", str(tmp_path / "no.mp4"), str(tmp_path / "frames.png")])
    assert stop.value.code == 2 and "no.mp4: there is no such file" in capsys.readouterr().err


# What follows trains: each dataset goes through train.py as a user would run it.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_named_dataset_is_trained_on_and_evaluated(layout, tmp_path):
    import train

    root, name = tmp_path / "data", layout.split()[0]
    LAYOUTS[layout](root)
    flags = f"--method aim --data {name} --data-root {root} --backbone ViT-Toy-16 --pretrained none --epochs 1"
    flags += " --warmup-epochs 0 --batch-size 2 --num-frames 4 --span 0 --workers 0 --device cpu"
    result = train.main([*flags.split(), "--out", str(tmp_path / "run")])
    assert result["videos"] == len(find_clips(name, root).val)


# Captions


def sentences(folder, name, captions):
    clips = {video: texts for video, texts in captions.items()}
    lines = [
        {"sen_id": i, "video_id": v, "caption": t} for i, (v, t) in enumerate((v, t) for v in clips for t in clips[v])
    ]
    (folder / name).write_text(json.dumps({"info": {}, "videos": [], "sentences": lines}))


def msrvtt(root, layout):
    train = {f"video{i}": [f"a man does {i}", f"somebody plays {i}"] for i in range(3)}
    other = {"video9": ["not in the list"]}
    if layout == "halves":
        sentences(root, "train_val_videodatainfo.json", dict(list(train.items())[:2]))
        sentences(root, "test_videodatainfo.json", dict(list(train.items())[2:]) | other)
    else:
        sentences(root, "MSRVTT_data.json", train | other)
    (root / "MSRVTT_train.9k.csv").write_text("video_id\n" + "\n".join(train) + "\n")
    rows = [
        "key,vid_key,video_id,sentence",
        'ret0,msr7,video7,"a cat, then a dog"',
        "ret1,msr8,video8,a red car drives",
    ]
    (root / "MSRVTT_JSFUSION_test.csv").write_text("\n".join(rows) + "\n")
    test = {"video7": ["a cat, then a dog"], "video8": ["a red car drives"]}
    return dict(train=train, val=test)


def msvd(root, layout):
    splits = {
        split: {f"-4ws_{split}{i}_5_15": [f"a {split} {i}", "the same again"] for i in range(2)}
        for split in data.SPLITS
    }
    lines = ["# comments, as the site's file begins", ""]
    for split, captions in splits.items():
        (root / f"{split}_list.txt").write_text("\n".join(captions) + "\n")
        lines += [f"{video} {text}" for video, texts in captions.items() for text in texts]
    (root / "AllVideoDescriptions.txt").write_text("\n".join(lines) + "\n")
    return splits


def vatex(root, layout):
    splits = {
        split: {f"Ab-{split}{i}_000010_000020": [f"{split} {i}", f"again {i}"] for i in range(2)}
        for split in data.SPLITS
    }
    if layout == "lists":
        for split, captions in splits.items():
            (root / f"{split}_list.txt").write_text("\n".join(captions) + "\n")
        both = {name: {"enCap": texts} for captions in splits.values() for name, texts in captions.items()}
        (root / "vatex_data.json").write_text(json.dumps(both))
        return splits
    names = ("training_v1.0", "validation_v1.0", "public_test_english_v1.1")
    for name, captions in zip(names, splits.values()):
        clips = [{"videoID": video, "enCap": texts, "chCap": ["x"]} for video, texts in captions.items()]
        (root / f"vatex_{name}.json").write_text(json.dumps(clips))
    return splits


CAPTIONS = [(msrvtt, "whole"), (msrvtt, "halves"), (msvd, ""), (vatex, "lists"), (vatex, "official")]


@pytest.mark.parametrize("make, layout", CAPTIONS, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("gone", [False, True])
def test_captions_are_found_in_the_files_that_people_have(make, layout, gone, tmp_path):
    root, suffix = tmp_path, ".avi" if make is msvd else ".mp4"
    splits = make(root, layout)
    for i, name in enumerate(dict.fromkeys(name for captions in splits.values() for name in captions)):
        if not (gone and name == next(iter(splits["train"]))):
            write(root / "videos" / f"{i % 2}" / f"{name}{suffix}", i)
    found = find_clips(make.__name__, root)
    names = {os.path.basename(path).removesuffix(suffix): path for path in found.captions if path}
    first = next(iter(splits["train"])) if gone else None
    for split, captions in splits.items():
        kept = {names[name]: texts for name, texts in captions.items() if name != first}
        assert {path: found.captions[path] for path in kept} == kept
        numbers = {path: range(len(texts) if split == "train" else 1) for path, texts in kept.items()}
        assert sorted(getattr(found, split)) == sorted((path, k) for path, ks in numbers.items() for k in ks)
    videos = len(splits["train"])
    assert found.missing == ((f"train: 1 of {videos} videos are missing",) if gone else ())
    assert found.classes == [] and found.flip == {} and "" not in found.captions


def test_captions_that_no_file_holds_are_said(tmp_path):
    msrvtt(tmp_path, "halves")
    write(tmp_path / "video0.mp4")
    write(tmp_path / "video7.mp4")
    (tmp_path / "test_videodatainfo.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"test_videodatainfo\.json"):
        find_clips("msrvtt", tmp_path)
    sentences(tmp_path, "test_videodatainfo.json", {})
    with pytest.raises(ValueError, match=r"MSRVTT_train.9k.csv .*video2"):
        find_clips("msrvtt", tmp_path)


def test_videos_with_captions_train_and_are_evaluated(tmp_path, capsys, monkeypatch):
    said, tokenize = [], toy.tokenize
    monkeypatch.setattr(toy, "tokenize", lambda texts: said.append(sorted(texts)) or tokenize(texts))
    splits = msvd(tmp_path, "")
    for i, name in enumerate(name for captions in splits.values() for name in captions):
        write(tmp_path / f"{name}.avi", i)
    (tmp_path / "-4ws_val0_5_15.avi").write_text("broken")
    (tmp_path / "-4ws_train0_5_15.avi").unlink()
    small = "--backbone ViT-Toy-16 --pretrained shipped --num-frames 4 --batch-size 2 --epochs 1 --device cpu"
    argv = ["--method", "side4video", "--data", "msvd", "--data-root", str(tmp_path), "--out", str(tmp_path / "run")]
    result = train.main([*argv, *small.split(), "--set", "width=64"])
    assert said[0] == ["a train 1", "the same again"]  # each caption of the only video that is left, in the only step
    assert result["videos"] == 1 and "over the mirror" not in result
    assert "train: 1 of 2 videos are missing" in capsys.readouterr().out
    assert "val0" in (tmp_path / "run/skipped.txt").read_text()
    test = ["--eval", "--split", "test", "--checkpoint", str(tmp_path / "run/checkpoint.pt"), "--device", "cpu"]
    assert train.main(test)["videos"] == 2
    assert len((tmp_path / "run/ranks.csv").read_text().splitlines()) == 1 + 4 + 2
    videos.main(["check", "--data", "msvd", "--data-root", str(tmp_path), "--out", str(tmp_path / "broken.txt")])
    assert "msvd: 10 captions; videos: 1 train, 2 val, 2 test" in capsys.readouterr().out
