"""The notebook of docs runs as it stands, and what it shows is what it gives."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs" / "python.ipynb"


@pytest.mark.integration
def test_the_notebook_runs(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()

    def texts(cell: int) -> str:
        outputs = notebook.cells[cell].outputs
        return "".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in outputs)

    cells = {cell.source.split("(")[0]: index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"}
    ranked = next(texts(index) for source, index in cells.items() if source.startswith("history"))
    assert ranked.count("RankedTitle") == 4
    table = next(texts(index) for source, index in cells.items() if source.startswith("result"))
    assert all(name in table for name in ("sft", "dmpo", "popularity"))
    steps = next(texts(index) for source, index in cells.items() if source.startswith("import torch"))
    first, last = (float(line.split()[-1]) for line in (steps.splitlines()[0], steps.splitlines()[-1]))
    assert first == pytest.approx(0.896, abs=1e-3)  # (log 3 + log 2) / 2: the policy is the reference
    assert last < first
