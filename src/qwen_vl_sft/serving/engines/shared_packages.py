"""Environments that add a few packages to those of training, and so need no PyTorch of their own."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from qwen_vl_sft.atomic_write import atomic_write


def share_training_packages(packages: Path) -> None:
    """Let an environment, of which `packages` is the folder of packages, find those of training after its own.

    Each use writes it: the environment of training may have moved since this one was made.
    """
    atomic_write(packages / "training.pth", sysconfig.get_path("purelib") + "\n")
