"""Score a model on a split of the data: base, prompted and tuned on the same rows.

    python scripts/evaluate.py --run runs/quickstart
    accelerate launch --config_file accelerate_configs/ddp.yaml \\
        scripts/evaluate.py --run runs/chartqa --split test
    python scripts/evaluate.py --model_name_or_path Qwen/Qwen2-VL-2B-Instruct \\
        --dataset_name HuggingFaceM4/ChartQA
    python scripts/evaluate.py --predictions answers.jsonl

Writes rows.jsonl (every answer and its scores), summary.json, and report.html
(the scores and all rows with their charts, for a browser) into the output
folder. --resume continues a run that was killed.
"""

import os

from qwen_vl_sft.config.command_line import parse
from qwen_vl_sft.console import quiet_libraries
from qwen_vl_sft.errors import EXIT_INTERRUPTED, exits_with_user_errors, leave
from qwen_vl_sft.evaluation.options import EvaluateOptions, check_options, make_plan
from qwen_vl_sft.imports import quick_imports
from qwen_vl_sft.inference.source import ABOUT_ARMS
from qwen_vl_sft.serving.environments import python_of
from qwen_vl_sft.serving.registry import engine_named


@exits_with_user_errors
def main() -> None:
    """Score a model, or a file of predictions."""
    rank = int(os.environ.get("RANK", "0"))
    quiet_libraries(rank)
    options = parse(EvaluateOptions, usage=f"{__doc__}\n{ABOUT_ARMS}")
    check_options(options)
    if options.engine:
        python_of(engine_named(options.engine))  # told before the run is read, which takes seconds
    if options.predictions:
        score_file(options)
        return

    plan = make_plan(options)

    with quick_imports():
        from qwen_vl_sft.evaluation.answer_files import SETTINGS_FILE
        from qwen_vl_sft.evaluation.evaluate import evaluate
        from qwen_vl_sft.evaluation.scoring import REPORT_FILE, describe_cut, describe_engine, format_summary

    answering = None
    if options.engine:
        from qwen_vl_sft.serving.evaluating import EngineAnswerer

        answering = EngineAnswerer(options.engine)
    try:
        summary = evaluate(plan, report=True, answering=answering)
    except KeyboardInterrupt:
        further = f"; continue with --resume in {plan.output_dir}" if (plan.output_dir / SETTINGS_FILE).exists() else ""
        leave(EXIT_INTERRUPTED, f"\ninterrupted{further}", show=rank == 0)
    if summary is not None:
        precision = summary["precision"]
        note = "" if precision["scored_as_trained"] else f"; trained in: {precision['trained']}"
        skipped = f" (skipped {summary['skipped_rows']:,} that could not be read)" if summary["skipped_rows"] else ""
        print(f"\n{summary['dataset']}, {summary['rows']:,} rows{skipped}\nprecision: {precision['scored']}{note}\n")
        if cut := describe_cut(summary):
            print(f"answers cut {cut}; raise --max_new_tokens, with --overwrite, to have them whole\n")
        if engine := describe_engine(summary):
            print(f"{engine}\n")
        if summary["speed"]:
            arms = ", ".join(f"{arm} {speed['rows_per_second']:.3g}" for arm, speed in summary["speed"].items())
            print(f"rows a second, without loading: {arms}\n")
        print(f"{format_summary(summary)}\n\nwritten to {plan.output_dir}\nreport     {plan.output_dir / REPORT_FILE}")


def score_file(options: EvaluateOptions) -> None:
    """Score a file of predictions; files are written only where --output_dir says."""
    from qwen_vl_sft.evaluation.answer_files import check_output_dir
    from qwen_vl_sft.evaluation.prediction_files import score_predictions
    from qwen_vl_sft.evaluation.report import write_report
    from qwen_vl_sft.evaluation.scoring import format_summary, write_results

    assert options.predictions
    if options.output_dir:
        check_output_dir(options.output_dir, in_use_allowed=options.overwrite)
    rows, summary = score_predictions(options.predictions)
    print(f"{options.predictions}, {len(rows):,} rows\n\n{format_summary(summary)}")
    if options.output_dir:
        write_results(options.output_dir, rows, summary)
        write_report(options.output_dir, rows, summary)
        print(f"\nwritten to {options.output_dir}")


if __name__ == "__main__":
    main()
