"""Train the same rows on a base in bfloat16, FP8 and NF4; compare the losses.

    python scripts/compare_bases.py --recipe recipes/quickstart.yaml \\
        --use_cpu false --dtype bfloat16 --bf16 true \\
        --bases bf16,fp8,nf4 --seeds 0,1,2 --output_dir bases
    python scripts/compare_bases.py --config Qwen/Qwen2-VL-7B-Instruct \\
        --dataset_name HuggingFaceM4/ChartQA --global_batch_size 4 \\
        --tokens_per_batch 4096 --steps 300 --controls 3 --output_dir bases

Every base is trained with the same seeds, rows and first adapter. The table and
the plot compare means of 20 steps with those of the first base. Rounding alone
takes losses apart with time: --controls trains the first base again from an
adapter that differs by less than a rounding to bfloat16. --config takes random
weights of a shape, in place of the recipe's model. Other `--key value` go to
the recipe; scripts/evaluate.py scores runs of scripts/sft.py.
"""

from __future__ import annotations

from qwen_vl_sft.config.command_line import parse
from qwen_vl_sft.console import quiet_libraries
from qwen_vl_sft.errors import exits_with_user_errors
from qwen_vl_sft.tools.options import CompareBasesOptions


@exits_with_user_errors
def main() -> None:
    """Train, write the results, print the table."""
    options = parse(CompareBasesOptions, usage=__doc__)
    quiet_libraries(rank=0)
    from qwen_vl_sft.tools.compare_bases import run_session

    print(f"\n{run_session(options)}\n\nwritten to {options.output_dir}")


if __name__ == "__main__":
    main()
