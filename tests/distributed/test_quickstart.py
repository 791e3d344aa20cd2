"""What `make quickstart` promises: on two processes, the tuned model answers charts that the base model does not."""

import json

import pytest

from fixtures.processes import launch


# The first of its epochs is enough to tell; as the recipe says, it takes three times as long.
@pytest.fixture(scope="module", params=[1, pytest.param(None, marks=pytest.mark.long)], ids=["one epoch", "as it is"])
def summary(request, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "quickstart"
    fewer = ("--num_train_epochs", str(request.param)) if request.param else ()
    trained = launch("cpu", "scripts/sft.py", "--recipe", "recipes/quickstart.yaml", "--output_dir", run, *fewer)
    assert trained.returncode == 0, trained.stderr[-3000:]
    arms = ("--arms", "base,prompted,tuned", "--split", "test", "--max_samples", "100")
    evaluated = launch("cpu", "scripts/evaluate.py", "--run", run, *arms)
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
    assert (run / "evaluation/report.html").is_file()
    return json.loads((run / "evaluation/summary.json").read_text())


def test_base_then_prompted_then_tuned(summary):
    scores = {arm: summary["scores"][arm]["all"]["relaxed_accuracy"] for arm in ("base", "prompted", "tuned")}
    means = {arm: score["mean"] for arm, score in scores.items()}
    assert means["base"] < 0.2
    assert means["base"] < means["prompted"] < means["tuned"]
    assert means["tuned"] > 0.7
    assert scores["base"]["high"] < scores["tuned"]["low"]
