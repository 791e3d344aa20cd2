"""What of a run decides on its memory and time, and the bytes of what it stores for each weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from qwen_vl_sft.families.shape import Linear, ModelShape

HALF, SINGLE = 2, 4
# A block of 4-bit weights has 64 weights and a constant of 32 bits; double quantization makes that 8 bits, and 32 bits
# for each 256 of these (QLoRA, section 3).
NF4_BYTES, NF4_NESTED_BYTES = 0.5 + 4 / 64, 0.5 + 1 / 64 + 4 / (64 * 256)
# Bytes of optimizer states a trained weight, by `optim`; Adam's two moments in float32 for any other.
OPTIMIZER_BYTES = {
    "sgd": 0.0,
    "adafactor": 0.02,  # a row and a column of each matrix
    "adamw_bnb_8bit": 2.0,
    "adamw_8bit": 2.0,
    "paged_adamw_8bit": 2.0,
    "lion_32bit": 4.0,
    "lion_8bit": 1.0,
    "paged_lion_8bit": 1.0,
}
ADAM_BYTES = 8.0


@dataclass(frozen=True)
class Training:
    """What of a run decides on its memory and time.

    Attributes:
        shape: the model.
        bits: of the base's linear weights: 4, 8, 16 or 32.
        nested: 4-bit constants are quantized too.
        fp8: 8-bit weights are FP8, those of the language model alone, and so are its products.
        fp8_gradients: products that give gradients of inputs are FP8 in the language model, whose weights are not.
        stored: bytes of every other weight of the base.
        mixed: layers compute in half precision, whatever their weights are stored in.
        adapted: the layers with LoRA; None when the model's own weights train.
        adapts_experts: every expert has LoRA too.
        train_router: what chooses the experts trains, in full.
        rank: of LoRA.
        dropout: on the adapter's input.
        in_full: weights trained beside the adapter.
        freeze_vision: the tower does not train in full fine-tuning.
        kernels: fused kernels.
        packing: rows are packed.
        cached_features: the vision tower does not run.
        flash_attention: attention is FlashAttention 3 or 4.
        optimizer: bytes of its states a trained weight.
        strategy: single, ddp, zero1, zero2, zero3 or fsdp2.
        processes: GPUs.
        accumulates: a step has several micro-batches, so that the gradients of the first are there during the last.
    """

    shape: ModelShape
    bits: int = 16
    nested: bool = True
    fp8: bool = False
    fp8_gradients: bool = False
    stored: int = HALF
    mixed: bool = True
    adapted: tuple[Linear, ...] | None = ()
    adapts_experts: bool = False
    train_router: bool = False
    rank: int = 16
    dropout: bool = False
    in_full: int = 0
    freeze_vision: bool = False
    kernels: frozenset[str] = frozenset()
    packing: bool = True
    cached_features: bool = False
    flash_attention: bool = False
    optimizer: float = ADAM_BYTES
    strategy: str = "single"
    processes: int = 1
    accumulates: bool = True

    @cached_property
    def trained_parts(self) -> frozenset[str]:
        """Return the parts in which something trains."""
        if self.adapted is None:
            return frozenset({"merger", "language"} | (set() if self.freeze_vision else {"vision"}))
        return frozenset(linear.part for linear in self.adapted)

    @cached_property
    def adapter_weights(self) -> int:
        """Count the weights of LoRA."""
        layers = sum(linear.count * self.rank * (linear.inputs + linear.outputs) for linear in self.adapted or ())
        return layers + self.expert_adapter_weights

    @property
    def expert_adapter_weights(self) -> int:
        """Count the weights of LoRA on experts: a pair for the product that widens, one for that which narrows."""
        text, experts = self.shape.text, self.shape.text.experts
        if experts is None or not self.adapts_experts:
            return 0
        return experts.layers * experts.count * self.rank * (2 * text.hidden + 3 * experts.mlp)

    @property
    def quantized_weights(self) -> int:
        """Return the number of weights of linear layers and experts that are held in `bits`."""
        layers = self.language_weights if self.fp8 else sum(entry.weights for entry in self.shape.linears)
        return layers + self.shape.expert_weights

    @property
    def language_weights(self) -> int:
        """Return the number of weights of the language model's linear layers, without experts."""
        return sum(entry.weights for entry in self.shape.linears if entry.part == "language")

    @property
    def trained_weights(self) -> int:
        """Count all weights that train."""
        routers = self.shape.router_weights if self.train_router else 0
        if self.adapted is not None:
            return self.adapter_weights + self.in_full + routers
        counts = self.shape.parameters
        trained = sum(count for part, count in counts.items() if part in self.trained_parts)
        return trained - self.shape.router_weights + routers

    @property
    def blocks(self) -> int:
        """Count the layers that can be checkpointed: those that a gradient passes."""
        return self.shape.text.layers + (self.shape.vision.depth if "vision" in self.trained_parts else 0)

    @property
    def full(self) -> bool:
        """Return whether the model's own weights train."""
        return self.adapted is None

    @property
    def keeps_gradients(self) -> bool:
        """Return whether gradients are there when the last micro-batch of a step begins.

        DeepSpeed's always are; FSDP2 with all weights has not been measured.
        """
        return self.accumulates or self.strategy not in ("single", "ddp")

    @property
    def computed(self) -> int:
        """Return the bytes of a value that layers compute."""
        return HALF if self.mixed else self.stored

    @property
    def stream(self) -> int:
        """Return the bytes of a value that passes from layer to layer.

        Full fine-tuning under autocast passes float32; ZeRO and FSDP2 compute on half-precision copies.
        """
        wide = self.full and self.mixed and self.strategy in ("single", "ddp")
        return SINGLE if wide else self.computed


def layers_named(shape: ModelShape, names: Iterable[str] | None, parts: Iterable[str]) -> tuple[Linear, ...]:
    """Return the layers that `lora_target_modules` names, by how their names end; all of `parts` for None."""
    if names is None or list(names) == ["all-linear"]:
        wanted = set(parts)
        return tuple(linear for linear in shape.linears if linear.part in wanted)
    endings = tuple(names)
    return tuple(linear for linear in shape.linears if any(f".{linear.name}".endswith(f".{end}") for end in endings))
