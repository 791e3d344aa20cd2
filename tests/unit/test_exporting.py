"""Exports of merged models: limits of images, which exports are refused, and what of a run cannot be exported."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fixtures.evaluation import write_charts, write_run
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.evaluation.scoring import Question, score_row
from qwen_vl_sft.exporting.export import judge
from qwen_vl_sft.exporting.options import Options, make_plan
from qwen_vl_sft.serving.base import EngineAnswer, Served, Size
from qwen_vl_sft.serving.check import Asked
from qwen_vl_sft.serving.engines.llama_cpp import check_arguments, image_tokens

VISION = {"vision_config": {"patch_size": 14, "spatial_merge_size": 2}}


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"shortest_edge": 3136, "longest_edge": 12544}, {"image-min-tokens": 4, "image-max-tokens": 16}),
        ({"shortest_edge": 3137, "longest_edge": 12543}, {"image-min-tokens": 5, "image-max-tokens": 15}),
        ({"longest_edge": 28 * 28 * 1280}, {"image-max-tokens": 1280}),
        ({"longest_edge": 10}, {"image-max-tokens": 1}),
        ({}, {}),
    ],
)
def test_limits_in_pixels_are_limits_in_tokens(limits, expected):
    assert image_tokens(VISION, limits) == expected


def test_the_context_holds_the_longest_row():
    served = Served(Path("."), "float32")
    assert check_arguments(served, Size(257, 1)) == ["--ctx-size", "512"]


def judged(right_before, right_after, lengths=None, max_loss=1.0):
    """What is said of an export that answers `right_after` rows as well as `right_before` of 100."""
    answers = [("1" if number < right_before else "2", "1" if number < right_after else "2") for number in range(100)]
    rows = [
        score_row(Question(number, "?", ["1"], None), {"original": first, "export": second})
        for number, (first, second) in enumerate(answers)
    ]
    task = SimpleNamespace(images=[(str(number),) for number in range(100)])
    theirs = {n: EngineAnswer(n, answers[n][1], (lengths or {}).get(n, 3)) for n in range(100)}
    asked = Asked([], {number: [1, 2, 3] for number in range(100)}, Size(3, 1))
    return judge(SimpleNamespace(options=SimpleNamespace(max_loss=max_loss)), task, rows, asked, theirs).problems


def test_an_export_that_lost_its_accuracy_is_refused():
    assert judged(90, 90) == []
    assert judged(90, 95) == []
    assert judged(90, 88) == []  # no more than luck
    (problem,) = judged(90, 70)
    assert problem.startswith("relaxed_accuracy is 20.0 points lower (p = ")
    assert problem.endswith("more than --max_loss 1")
    assert judged(90, 70, max_loss=25) == []


def test_an_export_that_reads_other_prompts_is_refused():
    assert judged(90, 90, lengths={7: 250}) == ["1 of 100 prompts have other tokens, the first 250 for 3"]


def test_what_cannot_be_exported_is_told(tmp_path):
    run = write_run(tmp_path, write_charts(tmp_path / "charts"))
    options = Options(run=run, to="gguf", output_dir=tmp_path / "out")
    with pytest.raises(UserError, match=r"holds an adapter.* merge it first: python scripts/merge\.py --run"):
        make_plan(options)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").touch()
    with pytest.raises(UserError, match="holds files already"):
        make_plan(options)
    with pytest.raises(UserError, match="--gguf_type f32: is for --to gguf; leave it out"):
        make_plan(replace(options, to="fp8", gguf_type="f32"))
    (tmp_path / "new-failed").mkdir()
    (run / "adapter_model.safetensors").unlink()
    for file in ("model.safetensors", "config.json"):
        (run / file).write_bytes((tmp_path / "model" / file).read_bytes())
    with pytest.raises(UserError, match="new-failed is there, of an export that failed"):
        make_plan(replace(options, output_dir=tmp_path / "new"))
    assert make_plan(replace(options, output_dir=tmp_path / "other")).engine.name == "llama.cpp"
