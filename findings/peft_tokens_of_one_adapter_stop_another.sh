#!/usr/bin/env bash
# peft 0.21.2: beside an adapter with trained tokens (trainable_token_indices), an adapter without them can be added and trained, and
# then not be saved: save_pretrained, which the Trainer calls for its checkpoints, ends in a KeyError. Loading such an adapter after the
# one with tokens ends in one too; in the other order it loads, answers right, and the first can no longer be saved.
#
# Guess before it was run: each adapter has its own settings, so that an adapter with trained tokens and one without may share a base,
# as an adapter with modules_to_save and one without may.
#
# Seen (Python 3.11, Linux, peft 0.21.2, transformers 5.23.0, torch 2.11.0), a Qwen2-VL; the adapter "first", then "second":
#   first / second                  add, train second   save first   save second   load second
#   plain / plain                   yes                 yes          yes           yes
#   lm_head in full / plain         yes                 yes          yes           yes
#   tokens / tokens                 yes                 yes          yes           yes
#   tokens / plain                  yes                 yes          KeyError      KeyError
#   plain / tokens                  yes                 KeyError     yes           yes
# The errors: 'token_adapter.trainable_tokens_delta.second' while saving, and '...embed_tokens.token_adapter.trainable_tokens_delta'
# while loading; neither says what to do. The second adapter that could not be loaded stays in the model, untrained.
# Why: the wrapper around the embeddings names the tokens' weights for whichever adapter is asked for, whether it has any or not;
# the wrapper of modules_to_save looks whether it has (https://github.com/huggingface/peft/issues/2422 was
# that case).
# Who is hurt: who taught new tokens to a model with one adapter, and trains a second task or goes on with a new adapter on top of it:
# the error comes with the first checkpoint, after the training that it was to keep.
# Way around: give every adapter of the model trainable_token_indices; to rescue a trained adapter, take the embeddings' wrapper out
# before it is saved, as below.
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, several GB in a temporary
# folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'peft==0.21.2' 'transformers==5.23.0' 'accelerate==1.15.0' \
    'torch==2.11.0' 'numpy<3'
cat > "$work/adapters.py" <<'PY'
import sys
from pathlib import Path

import peft
import torch
import transformers

rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.1}
text |= {"num_key_value_heads": 2, "vocab_size": 320, "rope_parameters": rope}
vision = {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 2}
tokens = {"vision_start_token_id": 300, "vision_end_token_id": 301, "image_token_id": 302, "video_token_id": 303}
work, ids = Path(sys.argv[1]), torch.arange(10, 30)[None]


def base():
    torch.manual_seed(1)
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)
    return transformers.Qwen2VLForConditionalGeneration(config)


def settings(kind):
    more = {"plain": {}, "lm_head in full": {"modules_to_save": ["lm_head"]}, "tokens": {"trainable_token_indices": [10, 11]}}[kind]
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], **more)


def train(model):
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(5):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=ids).logits


def alone(kind, name):
    """Train and save an adapter that is alone in its model; return its folder and its logits."""
    model = peft.get_peft_model(base(), settings(kind))
    train(model)
    model.save_pretrained(work / name)
    return work / name, logits(model)


def works(what):
    try:
        what()
    except KeyError:
        return "KeyError"
    return "yes"


def case(first, second):
    model = peft.get_peft_model(base(), settings(first), adapter_name="first")
    train(model)

    def add():
        model.add_adapter("second", settings(second))
        model.set_adapter("second")
        train(model)

    found = [works(add)]
    for name in ("first", "second"):
        found.append(works(lambda: model.save_pretrained(work / "both", selected_adapters=[name])))
    (folder, _), (other, right) = alone(first, "one"), alone(second, "two")
    model = peft.PeftModel.from_pretrained(base(), folder, adapter_name="first")
    found.append(works(lambda: model.load_adapter(other, "second")))
    assert "second" in model.peft_config
    if found[-1] == "yes":
        model.set_adapter("second")
        assert torch.allclose(logits(model), right, atol=1e-4), (first, second)
    return found


seen = {}
print(f"{'first / second':<32}add, train second   save first   save second   load second")
pairs = [("plain", "plain"), ("lm_head in full", "plain"), ("tokens", "tokens"), ("tokens", "plain"), ("plain", "tokens")]
for first, second in pairs:
    cells = seen[first, second] = case(first, second)
    print(f"{first + ' / ' + second:<32}{cells[0]:<20}{cells[1]:<13}{cells[2]:<14}{cells[3]}")

# The way to rescue a trained adapter: the embeddings' wrapper is taken out before the weights are collected.
model = peft.get_peft_model(base(), settings("tokens"), adapter_name="first")
model.add_adapter("second", settings("plain"))
model.set_adapter("second")
train(model)
right = logits(model)
model.base_model.model.set_input_embeddings(model.get_input_embeddings().token_adapter.base_layer)
model.save_pretrained(work / "rescued", selected_adapters=["second"])
rescued = peft.PeftModel.from_pretrained(base(), work / "rescued" / "second")
off = (logits(rescued) - right).abs().max().item()
print("rescued:", off < 1e-4)
print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
error, yes = "KeyError", "yes"
expected = dict(zip(pairs, [[yes] * 4, [yes] * 4, [yes] * 4, [yes, yes, error, error], [yes, error, yes, yes]]))
sys.exit(0 if seen == expected and off < 1e-4 else f"other than stated: {seen}, rescued {off} off")
PY
CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/adapters.py" "$work" 2> "$work/log" ||
    { tail -5 "$work/log"; exit 1; }
