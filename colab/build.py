"""Builds the labs' notebooks from their sources, runs them, and embeds what they print and draw.

    python colab/build.py                        colab/labs/*.py -> colab/*.ipynb
    python colab/build.py 1 3                    labs 1 and 3 only
    python colab/build.py --no-run               without running; cells that did not change keep their output
    python colab/build.py --repo OWNER/NAME      with links to that GitHub repository: badges, a clone in the first cell
    python colab/build.py --student DIR          copies for students: without solutions and without outputs

How a lab is written. colab/labs/2_aim.py is plain Python in percent cells, `# %%` for code and `# %% [markdown]` for
text; what stands above the first cell is not part of the notebook. The first cell is text: `# # Lab 2. Title`, what the
student will learn, how long it takes, what it needs. The cell that finds the project is put before it, and how to open
the notebook in Colab is put below the title. Link to a definition as [[aim.Adapter]]. The first line of a code cell may
be one of these directives:

    # SHOW aim.Adapter, common.ViT.embed   becomes the source of these definitions, classes, functions, methods or
                                           constants, with the imports that they need. The text cell above it gets the
                                           link. `aim.Adapter = Adapter` follows: whoever edits the cell changes what
                                           the project does from there on. Models that exist already stay as they are.
    # EXERCISE                             a stub with docstring and shapes, which raises NotImplementedError. The next
                                           code cell checks it, `Adapter = check.adapter(Adapter)`: the lab goes on with
                                           the student's definition if it is right, and with the project's own if not.
    # SOLUTION                             one function or class with the name of the stub; folded, and it changes
                                           nothing when it is run. Tests put it in the place of the stub.
    # PICTURE four_methods.png             this cell's picture is also written to colab/four_methods.png, for README
    # TEST                                 the lab's claims as asserts on its own variables; not part of the notebook.

The checks of lab N are colab/checks/labN.py (see colab/check.py), which its import cell imports as `check`. Pictures
are in colab/draw.py; clips, the places of the shapes and attention weights in colab/lab.py. Every long run must look at
`FAST`, which tests set (LABS_FAST=1): seconds, and the same claims. The last cell is `check.progress()`.
A lab has 40 to 60 cells and 1,200 to 1,800 words, no code cell over 30 lines but shown definitions, lines of 100
characters at most, a picture every four to six cells, three or four exercises, a prediction before each experiment, the
paper's figure beside the measured one, and an open question at its end.
"""

import argparse
import base64
import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path

COLAB = Path(__file__).resolve().parent
ROOT = COLAB.parent
sys.path.insert(0, str(ROOT))
from colab.shown import global_names, link, show  # noqa: E402

BY_UPLOAD = """*To open this notebook in Colab: go to [colab.research.google.com](https://colab.research.google.com),
choose **File > Upload notebook**, and give it this file. Then drop a .zip of the project into the **Files** pane.*"""


def lab_files(wanted=()):
    """The sources of the labs named by number or name, of all labs by default"""
    files = sorted((COLAB / "labs").glob("[0-9]*.py"))
    for name in wanted:
        if not any(name in (file.stem, file.stem.split("_")[0]) for file in files):
            raise ValueError(f"there is no lab {name!r}; there are {', '.join(file.stem for file in files)}")
    return [file for file in files if not wanted or {file.stem, file.stem.split("_")[0]} & set(wanted)]


def cell(kind, text, tag=None, folded=False):
    metadata = {"tags": [tag]} if tag else {}
    if folded:  # in Colab, and in Jupyter
        metadata |= {"cellView": "form", "jupyter": {"source_hidden": True}}
    new = {"cell_type": kind, "id": "", "metadata": metadata, "source": text}
    return new | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def form(title, code):
    return f'#@title {title} {{ display-mode: "form" }}\n{code}'


def make(file, repo="", student=False, tests=False, folder=COLAB):
    """The notebook of a lab's source, without outputs -> dict

    repo: OWNER/NAME for links. student: without solutions. tests: with the TEST cells. folder: where it will lie.
    """
    base = f"https://github.com/{repo}/blob/main" if repo else Path(os.path.relpath(ROOT, folder)).as_posix()
    start = (COLAB / "labs" / "start.py").read_text(encoding="utf-8").strip().replace('REPO = ""', f'REPO = "{repo}"')
    cells, known = [cell("code", form("Run this cell first: it finds the project", start), folded=True)], set()
    for kind, body in re.findall(r"^# %%(.*)\n((?:(?!# %%).*\n?)*)", file.read_text(encoding="utf-8"), re.M):
        body = body.strip("\n")
        directive, _, code = body.partition("\n")
        if "[markdown]" in kind:
            text = re.sub(r"^# ?", "", body, flags=re.M)
            text = re.sub(r"\[\[([\w.]+)\]\]", lambda match: link(match[1], base), text)
            if len(cells) == 1:
                heading, _, text = text.partition("\n")
                text = f"{heading}\n\n{badge(repo, f'colab/{file.stem}.ipynb') if repo else BY_UPLOAD}\n{text}"
            cells.append(cell("markdown", text))
        elif directive.startswith("# SHOW "):
            targets = directive.removeprefix("# SHOW ").replace(" ", "").split(",")
            *others, last = [link(target, base) for target in targets]
            named = f"{', '.join(others)} and {last}" if others else last
            links = f"The next cell is {named}, as the file has it."
            if cells[-1]["cell_type"] == "code":
                cells.append(cell("markdown", links))
            else:
                cells[-1]["source"] += f"\n\n{links}"
            cells.append(cell("code", show(targets, known), "show"))
        elif directive == "# EXERCISE":
            cells.append(cell("code", code, "exercise"))
        elif directive == "# SOLUTION":
            decorator = "@check.solution  # delete this line to use the solution in place of your own\n"
            code = re.sub(r"^(?=def |class )", decorator, code, count=1, flags=re.M)
            cells += [] if student else [cell("code", form("Solution", code), "solution", folded=True)]
        elif directive.startswith("# PICTURE "):
            known |= global_names(code)
            cells.append(cell("code", code))
            cells[-1]["metadata"]["picture"] = directive.removeprefix("# PICTURE ")
        elif directive == "# TEST":
            cells += [cell("code", code, "test")] if tests else []
        else:
            known |= global_names(body)
            cells.append(cell("code", body))
    used = []
    for new in cells:  # identities that follow from the text alone: a rebuilt notebook is the same
        name = f"{new['source']}{used.count(new['source'])}"
        used.append(new["source"])
        new["id"] = hashlib.sha1(name.encode()).hexdigest()[:12]
    metadata = {
        "colab": {"provenance": [], "toc_visible": True},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "repo": repo,
    }
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def run(notebook, folder=COLAB, timeout=600):
    """Runs a notebook in a new kernel -> the same notebook with its outputs. An error in a cell is raised."""
    import nbformat
    from nbclient import NotebookClient

    node = nbformat.from_dict(notebook)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(node, timeout=timeout, kernel_name="python3", resources=resources, record_timing=False).execute()
    for old, new in zip(notebook["cells"], node.cells):
        if old["cell_type"] == "code":
            outputs = json.loads(json.dumps(new.outputs))
            for output in outputs:
                if output.get("name") == "stderr":  # progress bars and warnings, with paths of this machine
                    print("".join(output["text"])[-300:], file=sys.stderr)
            old["outputs"] = [output for output in outputs if output.get("name") != "stderr"]
            old["execution_count"] = new.execution_count
    return notebook


def without_outputs(notebook):
    empty = {"execution_count": None, "outputs": []}
    return notebook | {"cells": [c | empty if c["cell_type"] == "code" else c for c in notebook["cells"]]}


def keep_outputs(notebook, path):
    """Takes over the outputs of the cells that stand in the notebook at `path` already"""
    old = {c["id"]: c for c in json.loads(path.read_text(encoding="utf-8"))["cells"]} if path.is_file() else {}
    for new in notebook["cells"]:
        if new["cell_type"] == "code" and new["id"] in old:
            new |= {key: old[new["id"]][key] for key in ("outputs", "execution_count")}


def count_words(notebook):
    text = " ".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    return len(re.findall(r"\w[\w'-]*", re.sub(r"\(\S+\)|`[^`]*`", " word ", text)))


def write(notebook, path, seconds):
    cells = [cell | {"source": cell["source"].splitlines(keepends=True)} for cell in notebook["cells"]]
    text = json.dumps(notebook | {"cells": cells}, indent=1, ensure_ascii=False) + "\n"
    if len(text.encode()) > 1_000_000:
        raise ValueError(f"{path.name} has {len(text.encode()) / 1e6:.2f} MB, more than 1 MB: draw smaller pictures")
    path.write_text(text, encoding="utf-8")
    pictures = sum('"image/' in json.dumps(cell.get("outputs", "")) for cell in cells)
    exercises = sum("exercise" in cell["metadata"].get("tags", []) for cell in cells)
    counts = f"{len(cells)} cells, {count_words(notebook)} words, {exercises} exercises, {pictures} pictures"
    print(f"{path}: {counts}, {len(text) >> 10} KB, {seconds:.0f} s")


def pictures_of(notebook):
    """{file name: PNG} of the cells that a # PICTURE line marks"""
    pictures = {}
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []) if "picture" in cell["metadata"] else []:
            if "image/png" in output.get("data", {}):
                pictures[cell["metadata"]["picture"]] = base64.b64decode("".join(output["data"]["image/png"]))
    return pictures


def badge(repo, path):
    url = f"https://colab.research.google.com/github/{repo}/blob/main/{path}"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({url})"


def badges(repo):
    """Puts a Colab badge after each link to a notebook in README"""
    pattern = r"(\]\((colab/\w+\.ipynb)\))(?: \[!\[.*?\]\(.*?\)\]\(.*?\))?"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(pattern, lambda match: f"{match[1]} {badge(repo, match[2])}", text)
    (ROOT / "README.md").write_text(text, encoding="utf-8")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labs", nargs="*", metavar="LAB", help="numbers or names of labs; all by default")
    parser.add_argument("--repo", default="", metavar="OWNER/NAME", help="the GitHub repository that notebooks link to")
    parser.add_argument("--student", type=Path, metavar="DIR", help="where to write copies without solutions")
    parser.add_argument("--no-run", action="store_true", help="do not run the notebooks")
    args = parser.parse_args(argv)
    try:
        for file in lab_files(args.labs):
            folder, start = args.student or COLAB, time.time()
            folder.mkdir(parents=True, exist_ok=True)
            notebook, path = make(file, args.repo, bool(args.student), folder=folder), folder / f"{file.stem}.ipynb"
            if args.no_run:
                keep_outputs(notebook, path)
            elif not args.student:
                run(notebook)
                for name, picture in pictures_of(notebook).items():
                    (folder / name).write_bytes(picture)
            write(notebook, path, time.time() - start)
        if args.repo and not args.student:
            badges(args.repo)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
