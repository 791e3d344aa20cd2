"""Pretrain the tiny model to read charts and to answer in the style that its system message asks for."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from random import Random

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from qwen_vl_sft.data.formats.chartqa import CHARTQA_SYSTEM_MESSAGE
from qwen_vl_sft.tools.tiny.batches import IGNORE, Batcher, Example
from qwen_vl_sft.tools.tiny.charts import Chart, draw, random_chart
from qwen_vl_sft.tools.tiny.questions import BRIEF_PROMPTS, DEFAULT_PROMPT, VERBOSE_PROMPTS, ask, captions

EQUAL_SIZE = "flash_equal_size"  # "flash" in the name makes the vision tower pass cu_seqlens and call it once


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    First the model only writes captions, which say most about a chart for each token; then it also answers questions,
    in sentences and in short replies by turns. All shares are of the steps.
    """

    steps: int = 750
    caption_share: float = 0.3
    caption_charts: int = 64  # a step
    charts: int = 40  # a step, once there are questions
    questions: int = 4  # a chart: what every kind of chart can offer
    decay_from: float = 0.7
    warmup: int = 30  # steps
    matrix_rate: float = 5e-3
    vector_rate: float = 3e-3
    # One step of Adam moves a filter by the rate in each of its 1,176 inputs, and on a white page all of them add up.
    # At the rate of the other weights, and without captions, the model still answered at chance after 400 steps.
    filter_rate: float = 3e-4
    max_grad_norm: float = 1.0


def equal_size_attention(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **unused):
    """Compute full attention within images of equal size: [1, H, N * L, D] as [N, H, L, D] in one call."""
    lengths = cu_seq_lens_q.diff()
    assert (lengths == lengths[0]).all(), "the pretraining charts all have one size"

    def split(x: torch.Tensor) -> torch.Tensor:
        return x[0].unflatten(1, (len(lengths), -1)).transpose(0, 1)

    out = F.scaled_dot_product_attention(split(query), split(key), split(value), scale=scaling)
    return out.transpose(1, 2).flatten(0, 1)[None], None


def pretrain(
    model: Qwen2VLForConditionalGeneration,
    processor: Qwen2VLProcessor,
    schedule: Schedule,
    held_out: Collection[Chart],
    report: Callable[[str], None],
) -> None:
    """Train in place, in float32 on the CPU; never show a chart of `held_out`."""
    AttentionInterface.register(EQUAL_SIZE, equal_size_attention)
    AttentionMaskInterface.register(EQUAL_SIZE, lambda *args, **kwargs: None)
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": EQUAL_SIZE})
    model.train()
    optimizers = _optimizers(model, schedule)
    batcher, rng, started = Batcher(processor), Random("pretrain"), time.monotonic()
    for step in range(schedule.steps):
        captions_only = step < schedule.caption_share * schedule.steps
        verbose = captions_only or step % 2 == 0
        if captions_only:
            examples = _examples(rng, schedule.caption_charts, 0, held_out)
        else:
            examples = _examples(rng, schedule.charts, schedule.questions, held_out)
        batch = batcher(examples, _system(rng, verbose), verbose)
        loss, right = _loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.max_grad_norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * _rate(step, schedule)
            optimizer.step()
            optimizer.zero_grad()
        if step % 15 == 0 or step == schedule.steps - 1:  # an odd number, so that both styles get their turn
            style = "captions" if captions_only else "sentences" if verbose else "short replies"
            seconds = time.monotonic() - started
            report(f"step {step} of {schedule.steps}, {seconds:.0f} s, {style}: loss {loss:.3f}, right {right:.0%}")


def _optimizers(model: Qwen2VLForConditionalGeneration, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices, which lowers the loss faster than Adam, and Adam for all other weights."""
    matrices, vectors, filters = [], [], []
    for name, parameter in model.named_parameters():
        if "patch_embed" in name:
            filters.append(parameter)
        elif parameter.ndim == 2 and "embed_tokens" not in name:
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    groups = [{"params": vectors, "lr": schedule.vector_rate}, {"params": filters, "lr": schedule.filter_rate}]
    optimizers = [
        torch.optim.Muon(matrices, lr=schedule.matrix_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def _rate(step: int, schedule: Schedule) -> float:
    """Return the factor of the learning rates: linear warm-up, constant, then linear decay to zero."""
    left = (schedule.steps - step) / (schedule.steps * (1 - schedule.decay_from))
    return min(1.0, (step + 1) / schedule.warmup, left)


def _examples(rng: Random, charts: int, questions: int, held_out: Collection[Chart]) -> list[Example]:
    examples: list[Example] = []
    while len(examples) < charts:
        chart = random_chart(rng)
        if chart not in held_out:
            told = captions(rng, chart)
            asked = [rng.choice(told), *ask(rng, chart, questions)] if questions else told
            examples.append(Example(draw(chart), asked))
    return examples


def _system(rng: Random, verbose: bool) -> str:
    """Draw a system message, mostly the chat template's own or the tutorial's."""
    if verbose:
        return DEFAULT_PROMPT if rng.random() < 0.8 else rng.choice(VERBOSE_PROMPTS)
    return CHARTQA_SYSTEM_MESSAGE if rng.random() < 0.5 else rng.choice(BRIEF_PROMPTS)


def _loss(model: Qwen2VLForConditionalGeneration, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Return the mean loss of the answer tokens, and the share of them that the model would choose."""
    labels = batch.pop("labels")[:, 1:]
    hidden = model.model(**batch, use_cache=False).last_hidden_state[:, :-1]
    answer = labels != IGNORE
    logits, wanted = model.lm_head(hidden[answer]), labels[answer]
    return F.cross_entropy(logits, wanted), (logits.argmax(-1) == wanted).float().mean().item()
