"""Experts in 4 bits, and with an adapter each: against transformers and PEFT one row at a time."""

import copy
import gc
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from fixtures.models import WideTorch, newer, write_newer
from fixtures.packed_rows import GROUPS, in_order, one_at_a_time, token_losses
from qwen_vl_sft.batching.packed_collator import join
from qwen_vl_sft.batching.positions import Positions
from qwen_vl_sft.compat import quantized_experts
from qwen_vl_sft.compat.packed_batches import take_packed_batches
from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.families.registry import family_of
from qwen_vl_sft.inference.models import attach_adapter
from qwen_vl_sft.modeling.attention import use_packed_attention
from qwen_vl_sft.modeling.base_model import build_on_meta, count_parameters, load_model
from qwen_vl_sft.modeling.experts import check_adapted, unpacked, use_grouped_lora
from qwen_vl_sft.modeling.fp8.linear import FP8Linear
from qwen_vl_sft.modeling.fp8.weights import E4M3, quantize_rows
from qwen_vl_sft.modeling.lora import lora_config
from qwen_vl_sft.modeling.structure import build_structure
from qwen_vl_sft.training.plan import _trained_lines

MOE = ["Qwen3VLMoeConfig", "Qwen3_5MoeConfig"]
PARTS = ("gate_up_proj", "down_proj")


@pytest.fixture(scope="module", params=MOE)
def folder(request, tmp_path_factory):
    return write_newer(request.param, tmp_path_factory.mktemp("models") / request.param)


def settings_of(folder, **keys):
    return ModelSettings(model_name_or_path=str(folder), dtype="float32", lora_scope="experts", lora_r=4, **keys)


def adapted(model, settings):
    """With PEFT's own forward, and an adapter that is not zero."""
    torch.manual_seed(0)
    found = get_peft_model(model, lora_config(model, settings))
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return found


def packing(model):
    use_packed_attention(model)
    take_packed_batches(model)
    return model


def gradients(model, losses):
    model.zero_grad()
    losses.mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def differences(ours, theirs, encoded, share):
    """Largest difference of a token's loss, and |a - b| / |b| of all gradients of the adapters together."""
    groups = GROUPS if share else [[row] for group in GROUPS for row in group]
    batch = join([[encoded[row] for row in group] for group in groups], Positions(ours.config))
    wanted, found = one_at_a_time(theirs, [encoded[row] for row in in_order(groups)]), token_losses(ours, batch)
    one, other = gradients(ours, found), gradients(theirs, wanted)
    assert one.keys() == other.keys()
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in one} >= {"experts", "base_layer", "q_proj"}
    one, other = (torch.cat([grad.flatten() for grad in found.values()]) for found in (one, other))
    return float((found - wanted).detach().abs().max()), float((one - other).norm() / other.norm())


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_an_adapter_on_every_expert_is_that_of_peft(share, checkpointed, folder, encoded):
    settings = settings_of(folder)
    theirs = adapted(load_model(settings, on_cpu=True), settings).train()
    ours = adapted(packing(load_model(settings, on_cpu=True)), settings).train()
    layers = ours.config.get_text_config().num_hidden_layers
    assert use_grouped_lora(ours) == layers
    assert check_adapted(ours) == 6 * layers
    if checkpointed:
        ours.enable_input_require_grads()
        ours.get_base_model().activation_checkpointing_enable()
    loss, gradient = differences(ours, theirs, encoded, share)
    assert loss < 2e-5
    assert gradient < 1e-4


@pytest.mark.parametrize("share", [False, True])
def test_in_float64_nothing_but_rounding_is_left(share, folder, encoded, monkeypatch):
    settings = settings_of(folder)
    theirs = adapted(load_model(settings, on_cpu=True), settings).train().double()
    theirs.get_base_model().set_experts_implementation("eager")  # grouped products have no float64
    ours = adapted(packing(load_model(settings, on_cpu=True)), settings).train().double()
    use_grouped_lora(ours)
    monkeypatch.setattr(sys.modules[type(ours.get_base_model()).__module__], "torch", WideTorch())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    loss, gradient = differences(ours, theirs, encoded, share)
    assert loss < 1e-10
    assert gradient < 1e-10


@pytest.mark.parametrize("scope", ["language", "experts"])
def test_4_bit_experts_are_their_unpacked_weights(scope, folder, encoded):
    """Losses and gradients of a QLoRA are those of transformers' and PEFT's own model that holds what the 4 bits say."""
    settings = settings_of(folder, load_in_4bit=True)
    ours = load_model(settings, on_cpu=True)
    plain = ModelSettings(model_name_or_path=str(folder), dtype="float32")
    theirs = load_model(plain, on_cpu=True)
    counts = [{part: count.total for part, count in count_parameters(model).items()} for model in (ours, theirs)]
    assert counts[0] == counts[1]
    family = family_of(ours.config)
    state = theirs.state_dict()
    for name, module in ours.named_modules():
        if type(module).__name__ == "Linear4bit":
            state[f"{name}.weight"] = unpacked(module.weight, module.weight.quant_state)
    for name, module in family.experts.modules(ours).items():
        for part in PARTS:
            weight = getattr(module, part)
            assert weight.dtype == torch.uint8
            found = unpacked(weight, module.quant_states[part])
            exact = state[f"{name}.{part}"]
            assert found.shape == exact.shape
            assert 0.01 < float((found - exact).norm() / exact.norm()) < 0.2
            state[f"{name}.{part}"] = found
    theirs.load_state_dict(state)
    keys = (
        settings
        if scope == "experts"
        else ModelSettings(
            model_name_or_path=str(folder), dtype="float32", load_in_4bit=True, lora_scope="language", lora_r=4
        )
    )
    compare(theirs, ours, keys, encoded)


def compare(theirs, ours, keys, encoded):
    """Compare losses and gradients of adapters on two models of the same weights."""
    theirs, ours = adapted(theirs, keys).train(), adapted(packing(ours), keys).train()
    use_grouped_lora(ours)
    groups = [[encoded[row] for row in group] for group in GROUPS]
    wanted, found = one_at_a_time(theirs, in_order(groups)), token_losses(ours, join(groups, Positions(ours.config)))
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    one, other = gradients(ours, found), gradients(theirs, wanted)
    assert one.keys() == other.keys()
    one, other = (torch.cat([grad.flatten() for grad in each.values()]) for each in (one, other))
    assert float((one - other).norm() / other.norm()) < 1e-4


def test_fp8_experts_are_their_dequantized_weights(folder, encoded):
    """The same of FP8 whose inputs are not rounded."""
    settings = settings_of(folder, load_in_fp8="emulation", fp8_forward=False, fp8_backward=False)
    ours, theirs = load_model(settings, on_cpu=True), load_model(settings_of(folder), on_cpu=True)
    counts = [{part: count.total for part, count in count_parameters(model).items()} for model in (ours, theirs)]
    assert counts[0] == counts[1]
    state, exact = theirs.state_dict(), theirs.state_dict()
    for name, module in ours.named_modules():
        if isinstance(module, FP8Linear):
            state[f"{name}.weight"] = module.dequantized()
    for name, module in family_of(ours.config).experts.modules(ours).items():
        for part in PARTS:
            values, scales = getattr(module, part).view(E4M3), getattr(module, f"{part}_scale").view(torch.float32)
            key = f"{name}.{part}"
            for number, weight in enumerate(exact[key]):
                wanted = quantize_rows(weight)
                assert torch.equal(values[number].view(torch.uint8), wanted.values.view(torch.uint8))
                assert torch.equal(scales[number], wanted.scales)
            state[key] = values.float() * scales
    theirs.load_state_dict(state)
    compare(theirs, ours, settings, encoded)
    # Rounding inputs moves what a layer gives by a few percent.
    rounding = load_model(replace(settings, fp8_forward=True, fp8_backward=True), on_cpu=True)
    exact = load_model(settings, on_cpu=True)
    experts = family_of(exact.config).experts
    for one, other in zip(*(experts.modules(model).values() for model in (rounding, exact)), strict=True):
        tokens, chosen = torch.randn(11, one.gate_up_proj.shape[-1]), torch.rand(11, 6).topk(2).indices
        found, wanted = (
            part(tokens, chosen, torch.rand(11, 2, generator=torch.Generator().manual_seed(0))) for part in (one, other)
        )
        assert 0.005 < float((found - wanted).norm() / wanted.norm()) < 0.08


def test_experts_are_quantized_while_they_are_read(folder, monkeypatch):
    """One stack of a layer is whole at a time, and where the files have it turned its copy."""
    import bitsandbytes.functional as functional

    original, most = functional.quantize_4bit, []

    def quantize(tensor, *args, **kwargs):
        whole = [
            other
            for other in gc.get_objects()
            if type(other) is torch.Tensor and other.ndim == 3 and other.is_floating_point() and len(other) == 6
        ]
        if tensor.ndim == 3:
            most.append(len({other.data_ptr() for other in whole if other.device.type == "cpu"}))
        return original(tensor, *args, **kwargs)

    monkeypatch.setattr(functional, "quantize_4bit", quantize)
    model = load_model(settings_of(folder, load_in_4bit=True), on_cpu=True)
    assert len(most) == 2 * model.config.get_text_config().num_hidden_layers
    assert max(most) <= 2


@pytest.mark.parametrize("nested", [True, False])
def test_turned_files_are_quantized_a_few_experts_at_a_time(nested, tmp_path, monkeypatch):
    """Bit for bit as the whole stack at once, of which no turned copy is made."""
    import bitsandbytes.functional as functional

    straight = write_newer("Qwen3VLMoeConfig", tmp_path / "straight")
    shutil.copytree(straight, tmp_path / "turned")
    weights = load_file(straight / "model.safetensors")
    turned = {name: value.mT.contiguous() if ".mlp.experts." in name else value for name, value in weights.items()}
    save_file(turned, tmp_path / "turned/model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(quantized_experts, "_AT_ONCE", 4 * 64 * 256)
    original, sizes = functional.quantize_4bit, []

    def quantize(tensor, *args, **kwargs):
        sizes.append(tuple(tensor.shape))
        return original(tensor, *args, **kwargs)

    monkeypatch.setattr(functional, "quantize_4bit", quantize)
    model = load_model(settings_of(tmp_path / "turned", load_in_4bit=True, use_bnb_nested_quant=nested), on_cpu=True)
    layers = model.config.get_text_config().num_hidden_layers
    # Four experts and two, or all six of the narrower stack.
    assert [size for size in sizes if len(size) == 3] == [(6, 64, 128), (4, 256, 64), (2, 256, 64)] * layers
    for name, module in family_of(model.config).experts.modules(model).items():
        for part in PARTS:
            packed, state = original(
                weights[f"{name}.{part}"], compress_statistics=nested, quant_type="nf4", quant_storage=torch.uint8
            )
            found = module.quant_states[part]
            assert torch.equal(getattr(module, part), packed)
            assert (found.nested, found.blocksize, found.shape) == (nested, state.blocksize, state.shape)
            assert torch.equal(unpacked(packed, found), unpacked(packed, state))


def test_peft_loads_a_saved_adapter_by_itself(folder, encoded, tmp_path):
    settings = settings_of(folder)
    ours = adapted(load_model(settings, on_cpu=True), settings).eval()
    use_grouped_lora(ours)
    ours.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert any(name.endswith("layers.0.mlp.experts.base_layer.lora_A.weight") for name in saved)
    peft = PeftModel.from_pretrained(load_model(settings, on_cpu=True), str(tmp_path)).eval()
    with torch.no_grad():
        wanted, found = one_at_a_time(peft, encoded[:3]), one_at_a_time(ours, encoded[:3])
        with ours.disable_adapter(), peft.disable_adapter():
            without = one_at_a_time(ours, encoded[:3])
            torch.testing.assert_close(without, one_at_a_time(peft, encoded[:3]), rtol=0, atol=2e-5)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    assert (found - without).abs().max() > 1e-3
    loaded = attach_adapter(load_model(settings_of(folder, load_in_4bit=True), on_cpu=True), tmp_path)
    assert all(
        torch.equal(loaded.state_dict()[name.replace(".weight", ".default.weight")], saved[name]) for name in saved
    )


def test_an_adapter_on_another_number_of_experts_is_refused(folder, tmp_path):
    settings = settings_of(folder)
    name = "Qwen3VLMoeConfig" if "VL" in folder.name else "Qwen3_5MoeConfig"
    other = adapted(newer(name, num_experts=4), settings)
    other.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"does not fit its base model: .*size mismatch"):
        attach_adapter(load_model(settings, on_cpu=True), tmp_path)


def test_layers_without_an_adapter_are_noticed(folder):
    settings = settings_of(folder)
    model = load_model(settings, on_cpu=True)
    config = lora_config(model, settings)
    found = get_peft_model(copy.deepcopy(model), config)
    wrapper = next(module for name, module in found.named_modules() if name.endswith("layers.1.mlp.experts"))
    wrapper.requires_grad_(False)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.experts\.\w+ does not train"):
        check_adapted(found)
    config.target_parameters = ["mlp.experts.gate_up_proj"]
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.experts\.down_proj has no adapter for each of its 6 experts"):
        check_adapted(get_peft_model(model, config))


def test_what_trains_is_counted_before_anything_is_loaded(folder):
    settings = settings_of(folder)
    structure = build_structure(build_on_meta(settings), settings)
    model = load_model(settings, on_cpu=True)
    assert structure.parameters == count_parameters(get_peft_model(model, lora_config(model, settings)))
    assert len(structure.adapted_experts) == model.config.get_text_config().num_hidden_layers


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({}, "frozen; routers frozen"),
        ({"load_in_4bit": True, "train_router": True}, "frozen, in 4 bits; routers trained"),
        ({"lora_scope": "experts"}, "with an adapter each; routers frozen"),
        ({"use_peft": False}, "trained in full; routers frozen"),
    ],
)
def test_the_plan_tells_what_becomes_of_experts(keys, told, folder):
    """LoRA on linear layers leaves out most of the weights of such a model."""
    settings = ModelSettings(**{"model_name_or_path": str(folder), "lora_scope": "language", **keys})
    lines = _trained_lines(settings, build_structure(build_on_meta(settings), settings))
    assert f"experts     {told}" in lines


def test_4_bit_experts_whose_rows_end_inside_a_block_are_unpacked_right(tmp_path):
    """bitsandbytes 0.50.2 on a CPU takes the scales of other blocks, and is 25% off."""
    newer("Qwen3VLMoeConfig", moe_intermediate_size=96).save_pretrained(tmp_path)
    packed = load_model(settings_of(tmp_path, load_in_4bit=True), on_cpu=True)
    plain = load_model(settings_of(tmp_path), on_cpu=True)
    experts = family_of(plain.config).experts
    exact = experts.modules(plain)
    for name, module in experts.modules(packed).items():
        found, weight = unpacked(module.down_proj, module.quant_states["down_proj"]), exact[name].down_proj.detach()
        assert found.shape == weight.shape
        assert found.shape[-1] == 96
        assert 0.05 < float((found - weight).norm() / weight.norm()) < 0.11


def test_experts_that_cannot_be_quantized_are_told(folder, monkeypatch):
    from qwen_vl_sft.families.experts import Experts

    monkeypatch.setattr(Experts, "is_weight", lambda experts, name: False)
    with pytest.raises(UserError, match=r"load_in_4bit: .*mlp\.experts\.gate_up_proj could not be quantized"):
        load_model(settings_of(folder, load_in_4bit=True), on_cpu=True)
