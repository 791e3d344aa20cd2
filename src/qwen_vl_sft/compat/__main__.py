"""Print `docs/patches.md`."""

from qwen_vl_sft.compat.catalogue import patches_page

print(patches_page(), end="")
