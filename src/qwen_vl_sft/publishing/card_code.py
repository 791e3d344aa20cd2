"""The card's Python code: it loads the model as it was trained, and asks it a question."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from qwen_vl_sft.publishing.names import BUILTIN_PREFIX
from qwen_vl_sft.publishing.published_model import PublishedModel

if TYPE_CHECKING:
    pass


def python_code(published: PublishedModel, repo_id: str, revision: str) -> str:
    """Return a program that answers a question about chart.png; it needs this package only for a base that ships with it."""
    model, settings = ("base" if published.is_adapter else "model"), published.recipe.model
    quantized = published.is_adapter and (settings.load_in_4bit or settings.load_in_8bit)
    imports = ["import torch", "from huggingface_hub import hf_hub_download"]
    imports += ["from peft import PeftModel"] if published.is_adapter else []
    imports += ["from PIL import Image, ImageOps"]
    names = ["AutoModelForImageTextToText", "AutoProcessor", *(["BitsAndBytesConfig"] if quantized else [])]
    imports += [f"from transformers import {', '.join(names)}"]
    lines = [f"repo, revision = {json.dumps(repo_id)}, {json.dumps(revision)}"]
    lines += ["processor = AutoProcessor.from_pretrained(repo, revision=revision)"]
    name, arguments = "repo", ["revision=revision"]
    if published.is_adapter:
        name, arguments = _base(published, imports)
    if quantized:
        lines += [f"quantization = {_quantization(published)}"]
        arguments += ["quantization_config=quantization"]
    dtype = (published.merge or {}).get("dtype") or settings.dtype
    arguments += [f"dtype=torch.{dtype}", 'device_map="auto"']
    lines += [f"{model} = AutoModelForImageTextToText.from_pretrained(", f"    {name}, {', '.join(arguments)}", ")"]
    if published.is_adapter:
        lines += ["model = PeftModel.from_pretrained(base, repo, revision=revision)"]
    lines += [*_question(bool(published.system_message)), *_answer(published)]
    return "\n".join([*imports, "", *lines])


def _base(published: PublishedModel, imports: list[str]) -> tuple[str, list[str]]:
    """Return the expression that names the base model, and its arguments."""
    if str(published.base).startswith(BUILTIN_PREFIX):
        imports.append("from qwen_vl_sft import tiny  # the base model ships with this package")
        return "tiny.MODEL_DIR", []
    revision = [f"revision={json.dumps(published.base_revision)}"] if published.base_revision else []
    return json.dumps(published.base), revision


def _quantization(published: PublishedModel) -> str:
    settings = published.recipe.model
    if settings.load_in_8bit:
        return "BitsAndBytesConfig(load_in_8bit=True)"
    return (
        f"BitsAndBytesConfig(\n    load_in_4bit=True, bnb_4bit_quant_type={json.dumps(settings.bnb_4bit_quant_type)},"
        f" bnb_4bit_compute_dtype=torch.{settings.dtype},\n"
        f"    bnb_4bit_use_double_quant={settings.use_bnb_nested_quant},\n)"
    )


def _question(has_system_message: bool) -> list[str]:
    system = [
        'with open(hf_hub_download(repo, "system_message.txt", revision=revision), encoding="utf-8") as file:',
        "    system_message = file.read()",
    ]
    turns = ['    {"role": "system", "content": [{"type": "text", "text": system_message}]},']
    return [
        *(system if has_system_message else []),
        "",
        'question = "What is the highest value?"',
        "messages = [",
        *(turns if has_system_message else []),
        '    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},',
        "]",
    ]


def _answer(published: PublishedModel) -> list[str]:
    most, options = (
        published.recipe.run.max_new_tokens,
        [f"    {name}={value}," for name, value in published.template_options.items()],
    )
    prompt = ["prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)"]
    if options:
        prompt = [
            "prompt = processor.apply_chat_template(",
            "    messages, tokenize=False, add_generation_prompt=True,",
        ]
        prompt += [*options, ")"]
    return [
        *prompt,
        'image = ImageOps.exif_transpose(Image.open("chart.png")).convert("RGBA")',
        'image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")',
        'inputs = processor(text=[prompt], images=[image], return_tensors="pt").to(model.device)',
        "# The base model's own settings sample, with a repetition penalty.",
        f"output = model.generate(**inputs, max_new_tokens={most}, do_sample=False, repetition_penalty=1.0)",
        "# Boxes and references to objects are special tokens too.",
        'answer = processor.decode(output[0, inputs["input_ids"].shape[1] :])',
        'print(answer.removesuffix("<|im_end|>"))',
    ]
