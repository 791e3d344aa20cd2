"""Look at a recipe's data before training: every row, and a page with charts.

    python scripts/preview.py --recipe recipes/chartqa_qlora.yaml
    python scripts/preview.py --recipe recipes/chartqa_lora.yaml \\
        --dataset_name my_data --dataset_format messages --page my_data.html

No GPU and no weights are needed. What is checked here need not be checked again
when training starts. Exit code 1 when something would make training fail.
"""

from __future__ import annotations

import json

from qwen_vl_sft.config.command_line import parse, recipe_values
from qwen_vl_sft.config.reading import read_recipe
from qwen_vl_sft.console import quiet_libraries
from qwen_vl_sft.errors import exits_with_user_errors
from qwen_vl_sft.imports import quick_imports
from qwen_vl_sft.previewing.options import PreviewOptions, check_page


@exits_with_user_errors
def main() -> None:
    """Check every row, print what was found, and write the page."""
    options = parse(PreviewOptions, usage=__doc__)
    quiet_libraries(0)
    # The libraries take seconds to import; a mistyped command line or recipe needs none of them.
    recipe = read_recipe(options.recipe, recipe_values(options.recipe_keys, options))
    check_page(options.page)
    with quick_imports():
        from qwen_vl_sft.data.preview import shows_colors
        from qwen_vl_sft.previewing.inspection import inspect
        from qwen_vl_sft.previewing.page import write_page
        from qwen_vl_sft.previewing.terminal import as_json, describe

    found = inspect(recipe)
    write_page(options.page, found, options.examples)
    print(json.dumps(as_json(found), indent=1) if options.json else describe(found, shows_colors()))
    if not options.json:
        print(f"\nwritten     {options.page}")
    if found.problems:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
