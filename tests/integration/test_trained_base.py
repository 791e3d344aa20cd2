"""An adapter answers on the base model it was trained on, and on no other one of the same shape."""

import json
import shutil

import pytest

from fixtures.evaluation import plan, write_charts, write_run
from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.inference.answering import Answerer
from qwen_vl_sft.inference.trained_base import base_of_run, check_trained_base
from qwen_vl_sft.modeling.base_identity import digest_of_weights, identity_of_base, weights_of_base


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that names its base, and beside it a model of the same shape with other weights."""
    root = tmp_path_factory.mktemp("base")
    run = write_run(root, write_charts(root / "charts"))
    other = root / "other"
    shutil.copytree(root / "model", other)
    from safetensors.torch import load_file, save_file

    weights = {name: tensor + 0.01 for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    base = identity_of_base(plan("--run", run).recipe.model)
    (run / "environment.json").write_text(json.dumps({"base": base}))
    return run


def asked(run, *words):
    return plan("--run", run, "--output_dir", run.parent / "evaluation", *words)


def test_another_base_of_the_same_shape_is_refused(run):
    elsewhere = asked(run, "--model_name_or_path", run.parent / "other")
    for refuse in (lambda: check_trained_base(elsewhere), lambda: Answerer([elsewhere]).load(["tuned"])):
        with pytest.raises(UserError, match=r"was trained on .*/model \(a folder of weights .* another model"):
            refuse()


def test_its_own_base_is_taken_wherever_it_lies(run, tmp_path, capsys):
    check_trained_base(asked(run))
    shutil.copytree(run.parent / "model", tmp_path / "moved")
    check_trained_base(asked(run, "--model_name_or_path", tmp_path / "moved"))
    assert capsys.readouterr().err == ""


def saved_again(model, folder, dtype=None, rename=str):
    """A model's weights in two files, as another program would write them."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {
        rename(name): value.to(dtype or value.dtype) for name, value in load_file(model / "model.safetensors").items()
    }
    names = sorted(tensors)
    parts = names[: len(names) // 3], names[len(names) // 3 :]
    files = {f"model-0000{number}-of-00002.safetensors": part for number, part in enumerate(parts, 1)}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"transformers_version": "4.0", "dtype": str(dtype or torch.float32)[6:]})
    )
    return folder


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_base_that_was_saved_again_is_the_same(recorded, dtype, run, tmp_path, capsys):
    """Whether its run has recorded the weights, or the folder that it was trained on is still there to compare."""
    import torch

    again = saved_again(run.parent / "model", tmp_path / "again", getattr(torch, dtype) if dtype else None)
    home = tmp_path / "run"
    shutil.copytree(run, home)
    if recorded:
        base = plan("--run", run).recipe.model
        told = json.loads((run / "environment.json").read_text())
        weights = digest_of_weights(weights_of_base(base))
        (home / "environment.json").write_text(json.dumps(told | {"base_weights": weights}))
    check_trained_base(asked(home, "--model_name_or_path", again))
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match=r"another model .*tensors have other values, such as .*--model_name_or_path"):
        check_trained_base(asked(home, "--model_name_or_path", run.parent / "other"))


def test_names_of_tensors_do_not_matter(run, tmp_path):
    def digest(folder):
        return digest_of_weights(weights_of_base(ModelSettings(model_name_or_path=str(folder))))

    model = run.parent / "model"
    renamed = saved_again(model, tmp_path / "renamed", rename=lambda name: f"other.{name}")
    assert digest(model) == digest(renamed) != digest(run.parent / "other")


def test_what_cannot_be_told_is_said(run, tmp_path, capsys):
    older = tmp_path / "run"
    shutil.copytree(run, older)
    (older / "environment.json").write_text("{}")
    check_trained_base(asked(older))
    assert capsys.readouterr().err == ""
    check_trained_base(asked(older, "--model_name_or_path", run.parent / "other"))
    assert "trained on a base model that its run does not identify; whether" in capsys.readouterr().err
    (older / "environment.json").write_text(json.dumps({"base": "Qwen/Qwen2-VL-2B-Instruct at 895c3a4"}))
    check_trained_base(asked(older))
    assert "was trained on Qwen/Qwen2-VL-2B-Instruct at 895c3a4; whether" in capsys.readouterr().err


def test_a_run_of_an_earlier_version_tells_its_base_in_checkpoints_and_metrics(tmp_path):
    assert base_of_run(tmp_path, "some/model") is None
    (tmp_path / "metrics.json").write_text(json.dumps({"base_commit": "abc"}))
    assert base_of_run(tmp_path, "some/model") == "some/model at abc"
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/complete.json").write_text(json.dumps({"same": {"base": f"base {step}"}}))
    assert base_of_run(tmp_path, "some/model") == "base 10"


def test_an_adapter_of_another_shape_is_told_in_a_line(run, tmp_path):
    """The run does not tell its base, and only its tensors show that it is another one."""
    from fixtures.evaluation import tiny_model
    from qwen_vl_sft.inference.models import attach_adapter

    shutil.copytree(run, tmp_path / "run")
    config = json.loads((tmp_path / "run/adapter_config.json").read_text())
    (tmp_path / "run/adapter_config.json").write_text(json.dumps(config | {"r": 2}))
    with pytest.raises(
        UserError, match=r"does not fit its base model: .*size mismatch.*--model_name_or_path"
    ) as caught:
        attach_adapter(tiny_model()[0], tmp_path / "run")
    assert len(str(caught.value)) < 600 + len(str(tmp_path))
