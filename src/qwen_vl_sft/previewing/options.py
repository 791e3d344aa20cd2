"""Command-line options of preview.py, and whether its page can be written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qwen_vl_sft.config.command_line import any_recipe_key, option
from qwen_vl_sft.errors import UserError, first_line

# In the head of every page.
_MADE_BY = 'content="qwen_vl_sft preview"'


@dataclass(frozen=True, kw_only=True)
class PreviewOptions:
    """Command-line options of preview.py; other keys go to the recipe."""

    recipe: Path = option(Path("recipes/chartqa_qlora.yaml"), "the recipe whose data is read", metavar="file")
    page: Path = option(Path("preview.html"), "the page to write; an older preview there is replaced", metavar="file")
    examples: int = option(8, "rows that the page shows as the model sees them", at_least=0)
    json: bool = option(False, "print JSON")
    recipe_keys: dict[str, list[str]] = any_recipe_key()


def check_page(path: Path) -> None:
    """Raise `UserError` where no page can be written, or something else would be overwritten."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"--page: {path} is no place for a file; name a file in a folder that exists")
    try:
        if path.exists() and _MADE_BY not in path.read_text(encoding="utf-8", errors="replace")[:2000]:
            raise UserError(f"--page: {path} exists and is no page of a preview; name another file")
    except OSError as error:
        raise UserError(f"--page: {path} cannot be read: {first_line(error)}") from None
