"""Export a merged model, and compare its answers with the original's.

    python scripts/merge.py --run runs/chartqa_qlora --output_dir merged
    python scripts/export.py --run merged --to gguf --output_dir exported

GGUF is for llama.cpp; compressed-tensors (4 bits) and fp8 are for vLLM and
transformers. The converter runs in a Python environment of its own, which is
made first. An export that answers worse than --max_loss allows, or that reads
prompts of other lengths, goes to OUTPUT_DIR-failed, and the exit code is 1.
"""

import signal
import sys

from qwen_vl_sft.config.command_line import parse
from qwen_vl_sft.console import quiet_libraries
from qwen_vl_sft.errors import EXIT_INTERRUPTED, exits_with_user_errors
from qwen_vl_sft.exporting.options import ExportOptions, make_plan


@exits_with_user_errors
def main() -> None:
    """Read the command line, export, print what came out."""
    quiet_libraries(rank=0)
    options = parse(ExportOptions, usage=__doc__)
    # A scheduler's signal must clean up as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    plan = make_plan(options)

    from qwen_vl_sft.exporting.export import export, format_report

    try:
        report = export(plan)
    except KeyboardInterrupt:
        print(f"interrupted; nothing was left in {options.output_dir}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    print(f"\n{format_report(report)}\n\nwritten to {report['folder']}")
    if report["problems"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
