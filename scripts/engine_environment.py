"""Install an engine that serves models, in a Python environment of its own.

    python scripts/engine_environment.py --engine vllm

The environment is kept in the user's cache (XDG_CACHE_HOME, else ~/.cache), and
made again only for other versions. docs/serving.md has sizes and times.
"""

from qwen_vl_sft.config.command_line import parse
from qwen_vl_sft.errors import exits_with_user_errors
from qwen_vl_sft.serving.options import EnvironmentOptions


@exits_with_user_errors
def main() -> None:
    """Read the command line, make the environment, print its Python."""
    options = parse(EnvironmentOptions, usage=__doc__)

    from qwen_vl_sft.serving.environments import make_environment
    from qwen_vl_sft.serving.registry import engine_named

    python = make_environment(engine_named(options.engine), say=lambda text: print(text, flush=True))
    print(f"python    {python}")


if __name__ == "__main__":
    main()
