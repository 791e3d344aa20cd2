"""Publish a model: make its card, collect its files, push them, or describe what would be pushed."""

from __future__ import annotations

from huggingface_hub import HfApi

from qwen_vl_sft.publishing.access import HUB_ERRORS, MAIN, Access, Target
from qwen_vl_sft.publishing.card import make_card
from qwen_vl_sft.publishing.files import CARD, PublishedFile, collect_files
from qwen_vl_sft.publishing.published_model import PublishedModel
from qwen_vl_sft.publishing.push import Outcome, nothing_committed, push


def publish(
    published: PublishedModel, access: Access, licence: dict[str, str] | None = None, keep_card: bool = False
) -> Outcome:
    """Push a model with its card; with `licence` None it gets the licence of the base model's card. Raises `UserError`."""
    found = licence or licence_of_base(access.api, published)
    card = None if keep_card and _has_card(access) else _card(published, access.target, found, bool(licence))
    name = access.target.repo_id.rpartition("/")[2]
    what = f"{published.kind} at step {published.step}" if published.step else published.kind
    return push(access, collect_files(published, card), title=f"Upload {name}: {what}")


def describe(published: PublishedModel, target: Target, licence: dict[str, str] | None) -> str:
    """Describe the files with their sizes and the card, without contacting the Hub, so without the base model's licence."""
    card = _card(published, target, licence or {}, bool(licence))
    files = collect_files(published, card)
    total = sum(file.size for file in files)
    visibility = "private" if target.private else "public"
    request = " as a pull request" if target.create_pr else ""
    head = f"{len(files)} files, {_bytes(total)}, to {target.repo_id} ({visibility} if new), {target.revision}{request}"
    removed = "obsolete files from our previous push of the same kind of model are deleted there, and listed"
    return "\n".join([head, *(_line(file) for file in files), removed, "", card.rstrip()])


def licence_of_base(api: HfApi, published: PublishedModel) -> dict[str, str]:
    """Return the licence that the base model's card on the Hub states, as metadata; empty if there is none."""
    if not published.base_on_hub:
        return {}
    try:
        data = api.model_info(published.base_on_hub).card_data
    except HUB_ERRORS:
        return {}
    found = data.to_dict() if data else {}
    names = ("license", "license_name", "license_link")
    return {name: found[name] for name in names if isinstance(found.get(name), str)}


def _card(published: PublishedModel, target: Target, licence: dict[str, str], stated: bool) -> str:
    return make_card(published, target.repo_id, target.revision, licence, stated)


def _has_card(access: Access) -> bool:
    api, target, revision = access.api, access.target, access.target.revision
    if not access.exists:
        return False
    with nothing_committed(f"{target.repo_id}, {revision}"):
        if not api.revision_exists(target.repo_id, revision):
            revision = MAIN  # of which the branch will be made
        return api.file_exists(target.repo_id, CARD, revision=revision)


def _line(file: PublishedFile) -> str:
    note = "  (made for the Hub)" if isinstance(file.content, bytes) else ""
    return f"  {_bytes(file.size):>9}  {file.path}{note}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
