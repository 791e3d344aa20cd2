"""Serve a run with a real engine, and compare its answers with this package's.

    python scripts/engine_environment.py --engine vllm
    python scripts/serve_check.py --run runs/chartqa_qlora --engine vllm
    python scripts/serve_check.py --run runs/chartqa_qlora --engine vllm \\
        --model merged

The engine gets the options that the model card names, and rows of the run's
evaluation data with the run's prompt and image sizes. Checked are the tokens of
every prompt, every answer, and that the adapter acts. The result is kept in the
run's folder, and scripts/push.py puts it on the card. Ends with 1 where the
engine does not serve the model as it is.
"""

import sys

from qwen_vl_sft.config.command_line import parse
from qwen_vl_sft.console import quiet_libraries
from qwen_vl_sft.errors import EXIT_INTERRUPTED, exits_with_user_errors
from qwen_vl_sft.serving.options import ServeCheckOptions, make_plan


@exits_with_user_errors
def main() -> None:
    """Read the command line, check, print what came out."""
    quiet_libraries(rank=0)
    options = parse(ServeCheckOptions, usage=__doc__)
    plan = make_plan(options)

    from qwen_vl_sft.serving.check import check, format_record

    try:
        record = check(plan)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    print(f"\n{format_record(record)}\n\nwritten to {record['file']}")
    if not record["proven"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
