"""Fine-tune Qwen-VL vision-language models with TRL on one GPU or many."""

from importlib import metadata

try:
    __version__ = metadata.version("qwen_vl_sft")
except metadata.PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+source"
