"""The system messages the tiny model is pretrained under, and the style of answer that each one asks for."""

from qwen_vl_sft.data.formats.chartqa import CHARTQA_SYSTEM_MESSAGE as CHARTQA

__all__ = ["BRIEF", "CHARTQA", "DEFAULT", "VERBOSE"]

DEFAULT = "You are a helpful assistant."  # what the chat template inserts when there is no system message

BRIEF = (
    "Answer with a single word, number, or short phrase.",
    "Be concise.",
    "You are a helpful assistant. Give short answers.",
    "Analyze the chart image and respond with concise answers. Avoid additional explanation.",
)
VERBOSE = ("Answer in full sentences.", "You are a helpful assistant. Explain what the chart shows in a full sentence.")
