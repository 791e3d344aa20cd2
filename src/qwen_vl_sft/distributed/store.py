"""Connect to the key-value store of the launcher, through which processes exchange what no collective can carry."""

from __future__ import annotations

import os
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore

_SECONDS_TO_CONNECT = 10


def connect(subject: str) -> PrefixStore:
    """Return the launcher's store for one subject, over a separate connection: another thread may wait in the group's.

    Raises `KeyError` where this process has no launcher, and `RuntimeError` where its store does not answer.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_SECONDS_TO_CONNECT))
    # The launcher keeps its store when it starts the processes again.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"qwen_vl_sft/{subject}/{attempt}", store)
