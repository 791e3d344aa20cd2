"""The part of a model card that says how to load the model: with transformers and peft, and with vLLM."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from typing import Any

from qwen_vl_sft.publishing.publication import BUILTIN_PREFIX, Publication

# What the limits of pixels are called in a processor's `size`.
SIDES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
# Ranks for which vLLM compiles its kernels.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def python_code(publication: Publication, repo_id: str, revision: str) -> str:
    """A program that answers a question about chart.png; it needs no file of this package, unless the base is in it."""
    model, settings = ("base" if publication.is_adapter else "model"), publication.recipe.model
    quantized = publication.is_adapter and (settings.load_in_4bit or settings.load_in_8bit)
    imports = ["import torch", "from huggingface_hub import hf_hub_download"]
    imports += ["from peft import PeftModel"] if publication.is_adapter else []
    imports += ["from PIL import Image, ImageOps"]
    names = ["AutoModelForImageTextToText", "AutoProcessor", *(["BitsAndBytesConfig"] if quantized else [])]
    imports += [f"from transformers import {', '.join(names)}"]
    lines = [f"repo, revision = {json.dumps(repo_id)}, {json.dumps(revision)}"]
    lines += ["processor = AutoProcessor.from_pretrained(repo, revision=revision)"]
    name, arguments = "repo", ["revision=revision"]
    if publication.is_adapter:
        name, arguments = _base(publication, imports)
    if quantized:
        lines += [f"quantization = {_quantization(publication)}"]
        arguments += ["quantization_config=quantization"]
    dtype = (publication.merge or {}).get("dtype") or settings.dtype
    arguments += [f"dtype=torch.{dtype}", 'device_map="auto"']
    lines += [f"{model} = AutoModelForImageTextToText.from_pretrained(", f"    {name}, {', '.join(arguments)}", ")"]
    if publication.is_adapter:
        lines += ["model = PeftModel.from_pretrained(base, repo, revision=revision)"]
    lines += [*_question(bool(publication.system_message)), *_answer(publication.recipe.run.max_new_tokens)]
    return "\n".join([*imports, "", *lines])


def vllm_lines(publication: Publication, repo_id: str) -> Iterator[str]:
    """Markdown: the command that serves the model, and what is different there."""
    base = publication.base_on_hub
    limits = pixel_limits(publication)
    # As transformers 5 reads limits; the other names it has deprecated.
    size = {"size": {SIDES[name]: value for name, value in limits.items()}}
    pixels = f" --mm-processor-kwargs {shlex.quote(json.dumps(size))}" if limits else ""
    common = f"--generation-config vllm{pixels}"
    if publication.is_adapter and base is None:
        yield "vLLM loads the base from the Hub, and this one is not there; merge the adapter with `scripts/merge.py`."
        return
    yield "```sh"
    if publication.is_adapter:
        rank = next((rank for rank in _VLLM_RANKS if rank >= highest_rank(publication)), _VLLM_RANKS[-1])
        name = repo_id.rpartition("/")[2]
        revision = f" --revision {shlex.quote(publication.base_revision)}" if publication.base_revision else ""
        yield f"vllm serve {shlex.quote(str(base))}{revision} --enable-lora --max-lora-rank {rank} \\"
        yield f"    --lora-modules {shlex.quote(f'{name}={repo_id}')} \\"
    else:
        yield f"vllm serve {shlex.quote(repo_id)} \\"
    yield f"    {common}"
    yield "```"
    yield ""
    prompt = "Send the text of `system_message.txt` as the system message. " if publication.system_message else ""
    yield (
        f"{prompt}Ask with `temperature` 0, as the evaluation does, and where answers hold boxes with"
        " `skip_special_tokens` false. This command was not run when the card was made."
    )
    if publication.is_adapter:
        yield from _vllm_limits(publication)


def pixel_limits(publication: Publication) -> dict[str, int]:
    """`min_pixels` and `max_pixels` of the processor that is published. Empty when it states none."""
    for folder in (publication.folder, publication.home):
        for name in ("processor_config.json", "preprocessor_config.json"):
            if (folder / name).is_file():
                config = json.loads((folder / name).read_text(encoding="utf-8"))
                size = (config.get("image_processor") or config).get("size") or {}
                return {name: size[side] for name, side in SIDES.items() if size.get(side)}
    return {}


def highest_rank(publication: Publication) -> int:
    """The largest rank of an adapter's matrices."""
    config = publication.adapter or {}
    return max([config.get("r") or 0, *(config.get("rank_pattern") or {}).values()])


def _base(publication: Publication, imports: list[str]) -> tuple[str, list[str]]:
    """The expression that names the base model, and its arguments."""
    if str(publication.base).startswith(BUILTIN_PREFIX):
        imports.append("from qwen_vl_sft import tiny  # the base model ships with this package")
        return "tiny.MODEL_DIR", []
    revision = [f"revision={json.dumps(publication.base_revision)}"] if publication.base_revision else []
    return json.dumps(publication.base), revision


def _quantization(publication: Publication) -> str:
    settings = publication.recipe.model
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


def _answer(most_tokens: int) -> list[str]:
    return [
        "prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)",
        'image = ImageOps.exif_transpose(Image.open("chart.png")).convert("RGBA")',
        'image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")',
        'inputs = processor(text=[prompt], images=[image], return_tensors="pt").to(model.device)',
        "# The base model's own settings sample, with a repetition penalty.",
        f"output = model.generate(**inputs, max_new_tokens={most_tokens}, do_sample=False, repetition_penalty=1.0)",
        "# Boxes and references to objects are special tokens too.",
        'answer = processor.decode(output[0, inputs["input_ids"].shape[1] :])',
        'print(answer.removesuffix("<|im_end|>"))',
    ]


def _vllm_limits(publication: Publication) -> Iterator[str]:
    settings, config = publication.recipe.model, publication.adapter or {}
    merge: Any = "publish the merged model of `scripts/merge.py` for it"
    if settings.lora_scope != "language" or "visual" in json.dumps(config.get("target_modules")):
        yield ""
        yield (
            "The adapter changes the vision part too. vLLM applies LoRA to the language model alone and leaves out the"
            f" rest with a warning, unless its version has `--enable-tower-connector-lora`; otherwise {merge}."
        )
    if config.get("use_dora") or config.get("modules_to_save"):
        what = "DoRA" if config.get("use_dora") else "whole layers beside LoRA"
        yield ""
        yield f"The adapter uses {what}, which vLLM refuses; {merge}."
    if settings.load_in_4bit:
        yield ""
        yield (
            "vLLM puts the adapter on the 16-bit base, training had it in 4 bits, so answers can differ a little; a merge"
            " with `scripts/merge.py --nf4_aware` keeps the weights of training."
        )
