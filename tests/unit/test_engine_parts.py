"""Parts of the engine that need no model: weights that are dequantized once, and the times that it tells."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from qwen_vl_sft.inference.engine import weights as weights_module
from qwen_vl_sft.inference.engine.clock import READING, TOKENS, Clock
from qwen_vl_sft.inference.engine.transfer import Arriving, to_device
from qwen_vl_sft.inference.engine.weights import dequantized_weights

CPU = torch.device("cpu")


def layer_of_4_bits(dtype, kind="nf4", nested=True, bias=True, compute=None):
    torch.manual_seed(0)
    layer = Linear4bit(128, 96, bias=bias, compute_dtype=compute or dtype, compress_statistics=nested, quant_type=kind)
    layer.weight.data = torch.randn(96, 128, dtype=dtype)
    layer = layer.to("cpu").eval()
    layer.support_avx512bf16_for_cpu = False
    return layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("kind", "nested", "bias"), [("nf4", True, True), ("nf4", False, False), ("fp4", True, False)])
def test_products_with_dequantized_weights_are_those_of_bitsandbytes_bit_for_bit(dtype, kind, nested, bias):
    model = nn.Sequential(layer_of_4_bits(dtype, kind, nested, bias), nn.ReLU(), nn.Linear(96, 4, dtype=dtype))
    shown = torch.randn(2, 300, 128).to(dtype)
    with torch.no_grad():
        expected = model(shown)
        with dequantized_weights(model, CPU) as taken:
            assert taken == 96 * 128 * dtype.itemsize
            assert "forward" in vars(model[0])
            found = model(shown)
        assert "forward" not in vars(model[0])
        assert torch.equal(model(shown), expected)
    assert torch.equal(found, expected)


def test_autocast_rounds_products_with_dequantized_weights_as_those_of_bitsandbytes():
    layer, shown = layer_of_4_bits(torch.float32), torch.randn(40, 128)
    with torch.no_grad():
        exact = layer(shown)
        with torch.autocast("cpu", torch.bfloat16):
            expected = layer(shown)
            with dequantized_weights(layer, CPU):
                found = layer(shown)
    assert found.dtype == expected.dtype == torch.float32
    assert torch.equal(found, expected)
    assert not torch.equal(found, exact)


def test_weights_stay_as_they_are_where_memory_is_short_or_they_were_stored_from_another_type(monkeypatch):
    layer, other = layer_of_4_bits(torch.float32), layer_of_4_bits(torch.float32, compute=torch.bfloat16)
    monkeypatch.setattr(weights_module, "free_memory", lambda device: 10**6)
    for model, taken in ((layer, 96 * 128 * 4), (other, 0), (nn.Linear(2, 2), 0)):
        with dequantized_weights(model, CPU) as found:
            assert found == taken
    monkeypatch.setattr(weights_module, "free_memory", lambda device: 96 * 128 * 4)
    with dequantized_weights(layer, CPU) as found:
        assert found == 0
        assert "forward" not in vars(layer)


def test_a_forward_that_a_layer_had_of_its_own_is_put_back():
    layer = layer_of_4_bits(torch.float32)
    layer.forward = own = layer.forward
    with dequantized_weights(layer, CPU):
        assert layer.forward is not own
    assert layer.forward is own


def test_the_clock_counts_parts_and_their_seconds():
    clock = Clock()
    for name in (TOKENS, READING, TOKENS):
        with clock.part(name):
            pass
    assert clock.counts == {TOKENS: 2, READING: 1}
    assert set(clock.seconds()) == {TOKENS, READING}
    assert all(seconds >= 0 for seconds in clock.seconds().values())


def test_tokens_that_arrive_are_those_of_when_they_were_sent():
    numbers = torch.tensor([3, 4])
    sent = Arriving.of(numbers)
    numbers.zero_()
    assert sent.wait() == [3, 4]
    assert to_device(numbers, CPU) is numbers
