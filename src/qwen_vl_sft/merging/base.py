"""Read the two halves of a merge: the base model's files under their own key names, and the adapter."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.errors import UserError, first_line
from qwen_vl_sft.families.registry import family_of
from qwen_vl_sft.inference.source import ADAPTER_FILE
from qwen_vl_sft.merging.plan import read_adapter_config
from qwen_vl_sft.modeling.base_model import build_on_meta, load_family, quantization_config

if TYPE_CHECKING:
    from peft import LoraConfig

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "lm_head.weight"
PREFIX = "base_model.model."
WAY_OUT = "name the base model it was trained on with --base"
# Fields of PEFT's LoraConfig that may differ from their defaults; any other one could change what a merge means.
READ_FIELDS = {
    "task_type", "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "r", "lora_alpha",
    "lora_dropout", "use_rslora", "use_dora", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern", "init_lora_weights", "peft_version", "runtime_config",
}  # fmt: skip
# Other ways to begin (PiSSA, OLoRA, LoftQ, CorDA, ...) change the base's weights too.
INITIALISATIONS = (True, False, "gaussian", "orthogonal")


@dataclass(frozen=True)
class Weight:
    """A tensor of the base: its `key` in `file`, its `name` in the model, its shape; `written_as` if not under its key."""

    key: str
    name: str
    file: Path
    shape: tuple[int, ...]
    written_as: str | None = None

    @property
    def output(self) -> str:
        """Return its key in the merged model."""
        return self.written_as or self.key

    @property
    def module(self) -> str:
        """Return the module whose `weight` it is; empty for any other tensor."""
        return self.name.removesuffix(".weight") if self.name.endswith(".weight") else ""


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to one layer: A [r, in], B [out, r] and their scaling; with DoRA also magnitudes [out]."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the merged weight [out, in] in float32: W + scaling * B A.

        With DoRA each row of that sum has the length that was learned (Liu et al. 2024, https://arxiv.org/abs/2402.09353):
        magnitude * (W + scaling * B A) / ||W + scaling * B A||, with the norm of each row.
        """
        merged = weight.float() + (self.b.float() @ self.a.float()) * self.scaling
        if self.magnitude is None:
            return merged
        return merged * (self.magnitude.float() / torch.linalg.norm(merged, dim=1))[:, None]


@dataclass(frozen=True)
class Adapter:
    """An adapter by the model's names: what it adds to each module, and tensors saved whole, by name."""

    pairs: Mapping[str, LowRank]
    whole: Mapping[str, torch.Tensor]


def download(settings: ModelSettings) -> Path:
    """Return the folder of the base model's files; download a Hub model. Raises `UserError`."""
    from huggingface_hub import snapshot_download

    name = settings.model_name_or_path or ""
    if os.path.isdir(name):
        return Path(name)
    where = f"base model {name}"
    if os.path.isabs(name) or name.startswith((".", "~")):
        raise UserError(f"{where} is not here, though the run was trained on it; say where it is now with --base")
    try:
        return Path(
            snapshot_download(
                name, revision=settings.model_revision, allow_patterns=["*.json", "*.safetensors", "*.jinja"]
            )
        )
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(
            f"{where}, revision {settings.model_revision}, cannot be downloaded: {reason}; check the name, or give a local"
            f" folder with --base"
        ) from None


def read_base(folder: Path, model: nn.Module) -> list[Weight]:
    """List the base's tensors in the order of its files, with name and shape in `model` (on the meta device).

    Raises `UserError` for files that do not hold exactly the model, in 16 or 32 bit floating point.
    """
    rename, unloaded = renamer(model), family_of(model.config).unloaded_weights
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights, problems = [], []
    for path, keys in weight_files(folder).items():
        with open_weights(path) as file:
            absent = sorted(keys - set(file.keys()))
            if absent:
                raise UserError(
                    f"base model: {path} lacks {absent[0]}, which its index lists; download the model again"
                )
            for key in file.keys():  # noqa: SIM118, no dictionary
                part = file.get_slice(key)
                is_loaded = not key.startswith(unloaded)
                weight = Weight(key, rename(key) if is_loaded else key, path, tuple(part.get_shape()))
                weights.append(weight)
                if part.get_dtype() not in ("F32", "F16", "BF16"):
                    problems.append(
                        f"{key} is {part.get_dtype()}; a merge needs 16-bit or 32-bit weights, not quantized"
                    )
                elif not is_loaded:
                    continue
                elif weight.name not in shapes:
                    problems.append(f"{key} has no place in the model")
                elif weight.shape != shapes[weight.name]:
                    problems.append(f"{key} is {weight.shape}, the model's configuration says {shapes[weight.name]}")
    tied = getattr(model, "all_tied_weights_keys", {})
    missing = sorted(set(shapes) - {weight.name for weight in weights} - set(tied))
    problems += [f"{name} is missing" for name in missing]
    names = [weight.name for weight in weights]
    problems += [f"{name} is there twice" for name in sorted(set(names)) if names.count(name) > 1]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(
            f"base model {folder}: {problems[0]}{more}; download the model again, or give another with --base"
        )
    return weights


def weight_files(folder: Path) -> dict[Path, set[str]]:
    """Return the base's safetensors files and the keys that its index expects in each (none without an index)."""
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {folder / name: {key for key, at in index.items() if at == name} for name in sorted(set(index.values()))}
    if (folder / WEIGHTS).is_file():
        return {folder / WEIGHTS: set()}
    raise UserError(f"base model {folder}: holds no {WEIGHTS} and no {INDEX}; a merge reads safetensors only")


@contextlib.contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """Open a safetensors file; failures name the file."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"weights {path} cannot be read: {error}; fetch the file again") from None


def renamer(model: Any) -> Any:
    """Return a function from a key in a checkpoint's file to the name in `model`, by transformers' own rules.

    transformers 5 loads `visual.*` and `model.layers.*` (and other spellings) into `model.visual.*` and
    `model.language_model.layers.*`.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = model.state_dict()

    def rename(key: str) -> str:
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        assert converted is None, f"{key} is reshaped on loading, which no Qwen-VL model of this package needs"
        return name

    return rename


def quantized_layers(settings: ModelSettings) -> set[str]:
    """Return the names of the layers that transformers would quantize with bitsandbytes under these settings."""
    from bitsandbytes.nn import Linear4bit
    from transformers.quantizers import AutoHfQuantizer

    config = quantization_config(settings, load_family(settings))
    assert config is not None
    model = build_on_meta(settings)
    AutoHfQuantizer.from_config(config, pre_quantized=False).preprocess_model(
        model=model, device_map=None, dtype=getattr(torch, settings.dtype)
    )
    return {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def read_adapter(folder: Path, model: nn.Module) -> Adapter:
    """Read the adapter in `folder`; PEFT builds it on `model` (on the meta device, changed) to list its tensors.

    Raises `UserError` when a tensor is missing, left over or of another shape, or for a kind that cannot be merged.
    """
    from peft import get_peft_model, get_peft_model_state_dict
    from peft.tuners.lora import Linear as LoraLinear

    config = adapter_config(folder)
    try:
        with torch.device("meta"):
            adapted: Any = get_peft_model(model, config)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"--run: the adapter in {folder} does not fit the base model: {error}; {WAY_OUT}") from None
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    with open_weights(folder / ADAPTER_FILE) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, no dictionary
    problems = [f"{key} has no place in it" for key in sorted(set(tensors) - set(expected))]
    problems += [f"{key} is missing from the adapter" for key in sorted(set(expected) - set(tensors))]
    problems += [
        f"{key} is {tuple(tensor.shape)}, there is room for {tuple(expected[key].shape)}"
        for key, tensor in tensors.items()
        if key in expected and tensor.shape != expected[key].shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"--run: the adapter in {folder} does not fit the base model: {problems[0]}{more}; {WAY_OUT}")
    pairs = {}
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLinear):
            key = f"{name}.lora_{{}}.weight".format
            # PEFT saves the weight of a layer of magnitudes under the layer's own name.
            magnitude = tensors.pop(f"{name}.lora_magnitude_vector", None)
            pair = LowRank(tensors.pop(key("A")), tensors.pop(key("B")), module.scaling["default"], magnitude)
            pairs[name.removeprefix(PREFIX)] = pair
    other = [key for key in tensors if ".lora_" in key]
    if other:
        raise UserError(
            f"--run: {other[0]} is LoRA on a layer that is not linear; merge it with PEFT's merge_and_unload"
        )
    return Adapter(pairs, {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()})


def adapter_config(folder: Path, key: str = "--run") -> LoraConfig:
    """Read PEFT's configuration of a LoRA or DoRA adapter. Raises `UserError` naming each setting that cannot be merged."""
    from peft import LoraConfig

    written = read_adapter_config(folder, key)
    default = LoraConfig()
    known = {entry.name for entry in fields(LoraConfig)}
    # An unset field may be written as null, [] or {}.
    odd = [
        f"{name}: {value}"
        for name, value in written.items()
        if name not in READ_FIELDS and value and value != getattr(default, name, None)
    ]
    if written.get("peft_type") != "LORA":
        odd.insert(0, f"peft_type: {written.get('peft_type')}")
    if written.get("init_lora_weights", True) not in INITIALISATIONS:
        odd.append(f"init_lora_weights: {written['init_lora_weights']}")
    if odd:
        raise UserError(
            f"{key}: the adapter in {folder} is not LoRA or DoRA on linear layers ({', '.join(odd)}), which this script"
            f" cannot merge; merge it with PEFT's merge_and_unload, or train without it"
        )
    # PEFT warns when the base has moved; here it is chosen on purpose.
    left_out = {"peft_type", "base_model_name_or_path"}
    return LoraConfig(**{name: value for name, value in written.items() if name in known - left_out})
