"""Mixtures of experts: the routers' auxiliary loss over the global batch, the load of experts, FLOPs."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

from fixtures.models import newer
from fixtures.packed_rows import GROUPS, one_at_a_time
from fixtures.trainers import make_trainer
from qwen_vl_sft.batching.collator import Collator, pad
from qwen_vl_sft.batching.packed_collator import MICRO_BATCHES, join
from qwen_vl_sft.batching.positions import Positions
from qwen_vl_sft.compat.packed_batches import take_packed_batches
from qwen_vl_sft.modeling.attention import use_packed_attention
from qwen_vl_sft.modeling.flops import FlopCounter
from qwen_vl_sft.modeling.routing import spread

MOE = ["Qwen3VLMoeConfig", "Qwen3_5MoeConfig"]
COEFFICIENT = 0.5
# Micro-batches of a step, as groups of rows that share their prefix.
STEPS = {
    "one": [GROUPS],
    "shared": [GROUPS[:1], GROUPS[1:]],
    "packed": [[[row] for group in GROUPS for row in group]],
    "two packed": [[[0], [1], [2]], [[3], [4], [5], [6]]],
}


@pytest.fixture(scope="module", params=MOE)
def start(request):
    return newer(request.param).train()


def flattened(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


@pytest.fixture(scope="module")
def wanted(start, encoded):
    """Transformers' own auxiliary loss of the whole batch beside the mean of the tokens' losses: value and gradients."""
    model = copy.deepcopy(start)
    batch = pad(encoded, 0)
    text = model.config.get_text_config()
    outputs = model(**{name: value for name, value in batch.items() if name != "labels"}, output_router_logits=True)
    auxiliary = load_balancing_loss_func(
        outputs.router_logits, text.num_experts, text.num_experts_per_tok, batch["attention_mask"]
    )
    (one_at_a_time(model, encoded).mean() + COEFFICIENT * auxiliary).backward()
    return auxiliary.item(), flattened(model)


def gradients_of_step(start, encoded, processor, folder, batches, checkpointed=False):
    """Those of an optimizer step in these micro-batches, as a trainer computes them, and its log of the routing."""
    model = copy.deepcopy(start)
    use_packed_attention(model)
    take_packed_batches(model, spares_last_layer=False)
    if checkpointed:
        model.activation_checkpointing_enable()
    trainer = make_trainer(model, [], processor, folder, router_aux_loss_coef=COEFFICIENT)
    made = [batch if isinstance(batch, dict) else packed(batch, encoded, model) for batch in batches]
    learned = torch.tensor(sum(batch["stats"]["target_tokens"] for batch in made))
    if "cu_seq_lens_q" in made[0]:
        steps, _ = trainer.get_batch_samples(iter([{MICRO_BATCHES: made}]), 1, torch.device("cpu"))
    else:
        steps, _ = trainer.get_batch_samples(iter(made), len(made), torch.device("cpu"))
    for step in steps:
        trainer.training_step(model, step, num_items_in_batch=learned)
    return flattened(model), trainer.routing.measure(trainer.accelerator), trainer.routing.total


def packed(groups, encoded, model):
    return join([[encoded[place] for place in group] for group in groups], Positions(model.config))


def padded(places, encoded, positions):
    items = SimpleNamespace(encode=lambda item, *args: encoded[item["row"]])
    return Collator(items, SimpleNamespace(pad_token_id=0), positions=positions)([{"row": row} for row in places])


@pytest.mark.parametrize("name", [*STEPS, "padded", "three padded", "checkpointed"])
def test_the_auxiliary_loss_is_that_of_the_global_batch(name, start, encoded, wanted, tiny_processor, tmp_path):
    auxiliary, gradients = wanted
    positions = Positions(start.config)
    if name == "padded":
        batches = [padded(range(7), encoded, positions)]
    elif name == "three padded":
        batches = [padded(rows, encoded, positions) for rows in ([0, 1], [2, 3, 4], [5, 6])]
    else:
        batches = STEPS["shared" if name == "checkpointed" else name]
    found, log, total = gradients_of_step(
        start, encoded, tiny_processor, tmp_path, batches, checkpointed=name == "checkpointed"
    )
    assert log["aux_loss"] == pytest.approx(auxiliary, abs=1e-5)
    assert float((found - gradients).norm() / gradients.norm()) < 1e-4
    # Each token of each layer once for each expert it chooses, padding never and shared prefixes for every row.
    tokens = sum(len(row.input_ids) for row in encoded)
    assert total.sum(1).tolist() == [2 * tokens] * len(total)


def test_it_would_be_noticed_if_padding_or_prefixes_were_counted_otherwise(start, encoded, wanted):
    """What transformers gives for a micro-batch alone, or without a mask, is another loss."""
    text, model = start.config.get_text_config(), copy.deepcopy(start)
    batch = pad(encoded, 0)
    with torch.no_grad():
        outputs = model(**{name: value for name, value in batch.items() if name != "labels"}, output_router_logits=True)
    without_mask = load_balancing_loss_func(outputs.router_logits, text.num_experts, text.num_experts_per_tok)
    assert abs(float(without_mask) - wanted[0]) > 1e-3


def test_without_a_coefficient_nothing_is_added_and_the_load_is_counted(start, encoded, tiny_processor, tmp_path):
    model = copy.deepcopy(start)
    use_packed_attention(model)
    take_packed_batches(model)
    text = model.config.get_text_config()
    trainer = make_trainer(model, [], tiny_processor, tmp_path)
    assert (text.router_aux_loss_coef, text.output_router_logits) == (0.001, False)
    batch = packed(GROUPS, encoded, model)
    steps, learned = trainer.get_batch_samples(iter([{MICRO_BATCHES: [batch]}]), 1, torch.device("cpu"))
    trainer.training_step(model, steps[0], num_items_in_batch=learned)
    plain = copy.deepcopy(start)
    one_at_a_time(plain, encoded).mean().backward()
    theirs = flattened(plain)
    assert float((flattened(model) - theirs).norm() / theirs.norm()) < 1e-4
    log = trainer.routing.measure(trainer.accelerator)
    assert log.keys() == {"expert_load_max", "expert_load_min", "idle_experts"}
    assert log["expert_load_max"] > 1 > log["expert_load_min"]
    # An evaluation is not counted.
    with torch.no_grad():
        model.eval()(input_ids=batch["input_ids"])
    assert trainer.routing.measure(trainer.accelerator) == {}


def test_the_spread_of_a_load():
    assert spread(torch.tensor([[4, 4, 4, 4], [8, 0, 4, 4]])) == {
        "expert_load_max": 2.0,
        "expert_load_min": 0.0,
        "idle_experts": 1,
    }


def test_the_experts_of_a_token_are_counted_as_flops(start):
    """Against PyTorch's own count of the products of a text row, whose experts run one after another."""
    model = copy.deepcopy(start).eval()
    model.set_experts_implementation("eager")
    tokens = 64
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(input_ids=torch.arange(tokens)[None], use_cache=False)
    counter = FlopCounter.of(model.config, peft=False, trained=[])
    one = counter.forward
    found = one.per_token * tokens + one.per_target_token * tokens
    found += one.per_token_products * tokens + one.per_token_squared * tokens**2
    # Attention is counted over its causal half, and the delta rule with it; they are little of this.
    assert found == pytest.approx(counted.get_total_flops(), rel=0.15)
    text = model.config.get_text_config()
    dense = one.per_token + 2 * text.num_hidden_layers * 3 * text.hidden_size * text.moe_intermediate_size * (
        text.num_experts - text.num_experts_per_tok
    )
    assert dense > 1.15 * one.per_token
