"""Fine-tune a Qwen-VL model on the data of a recipe, on one process or many.

accelerate launch --config_file accelerate_configs/ddp.yaml \\
    scripts/sft.py --recipe recipes/chartqa_qlora.yaml
python scripts/sft.py --recipe recipes/chartqa_qlora.yaml \\
    --learning_rate 1e-4 --dry_run
"""

from __future__ import annotations

import os

from qwen_vl_sft.compat.tested_versions import warn_of_untested_versions
from qwen_vl_sft.config.command_line import parse, recipe_values
from qwen_vl_sft.config.reading import read_recipe
from qwen_vl_sft.console import quiet_libraries
from qwen_vl_sft.distributed.allocator import use_growing_segments
from qwen_vl_sft.errors import exits_with_user_errors
from qwen_vl_sft.imports import quick_imports
from qwen_vl_sft.resilience.signals import SignalWatcher
from qwen_vl_sft.training.options import TrainOptions


@exits_with_user_errors
def main() -> None:
    """Check the recipe, the data and the launch; load the model; train; write the run folder; publish it."""
    watcher = SignalWatcher()
    watcher.begin()
    rank = int(os.environ.get("RANK", "0"))
    quiet_libraries(rank)
    options = parse(TrainOptions, usage=__doc__)
    warn_of_untested_versions(rank)
    use_growing_segments(os.environ)
    recipe = read_recipe(options.recipe, recipe_values(options.recipe_keys, options))
    # The libraries take seconds to import; a mistyped command line or recipe needs none of them.
    with quick_imports():
        from qwen_vl_sft.distributed import launch
        from qwen_vl_sft.distributed.context import read_context
        from qwen_vl_sft.training import plan
        from qwen_vl_sft.training.prepared_data import prepare_data
        from qwen_vl_sft.training.resolve import resolve

    # Settings and world
    run = resolve(recipe, read_context(use_cpu=recipe.get("use_cpu")))
    publisher = None
    if run.recipe.run.push_to_hub:
        with quick_imports():
            from qwen_vl_sft.publishing import push_while_training
        publisher = push_while_training.prepare(run.recipe, run.context)
    watcher.report_stop_in(run.output_dir)
    launch.start(run.context)
    if options.dry_run:
        plan.show(run, prepare_data(run), dry_run=True)
        return

    # The Trainer's libraries, of which a dry run needs nothing
    with quick_imports():
        from qwen_vl_sft.training import sft
        from qwen_vl_sft.training.run_signature import run_signature
        from qwen_vl_sft.training.trainer_setup import build_trainer, sft_config

    with sft.claim_output_dir(run, watcher):
        # Data and plan
        data = prepare_data(run)
        plan.show(run, data, dry_run=False)

        # Trainer and training
        args = sft_config(run)
        signature = run_signature(run, data)
        resume = sft.find_resume(run, signature)
        callbacks = [publisher] if publisher else []
        trainer = build_trainer(run, args, data, resume, watcher, signature, callbacks)
        sft.train(run, data, trainer, resume, watcher)

        # Publishing: the run folder is complete, and no process waits for this one any more.
        if publisher:
            publisher.finish()


if __name__ == "__main__":
    main()
