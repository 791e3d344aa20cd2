#!/usr/bin/env bash
# transformers 5.23.0: `weight_decay` of the Trainer shrinks norms of some models. It means to leave norms and biases alone,
# and finds them by type (`nn.LayerNorm`) and by name ("bias", "layernorm", "rmsnorm", "norm" or "..._norm" between dots).
# In Qwen2.5-VL's vision tower the norms are RMSNorms of its own class and are called norm1, norm2 and ln_q: all 65 of them
# in a released model are shrunk. In Qwen3.5 it is `A_log`, by which each head of linear attention forgets; `dt_bias` beside
# it is spared for its name. Qwen2-VL and Qwen3-VL are not touched: their norm1 is an nn.LayerNorm.
#
# Guess before it was run: norms are spared in all families of Qwen-VL, as the Trainer's docstring says
# (https://github.com/huggingface/transformers/pull/35927 added the names for it), and what a state forgets by is too.
#
# Seen (Python 3.11, Linux, transformers 5.23.0, torch 2.11.0, no GPU). Ten steps with a loss of zero, so that the decay alone
# moves weights; vectors that moved:
#   qwen2_vl     none
#   qwen2_5_vl   blocks.N.norm1.weight blocks.N.norm2.weight merger.ln_q.weight, from 1.0000 to 0.9044
#   qwen3_vl     none
#   qwen3_5      layers.N.linear_attn.A_log
# Who is hurt: full fine-tuning with a weight decay; with the default of 0 nothing happens. Small learning rates hide it:
# 10,000 steps at 1e-5 and 0.1 take 1% off each norm of the tower.
# Way around: override `get_decay_parameter_names`, and leave out whatever has fewer than two dimensions.
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, several GB in a temporary
# folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'transformers==5.23.0' 'torch==2.11.0' 'accelerate==1.15.0'
cat > "$work/decay.py" <<'PY'
import re
import sys

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, Trainer, TrainingArguments

rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
text = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, rope_parameters=rope, linear_num_key_heads=2, linear_num_value_heads=4,
            linear_key_head_dim=16, linear_value_head_dim=16, pad_token_id=0)
vision = dict(depth=2, embed_dim=64, hidden_size=64, num_heads=4, intermediate_size=64, out_hidden_size=64)


class Nothing(Trainer):
    def compute_loss(self, model, inputs, **_):
        return sum(parameter.sum() for parameter in model.parameters()) * 0


for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"):
    config = AutoConfig.for_model(family, text_config=dict(text), vision_config=dict(vision))
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = TrainingArguments(output_dir=sys.argv[1], max_steps=10, learning_rate=0.1, lr_scheduler_type="constant",
                                  weight_decay=0.1, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True)
    Nothing(model, arguments, train_dataset=[{"input_ids": [1]}] * 10, data_collator=lambda rows: {"x": torch.ones(1)}).train()
    after = dict(model.named_parameters())
    vectors = [name for name, value in before.items() if value.dim() < 2 and not torch.equal(value, after[name])]
    matrices = [name for name, value in before.items() if value.dim() > 1 and torch.equal(value, after[name])]
    moved = dict.fromkeys(re.sub(r".*?(blocks|layers|merger)\.", r"\1.", re.sub(r"\.\d+\.", ".N.", name)) for name in vectors)
    assert not matrices, matrices
    norms = {round(after[name].mean().item(), 4) for name in vectors if "norm" in name}
    print(family, " ".join(moved) or "none", *(f"to {value:.4f}" for value in norms))
PY
export CUDA_VISIBLE_DEVICES=
"$work/venv/bin/python" "$work/decay.py" "$work/run" 2> "$work/log" | grep '^qwen' | tee "$work/seen" || { tail -20 "$work/log"; exit 1; }
grep -q '^qwen2_vl none' "$work/seen"
grep -q '^qwen3_vl none' "$work/seen"
grep -q '^qwen2_5_vl .*norm1.weight.*norm2.weight.*ln_q.weight to 0.904' "$work/seen"
grep -q '^qwen3_5 layers.N.linear_attn.A_log' "$work/seen"
