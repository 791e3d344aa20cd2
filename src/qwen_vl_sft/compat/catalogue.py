"""List all changes made to libraries, and write them as `docs/patches.md`."""

from __future__ import annotations

from collections.abc import Iterator

from qwen_vl_sft.compat import (
    applied_in_other_modules,
    experts_in_files,
    for_accelerate,
    for_bitsandbytes,
    for_deepspeed,
    for_python,
    for_torch,
    for_trainer,
    for_transformers,
    for_trl,
    packed_batches,
    quantized_experts,
    vision_tower,
)
from qwen_vl_sft.compat.registry import Patch

_MODULES = (
    for_transformers,
    for_trl,
    for_accelerate,
    for_torch,
    for_bitsandbytes,
    for_deepspeed,
    for_python,
    packed_batches,
    vision_tower,
    experts_in_files,
    quantized_experts,
    applied_in_other_modules,
    for_trainer,
)
_TITLES = {
    "workaround": (
        "Faults and missing options",
        "Each can be removed once its check shows that the library no longer needs it.",
    ),
    "extension": ("Extensions", "Features that training needs and the libraries lack."),
    "override": (
        "Overridden private methods of the Trainer",
        "A release may rename or drop them, so a test checks that each exists and accepts the arguments passed to it.",
    ),
}
_HEAD = """# Changes made to libraries

Training works around faults of its libraries and adds to them. Each change is one entry in
`src/qwen_vl_sft/compat/`, with a check that shows the fault on the installed library; `tests/unit/test_compat.py` runs
all checks and fails once a library has fixed one. This page is made from the entries:

    python -m qwen_vl_sft.compat > docs/patches.md

[extending.md](extending.md#a-change-to-a-library) says how to add one."""


def all_patches() -> list[Patch]:
    """Return all entries, by module."""
    return [patch for module in _MODULES for patch in module.PATCHES]


def patches_page() -> str:
    """Return the text of `docs/patches.md`."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield f"{_HEAD}\n"
    patches = all_patches()
    for kind, (title, text) in _TITLES.items():
        yield f"## {title}\n\n{text}\n"
        yield "| change | library | without it | applied by | check | links |\n| --- | --- | --- | --- | --- | --- |"
        for patch in patches:
            if patch.kind == kind:
                yield f"| {' | '.join(_cells(patch))} |"
        yield ""


def _cells(patch: Patch) -> Iterator[str]:
    yield f"`{patch.name}`" if patch.kind == "override" else patch.name.replace("_", " ")
    yield f"{patch.package} {patch.broken}".replace("<", "&lt;").strip()
    yield patch.without.replace("|", "\\|")
    yield f"`{patch.applied_by}`"
    yield _check(patch)
    yield ", ".join(f"[{_label(link)}]({link})" for link in patch.links)


def _check(patch: Patch) -> str:
    if patch.still_needed is None:
        return "names and parameters"
    if patch.needs == "cuda":
        return "on a GPU"
    if patch.needs == "avx512":
        return "on a CPU with AVX-512"
    return f"where {patch.needs} is installed" if patch.needs else "yes"


def _label(link: str) -> str:
    parts = link.removeprefix("https://github.com/").split("/")
    return f"{parts[1]}#{parts[3]}" if len(parts) == 4 and parts[3].isdigit() else parts[-1]
