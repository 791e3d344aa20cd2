"""Kernels that compute the same as the layers they stand for; what needs a GPU is compared in scripts/check_packing.py."""

import copy
import importlib.util
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fixtures.models import FAMILIES, newer, qwen2_vl
from qwen_vl_sft.batching.positions import Positions
from qwen_vl_sft.compat.packed_batches import count_no_placeholders_in_training, take_packed_batches
from qwen_vl_sft.config.reading import read_recipe
from qwen_vl_sft.families.base import PackedLayout, RopeFunctions
from qwen_vl_sft.modeling import kernels
from qwen_vl_sft.modeling.attention import use_packed_attention, use_segmented_vision_attention
from qwen_vl_sft.modeling.kernels import (
    chosen_kernels,
    compute_adapters_in,
    problems_of_kernels,
    use_fused_kernels,
    use_fused_lora,
)
from qwen_vl_sft.planning.run import KERNELS_OF_AUTO
from qwen_vl_sft.training.plan import _kernel_lines

ROPE = RopeFunctions()


def adapted(dtype=torch.float32, **options):
    """Two linear layers with an adapter that is not zero, in float32 as training keeps it."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8)).to(dtype)
    model = get_peft_model(layers, LoraConfig(r=4, lora_alpha=6, target_modules=["0", "2"], **options)).train()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float32) / 4
    return model


def outcome(model, inputs, autocast=False):
    """Output and gradients of the adapter."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(inputs)
    output.float().square().sum().backward()
    return [output.detach().float(), *(p.grad.float() for p in model.parameters() if p.requires_grad)]


def distance(found, expected):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_fused_lora_is_the_adapter(dropout):
    model, inputs = adapted(lora_dropout=dropout), torch.randn(2, 5, 16)
    torch.manual_seed(1)
    expected = outcome(model, inputs)
    assert use_fused_lora(model) == 2
    torch.manual_seed(1)
    assert distance(outcome(model, inputs), expected) < 1e-6


def test_fused_lora_rounds_no_more_than_peft():
    inputs = torch.randn(64, 16, dtype=torch.bfloat16)
    model, exact = adapted(torch.bfloat16), adapted()
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    expected = outcome(exact, inputs.float())
    peft = distance(outcome(model, inputs, autocast=True), expected)
    assert use_fused_lora(model) == 2
    assert distance(outcome(model, inputs, autocast=True), expected) < 1.2 * peft


@pytest.mark.parametrize("bits", [4, 16, 32])
def test_the_gradient_of_an_adapted_layers_input_is_added_by_its_products(bits):
    """Of a layer without an input that learns too."""
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    layer = Linear4bit(64, 24, compute_dtype=dtype, quant_type="nf4") if bits == 4 else nn.Linear(64, 24)
    layer = nn.Sequential(layer.to("cpu") if bits == 4 else layer.to(dtype))
    model = get_peft_model(layer, LoraConfig(r=4, lora_alpha=6, target_modules=["0"])).train()
    nn.init.normal_(next(value for name, value in model.named_parameters() if "lora_B" in name))
    inputs = torch.randn(2, 5, 64, dtype=dtype)
    outcomes = []
    for fused in (False, True):
        assert not fused or use_fused_lora(model) == 1
        for learns in (False, True):
            x = inputs.clone().requires_grad_(learns)
            with torch.autocast("cpu", torch.bfloat16, enabled=bits != 32):
                output = model(x)
            assert (type(output.grad_fn).__name__ == "_AdaptedBackward") == fused
            wanted = [p for p in model.parameters() if p.requires_grad] + [x] * learns
            found = torch.autograd.grad(output.float().square().sum(), wanted)
            assert found[0].dtype == torch.float32
            outcomes.append([output.detach().float(), *(grad.float() for grad in found)])
        with torch.autocast("cpu", torch.bfloat16, enabled=bits != 32):
            assert model(inputs[:, :0]).shape == (2, 0, 24), "no tokens"
    for expected, found in zip(outcomes[:2], outcomes[2:], strict=True):
        assert distance(found, expected) < (1e-6 if bits == 32 else 2e-2)


@pytest.mark.parametrize("how", ["disabled", "merged", "bfloat16 without autocast"])
def test_fused_lora_leaves_all_else_to_peft(how):
    bfloat16 = how.startswith("bfloat16")
    model, inputs = adapted(torch.bfloat16 if bfloat16 else torch.float32), torch.randn(3, 16)
    if bfloat16:
        inputs = inputs.bfloat16()
    if how == "merged":
        model.merge_adapter()

    def run():
        if how == "disabled":
            with model.disable_adapter():
                return model(inputs)
        return model(inputs)

    expected = run()
    use_fused_lora(model)
    assert torch.equal(run(), expected)


def test_adapters_that_answer_in_half_precision_round_no_more_than_in_training():
    torch.manual_seed(0)
    model, exact = adapted(torch.bfloat16), adapted()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()  # as PEFT loads them
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    inputs = torch.randn(64, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = exact(inputs.float())
        with torch.autocast("cpu", torch.bfloat16):
            trained = model(inputs).float()
        with model.disable_adapter():
            base = model(inputs)
        assert compute_adapters_in(model, torch.bfloat16) == 2
        assert {value.dtype for name, value in model.named_parameters() if "lora_" in name} == {torch.bfloat16}
        found = model(inputs)
        with model.disable_adapter():
            assert torch.equal(model(inputs), base)
    assert found.dtype == torch.bfloat16
    assert distance([found.float()], [expected]) < 1.1 * distance([trained], [expected])
    assert distance([base.float()], [expected]) > 20 * distance([found.float()], [expected])


def test_dora_is_not_fused():
    assert use_fused_lora(adapted(use_dora=True)) == 0


def test_patch_embedding_is_the_convolution():
    model = qwen2_vl()
    embed = model.model.visual.patch_embed
    values = embed.in_channels * embed.temporal_patch_size * embed.patch_size**2
    patches = torch.randn(12, values)
    expected = embed(patches)
    assert use_fused_kernels(model, ["patch_embed", "lora"]) == {"patch_embed": 1}
    assert torch.allclose(embed(patches), expected, atol=1e-5)


def test_a_model_without_the_kernel_rotates_as_before(monkeypatch):
    """The function that rotates is one for all models of a family."""
    plain = qwen2_vl()
    fused = copy.deepcopy(plain)
    modeling = sys.modules[type(fused).__module__]
    for name in (ROPE.language, ROPE.vision):
        monkeypatch.setattr(modeling, name, getattr(modeling, name))
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    counts = use_fused_kernels(fused, ["rope"])
    layers = len(fused.model.language_model.layers) + len(fused.model.visual.blocks)
    assert counts == {"rope": layers}
    called = []
    rotate = getattr(modeling, ROPE.language).without_kernel

    def record(*args):
        called.append(True)
        return rotate(*args)

    monkeypatch.setattr(modeling, ROPE.language, kernels._fused_or_not(record, rotate))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = plain(input_ids=tokens).logits
        assert not called
        assert torch.equal(fused(input_ids=tokens).logits, expected)
    assert len(called) == len(fused.model.language_model.layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_of_a_patched_model_computes_with_its_own_weights(family, monkeypatch):
    """PEFT copies the layers of `lora_modules_to_save`, and trains the copies."""
    model = qwen2_vl() if family == "qwen2_vl" else newer(family)
    modeling = sys.modules[type(model).__module__]
    for name in (ROPE.language, ROPE.vision):
        monkeypatch.setattr(modeling, name, getattr(modeling, name))
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    use_segmented_vision_attention(model)
    use_packed_attention(model)
    count_no_placeholders_in_training(model)
    take_packed_batches(model)
    use_fused_kernels(model, ["rope", "patch_embed"])
    copied = copy.deepcopy(model).train()
    tokens = torch.tensor([[5, *[model.config.image_token_id] * 4, 6, 7]])
    embed = model.model.visual.patch_embed
    pixels = torch.randn(16, embed.in_channels * embed.temporal_patch_size * embed.patch_size**2)
    batch = {"image_grid_thw": torch.tensor([[1, 4, 4]]), "image_index": [0]}
    batch |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor([0, 7], dtype=torch.int32))
    batch |= dict.fromkeys(("max_length_q", "max_length_k"), 7)
    types = (tokens == model.config.image_token_id).long()
    batch |= Positions(model.config).packed_entries(PackedLayout([7], [None], types[0].nonzero()[:, 0]))
    output = copied(input_ids=tokens, pixel_values=pixels, mm_token_type_ids=types, use_cache=False, **batch)
    output.logits.square().sum().backward()
    assert [name for name, parameter in copied.named_parameters() if parameter.grad is None] == []
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == []


def test_only_three_kernels_need_liger(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not list(problems_of_kernels(["quick_gelu", "patch_embed", "lora"], on_cpu=False))
    (problem,) = problems_of_kernels(["lora", "rope"], on_cpu=False)
    assert "liger-kernel" in problem
    assert "pip install" in problem
    assert not list(problems_of_kernels(["patch_embed", "lora"], on_cpu=True))
    (problem,) = problems_of_kernels(["lora", "quick_gelu"], on_cpu=True)
    assert "quick_gelu run on CUDA only" in problem
    (problem,) = problems_of_kernels(["flora"], on_cpu=False)
    assert "flora" in problem
    assert "lora" in problem


@pytest.mark.parametrize(
    ("installed", "on_cpu", "chosen", "told"),
    [
        (True, False, [name for name in kernels.KERNELS if name != "experts"], None),
        (
            False,
            False,
            ["quick_gelu", "patch_embed", "lora"],
            "with pip install 'qwen_vl_sft[kernels]' also rms_norm",
        ),
        (True, True, ["patch_embed", "lora"], None),
    ],
)
def test_automatic_kernels_are_all_that_pay_and_can_run_here_and_the_plan_names_them(
    monkeypatch, installed, on_cpu, chosen, told
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    assert chosen_kernels("auto", on_cpu) == chosen
    assert not list(problems_of_kernels(chosen, on_cpu))
    recipe = read_recipe(None, {"model_name_or_path": "some/model", "dataset_name": "data", "fused_kernels": "auto"})
    lines = _kernel_lines(recipe.model.fused_kernels, on_cpu, chosen)
    assert max(map(len, lines)) <= 80
    assert " ".join(" ".join(lines).split()).startswith(f"kernels {', '.join(chosen)}")
    assert (told in lines[-1]) if told else "pip install" not in " ".join(lines)


def test_plans_expect_the_kernels_that_auto_takes():
    assert set(KERNELS_OF_AUTO) == set(kernels.KERNELS) - kernels.ASKED_FOR


def test_kernels_that_are_named_are_taken_as_they_are():
    assert chosen_kernels(["lora"], on_cpu=False) == ["lora"]
    assert chosen_kernels(None, on_cpu=False) == []
