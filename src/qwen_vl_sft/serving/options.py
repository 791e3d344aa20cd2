"""Command-line options of serve_check.py, and the check that they describe."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwen_vl_sft.config.command_line import REQUIRED, option, recipe_keys
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.serving.base import ServingEngine
from qwen_vl_sft.serving.exported import Export, read_export
from qwen_vl_sft.serving.record import AS_TRAINED, form_of
from qwen_vl_sft.serving.registry import ENGINES, engine_named

if TYPE_CHECKING:
    from qwen_vl_sft.config.settings import ModelSettings
    from qwen_vl_sft.evaluation.options import EvaluationPlan

# Keys of the run's recipe that may be given: where rows and base model are now, and how long answers get.
KEYS = (
    "model_name_or_path", "model_revision", "dataset_name", "dataset_config", "dataset_revision", "image_folder",
    "dataset_format", "bad_rows", "max_new_tokens", "use_cpu",
)  # fmt: skip


@dataclass(frozen=True)
class ServeCheckOptions:
    """Command-line options of serve_check.py."""

    run: Path = option(REQUIRED, "run folder of scripts/sft.py, or a checkpoint in it", metavar="folder")
    engine: str = option(REQUIRED, f"the engine: {', '.join(ENGINES)}", metavar="name")
    model: Path | None = option(
        None,
        "folder of scripts/merge.py or scripts/export.py, served in place of the run's adapter on its base",
        metavar="folder",
    )
    adapter: Path | None = option(
        None, "folder of the adapter that the engine loads; default: the run's own", metavar="folder"
    )
    split: str = option("test", "split whose rows are asked, slices allowed")
    max_samples: int | None = option(
        100, "most rows to ask, evenly spaced over the split", at_least=1, metavar="number"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "precision that both sides compute in; float32 tells faults from rounding best"
    )
    engine_arguments: str = option(
        "", "further options of the engine in one word, after the card's own: --engine_arguments='--x 1'"
    )
    recipe_keys: dict[str, str] = recipe_keys(*KEYS)


@dataclass(frozen=True)
class EnvironmentOptions:
    """Command-line options of engine_environment.py."""

    engine: str = option(REQUIRED, f"the engine: {', '.join(ENGINES)}", metavar="name")


@dataclass(frozen=True)
class ServeCheckPlan:
    """A check that is ready to start: `evaluation` reads its rows, `what` is the form of the model that is served.

    `reference` are the settings of our model: of the base for an adapter, else of the whole model. `merge` is merge.json,
    and `export` what export.json says, both of the model that is served; None without them.
    """

    options: ServeCheckOptions
    engine: ServingEngine
    python: Path
    evaluation: EvaluationPlan
    what: str
    reference: ModelSettings
    merge: dict[str, Any] | None
    export: Export | None
    further_arguments: list[str]

    @property
    def has_adapter(self) -> bool:
        """Return whether our side is base and adapter."""
        tuned = self.evaluation.tuned
        whole = self.export is not None and self.export.adapter is None
        return tuned is not None and tuned.is_adapter and not whole

    @property
    def on_cpu(self) -> bool:
        """Return whether our side computes on the CPU: without a GPU, or with `use_cpu`."""
        import torch

        return not torch.cuda.is_available() or bool(self.evaluation.recipe.get("use_cpu"))

    @property
    def dtype_compared(self) -> str:
        """Return the precision that rounds most, of the engine's, ours and that of stored merged weights."""
        used = {self.options.dtype, self.reference.dtype, (self.merge or {}).get("dtype")}
        used |= {self.export.dtype} if self.export else set()
        return next(dtype for dtype in ("float8", "bfloat16", "float16", "float32") if dtype in used)

    @property
    def home(self) -> Path:
        """Return the folder of the run."""
        assert self.evaluation.tuned
        return self.evaluation.tuned.home


def make_plan(options: ServeCheckOptions) -> ServeCheckPlan:
    """Read the run and find the engine. Raises `UserError`; writes nothing."""
    from qwen_vl_sft.evaluation.options import EvaluateOptions, EvaluationPlan
    from qwen_vl_sft.inference.source import read_source, tuned_settings
    from qwen_vl_sft.merging.plan import REPORT_FILE
    from qwen_vl_sft.serving.environments import python_of

    # First: reading the run takes seconds.
    engine = engine_named(options.engine)
    python = python_of(engine)
    source = read_source(options.run, options.recipe_keys, tuned_needed=True)
    tuned = source.tuned
    assert tuned
    export = read_export(options.model) if options.model else None
    merge = None if export else read_merge((options.model or tuned.folder) / REPORT_FILE)
    check_form(options, engine, export, merge)
    if (options.model or not tuned.is_adapter) and options.adapter:
        raise UserError("--adapter: a merged or full model is served without one; leave it out")
    what = export.form if export else form_of(merge, tuned.is_adapter)
    trained = source.recipe.model
    # A merge onto dequantized weights is compared with what was trained, the quantized base and its adapter.
    keeps_precision = what in AS_TRAINED and tuned.is_adapter
    reference = trained if keeps_precision else replace(trained, **unquantized(trained), dtype=options.dtype)
    if export and export.adapter is None:
        reference = replace(reference, model_name_or_path=str(export.original), model_revision="main")
    else:
        reference = tuned_settings(reference, tuned)
    try:
        further = shlex.split(options.engine_arguments)
    except ValueError as error:
        raise UserError(f"--engine_arguments: {error}; quote it as a shell would") from None
    evaluation = EvaluationPlan(
        **vars(source),
        options=EvaluateOptions(run=options.run, arms=("tuned",), split=options.split, max_samples=options.max_samples),
        output_dir=tuned.home,
    )
    return ServeCheckPlan(options, engine, python, evaluation, what, reference, merge, export, further)


def check_form(
    options: ServeCheckOptions, engine: ServingEngine, export: Export | None, merge: dict[str, Any] | None
) -> None:
    """Raise `UserError` where the engine does not serve what --model names, or needs one."""
    from qwen_vl_sft.merging.plan import REPORT_FILE
    from qwen_vl_sft.serving.exported import REPORT_FILE as EXPORT_FILE

    if options.model is not None and not options.model.is_dir():
        raise UserError(
            f"--model: {options.model} is not there; name a folder of scripts/merge.py or scripts/export.py"
        )
    gguf = export is not None and not export.compressed
    if engine.gguf and not gguf:
        raise UserError(
            f"--engine: {engine.title} serves GGUF alone; export with python scripts/export.py --run"
            f" {options.model or options.run} --to gguf --output_dir exported, and name that folder with --model"
        )
    if gguf and not engine.gguf:
        raise UserError(f"--engine: {engine.title} is not asked for GGUF; give --engine llama.cpp")
    if options.model is not None and merge is None and export is None:
        raise UserError(
            f"--model: {options.model} holds neither {REPORT_FILE} nor {EXPORT_FILE}; name a folder of scripts/merge.py or"
            f" scripts/export.py"
        )


def unquantized(settings: ModelSettings) -> dict[str, Any]:
    """Return the keys that quantize a base model and are set, turned off."""
    return {name: False for name in vars(settings) if name.startswith("load_in_") and getattr(settings, name)}


def read_merge(path: Path) -> dict[str, Any] | None:
    """Return the report of a merge, None where there is none. Raises `UserError`."""
    import json

    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError) as error:
        raise UserError(f"--model: {path} cannot be read ({error}); merge again") from None
    return found if isinstance(found, dict) else None
