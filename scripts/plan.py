"""Tell whether a recipe fits on a GPU, and how long it takes, without a GPU.

    python scripts/plan.py --recipe recipes/chartqa_qlora.yaml --gpu h200
    python scripts/plan.py --recipe recipes/chartqa_lora.yaml --gpu a100-80 \\
        --num_gpus 4 --config_file accelerate_configs/fsdp2.yaml

Only the model's config.json and, where the data is on this machine, the headers
of some rows are read. Exit code 1 when it does not fit.
"""

from __future__ import annotations

import json

from qwen_vl_sft.config.command_line import parse
from qwen_vl_sft.errors import UserError, exits_with_user_errors, first_line
from qwen_vl_sft.planning.options import PlanOptions, plan_of
from qwen_vl_sft.planning.report import as_json, describe, plot_memory


@exits_with_user_errors
def main() -> None:
    """Read recipe, launch, model and rows; print the plan."""
    options = parse(PlanOptions, usage=__doc__)
    plan = plan_of(options)
    print(json.dumps(as_json(plan), indent=1) if options.json else describe(plan))
    if options.plot:
        try:
            plot_memory(plan, options.plot)
        except (OSError, ValueError) as error:
            raise UserError(f"--plot: {options.plot} cannot be written: {first_line(error)}") from None
    if not plan.fits:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
