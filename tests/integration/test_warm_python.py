"""Processes that are forked from a server behave as new ones do; those that cannot are new ones."""

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

from fixtures.processes import Popen, run_process
from fixtures.repository import REPOSITORY
from fixtures.warm_python import server_for

# Says what a process sees of itself, then does what it is told.
PROGRAM = """
import atexit, json, os, signal, subprocess, sys, time
forked = "numpy" in sys.modules
seen = {"argv": sys.argv, "folder": os.getcwd(), "own": os.environ.get("OWN"), "name": __name__, "forked": forked}
seen |= {"path": sys.path[0], "parent": os.getppid(), "session": os.getsid(0) == os.getpid(), "file": __file__}
print(json.dumps(seen), flush=True)
atexit.register(print, "registered")
exec(sys.argv[1])
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def test_it_is_the_process_that_was_asked_for(script, tmp_path):
    done = run_process(script, "print('said', file=sys.stderr)", "a b", env={"OWN": "1"})
    assert (done.returncode, done.stderr) == (0, "said\n")
    seen, registered = done.stdout.splitlines()
    assert registered == "registered"
    assert json.loads(seen) == {
        "argv": [str(script), "print('said', file=sys.stderr)", "a b"],
        "folder": str(REPOSITORY),
        "own": "1",
        "name": "__main__",
        "forked": True,
        "path": str(tmp_path),
        "parent": os.getpid(),
        "session": False,
        "file": str(script),
    }


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("sys.exit(3)", 3, ""),
        ("sys.exit('wrong')", 1, "wrong\n"),
        ("os._exit(7)", 7, ""),
        ("1 / 0", 1, 'Traceback (most recent call last):\n  File "{script}", line'),
        ("signal.raise_signal(signal.SIGTERM)", -signal.SIGTERM, ""),
        ("raise KeyboardInterrupt", -signal.SIGINT, "Traceback"),
    ],
)
def test_its_end_is_that_of_a_new_process(code, status, said, script, tmp_path):
    done = run_process(script, code)
    real = subprocess.run([sys.executable, script, code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (real.returncode, real.stderr)
    assert done.returncode == status
    assert done.stderr.startswith(said.format(script=script))
    assert ("registered" in done.stdout) == ("registered" in real.stdout)


def test_a_process_that_it_starts_is_forked_and_its_own_child(script):
    words = ["-u", str(script), "sys.exit(5)"]
    done = run_process(script, f"sys.exit(subprocess.call([sys.executable, *{words}], start_new_session=True))")
    assert done.returncode == 5, done.stderr
    outer, seen = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert (outer["session"], seen["session"]) == (False, True)
    assert seen["forked"]
    assert seen["parent"] not in (os.getpid(), outer["parent"])


def test_a_command_is_forked_where_that_is_asked_for_and_chooses_what_is_forked_from_it(monkeypatch):
    """As a worker of pytest-xdist, whose tests start real processes too."""
    code = """
import subprocess, sys
from fixtures.warm_python import WarmPopen
print(sys.argv, repr(sys.path[0]), "numpy" in sys.modules, len(WarmPopen.servers), flush=True)
print(subprocess.Popen._execute_child is WarmPopen._execute_child)
"""
    command = [sys.executable, "-u", "-c", code, "a b"]
    assert run_process(*command[1:]).stdout == "", "a command is a new process, which knows no `fixtures`"
    monkeypatch.setattr(server_for({**os.environ, "OMP_NUM_THREADS": "1"}), "commands", True)
    assert run_process(*command[1:]).stdout == "['-c', 'a b'] '' True 1\nFalse\n"


def test_it_imports_the_copy_of_the_package_that_a_new_process_would(script, tmp_path):
    code = "import qwen_vl_sft.config; print(qwen_vl_sft.__file__); print(qwen_vl_sft.config.__file__)"
    own, other = REPOSITORY / "src/qwen_vl_sft", tmp_path / "other/qwen_vl_sft"
    (other / "config").mkdir(parents=True)
    for folder in (other, other / "config"):
        (folder / "__init__.py").touch()
    for package in (own, other):
        done = run_process(script, code, env={"PYTHONPATH": str(package.parent)})
        assert json.loads(done.stdout.splitlines()[0])["forked"]
        assert done.stdout.splitlines()[1:3] == [f"{package}/__init__.py", f"{package}/config/__init__.py"]


def test_others_see_its_command_line_and_signals_reach_it(script):
    command = [sys.executable, str(script), "while True: time.sleep(0.01)", "with a space"]
    with Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert json.loads(process.stdout.readline())["forked"]
        shown = psutil.Process(process.pid)
        assert [word for word in shown.cmdline() if word] == command
        assert shown.ppid() == os.getpid()
        process.send_signal(signal.SIGINT)
        process.stdout.read()
    assert process.returncode == -signal.SIGINT


def test_what_libraries_read_when_they_are_imported_asks_for_a_new_process(script):
    for env, forked in [({"HF_ENDPOINT": "http://127.0.0.1:9"}, False), ({"OMP_NUM_THREADS": "2"}, False), ({}, True)]:
        done = run_process(script, "", env=env)
        assert json.loads(done.stdout.splitlines()[0])["forked"] == forked
