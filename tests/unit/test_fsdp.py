"""FSDP2 computes as one process does: what it rounds, and that the weights it gathers are those that were split."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives
from torch.testing._internal.distributed.fake_pg import FakeStore

from qwen_vl_sft.compat.for_accelerate import round_as_one_process_does
from qwen_vl_sft.compat.for_torch import gather_bytes
from qwen_vl_sft.compat.for_transformers import prepare_final_save
from qwen_vl_sft.distributed import fsdp


def accelerator_with(plugin):
    return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))


def test_neither_gradients_nor_what_layers_are_given_are_rounded():
    plugin = SimpleNamespace(
        mixed_precision_policy=MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)
    )
    round_as_one_process_does(accelerator_with(plugin))
    changed = plugin.mixed_precision_policy
    assert (changed.param_dtype, changed.reduce_dtype, changed.output_dtype) == (torch.bfloat16, torch.float32, None)
    assert not changed.cast_forward_inputs
    round_as_one_process_does(SimpleNamespace(state=object()))


def test_final_save_asks_for_whole_weights():
    kinds = []
    prepare_final_save(accelerator_with(SimpleNamespace(set_state_dict_type=kinds.append)))
    assert kinds == ["FULL_STATE_DICT"]
    prepare_final_save(SimpleNamespace(state=object()))


def test_a_model_that_is_not_split_is_told():
    assert fsdp.problems(nn.Linear(1, 1)) == ["the model is a Linear, not split by fully_shard"]


def test_gathering_bytes_twice_is_as_once(monkeypatch):
    monkeypatch.setattr(collectives, "_get_all_gather_input_metadatas", collectives._get_all_gather_input_metadatas)
    gather_bytes()
    once = collectives._get_all_gather_input_metadatas
    gather_bytes()
    assert collectives._get_all_gather_input_metadatas is once
    weight = torch.zeros(6, dtype=torch.bfloat16)
    assert once([[weight]]) == ([[torch.bfloat16]], [[6]], torch.uint8)


def copy_as_gpus_do(targets, sources):
    """PyTorch's `_foreach_copy_` on GPUs takes bfloat16 through float32, where a NaN is a NaN."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(torch.where(source.isnan(), torch.nan, source) if source.is_floating_point() else source)


@pytest.fixture
def two_processes():
    """The first of two, as far as torch knows; what it gathers from the other is a copy of its own share."""
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield torch.distributed.init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


def test_weights_that_look_like_nan_arrive_bit_by_bit(two_processes, monkeypatch):
    """A frozen weight of all patterns of 16 bits, as 4-bit values may make them."""
    monkeypatch.setattr(torch, "_foreach_copy_", copy_as_gpus_do)
    monkeypatch.setattr(collectives, "_get_all_gather_input_metadatas", collectives._get_all_gather_input_metadatas)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    model = nn.Sequential(nn.Linear(1, 2**17, bias=False), nn.Linear(3, 5), nn.Linear(1, 1))
    model[0].weight = nn.Parameter(patterns.view(torch.bfloat16).repeat(2)[:, None], requires_grad=False)
    for layer in (*model, model):
        fully_shard(layer, mesh=two_processes, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    assert fsdp.altered_weights(model) == ["0.weight"]
    assert fsdp.problems(model) == ["1 weights are gathered with other values than they have, the first is 0.weight"]
    gather_bytes()
    assert fsdp.altered_weights(model) == fsdp.problems(model) == []
    model[0].unshard()
    assert torch.equal(model[0].weight.detach().view(torch.int16).flatten(), patterns.repeat(2))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_of_a_weight_are_its_bits(kind):
    weight = torch.tensor([[1.0, float("nan")], [-2.0, 0.5]], dtype=kind).T
    assert torch.equal(fsdp._bytes(weight).view(kind).nan_to_num(7), torch.tensor([1, -2, 7, 0.5], dtype=kind))
