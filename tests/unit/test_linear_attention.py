"""Kernels of linear attention: how they are called, compared and refused; on a GPU the real ones compare themselves."""

import contextlib
import copy
import functools
import importlib.util
import inspect
import itertools
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

from fixtures.conversations import conversation, image
from fixtures.models import newer
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.distributed import launch
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.families import delta_gradient, delta_kernels
from qwen_vl_sft.families.delta_check import LENGTHS, TOLERANCE, differences, differences_reading, drawn
from qwen_vl_sft.families.gated_delta_net import CHUNK, KEPT, TORCH, Operations, PackedForward
from qwen_vl_sft.families.qwen3_5 import LINEAR_LAYER
from qwen_vl_sft.inference.engine.engine import answer_conversations
from qwen_vl_sft.modeling import linear_attention
from qwen_vl_sft.modeling.kernels import problems_of_kernels
from qwen_vl_sft.modeling.linear_attention import NAME, CheckedKernels, obstacle
from qwen_vl_sft.training import model_setup

KEYS, VALUES, WIDTH = 2, 4, 16


def layer(**changes):
    sizes = {
        "num_v_heads": VALUES,
        "key_dim": KEYS * WIDTH,
        "value_dim": VALUES * WIDTH,
        "head_k_dim": WIDTH,
        "head_v_dim": WIDTH,
    }
    sizes |= {"conv_kernel_size": 4, "activation": "silu", "conv1d": SimpleNamespace(weight=torch.zeros(1))}
    return SimpleNamespace(**sizes | changes)


def convolution(x, weight, pieces):
    """As our kernel: each token behind the inputs that its window names."""
    window = pieces["window"].long()
    known = F.pad(x[0].float(), (0, 0, 0, 1))  # -1 is the last one
    inputs = torch.cat([known[: len(window), None], known[window]], dim=1).flip(1)
    return F.silu((inputs * weight.float().T).sum(1)).to(x.dtype)[None]


def chunk_rule(q, k, v, g, beta, initial_state, output_final_state, cu_seqlens, chunk_indices):
    """As fla's `chunk_gated_delta_rule`, by transformers' recurrence."""
    assert chunk_indices[-1].tolist() == [len(cu_seqlens) - 2, (int(cu_seqlens.diff()[-1]) - 1) // 64]
    outputs, states, tensors = [], [], (q, k, v, g, beta)
    for number, parts in enumerate(
        zip(*(one.split(cu_seqlens.diff().tolist(), dim=1) for one in tensors), strict=True)
    ):
        first = None if initial_state is None else initial_state[number : number + 1]
        *inputs, decay, rate = parts
        out, state = modeling.torch_recurrent_gated_delta_rule(
            *inputs, g=decay, beta=rate, initial_state=first, output_final_state=True
        )
        outputs.append(out)
        states.append(state)
    return torch.cat(outputs, dim=1), torch.cat(states) if output_final_state else None


def l2norm(x):
    return (x.float() * torch.rsqrt(x.float().square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def gated_norm(x, gate, weight, epsilon):
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)
    return (normed * weight.float() * F.silu(gate.float())).to(gate.dtype)


@pytest.fixture
def kernels(monkeypatch):
    """The operations on flash-linear-attention, with functions that take the same arguments in its place."""
    for name, functions in {
        "fla": {},
        "fla.ops": {},
        "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": chunk_rule},
    }.items():
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(delta_kernels, "convolved", convolution)
    monkeypatch.setattr(delta_kernels, "normalised", l2norm)
    monkeypatch.setattr(delta_kernels, "gated_norm", gated_norm)
    monkeypatch.setattr(delta_kernels, "complete", lambda: None)
    monkeypatch.setattr(linear_attention, "_TUNED_ROWS", (5, 3))  # every token is a step here
    return delta_kernels.KERNELS


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, TOLERANCE)])
def test_the_calls_give_outputs_and_gradients_of_rows_one_at_a_time(shared, dtype, most, kernels):
    found = differences(kernels, layer(), dtype, shared)
    assert found.keys() == {"output", "projected", "decay", "beta", "gate"}
    assert max(found.values()) < most
    assert differences(kernels, layer(), dtype, shared, learns=False).keys() == {"output"}


def test_some_heads_of_the_example_forget_more_than_float32_can_undo():
    """What divides by the decay of a chunk that ends early is infinite there."""
    ended_early = slice(CHUNK, LENGTHS[0])
    _, inputs = drawn(layer(num_v_heads=32), sum(LENGTHS), torch.float32, torch.Generator().manual_seed(0))
    decay = inputs["decay"][0, ended_early].sum(0)
    assert (-decay).exp().isinf().any()
    assert decay.exp().max() > 1e-3


def test_another_activation_is_left_to_pytorch(kernels):
    other = layer(activation="gelu")
    other.conv1d.bias, other.conv1d.weight = None, torch.randn(8, 1, 4)
    pieces = {"history": torch.tensor([2, 2, 2, 0, 1]), "positions": torch.tensor([0, 1])}
    taken = (other, torch.ones(1, 2, 8), pieces, None)
    assert torch.equal(kernels.convolve(*taken), TORCH.convolve(*taken))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, TOLERANCE)])
def test_prompts_are_read_with_the_same_calls(dtype, most, kernels):
    """Each after the states that another left, one that another read in the same pass left among them."""
    found = differences_reading(kernels, layer(), dtype)
    assert found.keys() == {"output", "state"}
    assert max(found.values()) < most


def test_prompts_are_answered_with_the_operations_that_layers_were_given(kernels, tiny_processor):
    """Of rows on one image, on another and on none, each twice, at most two at once."""
    model, encoder = newer("Qwen3_5Config").eval(), Encoder(tiny_processor, system_message="Answer.")
    asked = [conversation(text, *images) for text in ("Why?", "Bars, then?") for images in ([image(56, 84, 1)], [])]
    wanted = answer_conversations(model, encoder, asked, 6, rows=2)
    layers = [module for module in model.modules() if type(module).__name__.endswith(LINEAR_LAYER)]
    asked_for = []

    def choose(of, projected, pieces):
        assert pieces[KEPT]
        asked_for.append(of)
        return kernels

    for one in layers:
        one.forward = PackedForward(choose, one)
        assert copy.deepcopy(one).forward._layer is not one
    assert answer_conversations(model, encoder, asked, 6, rows=2) == wanted
    assert set(asked_for) == set(layers)
    assert len(set(wanted)) > 1


def wrong(kernels, what):
    """Operations with one of the faults that the comparison is there for."""

    def rule(_):
        def compute(pieces, number, inputs, first, keep):
            if what == "no first state":
                first = None
            if what == "leaks" and number == 0:
                bounds = pieces["round_bounds"][0][[0, -1]]
                chunks = torch.tensor([[0, chunk] for chunk in range(-(-int(bounds[-1]) // 64))])
                pieces = {**pieces, "round_bounds": [bounds], "round_chunks": [chunks]}
            out, last = delta_kernels.delta_rule(pieces, number, inputs, first, keep)
            if what == "another last state" and KEPT in pieces:
                last = last.flip(-1)
            return out, last.detach() if what == "no gradient into the state" and number == 0 else last

        return compute

    def convolve(of, projected, pieces, before):
        if what != "no first inputs":
            return kernels.convolve(of, projected, pieces, before)
        window = pieces["window"]
        near = torch.arange(len(window))[:, None] - torch.arange(1, 1 + window.shape[1])
        return kernels.convolve(of, projected, {**pieces, "window": window.where(window == near, -1)}, None)

    return Operations(convolve, kernels.heads, rule, kernels.norm)


@pytest.mark.parametrize("what", ["no first state", "leaks", "no gradient into the state", "no first inputs"])
def test_the_comparison_notices(what, kernels):
    shared = what != "leaks"
    operations = wrong(kernels, what)
    assert max(differences(operations, layer(), torch.bfloat16, shared).values()) > 2 * TOLERANCE
    with pytest.raises(UserError, match=r"its \w+ is [\d.]+% off float32; leave linear_attention out of fused_kernels"):
        CheckedKernels(operations).for_layer(layer(), torch.bfloat16, "shared" if shared else "packed")


@pytest.mark.parametrize("what", ["no first state", "another last state", "no first inputs"])
def test_the_comparison_notices_where_prompts_are_read(what, kernels, caplog):
    """A run that trains with the kernels goes on: it reads prompts in PyTorch's operations, and tells so once."""
    checked = CheckedKernels(wrong(kernels, what))
    assert max(differences_reading(checked.operations, layer(), torch.bfloat16).values()) > 2 * TOLERANCE
    for _ in range(2):
        assert checked.for_reading(layer(), torch.bfloat16) is TORCH
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("prompts are read in PyTorch's own operations, which take longer: fused_kernels: linear_att")


def test_kernels_are_compared_once_for_each_kind_of_layer(kernels, monkeypatch):
    compared = []
    monkeypatch.setattr(CheckedKernels, "_check", lambda self, *args: compared.append(args[2:]))
    checked = CheckedKernels(kernels)
    for kind in ("packed", "packed", "shared"):
        assert checked.for_layer(layer(), torch.bfloat16, kind) is kernels
    checked.for_layer(layer(num_v_heads=8), torch.bfloat16, "packed")
    for _ in range(2):
        assert checked.for_reading(layer(), torch.bfloat16) is kernels
    with torch.inference_mode():
        checked.for_layer(layer(), torch.bfloat16, "packed")
        checked.for_reading(layer(), torch.bfloat16)
    assert compared == [("packed", True), ("shared", True), ("packed", True), ("read", False), ("packed", False)]


def test_a_kernel_that_does_not_run_is_told_in_one_message(kernels):
    def fails(*_):
        raise RuntimeError("no kernel image\nfor this device")

    failing = Operations(kernels.convolve, kernels.heads, fails, kernels.norm)
    with pytest.raises(UserError) as error:
        CheckedKernels(failing).for_layer(layer(), torch.bfloat16, "packed")
    assert str(error.value) == (
        "fused_kernels: linear_attention does not run here with 4 heads of 16 values: no kernel image; leave"
        " linear_attention out of fused_kernels, for PyTorch's own operations"
    )


@pytest.fixture
def run(monkeypatch):
    """What of a run decides on its kernels."""
    monkeypatch.setattr(launch, "join", lambda *_: SimpleNamespace(local_main_process_first=contextlib.nullcontext))
    monkeypatch.setattr(model_setup, "load_config", lambda settings: "a configuration")

    def build(named, packing=True):
        model, keys = SimpleNamespace(fused_kernels=named), SimpleNamespace(packing=packing, share_prefixes=True)
        recipe = SimpleNamespace(model=model, run=keys, get=lambda key: None)
        context = SimpleNamespace(rank=0, local_rank=0)
        return SimpleNamespace(recipe=recipe, context=context, chosen=SimpleNamespace(fused_kernels=["lora", NAME]))

    return build


def test_kernels_are_ready_before_the_weights_are_loaded(run, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(linear_attention, "tune", lambda *args: asked.append(args) or 12.3)
    assert model_setup.ready_kernels(run("auto"), torch.bfloat16) == ["lora", NAME]
    assert asked == [("a configuration", torch.bfloat16, torch.device("cuda", 0), True)]
    assert capsys.readouterr().out == "linear      kernels of linear attention compared with float32, ready in 12 s\n"
    assert model_setup.ready_kernels(run("auto"), torch.float32) == ["lora", NAME]
    assert model_setup.ready_kernels(run("auto", packing=False), torch.bfloat16) == ["lora", NAME]
    assert len(asked) == 1


def test_kernels_that_are_wrong_are_left_out_by_auto_and_refused_by_name(run, monkeypatch, capsys):
    def fails(*_):
        raise UserError("fused_kernels: linear_attention does not run here: this; leave it out")

    monkeypatch.setattr(linear_attention, "tune", fails)
    assert model_setup.ready_kernels(run("auto"), torch.bfloat16) == ["lora"]
    told = capsys.readouterr().err
    assert told == (
        "warning: fused_kernels: linear_attention does not run here: this; leave it out; this run does so, and is slower\n"
    )
    with pytest.raises(UserError, match="does not run here"):
        model_setup.ready_kernels(run(["lora", NAME]), torch.bfloat16)


def test_float32_and_a_cpu_are_left_to_pytorch():
    for dtype in (torch.float32, torch.bfloat16):
        assert linear_attention._chosen(layer(), torch.zeros(1, 2, 3, dtype=dtype), {}) is TORCH


@pytest.mark.parametrize("installed", [True, False])
def test_an_installed_library_is_completed_for_padded_batches(installed, monkeypatch):
    completed = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(delta_kernels, "complete", lambda: completed.append(True))
    linear_attention.complete_installed()
    assert completed == [True] * installed


def test_the_gradient_is_offered_behind_others_where_triton_is_wrong(monkeypatch):
    offered = {}

    class Base:
        pass

    backends = SimpleNamespace(
        BaseBackend=Base, register=lambda operation: lambda made: offered.update({operation: made})
    )
    monkeypatch.setitem(sys.modules, "fla", ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.backends", backends)
    for hopper, new, mended in itertools.product((True, False), repeat=3):
        facts = {"IS_NVIDIA_HOPPER": hopper, "TRITON_ABOVE_3_4_0": new, "TRITON_ABOVE_3_7_1": mended}
        monkeypatch.setitem(sys.modules, "fla.utils", SimpleNamespace(**facts))
        delta_gradient.register()
        assert offered["common"].default_enable is (hopper and new and not mended)
    backend = offered["common"]()
    assert backend.priority > 5  # tilelang's
    assert backend.chunk_bwd_dqkwg_verifier(g=1, w=1)[0]
    assert not backend.chunk_bwd_dqkwg_verifier(g=1, w=1, state_v_first=True)[0]
    assert not backend.chunk_bwd_dqkwg_verifier(g=1, w=None)[0]
    monkeypatch.setattr(delta_gradient, "chunk_gradients", lambda **inputs: inputs)
    assert backend.chunk_bwd_dqkwg(q=torch.zeros(1), k=2) == {"q": torch.zeros(1), "k": 2}


def test_padded_rows_can_be_computed_without_an_installed_library(monkeypatch):
    """It multiplies float32 as TF32: nothing to compare others with."""

    @functools.wraps(inspect.unwrap(modeling.torch_chunk_gated_delta_rule))
    def kernel(*args, **kwargs):
        raise RuntimeError("the kernel of a library")

    monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", kernel)
    model = newer("Qwen3_5Config")
    with linear_attention.padded_in_torch(model):
        model(input_ids=torch.ones(1, 3, dtype=torch.long), use_cache=False)
    with pytest.raises(RuntimeError, match="of a library"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long), use_cache=False)


def test_what_is_missing_is_told_with_the_way_out(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'qwen_vl_sft[linear]'" in obstacle()
    (problem,) = problems_of_kernels([NAME], on_cpu=False)
    assert problem.startswith("fused_kernels: linear_attention does not run here: flash-linear-attention")
    assert problem.endswith("pip install 'qwen_vl_sft[linear]'; or leave it out")
    assert linear_attention.why_slow().endswith("many times slower on a GPU: " + obstacle())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert obstacle(8) is obstacle(9) is obstacle(10) is None
    assert "compute capability 8.0" in obstacle(7)
    assert linear_attention.why_slow().endswith("fused_kernels leaves linear_attention out: set it to auto")
