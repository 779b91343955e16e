"""The labs: notebooks that mirror the files, run as they are handed out, and checks that name a student's mistake."""

import contextlib
import importlib
import inspect
import json
import re
import subprocess
import sys
import textwrap
import time
import zipfile

import pytest

pytest.importorskip("matplotlib", reason="the labs draw with matplotlib, which is not installed here")
pytest.importorskip("IPython", reason="the labs show pictures with IPython (ipykernel), which is not installed here")

import torch
import torch.nn.functional as F
from einops import rearrange

import common
from colab import build, check, lab, toy

LABS = [pytest.param(file, id=file.stem) for file in build.lab_files()]
every_lab = pytest.mark.parametrize("file", LABS)


def tagged(cell, tag):
    return tag in cell["metadata"].get("tags", [])


def committed(file):
    notebook = json.loads((build.COLAB / f"{file.stem}.ipynb").read_text(encoding="utf-8"))
    return notebook | {"cells": [c | {"source": "".join(c["source"])} for c in notebook["cells"]]}


def shown_targets(file):
    lines = re.findall(r"^# SHOW (.*)$", file.read_text(encoding="utf-8"), re.M)
    return [target.strip() for line in lines for target in line.split(",")]


def project_object(target):
    """common.ViT.embed -> the class or module that holds it, its name, the object"""
    parts = target.split(".")
    depth = next(k for k in range(len(parts), 0, -1) if (build.ROOT / "/".join(parts[:k])).with_suffix(".py").is_file())
    holder = importlib.import_module(".".join(parts[:depth]))
    for part in parts[depth:-1]:
        holder = getattr(holder, part)
    return holder, parts[-1], inspect.getattr_static(holder, parts[-1])


def checks(file):
    """The check module of a lab and its exercises, all unsolved"""
    module = importlib.import_module(f"colab.checks.lab{file.stem.split('_')[0]}")
    exercises = [e for (name, _), e in check.EXERCISES.items() if name == module.__name__]
    for exercise in exercises:
        exercise.state = check.NOT_WRITTEN
    return module, exercises


@pytest.fixture
def namespace(file, monkeypatch):
    """An empty __main__ for the cells of a lab in its fast form, in colab/; what SHOW cells replace is put back."""
    monkeypatch.setenv("LABS_FAST", "1")
    monkeypatch.chdir(build.COLAB)
    monkeypatch.setattr(sys, "path", list(sys.path))
    module, exercises = checks(file)  # a notebook imports the checks of its own lab only
    monkeypatch.setattr(check, "EXERCISES", {(module.__name__, e.name): e for e in exercises})
    for target in shown_targets(file):
        monkeypatch.setattr(*project_object(target))
    return {"__name__": "__main__"}


def execute(cell, namespace):
    exec(compile(cell["source"], f"cell {cell['id']}", "exec"), namespace)


def in_place(solution):
    """The cell of a solution as a student runs it who wants to use it"""
    source, decorators = re.subn(r"^@check\.solution.*\n", "", solution["source"], flags=re.M)
    assert decorators == 1, "a solution defines one function or class"
    return solution | {"source": source}


def exercises_of(cells):
    """[(stub, check, solution), ...]"""
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    return [code[i : i + 3] for i, cell in enumerate(code) if tagged(cell, "exercise")]


@every_lab
def test_the_committed_notebook_is_what_its_source_builds(file):
    notebook = committed(file)
    built = build.make(file, repo=notebook["metadata"]["repo"])
    assert build.without_outputs(notebook) == built, "run: python colab/build.py"
    assert built == build.make(file, repo=notebook["metadata"]["repo"])


@every_lab
def test_shown_definitions_are_those_of_the_files(file):
    shown = "\n".join(cell["source"] for cell in committed(file)["cells"] if tagged(cell, "show"))
    assert shown_targets(file)
    for target in shown_targets(file):
        definition = project_object(target)[2]
        definition = definition.fget if isinstance(definition, property) else definition
        if callable(definition):
            assert textwrap.dedent(inspect.getsource(definition)) in shown, f"{target} differs: python colab/build.py"
        name = target.split(".")[-1]
        assert re.search(rf"^\S*\.{name} = {name}  # from here on", shown, re.M), f"the project does not use {target}"


@every_lab
def test_the_notebook_has_the_form_that_was_agreed(file):
    notebook = committed(file)
    cells, exercises = notebook["cells"], exercises_of(notebook["cells"])
    assert (build.COLAB / f"{file.stem}.ipynb").stat().st_size < 1_000_000
    assert 40 <= len(cells) <= 60
    assert 1200 <= build.count_words(notebook) <= 1800
    assert 3 <= len(exercises) <= 4
    for stub, checked, solution in exercises:
        assert "raise NotImplementedError" in stub["source"] and '"""' in stub["source"]
        assert "check." in checked["source"]
        assert solution["source"].startswith("#@title Solution") and tagged(solution, "solution")
        assert solution["metadata"]["cellView"] == "form" and solution["metadata"]["jupyter"]["source_hidden"]
    for cell in cells[1:]:
        if cell["cell_type"] == "code":
            assert tagged(cell, "show") or cell["source"].count("\n") < 30, cell["source"]
            kinds = {output["output_type"] for output in cell["outputs"]}
            assert not kinds & {"error", "execute_result"}  # a cell prints or draws; its last value is nobody's result
            assert not any(re.search(r"0x[0-9a-f]{6}|/tmp/|/home/|/root/", json.dumps(o)) for o in cell["outputs"])
    pictures = [i for i, cell in enumerate(cells) if '"image/' in json.dumps(cell.get("outputs", ""))]
    assert len(pictures) >= len(cells) / 6
    assert "check.progress()" in cells[-1]["source"]


@every_lab
def test_checks_know_the_solution_the_stub_and_typical_mistakes(file, namespace, capsys):
    cells = build.make(file)["cells"]
    module, exercises = checks(file)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    for cell in code[:2] + [cell for cell in code if tagged(cell, "show")]:  # find the project, imports, definitions
        execute(cell, namespace)
    assert len(exercises) == len(exercises_of(cells))
    for exercise, (stub, checked, solution) in zip(exercises, exercises_of(cells)):
        execute(stub, namespace)
        capsys.readouterr()
        execute(checked, namespace)
        name = re.search(r"= check\.(\w+)\((\w+)\)", checked["source"])[2]
        assert f"{exercise.name}: not written yet." in capsys.readouterr().out
        assert namespace[name] is exercise.reference, "unsolved, the lab goes on with the project's own"
        execute(checked, namespace)
        assert f"{exercise.name}: not written yet." in capsys.readouterr().out, "the check was run twice"
        execute(solution, namespace)
        assert namespace[name] is exercise.reference, "a solution that is run must change nothing"

        execute(in_place(solution), namespace)
        own = namespace[name]
        execute(checked, namespace)
        assert f"{exercise.name}: right." in capsys.readouterr().out
        assert namespace[name] is own, "solved, the lab goes on with the student's"

        assert len(exercise.mistakes) >= 2
        for sentence, wrong in exercise.mistakes:
            assert [exercise.verdict(wrong) for _ in range(3)] == [sentence] * 3
    module.progress()
    assert f"{len(exercises)} of {len(exercises)} solved" in capsys.readouterr().out


@every_lab
def test_the_claims_of_the_lab_hold_with_solutions_in_place(file, namespace):
    cells = build.make(file, tests=True)["cells"]
    solutions = {stub["id"]: in_place(solution) for stub, _, solution in exercises_of(cells)}
    _, exercises = checks(file)
    assert any(tagged(cell, "test") for cell in cells)
    for cell in cells:
        if cell["cell_type"] == "code" and not tagged(cell, "solution"):
            execute(solutions.get(cell["id"], cell), namespace)
    assert [exercise.state for exercise in exercises] == [check.SOLVED] * len(exercises)


@pytest.mark.slow
@every_lab
def test_the_notebook_runs_as_it_is_handed_out(file, monkeypatch):
    pytest.importorskip("nbclient", reason="running whole notebooks needs nbclient, which is not installed here")
    pytest.importorskip("ipykernel", reason="running whole notebooks needs ipykernel, which is not installed here")
    monkeypatch.delenv("LABS_FAST", raising=False)
    start = time.time()
    notebook = build.run(build.make(file, tests=True))
    printed = "".join("".join(o.get("text", "")) for c in notebook["cells"] for o in c.get("outputs", []))
    print(f"{file.stem}: {time.time() - start:.0f} s")  # at most 300 on two cores, which a test cannot promise
    assert "0 of " in printed and "solved" in printed


def test_copies_for_students_hold_no_solutions(tmp_path):
    build.main(["--student", str(tmp_path / "class"), "--no-run"])
    copies = sorted((tmp_path / "class").glob("*.ipynb"))
    assert [copy.stem for copy in copies] == [file.stem for file in build.lab_files()]
    for copy in copies:
        cells = json.loads(copy.read_text(encoding="utf-8"))["cells"]
        assert not any(tagged(cell, "solution") or "title Solution" in "".join(cell["source"]) for cell in cells)
        assert not any(cell.get("outputs") for cell in cells), "results would spoil the guesses"
        assert any(tagged(cell, "exercise") for cell in cells)


def test_addresses_are_written_only_where_one_is_given(tmp_path, monkeypatch):
    file = build.lab_files()[0]
    plain = "".join(cell["source"] for cell in build.make(file)["cells"])
    linked = build.make(file, repo="somebody/project")["cells"]
    assert "Upload notebook" in plain and "badge" not in plain and "blob/main" not in plain
    assert "Upload notebook" not in linked[1]["source"]
    assert f"colab.research.google.com/github/somebody/project/blob/main/colab/{file.stem}.ipynb" in linked[1]["source"]
    assert 'REPO = "somebody/project"' in linked[0]["source"] and 'REPO = ""' in plain
    monkeypatch.setattr(build, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text(f"[Lab 1](colab/{file.stem}.ipynb) is first.\n")
    build.badges("a/b")
    build.badges("somebody/project")  # a second time, it takes the place of the first
    text = (tmp_path / "README.md").read_text()
    assert text.count("colab-badge.svg") == 1 and "somebody/project" in text and text.endswith(") is first.\n")


def test_a_rebuilt_notebook_keeps_the_output_of_unchanged_cells(tmp_path):
    file = build.lab_files()[0]
    path = tmp_path / "lab.ipynb"
    old = build.make(file)
    code = [cell for cell in old["cells"] if cell["cell_type"] == "code"]
    code[3]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["old"]}]
    build.write(old, path, 0)
    new = build.make(file)
    build.keep_outputs(new, path)
    assert [cell.get("outputs") for cell in new["cells"]] == [cell.get("outputs") for cell in old["cells"]]


def first_cell(folder, monkeypatch, repo=""):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    namespace = {}
    execute(build.make(build.lab_files()[0], repo=repo)["cells"][0], namespace)
    return namespace["project"]


def test_the_first_cell_finds_the_project_above_in_an_archive_or_clones_it(tmp_path, monkeypatch):
    assert first_cell(build.COLAB / "labs", monkeypatch) == build.ROOT
    with pytest.raises(FileNotFoundError, match="zip of the project"):
        first_cell(tmp_path, monkeypatch)
    runs = []

    def clone(command, **_):
        runs.append(command)
        (tmp_path / "project" / "colab").mkdir(parents=True)
        (tmp_path / "project" / "colab" / "toy.py").touch()

    monkeypatch.setattr(subprocess, "run", clone)
    assert first_cell(tmp_path, monkeypatch, "somebody/project") == tmp_path / "project"
    assert [command[:2] for command in runs] == [["git", "clone"]] and runs[0][-1].endswith("/somebody/project")
    uploaded = tmp_path / "uploaded"
    uploaded.mkdir()
    with zipfile.ZipFile(uploaded / "project-main.zip", "w") as archive:
        archive.writestr("project-main/colab/toy.py", "")
    assert first_cell(uploaded, monkeypatch) == uploaded / "project-main"
    assert len(runs) == 1, "nothing is installed where nothing is missing"


def test_the_first_cell_installs_what_is_missing_and_never_torch(tmp_path, monkeypatch):
    found, runs = importlib.util.find_spec, []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: runs.append(command))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("av", "open_clip") else found(name))
    first_cell(build.COLAB, monkeypatch)
    assert len(runs) == 1 and runs[0][1:4] == ["-m", "pip", "install"]
    assert runs[0][4:] == ["--quiet", "open_clip_torch", "av"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))
    with pytest.raises(ModuleNotFoundError, match="PyTorch and torchvision are missing"):
        first_cell(build.COLAB, monkeypatch)
    assert len(runs) == 1


def test_a_check_says_what_is_wrong_and_stops_nothing(monkeypatch, capsys):
    monkeypatch.setattr(check, "EXERCISES", {})

    @check.exercise(
        reference=lambda x: x.sum(1), mistakes=[("You summed along the wrong dimension.", lambda x: x.sum(0))]
    )
    def total(definition):
        """the sum of each row"""
        return definition(torch.randn(3, 5))

    answers = {
        "total: right.": lambda x: x @ torch.ones(5),
        "You summed along the wrong dimension.": lambda x: torch.ones(3) @ x,
        "It returns None: is the `return` missing?": lambda x: None,
        "It returns a dict, which is neither a tensor nor a number.": lambda x: {},
        "It stops with ZeroDivisionError: ": lambda x: 1 / 0,
        "The output has shape (3, 1), it should have (3,).": lambda x: x.sum(1, keepdim=True),
        "The shape is right, the values are not": lambda x: x.mean(1),
    }
    for sentence, answer in answers.items():
        used = total(answer)
        assert sentence in capsys.readouterr().out
        assert used is (answer if "right." in sentence and "total" in sentence else total.reference)
    check.progress()
    assert "0 of 1 solved" in capsys.readouterr().out


def test_modules_are_compared_with_the_same_weights():
    build_linear = lambda: torch.nn.Linear(3, 2)  # noqa: E731
    torch.manual_seed(1)
    x, a, b = torch.randn(4, 3), check.fill(build_linear()), check.fill(build_linear(), like=build_linear())
    assert torch.equal(a(x), b(x)) and not torch.equal(a(x), check.fill(torch.nn.Linear(3, 2))(x) + 1)
    with pytest.raises(check.MistakeError, match="bias is missing"):
        check.fill(torch.nn.Linear(3, 2, bias=False), like=build_linear())


def test_recomputed_attention_weights_are_those_that_attention_used():
    vit = common.ViT(image_size=32, patch_size=16, width=12, layers=2, heads=3).eval()
    attn, outputs = vit.blocks[1].attn, []
    attn.register_forward_hook(lambda module, inputs, output: outputs.append((inputs[0], output)))
    with lab.attention_weights(vit) as kept, torch.no_grad():
        vit(torch.randn(2, 3, 32, 32))
    assert list(kept) == ["transformer.resblocks.0.attn", "transformer.resblocks.1.attn"]
    (weights,), (x, y) = kept["transformer.resblocks.1.attn"], outputs[0]
    assert weights.shape == (2, 3, 5, 5) and torch.allclose(weights.sum(-1), torch.ones(2, 3, 5))
    v = rearrange(F.linear(x, attn.in_proj_weight[24:], attn.in_proj_bias[24:]), "b n (h d) -> b h n d", h=3)
    assert torch.allclose(attn.out_proj(rearrange(weights @ v, "b h n d -> b n (h d)")), y, atol=1e-6)
    assert len(attn._forward_hooks) == 1, "the hooks are gone after the block"


def test_a_scene_is_the_clip_of_its_file_and_knows_where_the_shape_is():
    for number in range(5):
        name = list(toy.PAIRS)[number]
        clip = toy.clip(name, lab.np.random.default_rng([1, number]))
        frames, mask = lab.scene(name, number)
        assert (frames == clip).all()
        changed = (frames != frames[0]).any(-1)
        assert not changed[~mask & ~mask[0]].mean() > 0.1, "outside of the outline only its soft edge changes"
        backwards, mirrored = lab.scene(toy.PAIRS[name], number)
        assert (backwards == frames[::-1]).all() and (mirrored == mask[::-1]).all()
    videos, labels, pairs = lab.load("val", range(1, 16, 2), limit=10, fast=True)
    assert videos.shape == (10, 8, 3, 64, 64) and labels.tolist() == [lab.CLASSES.index(name) for name in lab.PAIRED]
    assert pairs.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.slow
def test_fast_clips_are_those_on_disk_but_for_compression():
    disk, fast = lab.load("val", limit=20), lab.load("val", limit=20, fast=True)
    order = [sorted(zip(pairs.tolist(), labels.tolist(), range(20))) for _, labels, pairs in (disk, fast)]
    assert [x[:2] for x in order[0]] == [x[:2] for x in order[1]]
    a, b = (videos[[x[2] for x in rows]].float() for (videos, _, _), rows in zip((disk, fast), order))
    assert (a - b).abs().mean() < 6


def assert_said(answers):
    """answers: {what the check must say: (exercise, a student's wrong answer)}"""
    for sentence, (exercise, answer) in answers.items():
        verdict = exercise.verdict(answer)
        assert sentence.lower() in verdict.lower(), (sentence, verdict)


def test_lab_6_names_the_mistakes_of_students():
    from colab.checks import lab6

    def loop(accuracy, costs):  # ties count as beaten
        M = range(len(accuracy))
        return torch.tensor(
            [not any(accuracy[i] >= accuracy[j] and (costs[i] <= costs[j]).all() for i in M if i != j) for j in M]
        )

    def first_cost(accuracy, costs):
        return lab6.unbeaten(accuracy, costs[:, :1])

    def pairs(accuracy, costs, beats):  # True for a method that no other one beats
        M = range(len(accuracy))
        return torch.tensor([not any(beats(accuracy[i], accuracy[j], costs[i], costs[j]) for i in M) for j in M])

    def costs_alone(accuracy, costs):
        return pairs(accuracy, costs, lambda a, b, c, d: (c <= d).all() and (c < d).any())

    def cheaper_only(accuracy, costs):
        return pairs(accuracy, costs, lambda a, b, c, d: a >= b and (c <= d).all() and (c < d).any())

    def beats_nobody(accuracy, costs):
        return pairs(accuracy, costs, lambda b, a, d, c: a >= b and (c <= d).all() and (a > b or (c < d).any()))

    def probabilities(images, texts, scale):
        clip = F.normalize(F.normalize(images, dim=1).mean(0), dim=0)
        return (scale * (F.normalize(texts, dim=1) @ clip)).softmax(0)

    def labels_in_turn(v, y):
        return torch.cat([v, v.flip(1)]), torch.stack([2 * y, 2 * y + 1], 1).flatten()

    def mean_cosine(images, texts, scale):
        return (scale * F.cosine_similarity(texts[:, None], images[None], dim=-1).mean(1)).softmax(-1)

    def wrong_dimension(images, texts, scale):
        clip = F.normalize(F.normalize(images, dim=0).mean(0), dim=0)
        return (scale * clip @ F.normalize(texts, dim=1).T).softmax(0)

    answers = {
        "count only those whose predicted class": (lab6.direction, lambda p, y, m: sum(p == y) / len(y)),
        "That is the share of clips with the right pair": (
            lab6.direction,
            lambda p, y, m: sum((p == y) + (p == m[y])) / len(y),
        ),
        "It stops with IndexError": (lab6.direction, lambda p, y, m: m[p + 9]),
        "You marked only the most accurate": (lab6.front, lambda a, c: a == max(a)),
        "one of two equal methods": (lab6.front, loop),
        "You compare the costs alone": (lab6.front, costs_alone),
        "with equal costs, higher accuracy beats": (lab6.front, cheaper_only),
        "mark those that nobody beats": (lab6.front, beats_nobody),
        "the values are not": (lab6.front, first_cost),
        "you return the numbers": (lab6.front, lambda a, c: lab6.unbeaten(a, c).nonzero()[:, 0]),
        "the numbers 2 k and 2 k + 1 is not said": (
            lab6.direction,
            lambda p, y, m: sum(p == y) / sum(p // 2 == y // 2),
        ),
        "by all clips but those of the mirror class": (lab6.direction, lambda p, y, m: sum(p == y) / sum(p != m[y])),
        "the mean of the frames' vectors is shorter than 1": (lab6.zero_shot, mean_cosine),
        "a frame's vector is a row": (lab6.zero_shot, wrong_dimension),
        "you divided by it": (lab6.zero_shot, lambda x, y, s: probabilities(x, y, 1 / s)),
        "you took its exponential": (lab6.zero_shot, lambda x, y, s: probabilities(x, y, 2.718281828**s)),
        "`scale` stands inside": (lab6.zero_shot, lambda x, y, s: s * probabilities(x, y, 1)),
        "Only the first frame": (lab6.zero_shot, lambda x, y, s: probabilities(x[:1], y, s)),
        "The labels take turns": (lab6.mirrors, labels_in_turn),
        "you joined along time": (
            lab6.mirrors,
            lambda v, y: (torch.cat([v, v.flip(1)], dim=1), torch.cat([2 * y, 2 * y + 1])),
        ),
        "The reversed copies come first": (
            lab6.mirrors,
            lambda v, y: (torch.cat([v.flip(1), v]), torch.cat([2 * y + 1, 2 * y])),
        ),
        "first, then the labels": (
            lab6.mirrors,
            lambda v, y: (torch.cat([2 * y, 2 * y + 1]), torch.cat([v, v.flip(1)])),
        ),
        "`scale` is missing": (lab6.zero_shot, lambda x, y, s: lab6.names_of_clip(x, y, 1)),
        "inside of each clip, dimension 1": (lab6.mirrors, lambda v, y: lab6.flipped(0)(v, y)),
        "mirrored the picture": (lab6.mirrors, lambda v, y: lab6.flipped(4)(v, y)),
        "clips and copies take turns": (
            lab6.mirrors,
            lambda v, y: (
                torch.stack([v, v.flip(1)], 1).flatten(0, 1),
                torch.stack([2 * y, 2 * y + 1], 1).flatten(),
            ),
        ),
        "Return two things": (lab6.mirrors, lambda v, y: torch.cat([v, v.flip(1)])),
    }
    assert_said(answers)


def test_the_picture_of_the_four_methods_is_that_of_the_lab():
    for file in build.lab_files():
        for name, picture in build.pictures_of(committed(file)).items():
            assert (build.COLAB / name).read_bytes() == picture, "run: python colab/build.py"
            assert len(picture) < 150_000
    assert (build.COLAB / "four_methods.png").is_file()


def test_without_a_network_a_lab_knows_it_within_seconds(monkeypatch):
    start = time.time()
    assert not lab.online("no-such-host.invalid", seconds=2)
    monkeypatch.setattr(lab.socket, "create_connection", lambda *_: time.sleep(60))  # a look-up that hangs
    assert not lab.online(seconds=0.2)
    assert time.time() - start < 5
    monkeypatch.setattr(lab.socket, "create_connection", lambda *_: contextlib.nullcontext())
    assert lab.online(seconds=2)


def test_a_filmed_clip_is_the_scene(tmp_path):
    from data import Video

    (path,) = lab.film("grows", [2], "val", tmp_path)
    frames = Video(path).read(range(toy.FRAMES))
    assert abs(frames.astype(float) - lab.scene("grows", 2)[0]).mean() < 6


def test_the_camera_of_the_browser_gives_a_file(tmp_path, monkeypatch):
    asked, output = [], type(sys)("output")
    output.eval_js = lambda code: asked.append(code) or "AAEC"
    monkeypatch.setitem(sys.modules, "google", type(sys)("google"))
    monkeypatch.setitem(sys.modules, "google.colab", type(sys)("colab"))
    sys.modules["google.colab"].output = output
    path = lab.record(tmp_path / "own.webm", seconds=3)
    assert path.read_bytes() == bytes([0, 1, 2]) and "3000" in asked[0] and "%" not in asked[0]


def test_lab_2_sees_what_is_wrong_with_an_adapter_before_it_is_called():
    from colab.checks import lab2

    class Random(lab2.aim.Adapter):
        def __init__(self, *args, **keywords):
            super().__init__(*args, **keywords)
            torch.nn.init.normal_(self.fc2.weight)

    class AllZero(lab2.aim.Adapter):
        def __init__(self, *args, **keywords):
            super().__init__(*args, **keywords)
            torch.nn.init.zeros_(self.fc1.weight)

    class Wide(lab2.aim.Adapter):
        def __init__(self, width, ratio=0.25, skip=False):
            super().__init__(width, 1.0, skip)

    class OtherNames(torch.nn.Module):
        def __init__(self, width, ratio=0.25, skip=False):
            super().__init__()
            self.down, self.up = torch.nn.Linear(width, 2), torch.nn.Linear(2, width)

    for wrong, sentence in {
        Random: "fc2 does not start at zero",
        AllZero: "fc1 starts at zero too",
        Wide: "width 8 and ratio 0.25 make 2 numbers in the middle",
        OtherNames: "is missing",
        lambda width, ratio=0.25, skip=False: lambda x: x: "An adapter is an nn.Module",
    }.items():
        assert sentence in lab2.adapter.verdict(wrong)


def test_lab_2_sees_a_division_by_zero_with_a_single_block_and_a_missing_dimension():
    from colab.checks import lab2

    def wrong(y, kept, i, layers, last):
        return y * kept[:, None, None, None] / (1 - last * i / (layers - 1))

    assert "With a single block" in lab2.drop_path.verdict(wrong)
    assert "`kept` has one value per clip" in lab2.drop_path.verdict(lambda y, kept, i, layers, last: y * kept)
    assert "It stops with" in lab2.drop_path.verdict(lambda y, kept, i, layers, last: 1 / 0)


def test_lab_3_names_the_mistakes_of_students():
    from colab.checks import lab3

    def counted_from_the_end(x, weight, bias):  # x[:, -1] at t = 0; only the other end has a condition
        y, T = bias + weight[:, 1] * x, x.shape[1]
        for t in range(T):
            y[:, t] += weight[:, 0] * x[:, t - 1] + (weight[:, 2] * x[:, t + 1] if t + 1 < T else 0)
        return y

    def valid(x, weight, bias):
        return bias + sum(weight[:, i] * x[:, i : i + x.shape[1] - 2] for i in range(3))

    def same_border(x, weight, bias):
        y = x.clone()
        y[:, 1:-1] = valid(x, weight, bias)
        return y

    def zero_border(x, weight, bias):
        y = torch.zeros_like(x)
        y[:, 1:-1] = valid(x, weight, bias)
        return y

    def viewed(x, weight, bias):
        B, T, N, C = x.shape
        return F.conv1d(x.reshape(B * N, C, T), weight[:, None], bias, padding=1, groups=C).reshape(B, T, N, C)

    def in_place(x, weight, bias):
        x[:, 1:] = x[:, 1:] + weight[:, 0] * x[:, :-1]
        x[:, :-1] = x[:, :-1] + weight[:, 2] * x[:, 1:]
        return weight[:, 1] * x + bias

    def no_class(z, H, operation):
        return operation(rearrange(z, "b t (h w) d -> b t h w d", h=H)).flatten(2, 3)

    def first_frame(z, H, operation):
        return torch.cat([z[:, :1], no_class(z[:, 1:], H, operation)], dim=1)

    def rows_are_w(z, H, operation):
        volume = operation(rearrange(z[:, :, 1:], "b t (h w) d -> b t h w d", w=H))
        return torch.cat([z[:, :, :1], volume.flatten(2, 3)], dim=2)

    def class_grows(z, H, operation):
        patches = no_class(z[:, :, 1:], H, operation)
        return torch.cat([z[:, :, :1] + patches.mean(2, keepdim=True), patches], dim=2)

    def own_sum(T, H, W, C, kernel):  # only the products inside of the volume
        return (
            F.conv3d(torch.ones(1, 1, T, H, W), torch.ones(1, 1, *kernel), padding=[k // 2 for k in kernel]).sum() * C
        )

    answers = {
        "x[:, t - 1] at t = 0 is x[:, -1]": (lab3.temporal_conv, counted_from_the_end),
        "first and the last frame are missing": (lab3.temporal_conv, valid),
        "first and the last frame stay as they were": (lab3.temporal_conv, same_border),
        "first and the last frame are zero": (lab3.temporal_conv, zero_border),
        "`reshape` does not exchange dimensions": (lab3.temporal_conv, viewed),
        "You write into x while you still read": (lab3.temporal_conv, in_place),
        "It stops with RuntimeError": (lab3.temporal_conv, lambda x, weight, bias: bias + weight[0] * x),
        "Take [class] off first": (lab3.through_volume, no_class),
        "20 patches: dimension 2": (lab3.through_volume, first_frame),
        "`operation` got the shape (2, 3, 5, 4, 7)": (lab3.through_volume, rows_are_w),
        "the mean of the patches was added": (lab3.through_volume, class_grows),
        "the products with the zeros outside": (lab3.depthwise_flops, own_sum),
        "the bias is an addition": (
            lab3.depthwise_flops,
            lambda T, H, W, C, k: T * H * W * C * (k[0] * k[1] * k[2] + 1),
        ),
        "in units of a billion": (lab3.depthwise_flops, lambda T, H, W, C, k: T * H * W * C * k[0] * k[1] * k[2] / 1e9),
        "It gives 62370 where it should give 34650": (
            lab3.depthwise_flops,
            lambda T, H, W, C, k: T * H * W * C * k[0] ** 3,
        ),
        "right for a kernel of 3 only": (lab3.frames_seen, lambda n, k: 1 + 2 * n),
        "not k / 2": (lab3.frames_seen, lambda n, k: 1 + 2 * n * k / 2),
        "cut the number off at its 8 frames": (lab3.frames_seen, lambda n, k: min(1 + n * (k - 1), 8)),
    }
    assert_said(answers)

    def in_place_and_right(x, weight, bias):
        x.copy_(lab3.convolution(x, weight, bias))
        return x

    assert lab3.temporal_conv.verdict(in_place_and_right) == check.SOLVED


def test_lab_4_names_the_mistakes_of_students():
    from colab.checks import lab4

    def roll(x, offsets):  # a circle, and the wrong direction of it
        heads = x.chunk(len(offsets), dim=-1)
        return torch.cat([head.roll(-dt, 1) for head, dt in zip(heads, offsets)], dim=-1)

    def nearest(x, offsets):
        heads, t = x.chunk(len(offsets), dim=-1), torch.arange(x.shape[1])
        return torch.cat([h[:, (t + dt).clamp(0, len(t) - 1)] for h, dt in zip(heads, offsets)], dim=-1)

    def backwards(x, offsets):
        return lab4.relocated(x, [-dt for dt in offsets])

    def no_identity(W1, b1, W2, b2, s):
        return s * (W2 @ W1), s * (W2 @ b1 + b2)

    def half_a_bias(W1, b1, W2, b2, s):
        return torch.eye(8) + s * (W2 @ W1), s * b2

    def swapped(W, b, A, a, after):
        return (W @ A, W @ a + b) if after else (A @ W, A @ b + a)

    def added_biases(W, b, A, a, after):
        return (A @ W if after else W @ A), a + b

    answers = {
        "The clip is not a circle": (lab4.relocate, roll),
        "you took the nearest frame": (lab4.relocate, nearest),
        "The sign is wrong": (lab4.relocate, backwards),
        "The identity is missing in A": (lab4.affine, no_identity),
        "b_down is missing in a": (lab4.affine, half_a_bias),
        "It stops with RuntimeError": (lab4.affine, lambda W1, b1, W2, b2, s: (torch.eye(8) + W1 @ W2, b2)),
        "The merge is on the wrong side": (lab4.merge, swapped),
        "both vectors are only added": (lab4.merge, added_biases),
        "These are the default's offsets": (lab4.choose_offsets, lambda: [2, -1, 1]),
        "the budget is 6": (lab4.choose_offsets, lambda: [-4, 1, 4]),
        "and you gave 4 offsets": (lab4.choose_offsets, lambda: [-1, 0, 1, 2]),
    }
    assert_said(answers)


def test_lab_5_names_the_mistakes_of_students():
    from colab.checks import lab5

    def from_zero(layers, side_layers, fusion):
        return range(0, layers, layers // side_layers) if fusion == "interval" else range(layers - side_layers, layers)

    def wrong_step(layers, side_layers, fusion):
        return list(range(layers))[side_layers - 1 :: side_layers]

    def roll(cls):
        first, second = cls.chunk(2, dim=-1)
        return torch.cat([first.roll(-1, 1), second.roll(1, 1)], dim=-1)

    def past_first(cls):
        first, second = F.pad(cls, (0, 0, 0, 0, 1, 1)).chunk(2, dim=-1)
        return torch.cat([first[:, :-2], second[:, 2:]], dim=-1)

    def in_place(cls):
        half = cls.shape[-1] // 2
        cls[:, :-1, :, :half] = cls[:, 1:, :, :half].clone()
        return cls

    def no_bias(s, weight, bias, c, h):
        return rearrange(s @ weight[c], "b t (h w) -> b t h w", h=h)

    def columns(s, weight, bias, c, h):
        return rearrange(F.linear(s, weight, bias)[..., c], "b t (w h) -> b t h w", h=h)

    def summed(s, weight, bias, c, h):
        return no_bias(s, weight, bias, c, h) / (s.shape[1] * s.shape[2]) + bias[c] / (s.shape[1] * s.shape[2])

    def from_the_end(cls):  # cls[:, -1] at t = 0; only the other end has a condition
        half, out = cls.shape[-1] // 2, torch.zeros_like(cls)
        for t in range(cls.shape[1]):
            if t + 1 < cls.shape[1]:
                out[:, t, :, :half] = cls[:, t + 1, :, :half]
            out[:, t, :, half:] = cls[:, t - 1, :, half:]
        return out

    def crossed(cls):
        half, padded = cls.shape[-1] // 2, F.pad(cls, (0, 0, 0, 0, 1, 1))
        return torch.cat([padded[:, :-2, :, half:], padded[:, 2:, :, :half]], dim=-1)

    def both_added(cls):
        padded = F.pad(cls, (0, 0, 0, 0, 1, 1))
        return padded[:, 2:] + padded[:, :-2]

    def line(width, known, start=0):
        (d1, m1), (d2, m2) = known.items()
        return (m1, m2)[start] + (width - d1) * (m2 - m1) / (d2 - d1)

    answers = {
        "a step is layers // side_layers = 3": (lab5.layers_read, wrong_step),
        "the numbers should rise": (lab5.layers_read, lambda *a: sorted(lab5.interval_or_top(*a))[::-1]),
        "For interval, you read the middle": (
            lab5.layers_read,
            lambda n, k, fusion: [i * (n // k) + n // k // 2 for i in range(k)] if fusion != "top" else range(n - k, n),
        ),
        "cls[:, t - 1] at t = 0 is cls[:, -1]": (lab5.cls_shift, from_the_end),
        "The halves changed places": (lab5.cls_shift, crossed),
        "You added the two frames": (lab5.cls_shift, both_added),
        "you took their mean": (
            lab5.class_map,
            lambda s, w, b, c, h: ((s * w[c]).mean(-1) + b[c]).unflatten(-1, (h, -1)),
        ),
        "yours the other way round": (lab5.class_map, lambda s, w, b, c, h: (s @ w[c] + b[c]).unflatten(-1, (-1, h))),
        "divided it by the number of patches": (
            lab5.class_map,
            lambda s, w, b, c, h: (s @ w[c] + b[c] / s.shape[2]).unflatten(-1, (h, -1)),
        ),
        "the MiB of one and the width of the other": (lab5.predict_mib, lambda width, known: line(width, known, 1)),
        "the nearest known width": (lab5.predict_mib, lambda w, known: known[min(known, key=lambda d: abs(d - w))]),
        "each step ends with the block that is read": (lab5.layers_read, from_zero),
        "layers_read(12, 4, 'interval') gives 6 blocks; it should give 4.": (
            lab5.layers_read,
            lambda n, k, _: range(1, n, 2),
        ),
        "You read the first block of each step, whatever": (lab5.layers_read, lambda n, k, _: range(0, n, n // k)),
        "`known` does not always have the width 320": (lab5.predict_mib, lambda width, known: known[320] * width / 320),
        "Return a list of block numbers": (lab5.layers_read, lambda layers, side_layers, fusion: layers // side_layers),
        "The clip is not a circle": (lab5.cls_shift, roll),
        "The two halves are exchanged": (lab5.cls_shift, past_first),
        "You write into the tensor that you read": (lab5.cls_shift, in_place),
        "The bias is missing": (lab5.class_map, no_bias),
        "you laid them out column by column": (lab5.class_map, columns),
        "You divided by the number of places": (lab5.class_map, summed),
        "That is in proportion to the width": (
            lab5.predict_mib,
            lambda width, known: width * min(known.values()) / min(known),
        ),
        "what is kept at any width is missing": (
            lab5.predict_mib,
            lambda width, known: width * (max(known.values()) - min(known.values())) / (max(known) - min(known)),
        ),
    }
    assert_said(answers)


def test_lab_7_names_the_mistakes_of_students():
    from colab.checks import lab7

    def minus_infinity(cosine, mask, w, u):
        c = cosine.masked_fill(~mask[:, None], -torch.inf)
        w = w.masked_fill(~mask, -torch.inf).softmax(0)
        return 0.5 * ((w * c.amax(1)).sum() + (u.softmax(0) * c.amax(0)).sum())

    def sliced(cosine, mask, w, u):
        n = int(mask.sum())
        return 0.5 * (w[:n].softmax(0) @ cosine[:n].amax(1) + u.softmax(0) @ cosine[:n].amax(0))

    def unmasked(cosine, mask, w, u):
        c = cosine * mask[:, None]
        return 0.5 * (w.softmax(0) @ c.amax(1) + u.softmax(0) @ c.amax(0))

    def sorted_place(similarity, K):  # argsort gives places from 0
        places = similarity.argsort(1, descending=True) == torch.arange(len(similarity))[:, None]
        return 100 * (places.float().argmax(1) <= K).float().mean()

    def by_columns(similarity, K):
        return 100 * ((similarity > similarity.diag()).sum(0) < K).float().mean()

    def one_direction(similarity, scale):
        return F.cross_entropy(scale * similarity, torch.arange(len(similarity)))

    def inverted(cosine, mask, w, u):
        w = w.masked_fill(mask, -torch.inf).softmax(0)
        c = cosine * mask[:, None]
        return 0.5 * (w @ c.amax(1) + u.softmax(0) @ c.amax(0))

    def across(cosine, mask, w, u):
        c = cosine * mask
        return 0.5 * (w.masked_fill(~mask, -torch.inf).softmax(0) @ c.amax(1) + u.softmax(0) @ c.amax(0))

    def swapped(cosine, mask, w, u):
        c = cosine.masked_fill(~mask[:, None], 0)
        return 0.5 * (w.masked_fill(~mask, -torch.inf).softmax(0) @ c.amax(0) + u.softmax(0) @ c.amax(1))

    def from_zero(similarity, captions):
        table, start = torch.zeros(len(captions), len(captions)), 0
        for k, n in enumerate(captions):
            for row in similarity[start : start + n]:
                table[:, k] = torch.maximum(table[:, k], row)
            start += n
        return table

    def no_mean(similarity, captions):
        return torch.stack([group.sum(0) / len(group) for group in similarity.split(captions)]).T

    answers = {
        "It gives nan: 0 times -inf": (lab7.match, minus_infinity),
        "You left the padded tokens out": (lab7.match, sliced),
        "Put -inf there before the softmax": (lab7.match, unmasked),
        "The caption's own tokens got -inf": (lab7.match, inverted),
        "mask[:, None] has the shape (L, 1)": (lab7.match, across),
        "w belongs to the tokens": (lab7.match, swapped),
        "It stops with RuntimeError": (lab7.match, lambda cosine, mask, w, u: cosine @ w),
        "you took exp of it": (lab7.symmetric_loss, lambda s, k: one_direction(s, k.exp())),
        "You took exp of it": (lab7.symmetric_loss, lambda s, k: one_direction(s, torch.exp(k))),
        "The targets are whole numbers": (lab7.symmetric_loss, lambda s, k: F.cross_entropy(k * s, s.diag())),
        "take amax": (lab7.match, lambda cosine, mask, w, u: (w * cosine.max(1)).sum()),
        "or max(...).values": (
            lab7.best_caption,
            lambda s, c: torch.stack([group.max(0) for group in s.split(c)]).T,
        ),
        "over the captions, dimension 0": (
            lab7.best_caption,
            lambda s, c: torch.stack([group.amax(1) for group in s.split(c)]),
        ),
        "do not have equally many": (lab7.best_caption, lambda s, c: s.view(len(c), -1, len(c)).amax(1).T),
        "start from -inf": (lab7.best_caption, from_zero),
        "you have room for one place too many": (lab7.recall_at, sorted_place),
        "That is video-to-text": (lab7.recall_at, by_columns),
        "Only the rows are there": (lab7.symmetric_loss, one_direction),
        "That is the sum of the two losses": (
            lab7.symmetric_loss,
            lambda s, k: one_direction(s, k) + one_direction(s.T, k),
        ),
        "You took the mean of the captions": (lab7.best_caption, no_mean),
        "The table is transposed": (
            lab7.best_caption,
            lambda s, c: torch.stack([group.max(0)[0] for group in s.split(c)]),
        ),
    }
    assert_said(answers)


def test_captions_of_clips_in_memory_are_those_of_the_files():
    _, labels, pairs = lab.load("train", [0], 40, fast=True)
    names = [lab.CLASSES[label] for label in labels]
    listed = [(name, f"train/{name}/{number:04d}.mp4") for name, number in zip(names, pairs.tolist())]
    captions, mirrors = toy.captioned({"train": listed, "val": [], "test": []})
    assert captions["train"] == list(zip(lab.captions("train", labels, pairs), (path for _, path in listed)))
    assert all(mirrors[a] == b for (_, a), (_, b) in zip(listed[::2], listed[1::2]))
