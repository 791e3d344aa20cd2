"""transformers 4, as tools hold that are not on version 5 yet."""

from __future__ import annotations

from dataclasses import replace

from qwen_vl_sft.serving.engines import transformers

ENGINE = replace(transformers.ENGINE, name="transformers-4", title="transformers 4", requirements="transformers_4.txt")
