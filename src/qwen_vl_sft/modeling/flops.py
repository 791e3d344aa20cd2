"""Statistics of a batch, the floating-point operations of training on it, and the peak of a GPU."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qwen_vl_sft.families.flops import ForwardFlops
from qwen_vl_sft.families.registry import family_of
from qwen_vl_sft.planning.cards import card_of_device


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 peak of a GPU in FLOP/s, None when it is not known."""
    card = card_of_device(device_name)
    return card.flops if card else None


@dataclass
class BatchStats:
    """Sums over the samples of batches, without padding: the work of the model.

    Attributes:
        tokens: tokens of the samples.
        tokens_squared: each sample's tokens squared, for attention.
        target_tokens: tokens whose prediction is trained.
        images: images.
        patches: vision patches of the images.
        patches_squared: each image's patches squared, for attention.
        rows: samples.
        skipped: samples that could not be read.
    """

    tokens: int = 0
    tokens_squared: int = 0
    target_tokens: int = 0
    images: int = 0
    patches: int = 0
    patches_squared: int = 0
    rows: int = 0
    skipped: int = 0

    @classmethod
    def read(cls, stored: Mapping[str, int]) -> BatchStats:
        """Return the stats that `stored` gave."""
        return cls(**{"target_tokens" if name == "learned" else name: value for name, value in stored.items()})

    def stored(self) -> dict[str, int]:
        """Return the stats by the keys of a run's files, which call target tokens `learned`."""
        return {"learned" if name == "target_tokens" else name: value for name, value in asdict(self).items()}

    def __add__(self, other: BatchStats) -> BatchStats:
        return BatchStats(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class FlopCounter:
    """Counts the FLOPs of training on a batch over the matrix products that must be done.

    A frozen layer costs its forward and the gradient of its input; a trained one also the gradient of its weights, and so
    do attention's products, both factors of which take gradients. The adapter itself is left out, and so is all
    recomputation.

    Attributes:
        forward: FLOPs of one forward.
        language_passes: forwards that forward and backward of the language model's weights come to.
        vision_passes: the same for the vision tower.
        merger_passes: the same for its mergers.
    """

    forward: ForwardFlops
    language_passes: float
    vision_passes: float
    merger_passes: float

    @classmethod
    def of(cls, config: Any, peft: bool, trained: Collection[str], packed: bool = False) -> FlopCounter:
        """Count from a model's configuration.

        Args:
            config: the configuration.
            peft: only adapters train.
            trained: the parts in which something trains. Nothing is computed backwards before the first of vision,
                merger and language that trains.
            packed: batches are packed; the last layer's MLP then runs on target tokens alone.
        """
        backward = 2 if peft else 3
        return cls(
            forward=family_of(config).flops(config, packed),
            language_passes=backward,
            vision_passes=backward if "vision" in trained else 1,
            merger_passes=1 if set(trained) <= {"language"} else backward,
        )

    def flops(self, stats: BatchStats) -> float:
        """Return the FLOPs of forward and backward over batches of these `stats`."""
        one = self.forward
        language = one.per_token * stats.tokens + one.per_target_token * stats.target_tokens
        attended = one.per_token_products * stats.tokens + one.per_token_squared * stats.tokens_squared
        seen = one.per_patch_products * stats.patches + one.per_patch_squared * stats.patches_squared
        return (
            language * self.language_passes
            + attended * _product_passes(self.language_passes)
            + one.per_patch * stats.patches * self.vision_passes
            + seen * _product_passes(self.vision_passes)
            + one.per_merged_patch * stats.patches * self.merger_passes
        )


def _product_passes(passes: float) -> float:
    """Return the passes of products without weights, given the passes of layers with weights."""
    return 1 if passes == 1 else 3
