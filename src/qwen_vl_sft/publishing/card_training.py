"""The part of a model card that says how the model was trained: data, method, hardware, length and losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qwen_vl_sft.publishing.names import hub_id, public_name
from qwen_vl_sft.publishing.publication import Publication

if TYPE_CHECKING:
    from qwen_vl_sft.config.reading import Recipe

_RUN_FILES = "`recipe.yaml`, `metrics.json` and `environment.json`"


def training_lines(publication: Publication) -> Iterator[str]:
    """Markdown: a table of what the run's files record; what they do not record has no line."""
    recipe, metrics = publication.recipe, publication.metrics or {}
    environment = publication.environment or {}
    context, data = environment.get("world") or {}, metrics.get("data") or environment.get("data") or {}
    train, model = data.get("train") or {}, recipe.model
    rows: dict[str, Any] = {"data": dataset_in_words(recipe.data.dataset_name)}
    rows["split"] = f"`{recipe.data.dataset_train_split}`"
    if train.get("rows"):
        rows["rows"] = f"{train['rows']:,}"
    if train.get("fingerprint"):
        rows["fingerprint of the data"] = f"`{train['fingerprint']}`"
    if publication.kind == "full model":
        rows["trained"] = "all weights" + ", but not the vision tower" * model.freeze_vision_tower
    else:
        rows["LoRA"] = (
            f"r={model.lora_r}, alpha={model.lora_alpha}, dropout={model.lora_dropout}, {_targets(publication)}"
        )
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
    rows |= _outcome(publication)
    yield "| | |"
    yield "| --- | --- |"
    for label, value in rows.items():
        yield f"| {label} | {value} |"
    yield ""
    yield f"All of it is in {_RUN_FILES} beside this card, without the folders of the machine that trained."


def dataset_in_words(name: str | None) -> str:
    """A dataset of a recipe: a link when it is on the Hub, else its name without its folder."""
    on_hub = hub_id(name)
    if on_hub:
        return f"[{on_hub}](https://huggingface.co/datasets/{on_hub})"
    public = public_name(name) if name else "data that the run does not name"
    return f"`{public}`" + (", data of its publisher that are not on the Hub" if public.startswith("local:") else "")


def _step(recipe: Recipe, processes: int) -> dict[str, str]:
    """What an optimizer step takes over all processes, as `resolve_batch` has it.

    Where packing fills the micro-batches of a stated global batch, the recipe's accumulation has no part in it.
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


def _outcome(publication: Publication) -> dict[str, str]:
    metrics = publication.metrics
    if metrics is None:
        return {}
    stats, rows = metrics.get("work") or {}, {}
    if "steps" in metrics:
        rows["steps"] = f"{metrics['steps']:,}, {metrics.get('epochs') or 0:.2f} epochs"
    if stats.get("tokens"):
        # Runs of an earlier version have the second number as `learned`.
        targets = stats.get("target_tokens", stats.get("learned", 0))
        rows["tokens read"] = f"{stats['tokens']:,}, of them {targets:,} learned"
    if "train_runtime" in metrics:
        minutes = metrics["train_runtime"] / 60
        rows["time"] = f"{minutes / 60:.1f} h" if minutes >= 90 else f"{minutes:.1f} min"
    if "train_loss" in metrics:
        rows["training loss"] = f"{metrics['train_loss']:.4f} on average"
    if "eval_loss" in metrics:
        rows["evaluation loss"] = f"{metrics['eval_loss']:.4f}"
    return rows


def _targets(publication: Publication) -> str:
    modules = (publication.adapter or {}).get("target_modules") or publication.recipe.model.lora_target_modules
    if isinstance(modules, str):
        return f"on the layers of the {publication.recipe.model.lora_scope} part"
    scope = f"all linear layers of: {publication.recipe.model.lora_scope}"
    names = {str(name).rsplit(".", 1)[-1] for name in modules or []}
    return f"on {', '.join(f'`{name}`' for name in sorted(names))}" if names else f"on {scope}"


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))
