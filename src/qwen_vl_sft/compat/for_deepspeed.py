"""Changes to DeepSpeed."""

from __future__ import annotations

from qwen_vl_sft.compat.registry import Patch, source_of


def compile_no_shared_memory_reduce() -> None:
    """Stop DeepSpeed from compiling a shared-memory all-reduce at the first use of its backend on CPUs.

    That takes 40 to 70 s, and only tensor-parallel inference calls what it compiles.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


PATCHES = (
    Patch(
        name="compile_no_shared_memory_reduce",
        package="deepspeed",
        broken="<=0.19.8",
        without="On CPUs a start takes 40 to 70 s longer: an all-reduce for inference is compiled.",
        applied_by="compat.for_deepspeed.compile_no_shared_memory_reduce",
        links=("https://github.com/deepspeedai/DeepSpeed/pull/5391",),
        needs="deepspeed",
        still_needed=lambda: "build_shm_op()" in source_of("deepspeed.comm.torch.TorchBackend.__init__"),
        reads={"deepspeed.comm.torch.build_shm_op": ("__compatible_ops__", "builder.NAME")},
    ),
    Patch(
        name="look_for_no_gpu",
        package="deepspeed",
        broken="<=0.19.8",
        without="Whatever imports DeepSpeed on a machine without a GPU looks for one, and warns that there is none.",
        applied_by="distributed.launch.start",
        needs="deepspeed",
        still_needed=lambda: "DS_ACCELERATOR" in source_of("deepspeed.accelerator.real_accelerator.get_accelerator"),
    ),
)
