"""An embedded Qwen2-VL of about a million parameters and small sets of drawn charts: everything runs without a network.

All are made by `scripts/make_tiny.py`; `MODEL_DIR` loads with `from_pretrained`, `DATA_DIR` (questions about charts) and
`BOXES_DIR` (boxes of bars) with `load_dataset`.
"""

import re
from pathlib import Path

ASSETS_DIR = Path(__file__).parent / "assets"
MODEL_DIR = ASSETS_DIR / "model"
DATA_DIR = ASSETS_DIR / "data"
BOXES_DIR = ASSETS_DIR / "boxes"
# How recipes name them.
BUILTIN = {"builtin:tiny-qwen2-vl": MODEL_DIR, "builtin:tiny-charts": DATA_DIR, "builtin:tiny-boxes": BOXES_DIR}
# Where they lie in any installation of this package: a run may have been made by another one.
ANYWHERE = {
    name: re.compile(rf"(?:~|/[^\n'\"\[\],]*)/qwen_vl_sft/tiny/assets/{folder.name}(?=$|[\s'\"\[\],])")
    for name, folder in BUILTIN.items()
}


def builtin_name(path: str) -> str | None:
    """Return `builtin:NAME` for the folder of the embedded model or charts, of this or another installation, else None."""
    return next((name for name, pattern in ANYWHERE.items() if pattern.fullmatch(path)), None)
