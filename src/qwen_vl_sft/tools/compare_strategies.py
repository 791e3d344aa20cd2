"""Train one recipe with one seed on every strategy through scripts/sft.py, and compare the runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from qwen_vl_sft.checkpointing import checkpoints, manifest, run_folder
from qwen_vl_sft.checkpointing.row_log import read_row_log
from qwen_vl_sft.config.command_line import recipe_values
from qwen_vl_sft.config.model_rules import LORA_KEYS
from qwen_vl_sft.config.reading import read_file
from qwen_vl_sft.distributed.ports import free_port
from qwen_vl_sft.errors import EXIT_USER_ERROR, UserError, raise_all
from qwen_vl_sft.shipped_files import launch_config, script
from qwen_vl_sft.tools.kill_and_resume import kill_family
from qwen_vl_sft.tools.measuring import TRAINING_ALONE, contradictions, make_output_dir, random_model_of
from qwen_vl_sft.tools.options import CompareStrategiesOptions

STEPS = 20
STRATEGIES = {"single": "single_gpu", **{name: name for name in ("ddp", "zero1", "zero2", "zero3", "fsdp2")}}
MODES: dict[str, dict[str, Any]] = {
    "qlora": {"use_peft": True, "load_in_4bit": True},
    "lora": {"use_peft": True, "load_in_4bit": False},
    "full": {"use_peft": False, "load_in_4bit": False},
}
EVERY_STEP = {"logging_steps": 1, "log_row_ids": True}
_POLL_SECONDS = 0.05
MEASURED = (
    "rows_per_second",
    "images_per_second",
    "tokens_per_second",
    "tflops_per_gpu",
    "mfu",
    "data_wait",
)
PEAK = "peak_memory_gib"
# How torch's launcher, and accelerate's for one process, tell the exit code of the script.
_USER_ERROR_OF_LAUNCHER = re.compile(rf"exitcode\s*: {EXIT_USER_ERROR}\b|exit status {EXIT_USER_ERROR}\b")
_MESSAGE = re.compile(r"^error: (?:\d+ problems\n  - )?(.+)", re.MULTILINE)


def plan_experiment(options: CompareStrategiesOptions) -> tuple[Experiment, list[Case]]:
    """Check the request, make the random model if one is asked for, and write a recipe a mode. Raises `UserError`."""
    cases = list(grid(options.strategies, options.processes, options.modes))
    keys = {"max_steps": STEPS, **recipe_values(options.recipe_keys, options)}
    raise_all([*contradictions(keys, "modes", {case.mode: MODES.get(case.mode, {}) for case in cases})])
    steps = keys["max_steps"]
    if not isinstance(steps, int) or not 0 <= options.warmup < steps:
        raise UserError(f"--warmup {options.warmup} leaves nothing of --max_steps {steps}; give more steps")
    if options.kill and steps < 2:
        raise UserError(f"--kill needs a checkpoint in the middle; --max_steps {steps} has none, give more steps")
    written = read_file(options.recipe)
    make_output_dir(options.output_dir)
    if options.config:
        keys["model_name_or_path"] = str(random_model_of(options))
    recipes = {mode: recipe_of(written, mode, keys) for mode in dict.fromkeys(case.mode for case in cases)}
    # Counting asks the driver; no GPU is touched, its memory is the runs'.
    on_cpu = torch.cuda.device_count() == 0 or any(recipe.get("use_cpu") for recipe in recipes.values())
    if on_cpu:
        recipes = {mode: {**recipe, "use_cpu": True} for mode, recipe in recipes.items()}
    experiment = Experiment(
        folder=options.output_dir,
        recipes=write_recipes(options.output_dir, recipes),
        on_cpu=on_cpu,
        warmup=options.warmup,
        timeout=options.timeout,
        kill_step=steps // 2 if options.kill else None,
        keep_models=options.keep_models,
    )
    return experiment, cases


@dataclass(frozen=True)
class Case:
    """A cell of the grid. `mode` is one of `MODES`, or `recipe` for what the recipe itself says."""

    strategy: str
    processes: int
    mode: str

    @property
    def name(self) -> str:
        """Return the name of its folder and its log."""
        return f"{self.mode}-{self.strategy}-{self.processes}"


def grid(strategies: Sequence[str], processes: Sequence[int], modes: Sequence[str]) -> Iterator[Case]:
    """Yield every case, mode by mode; `single` runs on one process. Raises `UserError` for an unknown name."""
    for option, names, known in (("strategies", strategies, STRATEGIES), ("modes", modes, {**MODES, "recipe": {}})):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise UserError(f"--{option}: {', '.join(unknown)} is not known; there are {', '.join(known)}")
    if not strategies or not processes or min(processes) < 1:
        raise UserError("--strategies and --processes each need one value at least, and processes are counted from 1")
    for mode in modes:
        for strategy in strategies:
            for count in [1] if strategy == "single" else processes:
                yield Case(strategy, count, mode)


def recipe_of(written: Mapping[str, Any], mode: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe of a mode: `written`, then the mode's keys, then `keys` of the command line.

    Raises `UserError` when the batch would depend on the number of processes.
    """
    recipe = {**written, **TRAINING_ALONE, **EVERY_STEP, **MODES.get(mode, {})}
    if mode == "full":
        recipe = {name: value for name, value in recipe.items() if name not in LORA_KEYS}
    recipe |= keys
    if recipe.get("global_batch_size") is None and recipe.get("global_batch_tokens") is None:
        raise UserError(
            "the recipe states no global batch, so each number of processes would train on other batches; add"
            " --global_batch_size N"
        )
    recipe.pop("output_dir", None)
    return recipe


@dataclass(frozen=True)
class Experiment:
    """Runs of scripts/sft.py in `folder`. `recipes` maps a mode to its file; `timeout` is in seconds and for each run.

    With `kill_step`, each strategy runs once more, is killed once the checkpoint of that step is whole, and resumed.
    """

    folder: Path
    recipes: Mapping[str, Path]
    on_cpu: bool
    warmup: int
    timeout: float
    kill_step: int | None = None
    keep_models: bool = False

    def run(self, cases: list[Case]) -> Iterator[dict[str, Any]]:
        """Run the cases and yield their results, each compared with the first finished one of its mode."""
        first: dict[str, dict[str, Any]] = {}
        for case in cases:
            result = self._run_case(case, first.get(case.mode))
            if result["outcome"] == "ok":
                first.setdefault(case.mode, result)
            yield result

    def facts(self, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the machine and the recipes of the results."""
        done = next((result["run"] for result in results if result["outcome"] == "ok"), None)
        recipes = {mode: yaml.safe_load(path.read_text(encoding="utf-8")) for mode, path in self.recipes.items()}
        return {**(machine_of(self.folder / "runs" / done) if done else {}), "recipes": recipes}

    def run_folder(self, case: Case) -> Path:
        """Return the run folder of a case."""
        return self.folder / "runs" / case.name

    def _run_case(self, case: Case, first: dict[str, Any] | None) -> dict[str, Any]:
        facts = {"run": case.name, "mode": case.mode, "strategy": case.strategy, "processes": case.processes}
        run, log = self.run_folder(case), self.folder / f"{case.name}.log"
        shutil.rmtree(run, ignore_errors=True)
        log.unlink(missing_ok=True)
        began = time.monotonic()
        code = self._train(case, run, log, self._saving())
        facts["seconds"] = round(time.monotonic() - began, 1)
        if code != 0:
            return {**facts, "outcome": stopped(code, run, log, self.timeout)}
        result = {**facts, "outcome": "ok", **finished(run, self.warmup)}
        if first is not None:
            result["times_first"] = result["rows_per_second"] / first["rows_per_second"]
            result |= differences(result, first, run, self.folder / "runs" / first["run"])
        if self.kill_step is not None:
            result["resumed"] = self._kill_and_resume(case, result)
        if first is not None and not self.keep_models:
            _forget_weights(run)
        return result

    def _kill_and_resume(self, case: Case, whole: dict[str, Any]) -> dict[str, Any]:
        """Kill the same run after a checkpoint, resume it, and compare its result with the uninterrupted run."""
        run, log = self.folder / "runs" / f"{case.name}-killed", self.folder / f"{case.name}-killed.log"
        shutil.rmtree(run, ignore_errors=True)
        log.unlink(missing_ok=True)
        mark = run / f"checkpoint-{self.kill_step}" / manifest.MANIFEST
        code = self._train(case, run, log, self._saving(), until=mark.is_file)
        done = max(read_row_log(run), default=0)
        if code is not None:
            return {"outcome": f"failed: ended with exit code {code} before it was killed; see {log}"}
        if not mark.is_file():
            return {"outcome": stopped(None, run, log, self.timeout)}
        code = self._train(case, run, log, {**self._saving(), "resume_from_checkpoint": checkpoints.LATEST})
        if code != 0:
            return {"outcome": stopped(code, run, log, self.timeout), "steps_done": done}
        found = differences(finished(run, self.warmup), whole, run, self.run_folder(case))
        _forget_weights(run)
        return {"outcome": "ok", "steps_done": done, "resumed_from": self.kill_step, **found}

    def _saving(self) -> dict[str, Any]:
        return {} if self.kill_step is None else {"save_strategy": "steps", "save_steps": self.kill_step}

    def _train(
        self, case: Case, run: Path, log: Path, keys: Mapping[str, Any], until: Callable[[], bool] | None = None
    ) -> int | None:
        """Run scripts/sft.py and return its exit code; None when it was killed, by `until` or after the time limit."""
        words = [word for name, value in {"output_dir": run, **keys}.items() for word in (f"--{name}", str(value))]
        command = [*self._launcher(case), str(script("sft")), "--recipe", str(self.recipes[case.mode]), *words]
        deadline = time.monotonic() + self.timeout
        with log.open("ab") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env=self._environment(), start_new_session=True
            )
        try:
            while process.poll() is None:
                if time.monotonic() > deadline or (until is not None and until()):
                    return None
                time.sleep(_POLL_SECONDS)
            return process.returncode
        finally:
            # Also on Ctrl-C; the session of its own keeps that from reaching the run first.
            kill_family(process.pid)
            process.wait()

    def _launcher(self, case: Case) -> list[str]:
        if self.on_cpu and case.strategy == "single":
            return [sys.executable]
        name = "cpu" if self.on_cpu and case.strategy == "ddp" else STRATEGIES[case.strategy]
        options = {
            "config_file": launch_config(name),
            "num_processes": case.processes,
            "main_process_port": free_port(),
        }
        words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
        return [sys.executable, "-m", "accelerate.commands.launch", *words]

    def _environment(self) -> dict[str, str]:
        if not self.on_cpu:
            return dict(os.environ)
        # One thread each, as torch's launcher does for several processes: sums are then taken in the same order.
        return {"OMP_NUM_THREADS": "1", **os.environ, "CUDA_VISIBLE_DEVICES": "-1"}


def write_recipes(folder: Path, recipes: Mapping[str, Mapping[str, Any]]) -> dict[str, Path]:
    """Write the recipe of each mode into `folder`, and return their paths."""
    paths = {mode: folder / f"{mode}.yaml" for mode in recipes}
    for mode, path in paths.items():
        path.write_text(yaml.safe_dump(dict(recipes[mode]), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return paths


def _forget_weights(run: Path) -> None:
    """Delete what takes room once it has been compared: the model and the checkpoints."""
    for checkpoint in checkpoints.folders(run):
        shutil.rmtree(checkpoint)
    for weights in run.glob("*.safetensors"):
        weights.unlink()


def finished(run: Path, warmup: int) -> dict[str, Any]:
    """Read losses and gradient norms of every step, and the median speeds after `warmup` steps."""
    lines = (run / run_folder.LOG).read_text(encoding="utf-8").splitlines()
    entries = [entry for entry in map(json.loads, lines) if "loss" in entry]
    counted = [entry for entry in entries if entry["step"] > warmup and "rows_per_second" in entry]
    found: dict[str, Any] = {
        name: statistics.median(entry[name] for entry in counted) for name in MEASURED if name in counted[0]
    }
    if PEAK in counted[-1]:
        found[PEAK] = counted[-1][PEAK]
    return {
        **found,
        "counted_steps": len(counted),
        "losses": [entry["loss"] for entry in entries],
        "grad_norms": [entry["grad_norm"] for entry in entries],
    }


def machine_of(run: Path) -> dict[str, Any]:
    """Return the versions, commit, GPUs and CPU cores of a finished run."""
    environment = json.loads((run / run_folder.ENVIRONMENT).read_text(encoding="utf-8"))
    facts = {name: environment[name] for name in ("versions", "python", "devices", "git_commit")}
    return {**facts, "cpu_cores": os.cpu_count()}


def stopped(code: int | None, run: Path, log: Path, timeout: float) -> str:
    """Explain why a run has no result; `code` is the launcher's exit code, None after a timeout."""
    if code is None:
        return f"failed: not done after {timeout:.0f} s; see {log}"
    text = log.read_text(encoding="utf-8", errors="replace")
    message = _MESSAGE.search(text)
    if message and (code == EXIT_USER_ERROR or _USER_ERROR_OF_LAUNCHER.search(text)):
        # A run that has trained was not refused: out of memory, a NaN.
        word = "failed" if max(read_row_log(run), default=0) or "out of memory" in message[1] else "refused"
        return f"{word}: {first_sentence(message[1])}"
    return f"failed: see {log}"


def first_sentence(text: str) -> str:
    """Return the text up to the first full stop or semicolon that ends a clause."""
    return re.split(r"[.;](?=\s|$)", text.strip(), maxsplit=1)[0]


def differences(
    result: Mapping[str, Any], reference: Mapping[str, Any], run: Path, reference_run: Path
) -> dict[str, float | None]:
    """Return the largest differences from the reference, over all steps and over all tensors of the final weights."""
    return {
        "loss_difference": largest_difference(result["losses"], reference["losses"]),
        "grad_norm_difference": largest_difference(result["grad_norms"], reference["grad_norms"]),
        "weights_difference": weights_difference(run, reference_run),
    }


def largest_difference(values: list[float], reference: list[float]) -> float | None:
    """Return the largest absolute difference of two curves; None if their steps differ."""
    if len(values) != len(reference):
        return None
    return max((abs(value - other) for value, other in zip(values, reference, strict=True)), default=None)


def weights_difference(run: Path, reference: Path) -> float | None:
    """Return the largest |a - b| / |b| (Frobenius norms) over the reference's tensors; None if the run lacks one.

    A run may hold more: ZeRO-1 and ZeRO-2 save an output head that is tied to the embeddings once more by itself.
    """
    ours, theirs = _tensors(run), _tensors(reference)
    if not theirs or not set(theirs) <= set(ours):
        return None
    return max(_relative(_load(ours[name], name), _load(theirs[name], name)) for name in theirs)


def _relative(weight: Any, reference: Any) -> float:
    weight, reference = weight.double(), reference.double()
    distance, size = float((weight - reference).norm()), float(reference.norm())
    return distance / size if size else (0.0 if distance == 0 else float("inf"))


def _tensors(run: Path) -> dict[str, Path]:
    return dict(_names(sorted(run.glob("*.safetensors"))))


def _names(files: list[Path]) -> Iterator[tuple[str, Path]]:
    from safetensors import safe_open

    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                yield name, path


def _load(path: Path, name: str) -> Any:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)
