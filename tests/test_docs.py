"""The pages: links lead to files, commands, settings and names are those of the program, the example runs."""

import functools
import pkgutil
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from absl import flags
from ml_collections import ConfigDict
from support.helpers import defined_flags

from idattn.cli import PROGRAMS, load
from idattn.config import from_config_dict, quickstart

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAME = re.compile(r"`(idattn(?:\.\w+)+)")
COMMAND = re.compile(r"(?:(?:python -m launch\.|\bidattn (?=[\w-]+ --))([\w-]+)|launch/\w+\.sh)((?:\\\n|[^`\n])*)")


def commands() -> list[tuple[str, ...]]:
    """(entry point, arguments...) of every command in the pages and in the docstrings of programs and configs.

    The scripts hand a run's settings to launch.train.
    """
    texts = [page.read_text() for page in PAGES]
    for file in (*ROOT.glob("configs/*.py"), *ROOT.glob("idattn/cli/*.py"), *ROOT.glob("launch/*.py")):
        texts += re.findall(r"^(?:idattn|python -m) (?:\\\n|.)*", file.read_text(), re.MULTILINE)
    distinct = set()
    for text in texts:
        for name, rest in COMMAND.findall(text):
            arguments = shlex.split(rest.replace("\\\n", " "), comments=True)
            if not name:
                arguments = [word for word in arguments if word.startswith(("--config", "--workdir"))]
            if name or arguments:
                distinct.add((name or "train", *arguments))
    return sorted(distinct)


@pytest.mark.parametrize("page", PAGES + NOTEBOOKS, ids=lambda page: page.name)
def test_links(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).is_file()] == []


@pytest.mark.parametrize("page", PAGES + NOTEBOOKS, ids=lambda page: page.name)
def test_settings(page):
    for setting in re.findall(r"--config\.([\w.]+)", page.read_text()):
        functools.reduce(getattr, setting.split("."), quickstart())


@pytest.mark.parametrize("page", PAGES + NOTEBOOKS, ids=lambda page: page.name)
def test_names(page):
    """Names of the package and of its tests that a page writes as code or imports are there."""
    text = page.read_text()
    imports = re.findall(r"from (idattn[\w.]*) import ([\w, ]+)", text)
    for name in NAME.findall(text) + [f"{module}.{x}" for module, names in imports for x in re.findall(r"\w+", names)]:
        pkgutil.resolve_name(name)
    for file in re.findall(r"`((?:idattn|tests|launch|configs|results)/[\w/.]+\.\w+)", text):
        assert "NAME" in file or (ROOT / file).is_file(), file
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        assert f"\ndef {name}(" in (ROOT / file).read_text(), name


def test_equations():
    """Every numbered equation of the paper's two layers has a function that computes it, and a test."""
    row = re.compile(r"^\| (\d+)(?:-(\d+))?, [^|]+\| [^|]*`idattn\.[^|]+\| `tests/.+::.+\|$", re.MULTILINE)
    rows = row.findall((ROOT / "docs" / "paper.md").read_text())
    assert [n for first, last in rows for n in range(int(first), int(last or first) + 1)] == list(range(3, 14))


def test_figures():
    """Every figure in docs has its section, with the command that writes it."""
    sections = (ROOT / "docs" / "figures.md").read_text().split("\n## ")[1:]
    figures = []
    for section in sections:
        (figure,) = re.findall(r"!\[.+\]\((\w+)\.png\)\]\(\1\.png\)", section)
        assert re.search(rf"```bash\nidattn .*--out=docs/{figure}\b", section), figure
        figures.append(f"{figure}.png")
    assert sorted(figures) == sorted(file.name for file in (ROOT / "docs").glob("*.png"))


def test_names_in_comments():
    """Names of the package that its comments and docstrings write as code are there."""
    files = [file for folder in ("idattn", "configs", "launch", "tests") for file in (ROOT / folder).rglob("*.py")]
    for name in sorted({name for file in files for name in NAME.findall(file.read_text())}):
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_command(command, monkeypatch):
    """absl takes every flag and value: names, choices, numbers, and settings of the config file that is named."""

    def define():
        if command[0].replace("_", "-") in PROGRAMS:
            load(command[0])
        else:
            runpy.run_path(f"launch/{command[0]}.py").get("define_flags", lambda: None)()

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", list(command))  # where config files look for settings
    with defined_flags(SimpleNamespace(define_flags=define)):
        flags.FLAGS(command)
        if "config" in flags.FLAGS and isinstance(flags.FLAGS.config, ConfigDict):
            from_config_dict(flags.FLAGS.config)
        flags.FLAGS.unparse_flags()


def test_example():
    """The README's lines, traced at the shapes in their comments."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    jax.eval_shape(lambda: exec(example, names))
    assert names["y"].shape == names["x"].shape == (2, 1000, 512)
