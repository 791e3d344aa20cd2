"""Prove that a killed run loses nothing.

It is killed at random moments and resumed; weights, rows and losses must agree.

    python scripts/kill_and_resume.py --kills 20 --processes 2
    python scripts/kill_and_resume.py --kills 3 --processes 2 --config zero3
    python scripts/kill_and_resume.py --kills 5 --packing \\
        --recipe recipes/quickstart.yaml --max_steps 20
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from qwen_vl_sft.config.command_line import parse, recipe_values, split_words
from qwen_vl_sft.console import quiet_libraries
from qwen_vl_sft.errors import UserError, exits_with_user_errors
from qwen_vl_sft.shipped_files import launch_config
from qwen_vl_sft.tools.options import KillAndResumeOptions

# The quickstart in a few seconds: evaluation, the best model at the end and old checkpoints' deletion take part.
SHORT = (
    "--recipe recipes/quickstart.yaml --max_steps 24 --per_device_train_batch_size 2 --global_batch_size 4"
    " --logging_steps 1 --eval_strategy steps --eval_steps 3 --save_strategy steps --save_steps 3 --save_total_limit 2"
    " --max_eval_samples 8 --predict_with_generate false --max_train_samples 40 --dataloader_num_workers 1"
    " --report_to none --disable_tqdm true"
)
PACKING = " --packing true --tokens_per_batch 512 --share_prefixes true"


@exits_with_user_errors
def main() -> None:
    """Run, kill, resume, compare; exit code 1 when anything differs."""
    options = parse(KillAndResumeOptions, usage=__doc__)
    quiet_libraries(rank=0)
    # The libraries take seconds to import; a mistyped command line needs none of them.
    from qwen_vl_sft.checkpointing import run_folder
    from qwen_vl_sft.tools import kill_and_resume
    from qwen_vl_sft.tools.measuring import make_output_dir

    if options.kills < 1 or options.processes < 1:
        raise UserError("--kills, --processes: at least 1")
    if options.config != "cpu" and options.processes == 1:
        raise UserError(f"config: {options.config} needs several processes; add --processes 2")
    launch_config(options.config, "config")
    words = words_of(options.packing, options.recipe_keys)
    make_output_dir(options.output_dir)
    if any(options.output_dir.iterdir()):
        raise UserError(f"output_dir: {options.output_dir} holds files already; name another folder with --output_dir")
    experiment = kill_and_resume.Experiment(
        tuple(words), options.processes, options.output_dir, signal.Signals[options.signal], options.config
    )
    trials = experiment.run(options.kills, options.seed, lambda trial: print(trial, flush=True))
    print(kill_and_resume.table(trials))
    same = sum(trial.same for trial in trials)
    print(f"{same} of {len(trials)} runs ended as the one that was never killed")
    if options.report:
        written = json.loads(options.report.read_text()) if options.report.exists() else {}
        how = [options.config] * (options.config != "cpu") + ["packing"] * options.packing
        name = ", ".join([options.signal, f"{options.processes} process(es)", *how])
        entry = {"keys": " ".join(words), "seed": options.seed, "kills": kill_and_resume.as_json(trials)}
        versions = run_folder.environment({}, {}, [])["versions"]
        runs = {**written.get("runs", {}), name: entry}
        report = {**written, "machine": f"{os.cpu_count()} CPU cores", "versions": versions, "runs": runs}
        options.report.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(0 if same == len(trials) else 1)


def words_of(packing: bool, stated: dict[str, list[str]]) -> list[str]:
    """Return the command line of scripts/sft.py; the `stated` keys win over those above. Raises `UserError`."""
    keys: dict[str, Any] = {}
    for words in (split_words(SHORT.split()), split_words(PACKING.split() if packing else []), stated):
        given = dict(words)
        recipe = {"recipe": Path(*given.pop("recipe")).as_posix()} if "recipe" in given else {}
        keys |= recipe | recipe_values(given)
    values = (value if isinstance(value, str) else json.dumps(value) for value in keys.values())
    return [word for name, value in zip(keys, values, strict=True) for word in (f"--{name}", value)]


if __name__ == "__main__":
    main()
