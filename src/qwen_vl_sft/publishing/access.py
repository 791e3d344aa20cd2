"""Access to the Hub: check what the token may do, and explain the client's errors. No text here contains the token."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from huggingface_hub import HfApi, get_token, is_offline_mode, logging
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError

from qwen_vl_sft.errors import UserError
from qwen_vl_sft.publishing.names import problem_of_branch, problem_of_repo_id

# What the client raises: its own errors, those of the connection, and those of the Xet library.
HUB_ERRORS: tuple[type[Exception], ...] = (HTTPError, OSError, RuntimeError, ValueError)
MAIN = "main"
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
_TOKENS = "https://huggingface.co/settings/tokens"
_ANY_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9_]{4,}|(?i:bearer)\s+\S+")
_WRITING_ROLES = ("admin", "write", "contributor")


@dataclass(frozen=True)
class Target:
    """Where to publish: a repository, and on it main, a branch, or a new pull request."""

    repo_id: str
    private: bool = True
    branch: str | None = None
    create_pr: bool = False

    @property
    def revision(self) -> str:
        """Return the branch to write, or the base of the pull request."""
        return self.branch or MAIN


@dataclass(frozen=True)
class Access:
    """A target that this token may write to. `exists` and `private` are as found on the Hub."""

    api: HfApi
    target: Target
    user: str
    exists: bool
    private: bool

    @property
    def url(self) -> str:
        """Return the address of the repository's page."""
        return f"{self.api.endpoint}/{self.target.repo_id}"


def check_access(target: Target) -> Access:
    """Ask the Hub whether this token may write to `target`; writes nothing. Raises `UserError` with the way out."""
    problem = problem_of_repo_id(target.repo_id) or (target.branch and problem_of_branch(target.branch))
    if problem:
        raise UserError(f"push: {problem}")
    if is_offline_mode():
        raise UserError("push: HF_HUB_OFFLINE is set, so the Hub cannot be reached; unset it, or leave out the push")
    token = get_token()
    if not token:
        raise UserError(f"push: there is no token for the Hub; {_LOGIN}, with a token that may write ({_TOKENS})")
    # Its warnings about repeated requests show addresses that are secrets for a while.
    logging.set_verbosity_error()
    api = HfApi(token=token)
    try:
        identity = api.whoami()
    except HUB_ERRORS as error:
        raise UserError(f"push: {explain(error, api.endpoint)}") from None
    user = str(identity["name"])
    if "/" not in target.repo_id:
        target = replace(target, repo_id=f"{user}/{target.repo_id}")
    info = _repository(api, target)
    _check_token(identity, target, exists=info is not None)
    if info is None:
        _check_namespace(identity, target)
        return Access(api, target, user, exists=False, private=target.private)
    if target.private and not info.private:
        raise UserError(
            f"push: {target.repo_id} exists and is public, but you asked for a private one; its visibility is not changed"
            f" here. Publish to it openly with --public (hub_private_repo: false), make it private on its settings page,"
            f" or name another repository"
        )
    if not target.private and info.private:
        raise UserError(
            f"push: {target.repo_id} exists and is private, but you asked for a public one; its visibility is not changed"
            f" here. Leave --public (hub_private_repo: false) out, or make it public on its settings page first"
        )
    if not target.create_pr:
        _check_write(api, target, user)
    return Access(api, target, user, exists=True, private=bool(info.private))


def explain(error: Exception, where: str) -> str:
    """Explain a failure in one line, with the way out. `where` names the repository or endpoint."""
    if not isinstance(error, HfHubHTTPError):
        if isinstance(error, ValueError) and not isinstance(error, OSError):
            return f"{where}: {redact(str(error))}"
        if isinstance(error, OSError) and error.filename:
            return f"{where}: {error.filename} cannot be read ({error.strerror})"
        return f"{where}: the connection failed ({redact(_first_line(error))}); check the network"
    status = error.response.status_code
    message = redact(error.server_message or error.response.headers.get("X-Error-Message") or "")
    answer = f"{status}: {message}" if message else str(status)
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return f"{where}: the Hub does not know this token ({answer}); {_LOGIN} (HF_TOKEN wins over the login)"
    if status in (401, 404):
        return f"{where}: not found, or not visible to this token ({answer}); check the name and the token's account"
    if status == 403:
        return f"{where}: this token may not do that ({answer}); use one with write access to it ({_TOKENS})"
    if status in (409, 412):
        return f"{where}: somebody else has changed the repository meanwhile ({answer})"
    if status == 429:
        return f"{where}: too many requests for the Hub's limits ({answer}); wait a little"
    if status >= 500:
        return f"{where}: the Hub failed ({answer}); try again later"
    return f"{where}: the Hub refused it ({answer})"


def redact(text: str) -> str:
    """Return the text in one line, with everything masked that is, or looks like, a token."""
    token = get_token()
    text = " ".join(text.split())
    return _ANY_TOKEN.sub("***", text.replace(token, "***") if token else text)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:200] if lines else type(error).__name__


def _repository(api: HfApi, target: Target) -> Any:
    """Return the Hub's record of the repository, or None if this token sees none."""
    try:
        return api.model_info(target.repo_id)
    except RepositoryNotFoundError:
        return None
    except HUB_ERRORS as error:
        raise UserError(f"push: {explain(error, target.repo_id)}") from None


def _check_token(identity: dict[str, Any], target: Target, exists: bool) -> None:
    token = (identity.get("auth") or {}).get("accessToken") or {}
    name = f"the token {token['displayName']!r}" if token.get("displayName") else "the token"
    if token.get("role") == "read":
        raise UserError(
            f"push: {name} of {identity['name']} may only read, so {target.repo_id} cannot be written; make one that may"
            f" write ({_TOKENS}), then {_LOGIN}"
        )
    if token.get("role") != "fineGrained" or target.create_pr:
        return
    owner = target.repo_id.split("/")[0]
    allowed = set()
    for scope in (token.get("fineGrained") or {}).get("scoped") or []:
        entity = scope.get("entity") or {}
        # A scope of a single repository may come without its name; whether it is this one, `auth_check` tells.
        unnamed = entity.get("type") == "model" and not entity.get("name")
        if entity.get("name") in (owner, target.repo_id) or (unnamed and exists):
            allowed |= set(scope.get("permissions") or [])
    if "repo.write" not in allowed:
        raise UserError(
            f"push: {name} of {identity['name']} is fine-grained and may not write to {target.repo_id}; give it write access"
            f" to the repositories of {owner} ({_TOKENS})"
        )


def _check_namespace(identity: dict[str, Any], target: Target) -> None:
    owner = target.repo_id.split("/")[0]
    roles = {org["name"]: org.get("roleInOrg") for org in identity.get("orgs") or []}
    if owner == identity["name"]:
        return
    if owner not in roles:
        raise UserError(
            f"push: {target.repo_id} does not exist, or is not visible to {identity['name']}, who may not make it: {owner}"
            f" is another account. Name {identity['name']}/{target.repo_id.split('/')[1]}, or join {owner} first"
        )
    if roles[owner] is not None and roles[owner] not in _WRITING_ROLES:
        raise UserError(
            f"push: {identity['name']} is in {owner} as {roles[owner]}, which may not make {target.repo_id}; ask for the"
            f" role of a contributor, or name a repository of your own"
        )


def _check_write(api: HfApi, target: Target, user: str) -> None:
    try:
        api.auth_check(target.repo_id, write=True)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise UserError(
                f"push: {user} may not write to {target.repo_id}; use a token of an account that may, offer it with"
                f" --create_pr, or name a repository of your own"
            ) from None
        raise UserError(f"push: {explain(error, target.repo_id)}") from None
    except HUB_ERRORS as error:
        raise UserError(f"push: {explain(error, target.repo_id)}") from None
