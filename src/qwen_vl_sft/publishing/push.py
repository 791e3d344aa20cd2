"""Push a model to the Hub in one commit, and check that the files there equal the local ones.

Files that are on the Hub already are not sent, so an interrupted push continues where it stopped, and a push of
unchanged files makes no commit. Files from our previous push that are now obsolete are deleted in the same commit. After
every commit, and after every failure, size and digest of each file on the Hub are compared with the local ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from qwen_vl_sft.errors import UserError
from qwen_vl_sft.publishing.access import HUB_ERRORS, MAIN, Access, explain
from qwen_vl_sft.publishing.comparison import differences, listed_files, stale_files
from qwen_vl_sft.publishing.files import PublishedFile

AGAIN = "push again: what has arrived is not sent twice"


@dataclass(frozen=True)
class Outcome:
    """A finished push: its page and commit, the number of files compared and sent, and the files removed."""

    url: str
    revision: str
    commit: str
    files: int
    sent: int
    removed: tuple[str, ...]
    private: bool


def push(access: Access, files: Sequence[PublishedFile], title: str) -> Outcome:
    """Create repository and branch if needed, commit the differences, and verify. Raises `UserError`."""
    target = access.target
    where = f"{target.repo_id}, {target.revision}"
    with nothing_committed(where):
        _prepare(access)
        head = _head(access, target.revision)
        differing = differences(access, files, head)
        on_hub = _paths(access, head)
        listed = listed_files(access, on_hub, head)
        all_on_main = target.branch is not None and head == _head(access, MAIN)
    gone = stale_files(on_hub, listed, [file.path for file in files], where, all_on_main)
    if not differing and not gone:
        return _verified(access, files, head)
    if target.create_pr:
        with nothing_committed(where):
            pull_request = _open_pull_request(access, files)
        if pull_request:
            return _verified(access, files, pull_request)
    sent = [file for file in files if file.path in differing]
    operations = [_addition(file) for file in sent] + [CommitOperationDelete(path) for path in gone]
    try:
        commit = access.api.create_commit(
            target.repo_id,
            operations,
            commit_message=title,
            commit_description=f"Removed: {', '.join(gone)}." if gone else None,
            revision=target.revision,
            create_pr=target.create_pr,
            # Refused if somebody else has committed since the comparison.
            parent_commit=head,
        )
        revision = commit.pr_revision or commit.oid
    except HUB_ERRORS as error:
        revision = _committed_after_all(access, files, head, where, error)
    return _verified(access, files, revision, len(sent), tuple(gone))


def format_outcome(outcome: Outcome) -> str:
    """Format the last lines of a push."""
    visibility = "private" if outcome.private else "public"
    commit_made = outcome.sent or outcome.removed
    sent = f"{outcome.sent} sent now" if commit_made else "all were there already, so no commit was made"
    removed = f"removed     {len(outcome.removed)} file(s): {', '.join(outcome.removed)}"
    return "\n".join(
        [
            f"published   {outcome.url} ({visibility})",
            f"commit      {outcome.commit} on {outcome.revision}",
            *([removed] if outcome.removed else []),
            f"compared    {outcome.files} files on the Hub equal the local ones ({sent})",
        ]
    )


@contextlib.contextmanager
def nothing_committed(where: str) -> Iterator[None]:
    """Turn the client's errors before the commit into a `UserError`."""
    try:
        yield
    except HUB_ERRORS as error:
        raise UserError(f"push: {explain(error, where)}. Nothing was committed; {AGAIN}") from None


def _prepare(access: Access) -> None:
    target = access.target
    if not access.exists:
        access.api.create_repo(target.repo_id, private=target.private, exist_ok=True)
    if target.branch:
        access.api.create_branch(target.repo_id, branch=target.branch, exist_ok=True)


def _head(access: Access, revision: str) -> str:
    commit = access.api.model_info(access.target.repo_id, revision=revision).sha
    assert commit
    return commit


def _paths(access: Access, revision: str) -> list[str]:
    tree = access.api.list_repo_tree(access.target.repo_id, recursive=True, revision=revision)
    return [entry.path for entry in tree if hasattr(entry, "blob_id")]


def _addition(file: PublishedFile) -> CommitOperationAdd:
    return CommitOperationAdd(file.path, file.content if isinstance(file.content, bytes) else str(file.content))


def _open_pull_request(access: Access, files: Sequence[PublishedFile]) -> str | None:
    """Return the revision of this user's open pull request with exactly these files, or None."""
    discussions = access.api.get_repo_discussions(
        access.target.repo_id, author=access.user, discussion_type="pull_request", discussion_status="open"
    )
    for discussion in discussions:
        revision = f"refs/pr/{discussion.num}"
        if not differences(access, files, revision):
            return revision
    return None


def _committed_after_all(
    access: Access, files: Sequence[PublishedFile], head: str, where: str, error: Exception
) -> str:
    """Return the revision of a commit whose reply was lost. Raises `UserError` with the first failure if there is none."""
    failure = f"push: {explain(error, where)}"
    try:
        if access.target.create_pr:
            revision = _open_pull_request(access, files)
            moved = False
        else:
            revision = _head(access, access.target.revision)
            moved = revision != head
            if not moved or differences(access, files, revision):
                revision = None
    except HUB_ERRORS:
        raise UserError(f"{failure}. Cannot tell whether it was committed; {AGAIN}") from None
    if revision is None:
        left = "somebody else committed meanwhile" if moved else "Nothing was committed"
        raise UserError(f"{failure}. {left}; {AGAIN}") from None
    return revision


def _verified(
    access: Access, files: Sequence[PublishedFile], revision: str, sent: int = 0, removed: tuple[str, ...] = ()
) -> Outcome:
    """Compare every file with the Hub's. Raises `UserError` naming those that differ."""
    target = access.target
    try:
        info = access.api.model_info(target.repo_id, revision=revision)
        wrong = differences(access, files, revision)
    except HUB_ERRORS as error:
        raise UserError(
            f"push: {explain(error, target.repo_id)}. The files were committed but not compared; {AGAIN}"
        ) from None
    if wrong:
        first = "; ".join(f"{path}: {reason}" for path, reason in list(wrong.items())[:5])
        raise UserError(
            f"push: {target.repo_id} at {revision} does not hold what is here: {len(wrong)} of {len(files)} files differ"
            f" ({first}). Do not use that revision; {AGAIN}"
        )
    is_request = revision.startswith("refs/pr/")
    url = f"{access.url}/discussions/{revision.rpartition('/')[2]}" if is_request else access.url
    if target.revision != MAIN:
        url = f"{access.url}/tree/{target.revision}"
    shown = revision if is_request else target.revision
    return Outcome(url, shown, str(info.sha), len(files), sent, removed, private=bool(info.private))
