"""Check packed rows and shared prefixes against the same rows one at a time.

    python scripts/check_packing.py --config Qwen/Qwen2-VL-7B-Instruct \\
        --dataset_name HuggingFaceM4/ChartQA \\
        --dataset_train_split 'train[:5%]' --output_dir check

The shape and the precision are real ones. Losses of every learned token and
gradients of the adapter are compared with those of float32, one row at a time.
Packed rows must be as near to them as rows one at a time are in the same
precision; exit code 1 if they are not. Other `--key value` go to the recipe.
tests/integration/test_packed.py checks the same with small models in float32.
"""

from __future__ import annotations

import sys

from qwen_vl_sft.config.command_line import parse
from qwen_vl_sft.console import quiet_libraries
from qwen_vl_sft.errors import exits_with_user_errors
from qwen_vl_sft.tools.options import CheckPackingOptions


@exits_with_user_errors
def main() -> None:
    """Compare, and print the table."""
    options = parse(CheckPackingOptions, usage=__doc__)
    quiet_libraries(rank=0)
    from qwen_vl_sft.tools.check_packing import COLUMNS, compare
    from qwen_vl_sft.tools.measuring import format_table

    results, good = compare(options)
    print(format_table(results, COLUMNS))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
