"""Compare the answers of an engine with this package's, and say what follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# How much the engine's token may lie below ours where an answer first differs, as a share of the root mean square of the
# logits there. Sums in another order move logits by about 1e-5 of that in float32, and by some percent in half precision.
NEAR_TIE = {"float32": 4e-3, "float16": 8e-2, "bfloat16": 0.32, "float8": 0.32}
BASE, TUNED = "base", "tuned"


@dataclass(frozen=True)
class Difference:
    """An answer of the engine that is not ours.

    `margin` is how much our first other token lies above the engine's, in our logits and as a share of their root mean
    square; None where the prompts differ, so that it means nothing.
    """

    number: int
    arm: str
    ours: str
    engines: str
    margin: float | None
    near_tie: bool


@dataclass(frozen=True)
class ArmResult:
    """One arm: how many rows have the same prompt, the same answer, and another answer at a near tie or not."""

    rows: int
    same_prompts: int
    same: int
    near_ties: int
    different: int


@dataclass(frozen=True)
class Effect:
    """How many answers the adapter changes, of ours and of the engine's."""

    rows: int
    ours: int
    engines: int


@dataclass(frozen=True)
class ServingVerdict:
    """What a check found; `problems` is empty where the engine serves the model as it is."""

    problems: list[str] = field(default_factory=list)

    @property
    def proven(self) -> bool:
        """Return whether the engine was seen to serve the model."""
        return not self.problems


def first_difference(ours: Sequence[int], theirs: Sequence[int], ends: frozenset[int]) -> int | None:
    """Return where two answers differ first, up to the end of each; None where they are the same.

    The token that ends an answer counts as one, whichever of `ends` it is.
    """
    one, other = _up_to_end(ours, ends), _up_to_end(theirs, ends)
    if one == other:
        return None
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _up_to_end(tokens: Sequence[int], ends: frozenset[int]) -> list[int | None]:
    found: list[int | None] = []
    for token in tokens:
        if token in ends:
            return [*found, None]
        found.append(token)
    return found


def arm_result(rows: Sequence[int], same_prompts: Mapping[int, bool], differences: Sequence[Difference]) -> ArmResult:
    """Count an arm's rows."""
    ties = sum(difference.near_tie for difference in differences)
    return ArmResult(
        rows=len(rows),
        same_prompts=sum(same_prompts[number] for number in rows),
        same=len(rows) - len(differences),
        near_ties=ties,
        different=len(differences) - ties,
    )


def judge(
    title: str, arms: Mapping[str, ArmResult], effect: Effect | None, vision_left_out: int | None = None
) -> ServingVerdict:
    """Return what is wrong, in the order in which it should be mended.

    Args:
        title: the engine's name.
        arms: the results.
        effect: what the adapter changes; None without one.
        vision_left_out: of the tuned answers that differ, how many are ours without the vision part of the adapter.
    """
    problems = []
    for arm, result in arms.items():
        if other := result.rows - result.same_prompts:
            problems.append(
                f"{arm}: {other} of {result.rows} prompts have other tokens in {title}; compare the limits of image sizes,"
                f" the chat template and the system message"
            )
    tuned = arms.get(TUNED)
    if effect is not None and tuned is not None:
        if not effect.ours:
            problems.append(
                f"the adapter changes none of our {effect.rows} answers, so whether {title} applies it cannot be seen; take"
                f" more rows with --max_samples"
            )
        elif not effect.engines and not vision_left_out:
            problems.append(
                f"{title} loads the adapter and does nothing with it: all {effect.rows} answers are the base's; its"
                f" weights have other names than the layers of {title}, or are of another model. Merge it"
            )
    if vision_left_out and tuned is not None:
        problems.append(
            f"{title} leaves out the vision part of the adapter: {vision_left_out} of the {tuned.different} other answers"
            f" are those without it. Serve it with the options of the model card, or merge it"
        )
    for arm, result in arms.items():
        if result.different:
            problems.append(
                f"{arm}: {result.different} of {result.rows} answers differ, and not at a near tie of two tokens"
            )
    return ServingVerdict(problems)


def as_json(arms: Mapping[str, ArmResult], effect: Effect | None, differences: Sequence[Difference]) -> dict[str, Any]:
    """Return the results as plain values."""
    return {
        "arms": {arm: asdict(result) for arm, result in arms.items()},
        "effect": asdict(effect) if effect else None,
        "differences": [asdict(difference) for difference in differences],
    }


def format_arms(arms: Mapping[str, ArmResult]) -> list[str]:
    """Format the table of the arms in 80 columns."""
    lines = [f"{'':<10}{'rows':>8}{'same prompt':>14}{'same answer':>14}{'near tie':>12}{'different':>12}"]
    for arm, result in arms.items():
        counts = f"{result.rows:>8,}{result.same_prompts:>14,}{result.same:>14,}{result.near_ties:>12,}"
        lines.append(f"{arm:<10}{counts}{result.different:>12,}")
    return lines
