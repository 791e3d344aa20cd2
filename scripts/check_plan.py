"""Compare plans with measured runs: memory of a GPU and seconds of a step.

    python scripts/check_plan.py
    python scripts/check_plan.py --points benchmarks/plan_h200.json

Runs can be measured first, on a GPU and with random weights:

    python scripts/check_plan.py --measure measured.json \\
        --processor Qwen/Qwen2-VL-7B-Instruct --dataset_train_split test

Other `--key value` go to the recipe of the runs.
"""

from __future__ import annotations

from qwen_vl_sft.config.command_line import parse, refuse_recipe_keys
from qwen_vl_sft.console import quiet_libraries
from qwen_vl_sft.errors import exits_with_user_errors, leave
from qwen_vl_sft.planning.check import compare_all, format_table
from qwen_vl_sft.planning.options import CheckPlanOptions


@exits_with_user_errors
def main() -> None:
    """Measure if that is asked for, and print the table."""
    options = parse(CheckPlanOptions, usage=__doc__)
    if options.measure is None:
        refuse_recipe_keys(options.recipe_keys, options, "a recipe is used with --measure alone")
        print(format_table(compare_all(options.points)))
        return
    quiet_libraries(rank=0)

    from qwen_vl_sft.tools.measure_plan import measure_points

    if measure_points(options):
        print(format_table(compare_all(options.measure)))
    # Do not wait for what the libraries would tidy up.
    leave(0, "", show=False)


if __name__ == "__main__":
    main()
