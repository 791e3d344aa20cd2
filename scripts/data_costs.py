"""Measure what data cost.

Starts of a run, a worker's work, long conversations, plans of large steps.

    python scripts/data_costs.py --output_dir data_costs
    python scripts/data_costs.py --parts large --output_dir data_costs

The data are made up. Times of one process are its CPU time. --before measures
the starts of another version in turns, from a folder that has its own
environment.
"""

from __future__ import annotations

from qwen_vl_sft.config.command_line import parse
from qwen_vl_sft.console import quiet_libraries
from qwen_vl_sft.errors import exits_with_user_errors
from qwen_vl_sft.tools.options import DataCostsOptions


@exits_with_user_errors
def main() -> None:
    """Read the command line, measure, and print the table."""
    options = parse(DataCostsOptions, usage=__doc__)
    quiet_libraries(rank=0)

    from qwen_vl_sft.tools.data_costs import measure

    print(measure(options))


if __name__ == "__main__":
    main()
