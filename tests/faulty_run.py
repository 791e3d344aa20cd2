"""Started by test_faults.py, once a process: scripts/sft.py with a fault built in, named by the variable FAULT.

nan: the loss of row 3 is NaN; nan_gradient: every loss is finite, the gradient is not; memory: no memory for row 3;
disk: the optimizer of step 4 does not fit on the disk; bug: process 0 fails in step 3.
"""

import os
import runpy

import torch

from qwen_vl_sft.trainer import VisionSFTTrainer

compute_loss, save = VisionSFTTrainer.compute_loss, torch.save


def faulty_loss(self, model, inputs, *args, **kwargs):
    fault, rows = os.environ["FAULT"], self.record.rows[len(self.record.losses)]
    loss = compute_loss(self, model, inputs, *args, **kwargs)
    if fault == "memory" and 3 in rows:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    if fault == "bug" and self.state.global_step == 2 and self.args.process_index == 0:
        raise AssertionError("a bug of process 0")
    if fault == "nan_gradient" and 3 in rows:
        return loss + (loss - loss.detach()).abs().sqrt()
    return loss * float("nan") if fault == "nan" and 3 in rows else loss


def full_disk(value, path, *args, **kwargs):
    if os.environ["FAULT"] == "disk" and "checkpoint-4/optimizer" in str(path):
        raise OSError(28, "No space left on device", str(path))
    save(value, path, *args, **kwargs)


if __name__ == "__main__":
    VisionSFTTrainer.compute_loss = faulty_loss
    torch.save = full_disk
    runpy.run_path("scripts/sft.py", run_name="__main__")
