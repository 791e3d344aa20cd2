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
from qwen_vl_sft.console import quiet_libraries
from qwen_vl_sft.errors import exits_with_user_errors
from qwen_vl_sft.resilience.signals import Watch
from qwen_vl_sft.training.options import Options


@exits_with_user_errors
def main() -> None:
    """Check the recipe, the data and the launch; load the model; train; write the run folder."""
    watch = Watch()
    watch.begin()
    rank = int(os.environ.get("RANK", "0"))
    quiet_libraries(rank)
    options = parse(Options, usage=__doc__)
    warn_of_untested_versions(rank)
    # The libraries take seconds to import; a mistyped command line needs none of them.
    from qwen_vl_sft.checkpointing.resume_check import checkpoint_to_resume
    from qwen_vl_sft.config.reading import read_recipe
    from qwen_vl_sft.distributed import launch, shared_folder
    from qwen_vl_sft.publishing import push_while_training
    from qwen_vl_sft.training import plan, precompute_features, safety, sft
    from qwen_vl_sft.training.prepared_data import prepare_data
    from qwen_vl_sft.training.resolve import resolve
    from qwen_vl_sft.training.run_signature import run_signature

    recipe = read_recipe(options.recipe, recipe_values(options.recipe_keys))
    run = resolve(recipe, launch.read_context(use_cpu=recipe.get("use_cpu")))
    recipe, context = run.recipe, run.context
    publisher = push_while_training.prepare(recipe, context)
    watch.folder = recipe.output_dir

    launch.start(context)
    data = prepare_data(run)
    plan.show(run, data, dry_run=options.dry_run)
    if options.dry_run:
        return

    about = run_signature(run, data)
    args = sft.sft_config(run)
    shared_folder.check_shared(recipe.output_dir, context)
    resume = checkpoint_to_resume(recipe, context, about)
    trainer = sft.build_trainer(run, args, data)
    if data.features:
        precompute_features.fill(trainer, data.features, recipe.data.bad_rows == "skip")
    if publisher:
        trainer.add_callback(publisher)
    if context.rank == 0:
        sft.begin_run_folder(run, data)
    safety.attach(trainer, recipe, context, watch, about, resume)
    with watch.while_training():
        metrics = sft.train(run, data, trainer, resume.path if resume else None)
        if context.rank == 0:
            sft.finish_run_folder(trainer, run.output_dir, metrics)
            print(plan.outcome(metrics, run.output_dir), flush=True)
    trainer.accelerator.end_training()
    if publisher:
        # The run folder is complete, and no process waits for this one any more.
        publisher.finish()


if __name__ == "__main__":
    main()
