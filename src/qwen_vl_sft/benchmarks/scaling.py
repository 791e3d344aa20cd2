"""Runs of scripts/sft.py on random weights, timed: one command a variant, one table for all."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_vl_sft import run_folder
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.random_model import make_random_model

SCRIPT = Path(__file__).parents[3] / "scripts" / "sft.py"
MEASURED = (
    "rows_per_second",
    "images_per_second",
    "tokens_per_second",
    "tflops_per_gpu",
    "mfu",
    "data_wait",
    "peak_memory_gib",
)
COLUMNS = {
    "processes": ("GPUs", "{}"),
    "rows_per_second": ("rows/s", "{:.2f}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "images_per_second": ("images/s", "{:.2f}"),
    "peak_memory_gib": ("peak GiB", "{:.1f}"),
    "data_wait": ("data wait", "{:.2%}"),
    "tflops_per_gpu": ("TFLOP/s a GPU", "{:.0f}"),
    "mfu": ("MFU", "{:.1%}"),
}


@dataclass(frozen=True)
class Benchmark:
    """What is run: a recipe on a random model of the shape of `config`, for `steps` steps of which `warmup` do not count."""

    config: str
    processor: str
    model_dir: Path
    steps: int
    warmup: int
    recipe: Path
    launcher_config: Path
    output_dir: Path
    recipe_keys: tuple[str, ...]

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace, recipe_keys: list[str]) -> Benchmark:
        """From the command line of scripts/benchmark.py."""
        if arguments.warmup >= arguments.steps:
            raise UserError(f"--warmup {arguments.warmup} leaves nothing of --steps {arguments.steps}; give more steps")
        return cls(
            config=arguments.config,
            processor=arguments.processor or arguments.config,
            model_dir=arguments.model_dir or arguments.output_dir / "model",
            steps=arguments.steps,
            warmup=arguments.warmup,
            recipe=arguments.recipe,
            launcher_config=arguments.launcher_config,
            output_dir=arguments.output_dir,
            recipe_keys=tuple(recipe_keys),
        )

    def make_model(self) -> None:
        """Write the random model, unless it is there."""
        import torch

        if not (self.model_dir / "config.json").is_file():
            device = "cuda" if torch.cuda.is_available() else "cpu"
            make_random_model(self.config, self.model_dir, self.processor, device=device)

    def run(self, processes: int) -> dict[str, Any]:
        """Train on `processes` processes and return the medians of what was logged after the warm-up."""
        run_dir = self.output_dir / f"run-{processes}"
        shutil.rmtree(run_dir, ignore_errors=True)
        subprocess.run(self.command(processes, run_dir), check=True)
        entries = [json.loads(line) for line in (run_dir / run_folder.LOG).read_text().splitlines()]
        counted = [entry for entry in entries if "rows_per_second" in entry and entry["step"] > self.warmup]
        medians = {name: statistics.median(entry[name] for entry in counted) for name in MEASURED if name in counted[0]}
        environment = json.loads((run_dir / run_folder.ENVIRONMENT).read_text())
        metrics = json.loads((run_dir / run_folder.METRICS).read_text())
        return {
            "processes": processes,
            "steps": self.steps,
            "counted_logs": len(counted),
            **medians,
            "train_runtime": metrics["train_runtime"],
            "final_loss": counted[-1]["loss"],
            "devices": environment["devices"][:processes],
            "versions": environment["versions"],
            "world": environment["world"],
            "recipe_keys": list(self.recipe_keys),
        }

    def command(self, processes: int, run_dir: Path) -> list[str]:
        """The command line of one run."""
        config = self.launcher_config if processes > 1 else self.launcher_config.with_name("single_gpu.yaml")
        accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
        launch = [*accelerate, "--config_file", str(config), "--num_processes", str(processes)]
        keys: dict[str, Any] = {
            "recipe": self.recipe,
            "model_name_or_path": self.model_dir,
            "output_dir": run_dir,
            "max_steps": self.steps,
            "logging_steps": 5,
            "eval_strategy": "no",
            "predict_with_generate": "false",
            "load_best_model_at_end": "false",
            "save_strategy": "no",
            "report_to": "none",
        }
        words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
        return [*launch, str(SCRIPT), *words, *self.recipe_keys]


def format_table(results: list[dict[str, Any]]) -> str:
    """Results as a Markdown table; a column without any value is left out."""
    columns = {name: style for name, style in COLUMNS.items() if any(name in result for result in results)}
    lines = ["| " + " | ".join(label for label, _ in columns.values()) + " |", "|" + " ---: |" * len(columns)]
    for result in results:
        cells = [style.format(result[name]) if name in result else "" for name, (_, style) in columns.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_results(folder: Path, results: list[dict[str, Any]]) -> None:
    """Write results.json and results.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(format_table(results) + "\n", encoding="utf-8")
