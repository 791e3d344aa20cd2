"""Serve a model with transformers, asked in lines of JSON (`serving/base.py` has the form)."""

import argparse
import importlib.metadata
import json
import os
import sys
import traceback

# What libraries print must not come between the lines of answers.
REPLIES = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)
PACKAGES = ("transformers", "compressed-tensors", "llmcompressor", "torch")


def reply(value):
    """Write one line."""
    REPLIES.write(json.dumps(value) + "\n")
    REPLIES.flush()


def load(start):
    """Return model and processor."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="bfloat16")
    dtype = getattr(torch, parser.parse_args(start["arguments"]).dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = AutoModelForImageTextToText.from_pretrained(
        start["model"], dtype=dtype, device_map=device, output_loading_info=True
    )
    model, loading = loaded[0], loaded[1]  # type: ignore[index]
    wrong = {kind: sorted(map(str, loading[kind])) for kind in ("missing_keys", "unexpected_keys") if loading[kind]}
    if wrong:
        raise ValueError(f"weights of the file and of the model differ: {wrong}")
    return model.eval(), AutoProcessor.from_pretrained(start["model"])


def answer(model, processor, request):
    """Return the answers to a request's prompts, one at a time and so without padding."""
    import torch
    from PIL import Image

    answers = []
    for prompt in request["prompts"]:
        images = [Image.open(name).convert("RGB") for name in prompt["images"]]
        text = processor.apply_chat_template(
            prompt["messages"], tools=prompt["tools"] or None, add_generation_prompt=True, **request["template_options"]
        )
        inputs = processor(text=[text], images=images or None, return_tensors="pt").to(model.device)
        length = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=request["max_new_tokens"], do_sample=False)[0]
        answers.append(
            {
                "number": prompt["number"],
                "text": processor.decode(tokens[length:], skip_special_tokens=True),
                "prompt_tokens": length,
                "prompt_ids": tokens[:length].tolist(),
                "answer_ids": tokens[length:].tolist(),
            }
        )
    return answers


def main():
    """Load what the first line names, then answer every further line."""
    model = processor = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if model is None:
                model, processor = load(request)
                reply({"ready": {name: importlib.metadata.version(name) for name in PACKAGES}})
            else:
                reply({"answers": answer(model, processor, request)})
        except ValueError as error:
            traceback.print_exc()
            reply({"refused": f"ValueError: {error}"})
        except Exception as error:
            traceback.print_exc()
            reply({"failed": f"{type(error).__name__}: {error}"})
            return


if __name__ == "__main__":
    main()
