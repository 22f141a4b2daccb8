"""The kernels that make a step's inputs from its packet of integers."""

import pytest
import torch

from tests.kernels.device import DEVICE
from tpserve_kernels import step_inputs

GROUPS, SLOTS, WIDTH, LENGTH, BLOCK_SIZE = 2, 7, 5, 80, 16


def pool(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    tables = torch.randint(1000, (GROUPS, SLOTS, WIDTH), dtype=torch.int32, generator=generator)
    tokens = torch.randint(50000, (SLOTS, LENGTH), dtype=torch.int32, generator=generator)
    return tables.to(DEVICE), tokens.to(DEVICE)


@pytest.mark.parametrize("count", [0, 1, 127, 300])
def test_edits(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    tables, tokens = pool(generator)
    widths = torch.tensor([WIDTH] * (GROUPS * SLOTS) + [LENGTH] * SLOTS)
    places = [(row, column) for row, width in enumerate(widths.tolist()) for column in range(width)]
    chosen = [places[i] for i in torch.randperm(len(places), generator=generator)[:count].tolist()]
    chosen += [(-1, 3)] * 5  # padding
    rows, columns = torch.tensor(chosen, dtype=torch.int32).T.contiguous().to(DEVICE)
    values = torch.arange(len(chosen), dtype=torch.int32, device=DEVICE) + 100_000
    expected = tables.clone(), tokens.clone()
    step_inputs.apply_edits_reference(*expected, rows, columns, values)
    step_inputs.apply_edits(tables, tokens, rows, columns, values)
    assert torch.equal(tables, expected[0]) and torch.equal(tokens, expected[1])
    assert int((tables >= 100_000).sum() + (tokens >= 100_000).sum()) == count


@pytest.mark.parametrize("count", [1, 128, 200])
def test_rows(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    tables, tokens = pool(generator)
    slots = torch.randint(-1, SLOTS, (count,), dtype=torch.int32, generator=generator).to(DEVICE)
    positions = torch.randint(WIDTH * BLOCK_SIZE, (count,), dtype=torch.int32, generator=generator).to(DEVICE)
    rows = step_inputs.expand_rows(tables, tokens, slots, positions, BLOCK_SIZE)
    assert torch.equal(rows, step_inputs.expand_rows_reference(tables, tokens, slots, positions, BLOCK_SIZE))
    assert torch.equal(rows[2:] < 0, (slots < 0).expand(GROUPS, -1))
