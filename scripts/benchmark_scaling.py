"""Measure training at a real model's shape with random weights: the whole path of scripts/sft.py, data loading included.

    python scripts/benchmark_scaling.py --config Qwen/Qwen2-VL-7B-Instruct --dataset_name HuggingFaceM4/ChartQA \\
        --dataset_train_split 'train[:5%]' --processes 1,2 --steps 50 --output_dir benchmark

Other `--key value` go to the recipe. Losses of random weights mean nothing; speed and memory do not depend on them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen_vl_sft.errors import exits_with_user_errors


@exits_with_user_errors
def main() -> None:
    """Make the model when it is not there, run each variant, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="local folder or Hub id with the config.json of the shape")
    parser.add_argument("--processor", help="local folder or Hub id of the processor (default: --config)")
    parser.add_argument("--model_dir", type=Path, help="where the random model is kept (default: in output_dir)")
    parser.add_argument("--processes", default="1", help="numbers of processes, e.g. 1,2,4 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps of a run (default: %(default)s)")
    parser.add_argument(
        "--warmup", type=int, default=10, help="first steps that are not counted (default: %(default)s)"
    )
    parser.add_argument("--recipe", type=Path, default=Path("recipes/chartqa_qlora.yaml"))
    parser.add_argument("--launcher_config", type=Path, default=Path("accelerate_configs/ddp.yaml"))
    parser.add_argument("--output_dir", type=Path, required=True, help="runs, results.json and results.md go here")
    arguments, recipe_keys = parser.parse_known_args()

    from qwen_vl_sft.benchmarks.scaling import Benchmark, format_table, write_results

    benchmark = Benchmark.from_arguments(arguments, recipe_keys)
    benchmark.make_model()
    results = []
    for processes in (int(count) for count in arguments.processes.split(",")):
        results.append(benchmark.run(processes))
        print(format_table(results), flush=True)
    write_results(arguments.output_dir, results)


if __name__ == "__main__":
    main()
