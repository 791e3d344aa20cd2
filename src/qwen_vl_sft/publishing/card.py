"""The model card of a run, made from the run's own files: it says what they say, and what they do not say it leaves open."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from huggingface_hub import ModelCard

from qwen_vl_sft.data.formats import known_format
from qwen_vl_sft.evaluation.metrics import HEADLINE, METRICS, NOTES
from qwen_vl_sft.publishing.asked_as import evaluated_with_its_prompt, other_settings
from qwen_vl_sft.publishing.card_metadata import dataset_and_split, make_metadata, metadata_problems
from qwen_vl_sft.publishing.card_training import dataset_in_words, training_lines
from qwen_vl_sft.publishing.card_usage import pixel_limits, python_code, vllm_lines
from qwen_vl_sft.publishing.names import hub_id
from qwen_vl_sft.publishing.publication import BUILTIN_PREFIX, Publication

NEEDS = "It needs transformers 5: earlier versions do not look for the image processor in `processor_config.json`."
# Licences of data that recipes of this package use, by Hub id; of other data none is recorded.
DATA_LICENCES = {"HuggingFaceM4/ChartQA": "GPL-3.0"}


def make_card(publication: Publication, repo_id: str, revision: str, licence: dict[str, str], stated: bool) -> str:
    """The text of README.md with its metadata.

    Args:
        publication: what is published.
        repo_id: the repository on the Hub.
        revision: the branch that a reader loads from.
        licence: `license` and, if needed, `license_name` and `license_link`; empty when nothing is known.
        stated: the publisher named the licence; otherwise it is the base model's.
    """
    name = repo_id.rpartition("/")[2]
    metadata = make_metadata(publication, name, licence)
    assert not metadata_problems(metadata), metadata_problems(metadata)
    sections = (
        ["# " + name, "", *_introduction(publication)],
        ["## Results", "", *_results(publication)],
        ["## Prompt and image size", "", *_prompt(publication)],
        ["## Load it with transformers" + " and peft" * publication.is_adapter, "", NEEDS],
        ["```python", python_code(publication, repo_id, revision), "```"],
        ["## Serve it with vLLM", "", *vllm_lines(publication, repo_id)],
        ["## Training", "", *training_lines(publication)],
        ["## Intended use and limits", "", *_limits(publication)],
        ["## Licence", "", *_licence(publication, licence, stated)],
        ["## Versions", "", *_versions(publication)],
    )
    text = "\n\n".join("\n".join(lines).strip("\n") for lines in sections)
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}\n")
    return str(card)


def _introduction(publication: Publication) -> Iterator[str]:
    recipe, base = publication.recipe, _base_in_words(publication)
    dataset = dataset_in_words(recipe.data.dataset_name)
    if publication.kind == "adapter":
        yield f"A LoRA adapter for {base}, trained on {dataset}."
        yield f"The base model's weights while training: {recipe.model.precision}."
    elif publication.kind == "full model":
        part = " except its vision tower" * recipe.model.freeze_vision_tower
        yield f"{base}{part}, fine-tuned in full on {dataset}."
    else:
        merge = publication.merge or {}
        way = "the 4-bit weights of training, dequantized" if merge.get("nf4_aware") else "its original weights"
        yield f"{base} with a LoRA adapter merged into it, trained on {dataset}. The adapter was added to {way},"
        yield f"and the sum stored in {merge.get('dtype')}; `merge.json` holds the checks of the merge."
    if publication.step is not None:
        yield ""
        yield f"These are the weights of step {publication.step}, a checkpoint of a run, not its final model."


def _results(publication: Publication) -> Iterator[str]:
    summary = publication.evaluation
    if summary is None:
        yield "Not evaluated: no scores were stored with this model when it was published."
        return
    dataset, split = dataset_and_split(summary["dataset"])
    rows, precision = summary["rows"], summary["precision"]
    where = f"`{dataset}`" + (f", split `{split}`" if split else "")
    yield f"{where}, {rows:,} rows, in %, with 95% bootstrap intervals. Scored in: {precision['scored']}."
    if not precision.get("scored_as_trained", True):
        yield f"Trained in: {precision['trained']}."
    if not publication.evaluated_as_published:
        yield "The scores are of the adapter on its base before the merge; the merged model itself was not scored."
    if others := other_settings(publication):
        yield f"Evaluated with {'; '.join(others)}, so these are not the scores of the model as it is published here."
    yield ""
    arms = list(summary["scores"])
    yield "| metric | " + " | ".join(arms) + " |"
    yield "| --- |" + " ---: |" * len(arms)
    splits = list(next(iter(summary["scores"].values())))
    for metric in METRICS:
        for part in splits if metric == HEADLINE else splits[:1]:
            cells = [summary["scores"][arm][part][metric] for arm in arms]
            label = f"{metric}, {part} ({cells[0]['rows']:,} rows)"
            yield f"| {label} | " + " | ".join(_percent(cell) for cell in cells) + " |"
    yield ""
    yield f"`base` is asked without a system message of ours, `prompted` with it, `tuned` is this model. {_notes()}"
    yield from _comparisons(summary)


def _comparisons(summary: dict[str, Any]) -> Iterator[str]:
    entries = [entry for entry in summary["comparisons"] if entry["metric"] == HEADLINE and entry["split"] == "all"]
    for entry in entries:
        if entry["second"] != "tuned":
            continue
        difference = entry["difference"]
        interval = f"[{100 * difference['low']:+.1f}, {100 * difference['high']:+.1f}]"
        yield ""
        yield (
            f"Against `{entry['first']}` on the same rows: {100 * difference['mean']:+.1f} points {interval} of {HEADLINE},"
            f" {entry['second_wins']} rows won and {entry['first_wins']} lost, exact sign test p = {entry['p_value']:.2g}."
        )


def _prompt(publication: Publication) -> Iterator[str]:
    limits = pixel_limits(publication)
    if publication.system_message:
        who = "Training and evaluation" if evaluated_with_its_prompt(publication) else "Training"
        yield f"{who} put this system message before every question (`system_message.txt`):"
        yield ""
        yield from (f"> {line}".rstrip() for line in publication.system_message.splitlines())
        yield ""
        yield "Answers depend on it; send it as it stands."
    else:
        yield "Training used no system message beyond what the chat template puts in."
    if limits:
        sides = " and ".join(f"{name} {value:,}" for name, value in limits.items())
        yield ""
        yield f"Images are resized to between {sides} by the processor here. Other limits change what the model sees."


def _limits(publication: Publication) -> Iterator[str]:
    data = publication.recipe.data
    row_format = known_format(data.dataset_format, data.dataset_name)
    subject = row_format.subject if row_format else None
    subject = subject or "the kind of question and image of its training data"
    yield f"It is meant for {subject}, in the form of the prompt above."
    yield "It was measured on nothing but what stands under Results: other subjects, languages and image sizes are untested."
    yield "It can answer wrongly in a sure tone, so check an answer before anything depends on it."


def _licence(publication: Publication, licence: dict[str, str], stated: bool) -> Iterator[str]:
    dataset = hub_id(publication.recipe.data.dataset_name)
    named = licence.get("license_name") or licence.get("license")
    if named:
        yield f"This model: {named}{'' if stated else ', as its base model states'}."
    else:
        yield "This model: not stated by its publisher. The terms of the base model apply to what is made from it."
    yield ""
    if dataset in DATA_LICENCES:
        yield f"Training data: `{dataset}` is licensed {DATA_LICENCES[dataset]}."
    else:
        yield "Training data: the run does not record its licence."


def _versions(publication: Publication) -> Iterator[str]:
    environment = publication.environment or {}
    versions = [f"{name} {version}" for name, version in (environment.get("versions") or {}).items() if version]
    if not versions:
        yield "The run does not record them."
        return
    yield f"Trained with {', '.join(versions)}, Python {environment.get('python')}."
    if environment.get("git_commit"):
        yield f"Code of qwen_vl_sft at commit `{environment['git_commit']}`."


def _base_in_words(publication: Publication) -> str:
    if publication.base_on_hub:
        link = f"[{publication.base}](https://huggingface.co/{publication.base})"
        return f"{link} at revision `{publication.base_revision}`" if publication.base_revision else link
    if publication.base and publication.base.startswith(BUILTIN_PREFIX):
        return f"`{publication.base}`, the small model that ships with the package qwen_vl_sft"
    return "a base model whose name on the Hub the run does not record"


def _notes() -> str:
    return " ".join(f"{metric}: {NOTES[metric]}." for metric in METRICS)


def _percent(cell: dict[str, float]) -> str:
    return f"{100 * cell['mean']:.1f} [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"
