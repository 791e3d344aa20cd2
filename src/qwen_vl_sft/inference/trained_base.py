"""Which base model an adapter was trained on, as its run tells, and a check that it answers on that one."""

from __future__ import annotations

import sys
from pathlib import Path

from qwen_vl_sft.checkpointing.checkpoints import with_manifest
from qwen_vl_sft.checkpointing.manifest import read_manifest
from qwen_vl_sft.checkpointing.run_folder import BASE, BASE_WEIGHTS, ENVIRONMENT, METRICS, read_facts
from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.inference.source import Source
from qwen_vl_sft.modeling.base_identity import FOLDER, digest_of_weights, identity_of_base, weights_of_base


def check_trained_base(source: Source) -> None:
    """Raise `UserError` where an adapter would answer on another base model than it was trained on.

    Two models of one shape take the same adapter, whose answers then mean nothing. Where the run does not tell, or a
    folder stands against a model of the Hub, which may be a copy of it, a note says that it cannot be checked.
    """
    if source.tuned is None or not source.tuned.is_adapter:
        return
    way_out = (
        "give the base model it was trained on with --model_name_or_path (and --model_revision), or score the base alone"
        " with --arms base,prompted"
    )
    tuned = source.tuned
    # What another trainer wrote names its base model in the adapter's configuration alone.
    name = (source.trained or tuned.recipe({}).model).model_name_or_path
    check_same_base(tuned.folder, tuned.home, name, source.recipe.model, "--run", way_out)


def check_same_base(folder: Path, home: Path, name: str | None, asked: ModelSettings, key: str, way_out: str) -> None:
    """Raise `UserError` where `asked` is another base model than that of an adapter, as far as its run tells.

    Args:
        folder: where the adapter is.
        home: the folder of its run.
        name: the base model in the recipe of its run.
        asked: the base model that it is to be put on.
        key: the setting that names the adapter.
        way_out: what the user can do.
    """
    trained, now = base_of_run(home, name), identity_of_base(asked)
    if trained == now:
        return
    if (same := _same_weights(home, name, trained, asked)) is True:
        return
    if same is not None:
        raise UserError(
            f"{key}: the adapter in {folder} was trained on {_words(name, trained)}, and {asked.model_name_or_path} is"
            f" another model ({now}): {same}; {way_out}"
        )
    if trained is not None and trained.startswith(FOLDER) == now.startswith(FOLDER):
        raise UserError(
            f"{key}: the adapter in {folder} was trained on {_words(name, trained)}, and {asked.model_name_or_path} is"
            f" another model ({now}); {way_out}"
        )
    if trained is not None or asked.model_name_or_path != name:
        told = _words(name, trained) if trained else "a base model that its run does not identify"
        print(
            f"warning: the adapter in {folder} was trained on {told}; whether {asked.model_name_or_path} ({now}) holds the"
            f" same weights cannot be told",
            file=sys.stderr,
            flush=True,
        )


def _same_weights(home: Path, name: str | None, trained: str | None, asked: ModelSettings) -> bool | str | None:
    """Compare tensors: True for the same, the difference in words, None where the trained ones are not known any more."""
    now = weights_of_base(asked)
    recorded = read_facts(home / ENVIRONMENT).get(BASE_WEIGHTS)
    if now is not None and recorded == digest_of_weights(now):
        return True
    folder = ModelSettings(model_name_or_path=name)
    # The folder that was trained on may hold another model by now.
    there = weights_of_base(folder) if name and Path(name).is_dir() and identity_of_base(folder) == trained else None
    if now is None or there is None:
        return f"its weights are others (digest {digest_of_weights(now)})" if now and recorded else None
    if digest_of_weights(now) == digest_of_weights(there):
        return True
    left = sorted(set(now) ^ set(there))
    if left:
        return f"{len(left):,} of its tensors are not in both, such as {left[0]}"
    changed = sorted(tensor for tensor in now if now[tensor] != there[tensor])
    return f"{len(changed):,} of its {len(now):,} tensors have other values, such as {changed[0]}"


def base_of_run(home: Path, name: str | None) -> str | None:
    """Return the identity of the base model of a run (`identity_of_base`), None where nothing in its folder tells.

    `name` is that of the model in its recipe.
    """
    told = read_facts(home / ENVIRONMENT).get(BASE)
    if told is None:
        manifests = [read_manifest(folder) for folder in with_manifest(home)]
        bases = [manifest.get("same", {}).get("base") for manifest in manifests]
        told = next((base for base in reversed(bases) if base), None)
    if told is None and (commit := read_facts(home / METRICS).get("base_commit")):
        told = f"{name} at {commit}"
    return told


def _words(name: str | None, trained: str | None) -> str:
    if trained is None:
        return "a base model that its run does not name"
    return f"{name} ({trained})" if trained.startswith(FOLDER) else trained
