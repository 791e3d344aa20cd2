"""What `scripts/push.py` is asked for, and how it is carried out: read, make the card, check the rights, push."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_vl_sft.errors import raise_all
from qwen_vl_sft.publishing.names import problem_of_branch, problem_of_repo_id

if TYPE_CHECKING:
    from qwen_vl_sft.publishing.access import Target

# As the Hub writes them: https://huggingface.co/docs/hub/repositories-licenses
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True)
class Options:
    """The command line."""

    run: Path
    repo_id: str
    branch: str | None = None
    create_pr: bool = False
    public: bool = False
    model: Path | None = None
    evaluation: Path | None = None
    base_model: str | None = None
    license: str | None = None
    keep_card: bool = False
    dry_run: bool = False

    @property
    def target(self) -> Target:
        """Where to publish."""
        from qwen_vl_sft.publishing.access import Target

        branch = None if self.branch == "main" else self.branch
        return Target(self.repo_id, private=not self.public, branch=branch, create_pr=self.create_pr)


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line. Wrong keys and values end in argparse's message, exit code 2."""
    parser = argparse.ArgumentParser(
        prog="push.py",
        description="Publish a run's adapter or full model, or a merged model, with a card made from the run's files.",
        epilog="The token is that of `hf auth login` or HF_TOKEN; it is never printed or stored.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--run", type=Path, required=True, help="run folder of scripts/sft.py, a checkpoint in it, or a merged model")
    add("--repo_id", required=True, help="user/name or organization/name; a name alone is yours. Made if missing")
    add("--branch", help="branch to write, made if missing (default: main)")
    add("--create_pr", action="store_true", help="offer the files as a pull request instead of committing them")
    add("--public", action="store_true", help="a new repository is public; without it, private")
    add("--model", type=Path, help="folder of scripts/merge.py, published instead of the run's adapter")
    add("--evaluation", type=Path, help="folder of scripts/evaluate.py (default: evaluation in the run)")
    add("--base_model", help="Hub id of the base model, for a run that was started from a local folder")
    add("--license", help="licence of the model, as the Hub writes it, e.g. apache-2.0; default: the base model's")
    add("--keep_card", action="store_true", help="leave the README.md that is on the Hub as it is")
    add("--dry_run", action="store_true", help="print the files and the card, and stop; asks the Hub nothing")
    return Options(**vars(parser.parse_args(arguments)))


def check_options(options: Options) -> None:
    """Raise `UserError` with everything that cannot be meant, before anything is read or sent."""
    problems = []
    if problem := problem_of_repo_id(options.repo_id):
        problems.append(f"--repo_id: {problem}")
    if options.branch and (problem := problem_of_branch(options.branch)):
        problems.append(f"--branch: {problem}")
    if options.branch and options.create_pr:
        problems.append("--branch and --create_pr exclude each other: the Hub opens pull requests against main only")
    if options.license and not _LICENCE.fullmatch(options.license):
        problems.append(f"--license: {options.license!r} is not a licence as the Hub writes it, such as apache-2.0")
    raise_all(problems)


def run_push(options: Options) -> str:
    """Publish, or with --dry_run describe it; returns what to print. Raises `UserError`."""
    from qwen_vl_sft.publishing.publication import read_publication
    from qwen_vl_sft.publishing.publishing import describe, publish

    publication = read_publication(options.run, options.model, options.evaluation, options.base_model)
    licence = {"license": options.license} if options.license else None
    if options.dry_run:
        return describe(publication, options.target, licence)

    from qwen_vl_sft.publishing.access import check_access
    from qwen_vl_sft.publishing.push import format_outcome

    access = check_access(options.target)
    return format_outcome(publish(publication, access, licence, keep_card=options.keep_card))
