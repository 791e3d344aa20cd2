"""Command-line options of preview.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qwen_vl_sft.config.command_line import any_recipe_key, option


@dataclass(frozen=True, kw_only=True)
class PreviewOptions:
    """Command-line options of preview.py; other keys go to the recipe."""

    recipe: Path = option(Path("recipes/chartqa_qlora.yaml"), "the recipe whose data is read", metavar="file")
    page: Path = option(Path("preview.html"), "the page to write; one of before is replaced", metavar="file")
    examples: int = option(8, "rows that the page shows as the model sees them", at_least=0)
    json: bool = option(False, "print JSON")
    recipe_keys: dict[str, list[str]] = any_recipe_key()
