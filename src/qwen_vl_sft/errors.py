"""Errors a user can cause, and how a script ends on them: one message, exit code 2."""

from __future__ import annotations

import atexit
import errno
import functools
import json
import multiprocessing
import os
import re
import select
import sys
import time
import traceback
from collections.abc import Callable, Sequence

EXIT_USER_ERROR = 2
# By Ctrl-C, as shells say it: 128 and the number of the signal.
EXIT_INTERRUPTED = 130
# EX_TEMPFAIL of sysexits.h: stopped from outside with its state saved; the same command with `latest` goes on.
EXIT_PREEMPTED = 75
# A message holds no more of a value that somebody wrote, which may be a whole document.
MOST_QUOTED = 200
_LONG_WORD = re.compile(rf"\S{{{MOST_QUOTED + 1},}}")
# A process that may have failed because another one has gone waits so long.
_PEER_SECONDS = 5


class UserError(ValueError):
    """One or more problems that the user can solve. Each says where, what, why and the way out.

    A word of more than `MOST_QUOTED` characters, which no message has of itself, is shortened.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(_LONG_WORD.sub(lambda word: shortened(word[0]), problem) for problem in problems)
        super().__init__("\n".join(self.problems))


def first_line(error: BaseException) -> str:
    """Return an error's message in one line, or its type when the message is empty."""
    lines = str(error).strip().splitlines()
    return shortened(lines[0]) if lines else type(error).__name__


def quoted(value: object) -> str:
    """Return a value of the user's as a message quotes it, shortened to `MOST_QUOTED` characters."""
    return shortened(repr(value))


def shortened(text: str) -> str:
    """Return a text, or its beginning and its length where it has more than `MOST_QUOTED` characters."""
    if len(text) <= MOST_QUOTED:
        return text
    note = f"... ({len(text):,} characters)"
    return text[: MOST_QUOTED - len(note)] + note


class BadRow(UserError):
    """A row of the data that cannot be trained on; the message names the row, its source and the reason."""


class OverLongRow(BadRow):
    """A row with more tokens than `max_length`."""


class Preempted(Exception):
    """The run was asked to stop, and has saved; the message says how to resume."""


def raise_all(problems: Sequence[str]) -> None:
    """Raise one `UserError` that holds every problem, or return when there is none."""
    if problems:
        raise UserError(*problems)


def format_error(error: UserError) -> str:
    """Return the message a person sees, with a bullet for each problem when there are several."""
    if len(error.problems) == 1:
        return f"error: {_as_it_was_raised(str(error))}"
    lines = "\n".join(f"  - {problem}" for problem in error.problems)
    return f"error: {len(error.problems)} problems\n{lines}"


def _as_it_was_raised(message: str) -> str:
    """Return the message of an error from a data loader's worker, without the worker's traceback that PyTorch prepends."""
    if "in DataLoader worker process" not in message:
        return message
    return message.strip().splitlines()[-1].partition(": ")[2]


def exits_with_user_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate a script's `main`: a `UserError` becomes its message on stderr and exit code 2, `Preempted` code 75.

    Under a launcher every rank usually meets the same error. Rank 0 speaks at once; the others wait for the launcher to
    stop them and speak only if rank 0 did not fail. There a bug ends its process with its traceback, at once; what may
    be the loss of another process a little later, so that the other's message comes first.
    """

    @functools.wraps(main)
    def wrapper() -> None:
        try:
            main()
        except UserError as error:
            message = format_error(error)
            if int(os.environ.get("RANK", "0")) > 0:
                time.sleep(10)
            leave(EXIT_USER_ERROR, message)
        except Preempted as stop:
            leave(EXIT_PREEMPTED, str(stop), show=int(os.environ.get("RANK", "0")) == 0)
        except (SystemExit, KeyboardInterrupt):
            _forget_closed_output()
            raise
        except BaseException as error:  # torch.distributed.checkpoint's own is no `Exception`
            if isinstance(error, BrokenPipeError) and _forget_closed_output():
                raise SystemExit(1) from None
            if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
                # Asking whether a file exists raises it too; each such name was written by the user.
                leave(
                    EXIT_USER_ERROR,
                    f"error: {quoted(str(error.filename))} is too long to be the name of a file; shorten it",
                )
            if int(os.environ.get("WORLD_SIZE", "1")) == 1:
                raise
            message = traceback.format_exc()
            if _may_be_loss_of_peer(error):
                time.sleep(_PEER_SECONDS)
                message += (
                    f"process {os.environ.get('RANK')}: a collective failed, mostly because another process has ended,"
                    f" whose message then says why: {first_line(error)}"
                )
            leave(1, message)
        _forget_closed_output()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            _leave_finished()

    return wrapper


def _forget_closed_output() -> bool:
    """Return whether whoever read the standard output has gone, such as `head`; what is still to be written is dropped.

    Python would write it when it ends, and tell of that with a traceback.
    """
    try:
        output = select.poll()
        output.register(sys.stdout, 0)
        closed = any(event & select.POLLERR for _, event in output.poll(0))
        if closed:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # a notebook's output is no file
        return False
    return closed


def _leave_finished() -> None:
    """End one of several processes that has finished its work, with Python's exit handlers and nothing after them.

    Then the libraries' own threads are taken down; one that still runs aborts the process, and with it a run that is
    finished ("terminate called without an active exception", seen on a busy machine).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def leave(code: int, message: str, show: bool = True) -> None:
    """End this process at once, with its message, and the workers of its data loaders with it."""
    if show:
        print(message, file=sys.stderr, flush=True)
    _tell_elastic_launcher(message)
    # Workers of data loaders would notice seconds later.
    for child in multiprocessing.active_children():
        child.kill()
    # A hard exit: the process group of a run that ends here must not wait for its peers.
    sys.stdout.flush()
    os._exit(code)


def _may_be_loss_of_peer(error: BaseException) -> bool:
    """Return whether a collective failed because another process of the group is gone, or none can be set up."""
    text = f"{type(error).__name__} {error}"
    return any(word in text for word in ("gloo", "DistBackendError", "DistNetworkError", "NCCL", "TCPStore"))


def _tell_elastic_launcher(message: str) -> None:
    """Make torch's elastic launcher repeat the message in its summary, which is the last thing on the terminal."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with open(path, "w") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)
