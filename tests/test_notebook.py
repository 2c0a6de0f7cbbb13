"""The notebook runs as it stands, and shows what it says."""

import nbformat
import pytest
from nbclient import NotebookClient

from tests.mains.process import ROOT

NOTEBOOK = ROOT / "notebooks" / "sample.ipynb"


@pytest.mark.slow
def test_sample_notebook(tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # it trains for some steps, which optimised programs do in less time
    monkeypatch.setenv("STORY_FOLDER", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [kind for output in outputs for kind in output.get("data", {})]
    assert shown.count("image/png") == 4  # masks, two storyboards, drift
    text = "".join(output.get("text", "") for output in outputs)
    assert "3 scenes, 1.9 s, 15 frames of 32 x 48" in text
    assert "extended from scenes 2-3" in text
    assert any("<video" in output.get("data", {}).get("text/html", "") for output in outputs)


def test_it_is_committed_without_outputs():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    assert NOTEBOOK.stat().st_size < 50_000
