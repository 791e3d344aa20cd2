"""Changes to DeepSpeed."""

from __future__ import annotations


def compile_no_shared_memory_reduce() -> None:
    """Stop DeepSpeed from compiling a shared-memory all-reduce at the first use of its backend on CPUs.

    That takes 40 to 70 s, and only tensor-parallel inference calls what it compiles.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
