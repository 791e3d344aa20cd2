"""Train one recipe with one seed on every strategy, and compare.

Speed, memory, losses, gradient norms and final weights are compared.

    python scripts/compare_strategies.py --recipe recipes/quickstart.yaml \\
        --modes qlora,lora --output_dir runs/strategies
    python scripts/compare_strategies.py --config Qwen/Qwen2-VL-7B-Instruct \\
        --dataset_name HuggingFaceM4/ChartQA \\
        --dataset_train_split 'train[:5%]' --strategies ddp \\
        --processes 1,2,4,8 --max_steps 50 \\
        --output_dir runs/scaling

Other `--key value` go to the recipe. With --config the weights are random and
losses mean nothing by themselves; speed, memory, and how far the strategies are
apart do not depend on that. Each run's output is in its own log.
"""

from __future__ import annotations

import argparse
import signal
import sys

from qwen_vl_sft.console import quiet_libraries
from qwen_vl_sft.errors import exits_with_user_errors
from qwen_vl_sft.tools.benchmarks.arguments import add_common_arguments


def read_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Our own arguments, and the words that go to the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, needs_config=False)
    parser.add_argument("--strategies", default="single,ddp,zero1,zero2,zero3,fsdp2", help="default: %(default)s")
    parser.add_argument("--processes", default="2", help="numbers of processes, e.g. 1,2,4 (default: %(default)s)")
    parser.add_argument("--modes", default="recipe", help="of qlora, lora, full (default: what the recipe says)")
    parser.add_argument("--warmup", type=int, default=5, help="first steps whose speed does not count (%(default)s)")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds a run may take (default: %(default)s)")
    parser.add_argument("--kill", action="store_true", help="kill and resume each strategy once more, and compare")
    parser.add_argument("--keep_models", action="store_true", help="keep every run's weights, not only the first's")
    return parser.parse_known_args()


@exits_with_user_errors
def main() -> None:
    """Make the recipes, run the grid, write the table; exit code 1 when a run failed."""
    arguments, words = read_arguments()
    # A queue or `timeout` ends this script with SIGTERM: what it started must end with it, as on Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    quiet_libraries(rank=0)
    from qwen_vl_sft.tools.benchmarks import comparison
    from qwen_vl_sft.tools.benchmarks.compare import plan_experiment

    experiment, cases = plan_experiment(arguments, words)
    results = []
    try:
        for result in experiment.run(cases):
            results.append(result)
            print(comparison.line(result), flush=True)
            # After each run: what is done stays when the rest is stopped.
            comparison.write_results(arguments.output_dir, results, experiment.about(results))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    print(comparison.table(results))
    sys.exit(1 if any(result["outcome"].startswith("failed") for result in results) else 0)


if __name__ == "__main__":
    main()
