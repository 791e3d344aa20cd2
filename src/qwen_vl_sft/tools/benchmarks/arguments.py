"""What the command lines of the benchmark scripts have in common: a recipe, and perhaps random weights of a real shape."""

from __future__ import annotations

import argparse
from pathlib import Path

from qwen_vl_sft.errors import UserError

# What every recipe is told: nothing but training takes time.
TRAINING_ALONE = {
    "eval_strategy": "no",
    "predict_with_generate": False,
    "load_best_model_at_end": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def add_common_arguments(parser: argparse.ArgumentParser, needs_config: bool) -> None:
    """Add the recipe, the output folder, and the shape of a random model."""
    parser.add_argument("--recipe", type=Path, default=Path("recipes/chartqa_qlora.yaml"))
    parser.add_argument("--output_dir", type=Path, required=True, help="the results go here")
    parser.add_argument(
        "--config",
        required=needs_config,
        help="random weights of this shape: local folder or Hub id with a config.json",
    )
    parser.add_argument("--processor", help="local folder or Hub id of the processor (default: --config)")
    parser.add_argument("--model_dir", type=Path, help="where the random model is kept (default: in output_dir)")


def make_output_dir(folder: Path) -> None:
    """Make the folder for the results. Raises `UserError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "it is a file" if folder.is_file() else error.strerror
        raise UserError(f"--output_dir: {folder} cannot be made: {why}; name another folder") from None


def random_model_of(arguments: argparse.Namespace) -> Path:
    """The folder of the random model, which is written unless it is there. Raises `UserError`."""
    import torch

    from qwen_vl_sft.tools.random_model import make_random_model

    folder = arguments.model_dir or arguments.output_dir / "model"
    if not (folder / "config.json").is_file():
        on_gpu = torch.cuda.is_available()
        make_random_model(
            arguments.config, folder, arguments.processor or arguments.config, device="cuda" if on_gpu else "cpu"
        )
        if on_gpu:
            # What runs next may need all of the GPU.
            torch.cuda.empty_cache()
    return Path(folder)
