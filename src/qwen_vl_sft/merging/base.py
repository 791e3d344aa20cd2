"""Read the base model of a merge: its files, under their own key names."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.errors import UserError, first_line
from qwen_vl_sft.families.registry import family_of
from qwen_vl_sft.merging.places import Place, as_in_model, finder
from qwen_vl_sft.modeling.base_model import build_on_meta, load_family, quantization_config
from qwen_vl_sft.modeling.fp8.layers import fp8_layers
from qwen_vl_sft.modeling.fp8.weights import dequantize

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "lm_head.weight"
# What follows the key of an FP8 weight in that of its scales.
SCALES = "_scale_inv"
WAY_OUT = "name the base model it was trained on with --base"


@dataclass(frozen=True)
class Weight:
    """A tensor of the base: its `key` in `file`, its shape there, its place in the model; `written_as` if not its key.

    `whole` is the shape of the parameter that it is, or is a piece of; `scales` where the scales of its blocks are, of an
    FP8 weight.
    """

    key: str
    place: Place
    file: Path
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    written_as: str | None = None
    scales: tuple[Path, str] | None = None

    @property
    def name(self) -> str:
        """Return the name of the parameter in the model."""
        return self.place.name

    @property
    def output(self) -> str:
        """Return its key in the merged model."""
        return self.written_as or self.key

    @property
    def module(self) -> str:
        """Return the module whose `weight` it is; empty for any other tensor."""
        return self.name.removesuffix(".weight") if self.name.endswith(".weight") else ""

    @property
    def target(self) -> str:
        """Return by which name an adapter reaches it: its module, or the parameter itself for one of experts."""
        return self.module or self.name

    def read(self) -> torch.Tensor:
        """Read the tensor as the model has it; an FP8 weight dequantized, in float32."""
        with open_weights(self.file) as file:
            tensor = file.get_tensor(self.key)
        if self.scales is not None:
            path, key = self.scales
            with open_weights(path) as file:
                tensor = dequantize(tensor, file.get_tensor(key).float())
        return as_in_model(self.place, tensor, self.whole)

    def within(self, whole: torch.Tensor) -> torch.Tensor:
        """Return the part of an experts' parameter [E, out, in] that the tensor is."""
        assert self.place.expert is not None
        return whole[self.place.expert, self.place.rows(whole.shape[1])]

    def as_in_file(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the model as its file has it."""
        return tensor if tuple(tensor.shape) == self.shape else tensor.transpose(-1, -2)


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


def holds_fp8(folder: Path) -> bool:
    """Return whether the files of a model hold FP8 weights, as its configuration says."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # told where the model is built
    parts = (config, *(part for part in config.values() if isinstance(part, dict)))
    return any((part.get("quantization_config") or {}).get("quant_method") == "fp8" for part in parts)


def read_base(folder: Path, model: nn.Module) -> list[Weight]:
    """List the base's tensors in the order of its files, with name and shape in `model` (on the meta device).

    Raises `UserError` for files that do not hold exactly the model, in 16 or 32 bit floating point, or in FP8 where its
    configuration says so.
    """
    files, fp8 = weight_files(folder), holds_fp8(folder)
    scales = dict(_scales_of_blocks(files)) if fp8 else {}
    find, unloaded = finder(model), family_of(model.config).unloaded_weights
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights, problems = [], []
    for path, keys in files.items():
        with open_weights(path) as file:
            absent = sorted(keys - set(file.keys()))
            if absent:
                raise UserError(
                    f"base model: {path} lacks {absent[0]}, which its index lists; download the model again"
                )
            for key in file.keys():  # noqa: SIM118, no dictionary
                if fp8 and key.endswith(SCALES):
                    continue
                part = file.get_slice(key)
                is_loaded, shape = not key.startswith(unloaded), tuple(part.get_shape())
                place = find(key) if is_loaded else Place(key)
                weight = Weight(key, place, path, shape, shapes.get(place.name, shape), scales=scales.get(key))
                weights.append(weight)
                if fp8 and part.get_dtype() == "F8_E4M3" and key not in scales:
                    problems.append(f"{key} is FP8 without its scales {key}{SCALES}")
                elif fp8 and part.get_dtype() == "F8_E4M3":
                    pass
                elif part.get_dtype() not in ("F32", "F16", "BF16"):
                    problems.append(
                        f"{key} is {part.get_dtype()}; a merge needs 16-bit or 32-bit weights, not quantized: name the 16-bit"
                        " model with --base"
                    )
                elif not is_loaded:
                    continue
                elif weight.name not in shapes:
                    problems.append(f"{key} has no place in the model")
                elif not place.fits(shape, weight.whole):
                    problems.append(f"{key} is {shape}, the model's configuration says {weight.whole}")
    tied = getattr(model, "all_tied_weights_keys", {})
    missing = sorted(set(shapes) - {weight.name for weight in weights} - set(tied))
    problems += [f"{name} is missing" for name in missing]
    problems += _pieces_problems(weights)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(
            f"base model {folder}: {problems[0]}{more}; download the model again, or give another with --base"
        )
    return weights


def _scales_of_blocks(files: Mapping[Path, set[str]]) -> Iterator[tuple[str, tuple[Path, str]]]:
    """Yield the key of each FP8 weight with the file and key of its scales, which may be in another file."""
    for path in files:
        with open_weights(path) as file:
            for key in file.keys():  # noqa: SIM118, no dictionary
                if key.endswith(SCALES):
                    yield key.removesuffix(SCALES), (path, key)


def _pieces_problems(weights: Sequence[Weight]) -> Iterator[str]:
    """Tell the parameters that files hold twice, or only some experts of."""
    held: dict[str, list[Weight]] = {}
    for weight in weights:
        held.setdefault(weight.name, []).append(weight)
    for name, pieces in sorted(held.items()):
        numbers = sum(torch.Size(piece.shape).numel() for piece in pieces)
        whole = torch.Size(pieces[0].whole).numel()
        if len({piece.place for piece in pieces}) < len(pieces) or numbers > whole:
            yield f"{name} is there twice"
        elif numbers < whole and any(piece.place.expert is not None for piece in pieces):
            yield f"{name} is missing some of its {pieces[0].whole[0]} experts"


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


def quantized_layers(settings: ModelSettings) -> set[str]:
    """Return the names of the layers, and of the experts' parameters, that are quantized under these settings."""
    if settings.load_in_fp8:
        model = build_on_meta(settings)
        return {*fp8_layers(model, settings), *_stacks(model)}
    from bitsandbytes.nn import Linear4bit
    from transformers.quantizers import AutoHfQuantizer

    config = quantization_config(settings, load_family(settings))
    assert config is not None
    model = build_on_meta(settings)
    AutoHfQuantizer.from_config(config, pre_quantized=False).preprocess_model(
        model=model, device_map=None, dtype=getattr(torch, settings.dtype)
    )
    return {*_stacks(model), *(name for name, module in model.named_modules() if isinstance(module, Linear4bit))}


def _stacks(model: nn.Module) -> list[str]:
    """Return the names of the parameters that hold experts."""
    experts = family_of(model.config).experts  # type: ignore[arg-type]
    return [name for name, _ in model.named_parameters() if experts and experts.is_weight(name)]
