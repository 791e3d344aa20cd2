"""Check a merged model before it is moved to the output folder: its tensors, logits and answers."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from tqdm import tqdm

from qwen_vl_sft.errors import UserError
from qwen_vl_sft.merging.base import open_weights, weight_files

if TYPE_CHECKING:
    from qwen_vl_sft.data.conversation import Conversation
    from qwen_vl_sft.data.encoding import Encoder
    from qwen_vl_sft.merging.plan import MergePlan
    from qwen_vl_sft.merging.samples import Samples
    from qwen_vl_sft.merging.weights import Merge

# The largest mean difference of logits, as a share of their root mean square. Weights are rounded before the adapter is
# added on one side and after it on the other, and each layer carries the difference on: 3.3% in bfloat16 through all of
# a Qwen2-VL-7B with random weights. A wrong scale or a layer left out moves the logits by as much as the adapter does.
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 8e-2}
MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class Outputs:
    """What a model says: logits of each answer's tokens [N, vocabulary] float32, and one greedy answer a row."""

    logits: torch.Tensor
    answers: list[str]


def check_weights(task: Merge, folder: Path) -> None:
    """Compare each written tensor with the base's: targets changed, all others the same bits. Raises `UserError`."""
    problems = []
    file_of: dict[str, Path] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            file_of |= dict.fromkeys(file.keys(), path)
    different = set(file_of) ^ {weight.output for weight in task.weights}
    if different:
        raise _failed([f"{min(different)} is in the base or in the merged model, but not in both"])
    for weight in tqdm(task.weights, desc="checking", unit="tensor"):
        before = weight.as_in_file(task.read(weight).to(task.dtype)).contiguous()
        with open_weights(file_of[weight.output]) as merged:
            after = merged.get_tensor(weight.output)
        if after.shape != before.shape or after.dtype != before.dtype:
            problems.append(f"{weight.output} is {after.dtype} {tuple(after.shape)}")
        elif not bool(after.isfinite().all()):
            problems.append(f"{weight.output} has values that {task.plan.options.dtype} cannot hold")
        elif task.is_target(weight) and same_bits(before, after):
            problems.append(
                f"{weight.output} was not changed by the adapter, which is zero there or too small for"
                f" {task.plan.options.dtype} (--dtype float32 keeps more)"
            )
        elif not task.is_target(weight) and not same_bits(before, after):
            problems.append(f"{weight.output} differs from the base, though the adapter does not touch it")
    if problems:
        raise _failed(problems)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors of one shape and type are equal bit by bit."""
    return torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def check_model(task: Merge, folder: Path, samples: Samples | None) -> dict[str, Any]:
    """Load the merged model strictly, and compare it with base and adapter on `samples`. Raises `UserError`.

    Returns the differences: `against_adapter`, and `against_training` where training computed in other precision.
    """
    plan = task.plan
    model = reload_strictly(plan, folder)
    if samples is None:
        return {}
    encoder, conversations = samples.encoder(folder), samples.conversations
    merged = compute_outputs(model, encoder, conversations)
    del model
    # FP8 layers also round their inputs, which a merged model does not: without that they say what the weights do.
    exact = replace(plan.trained, fp8_forward=False, fp8_kernels=None) if plan.options.fp8_aware else plan.trained
    adapted = load_adapted(plan, exact if plan.keeps_trained else plan.base)
    reference = compute_outputs(adapted, encoder, conversations)
    found = compare(merged, reference)
    with adapted.disable_adapter():
        plain = answer_logits(adapted, encoder, conversations)
    found["adapter_effect"] = float((reference.logits - plain).abs().mean())
    del adapted
    dtypes = {plan.options.dtype, plan.trained.dtype} if plan.keeps_trained else {plan.options.dtype}
    allowed = max(TOLERANCE[dtype] for dtype in dtypes) * found["rms"]
    if not found["mean"] <= allowed:  # also when it is not a number
        raise _failed(
            [
                f"its logits differ from those of base and adapter by {found['mean']:.3g} on average (at most"
                f" {found['max']:.3g}), more than {allowed:.3g}, on {len(conversations)} rows"
            ]
        )
    differences = {"against_adapter": found}
    if plan.trained_quantized and (plan.options.fp8_aware or not plan.keeps_trained):
        differences["against_training"] = compare(
            merged, compute_outputs(load_adapted(plan, plan.trained), encoder, conversations)
        )
    return differences


def reload_strictly(plan: MergePlan, folder: Path) -> Any:
    """Load the merged model with transformers and check that every weight is used. Raises `UserError`."""
    from transformers import AutoModelForImageTextToText

    from qwen_vl_sft.compat.for_transformers import compute_linear_attention_on_cpu
    from qwen_vl_sft.modeling.attention import use_segmented_vision_attention
    from qwen_vl_sft.modeling.attention_kernels import SDPA, resolve_attention
    from qwen_vl_sft.modeling.loaded_weights import CHECKED, loading_problems

    # Nothing is computed without samples, and a GPU may be smaller than the model.
    cpu = plan.on_cpu or not plan.options.samples
    attention = resolve_attention(plan.base.attn_implementation, cpu, plan.options.dtype)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=getattr(torch, plan.options.dtype),
        attn_implementation=attention,
        device_map=None if cpu else {"": 0},
        **CHECKED,
    )
    model, loading = loaded
    problems = loading_problems(loading)
    if problems:
        raise _failed(problems)
    compute_linear_attention_on_cpu(model)
    if attention == SDPA:
        use_segmented_vision_attention(model)
    return model


def load_adapted(plan: MergePlan, settings: Any) -> Any:
    """Load base and adapter without merging them."""
    from qwen_vl_sft.inference.models import attach_adapter
    from qwen_vl_sft.modeling.base_model import load_model

    return attach_adapter(load_model(settings, plan.on_cpu), plan.tuned.folder)


def compute_outputs(model: Any, encoder: Encoder, conversations: Sequence[Conversation]) -> Outputs:
    """Compute the model's logits of the given answers, and its own answers."""
    from qwen_vl_sft.inference.engine.engine import answer_conversations

    logits = answer_logits(model, encoder, conversations)
    answers = answer_conversations(model, encoder, conversations, MAX_NEW_TOKENS)
    del model
    gc.collect()
    return Outputs(logits, answers)


def answer_logits(model: Any, encoder: Encoder, conversations: Sequence[Conversation]) -> torch.Tensor:
    """Compute the logits of the answers' tokens [N, vocabulary] float32, row by row and so without padding."""
    from qwen_vl_sft.batching.collator import pad
    from qwen_vl_sft.data.labels import IGNORE_INDEX

    model.eval()
    logits = []
    for conversation in conversations:
        batch = pad([encoder.encode(conversation)], encoder.pad_token_id)
        learned = batch.pop("labels")[0, 1:] != IGNORE_INDEX
        with torch.inference_mode():
            output = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        logits.append(output.logits[0, :-1].cpu()[learned].float())
    return torch.cat(logits)


def compare(one: Outputs, other: Outputs) -> dict[str, Any]:
    """Return maximum and mean difference of logits, the root mean square of `other`'s, and rows with equal answers."""
    difference = (one.logits - other.logits).abs()
    return {
        "max": float(difference.max()),
        "mean": float(difference.mean()),
        "rms": float(other.logits.square().mean().sqrt()),
        "same_answers": sum(a == b for a, b in zip(one.answers, other.answers, strict=True)),
        "rows": len(one.answers),
    }


def format_report(report: dict[str, Any]) -> str:
    """Format the table that ends a merge."""
    bits = "4-bit" if report["nf4_aware"] else "FP8" if report["fp8_aware"] else ""
    kind = f"base + adapter in {report['dtype']}"
    if bits:
        kind = (
            "the FP8 base + adapter, without rounded inputs"
            if bits == "FP8"
            else "the 4-bit base + adapter, as trained"
        )
    replaced = f", {len(report['replaced'])} tensors replaced" if report["replaced"] else ""
    lines = [
        f"base         {report['base']}",
        f"precision    {report['dtype']}{f', on dequantized {bits} weights' if bits else ''}",
        f"merged       {report['targets']} layers{replaced}; {report['tensors']} tensors in all",
        f"written      {report['bytes'] / 1e9:.3f} GB in {report['shards']} file(s)",
        f"peak memory  {report['peak_memory_writing'] / 2**30:.2f} GiB to merge,"
        f" {report['peak_memory'] / 2**30:.2f} GiB with the checks",
    ]
    for name, against in (("against_adapter", kind), ("against_training", "the quantized base + adapter, as trained")):
        if name in report:
            found = report[name]
            lines += [
                f"logits       against {against}: at most {found['max']:.2g}, on average {found['mean']:.2g}"
                f" (their size: {found['rms']:.2g})",
                f"answers      {found['same_answers']} of {found['rows']} the same",
            ]
    effect = report.get("against_adapter", {}).get("adapter_effect")
    if effect is not None:
        little = ", no more than rounding does: the tensors prove the merge, the logits do not"
        within = effect < 2 * report["against_adapter"]["mean"]
        lines.append(f"adapter      moves the logits by {effect:.2g} on average{little if within else ''}")
    if "against_adapter" not in report:
        lines.append("logits       not compared (--samples 0)")
    if report["trained_in_4bit"] and not report["nf4_aware"]:
        lines.append(
            "note         trained on 4-bit weights, merged into the original ones; --nf4_aware keeps what was trained"
        )
    if report["trained_in_fp8"] and not report["fp8_aware"]:
        lines.append(
            "note         trained on FP8 weights, merged into the original ones; --fp8_aware keeps what was trained"
        )
    return "\n".join(lines)


def _failed(problems: list[str]) -> UserError:
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return UserError(
        f"the merged model failed its check and was not kept: {problems[0]}{more}; check that the base is the one that the"
        f" run was trained on (--base)"
    )
