import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

REPO = ""  # OWNER/NAME on GitHub, or empty: then the project is here, above, or in a .zip here
FAST = os.environ.get("LABS_FAST") == "1"  # short runs, for tests


def find_project():
    folders = [Path.cwd(), *Path.cwd().parents, *sorted(Path.cwd().glob("*/"))]
    return next((folder for folder in folders if (folder / "colab" / "toy.py").is_file()), None)


if find_project() is None and REPO:
    subprocess.run(
        ["git", "clone", "--quiet", "--depth", "1", f"https://github.com/{REPO}"], check=True
    )
for archive in [] if find_project() else Path.cwd().glob("*.zip"):
    zipfile.ZipFile(archive).extractall()
project = find_project()
if project is None:
    raise FileNotFoundError(
        "Put a .zip of the project beside this notebook (in Colab: the Files pane), and run again."
    )
sys.path[:0] = [str(project)] if str(project) not in sys.path else []

packages = {
    "open_clip": "open_clip_torch",
    "einops": "einops",
    "av": "av",
    "tqdm": "tqdm",
    "matplotlib": "matplotlib",
}
if importlib.util.find_spec("torch") is None or importlib.util.find_spec("torchvision") is None:
    raise ModuleNotFoundError(
        "PyTorch and torchvision are missing; https://pytorch.org says how to install them."
    )
missing = [
    package for module, package in packages.items() if importlib.util.find_spec(module) is None
]
if missing:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)
    importlib.invalidate_caches()
print("The project is found, and nothing is missing.")
