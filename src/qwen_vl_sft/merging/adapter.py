"""The adapter of a merge: what it adds to weights of its base, and which of them it replaces."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qwen_vl_sft.errors import UserError
from qwen_vl_sft.merging.base import WAY_OUT, Weight, open_weights
from qwen_vl_sft.merging.places import Place
from qwen_vl_sft.modeling.adapter_layout import ADAPTER_FILE, PREFIX, in_our_layout, read_adapter_config

if TYPE_CHECKING:
    from peft import LoraConfig

# Fields of PEFT's LoraConfig that may differ from their defaults; any other one could change what a merge means.
READ_FIELDS = {
    "task_type", "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "r", "lora_alpha",
    "lora_dropout", "use_rslora", "use_dora", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform",
    "layers_pattern", "target_parameters", "rank_pattern", "alpha_pattern", "init_lora_weights", "peft_version",
    "runtime_config",
}  # fmt: skip
# Other ways to begin (PiSSA, OLoRA, LoftQ, CorDA, ...) change the base's weights too.
INITIALISATIONS = (True, False, "gaussian", "orthogonal")


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
class ExpertsLowRank:
    """What an adapter adds to a parameter of E experts [E, out, in]: A [E, r, in], B [E, out, r] and their scaling."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    @classmethod
    def of(cls, a: torch.Tensor, b: torch.Tensor, experts: int, scaling: float) -> ExpertsLowRank:
        """Take PEFT's two matrices: A [E r, in], expert by expert, and B [out, r E], rank by rank."""
        return cls(a.view(experts, -1, a.shape[-1]), b.view(len(b), -1, experts).permute(2, 0, 1), scaling)

    def at(self, place: Place) -> LowRank:
        """Return the pair of one expert, or of a run of its rows."""
        assert place.expert is not None
        b = self.b[place.expert]
        return LowRank(self.a[place.expert], b[place.rows(len(b))], self.scaling)

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the merged parameter [E, out, in] in float32: W + scaling * B A of each expert."""
        return torch.baddbmm(weight.float(), self.b.float(), self.a.float(), alpha=self.scaling)


@dataclass(frozen=True)
class Adapter:
    """An adapter by the model's names: what it adds to each module or parameter, and tensors saved whole, by name."""

    pairs: Mapping[str, LowRank | ExpertsLowRank]
    whole: Mapping[str, torch.Tensor]

    def reaching(self, weight: Weight) -> LowRank | ExpertsLowRank | None:
        """Return what the adapter adds to a tensor; None for nothing, as to an expert that no token has trained."""
        pair = self.pairs.get(weight.target)
        if not isinstance(pair, ExpertsLowRank) or weight.place.expert is None:
            return pair
        one = pair.at(weight.place)
        return one if bool(one.b.any()) else None


def read_adapter(folder: Path, model: nn.Module) -> Adapter:
    """Read the adapter in `folder`; PEFT builds it on `model` (on the meta device, changed) to list its tensors.

    Raises `UserError` when a tensor is missing, left over or of another shape, or for a kind that cannot be merged.
    """
    adapter_config(folder)
    with in_our_layout(folder, model) as placed:
        return _read_adapter(placed, model, folder)


def _read_adapter(placed: Path, model: nn.Module, folder: Path) -> Adapter:
    """Read the adapter in `placed`, which messages call by the `folder` that it is from."""
    from peft import get_peft_model, get_peft_model_state_dict
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.lora import ParamWrapper

    config = adapter_config(placed)
    try:
        with torch.device("meta"):
            adapted: Any = get_peft_model(model, config)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"--run: the adapter in {folder} does not fit the base model: {error}; {WAY_OUT}") from None
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    with open_weights(placed / ADAPTER_FILE) as file:
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
    pairs: dict[str, LowRank | ExpertsLowRank] = {}
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLinear):
            key = f"{name}.lora_{{}}.weight".format
            # PEFT saves the weight of a layer of magnitudes under the layer's own name.
            magnitude = tensors.pop(f"{name}.lora_magnitude_vector", None)
            pair = LowRank(tensors.pop(key("A")), tensors.pop(key("B")), module.scaling["default"], magnitude)
            pairs[name.removeprefix(PREFIX)] = pair
        elif isinstance(module, ParamWrapper):
            # Wrappers of several parameters of a module stand around each other.
            layer = re.sub(r"(\.base_layer)+$", "", name.removeprefix(PREFIX))
            a, b = (tensors.pop(f"{name}.lora_{factor}.weight") for factor in "AB")
            scaling = module.scaling["default"]
            pairs[f"{layer}.{module.parameter_name}"] = ExpertsLowRank.of(a, b, module.num_experts, scaling)
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
