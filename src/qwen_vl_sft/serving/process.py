"""The process of an engine: its worker in the engine's own environment, asked in lines of JSON."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from qwen_vl_sft.errors import shortened
from qwen_vl_sft.serving.base import WORKERS, EngineAnswer, EnginePrompt, Served, ServingEngine

# Rows that an engine is asked at once.
ROWS_AT_ONCE = 16
# Seconds that a worker has to end by itself.
_END_SECONDS = 30
# Of the environment of this process: they would lead the worker to this package's libraries, or have it reach the Hub.
_NOT_PASSED_ON = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")


class EngineRefused(Exception):
    """The engine does not take this model or adapter; the message is the engine's own."""


class EngineFailed(Exception):
    """The engine ended, or could not answer, for another reason than the model."""


class EngineProcess:
    """An engine that serves a model, from the first line to its end.

    Args:
        engine: the engine.
        python: the Python of its environment.
        served: the model, and its adapter.
        arguments: all options of the engine.
        log: the file that takes what the engine prints.

    Raises `EngineRefused` or `EngineFailed` where it does not start.
    """

    def __init__(
        self, engine: ServingEngine, python: Path, served: Served, arguments: Sequence[str], log: Path
    ) -> None:
        self.log = log
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [str(python), str(WORKERS / engine.worker)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env={**environment, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
                text=True,
                encoding="utf-8",
                start_new_session=True,
            )
        adapter = str(served.adapter) if served.adapter else None
        try:
            reply = self._ask({"model": str(served.model), "adapter": adapter, "arguments": list(arguments)})
        except BaseException:
            self.close()
            raise
        self.versions: dict[str, str] = reply["ready"]

    def answer(
        self, prompts: Sequence[EnginePrompt], with_adapter: bool, max_new_tokens: int, template_options: dict[str, Any]
    ) -> list[EngineAnswer]:
        """Answer prompts greedily, with the adapter or without. Raises `EngineRefused` or `EngineFailed`."""
        reply = self._ask(
            {
                "prompts": [asdict(prompt) for prompt in prompts],
                "with_adapter": with_adapter,
                "max_new_tokens": max_new_tokens,
                "template_options": template_options,
            }
        )
        return [EngineAnswer(**answer) for answer in reply["answers"]]

    def close(self) -> None:
        """End the worker and what it started."""
        assert self._process.stdin
        try:
            self._process.stdin.close()
            self._process.wait(timeout=_END_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            pass
        finally:
            _kill_group(self._process)
            assert self._process.stdout
            self._process.stdout.close()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise EngineFailed(
                f"it ended with exit code {code}: {shortened(last_line(self.log))} (all of it: {self.log})"
            )
        reply: dict[str, Any] = json.loads(line)
        if "refused" in reply:
            raise EngineRefused(shortened(reply["refused"]))
        if "failed" in reply:
            raise EngineFailed(f"{shortened(reply['failed'])} (all of it: {self.log})")
        return reply


def answer_all(
    engine: EngineProcess,
    prompts: Sequence[EnginePrompt],
    with_adapter: bool,
    max_new_tokens: int,
    template_options: dict[str, Any],
    title: str,
) -> dict[int, EngineAnswer]:
    """Answer prompts, some at once, with a progress bar of that title; return the answers by number."""
    answers: dict[int, EngineAnswer] = {}
    with tqdm(total=len(prompts), desc=title, unit="row") as progress:
        for start in range(0, len(prompts), ROWS_AT_ONCE):
            batch = prompts[start : start + ROWS_AT_ONCE]
            for answer in engine.answer(batch, with_adapter, max_new_tokens, template_options):
                answers[answer.number] = answer
            progress.update(len(batch))
    return answers


def last_line(log: Path) -> str:
    """Return the last line of a log that says something; empty where there is none."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _kill_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
