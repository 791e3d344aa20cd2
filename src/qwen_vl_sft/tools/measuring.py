"""Shared by the measuring scripts: output folder, random model, facts of the machine, table of results."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_vl_sft.errors import UserError
from qwen_vl_sft.tools.options import RecipeOptions

# Keys of every measured recipe: nothing but training takes time.
TRAINING_ALONE = {
    "eval_strategy": "no",
    "predict_with_generate": False,
    "load_best_model_at_end": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
TEXT = "{}"  # the style of a column of words, which stands left; numbers stand right


def contradictions(keys: Collection[str], option: str, settings: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield the recipe keys that what `option` names sets itself, by `settings`: with other values a name would be wrong."""
    ours = {key: name for name, own in settings.items() for key in own}
    for key in keys:
        if key in ours:
            yield f"--{key}: --{option} {ours[key]} sets it; leave it out, or name other {option}"


def make_output_dir(folder: Path) -> None:
    """Make the folder for the results. Raises `UserError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "it is a file" if folder.is_file() else error.strerror
        raise UserError(f"--output_dir: {folder} cannot be made: {why}; name another folder") from None


def random_model_of(options: RecipeOptions) -> Path:
    """Return the folder of the random model; write the model if it does not exist. Raises `UserError`."""
    import torch

    from qwen_vl_sft.tools.random_model import make_random_model

    assert options.config is not None
    folder = options.model_dir or options.output_dir / "model"
    if not (folder / "config.json").is_file():
        on_gpu = torch.cuda.is_available()
        make_random_model(
            options.config, folder, options.processor or options.config, device="cuda" if on_gpu else "cpu"
        )
        if on_gpu:
            # What runs next may need all of the GPU.
            torch.cuda.empty_cache()
    return folder


def machine_facts() -> dict[str, Any]:
    """Return the versions, commit and GPU of this process."""
    import torch

    from qwen_vl_sft.checkpointing.run_folder import environment

    facts = environment({}, {}, [torch.cuda.get_device_name()] if torch.cuda.is_available() else ["cpu"])
    return {name: facts[name] for name in ("versions", "python", "devices", "git_commit")}


def format_table(results: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]) -> str:
    """Format results as a Markdown table; `columns` maps a key to label and style; columns without values are left out."""
    shown = {name: column for name, column in columns.items() if any(_cell(result, name, "{}") for result in results)}
    rows = [[label for label, _ in shown.values()]]
    rows += [[_cell(result, name, style) for name, (_, style) in shown.items()] for result in results]
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(shown))]
    left = [style == TEXT for _, style in shown.values()]
    rules = ["-" * width if text else "-" * (width - 1) + ":" for width, text in zip(widths, left, strict=True)]
    padded = [
        [cell.ljust(width) if text else cell.rjust(width) for cell, width, text in zip(row, widths, left, strict=True)]
        for row in rows
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in [padded[0], rules, *padded[1:]])


def _cell(result: Mapping[str, Any], name: str, style: str) -> str:
    value = result.get(name)
    return "" if value is None else style.format(value)
