"""FP8 layers in the emulation, and their kernels in Triton's interpreter."""

import copy
import functools
import math
import os
import subprocess
import sys
import types
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from fixtures.models import newer
from qwen_vl_sft import tiny
from qwen_vl_sft.config.model_rules import IDLE_RULES, MODEL_RULES
from qwen_vl_sft.config.reading import read_recipe
from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.modeling.base_model import build_on_meta
from qwen_vl_sft.modeling.fp8 import fused, plain
from qwen_vl_sft.modeling.fp8.adapters import AdapterPair, base_and_adapter
from qwen_vl_sft.modeling.fp8.blocks import FP8BlockLinear
from qwen_vl_sft.modeling.fp8.computation import problems_of_fp8_kernels
from qwen_vl_sft.modeling.fp8.experts import expert_product, packed_stack, selected_rows, transposed_stack
from qwen_vl_sft.modeling.fp8.fused import NormProduct, _Norm
from qwen_vl_sft.modeling.fp8.gradients import ProductWithFP8Gradient, _Forward
from qwen_vl_sft.modeling.fp8.linear import INPUTS, Computation, FP8Linear, Normed, QuantizedInput, packed, transpose
from qwen_vl_sft.modeling.fp8.mlp import SwiGLUProduct, mlp
from qwen_vl_sft.modeling.fp8.projections import join_projections
from qwen_vl_sft.modeling.fp8.weights import E4M3, LARGEST, Quantized, dequantize, quantize_rows, scale_of
from qwen_vl_sft.modeling.kernels import use_fused_lora
from qwen_vl_sft.modeling.model_rules import DEVICE_RULES, problems_of_structure

EMULATED = Computation(emulated=True)
# Every finite number that e4m3 has.
NUMBERS = [number for number in torch.arange(256).to(torch.uint8).view(E4M3).double().tolist() if math.isfinite(number)]


def fp8_layer(out_features, in_features, bias=False, computation=EMULATED, storage=torch.uint8, seed=0):
    """An FP8 layer with random weights, rows of different sizes, and these weights."""
    numbers = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=numbers) * torch.logspace(-3, 2, out_features)[:, None]
    layer = FP8Linear(in_features, out_features, bias, computation, torch.float32, storage)
    values, scales = packed(weight, storage)
    layer.weight.data.copy_(values)
    layer.weight_scale.copy_(scales)
    if bias:
        layer.bias.data.normal_(generator=numbers)
    return layer, weight


def rounded(x, columns=None):
    """What quantizing makes of rows, in float64."""
    values, scales = quantize_rows(x, columns)
    return values.double() * scales.double()


def distance(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def nearest(value):
    """The nearest number of e4m3; of two the one whose last bit is 0."""
    far = [abs(number - value) for number in NUMBERS]
    found = [number for number, apart in zip(NUMBERS, far, strict=True) if apart == min(far)]
    bits = torch.tensor(found).to(E4M3).view(torch.uint8)
    return found[int((bits % 2).argmin())]


@pytest.mark.parametrize("maximum", [1e-20, 2.0**-9, 0.3, 1.0, 447.9, 448.0, 448.1, 511.0, 512.0, 896.0, 897.0, 2e38])
def test_a_scale_is_the_smallest_power_of_two_that_keeps_a_row_below_448(maximum):
    maximum = torch.tensor(maximum)
    scale = scale_of(maximum).double().item()
    assert math.frexp(scale)[0] == 0.5
    assert maximum.double().item() / scale <= LARGEST < maximum.double().item() / (scale / 2)


def test_values_are_rounded_to_the_nearest_number():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(3, 64), torch.randn(1, 64) * 1e-6, torch.tensor([[17.0, 19.0, 448.0, 2.0**-10] * 16])])
    values, scales = quantize_rows(x)
    for row, found, scale in zip(x.double(), values.double(), scales.double(), strict=True):
        assert found.tolist() == [nearest(value) for value in (row / scale).tolist()]
    assert quantize_rows(torch.zeros(1, 16)).values.float().abs().max() == 0


def test_a_dequantized_weight_has_its_exact_value_in_bfloat16():
    layer, weight = fp8_layer(32, 64)
    found = layer.dequantized()
    assert torch.equal(found.bfloat16().float(), found)
    assert distance(found, weight) < 0.04


def test_a_row_with_a_value_that_is_not_finite_gives_none_that_is():
    layer, _ = fp8_layer(16, 32)
    x = torch.randn(3, 32)
    x[1, 4], x[2, 7] = math.inf, math.nan
    finite = layer(x).isfinite()
    assert finite.tolist() == [[True] * 16, [False] * 16, [False] * 16]


@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradient_are_those_of_a_reference_that_rounds_the_same(bias):
    torch.manual_seed(0)
    layer, _ = fp8_layer(48, 64, bias)
    weight, scales = layer.dequantized().double(), layer.scales.view(-1)
    x = torch.randn(2, 5, 64, requires_grad=True)
    y, grad = layer(x), torch.randn(2, 5, 48)
    y.backward(grad)
    wanted = rounded(x.detach().view(10, 64)) @ weight.T + (layer.bias.double() if bias else 0)
    assert distance(y.detach().view(10, 48), wanted) < 1e-6
    # The scales of the weight's rows are in what is rounded, and the values of the weight are multiplied.
    gradient = rounded(grad.view(10, 48), scales) @ layer.values.double()
    assert distance(x.grad.view(10, 64), gradient) < 1e-6
    assert layer.weight.grad is None


@pytest.mark.parametrize("autocast", [False, True])
def test_a_16_bit_layer_may_have_its_inputs_gradient_in_fp8(autocast):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(48, 64), torch.randn(48), torch.randn(2, 5, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = ProductWithFP8Gradient.apply(x, weight, bias, EMULATED)
        assert torch.equal(y, nn.functional.linear(x, weight, bias))
    grad = torch.randn(2, 5, 48).to(y.dtype)
    y.backward(grad)
    values, scales = quantize_rows(weight)
    wanted = rounded(grad.view(10, 48), scales.view(-1)) @ values.double()
    assert distance(x.grad.view(10, 64), wanted) < (4e-3 if autocast else 1e-6)


def test_a_copy_that_trains_in_full_computes_as_any_linear_layer():
    """As PEFT makes it of a layer in `lora_modules_to_save`."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 48).requires_grad_(False)
    layer.forward = types.MethodType(_Forward(EMULATED), layer)
    trained = copy.deepcopy(layer).requires_grad_(True)
    x, plain = torch.randn(5, 64, requires_grad=True), nn.Linear(64, 48)
    plain.load_state_dict(layer.state_dict())
    grads = [torch.autograd.grad(one(x).square().sum(), x)[0] for one in (layer, trained, plain)]
    assert torch.equal(grads[1], grads[2])
    assert 0 < distance(grads[0], grads[2]) < 0.1
    trained(x).sum().backward()
    assert trained.weight.grad is not None


def test_an_adapter_leaves_the_fp8_gradient_of_its_layer_as_it_is():
    found = []
    for fused_lora in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(64, 48).requires_grad_(False)
        layer.forward = types.MethodType(_Forward(EMULATED), layer)
        model = get_peft_model(nn.Sequential(layer), LoraConfig(r=4, target_modules=["0"]))
        assert not fused_lora or use_fused_lora(model) == 1
        x = torch.randn(5, 64, requires_grad=True)
        found += torch.autograd.grad(model(x).square().sum(), x)
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize(("forward", "backward"), [(False, False), (True, False), (False, True)])
def test_each_direction_may_compute_without_rounding_its_input(forward, backward):
    torch.manual_seed(0)
    layer, _ = fp8_layer(48, 64, True, Computation(forward, backward, emulated=True))
    weight = layer.dequantized()
    x = torch.randn(6, 64, requires_grad=True)
    y, grad = layer(x), torch.randn(6, 48)
    y.backward(grad)
    exact = x.detach() @ weight.T + layer.bias, grad @ weight
    found = distance(y.detach(), exact[0]), distance(x.grad, exact[1])
    assert [apart < 1e-6 for apart in found] == [not forward, not backward]
    assert max(found) < 0.05


def test_the_output_has_the_type_of_any_linear_layers():
    layer, _ = fp8_layer(16, 32, True)
    x = torch.randn(2, 32)
    assert layer(x).dtype == torch.float32
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    # Autocast does not reach the emulated product.
    assert torch.equal(found, layer(x).bfloat16())


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_bytes_stay_as_they_are_in_any_type_and_under_casts(storage):
    layer, _ = fp8_layer(32, 64, True)
    split, _ = fp8_layer(32, 64, True, storage=storage)
    assert split.weight.dtype == storage
    assert torch.equal(split.values.view(torch.uint8), layer.values.view(torch.uint8))
    x = torch.randn(3, 64)
    assert torch.equal(split(x), layer(x))
    before = layer.dequantized()
    assert torch.equal(layer.to(torch.bfloat16).dequantized(), before)


def test_layers_of_one_input_share_its_quantized_form():
    inputs, quantized = QuantizedInput(), []

    def quantize(x):
        quantized.append(x)
        return quantize_rows(x)

    x = torch.randn(2, 3, 16)
    first = inputs.of(x, quantize)
    assert inputs.of(x, quantize) is first
    assert len(quantized) == 1
    x.mul_(2)
    assert torch.equal(inputs.of(x, quantize).scales, first.scales * 2)
    equal = x.clone()
    inputs.of(equal, quantize)
    assert len(quantized) == 3
    del x, equal
    # A new tensor may lie where the old one did.
    inputs.of(torch.randn(2, 3, 16), quantize)
    assert len(quantized) == 4
    with torch.inference_mode():
        inside = torch.randn(1, 16)
        assert inputs.of(inside, quantize).values.shape == (1, 16)


@pytest.mark.parametrize("larger", [30, 1000, 10_000])
def test_a_massive_activation_does_not_spoil_its_row(larger):
    """Real models have some that are a thousand times as large as others; e4m3 itself reaches over 2^15 at full precision."""
    torch.manual_seed(0)
    layer, _ = fp8_layer(64, 256)
    x = torch.randn(20, 256)
    x[:, 17] = x[:, 17].sign() * larger
    weight = layer.dequantized()
    assert distance(layer(x), x @ weight.T) < 0.05
    # Where nothing takes up the large value, all that is left is what the others say.
    spread = FP8Linear(256, 64, False, EMULATED)
    quiet = weight / weight.abs().amax(1, keepdim=True)
    quiet[:, 17] = 0
    values, scales = packed(quiet)
    spread.weight.data.copy_(values)
    spread.weight_scale.copy_(scales)
    assert distance(spread(x), x @ spread.dequantized().T) < 0.05


def test_lora_on_fp8_layers_is_the_adapter_beside_them():
    torch.manual_seed(0)
    layers = nn.Sequential(fp8_layer(64, 32, True)[0], nn.Tanh(), fp8_layer(16, 64, seed=1)[0])
    model = get_peft_model(layers, LoraConfig(r=4, lora_alpha=6, target_modules=["0", "2"]))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    for p in trained.values():
        p.data = torch.randn_like(p) / 4
    x = torch.randn(5, 32)
    first, last = model.base_model.model[0], model.base_model.model[2]

    def beside(layer, x):
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return layer.base_layer(x) + x @ down.T @ up.T * 1.5

    expected = beside(last, torch.tanh(beside(first, x)))
    assert distance(model(x), expected) < 1e-6
    assert use_fused_lora(model) == 2
    model(x).square().sum().backward()
    assert distance(model(x), expected) < 1e-6
    assert all(p.grad.abs().sum() > 0 for p in trained.values())


def test_a_norm_hands_on_what_its_output_is_quantized_to():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 32, requires_grad=True), torch.rand(32)
    normed, values, scales, _ = NormProduct.apply(x, weight, 1e-6, plain)
    grad = torch.randn(2, 5, 32)
    (found,) = torch.autograd.grad(normed, x, grad)
    wanted = nn.functional.rms_norm(x, (32,), weight, 1e-6)
    assert distance(normed, wanted) < 1e-6
    assert distance(found, torch.autograd.grad(wanted, x, grad)[0]) < 1e-6
    alone = quantize_rows(normed.detach().view(10, 32))
    assert torch.equal(values.view(torch.uint8), alone.values.view(torch.uint8))
    assert torch.equal(scales, alone.scales)


def kept_for_backward(work):
    """The result of some work, and the storages that autograd keeps for its gradients."""
    kept = set()

    def keep(tensor):
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return work(), kept


class WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("what", ["norm", "activation"])
def test_outputs_that_nothing_learns_from_take_no_gradient(what):
    x = torch.randn(3, 32, requires_grad=True)
    norm = SimpleNamespace(weight=torch.rand(32), variance_epsilon=1e-6)
    y = _Norm(plain)(norm, x) if what == "norm" else SwiGLUProduct.apply(x, x, plain)[0]
    (x.sum() + WithoutGradient.apply(y).sum()).backward()
    assert torch.equal(x.grad, torch.ones(3, 32))


@pytest.mark.parametrize("where", ["attention", "mlp"])
def test_adapters_behind_a_norm_do_not_keep_its_output(where):
    torch.manual_seed(0)
    norm, known = SimpleNamespace(weight=torch.rand(32), variance_epsilon=1e-6), []
    norm.weight[3] = 40
    layers = [fp8_layer(48, 32)[0], fp8_layer(48, 32, seed=1)[0], fp8_layer(32, 48, seed=2)[0]]
    model = get_peft_model(nn.ModuleList(layers), LoraConfig(r=4, lora_alpha=2, target_modules=["0", "1"]))
    assert use_fused_lora(model) == 2
    adapted = list(model.base_model.model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    trained = [p for p in model.parameters() if p.requires_grad]

    def outcome(x):
        normed = _Norm(plain)(norm, x)
        known.append(normed.untyped_storage().data_ptr())
        if not forget:
            assert INPUTS.norm_of(normed) is not None
        else:
            INPUTS.keep(normed, INPUTS.of(normed, quantize_rows))
        if where == "attention":
            return adapted[0](normed) * adapted[1](normed)
        gate, up, down = (base_and_adapter(layer, normed) for layer in adapted)
        return mlp(normed, [gate, up, down], plain)

    found = []
    for forget in (False, True):
        # As in real models one value is massive.
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
        x[..., 7] = 3000
        x.requires_grad_()
        y, kept = kept_for_backward(functools.partial(outcome, x))
        assert (known[-1] in kept) is forget
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *trained])])
    for one, other in zip(*found, strict=True):
        assert distance(one, other) < 1e-5


def test_a_fused_mlp_rounds_what_its_layers_would_and_nothing_else():
    torch.manual_seed(0)
    gate, up, down = fp8_layer(48, 32, True)[0], fp8_layer(48, 32, seed=1)[0], fp8_layer(32, 48, seed=2)[0]
    x, grad = torch.randn(7, 32, requires_grad=True), torch.randn(7, 32)
    y = mlp(x, [(layer, None) for layer in (gate, up, down)], plain)
    wanted = down(nn.functional.silu(gate(x)) * up(x))
    # Every product adds up in another order, and an input that is rounded the other way is off by an eighth.
    assert distance(y.detach(), wanted.detach()) < 0.01
    (found,) = torch.autograd.grad(y, x, grad)
    assert distance(found, torch.autograd.grad(wanted, x, grad)[0]) < 0.05
    # The same without rounding gradients: the rest is what rounding them costs.
    exact = Computation(True, False, emulated=True)
    for layer in (gate, up, down):
        layer.computation = exact
    (unrounded,) = torch.autograd.grad(down(nn.functional.silu(gate(x)) * up(x)), x, grad)
    assert distance(found, unrounded) < 0.07


@pytest.mark.parametrize("adapted", [(0,), (1,), (2,), (0, 1, 2)])
def test_adapters_of_a_fused_mlp_are_those_of_its_layers(adapted, monkeypatch):
    torch.manual_seed(0)
    # Of 14 rows.
    monkeypatch.setattr("qwen_vl_sft.modeling.fp8.mlp.CHUNK", 5)
    layers = [fp8_layer(48, 32, True)[0], fp8_layer(48, 32, seed=1)[0], fp8_layer(32, 48, seed=2)[0]]
    adapters = [None] * 3
    for at in adapted:
        a, b = torch.randn(4, layers[at].in_features), torch.randn(layers[at].out_features, 4)
        adapters[at] = AdapterPair(a.requires_grad_(), b.requires_grad_(), 0.5)
    trained = [tensor for adapter in adapters if adapter for tensor in adapter[:2]]
    x, grad = torch.randn(2, 7, 32, requires_grad=True), torch.randn(2, 7, 32)

    def alone(at, inputs):
        adapter = adapters[at]
        return layers[at](inputs) + (inputs @ adapter.a.T @ adapter.b.T * 0.5 if adapter else 0)

    found = mlp(x, list(zip(layers, adapters, strict=True)), plain)
    wanted = alone(2, nn.functional.silu(alone(0, x)) * alone(1, x))
    assert distance(found.detach(), wanted.detach()) < 0.02
    pairs = zip(
        torch.autograd.grad(found, [x, *trained], grad), torch.autograd.grad(wanted, [x, *trained], grad), strict=True
    )
    assert max(distance(one, other) for one, other in pairs) < 0.06


class Attention(nn.Module):
    """The projections of an attention, and outputs that depend on all of them."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = fp8_layer(48, 32, True)[0], fp8_layer(16, 32, True, seed=1)[0]
        self.v_proj = fp8_layer(16, 32, seed=2)[0]

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return torch.cat([q, k * v, k.square()], -1)


def attention(targets):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=2, target_modules=targets)
    model = get_peft_model(nn.Sequential(Attention()), config) if targets else nn.Sequential(Attention())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("targets", [[], ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj"]])
@pytest.mark.parametrize("normed", [False, True])
def test_projections_of_one_input_compute_together_what_they_do_alone(targets, normed):
    model, trained = attention(targets)
    x = torch.randn(2, 7, 32, requires_grad=True)
    norm = SimpleNamespace(weight=torch.rand(32), variance_epsilon=1e-6)

    def outcome():
        y = model(_Norm(plain)(norm, x) if normed else x)
        return y.detach(), torch.autograd.grad(y.sin().sum(), [x, *trained])

    alone, wanted = outcome()
    assert join_projections(model, plain) == 1
    together, found = outcome()
    assert distance(together, alone) < 1e-6
    assert distance(found[0], wanted[0]) < 0.05, "gradients are rounded with one scale"
    apart = [distance(one, other) for one, other in zip(found[1:], wanted[1:], strict=True)]
    assert max(apart, default=0) < 1e-5, apart
    with torch.no_grad():
        inputs = torch.randn(2, 7, 32)
        assert torch.equal(model(inputs), model(inputs))
        held = weakref.ref(inputs)
        del inputs
        assert held() is None, "an evaluation would keep the input of each layer"
    # What is not computed in their order, or for another input, is computed alone.
    (attention_layer,) = [module for module in model.modules() if isinstance(module, Attention)]
    other = torch.randn(3, 32)
    attention_layer.q_proj(x)
    assert distance(attention_layer.k_proj(other), attention_layer.k_proj(other.clone())) < 1e-6
    # An input without a gradient, as the first layer's.
    y = model(x.detach())
    assert not trained or all(grad.abs().sum() > 0 for grad in torch.autograd.grad(y.sum(), trained))


def test_one_scale_for_the_gradients_of_all_projections_loses_nothing():
    """The gradient of their input is as near the unrounded one as that of each alone, added up."""
    model, _ = attention([])
    x = torch.randn(64, 32, requires_grad=True)

    def gradient():
        (found,) = torch.autograd.grad(model(x).sin().sum(), x)
        return found

    alone = gradient()
    join_projections(model, plain)
    together = gradient()
    bases = [module for module in model.modules() if isinstance(module, FP8Linear)]
    for base in bases:
        base.computation = Computation(True, False, emulated=True)
        del base.forward
    exact = gradient()
    assert distance(together, exact) < 1.1 * distance(alone, exact)


def test_layers_that_are_computed_again_give_the_same_gradients():
    torch.manual_seed(0)
    layers = [fp8_layer(48, 32, True)[0], fp8_layer(48, 32, seed=1)[0], fp8_layer(32, 48, seed=2)[0]]
    adapter = AdapterPair(torch.randn(4, 32, requires_grad=True), torch.randn(48, 4, requires_grad=True), 0.5)
    first, weight = fp8_layer(32, 32, seed=3)[0], torch.rand(32)

    def block(x):
        normed, values, scales, rstd = NormProduct.apply(x, weight, 1e-6, plain)
        INPUTS.keep(normed, Quantized(values, scales), Normed(x.detach(), rstd, weight))
        return mlp(normed + first(normed), [(layers[0], adapter), (layers[1], None), (layers[2], None)], plain)

    def gradients(again):
        x = torch.linspace(-2, 3, 5 * 32).view(5, 32).requires_grad_()
        y = checkpoint(block, x, use_reentrant=False) if again else block(x)
        return torch.autograd.grad(y.square().sum(), [x, adapter.a, adapter.b])

    pairs = zip(gradients(again=False), gradients(again=True), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_an_activation_hands_on_what_its_output_is_quantized_to():
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 48, requires_grad=True) for _ in range(2))
    product, values, scales = SwiGLUProduct.apply(gate, up, plain)
    wanted = nn.functional.silu(gate) * up
    assert distance(product, wanted) < 1e-6
    assert torch.equal(values.view(torch.uint8), quantize_rows(product.detach()).values.view(torch.uint8))
    assert torch.equal(scales, quantize_rows(product.detach()).scales)
    grad = torch.randn(3, 48)
    pairs = zip(
        torch.autograd.grad(product, (gate, up), grad), torch.autograd.grad(wanted, (gate, up), grad), strict=True
    )
    assert max(distance(one, other) for one, other in pairs) < 1e-6


def test_transposes_side_by_side_are_those_of_one_weight():
    one, other = torch.randn(16, 48).to(E4M3), torch.randn(32, 48).to(E4M3)
    found = plain.transpose(one, other)
    assert found.is_contiguous()
    assert torch.equal(found.float(), torch.cat([one.float().T, other.float().T], 1))
    assert torch.equal(transpose(one).float(), one.float().T)


def test_blocks_of_an_official_checkpoint_are_dequantized_one_by_one():
    values, scales = torch.randn(200, 300).to(E4M3), torch.rand(2, 3)
    found = dequantize(values, scales)
    assert found[130, 5] == values[130, 5].float() * scales[1, 0]
    assert found[127, 299] == values[127, 299].float() * scales[0, 2]


@pytest.mark.parametrize(("forward", "backward"), [(True, True), (False, True), (True, False)])
def test_blocks_give_output_and_gradient_of_a_reference_that_rounds_the_same(forward, backward):
    torch.manual_seed(0)
    computation = Computation(forward, backward, emulated=True)
    layer = FP8BlockLinear(384, 256, True, computation, torch.float32)
    layer.weight.data.copy_(torch.randn(256, 384).mul(60).to(E4M3).view(torch.uint8))
    layer.weight_scale_inv.copy_(torch.rand(2, 3) + 0.1)
    layer.bias.data.normal_()
    layer.finish()
    weight = layer.dequantized().double()
    assert torch.equal(layer.to(torch.bfloat16).dequantized().double(), weight)
    bias = layer.bias.double()

    def in_parts(rows, rounds):
        return rounded(rows.reshape(-1, 128)).view(rows.shape) if rounds else rows.double()

    x, grad = torch.randn(2, 5, 384, requires_grad=True), torch.randn(2, 5, 256)
    y = layer(x)
    y.backward(grad)
    assert distance(y.detach().view(10, 256), in_parts(x.detach().view(10, 384), forward) @ weight.T + bias) < 1e-6
    assert distance(x.grad.view(10, 384), in_parts(grad.view(10, 256), backward) @ weight) < 1e-6


def test_layers_in_blocks_quantize_an_input_that_they_share_once():
    taken = []

    def noted(rows, columns=None):
        taken.append(rows.shape)
        return quantize_rows(rows, columns)

    layers = [FP8BlockLinear(256, 128, False, Computation(emulated=True, quantize=noted)) for _ in range(3)]
    for layer in layers:
        layer.weight.data.copy_(torch.randn(128, 256).to(E4M3).view(torch.uint8))
        layer.weight_scale_inv.fill_(1.0)
        layer.finish()
    x = torch.randn(2, 5, 256)
    first, *others = (layer(x) for layer in layers)
    assert taken == [(20, 128)]
    assert not any(torch.equal(first, other) for other in others)
    x.mul_(2)
    assert torch.equal(layers[0](x), 2 * first)
    assert len(taken) == 2


@pytest.mark.parametrize(("forward", "backward"), [(True, True), (False, True), (True, False)])
def test_experts_give_output_and_gradient_of_a_reference_that_rounds_the_same(forward, backward):
    torch.manual_seed(0)
    weight = torch.randn(4, 48, 32) * torch.logspace(-2, 2, 48)[:, None]
    computation = Computation(forward, backward, emulated=True)
    parameter, scales = packed_stack(weight, computation, torch.uint8)
    experts = SimpleNamespace(gate_up_proj=parameter, gate_up_proj_scale=scales)
    # The second has no rows.
    numbers, tokens = torch.tensor([0, 0, 2, 2, 2, 3, 3]), torch.randn(5, 32)
    at, ends = torch.tensor([4, 1, 0, 1, 2, 3, 4]), torch.tensor([2, 2, 5, 7], dtype=torch.int32)
    x, grad = tokens[at].requires_grad_(), torch.randn(7, 48)
    known = selected_rows(tokens, at, computation)
    assert (known is None) is not forward
    y = expert_product(experts, "gate_up_proj", parameter.quant_state, x, ends, known)
    y.backward(grad)
    for row, number in enumerate(numbers):
        values, row_scales = quantize_rows(weight[number])
        whole = values.double() * row_scales.double()
        inputs = rounded(tokens[at[row]][None]) if forward else tokens[at[row]][None].double()
        assert distance(y[row].detach(), (inputs @ whole.T)[0]) < 1e-6
        own = grad[row][None]
        wanted = rounded(own, row_scales.view(-1)) @ values.double() if backward else own.double() @ whole
        assert distance(x.grad[row], wanted[0]) < 1e-6
    split, _ = packed_stack(weight, computation, torch.bfloat16)
    assert split.shape == (4, 48, 16)
    assert torch.equal(split.view(torch.uint8), parameter)
    turned = transposed_stack(parameter.view(E4M3), EMULATED)
    assert turned.stride(-1) == 1
    assert torch.equal(turned.float(), parameter.view(E4M3).float().mT)


def problems(on_cpu=True, strategy="single", **keys):
    """What the rules on the model say of a recipe."""
    recipe = read_recipe(None, {"model_name_or_path": "some/model", "dataset_name": "rows", **keys})
    context = DistributedContext(strategy, 1 if strategy == "single" else 2, 0, 0, on_cpu)
    return [problem for rule in (*MODEL_RULES, *IDLE_RULES, *DEVICE_RULES) for problem in rule(recipe, context)]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"load_in_fp8": True}, "load_in_fp8: CPUs have no products in FP8; use load_in_4bit, or a base in 16 bits"),
        ({"load_in_fp8": "emulation", "load_in_4bit": True}, "load_in_4bit and load_in_fp8 are both set; keep one"),
        ({"load_in_fp8": "emulation", "use_peft": False}, "quantized weights cannot be trained"),
        ({"load_in_fp8": "emulation", "use_dora": True}, "use_dora with load_in_fp8: DoRA reads the base's weights"),
        ({"load_in_fp8": "emulation", "strategy": "zero3"}, "does not run under zero3"),
        ({"load_in_fp8": "emulation", "fp8_kernels": ["mlp"]}, "fp8_kernels: mlp run on CUDA only"),
        ({"load_in_fp8": "emulation", "fp8_kernels": ["rope"]}, "fp8_kernels: rope is unknown; known are quantize"),
        ({"fp8_backward": False}, "fp8_backward is set but load_in_fp8 is not"),
        ({"fp8_backward": True}, None),
        ({"load_in_fp8": "emulation", "fp8_backward": False, "strategy": "fsdp2"}, None),
        ({"fp8_gradients": True}, "fp8_gradients: CPUs have no products in FP8; leave it out"),
        (
            {"fp8_gradients": "emulation", "load_in_4bit": True},
            "fp8_gradients with load_in_4bit: it is for a base in 16",
        ),
        ({"fp8_gradients": "emulation", "use_peft": False}, "it is for frozen layers"),
        (
            {"fp8_gradients": "emulation", "fp8_kernels": ["mlp"]},
            "mlp work with load_in_fp8 alone; fp8_gradients has quan",
        ),
        ({"fp8_gradients": "emulation", "fp8_forward": False}, "fp8_forward is set but load_in_fp8 is not"),
        ({"fp8_modules": ["merger"]}, "fp8_modules is set but neither load_in_fp8 nor fp8_gradients is"),
        ({"fp8_gradients": "emulation", "fp8_modules": ["merger"], "strategy": "fsdp2"}, None),
    ],
    ids=str,
)
def test_what_cannot_work_in_fp8_is_refused(keys, told):
    found = problems(**keys)
    assert len(found) == (told is not None), found
    assert told is None or told in found[0]


def test_fp8_with_fp16_is_refused():
    told = problems(load_in_fp8=True, dtype="bfloat16", fp16=True)
    assert told[0] == "load_in_fp8 with fp16: products in FP8 give bfloat16; set bf16: true in place of fp16"
    assert not problems(load_in_fp8="emulation", dtype="bfloat16", fp16=True)


def test_kernels_of_both_directions_are_refused_where_one_is_in_16_bits():
    settings = ModelSettings(model_name_or_path=str(tiny.MODEL_DIR), load_in_fp8=True, fp8_forward=False)
    assert not list(problems_of_fp8_kernels(settings, on_cpu=False))
    named = replace(settings, fp8_kernels=["quantize", "projections", "mlp"])
    told = list(problems_of_fp8_kernels(named, on_cpu=False))
    assert [problem.split(" computes")[0] for problem in told] == ["fp8_kernels: mlp", "fp8_kernels: projections"]
    assert not list(problems_of_fp8_kernels(replace(named, fp8_forward=True), on_cpu=False))


@pytest.mark.parametrize(("capability", "works"), [((8, 0), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)])
def test_gpus_without_products_in_fp8_are_refused(capability, works, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    found = problems(on_cpu=False, load_in_fp8=True)
    assert not found if works else "NVIDIA A100 has no products in FP8 (compute capability 8.0; Ada has 8.9" in found[0]
    half = "\n".join(problems(on_cpu=False, load_in_fp8=True, dtype="float16"))
    assert "products in FP8 give bfloat16" in half


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"fp8_modules": ["visual.blocks"]}, None),
        ({"fp8_modules": ["blokcs"]}, "fp8_modules: blokcs holds no linear layer of the model"),
        ({"fp8_modules": ["lm_head"]}, "fp8_modules: lm_head stays in 16 bits in Qwen2-VL"),
        ({"lora_modules_to_save": ["merger"]}, None),
        ({"lora_modules_to_save": ["merger"], "fp8_modules": ["merger"]}, "which load_in_fp8 quantizes"),
        ({"lora_modules_to_save": ["mlp"]}, "which load_in_fp8 quantizes"),
    ],
    ids=str,
)
def test_modules_that_a_recipe_names_must_be_what_it_asks_for(keys, told):
    settings = ModelSettings(model_name_or_path=str(tiny.MODEL_DIR), load_in_fp8="emulation", **keys)
    found = list(problems_of_structure(build_on_meta(settings), settings))
    assert len(found) == (told is not None), found
    assert told is None or told in found[0]


# Numbers of e4m3 times a power of two, and else float32: the interpreter rounds others in a way of its own.
INTERPRETED = """
import torch
from qwen_vl_sft.modeling.fp8 import kernels, plain, weights

torch.manual_seed(0)
for size in (48, 128, 300, 9008):
    x = torch.randn(35, size).to(weights.E4M3).float() * 2.0 ** (torch.arange(35)[:, None] % 11 - 5)
    columns = 2.0 ** torch.randint(-1, 2, (size,)).float()
    for found, wanted in (
        (kernels.quantize_rows(x.bfloat16()), weights.quantize_rows(x.bfloat16())),
        (kernels.quantize_rows(x.t().contiguous().t(), columns), weights.quantize_rows(x, columns)),
    ):
        assert torch.equal(found.scales, wanted.scales)
        apart = (found.values.float() - wanted.values.float()).abs()
        assert (apart <= 2.0**-8).all(), apart.max()
    parts = [x[:, start:].contiguous() for start in (0, size // 3, size // 2)]
    numbers = [columns[-part.shape[1] :] for part in parts]
    found, wanted = (f(parts, numbers) for f in (kernels.quantize_together, plain.quantize_together))
    assert torch.equal(found.scales, wanted.scales)
    assert ((found.values.float() - wanted.values.float()).abs() <= 2.0**-8).all()
gate, up, grad = (torch.randn(4, 5000) for _ in range(3))
kept, own = torch.empty_like(gate), torch.empty_like(gate)
assert torch.equal(kernels.swiglu(gate, up, kept).scales, plain.swiglu(gate, up, own).scales)
assert torch.allclose(kept.float(), own.float(), rtol=1e-5)
ones = torch.ones(5000)
found, wanted = (f(grad, gate, up, ones, ones * 2) for f in (kernels.swiglu_backward, plain.swiglu_backward))
assert torch.equal(found.scales, wanted.scales)
for kind in (torch.float32, torch.bfloat16):
    parts = [part.to(kind) for part in (grad, gate, up)]
    forward, backward, of_gate, of_up = (torch.empty_like(parts[0]) for _ in range(4))
    kernels.swiglu(*parts[1:], forward)
    again = kernels.swiglu_backward(*parts, ones, ones * 2, (of_gate, of_up), backward)
    assert torch.equal(forward, backward)
    alone = kernels.swiglu_backward(*parts, ones, ones * 2)
    assert all(torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in zip(again, alone))
pairs = zip(kernels.swiglu_gradients(grad, gate, up), plain.swiglu_gradients(grad, gate, up))
assert all(torch.allclose(one.float(), other.float(), rtol=1e-4, atol=1e-6) for one, other in pairs)
x, weight = torch.randn(5, 96), torch.rand(96)
(y, found, rstd), (wanted, other, own) = kernels.rms_norm(x, weight, 1e-6), plain.rms_norm(x, weight, 1e-6)
assert torch.allclose(y.float(), wanted.float(), rtol=1e-5)
assert torch.equal(found.scales, other.scales)
assert torch.allclose(rstd, own)
one, other = (f(x, x, weight, own) for f in (kernels.rms_norm_backward, plain.rms_norm_backward))
assert torch.allclose(one.float(), other.float(), rtol=1e-4, atol=1e-5)
parts = [torch.randn(rows, 176).to(weights.E4M3) for rows in (208, 304)]
assert torch.equal(kernels.transpose(*parts).view(torch.uint8), plain.transpose(*parts).view(torch.uint8))
"""


def test_kernels_do_in_tritons_interpreter_what_pytorch_does():
    # Triton reads the variable when it is imported.
    subprocess.run([sys.executable, "-c", INTERPRETED], check=True, env={**os.environ, "TRITON_INTERPRET": "1"})


@pytest.mark.parametrize(("name", "norms"), [("Qwen3VLConfig", 2), ("Qwen3_5Config", 0), ("Qwen3_5MoeConfig", 0)])
def test_norms_that_multiply_by_weight_and_one_hand_no_fp8_values_on(name, norms, monkeypatch):
    """Their kernel multiplies by the weight as it is."""
    monkeypatch.setattr(fused, "FP8Linear", torch.nn.Linear)
    model = newer(name)
    layers = model.config.get_text_config().num_hidden_layers
    assert fused.use_fp8_kernels(model, ["rms_norm"], plain) == {"rms_norm": norms * layers}
