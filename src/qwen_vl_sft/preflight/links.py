"""Find the network adapters that NCCL should use: those of the fastest active ports, where a node has slower ones too."""

from __future__ import annotations

import re
from pathlib import Path

SYSTEM = Path("/sys/class/infiniband")


def adapters(system: Path = SYSTEM) -> str | None:
    """Return a value of NCCL_IB_HCA that names exactly the ports worth using; None where NCCL should choose.

    NCCL takes all active ports by itself. It is told which where some are slower or are Ethernet beside InfiniBand, as
    those of a storage or management network are: with these among them, all run at their speed.
    https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html#nccl-ib-hca
    """
    ports: dict[str, tuple[bool, float]] = {}
    for port in sorted(system.glob("*/ports/*")):
        if "ACTIVE" in _read(port / "state"):
            rate = re.match(r"[\d.]+", _read(port / "rate"))
            infiniband = _read(port / "link_layer") == "InfiniBand"
            ports[f"{port.parent.parent.name}:{port.name}"] = (infiniband, float(rate[0]) if rate else 0.0)
    best = max(ports.values(), default=None)
    chosen = [name for name, kind in ports.items() if kind == best]
    return "=" + ",".join(chosen) if len(chosen) < len(ports) else None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
