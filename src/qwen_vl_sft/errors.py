"""Errors a user can cause, and how a script ends on them: one message, exit code 2."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence

EXIT_USER_ERROR = 2


class UserError(ValueError):
    """One or more problems that the user can mend. Each says where, what, why and the way out."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class BadRow(UserError):
    """A row of the data that cannot be trained on; the message names the row, its source and the reason."""


class OverLongRow(BadRow):
    """A row with more tokens than `max_length`."""


def raise_all(problems: Sequence[str]) -> None:
    """Raise one `UserError` that holds every problem, or return when there is none."""
    if problems:
        raise UserError(*problems)


def format_error(error: UserError) -> str:
    """The message a person sees: a bullet for each problem when there are several."""
    if len(error.problems) == 1:
        return f"error: {_as_it_was_raised(str(error))}"
    lines = "\n".join(f"  - {problem}" for problem in error.problems)
    return f"error: {len(error.problems)} problems\n{lines}"


def _as_it_was_raised(message: str) -> str:
    """The message of an error that a data loader's worker raised: PyTorch puts the worker's traceback before it."""
    if "in DataLoader worker process" not in message:
        return message
    return message.strip().splitlines()[-1].partition(": ")[2]


def exits_with_user_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate a script's `main`: a `UserError` becomes its message on stderr and exit code 2.

    Under a launcher every rank usually meets the same error. Rank 0 speaks at once; the others wait for the launcher to
    stop them and speak only if rank 0 did not fail.
    """

    @functools.wraps(main)
    def wrapper() -> None:
        try:
            main()
        except UserError as error:
            message = format_error(error)
            if int(os.environ.get("RANK", "0")) > 0:
                time.sleep(10)
            print(message, file=sys.stderr, flush=True)
            _tell_elastic_launcher(message)
            # A hard exit: the process group of a run that ends here must not wait for its peers.
            sys.stdout.flush()
            os._exit(EXIT_USER_ERROR)

    return wrapper


def _tell_elastic_launcher(message: str) -> None:
    """Have torch's elastic launcher repeat the message in its summary, which is the last thing on the terminal."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with open(path, "w") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)
