"""llama.cpp and both transformers, each in its own environment: what they serve, and what serve_check.py says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fixtures.processes import run_process
from fixtures.serving import need_engines, write_served_run
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.exporting import options as export_options
from qwen_vl_sft.exporting.export import export, format_report
from qwen_vl_sft.merging import plan as merge_plan
from qwen_vl_sft.merging.merge import merge
from qwen_vl_sft.serving import check as serving
from qwen_vl_sft.serving import options as serve_options

# The first of them makes the environments, which takes as long as the network does.
pytestmark = [pytest.mark.long, pytest.mark.timeout(7200)]
ROWS = 12


@pytest.fixture(autouse=True, scope="module")
def engines() -> None:
    need_engines("llama.cpp", "transformers", "transformers-4")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with an adapter on the language model."""
    return write_served_run(tmp_path_factory.mktemp("served") / "run")


@pytest.fixture(scope="module")
def merged(run) -> Path:
    """That run's merged model."""
    folder = run.with_name("merged")
    merge(merge_plan.make_plan(merge_plan.MergeOptions(run=run, output_dir=folder, dtype="float32", samples=1)))
    return folder


def exported(run: Path, to: Any, folder: Path, **options: Any) -> dict[str, Any]:
    plan = export_options.make_plan(
        export_options.ExportOptions(run=run, to=to, output_dir=folder, max_samples=8, max_loss=100.0, **options)
    )
    return export(plan)


def check(run: Path, engine: str, model: Path | None = None, **options: Any) -> dict[str, Any]:
    options = {"max_samples": ROWS, "model": model, **options}
    return serving.check(serve_options.make_plan(serve_options.ServeCheckOptions(run=run, engine=engine, **options)))


def test_llama_cpp_serves_a_merged_model_and_finds_other_image_sizes(run, merged, tmp_path):
    report = exported(merged, "gguf", tmp_path / "gguf", gguf_type="f32")
    assert report["problems"] == []
    done = run_process(
        "scripts/serve_check.py", "--run", run, "--engine", "llama.cpp", "--model", tmp_path / "gguf",
        "--max_samples", str(ROWS),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    record = json.loads((run / "serving/llama.cpp_GGUF_f32_export.json").read_text())
    assert record["arms"]["tuned"] == {
        "rows": ROWS, "same_prompts": ROWS, "same": ROWS, "near_ties": 0, "different": 0,
    }  # fmt: skip
    assert record["versions"]["xllamacpp"]
    # The limits of image sizes are lost where they are not told.
    record = check(run, "llama.cpp", tmp_path / "gguf", engine_arguments="--image-max-tokens 9")
    assert not record["proven"]
    assert "prompts have other tokens in llama.cpp" in record["problems"][0]


def test_llama_cpp_serves_an_adapter_on_its_base(run, tmp_path):
    report = exported(run, "gguf", tmp_path / "gguf", gguf_type="f32")
    assert report["problems"] == []
    assert "--lora adapter.gguf --image-min-tokens 4" in format_report(report)
    record = check(run, "llama.cpp", tmp_path / "gguf")
    assert record["proven"], record["problems"]
    assert record["effect"]["engines"] == record["effect"]["ours"] > 0


def test_an_adapter_with_a_vision_part_is_to_be_merged_for_llama_cpp(tmp_path):
    run = write_served_run(tmp_path / "run", scope="all")
    with pytest.raises(
        UserError, match=r"outside the language model, which llama\.cpp does not take as an adapter; merge"
    ):
        exported(run, "gguf", tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


@pytest.mark.parametrize("to", ["compressed-tensors", "awq"])
def test_calibrated_models_are_served_as_they_are(run, merged, tmp_path, to):
    report = exported(merged, to, tmp_path / "out", calibration_samples=8)
    assert report["calibration_rows"] == 8
    assert report["same_prompt_lengths"] == 8
    record = check(run, "transformers", tmp_path / "out")
    assert record["proven"], record["problems"]
    assert record["reference"].startswith("the export's weights, unpacked")


def test_transformers_5_and_peft_serve_the_adapter(run):
    record = check(run, "transformers")
    assert record["proven"], record["problems"]
    assert record["versions"]["peft"]


@pytest.mark.parametrize("family", ["qwen2_vl", "Qwen2_5_VLConfig", "Qwen3VLConfig"])
def test_transformers_4_reads_merged_models(family, tmp_path):
    run = write_served_run(tmp_path / "run", family)
    merge(
        merge_plan.make_plan(
            merge_plan.MergeOptions(run=run, output_dir=tmp_path / "merged", dtype="float32", samples=1)
        )
    )
    record = check(run, "transformers-4", tmp_path / "merged")
    assert record["versions"]["transformers"] == "4.57.6"
    assert record["proven"], record["problems"]
