"""Warn of libraries that are newer or older than the versions that the tests run with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import metadata

from packaging.version import Version

# From the first version on, below the second: the next minor release where private parts of a library are used. The
# bounds of pyproject.toml are the same.
TESTED = {
    "accelerate": ("1.15", "1.16"),
    "bitsandbytes": ("0.50.2", "0.51"),
    "deepspeed": ("0.19.8", "0.20"),
    "fla-core": ("0.6", "0.7"),
    "liger-kernel": ("0.8.5", "0.9"),
    "peft": ("0.21.2", "0.22"),
    "torch": ("2.11", "2.12"),
    "transformers": ("5.23", "5.24"),
    "trl": ("1.16", "1.17"),
}


def untested_versions(installed: Callable[[str], str] = metadata.version) -> Iterator[str]:
    """Yield a warning for each library whose installed version is not among the tested ones; optional ones may lack.

    `installed` returns the version of a package, or raises `PackageNotFoundError`.
    """
    for package, (first, end) in TESTED.items():
        try:
            found = Version(installed(package))
        except metadata.PackageNotFoundError:
            continue
        if not Version(first) <= Version(found.base_version) < Version(end):
            age = "older" if found < Version(first) else "newer"
            yield (
                f"{package} {found} is {age} than the tested {first}; if something is off, run"
                f" pip install '{package}>={first},<{end}'"
            )


def warn_of_untested_versions(rank: int) -> None:
    """Write the warnings of `untested_versions` to stderr, on the first process."""
    for warning in untested_versions() if rank == 0 else ():
        print(f"warning: {warning}", file=sys.stderr, flush=True)
