"""Command-line options of push.py, and the push that they describe."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_vl_sft.config.command_line import REQUIRED, option
from qwen_vl_sft.errors import quoted, raise_all
from qwen_vl_sft.publishing.names import problem_of_branch, problem_of_repo_id

if TYPE_CHECKING:
    from qwen_vl_sft.publishing.access import Target

# As the Hub writes them: https://huggingface.co/docs/hub/repositories-licenses
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True)
class PushOptions:
    """Command-line options of push.py."""

    run: Path = option(
        REQUIRED, "run folder of scripts/sft.py, a checkpoint in it, or a merged model", metavar="folder"
    )
    repo_id: str = option(
        REQUIRED, "user/name or organization/name; a name alone is yours. Created if missing", metavar="name"
    )
    branch: str | None = option(None, "branch to write, made if missing; default: main")
    create_pr: bool = option(False, "offer the files as a pull request instead of committing them")
    public: bool = option(False, "make a new repository public; without it, private")
    model: Path | None = option(
        None, "folder of scripts/merge.py, published instead of the run's adapter", metavar="folder"
    )
    evaluation: Path | None = option(
        None, "folder of scripts/evaluate.py; default: evaluation in the run", metavar="folder"
    )
    base_model: str | None = option(None, "Hub id of the base model, for a run that was started from a local folder")
    license: str | None = option(
        None, "licence of the model, as the Hub writes it, e.g. apache-2.0; default: the base model's"
    )
    keep_card: bool = option(False, "leave the README.md that is on the Hub as it is")
    dry_run: bool = option(False, "print the files and the card, and stop; contacts no server")

    @property
    def target(self) -> Target:
        """Return the repository and branch to publish to."""
        from qwen_vl_sft.publishing.access import Target

        branch = None if self.branch == "main" else self.branch
        return Target(self.repo_id, private=not self.public, branch=branch, create_pr=self.create_pr)


def check_options(options: PushOptions) -> None:
    """Raise `UserError` with every problem of the options, before anything is read or sent."""
    problems = []
    if problem := problem_of_repo_id(options.repo_id):
        problems.append(f"--repo_id: {problem}")
    if options.branch and (problem := problem_of_branch(options.branch)):
        problems.append(f"--branch: {problem}")
    if options.branch and options.create_pr:
        problems.append("--branch and --create_pr exclude each other: the Hub opens pull requests against main only")
    if options.license and not _LICENCE.fullmatch(options.license):
        problems.append(
            f"--license: {quoted(options.license)} is not a licence as the Hub writes it, such as apache-2.0"
        )
    raise_all(problems)


def run_push(options: PushOptions) -> str:
    """Publish, or with --dry_run describe what would be; return the text to print. Raises `UserError`."""
    from qwen_vl_sft.publishing.publish import describe, publish
    from qwen_vl_sft.publishing.published_model import read_published_model

    published = read_published_model(options.run, options.model, options.evaluation, options.base_model)
    licence = {"license": options.license} if options.license else None
    if options.dry_run:
        return describe(published, options.target, licence)

    from qwen_vl_sft.publishing.access import check_access
    from qwen_vl_sft.publishing.push import format_outcome

    access = check_access(options.target)
    return format_outcome(publish(published, access, licence, keep_card=options.keep_card))
