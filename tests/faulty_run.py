"""Started by tests, once a process: scripts/sft.py with a fault built in, named by the variable FAULT.

nan: the loss of row 3 is NaN; nan_gradient: every loss is finite, the gradient is not; memory: no memory for row 3;
disk: the optimizer of step 4 does not fit on the disk; disk_of_one: process 1 has no room for its part of it; bug: process 0
fails in step 3; told: the run is told to stop in step 2; told_then_nan: that, and the loss of step 3 is NaN.

Process 1 does not come back: hang_data, from a worker of its data loader; hang_forward, from the forward pass of step 5, and
takes 5 s for it before; hang_evaluation, from an evaluation. hang_save: process 0 does not come back from writing a
checkpoint. frozen: process 1 stands still whole, with the threads that watch it.
"""

import itertools
import os
import runpy
import signal
import time

import torch
from torch.distributed.checkpoint import FileSystemWriter

from qwen_vl_sft.batching.collator import Collator
from qwen_vl_sft.resilience.safety import Safety
from qwen_vl_sft.training.trainer import VisionSFTTrainer

compute_loss, prediction_step, save = VisionSFTTrainer.compute_loss, VisionSFTTrainer.prediction_step, torch.save
write_data = FileSystemWriter.write_data
collate, collated = Collator.__call__, itertools.count(1)
FOR_EVER = 3600


def faulty_loss(self, model, inputs, *args, **kwargs):
    fault, rows = os.environ["FAULT"], self.record.rows[len(self.record.losses)]
    if self.args.process_index == 1:
        stand_still(fault, self.state.global_step)
    loss = compute_loss(self, model, inputs, *args, **kwargs)
    if fault == "memory" and 3 in rows:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    if fault == "bug" and self.state.global_step == 2 and self.args.process_index == 0:
        raise AssertionError("a bug of process 0")
    if fault in ("told", "told_then_nan") and self.state.global_step == 1:
        safety = next(entry for entry in self.callback_handler.callbacks if isinstance(entry, Safety))
        safety.watch.reason = "SIGTERM"
    if fault == "told_then_nan" and self.state.global_step == 2:
        return loss * float("nan")
    if fault == "nan_gradient" and 3 in rows:
        return loss + (loss - loss.detach()).abs().sqrt()
    return loss * float("nan") if fault == "nan" and 3 in rows else loss


def stand_still(fault, step):
    if fault == "hang_forward":
        time.sleep(FOR_EVER if step == 4 else 5)
    if fault == "frozen" and step == 2:
        os.kill(os.getpid(), signal.SIGSTOP)


def faulty_prediction(self, *args, **kwargs):
    if os.environ["FAULT"] == "hang_evaluation" and self.args.process_index == 1:
        time.sleep(FOR_EVER)
    return prediction_step(self, *args, **kwargs)


def faulty_batch(self, items):
    if os.environ["FAULT"] == "hang_data" and os.environ["RANK"] == "1" and next(collated) == 3:
        time.sleep(FOR_EVER)
    return collate(self, items)


def faulty_save(value, path, *args, **kwargs):
    fault = os.environ["FAULT"]
    if "checkpoint-4/optimizer" in str(path):
        if fault == "disk":
            raise OSError(28, "No space left on device", str(path))
        if fault == "hang_save":
            time.sleep(FOR_EVER)
    save(value, path, *args, **kwargs)


def faulty_write(self, *args, **kwargs):
    if (
        os.environ["FAULT"] == "disk_of_one"
        and os.environ["RANK"] == "1"
        and "checkpoint-4/optimizer" in str(self.path)
    ):
        raise OSError(28, "No space left on device", str(self.path))
    return write_data(self, *args, **kwargs)


if __name__ == "__main__":
    FileSystemWriter.write_data = faulty_write
    VisionSFTTrainer.compute_loss, VisionSFTTrainer.prediction_step = faulty_loss, faulty_prediction
    Collator.__call__ = faulty_batch
    torch.save = faulty_save
    runpy.run_path("scripts/sft.py", run_name="__main__")
