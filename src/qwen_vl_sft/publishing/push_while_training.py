"""`push_to_hub` of a recipe: check the rights, push checkpoints in the background, then the finished run.

The Trainer's own `push_to_hub` is never used: it uploads the whole folder, and a push of its that fails is not reported.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from transformers import TrainerCallback

from qwen_vl_sft.checkpointing.run_folder import ENVIRONMENT, METRICS, RECIPE, SYSTEM_MESSAGE
from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.publishing.access import Access, Target, check_access, redact
from qwen_vl_sft.publishing.publish import publish
from qwen_vl_sft.publishing.published_model import read_published_model
from qwen_vl_sft.publishing.push import Outcome, format_outcome

_STAGE = ".pushing"
_STATE = ("optimizer", "scheduler", "rng_state", "training_args", "global_step", "trainer_state", "complete.json")
_NOT_PUBLISHED = (*_STATE, "README")


def prepare(recipe: Recipe, context: DistributedContext) -> PushWhileTraining | None:
    """Check the rights and return the publisher, on the first process of a run that publishes. Raises `UserError`.

    The other processes go on, and are stopped by the launcher when the first one ends here.
    """
    if not recipe.run.push_to_hub or context.rank != 0:
        return None
    return PushWhileTraining(recipe, check_access(target_of(recipe)))


def target_of(recipe: Recipe) -> Target:
    """Return the repository and branch that a recipe publishes to."""
    run = recipe.run
    branch = None if run.hub_revision == "main" else run.hub_revision
    return Target(run.hub_model_id or recipe.output_dir.name, private=run.hub_private_repo, branch=branch)


class PushWhileTraining(TrainerCallback):
    """Publishes each saved checkpoint in the background if asked to, and the finished run; no failure stops training."""

    def __init__(self, recipe: Recipe, access: Access) -> None:
        self.folder, self.access = recipe.output_dir, access
        self.every_save = recipe.run.hub_strategy == "every_save"
        self.always = recipe.run.hub_always_push
        self.started: dict[int, Future[Outcome]] = {}
        self.skipped: list[int] = []
        if self.every_save:
            # They would write over training's own bar.
            disable_progress_bars()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Publish the complete checkpoint in the background; skip it while another is being sent, as the Trainer does."""
        if not self.every_save:
            return
        if not self.always and any(not future.done() for future in self.started.values()):
            self.skipped.append(state.global_step)
            return
        checkpoint = self.folder / f"checkpoint-{state.global_step}"
        try:
            staged = self._stage(checkpoint)
        except OSError as error:
            failed: Future[Outcome] = Future()
            failed.set_exception(error)
            self.started[state.global_step] = failed
            return
        self.started[state.global_step] = self.access.api.run_as_future(self._publish_staged, staged)

    def finish(self) -> None:
        """Wait for uploads, publish the finished run, and report both. Raises `UserError` if that fails.

        Call it when the run folder is complete and no process waits for this one.
        """
        background = self._wait()
        for step, reason in background["failed"].items():
            print(f"warning: the push of step {step} while training failed: {reason}", file=sys.stderr, flush=True)
        if self.every_save and constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
            enable_progress_bars()
        repo_id = self.access.target.repo_id
        try:
            outcome = publish(read_published_model(self.folder), self.access)
        except UserError as error:
            self._record({"repo_id": repo_id, "failed": str(error), "while_training": background})
            words = ["python", "scripts/push.py", "--run", str(self.folder), "--repo_id", repo_id]
            words += ["--branch", self.access.target.branch] if self.access.target.branch else []
            words += [] if self.access.target.private else ["--public"]
            raise UserError(
                f"training has finished and {self.folder} is complete, but it could not be published. {error}. To publish"
                f" it: {shlex.join(words)}"
            ) from None
        self._record({"repo_id": repo_id, "commit": outcome.commit, "while_training": background})
        print(format_outcome(outcome), flush=True)
        if self.started or self.skipped:
            done = len(self.started) - len(background["failed"])
            left_out = f", {len(self.skipped)} left out while another was being sent" if self.skipped else ""
            print(f"checkpoints {done} of {len(self.started)} published while training{left_out}", flush=True)

    def _stage(self, checkpoint: Path) -> Path:
        """Link the checkpoint's files into a second folder, so that rotation cannot delete them meanwhile."""
        stage = self.folder / _STAGE
        staged = stage / checkpoint.name
        staged.mkdir(parents=True, exist_ok=True)
        for name in (RECIPE, SYSTEM_MESSAGE, ENVIRONMENT):
            if not (stage / name).exists():
                shutil.copyfile(self.folder / name, stage / name)
        for file in checkpoint.iterdir():
            if file.is_file() and not file.name.startswith(_NOT_PUBLISHED):
                _link(file, staged / file.name)
        return staged

    def _publish_staged(self, staged: Path) -> Outcome:
        try:
            return publish(read_published_model(staged), self.access)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _wait(self) -> dict[str, Any]:
        """Wait for all pushes; return the published steps, and the failed ones with the reason."""
        waiting = sum(not future.done() for future in self.started.values())
        if waiting:
            print(f"waiting     for {waiting} checkpoint(s) that are still being sent", flush=True)
        errors = {step: future.exception() for step, future in self.started.items()}
        shutil.rmtree(self.folder / _STAGE, ignore_errors=True)
        failed = {
            str(step): redact(str(error) or type(error).__name__).removeprefix("push: ")
            for step, error in errors.items()
            if error
        }
        published = [step for step, error in errors.items() if not error]
        return {"published": published, "failed": failed, "left_out": self.skipped}

    def _record(self, entry: dict[str, Any]) -> None:
        path = self.folder / METRICS
        metrics = json.loads(path.read_text(encoding="utf-8")) | {"push": entry}
        path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # not every file system has hard links
        shutil.copyfile(source, target)
