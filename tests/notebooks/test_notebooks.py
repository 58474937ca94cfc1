"""The notebooks run from top to bottom, and what they say is what they were committed with."""

from pathlib import Path

import pytest
from hub_double import HubDouble


pytestmark = pytest.mark.slow
FOLDER = Path(__file__).resolve().parents[2] / "examples" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
# what a reader must find in the outputs
SAYS = {
    "quick_start": ["OtterForConditionalGeneration", "blue", "circle"],
    "video": ["(1, 1, 16, 3, 64, 64)", "green"],
    "finetune": ["right; with another picture", "tester/otter-shapes holds the same weights: True"],
    "convert": ["conversion_report.json", "largest difference of logits: 0.0e+00"],
}


def outputs(notebook) -> tuple[str, int]:
    """All text of a notebook's outputs, and how many pictures they hold."""
    results = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    texts = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in results]
    return "\n".join(texts), sum("image/png" in output.get("data", {}) for output in results)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name, tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    with HubDouble() as hub:
        environment = hub.environment(tmp_path / "cache") | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
        environment = {name: value for name, value in environment.items() if not name.startswith("OTTER_")}
        client = nbclient.NotebookClient(
            notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
        )
        client.execute(env=environment)
    text, pictures = outputs(notebook)
    assert pictures >= 1
    for words in SAYS[name]:
        assert words in text


@pytest.mark.parametrize("name", NAMES)
def test_committed_notebooks_hold_their_outputs(name):
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
    path = FOLDER / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    text, pictures = outputs(notebook)
    assert pictures >= 1 and path.stat().st_size < 200_000
    assert all(words in text for words in SAYS[name])
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert "Traceback" not in text
