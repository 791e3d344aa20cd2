"""Whether the rows fit micro-batches and steps of a packed run; padded batches take rows of any length."""

from __future__ import annotations

from collections.abc import Iterator

from qwen_vl_sft.config.settings import RunSettings
from qwen_vl_sft.data.dataset import ROW_ID, Rows
from qwen_vl_sft.data.row_lengths import RowLengths


def problems_of_lengths(rows: Rows, lengths: RowLengths, run: RunSettings, processes: int) -> Iterator[str]:
    """Yield why rows of these lengths cannot be trained on as the recipe packs them."""
    if not run.packing:
        return
    longest, budget = int(lengths.tokens.max()), run.tokens_per_batch
    if longest > budget:
        longer, row_id = int((lengths.tokens > budget).sum()), rows.dataset[int(lengths.tokens.argmax())][ROW_ID]  # type: ignore[index]
        yield (
            f"tokens_per_batch {budget:,}: {longer:,} of {len(rows):,} rows are longer, the longest"
            f" ({rows.name_of(row_id)}) with {longest:,} tokens; raise tokens_per_batch, lower max_pixels, or leave"
            f" them out with max_length: {budget} and overlong: drop"
        )
    # Each step must have a row for each process, and two at least.
    elif run.global_batch_tokens is not None and run.global_batch_tokens < (least := max(2, processes)) * longest:
        why = f"for {processes:,} processes" if processes > 2 else "so that no step is empty"
        yield (
            f"global_batch_tokens {run.global_batch_tokens:,}: the longest row has {longest:,} tokens, and a step must have"
            f" room for {least:,} such rows {why}; write {least * longest:,} or more, or lower max_pixels"
        )
