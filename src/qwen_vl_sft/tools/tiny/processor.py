"""The tiny model's processor: the real Qwen2-VL classes and chat template around a byte-level BPE of 640 entries."""

import json
from collections.abc import Iterable, Iterator
from random import Random

from tokenizers import AddedToken, Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

from qwen_vl_sft.data.formats.chartqa import CHARTQA_SYSTEM_MESSAGE
from qwen_vl_sft.tiny import ASSETS_DIR
from qwen_vl_sft.tools.tiny.charts import SIZE, random_chart
from qwen_vl_sft.tools.tiny.questions import BRIEF_PROMPTS, DEFAULT_PROMPT, VERBOSE_PROMPTS, ask

VOCAB_SIZE = 640
# The real names in the real order; they follow the ordinary entries, as in the real vocabulary.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
MIN_PIXELS, MAX_PIXELS = 56 * 56, SIZE * SIZE  # a drawn chart keeps its size; larger images come down to 16 tokens
CHAT_TEMPLATE = ASSETS_DIR / "chat_template.jinja"  # the real one, unchanged


def build_processor() -> Qwen2VLProcessor:
    """Build a processor with the real template, 14-pixel patches merged 2x2, and a tokenizer trained on the tiny corpus."""
    sizes = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=sizes),
        tokenizer=_train_tokenizer(_corpus()),
        video_processor=Qwen2VLVideoProcessor(size=sizes),
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8"),
    )


def _corpus() -> Iterator[str]:
    """Return questions, answers and roles, and system messages often enough that their words become single tokens."""
    rng = Random("tokenizer")
    for _ in range(2000):
        for question in ask(rng, random_chart(rng), 4):
            yield from (question.text, question.label, question.brief, question.sentence)
    for message in (
        CHARTQA_SYSTEM_MESSAGE,
        DEFAULT_PROMPT,
        *BRIEF_PROMPTS,
        *VERBOSE_PROMPTS,
        "system\n",
        "assistant\n",
    ):
        yield from [message] * 50
    yield from ["user\n"] * 50


def _train_tokenizer(corpus: Iterable[str]) -> Qwen2Tokenizer:
    """Train a tokenizer with Qwen2's normalizer and word splitting; all 256 bytes are entries, so any text encodes."""
    bare = Qwen2Tokenizer(vocab={}, merges=[])
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = bare.backend_tokenizer.normalizer
    bpe.pre_tokenizer = bare.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    trained = json.loads(bpe.to_str())["model"]
    first = len(trained["vocab"])
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"] | {token: first + index for index, token in enumerate(SPECIAL_TOKENS)},
        merges=[tuple(merge) for merge in trained["merges"]],  # type: ignore[misc]
        unk_token=None,  # type: ignore[arg-type]
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=32768,
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer
