"""Questions about a chart, each with one answer in three styles: a ChartQA label, a short sentence, a full sentence."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from qwen_vl_sft.tools.tiny.charts import COLORS, MAX_VALUE, Chart

# For each kind of chart: what an item is called, and the words for more, most and least.
WORDS = {
    "bar": ("bar", "taller", "tallest", "shortest"),
    "hbar": ("bar", "longer", "longest", "shortest"),
    "line": ("point", "higher", "highest", "lowest"),
    "pie": ("slice", "larger", "largest", "smallest"),
}

# System messages of pretraining, and the style of answer that each asks for.
DEFAULT_PROMPT = "You are a helpful assistant."  # what the chat template inserts when there is no system message

BRIEF_PROMPTS = (
    "Answer with a single word, number, or short phrase.",
    "Be concise.",
    "You are a helpful assistant. Give short answers.",
    "Analyze the chart image and respond with concise answers. Avoid additional explanation.",
)
VERBOSE_PROMPTS = (
    "Answer in full sentences.",
    "You are a helpful assistant. Explain what the chart shows in a full sentence.",
)


@dataclass(frozen=True)
class Question:
    """One question: `label` is the ChartQA answer, `sentence` the verbose one, `brief` what a short reply would say.

    `topic` names the kind of question; `human` says whether the wording is one of the free ones or the template.
    """

    topic: str
    text: str
    label: str
    brief: str
    sentence: str
    human: bool


def _number(topic: str, texts: list[str], value: int, sentence: str) -> tuple:
    """Build a question about a number; its short reply is the number itself."""
    return topic, texts, str(value), str(value), sentence


def _color(topic: str, texts: list[str], color: str, sentence: str) -> tuple:
    """Build a question about a color; its short reply is the color with a full stop, which the label lacks."""
    return topic, texts, color, f"{color}.", sentence


def _yes_no(topic: str, texts: list[str], truth: bool, yes: str, no: str, verb: str) -> tuple:
    """Build a yes-or-no question; its short reply is a short sentence."""
    if truth:
        return topic, texts, "Yes", f"Yes, {verb}.", f"Yes, {yes}."
    return topic, texts, "No", f"No, {verb} not.", f"No, {no}."


def _count(rng: Random, chart: Chart) -> tuple:
    noun, count = WORDS[chart.kind][0], len(chart.values)
    texts = [f"How many {noun}s are there?", f"How many {noun}s does the chart have?", f"Count the {noun}s."]
    return _number("count", texts, count, f"There are {count} {noun}s.")


def _value(rng: Random, chart: Chart) -> tuple:
    color, noun = rng.choice(chart.colors), WORDS[chart.kind][0]
    item = f"the {color} {noun}"
    texts = [f"What is the value of {item}?", f"What value does {item} show?", f"How much is {item}?"]
    return _number("value", texts, chart.value(color), f"The value of {item} is {chart.value(color)}.")


def _extreme(rng: Random, chart: Chart) -> tuple:
    pick, word, other = rng.choice([(max, "highest", "maximum"), (min, "lowest", "minimum")])
    value = pick(chart.values)
    texts = [f"What is the {word} value?", f"What is the {other} value in the chart?", f"Give the {word} value."]
    return _number("extreme", texts, value, f"The {word} value is {value}.")


def _above(rng: Random, chart: Chart) -> tuple:
    limit, noun = rng.randint(2, MAX_VALUE - 1), WORDS[chart.kind][0]
    count = sum(value > limit for value in chart.values)
    texts = [f"How many {noun}s are above {limit}?", f"How many {noun}s have a value greater than {limit}?"]
    items = f"There is 1 {noun}" if count == 1 else f"There are {count} {noun}s"
    return _number("above", texts, count, f"{items} above {limit}.")


def _most(rng: Random, chart: Chart) -> tuple:
    noun, _, most, least = WORDS[chart.kind]
    pick, word = rng.choice([(max, most), (min, least)])
    color = chart.colors[chart.values.index(pick(chart.values))]
    texts = [f"Which color is the {word} {noun}?", f"What is the color of the {word} {noun}?"]
    texts.append(f"Which {noun} is the {word}?")
    return _color("most", texts, color, f"The {word} {noun} is {color}.")


def _end(rng: Random, chart: Chart) -> tuple:
    noun = WORDS[chart.kind][0]
    index, word = rng.choice([(0, "first"), (-1, "last")])
    color = chart.colors[index]
    texts = [f"Which color is the {word} {noun}?", f"What is the color of the {word} {noun}?"]
    return _color("end", texts, color, f"The {word} {noun} is {color}.")


def _compare(rng: Random, chart: Chart) -> tuple:
    noun, more, _, _ = WORDS[chart.kind]
    first, second = rng.sample(chart.colors, 2)
    a, b = f"the {first} {noun}", f"the {second} {noun}"
    texts = [f"Is {a} {more} than {b}?", f"Does {a} have a larger value than {b}?"]
    truth = chart.value(first) > chart.value(second)
    return _yes_no("compare", texts, truth, f"{a} is {more} than {b}", f"{a} is not {more} than {b}", "it is")


def _exists(rng: Random, chart: Chart) -> tuple:
    noun, truth = WORDS[chart.kind][0], rng.random() < 0.5
    color = rng.choice([color for color in COLORS if (color in chart.colors) == truth])
    item = f"{'an' if color[0] in 'aeiou' else 'a'} {color} {noun}"
    texts = [f"Is there {item}?", f"Does the chart have {item}?", f"Can you see {item}?"]
    return _yes_no("exists", texts, truth, f"there is {item}", f"there is no {color} {noun}", "there is")


TOPICS: tuple[Callable[[Random, Chart], tuple], ...] = (
    _count, _most, _compare, _exists, _value, _extreme, _above, _end,
)  # fmt: skip
PIE_TOPICS = TOPICS[:4]  # a pie has no axis and no first slice


def captions(rng: Random, chart: Chart) -> list[Question]:
    """Return captions of the whole chart, for pretraining only: items by size and in order, values, and a census of colors.

    The census names every color from a given one on, each with its value or 0 at once: the model must find an item by
    its color, which is what most questions need and what it hardly learns from them alone.
    """
    noun, pie = WORDS[chart.kind][0], chart.kind == "pie"  # a pie has no axis and no first slice
    values = dict(zip(chart.colors, chart.values, strict=True))
    ranked = sorted(values, key=lambda color: -values[color])
    start = rng.randrange(len(COLORS))
    turned = [*COLORS][start:] + [*COLORS][:start]
    census = [f"{color}{min(values.get(color, 0), 1 if pie else MAX_VALUE)}" for color in turned]
    listings = [(f"Rank the {noun}s.", "By size", ranked), (f"Find all from {turned[0]}.", "By color", census)]
    if not pie:
        listings.append((f"List the {noun}s.", "In order", list(chart.colors)))
        listings.append((f"Sort the {noun}s.", "By value", [str(values[color]) for color in ranked]))
    made = []
    for text, way, items in listings:
        listed = ", ".join(items)
        made.append(Question(way, text, listed, f"{listed}.", f"{way}, the {noun}s are {listed}.", human=False))
    return made


def ask(rng: Random, chart: Chart, number: int) -> list[Question]:
    """Return `number` questions about the chart (at most 4 for a pie, 8 otherwise), all on different topics."""
    questions = []
    for make in rng.sample(PIE_TOPICS if chart.kind == "pie" else TOPICS, number):
        topic, texts, label, brief, sentence = make(rng, chart)
        human = rng.random() < 0.5
        text = rng.choice(texts[1:]) if human else texts[0]
        questions.append(Question(topic, text, label, brief, sentence, human))
    return questions
