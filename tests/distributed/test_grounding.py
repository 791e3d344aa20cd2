"""What recipes/grounding_tiny.yaml promises: on two processes, the tuned model finds bars that the base model does not."""

import json

import pytest

from fixtures.processes import launch


@pytest.mark.long
def test_the_tuned_model_finds_bars(tmp_path):
    run = tmp_path / "grounding"
    trained = launch("cpu", "scripts/sft.py", "--recipe", "recipes/grounding_tiny.yaml", "--output_dir", run)
    assert trained.returncode == 0, trained.stderr[-3000:]
    evaluated = launch("cpu", "scripts/evaluate.py", "--run", run, "--arms", "base,tuned", "--split", "test")
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
    summary = json.loads((run / "evaluation/summary.json").read_text())
    base, tuned = (summary["scores"][arm]["all"] for arm in ("base", "tuned"))
    for metric in ("accuracy_at_iou_50", "mean_iou", "center_in_box"):
        assert base[metric]["mean"] < 0.05
        assert tuned[metric]["mean"] > 0.3
        assert base[metric]["high"] < tuned[metric]["low"]
