"""Measure ways of answering side by side in one process, with random weights.

    python scripts/benchmark_answers.py --config Qwen/Qwen2-VL-7B-Instruct \\
        --dataset_name HuggingFaceM4/ChartQA --output_dir benchmark

`padded` answers padded batches with transformers' generate; `engine` is what
scripts/evaluate.py does; `eager` is the same without CUDA graphs, `unfused`
without fused kernels. Reading and decoding images is included, loading the
model is not. Rows whose answers differ are counted, with the margin of the
first differing token in units of the rounding of a logit.

Other `--key value` go to the recipe.
"""

from __future__ import annotations

from qwen_vl_sft.config.command_line import parse
from qwen_vl_sft.console import quiet_libraries
from qwen_vl_sft.errors import exits_with_user_errors
from qwen_vl_sft.tools.options import AnswerBenchmarkOptions


@exits_with_user_errors
def main() -> None:
    """Make the model if it does not exist, answer with each variant in turns, and print the table."""
    options = parse(AnswerBenchmarkOptions, usage=__doc__)
    quiet_libraries(rank=0)

    from qwen_vl_sft.tools.benchmark_answers import run_session

    print(run_session(options))


if __name__ == "__main__":
    main()
