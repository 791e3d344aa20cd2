"""Where the tensors of a base model's files are in the model: renamed, and those of experts also turned, cut or apart."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Place:
    """Where the values of a tensor in a file are in a parameter of the model.

    Attributes:
        name: the parameter.
        turns: the file may hold its last two dimensions the other way round; whether it does is seen by the shape.
        expert: the one that the tensor belongs to, of a parameter [E, out, in] of all; None for a whole parameter.
        part: which of `parts` equal runs of the expert's rows it has.
        parts: the number of runs.
    """

    name: str
    turns: bool = False
    expert: int | None = None
    part: int = 0
    parts: int = 1

    def fits(self, shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
        """Return whether a tensor of this shape can be there, in a parameter of the shape `whole`."""
        if self.expert is None:
            return shape == whole or (self.turns and shape == (*whole[:-2], whole[-1], whole[-2]))
        return self.expert < whole[0] and shape == (whole[1] // self.parts, whole[2])

    def rows(self, out: int) -> slice:
        """Return which of an expert's `out` rows the tensor has."""
        size = out // self.parts
        return slice(self.part * size, (self.part + 1) * size)


def as_in_model(place: Place, tensor: torch.Tensor, whole: tuple[int, ...]) -> torch.Tensor:
    """Return a file's tensor as the model of the parameter's shape `whole` has it, and a model's as the file has it."""
    return tensor if place.expert is not None or tuple(tensor.shape) == whole else tensor.transpose(-1, -2)


def finder(model: Any) -> Callable[[str], Place]:
    """Return a function from a key in a checkpoint's file to its place in `model`, by transformers' own rules.

    transformers 5 loads `visual.*` and `model.layers.*` (and other spellings) into `model.visual.*` and
    `model.language_model.layers.*`, and experts, which lie one by one or turned in some files, into one parameter.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state = model.state_dict()

    def find(key: str) -> Place:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if pattern is None:
            return Place(name)
        converter = by_pattern[pattern]
        operations = [type(operation).__name__ for operation in converter.operations]
        if operations == ["Transpose"]:
            return Place(name, turns=True)
        assert operations in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]), (
            f"{key} is loaded by {operations}"
        )
        number = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), key)
        assert number is not None, f"{key} names no expert"
        parts = len(converter.source_patterns)
        return Place(name, False, int(number[1]), converter.source_patterns.index(pattern), parts)

    return find
