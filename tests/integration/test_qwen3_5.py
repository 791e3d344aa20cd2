"""Qwen3.5's linear attention: exact packed and shared, and each way in which it would be wrong without an error."""

import copy
import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

from fixtures.messages import BLUE, RED, conversation_row, write_messages
from fixtures.models import WideTorch, newer
from fixtures.packed_rows import in_order, one_at_a_time, token_losses
from qwen_vl_sft.batching.packed_collator import join
from qwen_vl_sft.batching.positions import Positions
from qwen_vl_sft.compat.for_transformers import compute_linear_attention_on_cpu
from qwen_vl_sft.compat.packed_batches import take_packed_batches
from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.data.dataset import open_rows
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.families import gated_delta_net
from qwen_vl_sft.families.base import PackedLayout
from qwen_vl_sft.families.gated_delta_net import CHUNK, PIECES, pieces_of
from qwen_vl_sft.inference.padded_batches import generate_batch
from qwen_vl_sft.merging.base import read_base
from qwen_vl_sft.modeling.attention import use_packed_attention
from qwen_vl_sft.modeling.base_model import build_on_meta, load_model
from qwen_vl_sft.modeling.flops import FlopCounter
from qwen_vl_sft.modeling.kernels import KERNELS, LORA, use_fused_kernels
from qwen_vl_sft.modeling.lora import find_targets
from qwen_vl_sft.modeling.unloaded_weights import add_unloaded_weights
from qwen_vl_sft.tools.benchmark import build, measure
from qwen_vl_sft.tools.measuring import TRAINING_ALONE

PROJECTIONS = {"in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"}
# Ten questions on one image, four on another, two on both, one alone and text: some shorter than the convolution, some
# longer than a chunk.
ROWS = [
    *(conversation_row(f"<image>{'Which color is it? ' * number}", "b" * number + " red") for number in range(1, 11)),
    *(conversation_row(f"<image>{'a ' * number}", "no " * 30 * number, images=(BLUE,)) for number in range(1, 5)),
    conversation_row("<image><image>Which is first?", "red", images=(RED, BLUE)),
    conversation_row("<image><image>x", "y", images=(RED, BLUE)),
    conversation_row("What is one and one?", "two " * 40, images=()),
    conversation_row("a", "b", images=()),
]
GROUPS = [[*range(10)], [*range(10, 14)], [14, 15], [16], [17]]


@pytest.fixture(scope="module")
def encoded(tiny_processor, tmp_path_factory):
    rows = open_rows(str(write_messages(tmp_path_factory.mktemp("rows"), ROWS, (84, 56))), "train")
    return [rows.encode({"row": index}, Encoder(tiny_processor)) for index in range(len(ROWS))]


@pytest.fixture(scope="module")
def pair():
    """The same weights twice: as transformers has them, and ready for packed rows."""
    plain = newer("Qwen3_5Config").train()
    return plain, packing(copy.deepcopy(plain))


def packing(model):
    use_packed_attention(model)
    take_packed_batches(model)
    return model


def packed(model, encoded, groups=GROUPS):
    return join([[encoded[place] for place in group] for group in groups], Positions(model.config))


def apart(groups):
    return [[place] for group in groups for place in group]


def gradients(model, losses):
    model.zero_grad()
    losses.mean().backward()
    found = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return torch.cat(found).clone()


def differences(pair, encoded, groups=GROUPS, change=lambda batch: batch):
    """Largest difference of a token's loss, and |a - b| / |b| of all gradients together."""
    plain, model = pair
    wanted = one_at_a_time(plain, [encoded[place] for place in in_order(groups)])
    found = token_losses(model, change(packed(model, encoded, groups)))
    ours, theirs = gradients(model, found), gradients(plain, wanted)
    return float((found - wanted).detach().abs().max()), float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("groups", [apart(GROUPS), GROUPS], ids=["packed", "shared"])
def test_all_weights_take_the_gradients_of_rows_one_at_a_time(groups, pair, encoded):
    loss, gradient = differences(pair, encoded, groups)
    assert loss < 2e-5
    assert gradient < 1e-4


@pytest.mark.parametrize("groups", [apart(GROUPS), GROUPS], ids=["packed", "shared"])
def test_in_float64_nothing_but_rounding_is_left(groups, pair, encoded, monkeypatch):
    doubled = [copy.deepcopy(model).double() for model in pair]
    monkeypatch.setattr(modeling, "torch", WideTorch())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    loss, gradient = differences(doubled, encoded, groups)
    assert loss < 1e-10
    assert gradient < 1e-10


def without_pieces(batch):
    return {name: value for name, value in batch.items() if name != PIECES}


def changed(**values):
    return lambda batch: {**batch, PIECES: {**batch[PIECES], **values}}


def run_on(batch):
    """The convolution sees what stands before a piece in the sequence, as without `seq_idx`."""
    history, total = batch[PIECES]["history"].clone(), batch["input_ids"].shape[1]
    for place in (history == total).nonzero()[:, 0].tolist():
        following = next(int(index) for index in history[place:] if index < total)
        steps = next(step for step, index in enumerate(history[place:]) if index < total)
        history[place] = following - steps if following >= steps else total
    return changed(history=history)(batch)


def from_nothing(batch):
    """Every branch begins from an empty state, as with `cu_seqlens` of pieces alone."""
    kept = {name: value for name, value in batch[PIECES].items() if name != "parents"}
    return {**batch, PIECES: {**kept, "lengths": [batch["cu_seq_lens_q"].diff().tolist()]}}


def convolved_from_nothing(batch):
    history, total = batch[PIECES]["history"].clone(), batch["input_ids"].shape[1]
    places = torch.zeros_like(history, dtype=torch.bool)
    places[batch[PIECES]["positions"] + 3] = True
    history[~places] = total
    return changed(history=history)(batch)


@pytest.mark.parametrize("wrong", [run_on, from_nothing, convolved_from_nothing])
def test_the_comparisons_notice_a_leak_and_a_lost_state(wrong, pair, encoded):
    plain, model = pair
    with torch.no_grad():
        wanted = one_at_a_time(plain, [encoded[place] for place in in_order(GROUPS)])
        found = token_losses(model, wrong(packed(model, encoded)))
    assert (found - wanted).abs().max() > 0.1


def test_the_comparisons_notice_that_no_gradient_reaches_the_state_of_a_prefix(pair, encoded, monkeypatch):
    rounds = gated_delta_net.delta_rule_in_rounds

    def detached(rule, *args):
        def without_gradient(*inputs):
            out, states = rule(*inputs)
            return out, states.detach()

        return rounds(without_gradient, *args)

    monkeypatch.setattr(gated_delta_net, "delta_rule_in_rounds", detached)
    loss, gradient = differences(pair, encoded)
    assert loss < 2e-5
    assert gradient > 1e-2


def test_a_packed_batch_that_does_not_tell_its_pieces_is_an_error(pair, encoded):
    """By positions alone rows leak into each other; with `cu_seqlens` alone the convolution does."""
    _, model = pair
    with pytest.raises(RuntimeError, match="states would run from one row into the next"):
        token_losses(model, without_pieces(packed(model, encoded, apart(GROUPS))))


def test_pieces_beside_a_mask_are_an_error(pair, encoded):
    _, model = pair
    batch = packed(model, encoded)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, 0] = 0
    with pytest.raises(RuntimeError, match="packed rows take no attention mask"):
        token_losses(model, {**batch, "attention_mask": mask})


def test_an_installed_kernel_that_keeps_no_rows_apart_is_not_called(pair, encoded, monkeypatch):
    """Where flash-linear-attention is installed, transformers calls it in every layer, and knows of no first states."""
    plain, model = pair
    original = inspect.unwrap(modeling.torch_chunk_gated_delta_rule)

    def kernel(*args, **kwargs):
        raise AssertionError("the kernel was called")

    kernel.__wrapped__ = original
    groups = [GROUPS[2], GROUPS[4]]
    wanted = one_at_a_time(plain, [encoded[place] for place in in_order(groups)])
    monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", kernel)
    monkeypatch.setattr(modeling, "causal_conv1d_fn", kernel)
    found = token_losses(model, packed(model, encoded, groups))
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


def install_kernels(monkeypatch):
    """Have transformers call kernels of an installed package, which do not run."""
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):

        def kernel(*args, **kwargs):
            raise AssertionError("the kernel was called")

        kernel.__wrapped__ = inspect.unwrap(getattr(modeling, name))
        monkeypatch.setattr(modeling, name, kernel)


def test_trls_trainer_is_measured_on_a_cpu_where_kernels_are_installed(hybrid_model, tmp_path, monkeypatch):
    install_kernels(monkeypatch)
    keys = {"model_name_or_path": str(hybrid_model), "load_in_4bit": False, "output_dir": str(tmp_path)}
    rows = {"dataset_train_split": "train[:8]", "dataset_test_split": "val[:4]"}
    variant = build("trl", Path("recipes/quickstart.yaml"), {**TRAINING_ALONE, **keys, **rows}, repeat=1)
    assert measure(variant, steps=1, warmup=1)["rows_per_second"] > 0


def test_an_installed_kernel_is_not_called_on_a_cpu(pair, monkeypatch):
    """Not in padded batches either, where transformers would; nor twice around."""
    words = {"input_ids": torch.arange(7)[None], "use_cache": True}
    wanted = pair[0](**words).logits
    install_kernels(monkeypatch)
    original = inspect.unwrap(modeling.torch_recurrent_gated_delta_rule)
    with pytest.raises(AssertionError, match="the kernel was called"):
        pair[0](**words)
    compute_linear_attention_on_cpu(pair[0])
    chosen = modeling.torch_chunk_gated_delta_rule
    compute_linear_attention_on_cpu(pair[0])
    assert modeling.torch_chunk_gated_delta_rule is chosen
    assert inspect.unwrap(modeling.torch_recurrent_gated_delta_rule) is original
    assert torch.equal(pair[0](**words).logits, wanted)


@pytest.mark.parametrize("layers", [4, 5])
def test_a_last_layer_of_any_kind_is_computed(layers, encoded):
    plain = newer("Qwen3_5Config", num_hidden_layers=layers)
    kinds = plain.config.text_config.layer_types
    assert kinds[-1] == ("full_attention" if layers == 4 else "linear_attention")
    model = packing(copy.deepcopy(plain))
    wanted = one_at_a_time(plain, [encoded[place] for place in GROUPS[2]])
    batch = packed(model, encoded, GROUPS[2:3])
    torch.testing.assert_close(token_losses(model, batch), wanted, rtol=0, atol=2e-5)
    inputs = {name: value for name, value in batch.items() if name not in ("stats", "shift_labels")}
    assert model.model(**inputs, use_cache=False)[0].shape[1] == len(batch["logit_positions"])


def test_pieces_of_a_layout():
    """A row, a prefix of two tokens, and a row; then two branches of the prefix: before each stand zero and both."""
    found = pieces_of(PackedLayout([2, 2, 1, 1, 2], [None, None, None, 1, 1], torch.zeros(0)), 4)
    zero = [8] * 3
    assert found["history"].tolist() == [*zero, 0, 1, *zero, 2, 3, *zero, 4, 8, 2, 3, 5, 8, 2, 3, 6, 7]
    assert found["lengths"] == [[2, 2, 1], [1, 2]]
    assert found["parents"].tolist() == [1, 1]
    assert [bounds.tolist() for bounds in found["round_bounds"]] == [[0, 2, 4, 5], [0, 1, 3]]
    # Of the convolved sequence, which is three shorter.
    assert [found["history"].tolist()[place + 3] for place in found["positions"]] == [*range(8)]
    # For kernels the inputs before each token, the nearest first.
    before = [[-1] * 3, [0, -1, -1], [-1] * 3, [2, -1, -1], [-1] * 3, [3, 2, -1], [3, 2, -1], [6, 3, 2]]
    assert found["window"].tolist() == before
    # The inputs of the prefix, and what of the branches takes each: a token, and how far before it that is.
    assert found["taken"].tolist() == [2, 3]
    assert found["taken_bounds"].tolist() == [0, 3, 6]
    assert found["takers"].tolist() == [[5, 2], [6, 2], [7, 3], [5, 1], [6, 1], [7, 2]]
    long = pieces_of(PackedLayout([CHUNK, CHUNK + 1], [None, None], torch.zeros(0)), 4)
    assert long["round_chunks"][0].tolist() == [[0, 0], [1, 0], [1, 1]]
    assert not {"parents", "taken", "taken_bounds", "takers"} & long.keys()
    with pytest.raises(AssertionError, match="pieces without a parent stand first"):
        pieces_of(PackedLayout([2, 1, 2], [None, 0, None], torch.zeros(0)), 4)


def test_lora_reaches_the_projections_of_linear_attention(hybrid_model):
    settings = ModelSettings(model_name_or_path=str(hybrid_model))
    names = find_targets(build_on_meta(settings), settings)
    assert {name.rsplit(".", 1)[-1] for name in names if "linear_attn" in name} == PROJECTIONS
    assert len(names) == 3 * 5 + 4 + 4 * 3


def test_4_bits_leave_the_layers_of_one_value_a_head_alone(hybrid_model):
    from bitsandbytes.nn import Linear4bit

    settings = ModelSettings(model_name_or_path=str(hybrid_model), load_in_4bit=True, dtype="bfloat16")
    model = load_model(settings, on_cpu=True)
    quantized = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert {"in_proj_qkv", "in_proj_z", "out_proj", "q_proj", "gate_proj"} <= quantized
    assert not {"in_proj_a", "in_proj_b", "lm_head"} & quantized


def test_kernels_are_put_in_where_they_fit(pair, monkeypatch):
    """Of a head of the language model a quarter is rotated; norms that multiply by weight + 1 have a form of their own."""
    model = copy.deepcopy(pair[0])
    for name in ("apply_rotary_pos_emb", "apply_rotary_pos_emb_vision"):
        monkeypatch.setattr(modeling, name, getattr(modeling, name))
    counts = use_fused_kernels(model, [name for name in KERNELS if name != LORA])
    layers = model.model.language_model.layers
    full = sum(hasattr(layer, "self_attn") for layer in layers)
    assert counts["rope"] == full + len(model.model.visual.blocks)
    # Two of each layer and of its heads, and the last one; not those of linear attention, which have a gate.
    assert counts["rms_norm"] == 2 * len(layers) + 2 * full + 1
    assert counts["linear_attention"] == len(layers) - full
    assert counts["patch_embed"] == 1
    assert counts["swiglu"] == len(model.model.language_model.layers)
    assert modeling.apply_rotary_pos_emb.kernel.__name__ == "rotate_first_values"
    changed = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if "forward" in vars(module)}
    norms = {"input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "norm"}
    assert changed == {"mlp", "proj", "attn", "self_attn", "linear_attn", *norms}
    assert "forward" not in vars(next(layer for layer in layers if hasattr(layer, "linear_attn")).linear_attn.norm)
    called = []
    rms_norm = SimpleNamespace(LigerRMSNormFunction=SimpleNamespace(apply=lambda *args: called.append(args[2:])))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.rms_norm", rms_norm)
    layers[0].input_layernorm(torch.ones(1, 2, 3))
    assert called == [(layers[0].input_layernorm.eps, 1.0, "gemma", False)]


def test_flops_are_those_that_pytorch_counts():
    """Forward alone: PyTorch counts whole squares of attention and of chunks, and no triangular system."""
    model = newer("Qwen3_5Config").requires_grad_(False)
    model.set_attn_implementation("eager")
    text, tokens = model.config.text_config, 2 * CHUNK
    forward = FlopCounter.of(model.config, peft=True, trained=set()).forward
    with FlopCounterMode(display=False) as counted:
        model(input_ids=torch.arange(tokens)[None])
    expected = (forward.per_token + forward.per_token_products + forward.per_target_token) * tokens
    expected += forward.per_token_squared * 2 * tokens**2
    # A head's chunk is C * (4 K + 2 V) a token there, and C * (3 K + 2 V) with halves and the system.
    heads, key = text.linear_num_value_heads, text.linear_key_head_dim
    expected += 3 * heads * CHUNK * key * tokens
    assert counted.get_total_flops() == pytest.approx(expected, rel=1e-2)
    packed = FlopCounter.of(model.config, peft=True, trained=set(), packed=True).forward
    assert packed.per_target_token - forward.per_target_token == 2 * 3 * text.hidden_size * text.intermediate_size


def test_prompts_padded_on_the_left_are_answered_as_each_alone(pair, encoded, tiny_processor):
    plain, encoder = pair[0].eval(), Encoder(tiny_processor)
    rows = [encoded[place] for place in (0, 9, 13, 15)]
    together = generate_batch(plain, encoder, rows, 8)
    assert together == [answer for row in rows for answer in generate_batch(plain, encoder, [row], 8)]
    plain.train()


def test_a_merge_finds_a_place_for_weights_that_transformers_does_not_load(hybrid_model):
    weights = read_base(hybrid_model, build_on_meta(ModelSettings(model_name_or_path=str(hybrid_model))))
    unloaded = [weight for weight in weights if weight.key.startswith("mtp.")]
    assert [weight.output for weight in unloaded] == ["mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight"]


def test_a_full_model_gets_the_weights_that_transformers_does_not_load(hybrid_model, tmp_path):
    settings = ModelSettings(model_name_or_path=str(hybrid_model), dtype="bfloat16")
    load_model(settings, on_cpu=True).save_pretrained(tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    assert not any(name.startswith("mtp.") for name in before)
    assert add_unloaded_weights(settings, tmp_path) == 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    after = {name: load_file(tmp_path / file)[name] for name, file in index["weight_map"].items()}
    base = load_file(hybrid_model / "model.safetensors")
    assert after.keys() == before.keys() | {name for name in base if name.startswith("mtp.")}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(after["mtp.fc.weight"], base["mtp.fc.weight"].bfloat16())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in after.values())
    assert not (tmp_path / "model.safetensors").exists()
    # A model in several files gets one more.
    assert add_unloaded_weights(settings, tmp_path) == 2
    assert (tmp_path / "model-00003-of-00003.safetensors").exists()
    load_model(ModelSettings(model_name_or_path=str(tmp_path)), on_cpu=True)
