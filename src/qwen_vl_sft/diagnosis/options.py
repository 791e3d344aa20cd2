"""Command-line options of doctor.py."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_vl_sft.config.command_line import option


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Command-line options of doctor.py."""

    runs: bool = option(True, "try what training needs in small runs; false takes a second")
    json: bool = option(False, "print JSON")
