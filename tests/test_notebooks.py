"""The notebooks run from top to bottom at tiny size, one after another in one kernel that forgets in between.

What they show at full size, as `make notebooks` stores it, is in the files.
"""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
SETTINGS = {"IDATTN_NOTEBOOK_TINY": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """An IPython kernel: what one notebook has imported and compiled, another need not."""
    cache = tmp_path_factory.mktemp("cache")
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(env=os.environ | SETTINGS | {"JAX_COMPILATION_CACHE_DIR": str(cache)})
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.fixture
def execute(kernel):
    """A function that runs a notebook in a folder; what it printed, as text, and whether it drew anything."""

    def run(name, folder):
        notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        # %reset also forgets `__spec__`, which a module has and multiprocessing reads.
        notebook.cells.insert(0, nbformat.v4.new_code_cell(f"%reset -f\n__spec__ = None\n%cd -q {folder}"))
        NotebookClient(notebook, km=kernel, timeout=300).execute()
        outputs = [output for cell in cells for output in cell.outputs]
        data = [output.get("data", {}) for output in outputs]
        assert any("image/png" in shown for shown in data), "no figure"
        texts = [output.get("text", "") for output in outputs] + [shown.get("text/markdown", "") for shown in data]
        return "\n".join(texts)

    return run


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_stored_outputs(path):
    """The file shows a whole run: every cell in order, figures, no error, no warning, nothing of the machine."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert all(output.output_type != "error" for output in outputs)
    shown = "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
    assert not re.search(r"Warning|Traceback|/home/|/root/|/tmp/|IDATTN_NOTEBOOK_TINY", shown)
    assert path.stat().st_size < 1_000_000  # the most that the hook for commits takes


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_colab(path):
    """The badge opens this file, and the first cell installs the package, without another jax than is there."""
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    title, install = nbformat.read(path, as_version=4).cells[:2]
    opened = repository.replace("https://github.com", "https://colab.research.google.com/github")
    assert f"({opened}/blob/main/notebooks/{path.name})" in title.source
    assert f'@ git+{repository}"' in install.source and "pip install --quiet --constraint jax.txt" in install.source
    (freeze,) = re.findall(r"!pip freeze \| (grep .+?) > jax.txt", install.source)
    frozen = "jax==0.10.2\njaxlib==0.10.2\njaxtyping==0.3.11\njax-cuda12-plugin==0.10.2\nnumpy==2.0\n"
    kept = subprocess.run(freeze, shell=True, input=frozen, capture_output=True, text=True).stdout
    assert kept == "jax==0.10.2\njaxlib==0.10.2\n"


def test_quickstart(execute, tmp_path):
    text = execute("01_quickstart.ipynb", tmp_path)
    assert "resumed runs/notebook at step 2\n" in text
    assert re.search(r"It was a truth\|.+", text) and re.search(r"Mr. Darcy\|.+", text)


def test_layer(execute, tmp_path):
    text = execute("02_layer.ipynb", tmp_path)
    differences = [float(x) for x in re.findall(r"largest difference.*: (\S+)", text)]
    assert len(differences) == 2 and max(differences) < 1e-4


@pytest.mark.slow  # it calls what the first notebook does, for two mixers
def test_compare(execute, tmp_path):
    text = execute("03_compare.ipynb", tmp_path)
    for name in ("softmax", "s4d"):
        assert re.search(rf"\| {name} \| [\d,]+ \| \d\.\d{{4}} \| [\d,]+ \|", text)


def test_pod(libtpu, execute):
    text = execute("04_pod.ipynb", NOTEBOOKS)
    assert "interdomain on v5e:2x2, 4 chips (fsdp 4), each:" in text and "fits, " in text
