"""Memory of activations on a CPU, and scripts/sft.py that chooses by it; test_memory.py starts that, once a process.

ROOM_0 and ROOM_1 give the room of process 0 and 1 in bytes.
"""

import os
import runpy

import torch

from qwen_vl_sft.training import sft
from qwen_vl_sft.training.memory import MemoryProbe, largest_batch


class SavedActivations:
    """Counts the bytes that autograd keeps for the backward outside of what is checkpointed."""

    def __init__(self, room):
        self._room = room

    def room(self):
        return self._room

    def used(self):
        return 0

    def peak_of(self, work):
        kept = {}

        def keep(tensor):
            if not tensor.is_leaf:
                storage = tensor.untyped_storage()
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            work()
        return sum(kept.values())

    def forget(self):
        pass


def build_with_probe(recipe, world, args, data, global_batch):
    trainer = build(recipe, world, args, data, global_batch)

    def largest():
        return largest_batch(trainer.data_collator, data.train, trainer._sampler, args.train_batch_size)

    memory = SavedActivations(int(os.environ[f"ROOM_{world.rank}"]))
    trainer.add_callback(MemoryProbe(trainer, largest, automatic=True, plan=trainer._sampler.plan, memory=memory))
    return trainer


if __name__ == "__main__":
    build, sft.build_trainer = sft.build_trainer, build_with_probe
    runpy.run_path("scripts/sft.py", run_name="__main__")
