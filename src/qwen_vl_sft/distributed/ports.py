"""Choose TCP ports for processes that are about to start."""

from __future__ import annotations

import random
import socket
from collections.abc import Sequence

# Linux gives ports from 32768 on to every socket that asks for any (net.ipv4.ip_local_port_range): one of those may be
# taken between the choice and the start of the process that it was chosen for, one below only by somebody who names it.
UNASSIGNED = range(10_000, 32_768)


def free_port(among: Sequence[int] = UNASSIGNED) -> int:
    """Return a port of `among` that nothing on this machine uses, chosen at random.

    Raises `OSError` when none of them is free.
    """
    for port in random.SystemRandom().sample(among, len(among)):
        with socket.socket() as tried:
            # As servers do: connections of a former one that are still closing do not count.
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError("no port is free on this machine")
