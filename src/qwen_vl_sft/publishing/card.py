"""The text of the model card: a template, and a function for each of its sections.

Every statement comes from the run's own files; what they do not record is left out. The results are those of the
summary.json of scripts/evaluate.py (results.py finds and checks it).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard

from qwen_vl_sft.data.formats import known_format
from qwen_vl_sft.evaluation.metrics import NOTES, headline_of, measured_metrics
from qwen_vl_sft.publishing.card_metadata import dataset_and_split, make_metadata, metadata_problems
from qwen_vl_sft.publishing.card_serving import serving_lines
from qwen_vl_sft.publishing.names import BUILTIN_PREFIX, hub_id, public_name
from qwen_vl_sft.publishing.published_model import PublishedModel

if TYPE_CHECKING:
    from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.publishing.card_code import python_code

CARD = """\
---
{metadata}
---

# {name}

{introduction}

## Results

{results}

## Prompt and image size

{prompt}

## Load it with {libraries}

{needs}

```python
{code}
```

## Serve it with vLLM

{vllm}

## Training

{training}

## Intended use and limits

{limits}

## Licence

{licence}

## Versions

{versions}
"""
RUN_FILES = "`recipe.yaml`, `metrics.json` and `environment.json`"
# Licences of datasets that recipes of this package use, by Hub id; others are not recorded.
DATASET_LICENCES = {"HuggingFaceM4/ChartQA": "GPL-3.0"}


def make_card(published: PublishedModel, repo_id: str, revision: str, licence: dict[str, str], stated: bool) -> str:
    """Fill the template: return the text of README.md with its metadata.

    Args:
        published: the model to publish.
        repo_id: the repository on the Hub.
        revision: the branch that a reader loads from.
        licence: `license` and, if needed, `license_name` and `license_link`; empty when nothing is known.
        stated: the publisher named the licence; otherwise it is the base model's.
    """
    name = repo_id.rpartition("/")[2]
    metadata = make_metadata(published, name, licence)
    assert not metadata_problems(metadata), metadata_problems(metadata)
    text = CARD.format(
        metadata=metadata.to_yaml(),
        name=name,
        introduction=_joined(_introduction(published)),
        results=_joined(_results(published)),
        prompt=_joined(_prompt(published)),
        libraries="transformers" + " and peft" * published.is_adapter,
        needs=_needs(published),
        code=python_code(published, repo_id, revision),
        vllm=_joined(serving_lines(published, repo_id)),
        training=_joined(training_lines(published)),
        limits=_joined(_limits(published)),
        licence=_joined(_licence(published, licence, stated)),
        versions=_joined(_versions(published)),
    )
    return str(ModelCard(text))


def _needs(published: PublishedModel) -> str:
    """Return which transformers loads the model: version 5, and one of version 4 where a check has seen it."""
    checked = (found for found in published.serving if found["engine"] == "transformers-4" and found["proven"])
    if seen := next(checked, None):
        return f"It needs transformers 5, or {seen['versions']['transformers']}, with which it was checked."
    return "It needs transformers 5: earlier versions do not look for the image processor in `processor_config.json`."


def _joined(lines: Iterable[str]) -> str:
    return "\n".join(lines).strip("\n")


def _introduction(published: PublishedModel) -> Iterator[str]:
    recipe, base = published.recipe, _base_in_words(published)
    dataset = dataset_in_words(recipe.data.dataset_name)
    if published.kind == "adapter":
        yield f"A LoRA adapter for {base}, trained on {dataset}."
        yield f"The base model's weights while training: {recipe.model.precision}."
        if recipe.model.load_in_fp8:
            yield "The libraries below compute it otherwise; `scripts/merge.py --fp8_aware` keeps its weights of training."
    elif published.kind == "full model":
        part = " except its vision tower" * recipe.model.freeze_vision_tower
        yield f"{base}{part}, fine-tuned in full on {dataset}."
    else:
        merge = published.merge or {}
        kept = "4-bit" if merge.get("nf4_aware") else "FP8" if merge.get("fp8_aware") else ""
        way = f"the {kept} weights of training, dequantized" if kept else "its original weights"
        yield f"{base} with a LoRA adapter merged into it, trained on {dataset}. The adapter was added to {way},"
        yield f"and the sum stored in {merge.get('dtype')}; `merge.json` holds the checks of the merge."
    step, steps = published.step_of_weights, (published.metrics or {}).get("steps")
    if step != steps:
        metric = str(recipe.get("metric_for_best_model") or "eval_loss")
        yield ""
        yield f"These are the weights of step {step:,} of {steps:,}, the best of the run's evaluations by `{metric}`."
    if published.step is not None:
        yield ""
        yield f"These are the weights of step {published.step}, a checkpoint of a run, not its final model."


def _results(published: PublishedModel) -> Iterator[str]:
    """Yield the results section from `published.evaluation`, the summary.json that results.py has found and checked."""
    summary = published.evaluation
    if summary is None:
        yield "Not evaluated: no scores were stored with this model when it was published."
        return
    dataset, split = dataset_and_split(summary["dataset"])
    rows, precision = summary["rows"], summary["precision"]
    where = f"`{dataset}`" + (f", split `{split}`" if split else "")
    yield f"{where}, {rows:,} rows, in %, with 95% bootstrap intervals. Scored in: {precision['scored']}."
    if not precision.get("scored_as_trained", True):
        yield f"Trained in: {precision['trained']}."
    if not published.evaluated_as_published:
        yield "The scores are of the adapter on its base before the merge; the merged model itself was not scored."
    if others := published.evaluated_otherwise:
        yield f"Evaluated with {'; '.join(others)}, so these are not the scores of the model as it is published here."
    yield ""
    arms = list(summary["scores"])
    yield "| metric | " + " | ".join(arms) + " |"
    yield "| --- |" + " ---: |" * len(arms)
    splits = list(next(iter(summary["scores"].values())))
    of_all = summary["scores"][arms[0]]["all"]
    measured, first = measured_metrics(of_all), headline_of(of_all)
    for metric in measured:
        for part in splits if metric == first else splits[:1]:
            cells = [summary["scores"][arm][part][metric] for arm in arms]
            label = f"{metric}, {part} ({cells[0]['rows']:,} rows)"
            yield f"| {label} | " + " | ".join(_percent(cell) for cell in cells) + " |"
    yield ""
    yield f"`base` is asked without a system message of ours, `prompted` with it, `tuned` is this model. {_notes(measured)}"
    yield from _comparisons(summary, first)


def _comparisons(summary: dict[str, Any], metric: str) -> Iterator[str]:
    entries = [entry for entry in summary["comparisons"] if entry["metric"] == metric and entry["split"] == "all"]
    for entry in entries:
        if entry["second"] != "tuned":
            continue
        difference = entry["difference"]
        interval = f"[{100 * difference['low']:+.1f}, {100 * difference['high']:+.1f}]"
        yield ""
        yield (
            f"Against `{entry['first']}` on the same rows: {100 * difference['mean']:+.1f} points {interval} of {metric},"
            f" {entry['second_wins']} rows won and {entry['first_wins']} lost, exact sign test p = {entry['p_value']:.2g}."
        )


def _prompt(published: PublishedModel) -> Iterator[str]:
    limits = published.pixel_limits
    if published.system_message:
        who = "Training and evaluation" if published.evaluated_with_its_prompt else "Training"
        yield f"{who} put this system message before every question (`system_message.txt`):"
        yield ""
        yield from (f"> {line}".rstrip() for line in published.system_message.splitlines())
        yield ""
        yield "Answers depend on it; send it unchanged."
    else:
        yield "Training used no system message beyond what the chat template puts in."
    if options := published.template_options:
        given = ", ".join(f"`{name}={value}`" for name, value in options.items())
        thoughts = "with a thought before" if options["enable_thinking"] else "without a thought before"
        yield ""
        yield f"The chat template is given {given}: prompts ask for an answer {thoughts} it. Give the same."
    if limits:
        sides = " and ".join(f"{name} {value:,}" for name, value in limits.items())
        yield ""
        yield f"Images are resized to between {sides} by the processor here. Other limits change what the model sees."


def training_lines(published: PublishedModel) -> Iterator[str]:
    """Yield Markdown: a table of how the model was trained; what the run's files do not record has no line."""
    recipe, metrics = published.recipe, published.metrics or {}
    environment = published.environment or {}
    context, data = environment.get("world") or {}, metrics.get("data") or environment.get("data") or {}
    train, model = data.get("train") or {}, recipe.model
    rows: dict[str, Any] = {"data": dataset_in_words(recipe.data.dataset_name)}
    rows["split"] = f"`{recipe.data.dataset_train_split}`"
    if train.get("rows"):
        rows["rows"] = f"{train['rows']:,}"
    if train.get("fingerprint"):
        rows["fingerprint of the data"] = f"`{train['fingerprint']}`"
    if published.kind == "full model":
        rows["trained"] = "all weights" + ", but not the vision tower" * model.freeze_vision_tower
    else:
        kinds = [name for name, used in (("DoRA", model.use_dora), ("rank-stabilized", model.use_rslora)) if used]
        numbers = f"r={model.lora_r}, alpha={model.lora_alpha}, dropout={model.lora_dropout}"
        rows["LoRA"] = ", ".join([numbers, *kinds, _targets(published)])
        in_full = [*(model.lora_modules_to_save or ()), *(["routers"] if model.train_router else [])]
        if in_full:
            rows["trained in full beside it"] = ", ".join(f"`{name}`" for name in in_full)
    trained = sum(part.get("trainable", 0) for part in (metrics.get("parameters") or {}).values())
    if trained:
        rows["trainable parameters"] = f"{trained:,}"
    rows["learned tokens"] = "answers and their end of turn" if recipe.data.train_on == "assistant" else "all text"
    rows["learning rate"] = f"{recipe.get('learning_rate')}, {_plain(recipe.get('lr_scheduler_type'))}"
    processes = context.get("processes")
    if processes:
        rows |= _step(recipe, processes)
        devices = sorted(set(environment.get("devices") or [])) or ["CPU"]
        rows["hardware"] = f"{processes} process(es), {context.get('strategy')}, {', '.join(devices)}"
    rows |= _outcome(published)
    yield "| | |"
    yield "| --- | --- |"
    for label, value in rows.items():
        yield f"| {label} | {value} |"
    yield ""
    yield f"All of it is in {RUN_FILES} next to this card, without the folders of the machine that trained."


def dataset_in_words(name: str | None) -> str:
    """Return a link to a dataset on the Hub, else the dataset's name without its folder."""
    on_hub = hub_id(name)
    if on_hub:
        return f"[{on_hub}](https://huggingface.co/datasets/{on_hub})"
    public = public_name(name) if name else "data that the run does not name"
    return f"`{public}`" + (", data of its publisher that are not on the Hub" if public.startswith("local:") else "")


def _step(recipe: Recipe, processes: int) -> dict[str, str]:
    """Return the size of an optimizer step over all processes.

    With packing and a stated global batch, the recipe's gradient accumulation is not used.
    """
    run = recipe.run
    if run.global_batch_tokens is not None:
        return {"tokens of a step": f"about {run.global_batch_tokens:,}"}
    if run.packing and run.global_batch_size is not None:
        most = f"packed into micro-batches of at most {run.tokens_per_batch:,} tokens"
        return {"rows of a step": f"{run.global_batch_size:,}, {most}"}
    per_device, accumulated = recipe.get("per_device_train_batch_size"), recipe.get("gradient_accumulation_steps")
    each = f"{per_device} a process x {processes} x {accumulated} accumulated"
    return {"rows of a step": f"{per_device * processes * accumulated} = {each}"}


def _outcome(published: PublishedModel) -> dict[str, str]:
    metrics = published.metrics
    if metrics is None:
        return {}
    stats, rows = metrics.get("work") or {}, {}
    if "steps" in metrics:
        rows["steps"] = f"{metrics['steps']:,}, {metrics.get('epochs') or 0:.2f} epochs"
        if (step := published.step_of_weights) != metrics["steps"]:
            rows["weights"] = f"of step {step:,}, the best of the run's evaluations"
    if stats.get("tokens"):
        rows["tokens read"] = f"{stats['tokens']:,}, of them {stats.get('learned', 0):,} learned"
    if "train_runtime" in metrics:
        minutes = metrics["train_runtime"] / 60
        rows["time"] = f"{minutes / 60:.1f} h" if minutes >= 90 else f"{minutes:.1f} min"
    if metrics.get("train_loss") is not None:
        rows["training loss"] = f"{metrics['train_loss']:.4f} on average"
    if metrics.get("eval_loss") is not None:
        rows["evaluation loss"] = f"{metrics['eval_loss']:.4f}"
    return rows


def _targets(published: PublishedModel) -> str:
    modules = (published.adapter or {}).get("target_modules") or published.recipe.model.lora_target_modules
    if isinstance(modules, str):
        part = published.recipe.model.lora_scope
        return "on all linear layers" if part == "all" else f"on the linear layers of the {part} part"
    scope = f"all linear layers of: {published.recipe.model.lora_scope}"
    names = {str(name).rsplit(".", 1)[-1] for name in modules or []}
    names |= {str(name).split(".", 1)[-1] for name in (published.adapter or {}).get("target_parameters") or []}
    return f"on {', '.join(f'`{name}`' for name in sorted(names))}" if names else f"on {scope}"


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))


def _limits(published: PublishedModel) -> Iterator[str]:
    data = published.recipe.data
    row_format = known_format(data.dataset_format, data.dataset_name)
    subject = row_format.subject if row_format else None
    subject = subject or "the kind of question and image of its training data"
    yield f"It is meant for {subject}, in the form of the prompt above."
    if published.evaluation:
        yield "It was measured on nothing but the data under Results: other subjects, languages and image sizes are untested."
    else:
        yield "It had not been measured on any data when this card was made."
    yield "It can answer wrongly in a sure tone, so check an answer before anything depends on it."


def _licence(published: PublishedModel, licence: dict[str, str], stated: bool) -> Iterator[str]:
    dataset = hub_id(published.recipe.data.dataset_name)
    named = licence.get("license_name") or licence.get("license")
    if named:
        yield f"This model: {named}{'' if stated else ', as its base model states'}."
    else:
        yield "This model: not stated by its publisher. The terms of the base model apply to what is made from it."
    yield ""
    if dataset in DATASET_LICENCES:
        yield f"Training data: `{dataset}` is licensed {DATASET_LICENCES[dataset]}."
    else:
        yield "Training data: the run does not record its licence."


def _versions(published: PublishedModel) -> Iterator[str]:
    environment = published.environment or {}
    versions = [f"{name} {version}" for name, version in (environment.get("versions") or {}).items() if version]
    if not versions:
        yield "The run does not record them."
        return
    yield f"Trained with {', '.join(versions)}, Python {environment.get('python')}."
    if environment.get("git_commit"):
        yield f"Code of qwen_vl_sft at commit `{environment['git_commit']}`."


def _base_in_words(published: PublishedModel) -> str:
    if published.base_on_hub:
        link = f"[{published.base}](https://huggingface.co/{published.base})"
        return f"{link} at revision `{published.base_revision}`" if published.base_revision else link
    if published.base and published.base.startswith(BUILTIN_PREFIX):
        return f"`{published.base}`, the small model that ships with the package qwen_vl_sft"
    return "a base model whose name on the Hub the run does not record"


def _notes(metrics: Sequence[str]) -> str:
    return " ".join(f"{metric}: {NOTES[metric]}." for metric in metrics)


def _percent(cell: dict[str, float]) -> str:
    return f"{100 * cell['mean']:.1f} [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"
