"""The command line of every script: typed options, messages that name the nearest one, and --help."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from fixtures.repository import REPOSITORY
from qwen_vl_sft.config.command_line import (
    REQUIRED,
    any_recipe_key,
    format_help,
    names,
    option,
    parse,
    recipe_keys,
    recipe_values,
)
from qwen_vl_sft.errors import EXIT_USER_ERROR, MOST_QUOTED, UserError, exits_with_user_errors


@dataclass(frozen=True)
class Options:
    run: Path = option(REQUIRED, "a run folder", metavar="folder")
    images: tuple[Path, ...] = option((), "image files")
    arms: tuple[str, ...] | None = option(None, "some of a,b", parse=names)
    rows: int | None = option(None, "how many", at_least=1)
    seconds: float = option(1.5, "how long")
    dtype: Literal["bfloat16", "float32"] = option("bfloat16", "precision")
    json: bool = option(False, "one line of JSON")
    keys: dict[str, str] = recipe_keys("load_in_4bit", "max_pixels", "use_cpu")


@dataclass(frozen=True)
class AnyKey:
    config: str | None = option(None, "a file", also="settings")
    keys: dict[str, list[str]] = any_recipe_key()


def test_typed_values():
    words = "--run a --images b c --arms x,y,x --rows=3 --seconds 2 --dtype float32 --json --use-cpu --max_pixels 010"
    assert parse(Options, words.split()) == Options(
        Path("a"),
        (Path("b"), Path("c")),
        ("x", "y"),
        3,
        2.0,
        "float32",
        True,
        {"use_cpu": "true", "max_pixels": "010"},
    )
    assert parse(Options, ["--run=a", "--json", "false"]) == Options(Path("a"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "--run is missing; give a run folder"),
        ("--run a --image b", "unknown option --image; did you mean --images?"),
        ("--run a --max_pixel 1", "unknown option --max_pixel; did you mean --max_pixels?"),
        ("--run a --quite_other 1", "unknown option --quite_other; --help lists all"),
        ("--run a b", "--run takes one folder, not a b"),
        ("--run", "--run takes one folder, not none"),
        ("--run a --images", "--images takes one or more, not none"),
        ("--run a --rows 0", "--rows: 0 is below 1"),
        ("--run a --rows x", "--rows: 'x' is not a whole number"),
        ("--run a --dtype int4", "--dtype: 'int4' is not one of bfloat16, float32"),
        ("--run a --arms ,", "--arms: ',' names nothing"),
        ("--run a --json perhaps", "--json: 'perhaps' is not true or false"),
        ("--run a --max_pixels", "--max_pixels takes one value, not none"),
        ("a", "'a' has no key before it"),
        ("--help perhaps", "--help: 'perhaps' is not true or false"),
    ],
)
def test_each_mistake_has_one_message(words, told):
    with pytest.raises(UserError) as caught:
        parse(Options, words.split())
    [problem] = caught.value.problems
    assert problem.startswith(f"command line: {told}")


def test_a_repeated_option_takes_the_last_value_and_a_repeated_recipe_key_is_refused():
    assert parse(Options, ["--run", "a", "--rows", "1", "--rows", "2"]).rows == 2
    with pytest.raises(UserError, match=r"^command line: --seed is given twice; keep one$"):
        parse(AnyKey, ["--seed", "1", "--seed", "2"])


def test_a_missing_choice_names_the_choices():
    @dataclass(frozen=True)
    class Choosing:
        to: Literal["gguf", "fp8"] = option(REQUIRED, "gguf: for one; fp8: for another")

    with pytest.raises(UserError, match=r"^command line: --to is missing; give one of gguf, fp8$"):
        parse(Choosing, [])


def test_all_mistakes_are_told_at_once():
    with pytest.raises(UserError) as caught:
        parse(Options, ["--rows", "0", "--dtype", "int4", "--imges", "b"])
    assert len(caught.value.problems) == 4


def test_words_for_the_recipe_and_second_names():
    assert parse(AnyKey, ["--settings", "a", "--seed", "1", "--list", "b", "c", "--packing"]) == AnyKey(
        "a", {"seed": ["1"], "list": ["b", "c"], "packing": []}
    )
    with pytest.raises(UserError, match="--config is given twice"):
        parse(AnyKey, ["--settings", "a", "--config", "b"])


def test_a_mistyped_option_beside_recipe_keys_is_named():
    @dataclass(frozen=True)
    class Measuring(AnyKey):
        strategies: str = option("ddp", "some of ddp,zero2")

    options = parse(Measuring, ["--strateges", "zero2", "--learning_rat", "1", "--seed", "1"])
    with pytest.raises(UserError, match=r"^command line: unknown option --strateges; did you mean --strategies\?$"):
        recipe_values(options.keys, options)
    # A recipe's keys are checked when it is read, also those that nearly are an option.
    assert recipe_values({"seed": ["1"], "evaluation_strategy": ["no"], "learning_rat": ["1"]}, options) == {
        "seed": 1,
        "evaluation_strategy": False,
        "learning_rat": 1,
    }


def test_help_names_types_and_defaults():
    lines = format_help(Options, "usage").splitlines()
    assert lines[0] == "usage"
    text = "\n".join(lines)
    for wanted in ("--run FOLDER ", "a run folder [required]", "how many (a whole number)", "(a number) [1.5]"):
        assert wanted in text
    assert "larger images are reduced" in text
    assert max(map(len, lines)) <= 80


def test_help_ends_with_the_text(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(Options, ["-h"], usage="usage")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage\n\nOptions\n")


WRONG = {
    "benchmark": "--outputdir x",
    "benchmark_answers": "--rows many --config x --output_dir x",
    "check_packing": "--rows many --output_dir x",
    "check_plan": "--ponts x",
    "compare_bases": "--steps many --output_dir x",
    "compare_strategies": "--processes --output_dir x",
    "data_costs": "--rows many --output_dir x",
    "demo": "--rn runs/x",
    "doctor": "--rnus false",
    "engine_environment": "--engin vllm",
    "evaluate": "--splt test",
    "export": "--run no/such/run --output_dir no/such/export --to gguf",
    "generate": "--imges a.png",
    "kill_and_resume": "--kills many",
    "make_random_model": "--confg x",
    "make_tiny": "--output_dr x",
    "merge": "--rn runs/x",
    "plan": "--num_gpus many",
    "preview": "--recip x",
    "push": "--repoid x",
    "serve_check": "--engin vllm --run x",
    "sft": "--recipe recipes/quickstart.yaml --lora_scope expert",
}


# A run that is not there is told as early.
WRONG_RUN = {"export": "--run: no/such/run does not exist"}


def test_every_script_is_tried():
    assert sorted(WRONG) == sorted(path.stem for path in (REPOSITORY / "scripts").glob("*.py"))


@pytest.mark.parametrize("script", sorted(WRONG))
def test_a_mistyped_command_line_ends_at_once_and_needs_no_torch(script):
    code = f"import runpy, sys, atexit; sys.argv[1:] = {WRONG[script].split()!r}; import os; leave = os._exit\n"
    code += "os._exit = lambda code: (print('torch' in sys.modules), leave(code) if not sys.stdout.flush() else 0)\n"
    code += f"runpy.run_path({str(REPOSITORY / 'scripts' / f'{script}.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.returncode, done.stdout) == (EXIT_USER_ERROR, "False\n"), done.stderr
    assert done.stderr.startswith("error: ")
    assert WRONG_RUN.get(script, "command line: ") in done.stderr


class Exit(BaseException):
    """In place of the end of this process."""


@pytest.mark.parametrize("ask", [Path.exists, Path.is_dir, Path.read_text, Path.mkdir])
def test_a_name_that_is_too_long_for_a_file_is_told_in_short(ask, monkeypatch, capsys):
    def leave(code):
        raise Exit(code)

    @exits_with_user_errors
    def main():
        ask(Path(3000 * "x"))

    monkeypatch.setattr("os._exit", leave)
    with pytest.raises(Exit, match=str(EXIT_USER_ERROR)):
        main()
    told = capsys.readouterr().err
    assert told.startswith("error: 'xxx")
    assert told.endswith("is too long to be the name of a file; shorten it\n")
    assert len(told) < MOST_QUOTED + 100
