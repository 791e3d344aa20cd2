"""Compare plans with measured runs: memory of a GPU and seconds of a step.

python scripts/check_plan.py
python scripts/check_plan.py --points benchmarks/plan.json
"""

from __future__ import annotations

from qwen_vl_sft.config.command_line import parse
from qwen_vl_sft.errors import exits_with_user_errors
from qwen_vl_sft.planning.check import compare_all, format_table
from qwen_vl_sft.planning.options import CheckPlanOptions


@exits_with_user_errors
def main() -> None:
    """Print the table."""
    options = parse(CheckPlanOptions, usage=__doc__)
    print(format_table(compare_all(options.points)))


if __name__ == "__main__":
    main()
