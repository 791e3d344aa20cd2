"""What a strategy asks of a model before it trains."""

import pytest

from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.training.model_setup import needs_vision_in_every_batch


@pytest.mark.parametrize(
    ("strategy", "processes", "trains", "needed"),
    [
        ("single", 1, True, False),
        ("ddp", 2, True, True),
        ("ddp", 2, False, False),
        ("zero2", 1, True, False),
        ("zero2", 2, True, True),
        ("zero2", 2, False, False),
        ("zero3", 1, True, True),
        ("zero3", 1, False, False),
        ("zero3", 2, False, True),
        ("fsdp2", 2, False, True),
    ],
)
def test_text_alone_runs_the_tower_where_others_wait_or_an_old_gradient_would_count(
    strategy, processes, trains, needed
):
    context = DistributedContext(strategy, processes=processes, rank=0, local_rank=0, on_cpu=True)
    assert needs_vision_in_every_batch(context, vision_frozen=not trains) == needed
