"""TRL's SFTTrainer with exact normalisation on every model and world, and a clock on data and work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from qwen_vl_sft.batching.collator import Collator
from qwen_vl_sft.batching.packed_collator import MICRO_BATCHES
from qwen_vl_sft.batching.packing import StepSampler
from qwen_vl_sft.batching.positions import Positions
from qwen_vl_sft.batching.sampler import EpochSampler, step_loader
from qwen_vl_sft.compat.for_torch import end_workers
from qwen_vl_sft.compat.packed_batches import already_training
from qwen_vl_sft.modeling.flops import BatchStats
from qwen_vl_sft.modeling.loaded_weights import load_full_weights
from qwen_vl_sft.training.generation_metrics import GenerationMetrics
from qwen_vl_sft.training.memory import Fit
from qwen_vl_sft.training.safe_trainer import ROW_IDS, SafeTrainer
from qwen_vl_sft.training.throughput import ThroughputMeter, TimedIterator

# Of an evaluation's metrics: rows that could not be read.
SKIPPED_ROWS = "skipped_rows"


class VisionSFTTrainer(SafeTrainer):
    """Trains on batches of `Collator`, or on the packed steps of `PackedCollator`.

    The loss is the mean over the learned tokens of the global batch; the evaluation loss the mean over the learned
    tokens of all evaluation rows. Both hold for any micro-batch size and any number of processes.
    """

    def __init__(
        self,
        *args: Any,
        sampler: EpochSampler | StepSampler | None,
        meter: ThroughputMeter,
        eval_collator: Collator,
        generation_metrics: GenerationMetrics | None = None,
        **kwargs: Any,
    ) -> None:
        self._sampler = sampler
        self.meter = meter
        self.eval_collator = eval_collator
        self.generation_metrics = generation_metrics
        self.memory_fit: Fit | None = None
        super().__init__(*args, **kwargs)
        trained: Any = self.model
        for collator in (self.data_collator, eval_collator):
            if isinstance(collator, Collator):
                collator.positions = Positions(trained.config)
        # Of this process: loss, right tokens, learned tokens, entropy.
        self._train_sums = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        self._eval_sums = torch.zeros_like(self._train_sums)
        self._eval_skipped = 0
        self.pause = meter.pause
        # Qwen2.5-VL and Qwen3-VL declare that they take no loss arguments, and the Trainer would then average the means
        # of micro-batches. TRL normalises by `num_items_in_batch` itself, whatever the model declares. Can go when TRL
        # sets this attribute for models that it gives its fused output head.
        self.model_accepts_loss_kwargs = True

    def so_far(self) -> dict[str, Any]:
        """Also what the meter has counted."""
        return {**super().so_far(), "meter": self.meter.so_far(self.accelerator)}

    def go_on_from(self, so_far: Mapping[str, Any]) -> None:
        """Also for the meter."""
        super().go_on_from(so_far)
        if "meter" in so_far:
            self.meter.go_on_from(so_far["meter"])

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Fetch the micro-batches of one step, and count the seconds that takes."""
        self.meter.resume()
        timed = TimedIterator(epoch_iterator)
        steps, count = super().get_batch_samples(timed, num_batches, device)
        self.meter.waited += timed.seconds
        if steps and MICRO_BATCHES in steps[0]:
            count = self._count_learned(steps[0][MICRO_BATCHES], device)
        return steps, count

    def _count_learned(self, batches: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
        """The learned tokens of a step on all processes, without waiting for the GPU: the workers have counted them."""
        count = torch.tensor(sum(batch["stats"]["target_tokens"] for batch in batches))
        if device.type == "cuda":
            count = count.pin_memory().to(device, non_blocking=True)
        summed: torch.Tensor = self.accelerator.reduce(count, reduction="sum")
        return summed

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward over a micro-batch, or over all packed micro-batches of an optimizer step."""
        self.meter.resume()  # after an evaluation that a resume made up for, between the data and the step
        if MICRO_BATCHES not in inputs:
            return super().training_step(model, inputs, *args, **kwargs)
        batches = inputs[MICRO_BATCHES]
        losses = []
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            # DeepSpeed looks here for the end of a step.
            self.accelerator.gradient_state._set_sync_gradients(last)
            waits = last or self.is_deepspeed_enabled
            syncs = nullcontext() if waits else self.accelerator.no_sync(model)
            with syncs, already_training(model) if number else nullcontext():
                losses.append(super().training_step(model, batch, *args, **kwargs))
        return torch.stack(losses).sum()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """None: the meter counts them, and the Trainer would go through all weights in every micro-batch."""
        return 0

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # Where the vision tower needs the grids for their sizes alone, reading them from the GPU would make it wait.
        kept = {"image_grid_thw": inputs.pop("image_grid_thw")} if "image_cu_seqlens" in inputs else {}
        if "image_interp_weights" in inputs:
            # Under DeepSpeed the Trainer would round them; the vision tower computes in float32 with them.
            kept["image_interp_weights"] = inputs.pop("image_interp_weights").to(self.args.device, non_blocking=True)
        return {**super()._prepare_inputs(inputs), **kept}

    def _prepare_input(self, data: Any) -> Any:
        if isinstance(data, torch.Tensor):
            data = data.to(self.args.device, non_blocking=True)  # from pinned memory, while the GPU computes
        return super()._prepare_input(data)

    def get_train_dataloader(self) -> DataLoader:
        """The loader of training rows; that of packed steps gives each process its own, so nothing is dealt out again."""
        if not isinstance(self._sampler, StepSampler):
            return super().get_train_dataloader()
        return step_loader(self._sampler, self.data_collator, self.args)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add to a training log the share of right tokens, their entropy, and the speed of all processes."""
        if "loss" in logs:
            _, right, learned, entropy = self._take(self._train_sums)
            self._train_sums = torch.zeros_like(self._train_sums)
            logs.update(mean_token_accuracy=right / max(learned, 1), entropy=entropy / max(learned, 1))
            logs.update(self.meter.measure(self.accelerator))
        super().log(logs, start_time)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The sum over this micro-batch's learned tokens, over `num_items_in_batch`, those of the global batch.

        TRL's own version gathers its metrics from all processes in every micro-batch, and waits for the device each
        time; here they are summed on the device and reduced when they are logged.
        """
        assert not return_outputs, "the logits are never built"
        assert num_items_in_batch is not None, "the loss is a mean over the tokens of the global batch"
        self.meter.work += BatchStats(**inputs.pop("stats"))
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        per_token = -outputs.log_probs  # zero where nothing is learned
        if getattr(self.args, "loss_type", "nll") == "dft":  # https://huggingface.co/papers/2508.05629
            per_token = per_token * outputs.log_probs.exp().detach()
        self._train_sums = self._train_sums + _sums(outputs)
        # The strategies average gradients over processes, so each counts as many times.
        return per_token.sum() / num_items_in_batch.clamp(min=1) * self.accelerator.num_processes

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Sum loss, right tokens and learned tokens; the loss returned is that of the batch alone."""
        inputs = self._prepare_inputs(inputs)
        self._eval_skipped += inputs.pop("stats")["skipped"]
        inputs.pop(ROW_IDS)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        sums = _sums(outputs)
        self._eval_sums = self._eval_sums + sums
        return (sums[0] / sums[2].clamp(min=1)).float(), None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Replace the Trainer's mean over batches by the mean over learned tokens, and add the metrics of answers.

        `skipped_rows` of the metrics are those that the loss leaves out, or the answers if these have lost more: they are
        to some of the same rows.
        """
        self._eval_sums, self._eval_skipped = torch.zeros_like(self._eval_sums), 0
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        own_skipped = self._eval_sums.new_tensor([self._eval_skipped])
        loss, right, learned, _, skipped = self._take(torch.cat([self._eval_sums, own_skipped]))
        assert output.metrics is not None
        output.metrics[f"{metric_key_prefix}_loss"] = loss / learned
        output.metrics[f"{metric_key_prefix}_mean_token_accuracy"] = right / learned
        if self.generation_metrics is not None:
            answered = self.generation_metrics.measure(
                self.model_wrapped, self.accelerator, self.state.global_step, not self.args.disable_tqdm, self.poll
            )
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in answered.items()})
            skipped = max(skipped, self.generation_metrics.left_out)
        output.metrics[f"{metric_key_prefix}_{SKIPPED_ROWS}"] = int(skipped)
        return output

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """The loader of evaluation rows, which have a collator of their own."""
        train_collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.data_collator = train_collator

    def end_workers(self) -> None:
        """End the workers of all data loaders; call it when nothing is read any more."""
        end_workers([self.callback_handler.train_dataloader, *getattr(self, "_eval_dataloaders", {}).values()])

    def _take(self, sums: torch.Tensor) -> list[float]:
        return self.accelerator.reduce(sums, reduction="sum").tolist()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._holds_full_weights():
            load_full_weights(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._holds_full_weights():
            assert self.state.best_model_checkpoint is not None
            load_full_weights(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _holds_full_weights(self) -> bool:
        """Whether this process holds a whole model that trains without an adapter."""
        return not (is_peft_model(self.model) or self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: TRL's card shows how to use a text model."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self._sampler


def _sums(outputs: Any) -> torch.Tensor:
    """Loss, right tokens, learned tokens and entropy of a micro-batch; all are zero where nothing is learned."""
    summed = (-outputs.log_probs, outputs.is_top1, outputs.label_mask, outputs.entropy)
    return torch.stack([values.detach().sum().double() for values in summed])
