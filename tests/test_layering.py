"""Imports go one way, and the layer alone drags in nothing that only training needs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "idattn"

# What each part of idattn may import of the others; a subpackage may also import itself.
ALLOWED = {
    "__init__": {"trained", "inference", "nn", "config"},
    "__main__": {"cli"},
    "checks": set(),
    "choices": set(),
    "files": set(),
    "shapes": set(),
    "chips": set(),
    "reference": set(),
    "sharding": {"config"},
    "loss": {"ops", "sharding"},
    "config": {"checks", "choices", "ops"},
    "config_files": {"choices"},
    "ops": {"choices", "shapes"},
    "nn": {"ops", "sharding", "config", "choices", "shapes"},
    "data": {"config", "choices", "files"},
    "inference": {"data", "nn", "ops", "sharding", "files", "config", "choices"},
    "evals": {"inference", "data", "loss", "nn", "ops", "files", "config", "choices"},
    "costs": {"nn", "config", "choices"},
    "train": {"data", "nn", "loss", "inference", "evals", "costs", "sharding", "files", "config", "choices", "chips"},
    "study": {"train", "evals", "costs", "files", "config", "config_files", "choices"},
    "trained": {"train", "inference", "data", "nn", "sharding", "config"},
    "plan": {"train", "nn", "ops", "costs", "sharding", "config", "chips"},
}
ALLOWED["cli"] = set(ALLOWED)
TRAINING_ONLY = {
    "orbax", "safetensors", "grain", "tensorboardX",
    "matplotlib", "optax", "tqdm", "idattn.cli", "absl.app", "absl.flags",
    "idattn.train", "idattn.data", "idattn.inference", "idattn.evals", "idattn.loss", "idattn.costs",
}  # fmt: skip


def imported(file: Path) -> set[str]:
    """The dotted names that a file imports anywhere in it, `from a import b` as both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide the direction"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def parts(names: set[str]) -> set[str]:
    """The parts of idattn among dotted names."""
    return {name.split(".")[1] for name in names if name.startswith("idattn.")} & set(ALLOWED)


def files_of(part: str) -> list[Path]:
    folder = PACKAGE / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{part}.py"]


def test_every_file_belongs_to_a_part():
    assert {path for part in ALLOWED for path in files_of(part)} == set(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("part", ALLOWED)
def test_direction_of_imports(part):
    files = files_of(part)
    assert files
    for file in files:
        names = imported(file)
        assert parts(names) <= ALLOWED[part] | {part}, file
        assert not {name for name in names if name.split(".")[0] in ("launch", "configs", "tests")}, file


def test_the_reader_of_imports_sees_all_kinds(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("import idattn.loss\nfrom idattn import ops\n\ndef f():\n    from idattn.train.loop import train\n")
    assert imported(file) == {"idattn.loss", "idattn", "idattn.ops", "idattn.train.loop", "idattn.train.loop.train"}
    assert parts(imported(file)) == {"loss", "ops", "train"}
    assert not parts(imported(file)) <= ALLOWED["nn"]


def modules_after(statement: str) -> set[str]:
    """Names of `TRAINING_ONLY` in sys.modules of a new process that runs the statement."""
    code = f"import sys\n{statement}\nprint(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return TRAINING_ONLY & set(done.stdout.split("\n"))


def test_the_layer_imports_nothing_of_training():
    # flax and ml_collections load these two themselves, whatever idattn does.
    ours, theirs = map(modules_after, ("from idattn.nn import InterdomainAttention", "import flax.nnx, ml_collections"))
    assert theirs <= {"optax", "absl.flags"}
    assert ours == theirs


def test_training_does_import_it():
    assert TRAINING_ONLY - modules_after("import idattn.cli.train") == set()
