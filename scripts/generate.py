"""Answer a question about images with the base model, the tuned one, or both.

    python scripts/generate.py --run runs/quickstart \\
        --images chart.png --question "Which bar is the tallest?"
    python scripts/generate.py --run runs/chartqa_qlora \\
        --images chart.png --arms base,prompted,tuned
    python scripts/generate.py --model_name_or_path Qwen/Qwen2-VL-2B-Instruct \\
        --images a.png b.png --question "What changed?"

The answer appears as it is generated; times go to the standard error. Prompt
and decoding are those of scripts/evaluate.py. Without --question, every line of
the standard input is one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qwen_vl_sft.config.command_line import parse
from qwen_vl_sft.console import quiet_libraries
from qwen_vl_sft.errors import EXIT_INTERRUPTED, UserError, exits_with_user_errors, format_error
from qwen_vl_sft.imports import quick_imports
from qwen_vl_sft.inference.options import GenerateOptions, check_options, choose_arms, read_questions
from qwen_vl_sft.inference.source import ABOUT_ARMS, read_source

if TYPE_CHECKING:
    from qwen_vl_sft.data.conversation import Conversation
    from qwen_vl_sft.inference.answering import Answerer


@exits_with_user_errors
def main() -> None:
    """Check everything, load the models once, answer question after question."""
    quiet_libraries(rank=0)
    options = parse(GenerateOptions, usage=f"{__doc__}\n{ABOUT_ARMS}")
    check_options(options)
    tuned_needed = options.arms is None or "tuned" in options.arms
    source = read_source(options.run, options.recipe_keys, tuned_needed)
    arms = choose_arms(options, source.system_message)

    with quick_imports():
        from qwen_vl_sft.inference.answering import Answerer, ask, read_images

    images = read_images(options.images)
    answerer = Answerer([source])
    if options.question is not None:
        for arm in arms:  # a forged token ends here, before the model is loaded
            answerer.check(ask(options.question, images), answerer.encoder(arm))
    answerer.load(arms)
    try:
        for question in read_questions(options):
            try:
                answer(options, answerer, arms, question, ask(question, images))
            except UserError as error:
                if options.question is not None or not sys.stdin.isatty():
                    raise
                print(format_error(error), file=sys.stderr)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # who reads the answers has gone, and Python must not flush to him again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def answer(
    options: GenerateOptions, answerer: Answerer, arms: Sequence[str], question: str, conversation: Conversation
) -> None:
    """Answer one question with every arm, and print it."""
    from qwen_vl_sft.inference.answer_lines import describe, format_table, print_stream, to_json

    answers, most = {}, answerer.sources[0].recipe.run.max_new_tokens
    for arm in arms:
        coming = answerer.stream(conversation, arm, answerer.encoder(arm), most)
        if options.json:
            *_, answers[arm] = coming
            continue
        if len(arms) > 1:
            print(f"[{arm}]")
        answers[arm] = print_stream(coming)
        print(f"({describe(answers[arm])})", file=sys.stderr)
    if options.json:
        print(to_json(question, options.images, answerer.sources[0], answers), flush=True)
    elif len(arms) > 1:
        print(f"\n{format_table(answers)}", flush=True)


if __name__ == "__main__":
    main()
