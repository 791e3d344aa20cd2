"""Silence known noise of the libraries on the terminal, each piece with its reason."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries(rank: int) -> None:
    """Silence messages that need no action, and all progress bars but the first rank's. Call it before imports."""
    # DeepSpeed says at import that there is no GPU; the plan says where the run computes.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # bitsandbytes offers an optional kernel for 4-bit inference on CPUs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # datasets says the error of a file with all of its schema, before it raises it.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    # PEFT and TRL still use names that transformers renamed; it asks the libraries, not the user.
    for renamed in ("is_gradient_checkpointing", "gradient_checkpointing", "gradient_checkpointing_kwargs"):
        warnings.filterwarnings("ignore", message=f"`{renamed}` is deprecated", category=FutureWarning)
    # transformers says that it aligned the model's padding token with the tokenizer's, as it should; a second process
    # says everything again.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if rank:
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
