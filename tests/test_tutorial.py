"""The notebooks of tutorial/: saved whole, and running from top to bottom. Jupyter is not needed for either."""

import json
import os
import re
import sys
import types
import warnings
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest

TUTORIAL = Path(__file__).resolve().parent.parent / "tutorial"
NOTEBOOKS = sorted(TUTORIAL.glob("*.ipynb"))
SIZE = 6  # problems in a batch, where the saved notebooks have 64
KNOB = re.compile(r"^SIZE = \d+", re.MULTILINE)
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def text_of(cell: dict) -> str:
    return "".join(cell["source"])


def test_there_are_four():
    assert [path.name[:3] for path in NOTEBOOKS] == ["01_", "02_", "03_", "04_"]


@each_notebook
def test_a_saved_notebook_has_run_from_top_to_bottom(path):
    """Saved without outputs, after an error, or with cells run out of order or not at all."""
    notebook, code = json.loads(path.read_text()), cells(path, "code")
    assert notebook["nbformat"] == 4
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs and not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]  # warnings and progress bars
    said = json.dumps(outputs)
    assert not re.search(r"[\s\"'(](/root|/home|/work|/tmp|/Users)/", said) and "widget" not in said


@each_notebook
def test_pictures_are_never_far(path):
    """Five code cells in a row without a picture, or a notebook too heavy to be shown."""
    without = 0
    for cell in cells(path, "code"):
        shown = any("image/png" in output.get("data", {}) for output in cell["outputs"])
        without = 0 if shown else without + 1
        assert without <= 4, f"no picture up to the cell\n{text_of(cell)}"
    assert path.stat().st_size < 600_000


@each_notebook
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#\s]+)\)", "\n".join(map(text_of, cells(path, "markdown"))))
    assert links and all("://" in link or (TUTORIAL / link).exists() for link in links)


@pytest.fixture
def notebook_session(monkeypatch):
    """What the cells take from Jupyter, and all that they change put back afterwards."""
    def shown(*_, **__):
        pass

    display = types.SimpleNamespace(display=shown, Markdown=str, Image=shown)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.chdir(TUTORIAL)
    backend = matplotlib.get_backend()
    matplotlib.use("Agg")
    with plt.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # of matplotlib's way with tensors
        yield
    plt.close("all")
    matplotlib.use(backend)


@each_notebook
def test_code_cells_run_in_order(path, notebook_session):
    sources = [text_of(cell) for cell in cells(path, "code")]
    assert sum(len(KNOB.findall(source)) for source in sources) == 1
    session = {"__name__": "__main__"}
    for n, source in enumerate(sources, 1):
        exec(compile(KNOB.sub(f"SIZE = {SIZE}", source), f"{path.name}, code cell {n}", "exec"), session)
