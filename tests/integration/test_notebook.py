"""notebooks/chartqa.ipynb: executed top to bottom, and committed with the outputs of its default run."""

from __future__ import annotations

import json
import re
from typing import Any

import nbformat
import pytest

from fixtures.notebook import NOTEBOOK, execute
from qwen_vl_sft.cli import scripts

LARGEST_BYTES = 400_000
SECTIONS = ["Install", "Load the data", "Ask the model before training", "Fine-tune", "Test the tuned model"]
SECTIONS += ["Compare the answers", "Merge, publish, continue"]


@pytest.fixture(scope="module")
def committed() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return execute(NOTEBOOK, tmp_path_factory.mktemp("notebook"))


def printed(notebook: Any, cell_with: str) -> str:
    """What the only cell with these words printed."""
    [cell] = [cell for cell in notebook.cells if cell.cell_type == "code" and cell_with in cell.source]
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for cell in code(notebook) for output in cell.outputs)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def accuracy(table: str) -> dict[str, float]:
    """Relaxed accuracy of each arm on all rows, in percent."""
    first = table.split("relaxed_accuracy")[1].split("\n\n")[0]
    return {arm: float(value) for arm, value in re.findall(r"^  (base|prompted|tuned) +([\d.]+)", first, re.MULTILINE)}


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_it_runs_from_top_to_bottom(executed):
    arms = accuracy(printed(executed, "qwen_vl_sft evaluate"))
    assert arms["base"] < arms["prompted"] < 60 < 80 < arms["tuned"]
    assert pictures(executed) == 3
    assert "answers      4 of 4 the same" in printed(executed, "qwen_vl_sft merge")
    assert "model.safetensors" in printed(executed, "print(files)")
    assert "| relaxed_accuracy, all (300 rows) |" in str(code(executed)[-1].outputs)
    [row] = [cell for cell in code(executed) if "HTML(" in cell.source]
    assert (
        '<mark style="background: #ffe08a; color: black">Yes&lt;|im_end|&gt;</mark>' in row.outputs[0].data["text/html"]
    )


def test_it_is_committed_with_its_outputs(committed):
    assert NOTEBOOK.stat().st_size < LARGEST_BYTES
    assert [cell.execution_count for cell in code(committed)] == list(range(1, len(code(committed)) + 1))
    assert pictures(committed) == 3
    assert accuracy(printed(committed, "qwen_vl_sft evaluate"))["tuned"] > 80
    outputs = json.dumps([cell.outputs for cell in code(committed)])
    assert not re.findall(r"/(?:home|root|tmp|work|usr)/\w+", outputs), "folders of a machine; see make notebook"


def test_its_commands_and_pages_exist(committed):
    text = "\n".join(cell.source for cell in committed.cells)
    assert set(re.findall(r"qwen_vl_sft ([a-z]\w+) ", text)) <= set(scripts())
    assert all((NOTEBOOK.parents[1] / page).is_file() for page in re.findall(r"docs/\w+\.md|scripts/\w+\.py", text))


def test_it_has_the_sections_of_the_tutorial(committed):
    headings = re.findall(r"^## (\d)\. (.+)$", "\n".join(cell.source for cell in committed.cells), re.MULTILINE)
    assert headings == [(str(number), title) for number, title in enumerate(SECTIONS, start=1)]
