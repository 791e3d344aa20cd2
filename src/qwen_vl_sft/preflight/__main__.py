"""Check the nodes of a job, with a process for each GPU.

    srun python -m qwen_vl_sft.preflight --output_dir runs/x

Exit code 1 when a node is to be left out, or something else is wrong; 2 when
the job's options or its recipe cannot be read.
"""

from __future__ import annotations

import os
import platform
import sys

from qwen_vl_sft.config.command_line import parse
from qwen_vl_sft.errors import exits_with_user_errors
from qwen_vl_sft.preflight.options import PreflightOptions, output_dir_of, place_of


@exits_with_user_errors
def main() -> None:
    """Check, and end at once: a library may hang in a thread."""
    options = parse(PreflightOptions, usage=__doc__)
    output_dir = output_dir_of(options)
    place = place_of(os.environ, platform.node(), options.nodes)

    from qwen_vl_sft.preflight.run import run_preflight

    try:
        code = run_preflight(place, options.nodes, output_dir, options.verdict, options.seconds)
    except (OSError, RuntimeError) as error:  # a timeout of the store is one of them
        print(f"preflight   {place.node}, process {place.rank}: {error}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
