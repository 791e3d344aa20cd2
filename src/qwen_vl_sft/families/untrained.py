"""Qwen's models that this package does not train, and why. Imports no library."""

from __future__ import annotations

from collections.abc import Mapping

UNTRAINED: Mapping[str, str] = {
    "qwen4_exp": (
        "its indexer loops over every token in Python, chooses keys by a rank that gives its weights no gradient, and its"
        " n-gram table takes about 90 GiB; it needs a way of transformers to train it first"
    ),
}


def unknown_model(source: str, model_type: object, known: str) -> str:
    """Return the message for a model of no family: the reason where there is one, then what is `known` instead."""
    reason = UNTRAINED.get(str(model_type))
    return f"{source} is a {model_type} model{f', which is not trained: {reason}' if reason else ''}; {known}"
