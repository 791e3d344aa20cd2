"""Exports with the real converters, each in its own environment, and the answers of what they wrote."""

import json
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from fixtures.processes import run_process
from fixtures.serving import need_engines
from qwen_vl_sft import tiny
from qwen_vl_sft.config.reading import read_recipe
from qwen_vl_sft.data.formats.chartqa import CHARTQA_SYSTEM_MESSAGE
from qwen_vl_sft.exporting.export import export, format_report
from qwen_vl_sft.exporting.options import ExportOptions, make_plan

# The first of them makes the environments, which takes as long as the network does.
pytestmark = [pytest.mark.long, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The embedded model as a run that trained the whole model; engines read what it is exported to."""
    need_engines("llama.cpp", "transformers")
    folder = tmp_path_factory.mktemp("exporting") / "model"
    shutil.copytree(tiny.MODEL_DIR, folder)
    keys = {
        "model_name_or_path": str(tiny.MODEL_DIR),
        "dtype": "float32",
        "dataset_name": str(tiny.DATA_DIR),
        "use_cpu": True,
        "use_peft": False,
    }
    (folder / "recipe.yaml").write_text(read_recipe(None, keys).to_yaml())
    return folder


def test_a_gguf_file_answers_as_the_model_and_without_its_limits_fails(model, tmp_path):
    plan = make_plan(ExportOptions(run=model, to="gguf", output_dir=tmp_path / "gguf", gguf_type="f32", max_samples=24))
    report = export(plan)
    assert report["problems"] == []
    assert report["same_prompt_lengths"] == report["rows"] == 24
    assert report["same_answers"] >= 23
    assert {"model.gguf", "mmproj.gguf", "processor_config.json", "export.json"} <= {
        path.name for path in (tmp_path / "gguf").iterdir()
    }
    assert "--image-min-tokens 4 --image-max-tokens 16" in format_report(report)
    forgetful = replace(plan.engine, arguments=lambda served: ["--image-min-tokens", "4", "--image-max-tokens", "9"])
    options = replace(plan.options, output_dir=tmp_path / "again", max_samples=8)
    report = export(replace(make_plan(options), engine=forgetful))
    assert "of 8 prompts have other tokens" in report["problems"][0]
    assert report["folder"] == str(tmp_path / "again-failed")
    assert not (tmp_path / "again").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again-failed", "gguf"]


@pytest.mark.parametrize(("to", "least"), [("fp8", 22), ("compressed-tensors", 12)])
def test_a_quantized_model_answers_nearly_as_the_model(model, tmp_path, to, least):
    options = ExportOptions(run=model, to=to, output_dir=tmp_path / "out", max_samples=24, max_loss=100.0)
    report = export(make_plan(options))
    assert report["problems"] == []
    assert report["same_prompt_lengths"] == 24
    assert report["same_answers"] >= least
    assert report["bytes"]["export"] < 0.8 * report["bytes"]["original"]
    quantization = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert {"re:.*visual.*", "re:.*lm_head"} <= set(quantization["ignore"])


def test_a_model_that_4_bits_destroy_fails(model, tmp_path):
    """The same model with every other channel of values and MLPs written small, so that 4 bits round it to zero."""
    fragile = tmp_path / "fragile"
    shutil.copytree(model, fragile)
    (fragile / "system_message.txt").write_text(CHARTQA_SYSTEM_MESSAGE)
    weights = load_file(fragile / "model.safetensors")
    for name in [name for name in weights if "visual" not in name]:
        if name.endswith(("up_proj.weight", "v_proj.weight", "v_proj.bias")):
            weights[name][::2] *= 64
        if name.endswith(("down_proj.weight", "o_proj.weight")):
            weights[name][:, ::2] /= 64
    save_file(weights, fragile / "model.safetensors", metadata={"format": "pt"})
    done = run_process(
        "scripts/export.py", "--run", fragile, "--to", "compressed-tensors", "--calibration_samples", "0",
        "--output_dir", tmp_path / "out", "--max_samples", "150",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr[-2000:]
    assert "points lower (p = " in done.stdout
    assert (tmp_path / "out-failed/export.json").is_file()
    assert not (tmp_path / "out").exists()
