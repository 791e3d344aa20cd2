"""Rebuild the embedded tiny model and its charts.

    python scripts/make_tiny.py --output_dir build/tiny
    python scripts/make_tiny.py --output_dir build/tiny --check

It takes about 15 minutes on one core; --check then compares with what the
package ships. The charts, questions and tokenizer come out the same everywhere.
The weights come out bit for bit the same on the same type of CPU with the same
torch version and number of threads; elsewhere they differ slightly but behave
alike.
"""

from __future__ import annotations

import sys

from qwen_vl_sft.config.command_line import parse
from qwen_vl_sft.errors import exits_with_user_errors
from qwen_vl_sft.tools.options import TinyOptions


@exits_with_user_errors
def main() -> None:
    """Build, and compare when asked to."""
    options = parse(TinyOptions, usage=__doc__)

    from qwen_vl_sft.tiny import ASSETS_DIR
    from qwen_vl_sft.tools.tiny.build import BuildConfig, build, differences
    from qwen_vl_sft.tools.tiny.pretrain import Schedule

    schedule = Schedule() if options.steps is None else Schedule(steps=options.steps)
    config = BuildConfig(seed=options.seed, threads=options.threads, schedule=schedule)
    try:
        build(options.output_dir, config, report=lambda line: print(line, flush=True))
    except ValueError as error:
        sys.exit(str(error))
    if options.check:
        found = differences(options.output_dir, ASSETS_DIR)
        print("\n".join(found) if found else f"the same as {ASSETS_DIR}")
        sys.exit(bool(found))


if __name__ == "__main__":
    main()
