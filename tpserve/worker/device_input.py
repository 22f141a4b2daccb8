"""Builds the model's input on a card: the integers of a step go there in one copy, and two kernels make the rest of them.

The integers are eight arrays of int32, in this order: slot (negative for padding) and position of each row [T]; the chunks' query
starts [R + 1], context lengths [R] and slots [R]; rows (negative for padding), columns and values of the edits [N].

R: chunks of the step, T: rows (positions) of the step, N: edits of the request pool.
"""

from array import array
from collections.abc import Sequence
from itertools import chain

import torch

from tpserve.attention.metadata import AttentionMetadata, ModelInput
from tpserve.worker.host_arrays import copy_arrays
from tpserve.worker.input_batch import ChunkArrays, build_model_input
from tpserve.worker.request_pool import RequestPool


def step_integers(chunks: ChunkArrays, request_pool: RequestPool) -> "list[array[int]]":
    """The integers of a plan that `request_pool.update` has applied already. Takes the edits of the pool."""
    rows = zip(chunks.slots, chunks.starts, chunks.ends, strict=True)
    positions = array("i", chain.from_iterable(range(start, end) for _, start, end in rows))
    row_slots = array("i", chain.from_iterable([slot] * n for slot, n in zip(chunks.slots, chunks.counts, strict=True)))
    of_chunks = array("i", chunks.query_starts), array("i", chunks.ends), array("i", chunks.slots)
    return [row_slots, positions, *of_chunks, *request_pool.edits.take()]


def build(chunks: ChunkArrays, request_pool: RequestPool) -> ModelInput:
    """The model's input on the pool's device, for a plan that `request_pool.update` has applied already."""
    if request_pool.device_tables is None:
        return build_model_input(chunks, request_pool)
    integers = copy_arrays(step_integers(chunks, request_pool), request_pool.tokens.device)
    return model_input(integers, request_pool, tuple(chunks.counts), tuple(chunks.ends))


def model_input(
    integers: Sequence[torch.Tensor], request_pool: RequestPool, query_lens: tuple[int, ...], context_lens: tuple[int, ...]
) -> ModelInput:
    """Apply the edits, and make the model's input from a step's integers on the card.

    `query_lens`, `context_lens`: R integers of the host, which only choose the shape of the launches.
    """
    from tpserve_kernels import step_inputs

    row_slots_T, row_positions_T, query_starts_R1, context_lens_R, slots_R, *edits = integers
    tables, tokens = request_pool.device_tables, request_pool.tokens
    assert tables is not None, "a request pool on a card"
    step_inputs.apply_edits(tables, tokens, *edits)
    tokens_T, positions_T, *write_slots = step_inputs.expand_rows(
        tables, tokens, row_slots_T, row_positions_T, request_pool.block_size
    ).unbind(0)
    groups = tuple(
        AttentionMetadata(
            query_starts=query_starts_R1,
            context_lens=context_lens_R,
            tables=tables[group],
            write_slots=write_slots[group],
            query_lens_host=query_lens,
            context_lens_host=context_lens,
            window=window,
            table_rows=slots_R,
        )
        for group, window in enumerate(request_pool.windows)
    )
    return ModelInput(tokens_T, positions_T, groups)
