"""What the routers of a mixture of experts choose while training: the load of each expert, and the loss that evens it out.

The auxiliary loss is that of the Switch Transformer (Fedus et al. 2021, https://arxiv.org/abs/2101.03961, equations 4 to
6) in transformers' form: over the tokens of all layers together, E * sum_e f_e P_e, of the share f_e of tokens that choose
an expert and the mean probability P_e of choosing it. The tokens are the real ones of the global batch: no padding, and a
shared prefix as often as rows share it. So the loss depends neither on micro-batches and packing nor on the processes.

f_e must be known before the first gradient. Of one micro-batch a step it is; several are run forward once before (`survey`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from qwen_vl_sft.families.registry import family_of


class Routing:
    """Watches the routers of a model, and adds the gradient of the auxiliary loss to their logits.

    Args:
        model: a model with experts, with its adapter where it has one, not yet wrapped by a strategy.
        coefficient: what the auxiliary loss is multiplied with; 0 for none.

    `total` [layers, E] counts the tokens of all processes for each expert, up to the last `measure`.
    """

    def __init__(self, model: Any, coefficient: float = 0.0) -> None:
        experts = family_of(model.config).experts
        assert experts is not None, "a model without experts has no routers"
        routers = experts.routers(model)
        assert routers, f"no layer has a {experts.router}"
        self.coefficient = coefficient
        self.total = torch.zeros(len(routers), model.config.get_text_config().num_experts, dtype=torch.int64)
        self._tokens: _Tokens | None = None
        # What the next forward adds to. A recomputed one adds to nothing.
        self._counts_load = self._counts_step = False
        self._load: torch.Tensor | None = None  # [layers, E] since the last measure
        # Of this step: tokens that choose each expert, and the sums of probabilities [2, E] float64.
        self._step: torch.Tensor | None = None
        self._slopes: torch.Tensor | None = None
        self._losses: list[torch.Tensor] = []
        for layer, router in enumerate(routers.values()):
            router.register_forward_hook(partial(self._after_router, layer))

    @property
    def balances(self) -> bool:
        """Return whether there is an auxiliary loss."""
        return self.coefficient > 0

    def begin_step(self) -> None:
        """Begin an optimizer step."""
        self._step = self._slopes = None

    def survey(self, batch: dict[str, Any], rows: int) -> None:
        """Take the next forward, without gradients, for the sums of the step; see `begin`."""
        self._tokens, self._counts_load, self._counts_step = _Tokens.of(batch, rows), False, True

    def begin(self, batch: dict[str, Any], rows: int) -> None:
        """Take the next forward as that of a micro-batch that trains, given its inputs and the number of its rows."""
        self._tokens, self._counts_load = _Tokens.of(batch, rows), True
        self._counts_step = self.balances and self._slopes is None

    def end_forward(self, accelerator: Any) -> None:
        """End a forward that trains; without a survey the step is its micro-batch. All processes must call at once."""
        if self._counts_step:
            self.add_up(accelerator)
        self._counts_load = self._counts_step = False

    def add_up(self, accelerator: Any) -> None:
        """Add up the sums of all processes in this step. All processes must call at once."""
        assert self._step is not None, "no router has run"
        chosen, probabilities = accelerator.reduce(self._step, reduction="sum")
        # The probabilities of a token in a layer come to one.
        count = probabilities.sum().clamp(min=1)
        self._losses.append(len(chosen) * (chosen * probabilities).sum() / count**2)
        # Strategies average the gradients of processes.
        factor = self.coefficient * len(chosen) * accelerator.num_processes
        self._slopes = (factor * chosen / count**2).float()

    def end(self) -> None:
        """End a micro-batch after its backward, in which checkpointed layers run their routers once more."""
        self._tokens, self._counts_load, self._counts_step = None, False, False

    def slopes(self) -> torch.Tensor:
        """Return by how much the loss grows with a token's probability of each expert [E] float32."""
        assert self._slopes is not None, "a step is added up before its gradients are computed"
        return self._slopes

    def measure(self, accelerator: Any) -> dict[str, float]:
        """Return the load of experts since the last call, as log entries. All processes must call at once."""
        if self._load is None:
            return {}
        load = accelerator.reduce(self._load, reduction="sum").cpu()
        self.total += load
        losses, self._load, self._losses = self._losses, None, []
        return spread(load) | ({"aux_loss": round(float(torch.stack(losses).mean()), 6)} if losses else {})

    def _after_router(self, layer: int, router: nn.Module, arguments: Any, output: Any) -> Any:
        if self._tokens is None:
            return None  # not training
        logits, weights, chosen = output
        rows = self._tokens.rows(len(logits))
        with torch.no_grad():
            self._count(layer, logits, chosen, rows)
        if not self.balances or not torch.is_grad_enabled():
            return None
        return logits, _Balanced.apply(weights, logits, rows, self), chosen

    def _count(self, layer: int, logits: torch.Tensor, chosen: torch.Tensor, rows: torch.Tensor) -> None:
        if not (self._counts_load or self._counts_step):
            return
        tokens = torch.zeros(logits.shape[-1], dtype=torch.int64, device=logits.device)
        tokens.index_add_(0, chosen.flatten(), rows[:, None].expand_as(chosen).flatten())
        if self._counts_load:
            if self._load is None:
                self._load = torch.zeros_like(self.total, device=logits.device)
            self._load[layer] += tokens
        if self._counts_step:
            probabilities = (logits.float().softmax(-1) * rows[:, None]).sum(0)
            both = torch.stack([tokens.double(), probabilities.double()])
            self._step = both if self._step is None else self._step + both


class _Balanced(torch.autograd.Function):
    """Gives a router's weights as they are; backwards it adds the gradient of the auxiliary loss to the logits [T, E]."""

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, logits: torch.Tensor, rows: torch.Tensor, routing: Routing) -> Any:
        ctx.save_for_backward(logits, rows)
        ctx.routing = routing
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        logits, rows = ctx.saved_tensors
        probabilities, slopes = logits.float().softmax(-1), ctx.routing.slopes()
        mean = (probabilities * slopes).sum(-1, keepdim=True)
        return gradients[0], (rows[:, None] * probabilities * (slopes - mean)).to(logits.dtype), None, None


class _Tokens:
    """How many rows each token of a micro-batch stands for: of padding and fillers none, of a shared prefix several."""

    def __init__(self, rows_of: torch.Tensor, targets: torch.Tensor | None) -> None:
        self.rows_of = rows_of
        self.targets = targets

    @classmethod
    def of(cls, batch: dict[str, Any], rows: int) -> _Tokens:
        """Read them from the inputs of a micro-batch of so many rows."""
        ids = batch["input_ids"]
        if not rows:
            found = torch.zeros_like(ids.flatten())
        elif "kv_index" in batch:
            # A row ends in a piece whose keys no other piece takes; its tokens are those whose keys that piece takes.
            index, none = batch["kv_index"], torch.zeros_like(ids.flatten())
            taken = none.index_add(0, index, torch.ones_like(index))
            ends = taken[batch["cu_seq_lens_q"][:-1].long()] == 1
            stops = batch["cu_seq_lens_k"][1:].to(index.dtype)
            pieces = torch.searchsorted(stops, torch.arange(len(index), device=stops.device), right=True)
            found = none.index_add(0, index, ends.to(none.dtype)[pieces])
        elif batch.get("attention_mask") is not None:
            found = batch["attention_mask"].flatten().to(ids.dtype)
        else:
            found = torch.ones_like(ids.flatten())
        return cls(found, batch.get("logit_positions"))

    def rows(self, count: int) -> torch.Tensor:
        """Return the rows [count] of the tokens that a router has met: all, or in a spared last layer the targets."""
        if count == len(self.rows_of):
            return self.rows_of
        assert self.targets is not None, f"a router met {count} tokens"
        assert count == len(self.targets), f"a router met {count} tokens"
        return self.rows_of.index_select(0, self.targets)


def spread(load: torch.Tensor) -> dict[str, float]:
    """Return how uneven a load [layers, E] is, as log entries.

    `expert_load_max` and `expert_load_min` are of the most and the least used expert of any layer, where 1 is an even
    share; `idle_experts` counts those of all layers that no token has chosen.
    """
    even = load.sum(1, keepdim=True).clamp(min=1) / load.shape[1]
    shares = load / even
    return {
        "expert_load_max": round(float(shares.max()), 3),
        "expert_load_min": round(float(shares.min()), 3),
        "idle_experts": int((load == 0).sum()),
    }


@contextmanager
def kept_router_loss(config: Any) -> Iterator[None]:
    """Restore the weight of the auxiliary loss in a configuration, which TRL sets to that of its arguments."""
    text, name = config.get_text_config(), "router_aux_loss_coef"
    before = getattr(text, name, None)
    yield
    if before is not None:
        setattr(text, name, before)
