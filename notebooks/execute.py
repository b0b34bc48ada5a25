"""Run notebooks from top to bottom in an empty folder, and store what they show: what `make notebooks` does.

python notebooks/execute.py notebooks/01_quickstart.ipynb
"""

import re
import sys
import tempfile

import nbformat
from nbclient import NotebookClient

BAR = re.compile(r".*\|.*\| [\d,]+/[\d,]+ \[.*\]\s*")


def is_bar(output) -> bool:
    """Whether an output is the end of progress bars, which tells the speed of the machine alone."""
    return output.get("name") == "stderr" and all(BAR.fullmatch(line) for line in output.text.splitlines())


for path in sys.argv[1:]:
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            timeout=None,
            record_timing=False,
            coalesce_streams=True,  # of a bar only its end
            resources={"metadata": {"path": folder}},
        ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not is_bar(output)]
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, path)
    print(path)
