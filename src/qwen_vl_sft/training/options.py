"""Command-line options of sft.py."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_vl_sft.config.command_line import any_recipe_key, option


@dataclass(frozen=True)
class TrainOptions:
    """Command-line options of sft.py; `recipe_keys` holds the words of every other --key."""

    recipe: str | None = option(
        None, "flat YAML of the keys below; --key value wins over it", metavar="file", also="config"
    )
    dry_run: bool = option(
        False, "check everything, print the resolved recipe, the plan and a row as the model sees it, and stop"
    )
    recipe_keys: dict[str, list[str]] = any_recipe_key(listed=True)
