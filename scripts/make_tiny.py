"""Rebuild the embedded tiny model and its charts.

    python scripts/make_tiny.py --output_dir build/tiny
    python scripts/make_tiny.py --output_dir build/tiny --check

It takes about 15 minutes on one core; --check then compares with what the
package ships. The charts, questions and tokenizer come out the same everywhere.
The weights come out bit for bit the same on the same type of CPU with the same
torch version and number of threads; elsewhere they differ slightly but behave
alike.
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    """Build, and compare when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="gets model/ and data/; must not hold them yet")
    parser.add_argument("--steps", type=int, help="pretraining steps; fewer give a model that cannot read charts yet")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights; the charts do not depend on it")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the shipped weights were made with 1")
    parser.add_argument("--check", action="store_true", help="compare with the shipped assets; exit 1 if they differ")
    arguments = parser.parse_args()

    from qwen_vl_sft.tiny import ASSETS_DIR
    from qwen_vl_sft.tools.tiny.build import BuildConfig, build, differences
    from qwen_vl_sft.tools.tiny.pretrain import Schedule

    schedule = Schedule() if arguments.steps is None else Schedule(steps=arguments.steps)
    config = BuildConfig(seed=arguments.seed, threads=arguments.threads, schedule=schedule)
    try:
        build(arguments.output_dir, config, report=lambda line: print(line, flush=True))
    except ValueError as error:
        sys.exit(str(error))
    if arguments.check:
        found = differences(arguments.output_dir, ASSETS_DIR)
        print("\n".join(found) if found else f"the same as {ASSETS_DIR}")
        sys.exit(bool(found))


if __name__ == "__main__":
    main()
