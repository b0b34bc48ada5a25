"""The notebooks run from top to bottom at tiny size, one after another in one kernel that forgets in between."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
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
        assert not any(cell.outputs or cell.execution_count for cell in cells), "committed with outputs"
        # %reset also forgets `__spec__`, which a module has and multiprocessing reads.
        notebook.cells.insert(0, nbformat.v4.new_code_cell(f"%reset -f\n__spec__ = None\n%cd -q {folder}"))
        NotebookClient(notebook, km=kernel, timeout=300).execute()
        outputs = [output for cell in cells for output in cell.outputs]
        data = [output.get("data", {}) for output in outputs]
        assert any("image/png" in shown for shown in data), "no figure"
        texts = [output.get("text", "") for output in outputs] + [shown.get("text/markdown", "") for shown in data]
        return "\n".join(texts)

    return run


def test_quickstart(execute, tmp_path):
    text = execute("01_quickstart.ipynb", tmp_path)
    assert "resumed runs/notebook at step 2\n" in text
    assert re.search(r"It was a truth\|.+", text) and re.search(r"Mr. Darcy\|.+", text)


def test_layer(execute, tmp_path):
    text = execute("02_layer.ipynb", tmp_path)
    differences = [float(x) for x in re.findall(r"largest difference.*: (\S+)", text)]
    assert len(differences) == 2 and max(differences) < 1e-4


def test_compare(execute, tmp_path):
    text = execute("03_compare.ipynb", tmp_path)
    for name in ("softmax", "s4d"):
        assert re.search(rf"\| {name} \| [\d,]+ \| \d\.\d{{4}} \| [\d,]+ \| [\d,]+ \|", text)


def test_pod(libtpu, execute):
    text = execute("04_pod.ipynb", NOTEBOOKS)
    assert "interdomain on v5e:2x2, 4 chips (fsdp 4), each:" in text and "fits, " in text
