"""Serve a page that answers questions about images, base and tuned side by side.

    python scripts/demo.py --run runs/quickstart
    python scripts/demo.py --run runs/chartqa_qlora runs/chartqa_lora \\
        --load_in_4bit true
    python scripts/demo.py --run runs/chartqa_qlora --export_space space

Only this machine can open the page unless --server_name or --share says
otherwise. --export_space writes the same page as a Hugging Face Space. Needs
`pip install 'qwen_vl_sft[demo]'`.
"""

from qwen_vl_sft.config.command_line import parse
from qwen_vl_sft.console import quiet_libraries
from qwen_vl_sft.demo.options import DemoOptions, check_options
from qwen_vl_sft.errors import exits_with_user_errors
from qwen_vl_sft.imports import quick_imports


@exits_with_user_errors
def main() -> None:
    """Serve the page, or write it as a Space."""
    quiet_libraries(rank=0)
    options = parse(DemoOptions, usage=__doc__)
    check_options(options)
    if options.export_space:
        from qwen_vl_sft.demo.space import export_space

        export_space(options)
        print(f"written to {options.export_space}; see README.md there")
        return

    with quick_imports():
        from qwen_vl_sft.demo.serve import serve

    serve(options)


if __name__ == "__main__":
    main()
