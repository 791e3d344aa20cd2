"""Measure ways of training side by side in one process, with random weights.

Data loading is included, and the shape of the model is a real one.

    python scripts/benchmark.py --config Qwen/Qwen2-VL-7B-Instruct \\
        --dataset_name HuggingFaceM4/ChartQA \\
        --dataset_train_split 'train[:5%]' \\
        --variants trl,padded,packed,shared --output_dir benchmark

Other `--key value` go to the recipe of every variant. Losses of random weights
mean nothing; speed does not depend on them. scripts/compare_strategies.py
measures one recipe on every strategy and number of processes.
"""

from __future__ import annotations

from qwen_vl_sft.config.command_line import parse
from qwen_vl_sft.console import quiet_libraries
from qwen_vl_sft.errors import exits_with_user_errors, leave
from qwen_vl_sft.tools.options import BenchmarkOptions


@exits_with_user_errors
def main() -> None:
    """Make the model if it does not exist, set up the variants, run them in turns, and write the table."""
    options = parse(BenchmarkOptions, usage=__doc__)
    quiet_libraries(rank=0)

    from qwen_vl_sft.tools.benchmark import run_session

    print(run_session(options))
    # Do not wait for the data loader workers of every variant, which end one after the other.
    leave(0, "", show=False)


if __name__ == "__main__":
    main()
