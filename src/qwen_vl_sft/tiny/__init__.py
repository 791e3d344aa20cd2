"""An embedded Qwen2-VL of about a million parameters and a small chart data set: everything runs without a network.

Both are made by `scripts/make_tiny.py`; `MODEL_DIR` loads with `from_pretrained`, `DATA_DIR` with `load_dataset`.
"""

from pathlib import Path

ASSETS_DIR = Path(__file__).parent / "assets"
MODEL_DIR = ASSETS_DIR / "model"
DATA_DIR = ASSETS_DIR / "data"
