"""The engine's answers are those of transformers' `generate` one prompt at a time, whatever else it answers meanwhile."""

from contextlib import closing, contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from fixtures.conversations import conversation, image
from fixtures.models import FAMILIES, newer, qwen2_vl
from qwen_vl_sft.batching.collator import pad
from qwen_vl_sft.batching.positions import Positions
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.feature_cache import FeatureCache
from qwen_vl_sft.data.media.image_file import ImageFile
from qwen_vl_sft.errors import BadRow, UserError
from qwen_vl_sft.inference.engine import decode_kernel
from qwen_vl_sft.inference.engine import engine as engine_module
from qwen_vl_sft.inference.engine.cache import NO_TOKEN, KeyValueCache
from qwen_vl_sft.inference.engine.decoding import Decoder, _Graph
from qwen_vl_sft.inference.engine.engine import Engine
from qwen_vl_sft.inference.engine.features import FeatureMemory, image_layers
from qwen_vl_sft.inference.engine.reading import PromptReader
from qwen_vl_sft.inference.generation import GeneratedAnswer, decode_answer, plan_units

NEW_TOKENS = 16
SHARED, TALL, WIDE = image(112, 112, 0), image(56, 112, 3), image(112, 56, 2)
# One, two and no images; questions on the same image, on the same two, on one of them, and the same question again.
ASKED = [
    conversation("How many bars are there?", SHARED),
    conversation("Why?", image(84, 56, 1)),
    conversation("Which of the two charts has the larger blue bar?", WIDE, TALL),
    conversation("A question of many words about no chart at all, to be longer than the others are"),
    conversation("Is the red bar taller than the blue bar?", TALL),
    conversation("Yes or no?", SHARED),
    conversation("Hm?"),
    conversation("Bars?", SHARED),
    conversation("Which?", WIDE, TALL),
    conversation("Yes or no?", SHARED),
    conversation("Which?", TALL, WIDE),
]
UNITS = plan_units([len(asked.media) for asked in ASKED], [tuple(f.content_hash for f in a.media) for a in ASKED])


def alone(model, encoder, row, new_tokens=NEW_TOKENS):
    """What transformers answers to one prompt."""
    inputs = pad([row], encoder.pad_token_id)
    del inputs["labels"]
    ends = [encoder.end_of_turn_id, encoder.pad_token_id]
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, eos_token_id=ends)
    tokens = output[0, len(row.input_ids) :].tolist()
    return GeneratedAnswer(decode_answer(encoder, tokens), not set(ends).isdisjoint(tokens))


# Of experts the engine knows nothing: they answer as the dense models of their families do.
@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.long) if "Moe" in name else name for name in FAMILIES],
)
def family(request, tiny_processor):
    """A model in float32, its encoder, and what transformers answers."""
    torch.manual_seed(1)
    model = qwen2_vl() if request.param == "qwen2_vl" else newer(request.param)
    if request.param != "qwen2_vl":
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3.0)  # so that answers differ from prompt to prompt
    encoder = Encoder(tiny_processor, system_message="Answer.")
    model.eval()
    return model, encoder, [alone(model, encoder, encoder.encode_prompt(asked)) for asked in ASKED]


@pytest.fixture(scope="module")
def tiny(tiny_processor):
    return qwen2_vl(), Encoder(tiny_processor)


def answers(engine, asked=ASKED, units=UNITS):
    found = {}
    for done in engine.answers(lambda number, read: engine.encoder.encode_prompt(asked[number], read), units):
        found.update(done)
    assert engine.cache.free == engine.cache.slots, "slots are lost"
    assert len(found) == len(asked), "rows are lost"
    return [found[number] for number in sorted(found)]


@contextmanager
def on_a_device_of_its_own(beside: bool):
    """Let the engine work as beside a GPU: a pass ahead of the tokens that it has seen, and with steps that are recorded.

    A recorded step is one that is computed when it is replayed.
    """

    def capture(decoder, count, width):
        places, tokens = torch.full((count,), decoder.places), torch.zeros(count, dtype=torch.long)
        replay = SimpleNamespace(replay=lambda: tokens.copy_(decoder._compute(places, width, None)))
        recorded.append((count, width))
        return _Graph(places, replay, tokens)

    recorded = []
    with pytest.MonkeyPatch.context() as patch:
        if beside:
            patch.setattr(engine_module, "computes_beside_host", lambda device: True)
            patch.setattr(Decoder, "_capture", capture)
        yield recorded


@settings(max_examples=16)
@given(
    st.lists(st.integers(0, len(ASKED) - 1), min_size=1, max_size=9),
    st.integers(1, 5),
    st.sampled_from([1, 70, 400]),
    st.sampled_from([170, 4096]),
    st.booleans(),
    st.booleans(),
)
def test_answers_are_those_of_generate_one_at_a_time(family, chosen, rows, prefill_tokens, slots, remember, beside):
    model, encoder, expected = family
    asked = [ASKED[number] for number in chosen]
    units = plan_units([1] * len(asked), [tuple(file.content_hash for file in one.media) for one in asked])
    memory = FeatureMemory(10**9) if remember else None
    with on_a_device_of_its_own(beside) as recorded:
        engine = Engine(
            model, encoder, NEW_TOKENS, rows=rows, slots=slots, prefill_tokens=prefill_tokens, memory=memory
        )
        for _ in range(1 + remember):
            assert answers(engine, asked, units) == [expected[number] for number in chosen]
    assert bool(recorded) <= beside


@st.composite
def questions(draw):
    """Conversations of any words on up to two of four images, some of them after a turn before."""
    found = []
    for text in draw(st.lists(st.text(max_size=30), min_size=1, max_size=4)):
        images = draw(st.lists(st.sampled_from([SHARED, TALL, WIDE, image(84, 28, 4)]), max_size=2))
        asked = conversation(text, *images)
        if draw(st.booleans()):
            asked = replace(asked, messages=[*asked.messages, *conversation(draw(st.text(max_size=9))).messages])
        found.append(asked)
    return found


@settings(max_examples=6)
@given(questions(), st.integers(1, 24), st.integers(1, 3), st.sampled_from([1, 120]), st.booleans())
def test_any_texts_and_images_are_answered_as_by_generate(tiny, asked, new_tokens, rows, prefill_tokens, beside):
    model, encoder = tiny
    expected = [alone(model, encoder, encoder.encode_prompt(one), new_tokens) for one in asked]
    units = plan_units([1] * len(asked), [tuple(file.content_hash for file in one.media) for one in asked])
    with on_a_device_of_its_own(beside):
        engine = Engine(model, encoder, new_tokens, rows=rows, prefill_tokens=prefill_tokens)
        assert answers(engine, asked, units) == expected


@pytest.mark.parametrize("rows_at_once", [1, 3, 11])
def test_rows_are_answered_a_pass_ahead_and_by_recorded_steps(tiny, rows_at_once):
    model, encoder = tiny
    expected = answers(Engine(model, encoder, 40, rows=rows_at_once))
    with on_a_device_of_its_own(True) as recorded:
        assert answers(Engine(model, encoder, 40, rows=rows_at_once)) == expected
        assert recorded
        assert all(count in (1, 2, 4, 8, 16) for count, _ in recorded)
        assert len(recorded) == len(set(recorded)), "a step of one size is recorded once"


@pytest.mark.parametrize("beside", [False, True])
def test_answers_are_the_same_where_a_kernel_attends_to_slots(family, beside, monkeypatch):
    def attend(q, keys, values, table, places, lengths, scale):
        called.append(len(q))
        rows = []
        for one, place, length in zip(q, places, lengths, strict=True):
            own = table[place, : length + 1]
            k, v = (tensor[own].transpose(0, 1) for tensor in (keys, values))
            rows.append(scaled_dot_product_attention(one[:, None], k, v, scale=scale, enable_gqa=True)[:, 0])
        return torch.stack(rows)

    model, encoder, expected = family
    called = []
    monkeypatch.setattr(decode_kernel, "attend_to_slots", attend)
    with on_a_device_of_its_own(beside) as recorded:
        engine = Engine(model, encoder, NEW_TOKENS, rows=5)
        engine._decoder.kernel = True  # which it is on a GPU alone
        assert answers(engine) == expected
    assert called
    # However long the rows are, one graph serves them.
    assert len({width for _, width in recorded}) == beside


def test_a_recorded_step_of_more_rows_serves_fewer_until_these_are_asked_for_often(tiny, monkeypatch):
    # On a busy machine the first pass would have those rows alone that threads have read by then.
    next_group = PromptReader.next_group
    monkeypatch.setattr(PromptReader, "next_group", lambda reader, wait: next_group(reader, wait=True))
    model, encoder = tiny
    with on_a_device_of_its_own(True) as recorded:
        engine = Engine(model, encoder, 16, rows=11)
        answers(engine)
        assert recorded == [(16, 256)]
        decoder = engine._decoder
        decoder.forget_graphs()
        recorded.clear()
        for _ in range(15):
            decoder.step([decoder.places] * 6, 8)
            decoder.step([decoder.places], 8)
    assert recorded == [(8, 256), (1, 256)]


def test_answers_are_the_same_where_no_step_can_be_recorded(tiny, monkeypatch, caplog):
    def refuse(*_):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    model, encoder = tiny
    expected = answers(Engine(model, encoder, 12))
    monkeypatch.setattr(engine_module, "computes_beside_host", lambda device: True)
    monkeypatch.setattr(torch.cuda, "Stream", refuse)
    assert answers(Engine(model, encoder, 12)) == expected
    assert [record.message for record in caplog.records] == [
        "answers are decoded without CUDA graphs, which fail here: operation not permitted"
    ]
    caplog.clear()
    assert answers(Engine(model, encoder, 12, cuda_graphs=False)) == expected
    assert answers(Engine(model, encoder, 2)) != expected, "answers of few tokens"
    assert not caplog.records


def test_the_comparison_above_would_notice(family):
    _, _, expected = family
    assert len({answer.text for answer in expected}) > 6


@pytest.mark.parametrize("new_tokens", [1, 12, 40])
def test_answers_end_with_their_turn_or_are_cut(tiny, new_tokens):
    model, encoder = tiny
    expected = [alone(model, encoder, encoder.encode_prompt(asked), new_tokens) for asked in ASKED]
    assert answers(Engine(model, encoder, new_tokens, rows=3)) == expected
    assert {answer.ended for answer in expected} == {1: {False}, 12: {True, False}, 40: {True}}[new_tokens]


@pytest.mark.parametrize("rows_at_once", [2, 4])
def test_several_rows_share_the_slots_of_what_they_begin_with(tiny, rows_at_once):
    model, encoder = tiny
    engine = Engine(model, encoder, 4, rows=rows_at_once)

    def prompt_at(number, read):
        return encoder.encode_prompt(ASKED[number], read)

    with closing(engine.steps(prompt_at, [[0, 5, 7, 9]])) as steps:
        rows = next(steps)
        held = engine.cache.slots - engine.cache.free
    lengths = [len(row.prompt) for row in rows]
    shared = rows[0].group.shared
    assert len(rows) == rows_at_once
    assert shared > 16
    assert held == sum(lengths) - (rows_at_once - 1) * shared + rows_at_once * 3
    assert engine.cache.free == engine.cache.slots, "a stream that is closed early gives everything back"


def test_what_all_prompts_begin_with_is_computed_once(tiny, monkeypatch):
    model = tiny[0]
    encoder = Encoder(tiny[1].processor, system_message="Answer in one word, and look closely at every bar.")
    seen, compute = [], engine_module.pack
    monkeypatch.setattr(engine_module, "pack", lambda pieces: seen.extend(pieces) or compute(pieces))
    other = Encoder(tiny[1].processor, system_message="A message of its own.")
    encoders = [other if number == 6 else encoder for number in range(len(ASKED))]
    engine = Engine(model, encoder, 3, rows=4)
    found = {}
    for done in engine.answers(lambda number, read: encoders[number].encode_prompt(ASKED[number], read), UNITS):
        found.update(done)
    for number in (1, 3, 6):
        assert found[number] == alone(model, encoder, encoders[number].encode_prompt(ASKED[number]), 3)
    prompts = {piece.prompt.number: piece.prompt.row for piece in seen}
    image = encoder.processor.tokenizer.convert_tokens_to_ids("<|vision_start|>")
    length = prompts[1].input_ids.tolist().index(image) + 1
    heads = [piece for piece in seen if not piece.start and not piece.answers]
    assert [len(piece) for piece in heads] == [length], "the head is computed once"
    begun = {piece.prompt.number: piece.start for piece in seen if piece.answers}
    assert begun[1] == length
    assert begun[0] > length, "after the image, which rows share"
    assert begun[3] == length - 1, "text without an image begins with the message too"
    assert 0 < begun[6] < 6, "another message has the opening of the turn in common"
    assert engine.cache.free == engine.cache.slots


@pytest.mark.parametrize("in_common", [False, True], ids=["nothing in common", "one token in common"])
def test_the_head_makes_room_for_a_row_that_needs_it(tiny, in_common):
    model = tiny[0]
    encoder = Encoder(tiny[1].processor, system_message="Look closely. " * 4)
    plain = Encoder(tiny[1].processor, system_message=None)
    rows = [encoder.encode_prompt(ASKED[1]), plain.encode_prompt(ASKED[3])]
    if not in_common:
        rows[1] = replace(rows[1], input_ids=torch.cat([rows[1].input_ids[1:2], rows[1].input_ids[1:]]))
    # What the longer one needs; the last token of an answer is not read any more.
    slots = max(len(row.input_ids) for row in rows) + 2
    engine = Engine(model, encoder, 3, rows=2, slots=slots)
    found = {}
    for done in engine.answers(lambda number, read: rows[number], [[0], [1]]):
        found.update(done)
    assert [found[number] for number in (0, 1)] == [alone(model, encoder, row, 3) for row in rows]
    assert engine.cache.free == slots
    with pytest.raises(UserError, match=f"may have {slots} tokens, and the memory that is free holds {slots - 1};"):
        list(Engine(model, encoder, 3, rows=2, slots=slots - 1).answers(lambda number, read: rows[number], [[0], [1]]))


def test_the_tower_sees_each_image_once(tiny, monkeypatch):
    model, encoder = tiny
    seen, compute = [], model.model.visual.forward
    monkeypatch.setattr(
        model.model.visual, "forward", lambda x, grid_thw, **more: seen.extend(grid_thw) or compute(x, grid_thw, **more)
    )
    decoded, decode = [], ImageFile.pixels
    monkeypatch.setattr(ImageFile, "pixels", lambda file: decoded.append(file.content_hash) or decode(file))
    images = {file.content_hash for asked in ASKED for file in asked.media}
    memory = FeatureMemory(10**9)
    first = answers(Engine(model, encoder, 3, memory=memory))
    assert len(seen) == len(images)
    again = Encoder(encoder.processor, system_message="Answer in a word.")
    answers(Engine(model, again, 3, memory=memory))
    assert len(seen) == len(images), "known features are used, and the images not even decoded"
    count = len(decoded)
    assert answers(Engine(model, encoder, 3, memory=memory)) == first
    assert len(decoded) == count
    assert memory.taken > 0
    forgetful = FeatureMemory(memory.taken - 1)
    assert answers(Engine(model, encoder, 3, memory=forgetful)) == first
    assert 0 < forgetful.taken < memory.taken


def test_features_on_disk_are_read_where_there_are_any(tiny, tmp_path, monkeypatch):
    model, encoder = tiny
    positions = Positions(model.config)
    expected = answers(Engine(model, encoder, 6))
    cache = FeatureCache(tmp_path, "float32", model.config.get_text_config().hidden_size, 1)
    images = [encoder.read_media(file) for file in (SHARED, TALL)]
    with torch.no_grad():
        [layers] = image_layers(model.model, positions, images, None)
    for shown, features in zip(images, layers, strict=True):
        cache.write(shown.content_hash, features, shown.grid)
    cache.path(TALL.content_hash).write_bytes(b"damaged")
    seen, compute = [], model.model.visual.forward
    monkeypatch.setattr(
        model.model.visual, "forward", lambda x, grid_thw, **more: seen.extend(grid_thw) or compute(x, grid_thw, **more)
    )
    assert answers(Engine(model, encoder, 6, memory=FeatureMemory(10**9, cache))) == expected
    assert len(seen) == len({file.content_hash for asked in ASKED for file in asked.media}) - 1


def test_a_bad_row_ends_the_work_once_the_rows_before_it_are_answered(tiny):
    model, encoder = tiny

    def prompt_at(number, read):
        if number == 6:
            raise BadRow("row 6 is bad")
        return encoder.encode_prompt(ASKED[number], read)

    found, before = [], UNITS[: UNITS.index([6])]
    engine = Engine(model, encoder, 5, rows=2)
    work = engine.answers(prompt_at, UNITS)
    with pytest.raises(BadRow, match="row 6"):
        found.extend(number for done in work for number, _ in done)
    assert sorted(found) == sorted(number for unit in before for number in unit)
    assert engine.cache.free == engine.cache.slots


def test_a_row_that_memory_cannot_hold_is_refused(tiny):
    model, encoder = tiny
    with pytest.raises(UserError, match=r"holds 50; give a smaller --max_new_tokens, or reduce the images"):
        answers(Engine(model, encoder, 30, slots=50))


def test_mode_and_attention_are_put_back(tiny):
    model, encoder = tiny
    model.train()
    before = model.model.language_model.config._attn_implementation
    answers(Engine(model, encoder, 2))
    assert model.training
    assert model.model.language_model.config._attn_implementation == before
    model.eval()


def test_what_generation_config_asks_for_is_done_beside_what_greedy_answers_set(tiny):
    model, encoder = tiny
    plain = answers(Engine(model, encoder, 8))
    config = model.generation_config
    try:
        config.repetition_penalty = 20.0
        assert answers(Engine(model, encoder, 8)) == plain, "a shipped repetition penalty is not applied"
        config.repetition_penalty = None
        first = encoder.processor.tokenizer(plain[0].text)["input_ids"][0]
        for name, value in (("suppress_tokens", [first]), ("min_new_tokens", 8), ("bad_words_ids", [[first]])):
            setattr(config, name, value)
            expected = [alone(model, encoder, encoder.encode_prompt(asked), 8) for asked in ASKED]
            assert answers(Engine(model, encoder, 8)) == expected != plain
            setattr(config, name, None)
    finally:
        config.suppress_tokens = config.min_new_tokens = config.bad_words_ids = config.repetition_penalty = None


def test_slots_are_taken_once_and_given_back(tiny):
    config = tiny[0].config.get_text_config()
    cache = KeyValueCache(config, 10, torch.float32, torch.device("cpu"))
    one, other = cache.take(4), cache.take(6)
    assert sorted([*one, *other]) == list(range(1, 11))
    assert NO_TOKEN not in one
    cache.release(one)
    assert sorted(cache.take(4)) == sorted(one)
    with pytest.raises(AssertionError):
        cache.take(1)
