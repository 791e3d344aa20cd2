"""Environments that add a few packages to those of training, and so need no PyTorch of their own."""

from __future__ import annotations

import sysconfig
from pathlib import Path


def share_training_packages(packages: Path) -> None:
    """Let an environment, of which `packages` is the folder of packages, find those of training after its own."""
    (packages / "training.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
