"""The embedded tiny model and its charts: labels match what is drawn, and the shipped files match their generator."""

from collections import Counter
from random import Random

import numpy as np
import pytest

from qwen_vl_sft.tiny import ASSETS_DIR, BOXES_DIR, DATA_DIR, MODEL_DIR
from qwen_vl_sft.tools.tiny import charts, questions


def sampled_charts(count: int = 60) -> list[charts.Chart]:
    rng = Random("test")
    return [charts.random_chart(rng) for _ in range(count)]


def test_charts_are_drawn_the_same_every_time():
    first, second = sampled_charts(), sampled_charts()
    assert first == second
    assert [charts.draw(a).tobytes() for a in first] == [charts.draw(b).tobytes() for b in second]
    assert {chart.kind for chart in first} == set(charts.KINDS)


@pytest.mark.parametrize("chart", sampled_charts(), ids=lambda chart: f"{chart.kind}{len(chart.values)}")
def test_drawing_shows_the_specification(chart):
    pixels = np.asarray(charts.draw(chart))
    assert pixels.shape == (112, 112)
    ink = Counter(pixels.ravel().tolist())
    assert {color for color, index in charts.INK.items() if ink[index]} == set(chart.colors)
    for color, value in zip(chart.colors, chart.values, strict=True):
        rows, columns = np.nonzero(pixels == charts.INK[color])
        if chart.kind == "pie":
            share = len(rows) / sum(ink[charts.INK[other]] for other in chart.colors)
            assert share == pytest.approx(value / sum(chart.values), abs=0.01)
        elif chart.kind == "line":
            assert (charts.SIZE - charts.ORIGIN - (rows.min() + rows.max()) / 2) / charts.UNIT == value
        elif chart.kind == "bar":
            assert (np.ptp(rows) + 1) / charts.UNIT == value
        else:
            assert (np.ptp(columns) + 1) / charts.UNIT == value


def test_answers_follow_from_the_chart():
    chart = charts.Chart("bar", ("red", "blue", "green"), (3, 9, 5), 70)
    found = {}
    for seed in range(200):
        for question in questions.ask(Random(seed), chart, 8):
            found[question.text] = (question.label, question.brief, question.sentence)
    assert found["How many bars are there?"] == ("3", "3", "There are 3 bars.")
    assert found["What is the value of the green bar?"] == ("5", "5", "The value of the green bar is 5.")
    assert found["What is the minimum value in the chart?"] == ("3", "3", "The lowest value is 3.")
    assert found["How many bars are above 5?"] == ("1", "1", "There is 1 bar above 5.")
    assert found["Which color is the tallest bar?"] == ("blue", "blue.", "The tallest bar is blue.")
    assert found["Which color is the last bar?"] == ("green", "green.", "The last bar is green.")
    assert found["Is the red bar taller than the blue bar?"] == (
        "No", "No, it is not.", "No, the red bar is not taller than the blue bar."
    )  # fmt: skip
    assert found["Is there a red bar?"] == ("Yes", "Yes, there is.", "Yes, there is a red bar.")
    assert found["Is there an orange bar?"][0] == "No"


def test_shipped_rows_are_what_the_generator_gives(tmp_path):
    from qwen_vl_sft.tools.tiny.build import read_rows
    from qwen_vl_sft.tools.tiny.dataset import IMAGES, write_dataset

    write_dataset(tmp_path)
    images = {}
    for split in IMAGES:
        name = f"{split}-00000-of-00001.parquet"
        shipped = read_rows(DATA_DIR / name)
        assert shipped == read_rows(tmp_path / name)
        images[split] = {row["image"][2] for row in shipped}
        assert len(images[split]) == IMAGES[split]
        assert {row["human_or_machine"] for row in shipped} == {0, 1}
    assert (tmp_path / "README.md").read_bytes() == (DATA_DIR / "README.md").read_bytes()
    assert len(set.union(*images.values())) == sum(IMAGES.values()), "an image stands in two splits"


def test_boxes_are_what_the_generator_gives_and_hold_their_bars(tmp_path):
    from qwen_vl_sft.tools.tiny.box_dataset import IMAGES, write_box_dataset
    from qwen_vl_sft.tools.tiny.build import read_rows

    write_box_dataset(tmp_path)
    images = {}
    for split, count in IMAGES.items():
        name = f"{split}-00000-of-00001.parquet"
        shipped = read_rows(BOXES_DIR / name)
        assert shipped == read_rows(tmp_path / name)
        images[split] = {row["image"][2] for row in shipped}
        assert len(images[split]) == count
        for row in shipped[:40]:
            _, (width, height), pixels = row["image"]
            _, color, kind = row["objects"]["ref"][0].split()
            assert kind == "bar"
            bar = (np.frombuffer(pixels, np.uint8).reshape(height, width, 3) == charts.COLORS[color]).all(axis=2)
            rows, columns = np.nonzero(bar)
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert row["objects"]["bbox"] == [box]
    assert (tmp_path / "README.md").read_bytes() == (BOXES_DIR / "README.md").read_bytes()
    assert len(set.union(*images.values())) == sum(IMAGES.values()), "an image stands in two splits"


def test_data_loads_like_chartqa(tmp_path):
    import datasets

    train = datasets.load_dataset(str(DATA_DIR), split="train[:10%]", cache_dir=str(tmp_path))
    assert train.column_names == ["image", "query", "label", "human_or_machine"]
    assert len(train) == 80
    assert train[0]["image"].size == (112, 112)


def test_assets_fit_the_package():
    assert sum(file.stat().st_size for file in ASSETS_DIR.rglob("*") if file.is_file()) <= 3_000_000


def test_model_and_processor_load():
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(MODEL_DIR)
    assert model.dtype == torch.bfloat16
    assert 1_000_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 1_500_000
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features % 64 == module.out_features % 64 == 0, f"{name} cannot be a 4-bit layer"

    processor = AutoProcessor.from_pretrained(MODEL_DIR)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many bars are there?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision")
    inputs = processor(text=[text], images=[charts.draw(sampled_charts(1)[0])], return_tensors="pt")
    image_token = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert int((inputs["input_ids"] == image_token).sum()) == 16
    assert image_token == model.config.image_token_id
    assert model.generation_config.eos_token_id[0] == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_tokenizer_is_what_the_generator_gives_and_round_trips():
    from transformers import AutoTokenizer

    from qwen_vl_sft.tools.tiny.processor import SPECIAL_TOKENS, build_processor

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    assert tokenizer.get_vocab() == build_processor().tokenizer.get_vocab()
    latin = "".join(map(chr, range(1, 256)))
    for text in ("The tallest bar is red.", "Zürich: 3,5 % (2014)\n\ttab", "図表 📊 и ещё", latin):
        normal = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == normal
    for token in SPECIAL_TOKENS:
        assert tokenizer(token)["input_ids"] == [tokenizer.convert_tokens_to_ids(token)]


def test_shared_rows_give_the_loss_of_separate_rows():
    """Several questions after one image are computed exactly as if each stood alone."""
    import torch

    from qwen_vl_sft.data.formats.chartqa import CHARTQA_SYSTEM_MESSAGE
    from qwen_vl_sft.tools.tiny import batches, model, processor

    torch.manual_seed(0)
    tiny_processor = processor.build_processor()
    tiny = model.build_model(tiny_processor).eval()
    batcher = batches.Batcher(tiny_processor)
    asked = [(charts.draw(chart), questions.ask(Random(1), chart, 3)) for chart in sampled_charts(2)]

    def logits(examples):
        batch = batcher(examples, CHARTQA_SYSTEM_MESSAGE, verbose=True)
        answer = batch.pop("labels")[:, 1:] != batches.IGNORE
        with torch.no_grad():
            return tiny(**batch).logits[:, :-1][answer]

    together = logits([batches.Example(image, asks) for image, asks in asked])
    apart = [logits([batches.Example(image, [question])]) for image, asks in asked for question in asks]
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-5, rtol=1e-4)


def test_pretraining_repeats_exactly():
    import torch

    from qwen_vl_sft.tools.tiny import model, pretrain, processor

    schedule = pretrain.Schedule(steps=3, caption_charts=3, charts=2)
    tiny_processor = processor.build_processor()
    runs, lines = [], []
    for _ in range(2):
        torch.manual_seed(0)
        tiny = model.build_model(tiny_processor)
        pretrain.pretrain(tiny, tiny_processor, schedule, held_out=(), report=lines.append)
        runs.append(tiny.state_dict())
    assert len(lines) == 4
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
