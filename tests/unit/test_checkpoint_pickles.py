"""Checkpoints that could run code when they are resumed from: DeepSpeed's states, and the parts of FSDP's."""

import json
import os
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import checkpoint as distributed

from qwen_vl_sft.checkpointing import checkpoints, manifest
from qwen_vl_sft.checkpointing.checkpoints import Checkpoint
from qwen_vl_sft.checkpointing.pickles import problem_of_pickles
from qwen_vl_sft.checkpointing.resume_check import checkpoint_to_resume
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class RunsCode:
    """Unpickled without restrictions, it makes a folder."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


@pytest.fixture
def deepspeed(tmp_path):
    """A checkpoint as ZeRO writes it, with something among its states."""

    def write(something=None):
        folder = tmp_path / "checkpoint-3"
        (folder / "global_step3").mkdir(parents=True)
        state = {"step": torch.tensor(3.0), "shapes": {"a": torch.Size([2, 3])}, "something": something}
        torch.save({"optimizer_state_dict": state}, folder / "global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt")
        (folder / "latest").write_text("global_step3\n")
        return folder

    return write


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint as FSDP writes it, with something among its numbers."""

    def write(something=0.5):
        folder = tmp_path / "checkpoint-3"
        state = {"weight": torch.ones(4, 2, dtype=torch.bfloat16), "lr": something}
        distributed.save(state, checkpoint_id=folder / "optimizer_0")
        return folder

    return write


def test_checkpoints_of_tensors_and_numbers_are_fine(deepspeed, sharded):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.utils.tensor_fragment import fragment_address

    deepspeed([LossScaler(1.0), fragment_address(3, 4)])
    folder = sharded((0.9, 0.999))
    assert (folder / "global_step3").is_dir()
    assert (folder / "optimizer_0/.metadata").is_file()
    assert problem_of_pickles(folder) is None


def test_deepspeed_s_states_are_looked_through(deepspeed, tmp_path):
    problem = problem_of_pickles(deepspeed(RunsCode(tmp_path / "harm")))
    assert problem.startswith("global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt cannot be read safely: ")
    assert "mkdir" in problem
    assert "\n" not in problem
    assert not (tmp_path / "harm").exists()


def test_states_of_another_format_are_refused(deepspeed, tmp_path):
    folder = deepspeed()
    path = folder / "global_step3/mp_rank_00_model_states.pt"
    path.write_bytes(pickle.dumps(RunsCode(tmp_path / "harm")))
    assert "mp_rank_00_model_states.pt cannot be read safely" in problem_of_pickles(folder)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("tag", ["../other", "global_step3/../../other", "elsewhere"])
def test_states_are_those_of_the_checkpoint(tag, deepspeed):
    folder = deepspeed()
    (folder / "latest").write_text(tag)
    assert problem_of_pickles(folder) == f"latest names {tag!r}, which is no step"


def test_numbers_of_a_distributed_checkpoint_are_looked_through(sharded, tmp_path):
    problem = problem_of_pickles(sharded(RunsCode(tmp_path / "harm")))
    assert problem.startswith("optimizer_0/.metadata names a part of __0_0.distcp that cannot be read safely")
    assert "mkdir" in problem
    assert not (tmp_path / "harm").exists()


def test_the_index_of_a_distributed_checkpoint_is_looked_through(sharded, tmp_path):
    folder = sharded()
    (folder / "optimizer_0/.metadata").write_bytes(pickle.dumps(RunsCode(tmp_path / "harm")))
    problem = problem_of_pickles(folder)
    assert problem.startswith("optimizer_0/.metadata cannot be read safely: it asks for ")
    assert problem.endswith(".mkdir")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["pickle", "os", "torch.distributed.checkpoint.metadata"])
def test_the_index_makes_no_more_than_its_own_types(name, sharded):
    """Names that a module of types has only imported, or that reach further with a dot, are none of it."""
    folder = sharded()
    for wanted in ("os.system", "Enum", "system", "TensorProperties.create_from_tensor"):
        (folder / "optimizer_0/.metadata").write_bytes(
            b"\x80\x04\x8c%c%s\x8c%c%s\x93." % (len(name), name.encode(), len(wanted), wanted.encode())
        )
        assert "it asks for" in problem_of_pickles(folder)


def test_parts_of_a_distributed_checkpoint_lie_beside_its_index(sharded, tmp_path):
    folder = sharded()
    index = folder / "optimizer_0/.metadata"
    os.rename(folder / "optimizer_0/__0_0.distcp", tmp_path / "__0_0.distcp")
    metadata = pickle.loads(index.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../../__0_0.distcp"
    index.write_bytes(pickle.dumps(metadata))
    assert problem_of_pickles(folder).endswith("names ../../__0_0.distcp, which lies elsewhere")


@pytest.mark.parametrize("where", ["in the checkpoint", "in the best"])
def test_a_resume_from_such_a_checkpoint_is_refused_unless_it_is_asked_for(where, deepspeed, tmp_path, monkeypatch):
    """Also where it is the best one, which is loaded at the end."""
    harmful = deepspeed(RunsCode(tmp_path / "harm"))
    good = tmp_path / "checkpoint-9"
    good.mkdir()
    for folder in (harmful, good):
        best = {"best_model_checkpoint": f"elsewhere/{harmful.name}"}
        (folder / "trainer_state.json").write_text(json.dumps(best))
    resumed = good if where == "in the best" else harmful
    monkeypatch.setattr(checkpoints, "find", lambda *args: Checkpoint(resumed, 9, {}))
    monkeypatch.setattr(manifest, "problem_of", lambda folder: None)
    context = DistributedContext(strategy="single", processes=1, rank=0, local_rank=0, on_cpu=True)
    model = SimpleNamespace(use_safetensors=True, use_peft=False)
    keys = {"resume_from_checkpoint": str(resumed), "load_best_model_at_end": where == "in the best"}
    recipe = SimpleNamespace(output_dir=tmp_path, model=model, get=keys.get)
    told = "checkpoint-3: .* anything else could run code here; if you trust whoever wrote it, set use_safetensors"
    with pytest.raises(UserError, match=told):
        checkpoint_to_resume(recipe, context, {"judge": {}})
    model.use_safetensors = False
    found = checkpoint_to_resume(recipe, context, {"judge": {}})
    assert (found.path, found.best) == (resumed, harmful if where == "in the best" else None)
    assert not (tmp_path / "harm").exists()
