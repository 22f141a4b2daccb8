"""A mixture of experts (MoE; Shazeer et al. 2017, arXiv:1701.06538) in place of the MLP: a router, this rank's share of the
experts, and a shared expert in some models.

Every rank of a stage has every token. Each rank routes all tokens (with equal bits) and computes its share of the experts: a
range of whole experts (expert parallelism) or some channels of every expert. The all-reduce at the end adds up the shares.
Invariant: a row's bits do not depend on the other rows or on their experts, but for the shared expert's products on CUDA.

On CUDA a layer without a shared expert is seven launches, and nothing of it asks the device for a number, so that a graph can
capture it.

Legend: T rows, H hidden channels, E experts, A experts per token, P = T A (token, expert) pairs, I intermediate channels of an
expert on this rank, R rows sorted by expert.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from tpserve.layers.mlp import MLP
from tpserve.layers.packing import Packer
from tpserve.layers.routing import Routing
from tpserve.parallel.group import Group
from tpserve.quant.grouped import grouped_matmul
from tpserve.quant.matmul import matmul
from tpserve.quant.packed import Stack, Weight
from tpserve.quant.product import Product, of_experts, of_weight


@dataclass(frozen=True)
class TokenPermutation:
    """(token, expert) pairs sorted by local expert: rows [ends_E[e - 1], ends_E[e]) belong to local expert e."""

    tokens_R: torch.Tensor
    """int64: the token of each row"""
    ends_E: torch.Tensor
    """int32 [local experts]: the end of each local expert's rows"""
    rows_TA: torch.Tensor
    """int64: the row of each pair; 0 for an expert of another rank"""
    remote_TA: torch.Tensor
    """bool: the expert is on another rank"""
    counts: torch.Tensor
    """int64 [num_experts]: tokens of each expert of the layer"""

    @staticmethod
    def of(experts_TA: torch.Tensor, local_experts: range, num_experts: int) -> "TokenPermutation":
        """Sort the pairs of `experts_TA` (int64 ids), on the CPU."""
        device, num_pairs = experts_TA.device, experts_TA.numel()
        ours_P = (experts_TA.flatten() - local_experts.start) % num_experts  # this rank's experts are the first ones
        counts = torch.zeros(num_experts, dtype=torch.int64, device=device).scatter_add_(0, ours_P, torch.ones_like(ours_P))
        ends_E = counts.cumsum(0)[: len(local_experts)].int()
        order_P = torch.argsort(ours_P, stable=True)
        rows_P = torch.empty_like(order_P)
        rows_P[order_P] = torch.arange(num_pairs, device=device)
        tokens_R = (order_P // experts_TA.shape[1])[: int(ends_E[-1])]
        remote_TA = (ours_P >= len(local_experts)).view_as(experts_TA)
        rows_TA = rows_P.view_as(experts_TA).masked_fill(remote_TA, 0)
        return TokenPermutation(tokens_R, ends_E, rows_TA, remote_TA, counts.roll(local_experts.start))


@dataclass(frozen=True)
class Experts:
    """This rank's share of the `count` experts of a layer, split over ranks by expert or by channel."""

    count: int
    local_experts: range
    gate_up_EI2H: Stack
    activate: Callable[..., torch.Tensor]
    """A gated function of `activation.py`: [R, 2 I] -> [R, I]. It defines the order of gate and up."""
    down_EHI: Stack
    gate_up_bias_EI2: torch.Tensor | None = None
    down_bias_EH: torch.Tensor | None = None
    """When experts are split by channel, only one rank has it."""

    def partial_sum(self, x_TH: torch.Tensor, weights_TA: torch.Tensor, permutation: TokenPermutation) -> torch.Tensor:
        """This rank's term of the weighted sum over each token's experts: float32 [T, H]. `weights_TA`: float32."""
        if not len(permutation.tokens_R):
            return torch.zeros_like(x_TH, dtype=torch.float32)
        out_RH = self.rows(x_TH, permutation.tokens_R, permutation.ends_E)
        out_TAH = out_RH[permutation.rows_TA].float().mul_(weights_TA.unsqueeze(2))
        if len(self.local_experts) < self.count:
            out_TAH.masked_fill_(permutation.remote_TA.unsqueeze(2), 0)
        return out_TAH.sum(1)

    def rows(self, x_TH: torch.Tensor, tokens_R: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
        """What each local expert makes of its rows: [R, H] in the dtype of `x`; rows from ends_E[-1] on are undefined."""
        gate_up_RI2 = grouped_matmul(x_TH, self.gate_up_EI2H, ends_E, self.gate_up_bias_EI2, tokens_R)
        active_RI = self.activate(gate_up_RI2, num_rows=ends_E[-1:])
        del gate_up_RI2
        return grouped_matmul(active_RI, self.down_EHI, ends_E, self.down_bias_EH)


@dataclass(frozen=True)
class MoE:
    """One MoE layer on one rank.

    `router`: float32 [E, H], or [E + 1, H] when the shared expert has a gate, which is the last row.
    `expert_load`: int64 [E], the tokens of each expert so far (`ExpertLoadCounter`). Every rank of a stage counts all tokens.
    """

    router: Weight
    routing: Routing
    experts: Experts
    shared: MLP | None
    expert_load: torch.Tensor
    tp: Group

    def __call__(self, x_TH: torch.Tensor, slots_T: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H] in the dtype of `x`, summed over ranks. Padding rows go to no expert, and are zero in the result.

        `slots_T`: where each row's key goes (`AttentionMetadata.write_slots`). Padding rows have negative entries on CUDA; on the
        CPU, where they are the last ones, none.
        """
        if x_TH.is_cuda:
            return self.tp.all_reduce(self.kernels_sum(x_TH, slots_T))
        rows = len(slots_T)
        padding, x_TH = len(x_TH) - rows, x_TH[:rows]
        logits_TE = matmul(x_TH.float(), self.router)
        weights_TA, experts_TA = self.routing(logits_TE[:, : self.experts.count])
        permutation = TokenPermutation.of(experts_TA, self.experts.local_experts, self.experts.count)
        self.expert_load.add_(permutation.counts)
        out_TH = self.experts.partial_sum(x_TH, weights_TA, permutation)
        if self.shared is not None:
            shared_TH = self.shared.partial_sum(x_TH).float()
            gate_Tg = logits_TE[:, self.experts.count :]
            out_TH += shared_TH / (1 + torch.exp(-gate_Tg)) if gate_Tg.shape[1] else shared_TH
        return self.tp.all_reduce(F.pad(out_TH.to(x_TH.dtype), (0, 0, 0, padding)))

    def kernels_sum(self, x_TH: torch.Tensor, slots_T: torch.Tensor) -> torch.Tensor:
        """This rank's term of the result, on CUDA: [T, H] in the dtype of `x`."""
        from tpserve_kernels import combination, permutation, router

        experts = self.experts
        assert isinstance(self.router, torch.Tensor), "nothing is packed on CUDA"
        terms_CTN = router.router_logits(x_TH, self.router)
        weights_TA, experts_TA, gate_T = self.routing.from_terms(terms_CTN, experts.count, slots_T)
        del terms_CTN
        tokens_R, rows_TA, ends_E = permutation.permute(experts_TA, experts.local_experts, self.expert_load)
        out_RH = experts.rows(x_TH, tokens_R, ends_E)
        shared_TH = None if self.shared is None else self.shared.partial_sum(x_TH)
        return combination.combine(out_RH, rows_TA, weights_TA, shared_TH, gate_T, slots_T)

    def products(self, dtype: torch.dtype) -> Iterator[Product]:
        """The matrix products of this layer, for the self-test: the router's in float32, the others with weights of `dtype`."""
        yield of_weight(self.router, torch.float32)
        yield of_experts(self.experts.gate_up_EI2H, dtype)
        yield of_experts(self.experts.down_EHI, dtype)
        if self.shared is not None:
            yield from self.shared.products(dtype)

    def packed(self, packer: Packer) -> "MoE":
        """A copy with packed weights; the router is never quantized."""
        experts, shared = self.experts, self.shared
        router = packer.matrix(self.router, int8=False)
        experts = replace(experts, gate_up_EI2H=packer.stack(experts.gate_up_EI2H), down_EHI=packer.stack(experts.down_EHI))
        return replace(self, router=router, experts=experts, shared=None if shared is None else shared.packed(packer))
