#!/usr/bin/env bash
# TRL 1.16.0, peft 0.21.2: DPOTrainer, and KTOTrainer, GRPOTrainer and RLOOTrainer in the same way, damages a model whose adapter began
# with PiSSA or OLoRA when it is made: the policy starts from another model, and what is saved after training answers otherwise than the
# model that was trained. No error, no warning; the first loss is ln 2, as it should be.
#
# Guess before it was run: a trainer leaves the model that it is given as it is, and what it saves gives the trained model back, as with
# adapters that began otherwise. (PEFT knows that PiSSA and OLoRA change the base, and warns when load_adapter adds one to another.)
#
# Seen (Python 3.11, Linux, trl 1.16.0, peft 0.21.2, transformers 5.23.0, torch 2.11.0), a Qwen2-VL that learned an answer about an image;
# the loss of that answer, and after two steps of DPO how far the saved adapter's logits on the base are from the trained model's:
#                                  answer's loss before / after the trainer is made   first DPO loss   saved adapter off
#   plain LoRA                                0.053   0.053                             0.6931               0%
#   orthogonal                                0.053   0.053                             0.6931               0%
#   PiSSA                                     0.052   0.242                             0.6931              63%
#   PiSSA, 4 iterations                       0.052   0.227                             0.6931              63%
#   OLoRA                                     0.052   0.107                             0.6931              43%
#   PiSSA, after the way around               0.052   0.052                             0.6931               0%
#   OLoRA, after the way around               0.052   0.052                             0.6931               0%
# Why: for its reference TRL adds a second adapter with the first one's settings, and PEFT takes the principal part out of the base's
# weights once more; then the weights of the first are copied into it. The first adapter, its base less that part, is not what it was.
# Who is hurt: who trains with PiSSA or OLoRA, as PEFT and trainers built on it offer, and goes on with preferences or rewards.
# Way around: say init_lora_weights=True while the trainer is made, and put the old value back before anything is saved, as below; or
# make a plain LoRA of the adapter first (save_pretrained with path_initial_model_for_weight_conversion).
# (https://github.com/huggingface/peft/issues/2184, open, is about load_adapter of several; its pull request 2186 brought the warning,
# which add_adapter does not give. No issue was found on TRL's reference.)
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, several GB in a temporary
# folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'trl==1.16.0' 'peft==0.21.2' 'transformers==5.23.0' \
    'accelerate==1.15.0' 'datasets==5.2.0' 'torch==2.11.0' 'numpy<3'
cat > "$work/start.py" <<'PY'
import math
import sys

import datasets
import peft
import torch
import transformers
import trl
from tokenizers import Tokenizer, models, pre_tokenizers

datasets.disable_progress_bars()
transformers.logging.set_verbosity_error()
words = ["<|end|>", "<|pad|>", "<unk>", "color", "?", "red", "blue"]
splitter = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=splitter, eos_token="<|end|>", pad_token="<|pad|>", unk_token="<unk>"
)
rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
text |= {"num_key_value_heads": 2, "rope_parameters": rope, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
text |= {"initializer_range": 0.1}
vision = {"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 2}
tokens = {"vision_start_token_id": 12, "vision_end_token_id": 13, "image_token_id": 14, "video_token_id": 15}
settings = {"output_dir": sys.argv[1], "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True}
settings |= {"per_device_train_batch_size": 4, "save_strategy": "no", "logging_steps": 1, "max_steps": 2}
marked = [{"prompt": "color ?", "completion": " red", "label": True}, {"prompt": "color ?", "completion": " blue", "label": False}]
rows = {"DPO": [{"prompt": "color ?", "chosen": " red", "rejected": " blue"}] * 8, "KTO": marked * 4}
torch.manual_seed(0)
ids = torch.tensor([[12, *[14] * 4, 13, 3, 4, 5, 0]])
answer = torch.where(torch.arange(10) < 8, -100, ids)
image = {"pixel_values": torch.randn(16, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def base():
    torch.manual_seed(1)
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)
    return transformers.Qwen2VLForConditionalGeneration(config)


def forward(model, **more):
    return model(input_ids=ids, mm_token_type_ids=(ids == 14).int(), **image, **more)


@torch.no_grad()
def logits(model):
    return forward(model.eval()).logits


@torch.no_grad()
def answer_loss(model):
    return forward(model.eval(), labels=answer).loss.item()


def load(folder):
    return peft.PeftModel.from_pretrained(base(), folder, is_trainable=True)


def tuned(init):
    torch.manual_seed(2)
    config = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", init_lora_weights=init)
    model = peft.get_peft_model(base(), config)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=3e-3)
    for _ in range(30):
        forward(model, labels=answer).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(sys.argv[2])
    return load(sys.argv[2])


def policy(kind, init, mend):
    model = tuned(init)
    more = {} if kind in rows else {"reward_funcs": lambda completions, **_: [float(len(answer)) for answer in completions]}
    before = answer_loss(model)
    if mend:
        model.peft_config["default"].init_lora_weights = True
    trainer = getattr(trl, kind + "Trainer")(
        model,
        args=getattr(trl, kind + "Config")(**settings, **({} if kind in rows else {"beta": 0.1, "num_generations": 2})),
        train_dataset=datasets.Dataset.from_list(rows.get(kind) or [{"prompt": "color ?"}] * 8),
        processing_class=tokenizer,
        **more,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    if mend:
        model.peft_config["default"].init_lora_weights = init
    return trainer, before, answer_loss(model)


seen = {}
print(f"{'':<31}answer's loss before / after the trainer is made   first DPO loss   saved adapter off")
for name, init, mend in (
    ("plain LoRA", True, False),
    ("orthogonal", "orthogonal", False),
    ("PiSSA", "pissa", False),
    ("PiSSA, 4 iterations", "pissa_niter_4", False),
    ("OLoRA", "olora", False),
    ("PiSSA, after the way around", "pissa", True),
    ("OLoRA, after the way around", "olora", True),
):
    trainer, before, after = policy("DPO", init, mend)
    trainer.train()
    trainer.save_model()
    first, trained = trainer.state.log_history[0]["loss"], logits(trainer.model)
    off = round(100 * ((logits(load(sys.argv[1])) - trained).norm() / trained.norm()).item())
    others = [policy(kind, init, mend)[1:] for kind in ("KTO", "GRPO", "RLOO")]
    assert all(abs(pair[0] - before) < 1e-3 and abs(pair[1] - after) < 1e-3 or "niter" in str(init) for pair in others), others
    damaged = init in ("pissa", "pissa_niter_4", "olora") and not mend
    seen[name] = (after > 1.5 * before and off > 20) if damaged else (abs(after - before) < 1e-4 and off == 0)
    seen[name] &= abs(first - math.log(2)) < 1e-4
    print(f"{name:<31}{before:>16.3f}{after:>8.3f}{first:>35.4f}{off:>16}%", flush=True)
print("trl", trl.__version__, "peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
sys.exit(0 if all(seen.values()) else f"other than stated: {seen}")
PY
CUDA_VISIBLE_DEVICES='' HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$work/cache" "$work/venv/bin/python" "$work/start.py" "$work/out" "$work/adapter" \
    2> "$work/log" || { tail -5 "$work/log"; exit 1; }
