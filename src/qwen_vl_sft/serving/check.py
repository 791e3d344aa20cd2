"""Serve a run's model with an engine, ask it rows of the run, and compare its answers with this package's."""

from __future__ import annotations

import json
import shlex
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.data.chat_template import with_system_message
from qwen_vl_sft.data.conversation import Conversation, prompt_of
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.errors import BadRow, UserError, shortened
from qwen_vl_sft.evaluation.task import WAY_OUT, Prompts, Task, prepare
from qwen_vl_sft.inference.generation import answer_ends
from qwen_vl_sft.inference.models import attach_adapter, make_encoder
from qwen_vl_sft.inference.source import ADAPTER_FILE
from qwen_vl_sft.merging.base import download
from qwen_vl_sft.merging.plan import read_adapter_config
from qwen_vl_sft.modeling.base_model import load_model
from qwen_vl_sft.serving.base import EngineAnswer, EnginePrompt, Served, Size
from qwen_vl_sft.serving.comparison import (
    BASE,
    TUNED,
    ArmResult,
    Difference,
    Effect,
    ServingVerdict,
    arm_result,
    as_json,
    first_difference,
    format_arms,
    judge,
)
from qwen_vl_sft.serving.engines import transformers
from qwen_vl_sft.serving.environments import make_environment
from qwen_vl_sft.serving.exported import dequantized, rounded_layers
from qwen_vl_sft.serving.options import ServeCheckPlan, unquantized
from qwen_vl_sft.serving.own_answers import (
    answer_tokens,
    differences,
    own_answers,
    round_activations,
    silence_vision,
    told_places,
)
from qwen_vl_sft.serving.process import EngineFailed, EngineProcess, EngineRefused, answer_all
from qwen_vl_sft.serving.record import AS_TRAINED, changes_vision, make_folder, stats, write_record

# Differing answers that a record keeps.
MOST_KEPT = 50
# And that the table shows.
MOST_SHOWN = 8
WIDTH = 80
_SIDES = (("ours", "ours"), ("its", "engines"))
LOG = "{engine}.log"


@dataclass(frozen=True)
class Asked:
    """The rows of a check: prompts as the engine gets them, our tokens of each, and what they take."""

    prompts: list[EnginePrompt]
    prompt_ids: dict[int, list[int]]
    size: Size


@dataclass(frozen=True)
class Compared:
    """Both sides' answers compared; `as_trained` counts tuned answers that are those of the quantized base and adapter."""

    arms: dict[str, ArmResult]
    effect: Effect | None
    differences: list[Difference]
    verdict: ServingVerdict
    as_trained: int | None = None


def check(plan: ServeCheckPlan) -> dict[str, Any]:
    """Run the check, write its record into the run's folder, and return it. Raises `UserError`."""
    make_folder(plan.home)  # before the work whose result is to be kept there
    task = prepare(plan.evaluation)
    encoder = make_encoder(plan.evaluation, TUNED, task.processor, task.system_message)
    prompts = Prompts(task.rows, encoder)
    served = what_is_served(plan, encoder)
    record: dict[str, Any] = {
        "engine": plan.engine.name,
        "title": plan.engine.title,
        "package": plan.engine.package,
        "what": plan.what,
        "model": str(plan.options.model or plan.options.run),
        "weights": weights_of(plan, served),
        "run_weights": stats([plan.evaluation.tuned.folder / ADAPTER_FILE]) if plan.evaluation.tuned else [],
        "dtype": plan.options.dtype,
        "dataset": task.rows.name,
        "rows": len(task.questions),
        "arguments": plan.engine.arguments(served),
        "changes_vision": served.changes_vision,
        "other_arguments": plan.further_arguments,
        "other_adapter": str(plan.options.adapter) if plan.options.adapter else None,
        "reference": reference_of(plan),
        "trained": plan.evaluation.trained.precision if plan.evaluation.trained else None,
    }
    with tempfile.TemporaryDirectory() as images:
        try:
            asked = ask(task, prompts, encoder, Path(images), plan.evaluation.recipe.run.max_new_tokens)
        except BadRow as error:
            raise UserError(f"{error}; {WAY_OUT}") from None
        record |= serve_and_compare(plan, task, encoder, prompts, served, asked)
    record["file"] = str(write_record(plan.home, record))
    return record


def reference_of(plan: ServeCheckPlan) -> str:
    """Return how our model computes, as the table says it."""
    unpacked = "the export's weights, unpacked, in " if plan.export and plan.export.compressed else ""
    return f"{unpacked}{plan.reference.precision}"


def serve_and_compare(
    plan: ServeCheckPlan, task: Task, encoder: Encoder, prompts: Prompts, served: Served, asked: Asked
) -> dict[str, Any]:
    """Return what the engine did: its versions, answers compared, or why it does not serve the model."""
    title = plan.engine.title
    log = make_folder(plan.home) / LOG.format(engine=plan.engine.name)
    arguments = [
        *plan.engine.arguments(served),
        *plan.engine.check_arguments(served, asked.size),
        *plan.further_arguments,
    ]
    arms = (BASE, TUNED) if served.adapter else (TUNED,)
    try:
        versions, theirs = served_answers(plan, encoder, served, asked, arguments, arms, log)
    except EngineRefused as error:
        problem = f"{title} refuses it: {error}" + (". Merge the adapter" if served.adapter else "")
        return {"proven": False, "refused": str(error), "problems": [problem], "versions": {}}
    except EngineFailed as error:
        return {"proven": False, "failed": str(error), "problems": [f"{title} failed: {error}"], "versions": {}}
    found = compare(plan, task, encoder, prompts, served, asked, theirs)
    return {
        "versions": versions,
        "proven": found.verdict.proven,
        "problems": found.verdict.problems,
        "as_trained": found.as_trained,
        **as_json(found.arms, found.effect, found.differences[:MOST_KEPT]),
    }


def what_is_served(plan: ServeCheckPlan, encoder: Encoder) -> Served:
    """Return what the engine gets: the base and its adapter, or the folder of a whole model. Raises `UserError`."""
    tuned = plan.evaluation.tuned
    assert tuned
    size = encoder.processor.image_processor.size
    limits = {name: int(size[name]) for name in ("shortest_edge", "longest_edge") if size.get(name)}
    if plan.options.model is not None or not tuned.is_adapter:
        export = plan.export.adapter if plan.export else None
        folder = plan.options.model or tuned.folder
        return Served(folder, plan.options.dtype, export, limits=limits if plan.engine.gguf else {})
    adapter = plan.options.adapter or tuned.folder
    return Served(
        model=download(plan.reference),
        dtype=plan.options.dtype,
        adapter=adapter,
        lora_config=read_adapter_config(adapter, "--adapter" if plan.options.adapter else "--run"),
        changes_vision=changes_vision(adapter / ADAPTER_FILE),
        limits=limits,
    )


def weights_of(plan: ServeCheckPlan, served: Served) -> list[list[Any]]:
    """Return name, size and time of each weight file of what is served in place of the base."""
    if served.adapter and not plan.export:
        return stats([served.adapter / ADAPTER_FILE])
    return stats(sorted(path for path in served.model.iterdir() if path.suffix in (".safetensors", ".gguf")))


def ask(task: Task, prompts: Prompts, encoder: Encoder, folder: Path, max_new_tokens: int) -> Asked:
    """Write the images of all rows, decoded as for this package, and list the prompts. Raises `BadRow`."""
    found, ids, longest, images = [], {}, 0, 0
    for number in tqdm(range(len(task.questions)), desc="prompts", unit="row"):
        encoded = prompts.encode(number)
        ids[number] = encoded.input_ids.tolist()
        conversation = encoder.with_boxes(task.conversation(number))
        files = [folder / f"{item.content_hash}.png" for item in conversation.media]
        for item, file in zip(conversation.media, files, strict=True):
            if not file.is_file():
                item.decode().save(file)
        found.append(engine_prompt(number, conversation, encoder, [str(file) for file in files]))
        longest, images = max(longest, len(ids[number])), max(images, len(files))
    return Asked(found, ids, Size(longest + max_new_tokens, images))


def engine_prompt(number: int, conversation: Conversation, encoder: Encoder, images: list[str]) -> EnginePrompt:
    """Return the prompt of a row's last answer as an engine gets it."""
    kept = ("role", "content", "tool_calls", "reasoning_content", "name")
    messages = [
        {name: message[name] for name in kept if name in message}
        for message in prompt_of(with_system_message(conversation.messages, encoder.system_message))
    ]
    return EnginePrompt(number, messages, images, conversation.tools)


def served_answers(
    plan: ServeCheckPlan,
    encoder: Encoder,
    served: Served,
    asked: Asked,
    arguments: list[str],
    arms: Sequence[str],
    log: Path,
) -> tuple[dict[str, str], dict[str, dict[int, EngineAnswer]]]:
    """Return the engine's versions and its answers of each arm. Raises `EngineRefused` or `EngineFailed`."""
    most = plan.evaluation.recipe.run.max_new_tokens
    answers: dict[str, dict[int, EngineAnswer]] = {}
    tqdm.write(f"starting {plan.engine.title} ({log})")
    with EngineProcess(plan.engine, plan.python, served, arguments, log) as engine:
        for arm in arms:
            with_adapter, title = arm == TUNED and served.adapter is not None, f"{plan.engine.title}, {arm}"
            answers[arm] = answer_all(engine, asked.prompts, with_adapter, most, encoder.template_options, title)
        return engine.versions, answers


def compare(
    plan: ServeCheckPlan,
    task: Task,
    encoder: Encoder,
    prompts: Prompts,
    served: Served,
    asked: Asked,
    theirs: Mapping[str, Mapping[int, EngineAnswer]],
) -> Compared:
    """Answer the same rows with this package, and compare."""
    on_cpu = plan.on_cpu
    most = plan.evaluation.recipe.run.max_new_tokens
    numbers = [prompt.number for prompt in asked.prompts]
    same = {
        arm: {number: _same_prompt(asked.prompt_ids[number], found[number]) for number in numbers}
        for arm, found in theirs.items()
    }

    def answer(model: Any, title: str) -> dict[int, list[int]]:
        return own_answers(model, encoder, prompts.encode, task.units, most, f"this package, {title}")

    def different(model: Any, arm: str, ours: Mapping[int, Sequence[int]], engines: str) -> list[Difference]:
        return differences(
            model, encoder, prompts.encode, arm, ours, theirs[engines], same[engines], plan.dtype_compared
        )

    with reference_settings(plan) as settings:
        model = load_model(settings, on_cpu)
        round_activations(model, rounded_layers(settings))
    ours: dict[str, dict[int, list[int]]] = {}
    found: dict[str, list[Difference]] = {}
    if BASE in theirs:
        ours[BASE] = answer(model, BASE)
        found[BASE] = different(model, BASE, ours[BASE], BASE)
    if plan.has_adapter:
        assert plan.evaluation.tuned
        model = attach_adapter(model, plan.evaluation.tuned.folder)
    ours[TUNED] = answer(model, TUNED)
    found[TUNED] = different(model, TUNED, ours[TUNED], TUNED)
    arms = {arm: arm_result(numbers, same[arm], found[arm]) for arm in theirs}
    left_out = None
    if arms[TUNED].different and served.changes_vision:
        silence_vision(model)
        without = answer(model, "without its vision part")
        unlike = {difference.number for difference in found[TUNED] if not difference.near_tie}
        still = {difference.number for difference in different(model, TUNED, without, TUNED)}
        left_out = len(unlike - still)
    del model
    effect = effect_of(encoder, ours, theirs) if BASE in theirs else None
    verdict = judge(plan.engine.title, arms, effect, left_out)
    every = [difference for arm in theirs for difference in found[arm]]
    return Compared(arms, effect, every, verdict, as_trained(plan, answer, encoder, theirs[TUNED]))


@contextmanager
def reference_settings(plan: ServeCheckPlan) -> Iterator[ModelSettings]:
    """Yield the settings of our model: those of the plan, or of the weights of a compressed export, unpacked."""
    if plan.export is None or not plan.export.compressed:
        yield plan.reference
        return
    with dequantized(plan.export, plan.reference, make_environment(transformers.ENGINE)) as settings:
        yield settings


def as_trained(
    plan: ServeCheckPlan,
    answer: Callable[[Any, str], dict[int, list[int]]],
    encoder: Encoder,
    theirs: Mapping[int, EngineAnswer],
) -> int | None:
    """Count the engine's tuned answers that are those of base and adapter as trained; None where that was compared already.

    A model that was trained on a quantized base and is served on the 16-bit one is another model than was scored.
    """
    trained, tuned = plan.evaluation.trained, plan.evaluation.tuned
    assert trained
    assert tuned
    if not plan.has_adapter or not unquantized(trained) or plan.what in AS_TRAINED:
        return None
    base = plan.reference
    settings = replace(trained, model_name_or_path=base.model_name_or_path, model_revision=base.model_revision)
    model = attach_adapter(load_model(settings, plan.on_cpu), tuned.folder)
    ours = answer(model, "as trained")
    return sum(_same_answer(encoder, ours[number], theirs[number]) for number in ours)


def effect_of(
    encoder: Encoder, ours: Mapping[str, Mapping[int, list[int]]], theirs: Mapping[str, Mapping[int, EngineAnswer]]
) -> Effect:
    """Count the answers that the adapter changes on both sides."""
    numbers = list(ours[BASE])
    return Effect(
        rows=len(numbers),
        ours=sum(ours[BASE][number] != ours[TUNED][number] for number in numbers),
        engines=sum(
            not _same_answer(encoder, answer_tokens(encoder, theirs[BASE][number]), theirs[TUNED][number])
            for number in numbers
        ),
    )


def _same_answer(encoder: Encoder, ours: Sequence[int], theirs: EngineAnswer) -> bool:
    ours = [ours[place] for place in told_places(ours, theirs, encoder)]
    return first_difference(ours, answer_tokens(encoder, theirs), frozenset(answer_ends(encoder))) is None


def _same_prompt(ours: list[int], theirs: EngineAnswer) -> bool:
    return theirs.prompt_tokens == len(ours) if theirs.prompt_ids is None else theirs.prompt_ids == ours


def format_record(record: Mapping[str, Any]) -> str:
    """Format the table that ends a check, in 80 columns."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"engine    {record['title']}{f' ({versions})' if versions else ''}",
        f"served    the {record['what']} in {record['model']}, {record['dtype']}",
        f"against   {record['reference']}",
        f"rows      {record['rows']:,} of {record['dataset']}",
        f"options   {shlex.join([*record['arguments'], *record['other_arguments']])}",
    ]
    lines = [part for line in lines for part in _wrapped(line, subsequent_indent=" " * 10)]
    if record.get("arms"):
        arms = {arm: ArmResult(**counts) for arm, counts in record["arms"].items()}
        lines += ["", *format_arms(arms), ""]
    if effect := record.get("effect"):
        lines.append(f"adapter   changes {effect['ours']} answers of ours, {effect['engines']} of {record['title']}'s")
    if record.get("as_trained") is not None:
        text = f"trained   in {record['trained']}: {record['as_trained']} of {record['rows']} answers are those of that model"
        lines += _wrapped(text, subsequent_indent=" " * 10)
    for difference in record.get("differences", [])[:MOST_SHOWN]:
        lines += _difference_lines(difference)
    result = "the answers are this package's" if record["proven"] else "not proven"
    lines.append(f"result    {result}")
    for problem in record["problems"]:
        lines += _wrapped(f"- {problem}", initial_indent=" " * 8, subsequent_indent=" " * 10)
    return "\n".join(lines)


def _difference_lines(difference: Mapping[str, Any]) -> list[str]:
    margin = "other prompt" if difference["margin"] is None else f"margin {difference['margin']:.2g}"
    kind = ", near tie" if difference["near_tie"] else ""
    texts = [f"{name} {shortened(json.dumps(difference[key], ensure_ascii=False))}" for name, key in _SIDES]
    head = f"{difference['arm']}, row {difference['number']} ({margin}{kind}): "
    return _wrapped(head + "; ".join(texts), initial_indent=" " * 10, subsequent_indent=" " * 12)


def _wrapped(text: str, initial_indent: str = "", subsequent_indent: str = "") -> list[str]:
    # Options of engines hold hyphens.
    return textwrap.wrap(
        text, WIDTH, initial_indent=initial_indent, subsequent_indent=subsequent_indent, break_on_hyphens=False
    )
