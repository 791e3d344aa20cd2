"""A recipe: flat YAML plus `--key value`, read, typed and checked with every problem reported at once."""

from __future__ import annotations

import difflib
import os
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from qwen_vl_sft import tiny
from qwen_vl_sft.config.coercion import coerce, expected, is_text, load_yaml
from qwen_vl_sft.config.other_trainers import hint
from qwen_vl_sft.config.settings import (
    GROUPS,
    REFUSED_KEYS,
    TRAINING_DEFAULTS,
    DataSettings,
    ModelSettings,
    RunSettings,
    current_metric,
)
from qwen_vl_sft.config.trl_keys import TRL_KEYS
from qwen_vl_sft.errors import UserError, quoted, raise_all, shortened
from qwen_vl_sft.shipped_files import RECIPES, find_file, shipped_names

# Keys that may name a file or a folder, and the longest name of one in bytes; asked for a longer one, Python raises.
_PATHS = (
    "model_name_or_path",
    "init_adapter",
    "dataset_name",
    "output_dir",
    "resume_from_checkpoint",
    "image_features_dir",
)
_LONGEST_NAME = 255


@dataclass(frozen=True)
class Recipe:
    """A typed recipe. `training` holds keyword arguments of `SFTConfig`; `stated` the keys that the user wrote."""

    data: DataSettings
    model: ModelSettings
    run: RunSettings
    training: Mapping[str, Any]
    stated: frozenset[str] = field(default_factory=frozenset)

    def get(self, name: str) -> Any:
        """Return the value of a training key, with TRL's default where the recipe is silent."""
        return self.training[name] if name in self.training else training_default(name)

    def sets(self, name: str) -> bool:
        """Return whether the user has given a key another value than its default, which the file of a run states too."""
        return name in self.stated and self.values().get(name) != _default(name)

    @property
    def data_seed(self) -> int:
        """Return the seed of shuffling: `data_seed`, else `seed`."""
        stated = self.get("data_seed")
        return self.get("seed") if stated is None else stated

    @property
    def mixed_precision(self) -> str | None:
        """Return the type that layers compute in, whatever type their weights have; None for the type of the weights."""
        return "bfloat16" if self.get("bf16") else "float16" if self.get("fp16") else None

    @property
    def output_dir(self) -> Path:
        """Return the run folder."""
        return Path(self.training["output_dir"]).expanduser()

    def values(self) -> dict[str, Any]:
        """Return every key of ours and every training key that was set, as plain values; a valid recipe again."""
        return {**asdict(self.data), **asdict(self.model), **asdict(self.run), **self.training}

    def with_training(self, **values: Any) -> Recipe:
        """Return this recipe with other values of training keys; what the user stated stays as it was."""
        return replace(self, training=MappingProxyType({**self.training, **values}))

    def to_yaml(self) -> str:
        """Return the recipe as YAML, without `overwrite_output_dir`: a later run of it must not delete what is there."""
        values = {name: value for name, value in self.values().items() if name != "overwrite_output_dir"}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)


def key_hints() -> dict[str, Any]:
    """Return every key of a recipe with its type: ours first, then the keys of `SFTConfig`."""
    hints: dict[str, Any] = {}
    for group in GROUPS.values():
        hints |= typing.get_type_hints(group)
    allowed = [name for name in TRL_KEYS if name not in REFUSED_KEYS and name not in hints]
    return hints | {name: TRL_KEYS[name][0] for name in allowed}


def text_keys() -> set[str]:
    """Return the keys whose values are text, also those that look like numbers: names, paths, revisions."""
    return {name for name, hint in key_hints().items() if is_text(hint)}


def training_default(name: str) -> Any:
    """Return our default of a training key, else TRL's."""
    return TRAINING_DEFAULTS[name] if name in TRAINING_DEFAULTS else TRL_KEYS[name][1]


def _default(name: str) -> Any:
    for group in GROUPS.values():
        for entry in fields(group):
            if entry.name == name:
                return entry.default
    return training_default(name)


def read_recipe(path: str | Path | None, overrides: Mapping[str, Any]) -> Recipe:
    """Read a recipe file and command-line overrides.

    Only keys and types are checked here; `training.resolve` checks how they go together. Raises `UserError` with
    every unknown key and wrong type at once.
    """
    written = read_file(Path(path)) if path is not None else {}
    sources = dict.fromkeys(written, str(path)) | dict.fromkeys(overrides, "command line")
    merged = {**written, **overrides}
    if overrides.get("dataset_name", written.get("dataset_name")) != written.get("dataset_name"):
        # The revision in the file is one of the dataset beside it.
        merged = {name: value for name, value in merged.items() if name != "dataset_revision" or name in overrides}
    hints, problems, values = key_hints(), [], {}
    for name, value in merged.items():
        if name not in hints:
            problems.append(f"{sources[name]}: {_unknown(str(name), list(hints))}")
            continue
        try:
            values[name] = coerce(value, hints[name])
        except ValueError:
            problems.append(f"{sources[name]}: {name}: {quoted(value)} is not {expected(hints[name])}")
            continue
        if name in _PATHS and any(len(os.fsencode(part)) > _LONGEST_NAME for part in str(values[name]).split("/")):
            problems.append(f"{sources[name]}: {name}: {quoted(value)} has a name that is too long for a file")
    raise_all(problems)
    return build(values)


def build(values: Mapping[str, Any]) -> Recipe:
    """Build a recipe from typed values; keys that are not named take their defaults."""
    values = {name: resolve_builtin(value) if isinstance(value, str) else value for name, value in values.items()}
    if isinstance(model := values.get("model_name_or_path"), str):
        # transformers takes a name as it is, and a base in the adapter's configuration must be found from elsewhere too.
        values["model_name_or_path"] = os.path.expanduser(model)
    if isinstance(metric := values.get("metric_for_best_model"), str):
        values["metric_for_best_model"] = current_metric(metric)
    ours = {name for group in GROUPS.values() for name in _names(group)}
    training = {name: value for name, value in values.items() if name not in ours}

    def section(group: type) -> Any:
        return group(**{name: value for name, value in values.items() if name in _names(group)})

    return Recipe(
        section(DataSettings),
        section(ModelSettings),
        section(RunSettings),
        training=MappingProxyType(_resolved({**TRAINING_DEFAULTS, **training})),
        stated=frozenset(values),
    )


def _resolved(training: dict[str, Any]) -> dict[str, Any]:
    """Return the training keys with the values that will be used: an unset bf16, and workers kept without workers."""
    if training.get("bf16") is None:
        # As TRL's configuration makes it of a recipe without one.
        training["bf16"] = not training.get("fp16", False)
    if training.get("dataloader_persistent_workers") and not training.get("dataloader_num_workers"):
        training["dataloader_persistent_workers"] = False  # PyTorch refuses to keep workers where there are none
    return training


def resolve_builtin(value: str) -> str:
    """Return the folder of `builtin:NAME`, also for the folder of another installation that is gone; else the value."""
    moved = tiny.builtin_name(value) if not os.path.exists(value) else None
    return str(tiny.BUILTIN.get(moved or value, value))


def _names(group: type) -> set[str]:
    return {entry.name for entry in fields(group)}


def read_file(path: Path) -> dict[str, Any]:
    """Return the keys of a recipe file as they are written, unchecked.

    `path` may also name a shipped recipe from any folder. Raises `UserError` for what is no recipe.
    """
    try:
        text = (find_file(path, RECIPES) or path).read_text(encoding="utf-8")
    except FileNotFoundError:
        shipped = shipped_names(RECIPES)
        raise UserError(
            f"recipe {path} does not exist" + (f"; here are {', '.join(shipped)}" if shipped else "")
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"recipe {path} cannot be read: {reason}") from None
    try:
        written = load_yaml(text, text_keys()) if text.strip() else {}
    except RecursionError:
        raise UserError(f"recipe {path} is not valid YAML: its brackets are nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"recipe {path} is not valid YAML: {shortened(' '.join(str(error).split()))}") from None
    if not isinstance(written, dict):
        raise UserError(f"recipe {path} must hold `key: value` lines, not a {type(written).__name__}")
    return written


def _unknown(name: str, known: list[str]) -> str:
    if name in REFUSED_KEYS:
        return f"{name} cannot be set: {REFUSED_KEYS[name]}"
    if of_another_trainer := hint(name):
        return f"unknown key {name}; {of_another_trainer}"
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"unknown key {shortened(name)}" + (
        f"; did you mean {nearest[0]}?" if nearest else "; --help lists all keys"
    )
