"""Read LoRA adapters whose layers have other names than in transformers 5, as other trainers and versions write them.

Known layouts of a Qwen-VL model, after PEFT's own `base_model.model.`:

    language model                 vision tower        written with
    model.language_model.layers    model.visual        transformers 4.52 and later (this package; TRL, ms-swift, unsloth, ...)
    model.layers                   visual              transformers before 4.52, with any of those trainers
    language_model.model.layers    visual              adapters converted for vLLM

Keys may also carry the adapter's name (`lora_A.default.weight`) and wrappers of FSDP or torch.compile.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_vl_sft.errors import UserError, first_line, quoted

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
# Written by PEFT before 0.7, and by trainers with `save_safetensors: false`.
PICKLED_ADAPTER = "adapter_model.bin"
PREFIX = "base_model.model."
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_OUTER = {"base_model", "model", "language_model", "module"}
_LORA = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))(?P<rest>(?:\.\w+)*)"
)
# Names before transformers 4.52, by those of now; for a part of the model that an adapter has no layers in.
_FORMER = {"model.language_model.": "model.", "model.": ""}


@dataclass(frozen=True)
class Layout:
    """An adapter as this model names its layers: PEFT's configuration, and the new name of each key of its file."""

    config: dict[str, Any]
    names: dict[str, str]


def read_adapter_config(folder: Path, key: str = "--run") -> dict[str, Any]:
    """Read PEFT's configuration of an adapter, which `key` names. Raises `UserError`."""
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {folder / ADAPTER_CONFIG} cannot be read: {error}; name a finished run") from None
    if not isinstance(config, dict):
        raise UserError(f"{key}: {folder / ADAPTER_CONFIG} is not an adapter's configuration; name a finished run")
    return config


def adapter_keys(folder: Path, key: str = "--run") -> list[str]:
    """Return the keys of an adapter's weights, without reading them. Raises `UserError`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{key}: {folder / ADAPTER_FILE} cannot be read: {first_line(error)}; copy it again, or name another checkpoint"
        ) from None


def bare(name: str) -> str:
    """Return a layer's name without what the layouts differ in: `layers.0.mlp.up_proj`, `visual.merger.mlp.0`, `lm_head`."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    first = next((index for index, part in enumerate(parts) if part not in _OUTER), len(parts))
    return ".".join(parts[first:])


def adapted_layers(keys: Iterable[str]) -> set[str]:
    """Return the bare names of the layers that an adapter's keys put LoRA on."""
    found = [match for key in keys if (match := _LORA.fullmatch(key)) and match["part"].endswith("A")]
    # Those of several parameters of a module stand around each other.
    return {re.sub(r"(\.base_layer)+$", "", bare(match["module"])) for match in found}


@contextlib.contextmanager
def in_our_layout(folder: Path, model: Any, key: str = "--run") -> Iterator[Path]:
    """Yield `folder`, or where its adapter names layers in another way a temporary one with the names of `model`.

    `model` may hold adapters already. What has no place in it keeps its name. Raises `UserError` for unreadable files.
    """
    keys = adapter_keys(folder, key)
    config = read_adapter_config(folder, key)
    if config.get("peft_type") != "LORA":
        _check_kind(config, folder, key)
        yield folder
        return
    layout = place(config, keys, model)
    if layout is None:
        yield folder
        return
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory(prefix="adapter-") as name:
        there = Path(name)
        tensors = {layout.names[old]: tensor for old, tensor in load_file(folder / ADAPTER_FILE).items()}
        save_file(tensors, there / ADAPTER_FILE, metadata={"format": "pt"})
        (there / ADAPTER_CONFIG).write_text(json.dumps(layout.config, indent=2) + "\n", encoding="utf-8")
        yield there


def _check_kind(config: Mapping[str, Any], folder: Path, key: str) -> None:
    from peft import PeftType
    from peft import __version__ as version

    kind = config.get("peft_type")
    if kind not in [known.value for known in PeftType]:
        raise UserError(
            f"{key}: {folder / ADAPTER_CONFIG} has peft_type {quoted(kind)}, which PEFT {version} does not know; install a"
            " PEFT that does, or name another adapter"
        )


def place(config: Mapping[str, Any], keys: Iterable[str], model: Any) -> Layout | None:
    """Return an adapter as `model` names its layers; None where it does so already.

    Names and patterns of the configuration are understood as they were meant: on the names of the adapter's layout. A
    regular expression such as `^(model(?=\\.).*\\.(gate_proj))$` means the language model in one layout, and reaches the
    vision tower in another.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    modules = {_plain(name): module for name, module in base.named_modules() if ".lora_" not in name}
    ours = {bare(name): name for name in modules if bare(name)}
    names, prefixes, targets = {}, {}, set()
    for key in keys:
        module, tail = _split(key)
        name = ours.get(bare(module), module)
        names[key] = f"{PREFIX}{name}{tail}"
        if name in modules:
            prefixes[name.removesuffix(bare(name))] = module.removesuffix(bare(name))
            if tail.startswith(".lora_") and _holds_matrix(modules[name]):
                targets.add(name)

    def theirs(name: str) -> str:
        inner = bare(name)
        prefix = name.removesuffix(inner)
        moved = any(ours != former for ours, former in prefixes.items())
        return prefixes.get(prefix, _FORMER.get(prefix, prefix) if moved else prefix) + inner

    linear = [name for name, module in modules.items() if _holds_matrix(module)]
    is_target = _target_test(config)
    if all(key == name for key, name in names.items()) and targets == {name for name in linear if is_target(name)}:
        return None
    # Layers that are meant but not in the file stay among the targets: whoever loads the adapter tells that they are missing.
    everything = sorted(targets | {name for name in linear if is_target(theirs(name))})
    changed: dict[str, Any] = {
        "target_modules": everything,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": _saved(config, modules, theirs),
    }
    for pattern in ("rank_pattern", "alpha_pattern"):
        changed[pattern] = _of_each(config.get(pattern) or {}, everything, theirs)
    return Layout(dict(config) | changed, names)


def _split(key: str) -> tuple[str, str]:
    """Return the module of a key, without PEFT's prefix, and what PEFT now writes after its name."""
    key = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
    if found := _LORA.fullmatch(key):
        weight = ".weight" if found["part"] in ("lora_A", "lora_B") else ""
        bias = ".bias" if found["rest"].endswith(".bias") else weight
        module = found["module"].removeprefix(PREFIX)
        # Layers in whose parameters PEFT puts LoRA, as those of experts, are wrapped more than once.
        inner = "".join(re.findall(r"\.base_layer", module))
        return module.removesuffix(inner), f"{inner}.{found['part']}{bias}"
    module, _, last = re.sub(r"\.modules_to_save(\.\w+)?(?=\.\w+$)", "", key).rpartition(".")
    return module.removeprefix(PREFIX), f".{last}"


def _holds_matrix(module: Any) -> bool:
    """Return whether a module is one that PEFT gives LoRA to by its name; those of experts are given it by parameters."""
    from torch import nn

    return hasattr(module, "in_features") or isinstance(module, nn.Embedding | nn.Conv2d | nn.Conv3d)


def _plain(name: str) -> str:
    """Return a module's name as it is without PEFT's wrapper around it."""
    return name.removesuffix(".base_layer")


def _target_test(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Return whether PEFT puts LoRA on a layer, as a function of its name."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    chosen = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    given = {name: config[name] for name in chosen if config.get(name)}
    if "target_modules" not in given:
        return lambda name: False
    lora = LoraConfig(**given)
    return lambda name: bool(check_target_module_exists(lora, name))


def _saved(config: Mapping[str, Any], modules: Iterable[str], theirs: Callable[[str], str]) -> list[str] | None:
    """Return the full names of the modules that were saved whole; an entry without a module stays, to be told."""
    found: list[str] = []
    for entry in config.get("modules_to_save") or ():
        found += [name for name in modules if name and theirs(name).endswith(entry)] or [entry]
    return found or None


def _of_each(pattern: Mapping[str, Any], targets: Iterable[str], theirs: Callable[[str], str]) -> dict[str, Any]:
    """Return a rank or alpha pattern by the full names of the layers that it means."""
    from peft.utils.other import get_pattern_key

    keys = [*pattern]
    meant = {name: get_pattern_key(keys, theirs(name)) for name in targets}
    return {re.escape(name): pattern[key] for name, key in meant.items() if key in pattern}
