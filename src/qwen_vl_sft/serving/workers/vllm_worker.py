"""Serve a model with vLLM, asked in lines of JSON (`serving/base.py` has the form). Run it with vLLM's own Python."""

import importlib.metadata
import json
import os
import sys
import traceback
from typing import Any

# What libraries print must not come between the lines of answers.
REPLIES = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# The engine in this process: what it raises arrives here.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
PACKAGES = ("vllm-cpu", "vllm", "torch", "transformers", "compressed-tensors")


def reply(value):
    """Write one line."""
    REPLIES.write(json.dumps(value) + "\n")
    REPLIES.flush()


def versions():
    """Return the versions of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def in_one_line(error):
    """Return an exception's type and message in one line, those of its first cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def load(start):
    """Return the engine and the request of its adapter, None without one."""
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.lora.request import LoRARequest
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # The parser of `vllm serve`, so that a command's own options are read as there.
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", start["model"], *start["arguments"]])
    engine = LLM.from_engine_args(EngineArgs.from_cli_args(parsed))
    if start["adapter"] is None:
        return engine, None
    adapter = LoRARequest("tuned", 1, start["adapter"])
    # Within a request a refusal would end the engine.
    engine.llm_engine.add_lora(adapter)
    return engine, adapter


def messages_of(prompt):
    """Return the messages with the images in their places, as the chat endpoint takes them."""
    from PIL import Image

    images = iter(prompt["images"])
    messages = []
    for message in prompt["messages"]:
        parts = []
        for part in message["content"]:
            if part["type"] == "image":
                with Image.open(next(images)) as image:
                    parts.append({"type": "image_pil", "image_pil": image.convert("RGB")})
            else:
                parts.append(part)
        texts = [part["text"] for part in message["content"] if part["type"] == "text"]
        # Roles other than the user's are sent as plain text, as clients do.
        content = "".join(texts) if message["role"] != "user" else parts
        messages.append({**message, "content": content})
    return messages


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
            [messages_of(prompt) for prompt in prompts],
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


def main():
    """Load what the first line names, then answer every further line."""
    engine = adapter = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if engine is None:
                engine, adapter = load(request)
                reply({"ready": versions()})
            else:
                reply({"answers": answer(engine, adapter, request)})
        except ValueError as error:
            traceback.print_exc()
            reply({"refused": in_one_line(error)})
        except Exception as error:
            traceback.print_exc()
            reply({"failed": in_one_line(error)})
            return


if __name__ == "__main__":
    main()
