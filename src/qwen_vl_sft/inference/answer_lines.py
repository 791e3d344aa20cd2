"""Answers on a terminal: streamed as they come, side by side in a table, or as a line of JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from qwen_vl_sft.inference.answering import Answer
from qwen_vl_sft.inference.source import Source, precision_summary

# Columns of the table: 80 in all.
ARM, TEXT, SECONDS, TOKENS = 10, 52, 9, 9


def print_stream(answers: Iterable[Answer]) -> Answer:
    """Print an answer as it comes, and return it when it is finished. Each text begins with the one before."""
    shown, last = "", None
    for last in answers:
        print(last.text[len(shown) :], end="", flush=True)
        shown = last.text
    assert last is not None
    assert last.finished
    print(flush=True)
    return last


def describe(answer: Answer) -> str:
    """Describe how long an answer took."""
    words = "token" if answer.tokens == 1 else "tokens"
    return f"{answer.seconds:.2f} s, first token after {answer.first_seconds:.2f} s, {answer.tokens:,} {words}"


def format_table(answers: Mapping[str, Answer]) -> str:
    """Format the arms' answers and times as a table of 80 columns."""
    lines = [f"{'arm':<{ARM}}{'answer':<{TEXT}}{'seconds':>{SECONDS}}{'tokens':>{TOKENS}}"]
    for arm, answer in answers.items():
        wrapped = [part for line in answer.text.splitlines() for part in textwrap.wrap(line, TEXT - 1) or [""]] or [
            "(empty)"
        ]
        lines.append(f"{arm:<{ARM}}{wrapped[0]:<{TEXT}}{answer.seconds:>{SECONDS}.2f}{answer.tokens:>{TOKENS},}")
        lines += [f"{'':<{ARM}}{part}" for part in wrapped[1:]]
    return "\n".join(lines)


def to_json(question: str, images: Sequence[str], source: Source, answers: Mapping[str, Answer]) -> str:
    """Format a question and every arm's answer as one line of JSON."""
    request = {
        "question": question,
        "images": list(images),
        "run": str(source.tuned.folder) if source.tuned else None,
        "model_name_or_path": source.recipe.model.model_name_or_path,
        "precision": precision_summary(source),
        "system_message": source.system_message,
    }
    answers_by_arm = {}
    for arm, answer in answers.items():
        seconds = {"first_seconds": round(answer.first_seconds, 3), "seconds": round(answer.seconds, 3)}
        answers_by_arm[arm] = {"answer": answer.text, "tokens": answer.tokens, **seconds}
    return json.dumps({**request, "arms": answers_by_arm}, ensure_ascii=False)
