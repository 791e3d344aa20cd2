"""Forms of rows, a module each, which declares its `DataFormat` as `FORMAT`; `FORMATS` holds them by name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Set

from qwen_vl_sft.data.formats.base import DataFormat
from qwen_vl_sft.errors import UserError, quoted, shortened

AUTO = "auto"
# Columns of forms that other trainers read, each with the way out.
_OTHER_FORMS = (
    ({"instruction", "output"}, "name instruction and output prompt and completion, and write input behind the prompt"),
    ({"query", "response"}, "name query and response prompt and completion"),
    ({"question", "answer"}, "name question and answer prompt and completion"),
    ({"chosen", "rejected"}, "write the prompt and the chosen answer as messages; preferences are not trained on"),
    ({"texts"}, "write each of texts as turns of messages: user, assistant"),
    ({"text"}, "write the turns of text as messages"),
)


def _declared() -> dict[str, DataFormat]:
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    formats = [module.FORMAT for module in modules if hasattr(module, "FORMAT")]
    return {found.name: found for found in sorted(formats, key=lambda found: found.priority)}


FORMATS = _declared()


def choose_format(columns: Set[str], stated: str, where: str) -> DataFormat:
    """Return the format of a dataset with these columns: the one stated, for "auto" the first that recognises them.

    Raises `UserError`, which names the dataset `where`.
    """
    if stated != AUTO:
        missing = FORMATS[stated].columns - columns
        if missing:
            raise UserError(
                f"{where}: dataset_format {stated} needs the column(s) {', '.join(sorted(missing))}; set another format,"
                f" or auto"
            )
        return FORMATS[stated]
    for found in sorted(FORMATS.values(), key=lambda found: found.priority):
        if found.recognises(columns):
            return found
    known = "; ".join(f"{found.name}: {', '.join(sorted(found.columns))}" for found in FORMATS.values())
    raise UserError(f"{where}: columns {quoted(sorted(columns))} fit no format ({known}); {_way_out(columns)}")


def _way_out(columns: Set[str]) -> str:
    """Return what to do about columns that fit no format."""
    written = {name.strip().lower(): name for name in columns}
    for found in FORMATS.values():
        if found.recognises(written.keys()):
            wrong = [written[name] for name in sorted(found.columns) if written[name] != name]
            return f"names are read as they are written: correct {shortened(', '.join(map(repr, wrong)))}"
    for names, way_out in _OTHER_FORMS:
        if names <= columns:
            return way_out
    return "rename its columns to those of a format, or write its rows as messages"


def known_format(stated: str, dataset_name: str | None) -> DataFormat | None:
    """Return the format of a recipe without looking at its data: the one stated, else by the dataset's name."""
    if stated in FORMATS:
        return FORMATS[stated]
    name = str(dataset_name).lower()
    return next((found for found in FORMATS.values() if any(part in name for part in found.known_datasets)), None)
