"""Datasets whose columns are not decoded: images as bytes, numbers and texts as their files have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import (
    Audio,
    ClassLabel,
    Dataset,
    Features,
    Image,
    IterableDataset,
    Json,
    LargeList,
    List,
    Value,
    Video,
    concatenate_datasets,
)
from datasets.utils.json import ujson_dumps, ujson_loads

from qwen_vl_sft.data import formats

_SHORT_FLOATS = {"float16": np.float16, "float32": np.float32}


def undecoded(dataset: Any) -> Any:
    """Keep images as bytes and paths, which workers decode, and others' videos and sounds, which nobody reads.

    In columns that a format reads, classes get their names in place of their numbers, numbers of 16 or 32 bits the
    value that their shortest text has: 0.1 and not 0.10000000149011612, and values of several kinds the text that
    `datasets` takes for JSON: "5.10" and not 5.1. All of that wherever they stand in a column.
    """
    read = {name for found in formats.FORMATS.values() for name in found.columns | found.optional}
    features = dataset.features or {}
    kept = {column: _converted(feature, _without_decoding) for column, feature in features.items()}
    for column, feature in kept.items():
        if feature != features[column]:
            dataset = dataset.cast_column(column, feature)
    written = {column: _converted(feature, _as_written) for column, feature in kept.items() if column in read}
    changed = {column: feature for column, feature in written.items() if feature != kept[column]}
    return _with_values_as_written(dataset, kept, changed) if changed else dataset


def _converted(feature: Any, convert: Callable[[Any], Any]) -> Any:
    """Return a feature with all that it holds converted."""
    if isinstance(feature, Mapping):
        return {name: _converted(inner, convert) for name, inner in feature.items()}
    if isinstance(feature, List | LargeList):
        return replace(feature, feature=_converted(feature.feature, convert))
    return convert(feature)


def _without_decoding(feature: Any) -> Any:
    return type(feature)(decode=False) if isinstance(feature, Image | Video | Audio | Json) else feature


def _as_written(feature: Any) -> Any:
    if isinstance(feature, ClassLabel):
        return Value("string")
    if isinstance(feature, Json):
        return Json()
    return Value("float64") if _is_short_float(feature) else feature


def _is_short_float(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in _SHORT_FLOATS


def _with_values_as_written(dataset: Any, kept: Mapping[str, Any], written: Mapping[str, Any]) -> Any:
    """Convert the columns of `written`, features after the conversion; `kept` are those before."""
    if isinstance(dataset, IterableDataset):

        def convert(row: dict[str, Any]) -> dict[str, Any]:
            # The JSON of these is decoded when the next step reads the stream.
            return {column: _converted_value(row[column], kept[column], _value_as_written) for column in written}

        return dataset.map(convert, features=Features({**dataset.features, **written}))
    order, raw = dataset.column_names, dataset.with_format(None)
    for column, feature in written.items():
        values = [_converted_value(value, kept[column], _value_as_written) for value in raw[column]]
        # `add_column` does not take values of several kinds.
        converted = Dataset.from_dict({column: values}, features=Features({column: feature}))
        dataset = concatenate_datasets([dataset.remove_columns(column), converted], axis=1)
    return dataset.select_columns(order)


def _converted_value(value: Any, feature: Any, convert: Callable[[Any, Any], Any]) -> Any:
    """Convert the values of a column, inside dictionaries and lists too, each by itself and its feature."""
    if value is None:
        return None
    if isinstance(feature, Mapping):
        return {name: _converted_value(value.get(name), inner, convert) for name, inner in feature.items()}
    if isinstance(feature, List | LargeList):
        return [_converted_value(part, feature.feature, convert) for part in value]
    return convert(value, feature)


def _value_as_written(value: Any, feature: Any) -> Any:
    if _is_short_float(feature):
        return float(str(_SHORT_FLOATS[feature.dtype](value)))
    if isinstance(feature, Json):
        return _json_as_written(value)
    if not isinstance(feature, ClassLabel):
        return value
    # A class that is not known has the number -1.
    return feature.names[value] if value >= 0 else None


def storable(row: Mapping[str, Any], features: Features) -> dict[str, Any]:
    """Return a row whose values of several kinds are JSON, so that `datasets` does not take texts in them for JSON."""
    stored: dict[str, Any] = _converted_value(row, features, _as_json)
    return stored


def _as_json(value: Any, feature: Any) -> Any:
    return ujson_dumps(value) if isinstance(feature, Json) and feature.decode else value


def _json_as_written(stored: str) -> str:
    """Return the JSON of a stored value, or of the text that was stored as it is because it can be read as JSON.

    `datasets` writes values in one form alone, and missing ones not at all; whatever is in another form was a text
    (findings/datasets_texts_read_as_json.sh). In the same form are `true` and `{"a":1}`: they stay values.
    """
    value = ujson_loads(stored)
    if isinstance(value, str) or (isinstance(value, list) and any(isinstance(part, dict) for part in value)):
        return stored
    return stored if stored != "null" and ujson_dumps(value) == stored else ujson_dumps(stored)
