"""Write a model of a real shape with random weights.

    python scripts/make_random_model.py --config Qwen/Qwen2-VL-7B-Instruct \\
        --output_dir models/random-7b
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qwen_vl_sft.console import quiet_libraries
from qwen_vl_sft.errors import exits_with_user_errors


@exits_with_user_errors
def main() -> None:
    """Read the command line and write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="local folder or Hub id with a config.json")
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder")
    parser.add_argument("--processor", help="local folder or Hub id of the processor (default: --config)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--overrides", type=json.loads, help='JSON, e.g. {"text_config": {"num_hidden_layers": 2}}')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where the weights are drawn; cuda is faster")
    arguments = parser.parse_args()
    quiet_libraries(rank=0)

    from qwen_vl_sft.tools.random_model import make_random_model

    count = make_random_model(**vars(arguments))
    print(f"{count:,} random parameters written to {arguments.output_dir}")


if __name__ == "__main__":
    main()
