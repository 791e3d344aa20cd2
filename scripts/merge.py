"""Merge a run's adapter into its base model, check the result, and write it.

    python scripts/merge.py --run runs/chartqa_qlora --output_dir merged
    python scripts/merge.py --run runs/chartqa_qlora --output_dir merged \\
        --nf4_aware

The first adds the adapter to the original weights, the second to the 4-bit
weights that it was trained on, dequantized. The output folder is written only
when every check has passed.
"""

import signal
import sys

from qwen_vl_sft.config.command_line import parse
from qwen_vl_sft.console import quiet_libraries
from qwen_vl_sft.errors import exits_with_user_errors
from qwen_vl_sft.imports import quick_imports
from qwen_vl_sft.merging.plan import MergeOptions, make_plan


@exits_with_user_errors
def main() -> None:
    """Read the command line, merge, print what came out."""
    quiet_libraries(rank=0)
    options = parse(MergeOptions, usage=__doc__)
    # A scheduler's signal must clean up as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        plan = make_plan(options)

        with quick_imports():
            from qwen_vl_sft.merging.check import format_report
            from qwen_vl_sft.merging.merge import merge

        report = merge(plan)
    except KeyboardInterrupt:
        print(f"interrupted; nothing was left in {options.output_dir}", file=sys.stderr)
        sys.exit(130)
    print(f"\n{format_report(report)}\n\nwritten to {options.output_dir}")


if __name__ == "__main__":
    main()
