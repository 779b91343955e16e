"""The house stays small: lines per file, imports in one direction, nothing new on the top level."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = dict(aim=225, st_adapter=215, zeroi2v=400, side4video=480, common=540, data=730, train=660)
METHODS = {"aim", "st_adapter", "zeroi2v", "side4video"}
ALLOWED = {"common": set(), "data": set(), "train": METHODS | {"common", "data"}} | {
    name: {"common"} for name in METHODS
}


def test_every_file_is_within_its_budget_of_lines():
    lines = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in BUDGETS}
    assert {name: n for name, n in lines.items() if n > BUDGETS[name]} == {} and sum(lines.values()) <= 3250
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("name", BUDGETS)
def test_imports_run_one_way(name):
    """train imports the methods and data, a method imports common; colab only lazily, or when a file is run."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    ours = {*BUDGETS, "colab"}

    def imported(nodes):
        for node in nodes:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            yield from (module.split(".")[0] for module in names)

    assert ours & set(imported(tree.body)) <= ALLOWED[name]
    assert ours & set(imported(ast.walk(tree))) <= ALLOWED[name] | {"colab"}


def test_the_top_level_is_what_the_project_is():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    files = {f"{name}.py" for name in BUDGETS} | {"README.md", "LICENSE", "requirements.txt", "tests", "colab"}
    assert {name for name in top if not name.startswith(".")} == files
