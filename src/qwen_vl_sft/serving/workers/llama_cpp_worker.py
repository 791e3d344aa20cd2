"""Serve a GGUF model with llama.cpp, asked in lines of JSON (`serving/base.py` has the form). Run it with its own Python."""

import argparse
import base64
import functools
import json
import os

from worker_protocol import chat_messages, serve


def load(start):
    """Return what answers with the model in a folder."""
    from xllamacpp import CommonAdapterLoraInfo, CommonParams, Server, ggml_type, llama_flash_attn_type

    parser = argparse.ArgumentParser()
    parser.add_argument("--ctx-size", type=int, default=4096)
    parser.add_argument("--cache-type-k", default="f16")
    parser.add_argument("--cache-type-v", default="f16")
    parser.add_argument("--flash-attn", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--image-min-tokens", type=int)
    parser.add_argument("--image-max-tokens", type=int)
    asked = parser.parse_args(start["arguments"])
    params = CommonParams()
    params.model.path = os.path.join(start["model"], "model.gguf")
    params.mmproj.path = os.path.join(start["model"], "mmproj.gguf")
    params.n_ctx, params.n_parallel, params.use_jinja = asked.ctx_size, 1, True
    params.cache_type_k = getattr(ggml_type, f"GGML_TYPE_{asked.cache_type_k.upper()}")
    params.cache_type_v = getattr(ggml_type, f"GGML_TYPE_{asked.cache_type_v.upper()}")
    kind = {"auto": "AUTO", "on": "ENABLED", "off": "DISABLED"}[asked.flash_attn]
    params.flash_attn_type = getattr(llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{kind}")
    if start["adapter"] is not None:
        params.lora_adapters = [CommonAdapterLoraInfo(start["adapter"], 1.0)]
    if asked.image_min_tokens is not None:
        params.image_min_tokens = asked.image_min_tokens
    if asked.image_max_tokens is not None:
        params.image_max_tokens = asked.image_max_tokens
    return functools.partial(answer, Server(params), start["adapter"] is not None)


def image_part(file):
    """Return an image as PNG in a data URL."""
    with open(file, "rb") as content:
        url = "data:image/png;base64," + base64.b64encode(content.read()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def answer(server, has_adapter, request):
    """Return the answers to a request's prompts."""
    answers = []
    for prompt in request["prompts"]:
        asked = {
            "messages": chat_messages(prompt, image_part),
            "max_tokens": request["max_new_tokens"],
            "temperature": 0,
            "top_k": 1,
            "cache_prompt": False,
            # With them come the tokens.
            "logprobs": True,
            "top_logprobs": 1,
        }
        if has_adapter:
            asked["lora"] = [{"id": 0, "scale": float(request["with_adapter"])}]
        if request["template_options"]:
            asked["chat_template_kwargs"] = request["template_options"]
        found = server.handle_chat_completions(asked)
        if "choices" not in found:
            raise ValueError(json.dumps(found))
        [choice] = found["choices"]
        # None of an empty answer.
        told = choice.get("logprobs") or {"content": []}
        ids = [token["id"] for token in told["content"]]
        answers.append(
            {
                "number": prompt["number"],
                "text": choice["message"]["content"] or "",
                "prompt_tokens": found["usage"]["prompt_tokens"],
                "answer_ids": ids,
                "whole_characters": True,
            }
        )
    return answers


if __name__ == "__main__":
    serve(["xllamacpp"], load)
