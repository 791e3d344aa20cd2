"""Serve a model with vLLM, asked in lines of JSON (`serving/base.py` has the form). Run it with vLLM's own Python."""

import functools
import json
import os
from typing import Any

from worker_protocol import chat_messages, serve

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# The engine in this process: what it raises arrives here.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
PACKAGES = ("vllm-cpu", "vllm", "torch", "transformers", "compressed-tensors")


def in_one_line(error):
    """Return an exception's type and message in one line, those of its first cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def load(start):
    """Return what answers with the engine, and with its adapter where it has one."""
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.lora.request import LoRARequest
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # The parser of `vllm serve`, so that a command's own options are read as there.
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", start["model"], *start["arguments"]])
    engine = LLM.from_engine_args(EngineArgs.from_cli_args(parsed))
    if start["adapter"] is None:
        return functools.partial(answer, engine, None)
    adapter = LoRARequest("tuned", 1, start["adapter"])
    # Within a request a refusal would end the engine.
    engine.llm_engine.add_lora(adapter)
    return functools.partial(answer, engine, adapter)


def image_part(file):
    """Return an image as vLLM takes it."""
    from PIL import Image

    with Image.open(file) as image:
        return {"type": "image_pil", "image_pil": image.convert("RGB")}


def answer(engine, adapter, request):
    """Return the answers to a request's prompts."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=request["max_new_tokens"], skip_special_tokens=False)
    answers = []
    # Prompts with the same tools in one call.
    groups: dict[str, list[dict[str, Any]]] = {}
    for prompt in request["prompts"]:
        groups.setdefault(json.dumps(prompt["tools"]), []).append(prompt)
    for prompts in groups.values():
        outputs = engine.chat(
            [chat_messages(prompt, image_part) for prompt in prompts],
            sampling,
            use_tqdm=False,
            lora_request=adapter if request["with_adapter"] else None,
            tools=prompts[0]["tools"] or None,
            chat_template_kwargs=request["template_options"] or None,
        )
        for prompt, output in zip(prompts, outputs, strict=True):
            answers.append(
                {
                    "number": prompt["number"],
                    "text": output.outputs[0].text,
                    "prompt_tokens": len(output.prompt_token_ids),
                    "prompt_ids": list(output.prompt_token_ids),
                    "answer_ids": list(output.outputs[0].token_ids),
                }
            )
    return answers


if __name__ == "__main__":
    serve(PACKAGES, load, describe=in_one_line)
