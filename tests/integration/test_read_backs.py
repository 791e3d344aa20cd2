"""Packed training reads next to nothing back from the GPU: each time it would wait until all that it was given is done."""

import contextlib
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import trl.trainer.utils
from torch.utils._python_dispatch import TorchDispatchMode

from fixtures.models import FAMILIES, newer, qwen2_vl
from fixtures.packed_rows import GROUPS
from fixtures.trainers import make_trainer
from qwen_vl_sft.batching.packed_collator import MICRO_BATCHES, join
from qwen_vl_sft.batching.positions import Positions
from qwen_vl_sft.compat.for_trl import score_places_as_they_come
from qwen_vl_sft.compat.packed_batches import count_no_placeholders_in_training, take_packed_batches
from qwen_vl_sft.compat.vision_tower import run_frozen_vision_without_gradients
from qwen_vl_sft.families.registry import family_of
from qwen_vl_sft.modeling import attention
from qwen_vl_sft.modeling.attention import use_packed_attention, use_segmented_vision_attention
from qwen_vl_sft.modeling.plain_attention import attend_by_piece

READING = {
    "_local_scalar_dense",
    "equal",
    "nonzero",
    "masked_select",
    "masked_scatter_backward",
    "repeat_interleave",
    "unique_consecutive",
}


class ReadBacks(TorchDispatchMode):
    """Counts what would have to wait for a GPU: reading values, and results whose size depends on values."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.counts = Counter()
        self.counting = False
        tolist = torch.Tensor.tolist

        def counted(tensor):
            self.counts["tolist"] += self.counting
            return tolist(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", counted)

    def __enter__(self):
        self.counting = True
        return super().__enter__()

    def __exit__(self, *args):
        self.counting = False
        return super().__exit__(*args)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        indices = args[1] if name.strip("_") in ("index", "index_put", "index_put_impl") else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        self.counts[name] += self.counting and (name in READING or by_mask)
        return operation(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def paused(self):
        self.counting = False
        yield
        self.counting = True

    def found(self):
        return {name: count for name, count in self.counts.items() if count}


def frozen_but(model, trains):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(family_of(model.config).part_of(name) in trains)
    use_segmented_vision_attention(model)
    if "vision" not in trains:
        run_frozen_vision_without_gradients(model)
    return model


def packed_model(family, trains):
    model = frozen_but(qwen2_vl() if family == "qwen2_vl" else newer(family), trains)
    use_packed_attention(model)
    count_no_placeholders_in_training(model)
    take_packed_batches(model)
    return model


def read_backs(trainer, model, batch, monkeypatch):
    """Of the forward and backward of a micro-batch as on a GPU: attention there has a kernel that takes boundaries."""
    counting = ReadBacks(monkeypatch)

    def kernel(q, k, v, bounds_q, bounds_k, longest_q, longest_k, scale, causal):
        with counting.paused():
            return attend_by_piece(q, k, v, bounds_q, bounds_k, scale, causal)

    monkeypatch.setattr(attention, "has_varlen_kernel", lambda value: True)
    monkeypatch.setattr(attention, "varlen_kernel", lambda name: kernel)
    inputs = trainer._prepare_inputs(batch)
    learned = torch.tensor(batch["stats"]["target_tokens"])
    model.train()
    with counting:
        trainer.compute_loss(model, inputs, num_items_in_batch=learned).backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    return counting.found()


@pytest.mark.parametrize("trains", [("language",), ("language", "merger", "vision")], ids=["language", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_training_reads_nothing_back(family, trains, encoded, tiny_processor, tmp_path, monkeypatch):
    model = packed_model(family, trains)
    trainer = make_trainer(model, [], tiny_processor, tmp_path)
    # On a GPU TRL's head looks for what is learned.
    monkeypatch.setattr(trl.trainer.utils, "_use_triton", lambda device: True)
    score_places_as_they_come(model)
    batch = join([[encoded[row] for row in group] for group in GROUPS], Positions(model.config))
    # The grids stay on the CPU, and tell how many features each image has. Where features train, their gradients are
    # picked out of those of the embeddings by a mask.
    wanted = {"tolist": 1} | ({"masked_scatter_backward": 1} if "vision" in trains else {})
    assert read_backs(trainer, model, batch, monkeypatch) == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_training_reads_no_more_back_for_more_images(
    family,
    encoded,
    tiny_processor,
    tmp_path,
    monkeypatch,
):
    """What is left: the sizes of the images, whether rows are padded, their image tokens, what is learned, deeper layers."""
    found = []
    for number, rows in enumerate(([0], [0, 1, 3, 6])):
        model = frozen_but(qwen2_vl() if family == "qwen2_vl" else newer(family), ("language",))
        items = SimpleNamespace(encode=lambda item, *args: encoded[item["row"]])
        trainer = make_trainer(model, items, tiny_processor, tmp_path / str(number))
        monkeypatch.setattr(trl.trainer.utils, "_use_triton", lambda device: True)
        batch = trainer.data_collator([{"row": row} for row in rows])
        found.append(sum(read_backs(trainer, model, batch, monkeypatch).values()))
    # One more to see that rows are padded.
    assert found[1] <= found[0] + 1 <= (14 if family.startswith("Qwen3VL") else 10)


def test_a_step_goes_through_the_modules_once_and_not_through_the_weights(
    encoded,
    tiny_processor,
    tmp_path,
    monkeypatch,
):
    class Counting(torch.nn.Module):
        calls = 0

        def train(self, mode=True):
            Counting.calls += 1
            return super().train(mode)

    model = packed_model("qwen2_vl", ("language",))
    model.counting = Counting()
    trainer = make_trainer(model.eval(), [], tiny_processor, tmp_path)
    monkeypatch.setattr(model, "num_parameters", lambda **kwargs: pytest.fail("went through all weights"))
    assert trainer.floating_point_ops({"input_ids": torch.zeros(1, 5)}) == 0
    Counting.calls = 0
    for calls in (1, 2):
        batches = [join([[encoded[row]]], Positions(model.config)) for row in (0, 3, 5)]
        trainer.training_step(model, {MICRO_BATCHES: batches}, num_items_in_batch=torch.tensor(10))
        assert Counting.calls == calls
        assert all(module.training for module in model.modules())
    assert "train" not in vars(model)


def test_deepspeed_rounds_pixels_and_not_what_positions_weigh(encoded, tiny_processor, tmp_path, monkeypatch):
    model = packed_model("Qwen3VLConfig", ("language",))
    trainer = make_trainer(model, [], tiny_processor, tmp_path)
    config = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", config)
    inputs = trainer._prepare_inputs(join([[encoded[0]]], Positions(model.config)))
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["image_interp_weights"].dtype == torch.float32
    assert {"image_grid_thw", "image_interp_indices"} <= inputs.keys()
