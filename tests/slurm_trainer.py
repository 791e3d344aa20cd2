"""Stands in for scripts/sft.py in test_slurm.py: counts steps instead of training, and answers signals like it.

USR1 or TERM: end the step, save, leave preempted.json in `output_dir`, exit with 75. `--steps N --seconds S` says how
many steps of how many seconds; `--fail true` fails at the first of them. Each process writes OUTPUT_DIR/world-RANK.json.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

arguments = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
run = Path(arguments["--output_dir"])
rank = int(os.environ.get("RANK", "0"))
signals: list[int] = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: signals.append(number))

run.mkdir(parents=True, exist_ok=True)
shown = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_NODEID", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
world = {key: os.environ[key] for key in shown if key in os.environ}
(run / f"world-{rank}.json").write_text(json.dumps(world | {"resume": arguments["--resume_from_checkpoint"]}))
print(f"this is process {rank}")
if rank == 0 and arguments.get("--fail"):
    sys.exit("error: no such column")

steps = run / f"steps-{rank}"
for step in range(int(steps.read_text()) if steps.exists() else 0, int(arguments["--steps"])):
    time.sleep(float(arguments["--seconds"]))
    steps.write_text(str(step + 1))
    if signals:
        (run / "preempted.json").write_text(json.dumps({"step": step + 1, "signals": len(signals)}))
        sys.exit(75)
(run / f"finished-{rank}").touch()
