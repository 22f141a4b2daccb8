"""What a step reads of the request pool on the device, made from one packet of integers of the host: two launches a step.

Legend: X slots, W blocks of a slot's table, L tokens of a slot, G cache groups; N edits, T rows of a step. A row whose slot is
negative is padding.
"""

import torch
import triton
import triton.language as tl

BLOCK = 128
"""Edits, or rows, per program."""


def apply_edits(
    tables_GXW: torch.Tensor, tokens_XL: torch.Tensor, rows_N: torch.Tensor, columns_N: torch.Tensor, values_N: torch.Tensor
) -> None:
    """Write values_N[i] to entry columns_N[i] of row rows_N[i], in place. No entry occurs twice with different values.

    Row g X + x is the block table of slot x in group g, row G X + x its tokens; a negative row is skipped.
    tables_GXW, tokens_XL: int32, contiguous; the edits: [N] int32, contiguous, inside these (not checked).
    """
    num_edits = len(rows_N)
    assert tables_GXW.is_contiguous() and tokens_XL.is_contiguous() and tokens_XL.shape[0] == tables_GXW.shape[1]
    assert rows_N.shape == columns_N.shape == values_N.shape == (num_edits,)
    if num_edits:
        _edits_kernel[(triton.cdiv(num_edits, BLOCK),)](
            tables_GXW, tokens_XL, rows_N, columns_N, values_N, num_edits, tables_GXW.shape[0] * tables_GXW.shape[1],
            tables_GXW.shape[2], tokens_XL.shape[1], BLOCK=BLOCK, enable_fp_fusion=False,
        )  # fmt: skip


def apply_edits_reference(
    tables_GXW: torch.Tensor, tokens_XL: torch.Tensor, rows_N: torch.Tensor, columns_N: torch.Tensor, values_N: torch.Tensor
) -> None:
    """`apply_edits` in plain torch, on any device."""
    of_tables = tables_GXW.shape[0] * tables_GXW.shape[1]
    table_N, token_N = (rows_N >= 0) & (rows_N < of_tables), rows_N >= of_tables
    tables_GXW.view(of_tables, -1)[rows_N[table_N], columns_N[table_N]] = values_N[table_N]
    tokens_XL[rows_N[token_N] - of_tables, columns_N[token_N]] = values_N[token_N]


def expand_rows(
    tables_GXW: torch.Tensor, tokens_XL: torch.Tensor, slots_T: torch.Tensor, positions_T: torch.Tensor, block_size: int
) -> torch.Tensor:
    """The integers that each row of a step needs: int64 [2 + G, T], rows strided.

    Row 0: the token tokens_XL[slot, position]; row 1: the position; row 2 + g: where the row's key goes in group g,
    tables_GXW[g, slot, position // block_size] * block_size + position % block_size. Padding has token 0, and -1 for the key.
    tables_GXW, tokens_XL: as for `apply_edits`; slots_T, positions_T: [T] int32, contiguous.
    """
    num_rows = len(slots_T)
    assert tables_GXW.is_contiguous() and tokens_XL.is_contiguous() and slots_T.shape == positions_T.shape == (num_rows,)
    groups, slots, width = tables_GXW.shape
    stride = num_rows + num_rows % 2  # each row begins at a multiple of 16 bytes
    out = torch.empty(2 + groups, stride, dtype=torch.int64, device=tokens_XL.device)[:, :num_rows]
    _rows_kernel[(triton.cdiv(num_rows, BLOCK),)](
        tables_GXW, tokens_XL, slots_T, positions_T, out, num_rows, stride, slots, width, tokens_XL.shape[1],
        GROUPS=groups, PAGE=block_size, BLOCK=BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def expand_rows_reference(
    tables_GXW: torch.Tensor, tokens_XL: torch.Tensor, slots_T: torch.Tensor, positions_T: torch.Tensor, block_size: int
) -> torch.Tensor:
    """`expand_rows` in plain torch, on any device."""
    slots_T, positions_T = slots_T.long(), positions_T.long()
    padding_T, slots_T = slots_T < 0, slots_T.clamp(min=0)
    keys = [table[slots_T, positions_T // block_size].long() * block_size + positions_T % block_size for table in tables_GXW]
    tokens_T = tokens_XL[slots_T, positions_T].long().masked_fill(padding_T, 0)
    return torch.stack([tokens_T, positions_T, *(keys_T.masked_fill(padding_T, -1) for keys_T in keys)])


@triton.jit(do_not_specialize=["num_edits", "of_tables", "width", "length"])
def _edits_kernel(
    tables_ptr, tokens_ptr, rows_ptr, columns_ptr, values_ptr, num_edits, of_tables, width, length, BLOCK: tl.constexpr
):
    """One program per BLOCK edits."""
    edit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = edit < num_edits
    row = tl.load(rows_ptr + edit, mask=known, other=-1).to(tl.int64)
    column = tl.load(columns_ptr + edit, mask=known, other=0)
    value = tl.load(values_ptr + edit, mask=known, other=0)
    tl.store(tables_ptr + row * width + column, value, mask=(row >= 0) & (row < of_tables))
    tl.store(tokens_ptr + (row - of_tables) * length + column, value, mask=row >= of_tables)


@triton.jit(do_not_specialize=["num_rows", "stride", "num_slots", "width", "length"])
def _rows_kernel(
    tables_ptr, tokens_ptr, slots_ptr, positions_ptr, out_ptr, num_rows, stride, num_slots, width, length,
    GROUPS: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK rows."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = row < num_rows
    slot = tl.load(slots_ptr + row, mask=known, other=-1).to(tl.int64)
    position = tl.load(positions_ptr + row, mask=known, other=0)
    real = slot >= 0
    token = tl.load(tokens_ptr + slot * length + position, mask=real, other=0)
    tl.store(out_ptr + row, token.to(tl.int64), mask=known)
    tl.store(out_ptr + stride + row, position.to(tl.int64), mask=known)
    for group in tl.static_range(GROUPS):
        entry = (group * num_slots + slot) * width + position // PAGE
        block = tl.load(tables_ptr + entry, mask=real, other=0).to(tl.int64)
        key = tl.where(real, block * PAGE + position % PAGE, -1)
        tl.store(out_ptr + (2 + group) * stride + row, key, mask=known)
