"""Serve a model with transformers, asked in lines of JSON (`serving/base.py` has the form)."""

import argparse
import functools

from worker_protocol import serve

PACKAGES = ("transformers", "peft", "compressed-tensors", "llmcompressor", "torch")


def load(start):
    """Return what answers with model and processor."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--shortest_edge", type=int)
    parser.add_argument("--longest_edge", type=int)
    asked = parser.parse_args(start["arguments"])
    dtype = getattr(torch, asked.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = AutoModelForImageTextToText.from_pretrained(
        start["model"], dtype=dtype, device_map=device, output_loading_info=True
    )
    model, loading = loaded[0], loaded[1]  # type: ignore[index]
    wrong = {kind: sorted(map(str, loading[kind])) for kind in ("missing_keys", "unexpected_keys") if loading[kind]}
    if wrong:
        raise ValueError(f"weights of the file and of the model differ: {wrong}")
    if start["adapter"] is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, start["adapter"])
    processor = AutoProcessor.from_pretrained(start["model"])
    limits = {"shortest_edge": asked.shortest_edge, "longest_edge": asked.longest_edge}
    if limits := {name: pixels for name, pixels in limits.items() if pixels is not None}:
        processor.image_processor.size = limits
    return functools.partial(answer, model.eval(), processor)


def answer(model, processor, request):
    """Return the answers to a request's prompts, one at a time and so without padding."""
    import contextlib

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
        without = hasattr(model, "disable_adapter") and not request["with_adapter"]
        with torch.inference_mode(), model.disable_adapter() if without else contextlib.nullcontext():
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


if __name__ == "__main__":
    serve(PACKAGES, load)
