"""Small runs of what training needs, in a process of their own: python -m qwen_vl_sft.diagnosis.probes NAME ...

Each prints a line of JSON. What is not installed or does not apply here is "absent".
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from qwen_vl_sft.compat.for_deepspeed import compile_no_shared_memory_reduce
from qwen_vl_sft.console import quiet_libraries
from qwen_vl_sft.distributed.ports import free_port
from qwen_vl_sft.errors import UserError, first_line


class Absent(Exception):
    """What a probe would try is not installed or not for this machine; the message says which."""


def probe_torch() -> str:
    """Multiply matrices in bfloat16 on the device, and compare with float32."""
    import torch

    device = _device()
    one, other = (torch.randn(256, 256, device=device) for _ in range(2))
    product = (one.bfloat16() @ other.bfloat16()).float()
    apart = float((product - one @ other).norm() / (one @ other).norm())
    assert apart < 0.02, f"a product in bfloat16 is {apart:.1%} off"
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    return f"products in bfloat16 are right on {where}; {built}"


def probe_attention() -> str:
    """Compare the attention of packed rows that "auto" takes with float32, gradients too."""
    import torch

    from qwen_vl_sft.modeling.attention_kernels import has_varlen_kernel, resolve_attention, varlen_kernel
    from qwen_vl_sft.modeling.kernel_check import TOLERANCE, difference
    from qwen_vl_sft.modeling.plain_attention import attend_by_piece

    device = _device()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k = (torch.zeros(1, heads, 128, device=device, dtype=dtype) for heads in (8, 2))
    name = resolve_attention("auto", device == "cpu", "bfloat16" if device == "cuda" else "float32", packing=True)
    if not has_varlen_kernel(q):

        def kernel(q: Any, k: Any, v: Any, *bounds: Any, scale: Any, causal: bool) -> Any:
            return attend_by_piece(q, k, v, bounds[0], bounds[1], scale, causal)

        apart = difference(kernel, q, k, causal=True, learns=True)
        name = "sdpa, a call for each row"
    else:
        chosen = varlen_kernel(name)
        apart = difference(getattr(chosen, "kernel", chosen), q, k, causal=True, learns=True)
    assert apart < TOLERANCE, f"{name} is {apart:.1%} off float32"
    return f"{name} is right: {apart:.1e} off float32"


def probe_kernels() -> str:
    """Compute the embedded model with and without the fused kernels that "auto" takes."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from qwen_vl_sft import tiny
    from qwen_vl_sft.families.registry import family_of
    from qwen_vl_sft.modeling.kernels import chosen_kernels, use_fused_kernels

    device = _device()
    config = AutoConfig.from_pretrained(tiny.MODEL_DIR)
    unfit = family_of(config).unfit_kernels
    names = [name for name in chosen_kernels("auto", device == "cpu") if name not in unfit]
    torch.manual_seed(0)
    # In bfloat16 the order of roundings alone makes a percent.
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).to(device)
    words = torch.arange(64, device=device)[None]
    with torch.no_grad():
        plain = model(input_ids=words).logits
        use_fused_kernels(model, names)
        fused = model(input_ids=words).logits
    apart = float((plain - fused).norm() / plain.norm())
    assert apart < 1e-3, f"{', '.join(names)} are {apart:.1%} off"
    return f"{', '.join(names)}: {apart:.0e} off"


def probe_bitsandbytes() -> str:
    """Multiply by a 4-bit weight, forwards and backwards."""
    _need("bitsandbytes")
    import bitsandbytes
    import torch

    device = _device()
    torch.manual_seed(0)
    weight = torch.randn(128, 256) / 16
    layer: Any = bitsandbytes.nn.Linear4bit(256, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer = layer.to(device)
    inputs = torch.randn(8, 256, device=device, requires_grad=True)
    output = layer(inputs)
    output.sum().backward()
    wanted = inputs.detach() @ weight.to(device).t()
    apart = float((output.detach() - wanted).norm() / wanted.norm())
    assert apart < 0.2, f"a product with a 4-bit weight is {apart:.0%} off"
    assert inputs.grad is not None, "a 4-bit weight gives no gradient"
    return f"NF4 works forwards and backwards, {apart:.1%} off"


def probe_deepspeed() -> str:
    """Take a step under ZeRO-2 with one process."""
    _need("deepspeed")
    import torch

    device = _device()
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": f"{free_port()}",
    }
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    compile_no_shared_memory_reduce()
    deepspeed.init_distributed(dist_backend="nccl" if device == "cuda" else "gloo", verbose=False)
    layer = torch.nn.Linear(8, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    settings = {
        "train_batch_size": 4,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=layer, optimizer=optimizer, config=settings)
    before = layer.weight.detach().clone()
    engine.backward(engine(torch.ones(4, 8, device=engine.device)).sum())
    engine.step()
    assert not torch.equal(before, layer.weight.detach()), "a step under ZeRO-2 changes nothing"
    torch.distributed.destroy_process_group()
    return "ZeRO-2 takes a step with one process"


def probe_nccl() -> str:
    """Add up a tensor over all GPUs of this machine."""
    import torch

    if not torch.cuda.is_available():
        raise Absent("no GPU")
    count = torch.cuda.device_count()
    version = ".".join(map(str, torch.cuda.nccl.version()))
    if count == 1:
        return f"NCCL {version}; one GPU, nothing to add up"
    tensors = [torch.full((1 << 20,), float(number), device=f"cuda:{number}") for number in range(count)]
    torch.cuda.nccl.all_reduce(tensors)
    wanted = float(sum(range(count)))
    assert all(bool((tensor == wanted).all()) for tensor in tensors), "GPUs add up other numbers than were sent"
    return f"NCCL {version} adds up over {count} GPUs"


def probe_fp8() -> str:
    """Multiply matrices in FP8."""
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        raise Absent("needs a GPU from Ada or Hopper on")
    one, other = (torch.randn(256, 256, device="cuda") for _ in range(2))
    scale = torch.ones((), device="cuda")
    product = torch._scaled_mm(
        one.to(torch.float8_e4m3fn),
        other.t().contiguous().t().to(torch.float8_e4m3fn),
        scale_a=scale,
        scale_b=scale,
        out_dtype=torch.bfloat16,
    )
    apart = float((product.float() - one @ other).norm() / (one @ other).norm())
    assert apart < 0.1, f"a product in FP8 is {apart:.0%} off"
    return f"products in FP8 work, {apart:.1%} off"


def probe_workers() -> str:
    """Hand tensors of 16 MiB over from two workers of a data loader."""
    import torch
    from torch.utils.data import DataLoader

    rows = [torch.full((1 << 22,), float(number)) for number in range(8)]
    # A worker that gets no shared memory says so in a thread of its own, and the loader would wait for ever.
    loader: Any = DataLoader(rows, batch_size=None, num_workers=2, timeout=20)  # type: ignore[arg-type]
    assert sum(float(row[-1]) for row in loader) == sum(range(8)), "workers hand over other numbers than they read"
    return "two workers of a data loader hand over 128 MiB"


def probe_training() -> str:
    """Train the embedded model for a step as QLoRA does: forwards, backwards, and Adam."""
    import torch

    from qwen_vl_sft import tiny
    from qwen_vl_sft.config.settings import ModelSettings
    from qwen_vl_sft.modeling.base_model import load_model

    device = _device()
    settings = ModelSettings(model_name_or_path=str(tiny.MODEL_DIR), dtype="float32")
    model = load_model(settings, device == "cpu")
    words = torch.arange(32, device=device)[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        loss = model(input_ids=words, labels=words).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[1] < losses[0], f"the loss rises from {losses[0]:.3f} to {losses[1]:.3f}"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
    return "the embedded model trains and is saved"


def probe_patches() -> str:
    """Look whether the private parts of libraries that changes rely on are still there."""
    from qwen_vl_sft.compat.catalogue import all_patches
    from qwen_vl_sft.compat.registry import broken_reliance, embedded_model, missing_requirement

    patches, model = all_patches(), embedded_model()
    known = [patch for patch in patches if not missing_requirement(patch)]
    broken = [f"{patch.name}: {line}" for patch in known for line in broken_reliance(patch, model)]
    assert not broken, "; ".join(broken)
    return f"{len(known)} of {len(patches)} changes of docs/patches.md apply here, and what they rely on is there"


def _need(package: str) -> None:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise Absent(f"{package} is not installed") from None


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


PROBES: dict[str, Callable[[], str]] = {
    "torch": probe_torch,
    "attention": probe_attention,
    "kernels": probe_kernels,
    "bitsandbytes": probe_bitsandbytes,
    "deepspeed": probe_deepspeed,
    "nccl": probe_nccl,
    "fp8": probe_fp8,
    "workers": probe_workers,
    "training": probe_training,
    "patches": probe_patches,
}


def outcome_of(name: str) -> dict[str, str]:
    """Return the outcome of a probe, as its line of JSON."""
    try:
        return {"name": name, "outcome": "ok", "text": PROBES[name]()}
    except Absent as reason:
        return {"name": name, "outcome": "absent", "text": str(reason)}
    except UserError as error:
        return {"name": name, "outcome": "failed", "text": str(error)}
    except Exception as error:  # whatever a library raises is what is asked for
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return {"name": name, "outcome": "failed", "text": f"{kind}{first_line(error)}"}


def main() -> None:
    """Run the probes that the command line names."""
    quiet_libraries(rank=0)
    # Libraries write to the same stream.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in sys.argv[1:]:
        print(json.dumps(outcome_of(name)), file=answers, flush=True)


if __name__ == "__main__":
    main()
