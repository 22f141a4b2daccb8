"""MoE routing: the experts of each token and their weights. Softmax with top-k as in Mixtral (arXiv:2401.04088); sigmoid scores,
a bias for the choice alone and groups as in DeepSeek-V3 (arXiv:2412.19437).

All in float32. Invariants: a row's choice and weights depend on that row alone; ties go to the lower id. `__call__` defines both;
`from_terms` is the same on CUDA, in one launch.

Legend: T rows, E experts in G groups of e, A experts per token, C terms of each logit, N = E, or E + 1 with the shared expert's
gate.
"""

from dataclasses import dataclass

import torch

from tpserve.types.model_spec import RoutingSpec


@dataclass(frozen=True)
class Routing:
    """The router's choice for one layer. `bias_E`: float32; None when `spec.bias` is None."""

    spec: RoutingSpec
    bias_E: torch.Tensor | None = None

    def __call__(self, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and ids of each token's experts, best first: float32 [T, A], int64 [T, A]. `logits_TE`: float32."""
        spec = self.spec
        if self.bias_E is not None and spec.bias == "logits":
            logits_TE = logits_TE + self.bias_E
        # Not torch.sigmoid: its last bit depends on the other rows.
        scores_TE = torch.softmax(logits_TE, dim=1) if spec.scores == "softmax" else 1 / (1 + torch.exp(-logits_TE))
        merits_TE = scores_TE if self.bias_E is None or spec.bias == "logits" else scores_TE + self.bias_E
        if spec.num_top_groups < spec.num_groups:
            merits_TE = self._within_groups(merits_TE)
        experts_TA = _best(merits_TE, spec.num_active)
        weights_TA = scores_TE.gather(1, experts_TA)
        if spec.renormalise:
            weights_TA = weights_TA / (weights_TA.sum(1, keepdim=True) + 1e-20)  # scores of a sigmoid may all be 0
        return weights_TA if spec.scale == 1 else weights_TA * spec.scale, experts_TA

    def from_terms(
        self, terms_CTN: torch.Tensor, num_experts: int, slots_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Weights and ids (float32 and int32 [T, A]) as of `__call__`, and the shared expert's gate (float32 [T]), if any.

        `terms_CTN`: of `router_logits`, on CUDA. `slots_T`: negative for padding, which gets ids of -1.
        """
        from tpserve_kernels import routing

        spec = self.spec
        return routing.route(
            terms_CTN, num_experts, spec.num_active, scores=spec.scores, bias=spec.bias, bias_E=self.bias_E,
            num_groups=spec.num_groups, num_top_groups=spec.num_top_groups, group_best=spec.group_best,
            renormalise=spec.renormalise, scale=spec.scale, slots_T=slots_T,
        )  # fmt: skip

    def _within_groups(self, merits_TE: torch.Tensor) -> torch.Tensor:
        """The merits, with -inf for the experts of groups that are not chosen: float32 [T, E]."""
        spec = self.spec
        grouped_TGe = merits_TE.view(len(merits_TE), spec.num_groups, -1)
        groups_TG = torch.topk(grouped_TGe, spec.group_best, dim=2).values.sum(2)
        chosen = _best(groups_TG, spec.num_top_groups)
        left_out_TG = torch.ones_like(groups_TG, dtype=torch.bool).scatter_(1, chosen, False)
        return grouped_TGe.masked_fill(left_out_TG.unsqueeze(2), -torch.inf).flatten(1)


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The ids of the `count` largest of each row, in order."""
    return torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :count]
