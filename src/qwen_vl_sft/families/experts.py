"""Mixtures of experts: a router sends each token of a layer to a few of many small MLPs, which lie in one tensor.

The weights of all experts of a layer are two parameters, `gate_up_proj` [E, 2 I, H] and `down_proj` [E, H, I], of one
module that is no linear layer; transformers multiplies the tokens of each expert in one grouped product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Experts:
    """Where the experts of a model are, by how the names of their modules end.

    Attributes:
        path: the module that holds the experts of a layer.
        router: the module that chooses them; it gives logits [T, E], weights [T, chosen] and numbers [T, chosen].
        weights: the parameters of `path`, the one that is applied first in front.
    """

    path: str = "mlp.experts"
    router: str = "mlp.gate"
    weights: tuple[str, str] = ("gate_up_proj", "down_proj")

    @property
    def parameters(self) -> tuple[str, ...]:
        """Return how the names of the experts' parameters end, as PEFT's `target_parameters` takes them."""
        return tuple(f"{self.path}.{name}" for name in self.weights)

    def modules(self, model: nn.Module) -> dict[str, Any]:
        """Return the module of each layer's experts by its name, in the order of the layers."""
        return _ending(model, self.path)

    def routers(self, model: nn.Module) -> dict[str, Any]:
        """Return the router of each layer by its name, in the order of the layers."""
        return _ending(model, self.router)

    def is_weight(self, name: str) -> bool:
        """Return whether a parameter of this name is of experts."""
        return f".{name}".endswith(tuple(f".{path}" for path in self.parameters))

    def is_router(self, name: str) -> bool:
        """Return whether a parameter of this name is a router's."""
        return f".{self.router}." in f".{name}"


def sparse_weights(text: Any) -> int:
    """Count the weights of a layer with experts that a token is multiplied with: those of the chosen, and the router's."""
    chosen = text.num_experts_per_tok * 3 * text.hidden_size * text.moe_intermediate_size
    return int(chosen + text.hidden_size * text.num_experts)


def _ending(model: nn.Module, path: str) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if f".{name}".endswith(f".{path}")}
