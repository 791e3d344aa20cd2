"""4-bit weights on a CPU whose rows end inside a block: unpacked with the scales that they were packed with."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit

from qwen_vl_sft.compat.for_bitsandbytes import unpack_rows_by_blocks


def as_packed(packed, state):
    """Return code times scale, by the definition of the format: high nibbles first, blocks through the whole tensor."""
    nibbles = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], 1).reshape(-1)[: state.shape.numel()]
    scales = state.absmax.repeat_interleave(state.blocksize)[: state.shape.numel()]
    return (state.code[nibbles.long()] * scales).reshape(state.shape)


# 4304: the MLPs of Qwen3-VL's larger towers; 3420: those of Qwen2.5-VL's; 32: rows shorter than a block; the last: experts.
@pytest.mark.parametrize(
    "shape", [(6, 4304), (6, 3420), (24, 96), (7, 32), (5, 98), (6, 33), (8, 128), (160,), (3, 4, 80)]
)
@pytest.mark.parametrize(("kind", "blocksize"), [("nf4", 64), ("fp4", 64), ("nf4", 128)])
def test_rows_of_any_length_are_unpacked_as_they_were_packed(shape, kind, blocksize):
    unpack_rows_by_blocks()
    torch.manual_seed(0)
    packed, state = quantize_4bit(torch.randn(shape), blocksize=blocksize, quant_type=kind)
    torch.testing.assert_close(dequantize_4bit(packed, state), as_packed(packed, state), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_type_is_unpacked_so(dtype):
    unpack_rows_by_blocks()
    torch.manual_seed(0)
    packed, state = quantize_4bit(torch.randn(24, 96, dtype=dtype), blocksize=64, quant_type="nf4")
    found = dequantize_4bit(packed, state)
    assert found.dtype == dtype
    torch.testing.assert_close(found, as_packed(packed, state).to(dtype))


@pytest.mark.parametrize("nested", [False, True])
def test_products_and_gradients_of_a_layer_are_those_of_its_weights(nested):
    unpack_rows_by_blocks()
    torch.manual_seed(0)
    weight, shown = torch.randn(40, 96), torch.randn(3, 96, requires_grad=True)
    layer = Linear4bit(96, 40, bias=False, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=nested)
    layer.load_state_dict({"weight": weight})
    layer = layer.to("cpu").train()
    answer = layer(shown)
    answer.sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(layer(shown), answer)
    for found, exact in ((answer, shown @ weight.T), (shown.grad, weight.sum(0).expand(3, -1))):
        assert float((found - exact).detach().norm() / exact.detach().norm()) < 0.13
