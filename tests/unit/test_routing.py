"""Routing of every kind against transformers' routers, ties, and the numerics contract."""

import pytest
import torch
from torch import nn
from transformers import DeepseekV2Config, DeepseekV3Config, GptOssConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

from tpserve.layers.routing import Routing
from tpserve.types.model_spec import RoutingSpec

EXPERTS, HIDDEN = 24, 32
V2 = {"hidden_size": HIDDEN, "n_routed_experts": EXPERTS, "num_experts_per_tok": 5, "routed_scaling_factor": 1.7}
V3 = {**V2, "n_group": 6, "topk_group": 3}
LIMITED = {**V3, "topk_method": "group_limited_greedy"}
OSS = {"hidden_size": HIDDEN, "num_local_experts": EXPERTS, "num_experts_per_tok": 5}
KINDS: dict[str, tuple[nn.Module, RoutingSpec]] = {
    "v2, greedy": (DeepseekV2TopkRouter(DeepseekV2Config(**V2)), RoutingSpec(5, scale=1.7)),
    "v2, groups": (
        DeepseekV2TopkRouter(DeepseekV2Config(**LIMITED)),
        RoutingSpec(5, num_groups=6, num_top_groups=3, scale=1.7),
    ),
    "v3": (
        DeepseekV3TopkRouter(DeepseekV3Config(**V3, norm_topk_prob=True)),
        RoutingSpec(5, "sigmoid", "choice", num_groups=6, num_top_groups=3, group_best=2, renormalise=True, scale=1.7),
    ),
    "v3, one group": (
        DeepseekV3TopkRouter(DeepseekV3Config(**{**V3, "n_group": 1, "topk_group": 1}, norm_topk_prob=False)),
        RoutingSpec(5, "sigmoid", "choice", group_best=2, scale=1.7),
    ),
    "gpt-oss": (GptOssTopKRouter(GptOssConfig(**OSS)), RoutingSpec(5, bias="logits", renormalise=True)),
}


@pytest.mark.parametrize("name", KINDS)
def test_routing_is_that_of_transformers(name: str) -> None:
    oracle, spec = KINDS[name]
    torch.manual_seed(0)
    bias_E = torch.randn(EXPERTS) * 0.3
    for tensor in (*oracle.parameters(), *oracle.buffers()):
        tensor.data.copy_(torch.randn(tensor.shape) if tensor.ndim == 2 else bias_E)
    weight = oracle.get_parameter("weight").detach()
    x_TH = torch.randn(300, HIDDEN)
    with torch.inference_mode():
        _, expected, ids = oracle(x_TH)
    routing = Routing(spec, bias_E if spec.bias else None)
    weights_TA, experts_TA = routing(x_TH @ weight.T)
    order = ids.argsort(1)
    mine = experts_TA.argsort(1)
    assert torch.equal(ids.gather(1, order), experts_TA.gather(1, mine))
    torch.testing.assert_close(weights_TA.gather(1, mine), expected.gather(1, order), atol=1e-6, rtol=1e-5)


def test_the_lower_id_wins_a_tie_of_experts_and_of_groups() -> None:
    ids = Routing(RoutingSpec(3))(torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, 0.0]]))[1]
    assert ids.tolist() == [[1, 3, 0]]
    grouped = RoutingSpec(2, "sigmoid", num_groups=3, num_top_groups=1, group_best=2)
    assert Routing(grouped)(torch.tensor([[2.0, -9.0, 0.0, 1.0, 1.0, 0.0]]))[1].tolist() == [[3, 2]]


@pytest.mark.parametrize("name", KINDS)
def test_a_row_is_routed_as_it_is_alone(name: str) -> None:
    spec = KINDS[name][1]
    torch.manual_seed(0)
    routing = Routing(spec, torch.randn(EXPERTS) if spec.bias else None)
    logits_TE = torch.randn(300, EXPERTS) * 3
    alone = [torch.cat(parts) for parts in zip(*(routing(row.unsqueeze(0)) for row in logits_TE), strict=True)]
    for rows in (2, 3, 4, 5, 17, 256, 300):
        for got, expected in zip(routing(logits_TE[:rows]), alone, strict=True):
            assert torch.equal(got, expected[:rows])
