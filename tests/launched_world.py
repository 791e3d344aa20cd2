"""Started by test_launch.py under accelerate: goes as far as the first training step and reports the world in it.

Writes FOLDER/world-RANK.json. The model is a tiny Qwen2-VL, since FSDP2 splits by its layers.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

from qwen_vl_sft.errors import exits_with_user_errors
from qwen_vl_sft.launching.launch import check_running, join, limit_waits, read_world, start, training_arguments


class Checked(Exception):
    pass


def waits() -> list[float]:
    """How many seconds the processes wait for each other, in each of their groups."""
    import torch
    from torch.distributed import distributed_c10d

    groups = distributed_c10d._world.pg_map
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


@exits_with_user_errors
def main() -> None:
    world = read_world(use_cpu=True)
    start(world)
    join(world)
    at_first = waits()

    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=1, report_to="none", ddp_timeout=77, **training_arguments(world)
        )
        model = Qwen2VLForConditionalGeneration(
            Qwen2VLConfig(
                text_config={
                    "vocab_size": 32,
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
                },
                vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16},
            )
        )
        rows = [{"input_ids": torch.tensor([1]), "labels": torch.tensor([1])}] * 4
        trainer = Trainer(model, arguments, train_dataset=rows)  # type: ignore[arg-type]

        class Check(TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs) -> None:
                check_running(world, trainer.accelerator, trainer.model_wrapped)
                raise Checked

        trainer.add_callback(Check())
        try:
            trainer.train()
        except Checked:
            wrapped = trainer.model_wrapped
            split = sorted({type(module).__name__ for module in wrapped.modules() if hasattr(module, "unshard")})
            limit_waits(arguments.ddp_timeout)
            report = dataclasses.asdict(world) | {"wrapper": type(wrapped).__name__, "split": split}
            report |= {"waits": [at_first, waits()]}
            (Path(sys.argv[1]) / f"world-{world.rank}.json").write_text(json.dumps(report))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
