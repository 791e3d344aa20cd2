"""The section of the model card on engines that serve the model: a command for vLLM, and what was checked.

What scripts/serve_check.py has recorded decides: an engine is said to serve the model only where that was seen, with its
version. Without a record the command stands there with a note that it was not run.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from qwen_vl_sft.publishing.published_model import SIZE_NAMES, PublishedModel
from qwen_vl_sft.serving.base import Served
from qwen_vl_sft.serving.record import AS_TRAINED, MERGED, NF4_AWARE, form_of
from qwen_vl_sft.serving.record import FP8_AWARE as FP8_AWARE_MERGED
from qwen_vl_sft.serving.registry import ENGINES

VLLM = ENGINES["vllm"]
FP8_AWARE = "--fp8_aware"
_UNROUNDED = ", but for the rounding of its layers' inputs to FP8"
_MERGE = "Merge it first, with `scripts/merge.py` of qwen_vl_sft, and serve the merged folder in place of the base:"


def serving_lines(published: PublishedModel, repo_id: str) -> Iterator[str]:
    """Yield Markdown: how to serve the model with vLLM, and a table of what was checked with which engine."""
    served = as_served(published)
    own = own_record(published, VLLM.arguments(served))
    refused = VLLM.refuses(served)
    why_not = refused or (own and not own["proven"] and "; ".join(own["problems"]))
    if published.is_adapter and why_not:
        seen = f" That was seen with {VLLM.package} {VLLM.pinned}." if refused else ""
        yield f"vLLM does not serve this adapter on its base. {_sentence(str(why_not))}{seen}"
        yield from _merge_first(published)
    elif published.is_adapter and published.base_on_hub is None:
        yield "vLLM loads the base from the Hub, and this one is not there."
        yield from _merge_first(published)
    elif why_not:
        yield f"vLLM was checked, and does not serve it as it is. {_sentence(str(why_not))}"
    else:
        yield from _command(vllm_command(published, repo_id))
        yield ""
        yield _requests(published)
        yield ""
        yield _proof(own) if own else "This command was not run when the card was made."
        if not own and (published.adapter or {}).get("target_parameters"):
            yield ""
            yield (
                "The adapter is on every expert, as PEFT's `target_parameters`, which vLLM may not read; publish the merged"
                " model of `scripts/merge.py` for it."
            )
        yield from _other_precision(published, own)
    yield from _table(published)


def as_served(published: PublishedModel) -> Served:
    """Return what an engine has to know of the published model.

    Limits of image sizes are told to it for an adapter, which is served with the processor of its base; a whole model's own
    processor has them.
    """
    limits = {SIZE_NAMES[name]: value for name, value in published.pixel_limits.items()} if published.is_adapter else {}
    return Served(
        model=published.folder,
        dtype="",
        lora_config=published.adapter,
        changes_vision=published.changes_vision,
        limits=limits,
    )


def vllm_command(published: PublishedModel, repo_id: str) -> list[str]:
    """Return the command that serves the published model, word by word."""
    words = ["vllm", "serve"]
    if published.is_adapter:
        words += [str(published.base_on_hub)]
        words += ["--revision", published.base_revision] if published.base_revision else []
        words += ["--lora-modules", f"{repo_id.rpartition('/')[2]}={repo_id}"]
    else:
        words += [repo_id]
    return [*words, *VLLM.arguments(as_served(published))]


def own_record(published: PublishedModel, arguments: list[str]) -> dict[str, Any] | None:
    """Return what vLLM's check of the published weights with these options found, None where there was none."""
    form = form_of(published.merge if published.kind == "merged model" else None, published.is_adapter)
    return next(
        (
            record
            for record in published.serving
            if (record["engine"], record["what"], record["arguments"]) == (VLLM.name, form, arguments)
        ),
        None,
    )


def _command(words: list[str]) -> Iterator[str]:
    """Yield a code block with a line for each option."""
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    yield "```sh"
    yield " \\\n    ".join(shlex.join(line) for line in lines)
    yield "```"


def _merge_first(published: PublishedModel) -> Iterator[str]:
    yield _MERGE
    yield ""
    aware = [option for option, used in _aware(published) if used]
    yield from _command(["vllm", "serve", "merged", "--generation-config", "vllm"])
    yield ""
    option = f" with `{aware[0]}`" if aware else ""
    form = (
        f"The merge{option} is the model that was trained{_UNROUNDED if aware[0] == FP8_AWARE else ''}."
        if aware
        else ""
    )
    checked = {record["what"]: record for record in published.serving if record["engine"] == VLLM.name}
    # The merge that is named, or another one, by its name; an export of a merge tells nothing of it.
    named = [{"--nf4_aware": NF4_AWARE, FP8_AWARE: FP8_AWARE_MERGED}[option] for option in aware]
    forms = [*named, *(what for what in (MERGED, *AS_TRAINED) if what not in named)]
    seen = next((checked[what] for what in forms if what in checked and checked[what]["proven"]), None)
    proof = _proof(seen, f"the {seen['what']}") if seen else "The merge was not checked."
    yield " ".join(filter(None, [form, proof]))
    yield ""
    yield _requests(published)


def _aware(published: PublishedModel) -> tuple[tuple[str, bool], ...]:
    model = published.recipe.model
    return (("--nf4_aware", model.load_in_4bit), (FP8_AWARE, bool(model.load_in_fp8)))


def _requests(published: PublishedModel) -> str:
    """Say what requests have to hold."""
    prompt = "Send the text of `system_message.txt` as the system message. " if published.system_message else ""
    if published.template_options:
        kwargs = json.dumps({"chat_template_kwargs": published.template_options})
        prompt += f"Send `{kwargs[1:-1]}` with every request. "
    return (
        f"{prompt}Ask with `temperature` 0, as the evaluation does, and where answers hold boxes with"
        " `skip_special_tokens` false."
    )


def _proof(record: Mapping[str, Any], what: str = "this") -> str:
    """Say what a check has seen."""
    tuned = record["arms"]["tuned"]
    ties = f", and {tuned['near_ties']} more at a near tie of two tokens" if tuned["near_ties"] else ""
    acts = ""
    if effect := record.get("effect"):
        acts = f" The adapter acts: {effect['engines']} of {effect['rows']} answers are not the base's."
    return (
        f"Checked: {_engine(record)} serves {what} with the prompt tokens of qwen_vl_sft in all {tuned['rows']} rows asked,"
        f" and with its answers in {tuned['same']}{ties} ({record['dtype']}).{acts}"
    )


def _other_precision(published: PublishedModel, own: Mapping[str, Any] | None) -> Iterator[str]:
    """Say which model was scored, where the adapter was trained on a quantized base."""
    aware = [option for option, used in _aware(published) if used]
    if not published.is_adapter or not aware:
        return
    bits = "4 bits" if aware[0] == "--nf4_aware" else "FP8"
    seen = ""
    if own and own.get("as_trained") is not None:
        seen = f": {own['as_trained']} of {own['rows']} answers are those of the model that was trained"
    yield ""
    yield (
        f"vLLM puts the adapter on the 16-bit base, training had it in {bits}, so this is another model than was scored"
        f"{seen}. The one that was scored is the merge with `scripts/merge.py {aware[0]}`"
        f"{_UNROUNDED if aware[0] == FP8_AWARE else ''}{_seen_merge(published)}."
    )


def _seen_merge(published: PublishedModel) -> str:
    for record in published.serving:
        if record["engine"] == VLLM.name and record["what"] in AS_TRAINED and record["proven"]:
            tuned = record["arms"]["tuned"]
            return f", which {_engine(record)} serves with {tuned['same']} of {tuned['rows']} answers the same"
    return ""


def _table(published: PublishedModel) -> Iterator[str]:
    """Yield a table of all checks; nothing where there was none."""
    if not published.serving:
        return
    yield ""
    yield "| checked with | served | result |"
    yield "| --- | --- | --- |"
    for record in published.serving:
        if record["proven"]:
            tuned = record["arms"]["tuned"]
            result = f"serves it: {tuned['same']} of {tuned['rows']} answers the same, {tuned['near_ties']} near ties"
        elif record.get("refused"):
            result = "refuses it"
        else:
            result = f"does not serve it as it is: {'; '.join(record['problems'])}"
        yield f"| {_engine(record)}, {record['dtype']} | the {record['what']} | {result} |"


def _engine(record: Mapping[str, Any]) -> str:
    version = record["versions"].get(record["package"])
    return f"{record['title']} ({record['package']} {version})" if version else str(record["title"])


def _sentence(text: str) -> str:
    # The engine's name keeps its small letter.
    text = text if text.startswith(VLLM.title) else text[0].upper() + text[1:]
    return text if text.endswith(".") else f"{text}."
