"""Exports of merged models: limits of images, which exports are refused, and what of a run cannot be exported."""

import errno
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from fixtures.evaluation import write_charts, write_run
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.evaluation.scoring import Question, score_row
from qwen_vl_sft.exporting import export as exporting
from qwen_vl_sft.exporting.adapter import problems, write_pairs
from qwen_vl_sft.exporting.comparison import Judged, judge
from qwen_vl_sft.exporting.options import ExportOptions, make_plan
from qwen_vl_sft.families.qwen2_vl import FAMILY as QWEN2_VL
from qwen_vl_sft.merging.adapter import Adapter, ExpertsLowRank, LowRank
from qwen_vl_sft.serving.base import EngineAnswer, Size
from qwen_vl_sft.serving.check import Asked
from qwen_vl_sft.serving.engines.llama_cpp import image_tokens

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
    options = ExportOptions(run=run, to="gguf", output_dir=tmp_path / "out")
    assert make_plan(options).adapter == run  # llama.cpp takes adapters
    with pytest.raises(
        UserError, match=r"holds an adapter, and --to fp8 .* merge it first: python scripts/merge\.py --run"
    ):
        make_plan(replace(options, to="fp8"))
    with pytest.raises(UserError, match="--calibration_samples 0: AWQ needs rows"):
        make_plan(replace(options, to="awq", calibration_samples=0))
    with pytest.raises(UserError, match="--calibration_samples 7: is for --to compressed-tensors and awq"):
        make_plan(replace(options, calibration_samples=7))
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


PAIR = LowRank(torch.zeros(2, 4), torch.zeros(4, 2), 2.0)
LAYER = "model.language_model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("pairs", "whole", "said"),
    [
        ({LAYER: PAIR}, {}, None),
        ({LAYER: PAIR, "model.visual.merger.mlp.0": PAIR}, {}, "reaches model.visual.merger.mlp.0, outside"),
        ({LAYER: replace(PAIR, magnitude=torch.ones(4))}, {}, "DoRA"),
        ({LAYER: ExpertsLowRank(torch.zeros(1, 2, 4), torch.zeros(1, 4, 2), 1.0)}, {}, "on the experts of"),
        ({LAYER.replace("self_attn.q_proj", "linear_attn.out_proj"): PAIR}, {}, "linear attention"),
        ({}, {"lm_head.weight": torch.zeros(1)}, "lm_head.weight was trained in full"),
    ],
    ids=["plain", "vision", "dora", "experts", "linear attention", "saved modules"],
)
def test_llama_cpp_takes_adapters_on_layers_of_the_language_model(pairs, whole, said):
    found = next(problems(Adapter(pairs, whole), QWEN2_VL), None)
    assert found is None if said is None else said in str(found)


def test_the_pairs_of_an_adapter_are_scaled_and_named_as_in_files(tmp_path):
    run = write_run(tmp_path, write_charts(tmp_path / "charts"))
    plan = make_plan(ExportOptions(run=run, to="gguf", output_dir=tmp_path / "out"))
    write_pairs(plan.evaluation.recipe.model, plan.model, run, tmp_path / "pairs")
    found, trained = load_file(tmp_path / "pairs"), load_file(run / "adapter_model.safetensors")
    config = json.loads((run / "adapter_config.json").read_text())
    assert len(found) == len(trained)
    prefix = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    torch.testing.assert_close(found["model.layers.0.self_attn.q_proj.a"], trained[f"{prefix}.lora_A.weight"].float())
    torch.testing.assert_close(
        found["model.layers.0.self_attn.q_proj.b"],
        trained[f"{prefix}.lora_B.weight"].float() * config["lora_alpha"] / config["r"],
    )


@pytest.mark.parametrize("full", ["write_companions", "replace"])
def test_a_full_disk_is_told_and_nothing_is_left(tmp_path, monkeypatch, full):
    def fails(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = write_run(tmp_path, write_charts(tmp_path / "charts"))
    plan = make_plan(ExportOptions(run=run, to="gguf", output_dir=tmp_path / "out"))
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(exporting, "make_environment", lambda engine, say: Path(sys.executable))
    monkeypatch.setattr(exporting, "convert", lambda plan, task, python, folder: 0)
    monkeypatch.setattr(exporting, "compare", lambda *_: ({}, Judged("relaxed_accuracy", None, [])))
    monkeypatch.setattr(exporting.os if full == "replace" else exporting, full, fails)
    with pytest.raises(
        UserError, match=r"--output_dir: .*out cannot be written: No space left on device; nothing was left"
    ):
        exporting._export(plan, None, None, print)
    assert sorted(tmp_path.iterdir()) == before
