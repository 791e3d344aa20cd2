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

import signal
import sys

from qwen_vl_sft.config.command_line import parse
from qwen_vl_sft.console import quiet_libraries
from qwen_vl_sft.errors import exits_with_user_errors
from qwen_vl_sft.tools.options import CompareStrategiesOptions


@exits_with_user_errors
def main() -> None:
    """Make the recipes, run the grid, write the table; exit code 1 when a run failed."""
    options = parse(CompareStrategiesOptions, usage=__doc__)
    # A queue or `timeout` ends this script with SIGTERM: what it started must end with it, as on Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    quiet_libraries(rank=0)
    from qwen_vl_sft.tools import strategy_report
    from qwen_vl_sft.tools.compare_strategies import plan_experiment

    experiment, cases = plan_experiment(options)
    results = []
    try:
        for result in experiment.run(cases):
            results.append(result)
            print(strategy_report.line(result), flush=True)
            # After each run: what is done stays when the rest is stopped.
            strategy_report.write_results(options.output_dir, results, experiment.facts(results))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    print(strategy_report.table(results))
    sys.exit(1 if any(result["outcome"].startswith("failed") for result in results) else 0)


if __name__ == "__main__":
    main()
