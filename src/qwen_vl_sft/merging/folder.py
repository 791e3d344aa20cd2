"""The folder of a merged model: written to a temporary folder with everything that belongs to a model, then moved."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qwen_vl_sft.atomic_write import writing_to
from qwen_vl_sft.checkpointing import run_folder
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.merging.plan import REPORT_FILE, MergePlan

# Either makes a processor of a folder.
IMAGE_FILES = ("processor_config.json", "preprocessor_config.json")
PROCESSOR_FILES = (
    *IMAGE_FILES, "video_preprocessor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip

NOTHING_LEFT = "nothing was left there. Free space, or name another folder"


@contextlib.contextmanager
def staged(output: Path, needed: int) -> Iterator[Path]:
    """Yield a temporary folder that becomes `output` at the end, or is deleted on any failure, Ctrl-C included.

    Raises `UserError` when the disk has fewer than `needed` bytes free.
    """
    output = output.resolve()  # a folder can take the place of an empty folder, not of a link to one
    with writing_to(output, NOTHING_LEFT):
        output.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output.parent).free
        if free < needed:
            raise UserError(
                f"--output_dir: {output} needs {needed / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free; free some, or"
                f" name a folder on another disk"
            )
        where = Path(tempfile.mkdtemp(prefix=f".{output.name}-merging-", dir=output.parent))
    try:
        yield where
        with writing_to(output, NOTHING_LEFT):
            _open_to_group(where)
            os.replace(where, output)
    finally:
        shutil.rmtree(where, ignore_errors=True)


def write_companions(plan: MergePlan, base: Path, unties: bool, folder: Path) -> None:
    """Write configuration, processor, system message and recipe, so that the folder is a complete model and run.

    Args:
        plan: the merge.
        base: the base model's folder.
        unties: the output head is no longer the embeddings.
        folder: where to write.
    """
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config = merged_config(config, plan.options.dtype, unties)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # A checkpoint may hold weights alone; the run around it has the processor with its pixel limits.
    folders = [plan.tuned.folder, plan.tuned.home]
    # Other trainers save the adapter alone, or with a tokenizer but without a processor: then all is the base's.
    has_processor = any((source / name).is_file() for source in folders for name in IMAGE_FILES)
    for name in PROCESSOR_FILES:
        _copy_first(name, folders if has_processor else [base], folder)
    _copy_first(run_folder.SYSTEM_MESSAGE, folders, folder)
    _copy_first("generation_config.json", [base], folder)
    # The merged model is no longer quantized, so evaluating it as a run must not quantize it again.
    precision = {"dtype": plan.options.dtype, "load_in_4bit": False, "load_in_8bit": False, "load_in_fp8": False}
    recipe = yaml.safe_dump(plan.recipe.values() | precision, sort_keys=False, allow_unicode=True, width=100)
    note = f"# Of the run that was merged; the precision is the merged model's. See {REPORT_FILE}.\n"
    (folder / run_folder.RECIPE).write_text(note + recipe, encoding="utf-8")


def merged_config(config: dict[str, Any], dtype: str, unties: bool) -> dict[str, Any]:
    """Return the base's configuration in the precision of the output, untied where the adapter unties; nothing quantized."""
    # transformers 5 goes by the outer entry, and writes True into the inner one of each Qwen3-VL-MoE; version 4 goes by that.
    untied = unties or config.get("tie_word_embeddings") is False
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        part |= {name: dtype for name in ("dtype", "torch_dtype") if name in part}
        part.pop("quantization_config", None)
        if (unties and part is config) or (untied and "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
        part |= rope_of_transformers_4(part) | experts_of_transformers_4(part)
    return config if "torch_dtype" in config else config | {"dtype": dtype}


def rope_of_transformers_4(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries in which transformers 4 looks for the positions of a language model, none where there are none.

    transformers 5 writes `rope_parameters` alone. Version 4 loads a Qwen2-VL or Qwen2.5-VL without a message, and its forward
    ends with "'NoneType' object is not subscriptable"; a Qwen3-VL ends in from_pretrained with "'NoneType' object has no
    attribute 'get'" (4.57.6; findings/transformers_4_reads_rope_of_5.sh). Version 5 reads either.
    """
    rope = part.get("rope_parameters") or {}
    if "mrope_section" not in rope or part.get("rope_scaling"):
        return {}
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return {"rope_theta": rope["rope_theta"], "rope_scaling": scaling} if "rope_theta" in rope else {}


def experts_of_transformers_4(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry in which transformers 4 looks for the number of experts, none where it is there or there are none.

    transformers 5 writes `num_local_experts` for a Qwen3-VL-MoE, which version 4 does not know: it takes 60 experts, and
    sizes do not match (4.57.6). Version 5 reads both.
    """
    if "num_experts" in part or "num_local_experts" not in part:
        return {}
    return {"num_experts": part["num_local_experts"]}


def _copy_first(name: str, folders: Sequence[Path], folder: Path) -> None:
    found = next((source / name for source in folders if (source / name).is_file()), None)
    if found:
        shutil.copyfile(found, folder / name)


def _open_to_group(folder: Path) -> None:
    """Give the umask's permissions: mkdtemp and safetensors write for the owner alone, also in a shared folder."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~umask)
