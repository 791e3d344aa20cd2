"""Check that all weights of a model came from its files: transformers gives random values to those it does not find."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from qwen_vl_sft.errors import UserError

# What `from_pretrained` must be given. A weight of another shape is then in its report, else a `RuntimeError`.
CHECKED = {"output_loading_info": True, "ignore_mismatched_sizes": True}
KINDS = {"missing_keys": "is missing", "unexpected_keys": "has no place in it", "mismatched_keys": "has another shape"}


def check_loaded(loading: Mapping[str, Collection[Any]], what: str) -> None:
    """Raise `UserError` unless every weight of the model came from a file, and every weight of the files went into it.

    Args:
        loading: transformers' report of a load with `CHECKED`.
        what: the model, as the message names it.
    """
    problems = loading_problems(loading)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(
            f"{what}: its files do not hold the model of its config.json: {problems[0]}{more}; fetch it again, or name"
            " another"
        )


def loading_problems(loading: Mapping[str, Collection[Any]]) -> list[str]:
    """Return a text for each weight that did not come from a file, or that had no place.

    Tied weights, of which one is enough, are not among them. Under ZeRO-3 transformers reports missing weights alone.
    """
    return [
        f"{key if isinstance(key, str) else key[0]} {problem}"
        for kind, problem in KINDS.items()
        for key in sorted(loading[kind])
    ]


def load_full_weights(model: Any, checkpoint: str) -> None:
    """Load a checkpoint's weights strictly, by the names that `save_pretrained` gave them.

    The Trainer looks for the names in memory, finds none, and goes on with the base weights, with a warning alone.
    """
    # Weights that train are in float32, frozen ones may be in less; each is copied into its own type.
    saved, loading = type(model).from_pretrained(checkpoint, dtype=torch.float32, **CHECKED)
    check_loaded(loading, f"checkpoint {checkpoint}")
    model.load_state_dict(saved.state_dict(), strict=True)
