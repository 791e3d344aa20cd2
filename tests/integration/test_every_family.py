"""Every family on a small random model: 4-bit weights under an adapter, packed and shared; merging, answers."""

import pytest
import torch
from peft import get_peft_model

from fixtures.messages import conversation_row, write_messages
from fixtures.models import FAMILIES, write_newer
from fixtures.packed_rows import token_losses
from qwen_vl_sft import tiny
from qwen_vl_sft.batching.packed_collator import join
from qwen_vl_sft.batching.positions import Positions
from qwen_vl_sft.compat.packed_batches import take_packed_batches
from qwen_vl_sft.config.reading import read_recipe
from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.data.dataset import open_rows
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.merging.merge import merge
from qwen_vl_sft.merging.plan import MergeOptions, make_plan
from qwen_vl_sft.modeling.attention import use_packed_attention
from qwen_vl_sft.modeling.base_model import load_model, load_processor
from qwen_vl_sft.modeling.lora import lora_config


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    if request.param == "qwen2_vl":
        return tiny.MODEL_DIR
    return write_newer(request.param, tmp_path_factory.mktemp("models") / request.param)


def adapted(settings):
    """Base and an adapter that is not zero, ready for packed rows."""
    model = load_model(settings, on_cpu=True)
    use_packed_attention(model)
    take_packed_batches(model)
    config = lora_config(model, settings)
    torch.manual_seed(0)
    found = get_peft_model(model, config)
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return found


def test_an_adapter_on_4_bit_weights_takes_gradients_packed_and_shared(base, tmp_path):
    settings = ModelSettings(model_name_or_path=str(base), load_in_4bit=True, dtype="float32", lora_scope="all")
    model = adapted(settings)
    questions = [conversation_row(f"<image>{word}?", word) for word in ("red", "blue", "a")]
    rows = open_rows(str(write_messages(tmp_path, questions)), "train")
    encoder = Encoder(load_processor(settings))
    encoded = [rows.encode({"row": index}, encoder) for index in range(len(questions))]
    losses = [
        token_losses(model, join(groups, Positions(model.config))) for groups in ([[row] for row in encoded], [encoded])
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-4)
    losses[1].mean().backward()
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in trained.values())


def test_an_adapter_is_merged_and_answers_as_before(base, tmp_path):
    run = tmp_path / "run"
    keys = {"model_name_or_path": str(base), "dtype": "float32", "dataset_name": str(tiny.DATA_DIR), "use_cpu": True}
    recipe = read_recipe(None, {**keys, "dataset_test_split": "val", "output_dir": str(run), "max_new_tokens": 4})
    adapted(recipe.model).save_pretrained(run)
    load_processor(recipe.model).save_pretrained(run)
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    (run / "system_message.txt").write_text("Answer with one word.")
    report = merge(make_plan(MergeOptions(run=run, output_dir=tmp_path / "merged", dtype="float32", samples=2)))
    assert report["against_adapter"]["same_answers"] == 2
    assert report["against_adapter"]["max"] < 1e-3
