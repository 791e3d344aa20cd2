"""A process of its own that publishes and loads through the real client, many times over: the imports cost seconds.

Reads a line of JSON for each call, `{"script", "words", "env"}` or `{"code", "folder", "env"}`, and answers with a line
of JSON: the exit code and what was printed.
"""

import contextlib
import importlib.util
import io
import json
import os
import sys
import traceback
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


class Left(BaseException):
    """Stands for the hard exit of a script."""


def leave(code):
    raise Left(code)


def run_script(script, words):
    spec = importlib.util.spec_from_file_location("script", REPOSITORY / script)
    module = importlib.util.module_from_spec(spec)
    sys.argv = [script, *words]
    spec.loader.exec_module(module)
    module.main()


def call(asked):
    os.environ.update(asked["env"])
    for name in [name for name, value in asked["env"].items() if not value]:
        del os.environ[name]
    os.chdir(asked.get("folder") or REPOSITORY)
    if "code" in asked:
        exec(compile(asked["code"], "code", "exec"), {})
    else:
        run_script(asked["script"], asked["words"])


def main():
    answers = os.fdopen(os.dup(1), "w")
    os._exit = leave
    for line in sys.stdin:
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                call(json.loads(line))
            except (Left, SystemExit) as error:
                code = error.args[0]
            except Exception:
                traceback.print_exc()
                code = 1
        print(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}), file=answers, flush=True)


if __name__ == "__main__":
    main()
