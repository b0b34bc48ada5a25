"""What a wheel holds: every package of the repository, the configs, and the marker of types."""

import configparser
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_every_package_is_listed():
    """setuptools is given the list, since it cannot search for packages and map the configs to another folder."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = [path.parent.relative_to(ROOT) for path in (ROOT / "idattn").rglob("__init__.py")]
    assert sorted(settings["packages"]) == sorted([*map(".".join, (x.parts for x in folders)), "idattn.configs"])
    assert settings["package-dir"] == {"idattn.configs": "configs"} and (ROOT / "configs" / "__init__.py").exists()
    assert "py.typed" in settings["package-data"]["idattn"] and (ROOT / "idattn" / "py.typed").exists()


@pytest.mark.slow
def test_wheel(tmp_path):
    """The wheel holds the package, the configs inside of it and nothing else, and its command works by itself."""
    source, installed = tmp_path / "source", tmp_path / "installed"
    # pip builds in the folder that it is given, and would take what an earlier build left there.
    for folder in ("configs", "idattn", "launch", "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, f"--wheel-dir={tmp_path}", str(source)], check=True)
    (file,) = tmp_path.glob("idattn-*.whl")
    with zipfile.ZipFile(file) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (entry_points,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
        scripts = configparser.ConfigParser()
        scripts.read_string(wheel.read(entry_points).decode())
        wheel.extractall(installed)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "idattn").rglob("*.py")}
    configs = {f"idattn/{path.relative_to(ROOT)}" for path in (ROOT / "configs").glob("*.py")}
    data = {f"idattn/data/{name}" for name in ("AUSTEN.md", "austen.jsonl.xz")}
    assert names == modules | configs | data | {"idattn/py.typed"}
    assert dict(scripts["console_scripts"]) == {"idattn": "idattn.cli:main"}
    # The current folder precedes the environment's packages.
    command = [sys.executable, "-m", "idattn", "describe", "--config=quickstart"]
    done = subprocess.run(command, cwd=installed, check=True, capture_output=True, text=True)
    assert "parameters" in done.stdout
