"""The (token, expert) pairs of a step in the order of their experts, by counting instead of sorting.

Legend: T rows, A experts per token, P = T A pairs (pair t A + a is slot a of token t), R rows in the order of experts (as many as
pairs), L experts of this rank.
"""

import torch
import triton
import triton.language as tl


def permute(
    experts_TA: torch.Tensor, local_experts: range, expert_load_E: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pairs whose expert is local, ordered by expert, of one expert by token: (tokens_R, rows_TA, ends_L), all int32.

    tokens_R: [T A], the token of each row; undefined from ends_L[-1] on. rows_TA: [T, A], the row of each pair; -1 where the
    expert is not local. ends_L: row r belongs to local expert l for ends_L[l - 1] <= r < ends_L[l].
    Adds the number of pairs of every expert, local or not, to `expert_load_E` in place.

    experts_TA: [T, A] int32, contiguous, each below E; a negative id is of no expert. expert_load_E: int64 [E], contiguous.
    Errors: AssertionError when shapes, dtypes or layouts differ from this.
    """
    num_experts, num_active = len(expert_load_E), experts_TA.shape[1]
    assert experts_TA.dtype == torch.int32 and experts_TA.is_contiguous()
    assert expert_load_E.dtype == torch.int64 and expert_load_E.is_contiguous()
    assert 0 <= local_experts.start < local_experts.stop <= num_experts and local_experts.step == 1
    tokens_R = torch.empty(experts_TA.numel(), dtype=torch.int32, device=experts_TA.device)
    rows_TA = torch.empty_like(experts_TA)
    ends_L = torch.empty(len(local_experts), dtype=torch.int32, device=experts_TA.device)
    _permute_kernel[(num_experts,)](
        experts_TA, expert_load_E, tokens_R, rows_TA, ends_L, experts_TA.numel(), local_experts.start, len(local_experts),
        EXPERTS=num_experts, ACTIVE=num_active, BLOCK=4096, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return tokens_R, rows_TA, ends_L


def permute_reference(
    experts_TA: torch.Tensor, local_experts: range, expert_load_E: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`permute` in plain torch, on any device; rows of no pair have token 0."""
    known_P = experts_TA.flatten()
    expert_load_E += known_P[known_P >= 0].long().bincount(minlength=len(expert_load_E))
    tokens_R = torch.zeros_like(known_P)
    rows_TA, ends, end = torch.full_like(experts_TA, -1), [], 0
    for expert in local_experts:
        token, slot = (experts_TA == expert).nonzero(as_tuple=True)
        rows_TA[token, slot] = torch.arange(end, end + len(token), dtype=torch.int32, device=token.device)
        tokens_R[end : end + len(token)] = token.int()
        end += len(token)
        ends.append(end)
    return tokens_R, rows_TA, torch.tensor(ends, dtype=torch.int32, device=experts_TA.device)


@triton.jit(do_not_specialize=["num_pairs", "first", "num_local"], do_not_specialize_on_alignment=["load_ptr"])
def _permute_kernel(
    experts_ptr, load_ptr, tokens_ptr, rows_ptr, ends_ptr, num_pairs, first, num_local,
    EXPERTS: tl.constexpr, ACTIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per expert. Experts are numbered from this rank's first one on, so that its own come first."""
    place = tl.program_id(0)
    pair = tl.arange(0, BLOCK)
    before, own = tl.full((BLOCK,), 0, tl.int32), tl.full((BLOCK,), 0, tl.int32)
    for at in range(0, num_pairs, BLOCK):
        expert = tl.load(experts_ptr + at + pair, mask=at + pair < num_pairs, other=-1)
        place_of = tl.where(expert < 0, EXPERTS, (expert + EXPERTS - first) % EXPERTS)
        before += (place_of < place).to(tl.int32)
        own += (place_of == place).to(tl.int32)
    start, count = tl.sum(before), tl.sum(own)
    load_ptr += (place + first) % EXPERTS
    tl.store(load_ptr, tl.load(load_ptr) + count)
    tl.store(ends_ptr + place, start + count, mask=place < num_local)
    local_pairs = tl.where(place < num_local, num_pairs, 0)  # pairs of another rank's expert have no rows
    for at in range(0, local_pairs, BLOCK):
        inside = at + pair < num_pairs
        expert = tl.load(experts_ptr + at + pair, mask=inside, other=-1)
        place_of = tl.where(expert < 0, EXPERTS, (expert + EXPERTS - first) % EXPERTS)
        mine = place_of == place
        row = start + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(tokens_ptr + row, (at + pair) // ACTIVE, mask=mine)
        remote = inside & (place_of >= tl.where(place == 0, num_local, EXPERTS + 1))  # the first program writes them
        tl.store(rows_ptr + at + pair, tl.where(mine, row, -1), mask=mine | remote)
        start += tl.sum(mine.to(tl.int32))
