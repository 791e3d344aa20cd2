"""Exports of scripts/export.py as engines serve them: their form, and the model that their answers are compared with."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_vl_sft.errors import UserError, shortened

if TYPE_CHECKING:
    from qwen_vl_sft.config.settings import ModelSettings

REPORT_FILE = "export.json"
ADAPTER_GGUF = "adapter.gguf"
DEQUANTIZE = Path(__file__).parent / "workers/dequantize.py"
# The precision whose rounding an export has: q8_0 and FP8 round activations to eight bits as well.
_ROUNDING = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "q8_0": "float8", "FP8": "float8"}


@dataclass(frozen=True)
class Export:
    """A folder of scripts/export.py: `precision` as its report has it, `original` the model or run that it was made of."""

    folder: Path
    to: str
    precision: str
    original: Path

    @property
    def form(self) -> str:
        """Return the form of the model, as records and tables name it."""
        if self.to != "gguf":
            return f"{self.to} export" if self.to == self.precision else f"{self.precision} export"
        return f"GGUF {self.precision} {'adapter' if self.adapter else 'export'}"

    @property
    def adapter(self) -> Path | None:
        """Return the file of the adapter, None where the export is a whole model."""
        path = self.folder / ADAPTER_GGUF
        return path if path.is_file() else None

    @property
    def dtype(self) -> str:
        """Return the precision in which answers may differ at a near tie; 4-bit weights are exact once they are unpacked."""
        return _ROUNDING.get(self.precision, "float32")

    @property
    def compressed(self) -> bool:
        """Return whether its weights are in the format of compressed-tensors, so that they can be unpacked."""
        return self.to != "gguf"


def read_export(folder: Path) -> Export | None:
    """Return what a folder's report says, None where it holds none. Raises `UserError`."""
    path = folder / REPORT_FILE
    if not path.is_file():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        export = Export(folder, report["to"], report["precision"], Path(report["model"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--model: {path} cannot be read ({error}); export again") from None
    if not export.original.is_dir():
        raise UserError(
            f"--model: {export.original}, of which {folder} was made, is not there, and answers are compared with it; put it"
            f" back, or export again"
        )
    return export


@contextmanager
def dequantized(export: Export, settings: ModelSettings, python: Path) -> Iterator[ModelSettings]:
    """Yield settings of the model with the weights of a compressed export, unpacked into a temporary folder.

    `python` is that of the environment that reads the format. Raises `UserError`.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        done = subprocess.run(
            [str(python), str(DEQUANTIZE), str(export.folder), str(folder)],
            capture_output=True,
            text=True,
            env={**environment, "HF_HUB_OFFLINE": "1"},
            check=False,
        )
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            raise UserError(f"--model: {export.folder} cannot be unpacked: {shortened(last[0])}; export again")
        yield replace(settings, model_name_or_path=str(folder), model_revision="main")


def rounded_layers(settings: ModelSettings) -> list[str]:
    """Return the layers of a dequantized model whose inputs are rounded to FP8; none for every other model."""
    file = Path(str(settings.model_name_or_path)) / "rounded.json"
    return list(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else []
