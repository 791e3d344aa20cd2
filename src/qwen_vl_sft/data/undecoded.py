"""Datasets whose columns are not decoded: images as bytes, numbers as their files have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Audio, ClassLabel, Features, Image, IterableDataset, LargeList, List, Value, Video

from qwen_vl_sft.data import formats

_SHORT_FLOATS = {"float16": np.float16, "float32": np.float32}


def undecoded(dataset: Any) -> Any:
    """Keep images as bytes and paths, which workers decode, and others' videos and sounds, which nobody reads.

    In columns that a format reads, classes get their names in place of their numbers, and numbers of 16 or 32 bits the
    value that their shortest text has: 0.1 and not 0.10000000149011612. All of that wherever they stand in a column.
    """
    read = {name for found in formats.FORMATS.values() for name in found.columns | found.optional}
    for column, feature in (dataset.features or {}).items():
        kept = _converted(feature, _without_decoding)
        if kept != feature:
            dataset = dataset.cast_column(column, kept)
        written = _converted(kept, _as_written)
        if written != kept and column in read:
            dataset = _with_values_as_written(dataset, column, kept, written)
    return dataset


def _converted(feature: Any, convert: Callable[[Any], Any]) -> Any:
    """Return a feature with all that it holds converted."""
    if isinstance(feature, Mapping):
        return {name: _converted(inner, convert) for name, inner in feature.items()}
    if isinstance(feature, List | LargeList):
        return replace(feature, feature=_converted(feature.feature, convert))
    return convert(feature)


def _without_decoding(feature: Any) -> Any:
    return type(feature)(decode=False) if isinstance(feature, Image | Video | Audio) else feature


def _as_written(feature: Any) -> Any:
    if isinstance(feature, ClassLabel):
        return Value("string")
    return Value("float64") if _is_short_float(feature) else feature


def _is_short_float(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in _SHORT_FLOATS


def _with_values_as_written(dataset: Any, column: str, feature: Any, written: Any) -> Any:
    if isinstance(dataset, IterableDataset):

        def convert(row: dict[str, Any]) -> dict[str, Any]:
            return {column: _value_as_written(row[column], feature)}

        return dataset.map(convert, features=Features({**dataset.features, column: written}))
    values = [_value_as_written(value, feature) for value in dataset.with_format(None)[column]]
    order, added = dataset.column_names, f"{column} as written"
    with_both = dataset.add_column(added, values, feature=written)
    return with_both.remove_columns(column).rename_column(added, column).select_columns(order)


def _value_as_written(value: Any, feature: Any) -> Any:
    if value is None:
        return None
    if isinstance(feature, Mapping):
        return {name: _value_as_written(value.get(name), inner) for name, inner in feature.items()}
    if isinstance(feature, List | LargeList):
        return [_value_as_written(part, feature.feature) for part in value]
    if _is_short_float(feature):
        return float(str(_SHORT_FLOATS[feature.dtype](value)))
    if not isinstance(feature, ClassLabel):
        return value
    # A class that is not known has the number -1.
    return feature.names[value] if value >= 0 else None
