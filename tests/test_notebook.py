"""The notebook runs from an empty folder, and is kept without what it printed."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples/quickstart.ipynb"

nbformat = pytest.importorskip("nbformat", reason="pip install --editable '.[dev]'")


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def printed(cell):
    """Return what a cell wrote to standard output."""
    return "".join(o.text for o in cell.outputs if o.get("name") == "stdout")


def test_it_is_kept_stripped(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) >= 6
    assert not any(cell.outputs or cell.execution_count for cell in cells)


def test_it_runs_from_an_empty_folder(notebook, tmp_path):
    from nbclient import NotebookClient

    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    told = "\n".join(printed(cell) for cell in notebook.cells if cell.cell_type == "code")
    lines = told.splitlines()
    (bare,) = [line for line in lines if line.split()[:3] == ["lm", "none", "naive"]]
    assert bare.split()[3] == "100%"
    (accuracy,) = [line for line in lines if line.startswith("accuracy ")]
    assert float(accuracy.split()[1].rstrip("%,")) > 70
    assert "the server sees sums of a round's clients" in lines
    assert "clients were sent a feature map (filters, offset) and nothing else" in told
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "clients of runs/both-ways returned sums over their images" in page
    assert "which show nothing about that run" in page
