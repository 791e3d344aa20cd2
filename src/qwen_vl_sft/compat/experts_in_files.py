"""Have transformers read and write the experts of Qwen3-VL-MoE in the form of the files that they came from.

The files that Qwen publishes hold each expert's matrix turned: `gate_up_proj` as [E, H, 2 I], where the model has
[E, 2 I, H]. transformers 5.23 turns a tensor on reading when its shape is not the parameter's.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import torch
from transformers.core_model_loading import Transpose, WeightConverter, revert_weight_conversion

from qwen_vl_sft.compat.registry import Patch

# Models whose files hold their experts turned.
_TURNED: WeakSet[Any] = WeakSet()
# Set while what is turned may stay as it lies in memory.
_WITHOUT_COPIES: ContextVar[bool] = ContextVar("without_copies", default=False)


def read_by_whole_shapes() -> None:
    """Have tensors of files compared with whole parameters, of which ZeRO-3 holds none any more when it reads."""
    original: Any = Transpose.convert
    if hasattr(original, "by_whole_shapes"):
        return

    @functools.wraps(original)
    def convert(operation: Any, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any) -> Any:
        patterns, model = (source_patterns, target_patterns), kwargs.get("model")
        if model is None or not operation.check_dims:
            return original(operation, input_dict, *patterns, **kwargs)
        shapes = _Shapes(model)
        (tensor,) = input_dict.values()
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        turned = tensor.shape != shapes.get_parameter(kwargs["full_layer_name"]).shape
        if turned:
            _TURNED.add(model)
            if _WITHOUT_COPIES.get():
                name = operation.get_target_pattern(input_dict, *patterns)
                return {name: tensor.transpose(operation.dim0, operation.dim1)}
        return original(operation, input_dict, *patterns, **{**kwargs, "model": shapes})

    convert.by_whole_shapes = True  # type: ignore[attr-defined]
    Transpose.convert = convert  # type: ignore[method-assign, assignment]


@contextmanager
def turned_without_copies() -> Iterator[None]:
    """Have tensors of files that are turned stay as they lie in memory; they are not contiguous then."""
    token = _WITHOUT_COPIES.set(True)
    try:
        yield
    finally:
        _WITHOUT_COPIES.reset(token)


def write_as_read(model: Any) -> None:
    """Have a model that `from_pretrained` has read saved with its experts turned, where its files had them so."""
    if model not in _TURNED:
        return
    model._weight_conversions = [
        _always_turned(entry) if _turns(entry) else entry for entry in model._weight_conversions
    ]


class _Shapes:
    """Gives the shapes of a model's parameters, also of those that ZeRO-3 has split."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def get_parameter(self, name: str) -> Any:
        parameter = self.model.get_parameter(name)
        return SimpleNamespace(shape=getattr(parameter, "ds_shape", parameter.shape))


def _turns(entry: Any) -> bool:
    return isinstance(entry, WeightConverter) and any(isinstance(step, Transpose) for step in entry.operations)


def _always_turned(entry: WeightConverter) -> WeightConverter:
    turned: Any = [Transpose(step.dim0, step.dim1) for step in entry.operations]  # type: ignore[attr-defined]
    return WeightConverter(entry.source_patterns, entry.target_patterns, turned)


def _turns_what_zero3_has_split() -> bool:
    """Return whether a tensor in the shape of its parameter is turned once ZeRO-3 has split that."""
    split = SimpleNamespace(shape=torch.Size([0]), ds_shape=torch.Size([2, 3, 4]))
    model = SimpleNamespace(get_parameter=lambda name: split)
    original: Any = getattr(Transpose.convert, "__wrapped__", Transpose.convert)
    operation = Transpose(1, 2, check_dims=True)
    found = original(operation, {"w": torch.zeros(2, 3, 4)}, ["w"], ["w"], model=model, full_layer_name="w")
    return tuple(found["w"].shape) != (2, 3, 4)


def _writes_otherwise_than_read() -> bool:
    """Return whether a parameter that was turned on reading is not turned back on writing."""
    model: Any = torch.nn.Module()
    model.experts = torch.nn.Parameter(torch.zeros(2, 3, 4))
    model.config = None
    model._weight_conversions = [WeightConverter("experts", "experts", [Transpose(1, 2, check_dims=True)])]
    return tuple(revert_weight_conversion(model, {"experts": model.experts})["experts"].shape) == (2, 3, 4)


PATCHES = (
    Patch(
        name="read_by_whole_shapes",
        package="transformers",
        broken="<=5.23",
        without="ZeRO-3 cannot read the experts of a Qwen3-VL-MoE that transformers has saved.",
        applied_by="compat.experts_in_files.read_by_whole_shapes",
        still_needed=_turns_what_zero3_has_split,
        relies_on={"transformers.core_model_loading.Transpose.convert": ("input_dict",)},
    ),
    Patch(
        name="write_as_read",
        package="transformers",
        broken="<=5.23",
        without="A full Qwen3-VL-MoE is saved with its experts turned against the files it came from.",
        applied_by="compat.experts_in_files.write_as_read",
        links=(
            "https://github.com/huggingface/transformers/issues/47031",
            "https://github.com/verl-project/verl/pull/6210",
        ),
        still_needed=_writes_otherwise_than_read,
        reads={"transformers.core_model_loading.revert_weight_conversion": ("_weight_conversions",)},
    ),
)
