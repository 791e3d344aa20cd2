"""Serve the page: load the models, start the server, print its address."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_vl_sft.demo.examples import Example, collect_examples
from qwen_vl_sft.demo.options import LOCAL, DemoOptions
from qwen_vl_sft.errors import EXIT_INTERRUPTED, UserError
from qwen_vl_sft.inference.source import Source, read_source


def read_sources(options: DemoOptions) -> list[Source]:
    """Read the runs of the command line. Raises `UserError`."""
    return [read_source(run, options.recipe_keys, tuned_needed=True) for run in options.run]


def serve(options: DemoOptions, examples: Sequence[Example] | None = None) -> None:
    """Load the models, then serve the page until it is interrupted. Raises `UserError`.

    Args:
        options: the command line.
        examples: what to offer; None collects it from the first run's data.
    """
    # A scheduler's signal ends it as Ctrl-C does: what visitors sent is removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="qwen_vl_sft_demo-") as folder:
            # All that visitors send lands here.
            os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "uploads")
            prepare_gradio()
            page = load_page(options, examples, Path(folder) / "examples")
            page.queue(max_size=options.queue, default_concurrency_limit=1, api_open=False)
            print(f"serving {launch(page, options)} (Ctrl-C ends it)", flush=True)
            page.block_thread()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def load_page(options: DemoOptions, examples: Sequence[Example] | None, folder: Path) -> Any:
    """Load the models and build their page; examples that are collected go into `folder`. Raises `UserError`."""
    from qwen_vl_sft.demo.page import build_page
    from qwen_vl_sft.inference.answering import Answerer

    sources = read_sources(options)
    answerer = Answerer(sources)
    if examples is None:
        examples = collect_examples(sources[0], options.examples, folder)
        if not examples and options.examples:
            print("no examples: the run's data is not available here", file=sys.stderr)
    print(f"loading the base model and {len(sources)} tuned", flush=True)
    answerer.load(("base", "tuned"))
    return build_page(answerer, examples, options)


def prepare_gradio() -> None:
    """Import Gradio with its telemetry turned off. Raises `UserError` when it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # Gradio asks its own server whether it answers, which a proxy would refuse.
    for name in ("no_proxy", "NO_PROXY"):
        known = os.environ.get(name, "")
        os.environ[name] = ",".join(filter(None, [known, LOCAL, "localhost"]))
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise UserError("the page needs Gradio, which is not installed: pip install 'qwen_vl_sft[demo]'") from None


def launch(page: Any, options: DemoOptions) -> str:
    """Start the server; returns the address. Raises `UserError` when the port is taken."""
    from qwen_vl_sft.demo.page import style, theme

    if options.share:
        print(
            "--share: everyone who has the address can use these models, through a server of Gradio's", file=sys.stderr
        )
    elif options.server_name != LOCAL:
        print(
            f"--server_name {options.server_name}: other machines can use these models, without a password",
            file=sys.stderr,
        )
    try:
        _, local, shared = page.launch(
            share=options.share, server_name=options.server_name, server_port=options.server_port,
            max_file_size=options.max_file_size, prevent_thread_lock=True, quiet=True, show_error=False,
            ssr_mode=False, mcp_server=False, pwa=False, enable_monitoring=False, run_history=False, footer_links=[],
            css=style(), theme=theme(),
        )  # fmt: skip
    except OSError as error:
        if options.server_port is None:
            raise UserError(f"--server_name {options.server_name}: cannot listen there ({error})") from None
        raise UserError(
            f"--server_port {options.server_port} is taken; give another, or none for the first free"
        ) from None
    return shared or local
