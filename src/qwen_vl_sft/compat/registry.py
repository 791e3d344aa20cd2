"""Describe a change made to a library at run time, and look into the library that it changes."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Literal

Kind = Literal["workaround", "extension", "override"]


@dataclass(frozen=True)
class Patch:
    """A change made to a library at run time.

    Args:
        name: what the change does, in snake_case.
        package: the package that is changed, as pip names it, or "python".
        broken: the newest version that was seen to need the change, such as "<=2.11".
        without: what goes wrong without the change.
        applied_by: the function, method or class that applies it, from the package's root on.
        kind: "workaround" of a fault or a missing option, "extension" by what the library does not do, or "override" of
            a private method.
        links: issues, pull requests or sources.
        still_needed: shows the fault on the installed library without the change: True while it is there. None where a
            library cannot be asked.
        needs: what the check cannot do without: "cuda", "avx512" (of the CPU), or the package that is changed where it is
            optional.
        relies_on: functions of the library by their path, with parameters that they must have. A path that begins with
            "model." is looked up on a model of every family.
        reads: functions or classes of the library by their path, with words that their source must hold.
    """

    name: str
    package: str
    broken: str
    without: str
    applied_by: str
    kind: Kind = "workaround"
    links: tuple[str, ...] = ()
    still_needed: Callable[[], bool] | None = None
    needs: str | None = None
    relies_on: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    reads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def missing_requirement(patch: Patch) -> str | None:
    """Return why the checks of a patch cannot run here, None when they can."""
    if patch.needs == "cuda":
        import torch

        return None if torch.cuda.is_available() else "shows on a GPU only"
    if patch.needs == "avx512":
        import torch

        return None if torch.backends.cpu.get_cpu_capability() == "AVX512" else "shows on a CPU with AVX-512 only"
    try:
        metadata.distribution(patch.needs or "qwen_vl_sft")
    except metadata.PackageNotFoundError:
        return f"{patch.needs} is not installed"
    return None


def broken_reliance(patch: Patch, model: Any) -> list[str]:
    """Return what the library no longer has of the things that a patch relies on, one line each.

    `model` is a Qwen-VL model of any family, also on the meta device; families lack some of what others have, so a path
    into the model that does not exist is skipped.
    """
    problems = []
    for path, parameters in patch.relies_on.items():
        found = _look_up(path, model)
        if found is None:
            problems += [] if path.startswith("model.") else [f"{path} is gone"]
            continue
        taken = inspect.signature(found).parameters if parameters else ()
        problems += [f"{path} no longer takes {name}" for name in parameters if name not in taken]
    for path, words in patch.reads.items():
        found = _look_up(path, model)
        if found is None and path.startswith("model."):
            continue
        source = "" if found is None else inspect.getsource(found)
        problems += [f"{path} no longer reads {word}" for word in words if word not in source]
    return problems


def look_up(path: str) -> Any:
    """Return the object of a dotted path such as "transformers.trainer.Trainer._save". Raises `AttributeError`."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            found = getattr(found, name)
        return found
    raise AttributeError(f"{parts[0]} is not installed")


def source_of(path: str) -> str:
    """Return the source of the function or class of a dotted path."""
    return inspect.getsource(look_up(path))


def embedded_model() -> Any:
    """Build the embedded model without weights, on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from qwen_vl_sft import tiny

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tiny.MODEL_DIR))


def _look_up(path: str, model: Any) -> Any:
    try:
        if not path.startswith("model."):
            return look_up(path)
        found = model
        for name in path.split(".")[1:]:
            found = found[int(name)] if name.lstrip("-").isdigit() else getattr(found, name)
        return found
    except AttributeError:
        return None
