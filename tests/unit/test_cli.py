"""The console command: what it starts for a command line, what it says, and what it imports."""

import subprocess
import sys
from argparse import SUPPRESS

import pytest

from fixtures.repository import REPOSITORY
from qwen_vl_sft import cli
from qwen_vl_sft.cli import LAUNCH_OPTIONS, build_command, format_files, format_help, split_launch_options
from qwen_vl_sft.config.reading import key_hints
from qwen_vl_sft.distributed.launcher_request import Process, read_launcher_request
from qwen_vl_sft.errors import UserError

SCRIPTS = REPOSITORY / "scripts"
CONFIGS = REPOSITORY / "accelerate_configs"


def run_cli(*words):
    return subprocess.run(
        [sys.executable, "-m", "qwen_vl_sft.cli", *words], capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("words", [["-m", "qwen_vl_sft.cli", "--help"], [str(SCRIPTS / "evaluate.py"), "--help"]])
def test_help_into_a_closed_pipe_ends_without_a_word(words):
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=300) == 1


@pytest.mark.parametrize("name", sorted(path.stem for path in SCRIPTS.glob("*.py")))
def test_every_script_is_a_command(name):
    assert build_command(name, ["--help"]) == [sys.executable, str(SCRIPTS / f"{name}.py"), "--help"]
    assert f"\n  {name} " in format_help() or f"\n  {name}\n" in format_help()


@pytest.mark.parametrize(
    ("words", "launcher"),
    [
        ("--accelerate_config zero2", "zero2.yaml"),
        ("--accelerate_config=fsdp2.yaml --num-processes=8", "fsdp2.yaml --num_processes 8"),
        ("--num_processes 8", "ddp.yaml --num_processes 8"),
        ("--main_process_port 0 --accelerate_config cpu", "cpu.yaml --main_process_port 0"),
        ("--gpu_ids -1,-1", "ddp.yaml --gpu_ids -1,-1"),
    ],
)
def test_launch_options_start_the_launcher(words, launcher):
    command = build_command("sft", ["--recipe", "quickstart.yaml", *words.split(), "--learning_rate", "1e-4"])
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    assert command[:4] == start
    rest = [str(SCRIPTS / "sft.py"), "--recipe", "quickstart.yaml", "--learning_rate", "1e-4"]
    assert command[4:] == [*f"{CONFIGS}/{launcher}".split(), *rest]


def test_what_the_launcher_was_asked_for_is_read_from_its_command_line(tmp_path):
    command = build_command("evaluate", ["--accelerate_config", "fsdp2", "--num_processes", "7", "--run", "x"])
    asked = read_launcher_request([Process(tuple(command), tmp_path)])
    assert asked is not None
    assert (asked.kind, asked.processes) == ("FSDP", 7)


def test_words_of_the_script_stay_as_they_are():
    words = ["--question", "num_processes", "--images", "a.png", "b.png", "--nf4_aware", "--x=--num_processes"]
    assert split_launch_options(words) == ({}, words)


def test_launch_options_are_the_launchers_and_no_keys_of_a_recipe():
    from accelerate.commands.launch import launch_command_parser

    taking_a_value = {action.dest for action in launch_command_parser()._actions if action.nargs != 0}
    assert set(LAUNCH_OPTIONS) <= taking_a_value - {SUPPRESS}
    assert not {*LAUNCH_OPTIONS, "accelerate_config"} & set(key_hints())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("evalute", "unknown command evalute; did you mean evaluate?"),
        ("xyz", "unknown command xyz; there are sft, evaluate, generate,"),
        ("merge --num_processes 2", "--num_processes: merge runs in one process; leave the option out"),
        ("sft --num_processes", "--num_processes needs a value"),
        ("sft --num_processes --recipe x", "--num_processes needs a value"),
        ("sft --num_processes 2 --num-processes 3", "--num_processes is given twice; keep one"),
        ("sft --accelerate_config ddpp", "accelerate_config: ddpp does not exist; name a file, or one of cpu, ddp,"),
    ],
)
def test_mistakes_are_told(words, told):
    name, *rest = words.split()
    with pytest.raises(UserError, match=f"{told}".replace("?", r"\?")):
        build_command(name, rest)


def test_a_typo_ends_with_2_and_one_line():
    finished = run_cli("evalute")
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == "error: unknown command evalute; did you mean evaluate?\n"


def test_the_command_takes_the_place_of_the_process(monkeypatch):
    started = []
    monkeypatch.setattr(cli.os, "execv", lambda path, words: started.append((path, words)))
    monkeypatch.setattr(sys, "argv", ["qwen_vl_sft", "merge", "--run", "x"])
    cli.main()
    assert started == [(sys.executable, [sys.executable, str(SCRIPTS / "merge.py"), "--run", "x"])]


@pytest.mark.parametrize("text", [format_help(), format_files()], ids=["help", "files"])
def test_what_it_prints_fits_80_columns(text):
    assert [line for line in text.splitlines()[1:] if len(line) > 80] == []


def test_help_needs_no_library():
    code = "import sys, qwen_vl_sft.cli as cli; cli.format_help(); print({'torch', 'yaml', 'numpy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_copy(tmp_path):
    assert cli.copy([str(tmp_path / "new"), "slurm"]).splitlines() == [
        str(tmp_path / "new/slurm" / name) for name in ("eval.sbatch", "sft.sbatch")
    ]
    assert "holds these files already" in cli.copy([str(tmp_path / "new"), "slurm"])
    for words in ([], ["--help"]):
        with pytest.raises(UserError, match="write copy DIR"):
            cli.copy(words)
