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

import argparse

from qwen_vl_sft.console import quiet_libraries
from qwen_vl_sft.errors import exits_with_user_errors, leave
from qwen_vl_sft.tools.benchmarks.arguments import add_common_arguments


@exits_with_user_errors
def main() -> None:
    """Make the model when it is not there, set up the variants, run them in turns, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, needs_config=True)
    parser.add_argument("--variants", default="trl,padded,packed,shared", help="in this order (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="times each variant runs (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=15, help="about so long each time (default: %(default)s)")
    parser.add_argument(
        "--repeat", type=int, default=1, help="times each row stands in the data (default: %(default)s)"
    )
    arguments, rest = parser.parse_known_args()
    quiet_libraries(rank=0)

    from qwen_vl_sft.tools.benchmarks.session import run_session

    print(run_session(arguments, rest))
    # Not waiting for the workers of every variant's data loader, which leave one after the other.
    leave(0, "", show=False)


if __name__ == "__main__":
    main()
