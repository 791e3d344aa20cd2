"""The metadata of the model card: what the Hub searches by, and the results as its `model-index`."""

from __future__ import annotations

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from qwen_vl_sft.evaluation.metrics import NOTES, measured_metrics
from qwen_vl_sft.evaluation.scoring import ALL
from qwen_vl_sft.publishing.names import hub_id, public_name, without_paths
from qwen_vl_sft.publishing.published_model import PublishedModel

TASK = "image-text-to-text"
_DATASET = re.compile(r"(.*?)(?: \[(.*)\])?")
_NO_ID = re.compile(r"[^\w./-]+")
# The Hub files a merged adapter under the fine-tuned models; its "merge" is of several models into one.
_RELATIONS = {"adapter": "adapter", "full model": "finetune", "merged model": "finetune"}


def make_metadata(published: PublishedModel, name: str, licence: dict[str, str]) -> ModelCardData:
    """Build the metadata of a card; its `eval_results` hold the tuned model's scores in %.

    Args:
        published: the model to publish.
        name: the name of the model in the results.
        licence: `license`, and for one that the Hub has no name for `license_name` and `license_link`; may be empty.
    """
    on_hub = published.base_on_hub
    dataset = hub_id(published.recipe.data.dataset_name)
    results = eval_results(published)
    base = {"base_model": on_hub, "base_model_relation": _RELATIONS[published.kind]} if on_hub else {}
    named: dict[str, Any] = base | licence
    return ModelCardData(
        **named,
        datasets=[dataset] if dataset else None,
        library_name="peft" if published.is_adapter else "transformers",
        pipeline_tag=TASK,
        tags=_tags(published),
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def eval_results(published: PublishedModel) -> list[EvalResult]:
    """Return the tuned model's scores over the whole split, in %, each with its 95% interval.

    Empty without an evaluation of these weights under the published prompt and image size: other scores stand in the
    text of the card alone.
    """
    summary = published.evaluation
    if summary is None or not published.evaluated_as_published or published.evaluated_otherwise:
        return []
    dataset, split = dataset_and_split(summary["dataset"])
    results = []
    cells = summary["scores"]["tuned"][ALL]
    for metric in measured_metrics(cells):
        cell = cells[metric]
        low, high = round(100 * cell["low"], 1), round(100 * cell["high"], 1)
        results.append(
            EvalResult(
                task_type=TASK,
                # The Hub takes the letters of an id here, also for data that are not on it.
                dataset_type=_NO_ID.sub("-", dataset),
                dataset_name=dataset,
                dataset_config=(summary.get("settings") or {}).get("dataset_config"),
                dataset_split=split,
                metric_type=metric,
                metric_name=f"{metric} in %, 95% interval {low} to {high}, {cell['rows']:,} rows: {NOTES[metric]}",
                metric_value=round(100 * cell["mean"], 1),
                metric_args={"low": low, "high": high, "rows": cell["rows"]},
            )
        )
    return results


def dataset_and_split(text: str) -> tuple[str, str | None]:
    """Split `NAME [SPLIT]`, as the scripts write it, into the dataset's public name and the split."""
    match = _DATASET.fullmatch(text)
    assert match
    return without_paths(public_name(match[1])), match[2]


def metadata_problems(data: ModelCardData) -> list[str]:
    """Return why the Hub would refuse the metadata: they do not read back as they were written."""
    try:
        again: Any = ModelCardData(**_plain(data))
    except ValueError as error:
        return [str(error)]
    return [] if again.to_dict() == data.to_dict() else ["the results do not read back as they were written"]


def _plain(data: ModelCardData) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(data.to_yaml())


def _tags(published: PublishedModel) -> list[str]:
    model = published.recipe.model
    if published.kind == "full model":
        kind = ["full-fine-tuning"]
    else:
        kind = ["lora", *(["qlora"] if model.load_in_4bit or (published.merge or {}).get("trained_in_4bit") else [])]
    return ["qwen-vl", "sft", "trl", *kind]
