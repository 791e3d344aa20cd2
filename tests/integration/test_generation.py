"""Answers of padded batches equal those of each prompt alone, and of transformers' own way; a random model in float32."""

import re

import pytest
import torch

from fixtures.conversations import conversation, image
from fixtures.evaluation import tiny_model
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.inference.generation import decode_answer, estimate_length, greedy_config
from qwen_vl_sft.inference.padded_batches import generate_batch, generate_batches, plan_batches

NEW_TOKENS = 12


def generate_answers(model, encoder, conversations, batch_size, max_new_tokens):
    """The text of each conversation's answer, in their order."""
    batches = plan_batches([estimate_length(encoder, asked) for asked in conversations], batch_size)

    def prompt_at(number):
        return encoder.encode_prompt(conversations[number])

    answers = {}
    for numbers, given in generate_batches(model, encoder, prompt_at, batches, max_new_tokens):
        answers |= dict(zip(numbers, (answer.text for answer in given), strict=True))
    return [answers[number] for number in range(len(conversations))]


@pytest.fixture(scope="module")
def tiny():
    model, processor = tiny_model(scale=2.0)
    return model, Encoder(processor, system_message="Answer.")


@pytest.fixture(scope="module")
def conversations():
    return [
        conversation("How many bars are there?", image(112, 112, 0)),
        conversation("Why?", image(84, 56, 1)),
        conversation("Which of the two charts has the larger blue bar?", image(112, 56, 2), image(56, 112, 3)),
        conversation("A question of many words about no chart at all, to be padded differently"),
        conversation("Is the red bar taller than the blue bar?", image(56, 112, 4)),
        conversation("Yes or no?", image(112, 112, 5)),
        conversation("Hm?"),
    ]


def test_batched_answers_equal_those_one_by_one(tiny, conversations):
    model, encoder = tiny
    alone = generate_answers(model, encoder, conversations, 1, NEW_TOKENS)
    assert len(set(alone)) == len(alone), "answers that are all alike would prove nothing"
    for batch_size in (2, 3, len(conversations)):
        assert generate_answers(model, encoder, conversations, batch_size, NEW_TOKENS) == alone


def test_answers_equal_those_of_the_processor_and_generate(tiny, conversations):
    model, encoder = tiny
    ours = generate_answers(model, encoder, conversations, 4, NEW_TOKENS)
    for asked, answer in zip(conversations, ours, strict=True):
        system = {"role": "system", "content": [{"type": "text", "text": "Answer."}]}
        text = encoder.processor.apply_chat_template([system, asked.messages[0]], add_generation_prompt=True)
        images = [file.decode() for file in asked.media] or None
        inputs = encoder.processor(text=[text], images=images, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        decoded = encoder.processor.batch_decode(new)[0]
        assert re.split(r"<\|(?:im_end|endoftext)\|>", decoded)[0].strip() == answer


def test_boxes_are_part_of_an_answer_and_what_gives_turns_their_structure_is_not(tiny):
    encoder = tiny[1]
    answer = "<|object_ref_start|>bar<|object_ref_end|><|box_start|>(1,2),(30,40)<|box_end|>"
    tokens = encoder.processor.tokenizer(f"<|vision_end|>{answer}<|im_start|>\n<|im_end|>!<|endoftext|>").input_ids
    assert decode_answer(encoder, tokens) == answer


def test_the_gold_answer_is_not_shown(tiny, conversations):
    model, encoder = tiny
    other = conversation("Why?", image(84, 56, 1))
    other.messages[-1]["content"][0]["text"] = "something else"
    assert generate_answers(model, encoder, [other], 1, NEW_TOKENS) == generate_answers(
        model, encoder, [conversations[1]], 1, NEW_TOKENS
    )


def test_a_shipped_repetition_penalty_is_not_applied(tiny, conversations):
    model, encoder = tiny
    plain = generate_answers(model, encoder, conversations[:3], 3, NEW_TOKENS)
    model.generation_config.repetition_penalty = 20.0
    try:
        assert generate_answers(model, encoder, conversations[:3], 3, NEW_TOKENS) == plain
    finally:
        model.generation_config.repetition_penalty = None


class Scripted:
    """Stands for a model that answers with given tokens."""

    training = True
    device = torch.device("cpu")

    def __init__(self, answers):
        self.answers = answers
        self.seen = []

    def eval(self):
        self.training = False

    def train(self, mode):
        self.training = mode

    def generate(self, input_ids, attention_mask, generation_config, **_):
        assert not self.training
        assert bool(attention_mask[:, -1].all()), "padded on the right"
        self.seen.append(attention_mask.sum(-1).tolist())
        rows = len(input_ids)
        return torch.cat([input_ids, torch.tensor(self.answers[:rows])], dim=1)


def test_an_answer_ends_at_the_end_of_its_turn(tiny, conversations):
    encoder = tiny[1]
    tokens = encoder.processor.tokenizer("Yes")["input_ids"]
    end, pad = encoder.end_of_turn_id, encoder.pad_token_id
    longest = max(3, len(tokens) + 2)
    scripted = [ids + [pad] * (longest - len(ids)) for ids in ([*tokens, end, tokens[0]], [*tokens, pad], [end])]
    model = Scripted(scripted)
    found = generate_answers(model, encoder, [conversations[1]] * 3, 3, longest)
    assert sorted(found) == ["", "Yes", "Yes"]
    assert model.training, "the mode of the model is put back"


def test_an_answer_without_an_end_was_cut(tiny, conversations):
    encoder = tiny[1]
    word, end, pad = encoder.processor.tokenizer("Yes")["input_ids"][0], encoder.end_of_turn_id, encoder.pad_token_id
    model = Scripted([[word, word, word], [word, word, end], [word, end, pad], [word, pad, pad]])
    model.eval()
    given = generate_batch(model, encoder, [encoder.encode_prompt(conversations[1])] * 4, 3)
    assert [answer.ended for answer in given] == [False, True, True, True]


def test_the_longest_prompts_come_first_and_answers_keep_their_order(tiny, conversations):
    encoder = tiny[1]
    tokens = encoder.processor.tokenizer("No")["input_ids"]
    model = Scripted([[*tokens, encoder.end_of_turn_id]] * 2)
    assert generate_answers(model, encoder, conversations, 2, 5) == ["No"] * len(conversations)
    # The order is that of estimates: similar lengths may change places.
    assert max(model.seen[0]) >= 0.9 * max(max(lengths) for lengths in model.seen)
    assert model.seen[-1] == [min(min(lengths) for lengths in model.seen)]


def test_batches_hold_every_place_once():
    batches = plan_batches([3, 9, 3, 7, 1], 2)
    assert batches == [[1, 3], [0, 2], [4]]
    assert plan_batches([], 2) == []


def test_lengths_come_from_headers(tiny, conversations):
    encoder = tiny[1]
    measured = estimate_length(encoder, conversations[0])
    assert measured == 16 + (len("How many bars are there?") + len("not shown")) // 4
    assert greedy_config(encoder, 7).max_new_tokens == 7
