"""TRL's SFTTrainer with an exact loss on every model and world, checkpoints that are whole, and resumes that are exact."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from qwen_vl_sft.batching.collator import Collator
from qwen_vl_sft.batching.packed_collator import MICRO_BATCHES, PIXEL_DTYPE
from qwen_vl_sft.batching.packing import StepSampler
from qwen_vl_sft.batching.sampler import EpochSampler, step_loader
from qwen_vl_sft.checkpointing.checkpoints import folder_of
from qwen_vl_sft.checkpointing.float32_weights import held_by_deepspeed
from qwen_vl_sft.checkpointing.resumed_state import explained_groups, take_schedule
from qwen_vl_sft.checkpointing.save_errors import explained_save
from qwen_vl_sft.compat.for_torch import end_workers
from qwen_vl_sft.compat.packed_batches import already_training
from qwen_vl_sft.families.registry import family_of
from qwen_vl_sft.modeling.flops import BatchStats
from qwen_vl_sft.modeling.loaded_weights import load_full_weights
from qwen_vl_sft.modeling.routing import Routing, kept_router_loss
from qwen_vl_sft.random_state import kept_random_state, random_state, set_random_state
from qwen_vl_sft.resilience.faults import describe_micro_batch, describe_step, explained_out_of_memory
from qwen_vl_sft.resilience.logger_guard import guard_loggers
from qwen_vl_sft.resilience.stopping import EvaluationStopped, RunStopper
from qwen_vl_sft.resilience.watchdog import Stage
from qwen_vl_sft.training.generation_metrics import GenerationMetrics
from qwen_vl_sft.training.run_totals import RunTotals, last_log, mean_loss
from qwen_vl_sft.training.safeguards import Safeguards, make_safeguards
from qwen_vl_sft.training.throughput import ThroughputMeter, TimedIterator

ROW_IDS = "row_ids"
# Of an evaluation's metrics: rows that could not be read.
SKIPPED_ROWS = "skipped_rows"


class VisionSFTTrainer(SFTTrainer):
    """Trains on batches of `Collator`, or on the packed steps of `PackedCollator`; these carry the ids of their rows.

    The loss is the mean over the learned tokens of the global batch; the evaluation loss the mean over the learned
    tokens of all evaluation rows. Both hold for any micro-batch size and any number of processes.

    Args:
        sampler: gives the order of rows, None for a stream.
        throughput: measures speed.
        eval_collator: makes the batches of evaluations.
        generation_metrics: answers rows at every evaluation.
        safeguards: write checkpoints and watch steps; None for those of `make_safeguards`.
        stopper: asked before a checkpoint is written, and between the batches of an evaluation. It must be the last of
            the trainer's callbacks.
        complete_saved: adds to the folder of a saved model what the Trainer does not write.
        router_aux_loss_coef: weight of the auxiliary loss of a mixture of experts.

    All other arguments are those of TRL's trainer. `finished` is what the whole run has come to (`totals`), at its end;
    `failed_loggers` tells why loggers have failed, by name.
    """

    def __init__(
        self,
        *args: Any,
        sampler: EpochSampler | StepSampler | None,
        throughput: ThroughputMeter,
        eval_collator: Collator,
        generation_metrics: GenerationMetrics | None = None,
        safeguards: Safeguards | None = None,
        stopper: RunStopper | None = None,
        complete_saved: Callable[[Path], Any] = lambda folder: None,
        router_aux_loss_coef: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.sampler = sampler
        self._complete_saved = complete_saved
        self.throughput = throughput
        self.eval_collator = eval_collator
        self.generation_metrics = generation_metrics
        self.stopper = stopper
        with kept_router_loss(kwargs["model"].config):
            super().__init__(*args, **kwargs)
        config = kwargs["model"].config
        self.routing = Routing(self.model, router_aux_loss_coef) if family_of(config).experts else None
        # The micro-batches of a padded step, until the first of them trains.
        self._step_batches: list[dict[str, Any]] = []
        pieces = safeguards or make_safeguards(self.args)
        self.writer, self.guard, self.evaluations = pieces.writer, pieces.guard, pieces.evaluations
        self.watchdog = pieces.watchdog
        self._totals = RunTotals(pieces.totals, self.guard, throughput)
        # The Trainer would delete old checkpoints before the new one is complete, and at the end before the model is
        # saved; the writer does it instead.
        self.args.save_total_limit = None
        self.finished: dict[str, Any] = {}
        self.failed_loggers = guard_loggers(self.callback_handler.callbacks)
        # Of this process: loss, right tokens, learned tokens, entropy.
        self._train_sums = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        self._eval_sums = torch.zeros_like(self._train_sums)
        # Rows of an evaluation that this process has read, and that it could not read.
        self._eval_rows = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        self._after_loss: tuple[str, Stage, int] | None = None
        self._logged_step = 0
        self._held: dict[str, torch.Tensor] = {}
        # Qwen2.5-VL and Qwen3-VL declare that they take no loss arguments, and the Trainer would then average the means
        # of micro-batches. TRL normalises by `num_items_in_batch` itself, whatever the model declares.
        self.model_accepts_loss_kwargs = True

    def totals(self) -> dict[str, Any]:
        """Return what the whole run has come to (`RunTotals.so_far`). All processes must call at once, while training."""
        # Since the last log; each process has its own.
        unlogged = self.accelerator.reduce(self._tr_loss.detach().clone(), reduction="mean").item()
        return self._totals.so_far(self.accelerator, self._total_loss_scalar + unlogged, self._initial_global_step)

    def mean_loss(self) -> float:
        """Return the mean loss of the finished run over its steps that were not skipped and whose loss is known."""
        return mean_loss(self.finished, self.state.global_step)

    def _report(self, doing: str, stage: Stage, *number: int) -> None:
        """Tell the watchdog what this process does next in the step that it trains."""
        step = self.state.global_step + 1
        self.watchdog.report_progress(f"step {step}, {doing}", step, stage, *number)

    # A step

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Fetch the micro-batches of one step, count the seconds that takes, and keep the ids of their rows.

        Overridden because packed steps bring their micro-batches in one, whose learned tokens the workers have counted.
        """
        self._report("waiting for its data", Stage.DATA)
        self.throughput.resume()
        timed = TimedIterator(epoch_iterator)
        steps, count = super().get_batch_samples(timed, num_batches, device)
        self.throughput.add_wait(timed.seconds)
        batches = [batch for step in steps for batch in step.get(MICRO_BATCHES, [step])]
        self.guard.begin([batch.pop(ROW_IDS, []) for batch in batches])
        if steps and MICRO_BATCHES in steps[0]:
            count = self._count_learned(batches, device)
        self._step_batches = batches
        return steps, count

    def _count_learned(self, batches: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
        """Count the learned tokens of a step on all processes, without waiting for the GPU."""
        count = torch.tensor(sum(batch["stats"]["target_tokens"] for batch in batches))
        self._report_counting(self.guard.row_ids(), batches)
        if device.type == "cuda":
            count = count.pin_memory().to(device, non_blocking=True)
        summed: torch.Tensor = self.accelerator.reduce(count, reduction="sum")
        return summed

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        # Overridden to report it: here processes wait for each other.
        if batch_samples and "input_ids" in batch_samples[0]:
            rows = [row for batch in batch_samples for row in batch.get(ROW_IDS, [])]
            self._report_counting(rows or self.guard.row_ids(), batch_samples)
        return super()._get_num_items_in_batch(batch_samples, device)

    def _report_counting(self, rows: list[int], batches: list[dict[str, Any]]) -> None:
        self._report(f"adding up the learned tokens of all processes: {describe_step(rows, batches)}", Stage.TOKENS)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward over a micro-batch, or over all packed micro-batches of an optimizer step."""
        self.throughput.resume()  # after an evaluation that a resume made up for, between the data and the step
        if self._step_batches:
            self._begin_routing(model, self._step_batches)
            self._step_batches = []
        if MICRO_BATCHES not in inputs:
            return self._micro_batch_step(model, inputs, *args, **kwargs)
        batches = inputs[MICRO_BATCHES]
        losses = []
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            # DeepSpeed looks here for the end of a step.
            self.accelerator.gradient_state._set_sync_gradients(last)
            waits = last or self.is_deepspeed_enabled
            syncs = nullcontext() if waits else self.accelerator.no_sync(model)
            with syncs, already_training(model) if number else nullcontext():
                losses.append(self._micro_batch_step(model, batch, *args, **kwargs))
        return torch.stack(losses).sum()

    def _begin_routing(self, model: nn.Module, batches: list[dict[str, Any]]) -> None:
        """Begin a step of a mixture of experts; for its auxiliary loss several micro-batches are run forward once before."""
        if self.routing is None:
            return
        self.routing.begin_step()
        if not self.routing.balances or len(batches) == 1:
            return
        model.train()
        with torch.no_grad(), kept_random_state():
            for number, batch in enumerate(batches, start=1):
                self._report(f"routing of micro-batch {number} of {len(batches)}", Stage.TOKENS, number)
                inputs = self._prepare_inputs(dict(batch))
                rows = inputs.pop("stats")["rows"]
                self.routing.survey(inputs, rows)
                with super().compute_loss_context_manager():
                    model(**inputs, use_cache=False, fused_lm_head=True)
        self.routing.add_up(self.accelerator)

    def _micro_batch_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        place = len(self.guard.record.losses)
        batch = describe_micro_batch(self.guard.next_rows(), inputs)
        named = f"micro-batch {place + 1} of {len(self.guard.record.rows)}: {batch}"
        self._report(f"forward of {named}", Stage.MICRO_BATCHES, 2 * place)
        self._after_loss = (f"backward of {named}", Stage.MICRO_BATCHES, 2 * place + 1)
        packing = "cu_seq_lens_q" in inputs
        with explained_out_of_memory(batch, packing, bool(self.args.activation_checkpointing)):
            loss = super().training_step(model, inputs, *args, **kwargs)
        if self.routing is not None:
            self.routing.end()
        return self.guard.note_loss(loss)

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Report the end of the forward pass of a step: next is the backward pass, in which processes wait."""
        stack = super().compute_loss_context_manager()
        if self._after_loss:
            stack.callback(self._report, *self._after_loss)
            self._after_loss = None
        return stack

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Overridden to look at the gradient before the optimizer takes it.
        self._report("norm of its gradient", Stage.GRADIENT)
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.guard.should_skip(self.state.global_step + 1, norm, self.accelerator):
            # Without gradients the optimizer changes neither weights nor its own state.
            model.zero_grad(set_to_none=True)
        return norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return none: the meter counts them, and the Trainer would go through all weights in every micro-batch."""
        return 0

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # Overridden for what must not go to the GPU, or not be rounded.
        # Where the vision tower needs the grids for their sizes alone, reading them from the GPU would make it wait.
        kept = {"image_grid_thw": inputs.pop("image_grid_thw")} if "image_cu_seqlens" in inputs else {}
        if "image_interp_weights" in inputs:
            # Under DeepSpeed the Trainer would round them; the vision tower computes in float32 with them.
            kept["image_interp_weights"] = inputs.pop("image_interp_weights").to(self.args.device, non_blocking=True)
        dtype = inputs.pop(PIXEL_DTYPE, torch.float32)
        prepared = {**super()._prepare_inputs(inputs), **kept}
        pixels = prepared.get("pixel_values")
        if pixels is not None and pixels.dtype == torch.uint8:
            prepared["pixel_values"] = self.eval_collator.encoder.normalize_patches(pixels, dtype)
        return prepared

    def _prepare_input(self, data: Any) -> Any:
        # Overridden to copy without waiting.
        if isinstance(data, torch.Tensor):
            data = data.to(self.args.device, non_blocking=True)  # from pinned memory, while the GPU computes
        return super()._prepare_input(data)

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of training rows; the loader of packed steps already gives each process its share."""
        if not isinstance(self.sampler, StepSampler):
            return super().get_train_dataloader()
        return step_loader(self.sampler, self.data_collator, self.args)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add to a training log the share of right tokens, their entropy, and the speed of all processes."""
        if "loss" in logs:
            _, right, learned, entropy = self._take(self._train_sums)
            self._train_sums = torch.zeros_like(self._train_sums)
            steps = self.state.global_step - max(self._logged_step, self._initial_global_step)
            self._logged_step = self.state.global_step
            logs["loss"] = self.guard.mean_loss(logs["loss"], steps)
            logs.update(mean_token_accuracy=right / max(learned, 1), entropy=entropy / max(learned, 1))
            logs.update(self.throughput.measure(self.accelerator))
            if self.routing is not None:
                logs.update(self.routing.measure(self.accelerator))
        if "train_loss" in logs and self.finished:
            logs.update(last_log(self.finished, self.state.global_step))
        super().log(logs, start_time)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the sum over this micro-batch's learned tokens, over `num_items_in_batch`, those of the global batch.

        TRL's own version gathers its metrics from all processes in every micro-batch, and waits for the device each
        time; here they are summed on the device and reduced when they are logged.
        """
        assert not return_outputs, "the logits are never built"
        assert num_items_in_batch is not None, "the loss is a mean over the tokens of the global batch"
        stats = BatchStats(**inputs.pop("stats"))
        self.throughput.add(stats)
        if self.routing is not None:
            self.routing.begin(inputs, stats.rows)
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        if self.routing is not None:
            self.routing.end_forward(self.accelerator)
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
        """Sum loss, right tokens and learned tokens; the returned loss is the loss of this batch."""
        inputs = self._prepare_inputs(inputs)
        stats = inputs.pop("stats")
        self._eval_rows += torch.tensor([stats["rows"], stats["skipped"]], device=self._eval_rows.device)
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
        self._eval_sums, self._eval_rows = torch.zeros_like(self._eval_sums), torch.zeros_like(self._eval_rows)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        loss, right, learned, _, rows, skipped = self._take(torch.cat([self._eval_sums, self._eval_rows]))
        assert output.metrics is not None
        output.metrics[f"{metric_key_prefix}_loss"] = loss / learned
        output.metrics[f"{metric_key_prefix}_mean_token_accuracy"] = right / learned
        if self.generation_metrics is not None:
            answered = self.generation_metrics.measure(
                self.model_wrapped,
                self.accelerator,
                self.state.global_step,
                not self.args.disable_tqdm,
                self._check_stop,
            )
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in answered.items()})
            skipped = max(skipped, self.generation_metrics.left_out)
        output.metrics[f"{metric_key_prefix}_{SKIPPED_ROWS}"] = int(skipped)
        # The dataset is filled up to whole batches of all processes, which the speed must not count.
        return output._replace(num_samples=int(rows))

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # Overridden so that a run that is asked to stop does not have to finish an evaluation.
        step = self.state.global_step
        self.watchdog.report_progress(f"step {step}, evaluating after it", step, Stage.EVALUATION)
        self.throughput.pause()
        numbers = random_state()
        try:
            metrics = super()._evaluate(*args, **kwargs)
            self.evaluations.note(step)
            return metrics
        except EvaluationStopped:
            # The checkpoint is from before the evaluation, and a resume begins with this evaluation.
            set_random_state(numbers)
            self.evaluations.postpone()
            # A resume that is stopped in its first evaluation has this checkpoint already.
            if step != self.writer.newest_own_step:
                self._save_checkpoint(self.model_wrapped, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            raise

    def _check_stop(self) -> None:
        if self.stopper is not None:
            self.stopper.check_stop(self.state.global_step)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loader of evaluation rows, which have a collator of their own."""
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

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Name the parameters that `weight_decay` shrinks: no norm, bias, or other vector of values of channels or heads.

        Overridden because transformers looks for `LayerNorm` and for names with "norm" and "bias", and so takes norms of
        Qwen2.5-VL's tower (`norm1`, `ln_q`) and `A_log` of linear attention for matrices.
        """
        names = super().get_decay_parameter_names(model)
        if not self.args.weight_decay:
            # The groups that older checkpoints have.
            return names
        # Where ZeRO-3 has split a weight, its whole shape is `ds_shape`.
        shapes = {name: getattr(value, "ds_shape", value.shape) for name, value in model.named_parameters()}
        vectors = {name for name, shape in shapes.items() if len(shape) < 2}
        return [name for name in names if name not in vectors]

    # A save

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; an adapter that DeepSpeed trains as the optimizer holds it. All processes must call at once."""
        assert isinstance(self.model, nn.Module)
        exact = is_peft_model(self.model) and self.is_deepspeed_enabled
        self._held = held_by_deepspeed(self.model) if exact else {}
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self._held = {}

    def save_final_model(self, folder: Path) -> None:
        """Save the finished model. Raises `UserError` when it cannot be written. All processes must call at once."""
        with explained_save("the finished model", folder, self.writer.newest(), remove=False):
            self.save_model(str(folder))
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Overridden to save what DeepSpeed steps on (`save_model`), and what transformers has not loaded.
        if state_dict:
            state_dict = {name: self._held.get(name, value) for name, value in state_dict.items()}
        super()._save(output_dir, state_dict)
        self._complete_saved(Path(output_dir or str(self.args.output_dir)))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Overridden so that a checkpoint is complete or not there, and holds sound steps alone.
        self.throughput.pause()
        if self.stopper is not None:
            self.stopper.check_pending_step(self.state)
        step, save = self.state.global_step, super()._save_checkpoint

        def report(doing: str, number: int) -> None:
            self.watchdog.report_progress(f"step {step}, {doing}", step, Stage.SAVE, number)

        self.writer.write(
            step,
            self.accelerator,
            self.args.should_save,
            save=lambda: save(model, trial),
            entries=self._manifest_entries,
            best=lambda: self.state.best_model_checkpoint,
            report=report,
        )

    def _manifest_entries(self) -> dict[str, Any]:
        due = self.evaluations.due or self.evaluations.comes_at_epoch_end(self.state)
        return {"evaluation_due": due, "so_far": self.totals()}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # Overridden to save the best: between two checkpoints it would be gone, and the Trainer would load an older one.
        best = super()._determine_best_metric(metrics, trial)
        if best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return best

    # A resume

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Overridden to start the clock.
        self._totals.start()
        return super()._inner_training_loop(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Overridden for a resume from the last step's checkpoint: the Trainer would train one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Overridden because the schedule that was saved would win over the recipe's.
        with explained_groups(checkpoint, self.optimizer):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            take_schedule(self.optimizer, self.lr_scheduler, self.args.learning_rate)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # Overridden to run a postponed evaluation at the point where the stopped run would have: the random state matches.
        super()._load_rng_state(checkpoint)
        self._evaluate_what_is_due()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # Overridden for a resume from the last step's checkpoint, after which an evaluation may be due, and for totals.
        self._evaluate_what_is_due()
        self.finished = self.totals()
        return super()._finalize_training(*args, **kwargs)

    def _evaluate_what_is_due(self) -> None:
        if self.evaluations.take_pending():
            self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)
            best = folder_of(self.writer.run, self.state.global_step)
            if self.state.best_global_step == self.state.global_step and best.is_dir():
                self.state.best_model_checkpoint = str(best)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Overridden because the Trainer finds none of the names of a whole model (`load_full_weights`).
        if self._holds_full_weights():
            load_full_weights(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        # Overridden for the same reason.
        if self._holds_full_weights():
            assert self.state.best_model_checkpoint is not None
            load_full_weights(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _holds_full_weights(self) -> bool:
        """Return whether this process holds a whole model that trains without an adapter."""
        return not (is_peft_model(self.model) or self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: TRL's card shows how to use a text model."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        # Overridden because the order of an epoch is ours.
        return self.sampler


def _sums(outputs: Any) -> torch.Tensor:
    """Sum up loss, right tokens, learned tokens and entropy of a micro-batch; all are zero where nothing is learned."""
    summed = (-outputs.log_probs, outputs.is_top1, outputs.label_mask, outputs.entropy)
    return torch.stack([values.detach().sum().double() for values in summed])
