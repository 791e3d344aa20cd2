"""What the tests of publishing share: the stand-in for the Hub, a process that talks to it, and run folders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import REPOSITORY

from qwen_vl_sft import tiny
from qwen_vl_sft.evaluation.scoring import Question, score_row, summarise
from qwen_vl_sft.modeling.base_model import load_model
from qwen_vl_sft.recipe.reading import read_recipe
from qwen_vl_sft.recipe.settings import ModelSettings

WRITER, READER, SCOPED, OTHER = "hf_aliceWritesHere", "hf_aliceReadsHere", "hf_aliceScopedLab", "hf_bobWritesHere"
PROCESSOR_FILES = ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass
class Hub:
    """The running stand-in."""

    address: str

    def faults(self, *faults: Mapping[str, Any]) -> None:
        """Set the faults of the next requests, none to have none, and forget the log."""
        self.control({"faults": list(faults)})

    def tamper(self, path: str) -> None:
        """Change a file behind everybody's back."""
        self.control({"tamper": path})

    def control(self, asked: Mapping[str, Any]) -> None:
        request = urllib.request.Request(f"{self.address}/_control", json.dumps(asked).encode(), method="POST")
        urllib.request.urlopen(request).read()

    def log(self) -> list[str]:
        """`METHOD path status` of each request since the last look."""
        with urllib.request.urlopen(f"{self.address}/_control") as reply:
            return [f"{entry['method']} {entry['path']} {entry['status']}" for entry in json.load(reply)]

    def get(self, path: str, token: str | None = WRITER) -> bytes:
        """What a request for `path` answers. Raises `urllib.error.HTTPError`."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with urllib.request.urlopen(urllib.request.Request(self.address + path, headers=headers)) as reply:
            return reply.read()

    def files(self, repo: str, revision: str = "main") -> dict[str, dict[str, Any]]:
        tree = json.loads(self.get(f"/api/models/{repo}/tree/{revision}"))
        return {entry["path"]: entry for entry in tree}

    def messages(self, repo: str) -> list[str]:
        return [commit["message"] for commit in json.loads(self.get(f"/api/models/{repo}/commits/main"))]

    def titles(self, repo: str, revision: str = "main") -> list[str]:
        return [commit["title"] for commit in json.loads(self.get(f"/api/models/{repo}/commits/{revision}"))]


@dataclass
class Printed:
    """How a call ended."""

    code: int
    out: str
    err: str


class Worker:
    """tests/push_worker.py with an environment of its own."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env
        self.process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "tests/push_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
        )

    def push(self, run: Path, *words: str | Path, token: str = WRITER) -> Printed:
        """scripts/push.py on a run."""
        asked = ["--run", str(run), *map(str, words)]
        return self._ask({"script": "scripts/push.py", "words": asked}, token)

    def code(self, text: str, folder: Path, token: str = WRITER) -> Printed:
        """Run a Python program in `folder`."""
        return self._ask({"code": text, "folder": str(folder)}, token)

    def _ask(self, asked: dict[str, Any], token: str) -> Printed:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(asked | {"env": {"HF_TOKEN": token}}) + "\n")
        self.process.stdin.flush()
        return Printed(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=60)


def start_hub(store: Path) -> Iterator[Hub]:
    """The stand-in on a free port, ended at the end."""
    command = [sys.executable, str(REPOSITORY / "tests/hub_server.py"), str(store)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        yield Hub(process.stdout.readline().strip())
    finally:
        process.kill()
        process.wait()


def hub_environment(hub: Hub, home: Path, xet: bool) -> dict[str, str]:
    """The environment of a process that takes the stand-in for the Hub."""
    return {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(home),
        "HF_TOKEN": WRITER,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "0" if xet else "1",
        "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
    }


def write_run(folder: Path, seed: int = 0, **recipe: Any) -> Path:
    """A finished run of the embedded model, with an adapter of random, non-zero matrices."""
    from peft import LoraConfig, get_peft_model

    model = load_model(ModelSettings(model_name_or_path=str(tiny.MODEL_DIR), dtype="float32"), on_cpu=True)
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    adapted.save_pretrained(folder)
    write_companions(folder, **recipe)
    return folder


def write_companions(folder: Path, **recipe: Any) -> None:
    """All of a run but its weights; checkpoints, logs and a pickle lie there too, as in a real one."""
    for name in PROCESSOR_FILES:
        shutil.copy(tiny.MODEL_DIR / name, folder)
    keys = {
        "model_name_or_path": str(tiny.MODEL_DIR),
        "dtype": "float32",
        "dataset_name": str(tiny.DATA_DIR),
        "output_dir": str(folder),
        "lora_r": 4,
        "use_cpu": True,
        **recipe,
    }
    keys = {name: value for name, value in keys.items() if value is not None}
    (folder / "recipe.yaml").write_text(read_recipe(None, keys).to_yaml())
    (folder / "system_message.txt").write_text("Answer with one word.")
    data = {"train": {"source": f"{tiny.DATA_DIR} [train]", "rows": 48, "fingerprint": "abc"}}
    metrics = {
        "train_loss": 1.25,
        "train_runtime": 60.0,
        "steps": 3,
        "epochs": 1.0,
        "best_checkpoint": str(folder / "checkpoint-2"),
        "work": {"tokens": 7510, "learned": 96},
        "data": data,
        "parameters": {"language": {"total": 9, "trainable": 1024}},
        "push": {"failed": "of this folder only"},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    environment = {
        "versions": {"torch": "2.11.0"},
        "python": "3.11.7",
        "devices": [],
        "git_commit": "9866634e",
        "command": ["sft.py", "--output_dir", str(folder)],
        "world": {"strategy": "single", "processes": 1},
        "data": data,
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "training_log.jsonl").write_text('{"loss": 1.25, "step": 3}\n')
    (folder / "loss.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (folder / "training_args.bin").write_bytes(b"\x80pickle")
    (folder / "checkpoint-2").mkdir(exist_ok=True)
    (folder / "checkpoint-2/optimizer.pt").write_bytes(b"\x80pickle")


def write_evaluation(
    folder: Path, run: Path, weights: Sequence[Path], dataset: str, rows: int = 20, **settings: Any
) -> Path:
    """A summary as scripts/evaluate.py writes it, in which the tuned model is right more often.

    `settings` win over those of the run.
    """
    model = read_recipe(run / "recipe.yaml", {}).model
    size = json.loads((run / "processor_config.json").read_text())["image_processor"]["size"]
    scored = []
    for row_id in range(rows):
        question = Question(row_id, "Which color?", ["red"], "human" if row_id % 2 else "machine")
        answers = {"base": "It is red.", "prompted": "red" if row_id < 8 else "blue", "tuned": "red" if row_id else "5"}
        scored.append(score_row(question, answers))
    stats = [[file.name, file.stat().st_size, int(file.stat().st_mtime)] for file in weights]
    summary = summarise(scored, ["base", "prompted", "tuned"]) | {
        "dataset": f"{dataset} [val]",
        "settings": {
            "run": str(run),
            "run_weights": stats,
            "dataset_config": None,
            "model_name_or_path": model.model_name_or_path,
            "model_revision": model.model_revision,
            "system_message": (run / "system_message.txt").read_text(),
            "min_pixels": size["shortest_edge"],
            "max_pixels": size["longest_edge"],
            **settings,
        },
        "precision": {"scored": "float32", "trained": "float32", "scored_as_trained": True},
        "environment": {"command": ["evaluate.py", "--run", str(run)], "devices": ["cpu"]},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder
