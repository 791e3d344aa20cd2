"""Write a model of a real shape with random weights.

    python scripts/make_random_model.py --config Qwen/Qwen2-VL-7B-Instruct \\
        --output_dir models/random-7b
"""

from __future__ import annotations

from qwen_vl_sft.config.command_line import parse
from qwen_vl_sft.console import quiet_libraries
from qwen_vl_sft.errors import exits_with_user_errors
from qwen_vl_sft.tools.options import RandomModelOptions


@exits_with_user_errors
def main() -> None:
    """Read the command line and write the model."""
    options = parse(RandomModelOptions, usage=__doc__)
    quiet_libraries(rank=0)

    from qwen_vl_sft.tools.random_model import make_random_model

    count = make_random_model(**vars(options))
    print(f"{count:,} random parameters written to {options.output_dir}")


if __name__ == "__main__":
    main()
