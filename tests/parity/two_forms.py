"""Runs a random model in both forms of every operation and prints how far their logits are apart.

python -m tests.parity.two_forms cuda            the CPU against a CUDA device
python -m tests.parity.two_forms interpreter     the CPU against the kernels in Triton's interpreter (TRITON_INTERPRET=1)
"""

import sys
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from msgspec.structs import replace

from tests.parity.runner import Runner, mixed
from tests.specs import LATENTS, small
from tpserve.models.decoder import Decoder
from tpserve.parallel.group import Group
from tpserve.parallel.pipeline import Pipeline
from tpserve.types.layout import ParallelLayout
from tpserve.types.model_spec import CacheGroup, ClampedSwiglu, ExpertsSpec, LatentSpec, ModelSpec, RopeSpec, RoutingSpec
from tpserve.weights.dummy import dummy
from tpserve_kernels import combination, grouped, permutation, router, routing

MIXTURE_OPS = (
    (router, "router_logits"), (routing, "route"), (permutation, "permute"), (grouped, "grouped_matmul"),
    (combination, "combine"),
)  # fmt: skip
MIXTURE = ExpertsSpec(
    5, 48, RoutingSpec(2, bias="logits", renormalise=True), layers=(0, 1), bias=True, clamped=ClampedSwiglu(alpha=1.3, limit=0.7)
)
GROUPS = RoutingSpec(3, "sigmoid", "choice", num_groups=3, num_top_groups=2, group_best=2, renormalise=True, scale=2.5)
GROUPED = ExpertsSpec(6, 48, GROUPS, layers=(1,), shared_size=48, shared_gate=True)
NO_BIAS = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}
LENGTHS, PROMPTS, SIZES = (3, 18, 34), (2, 17, 32), (17, 34, 5)

OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"qk_norm": "head"},
    "olmo2": {"qk_norm": "all", "norm_place": "output", "rope": RopeSpec(num_channels=12, magnitude=1.2)},
    "gemma3": {
        "norm_offset": -0.4, "norm_place": "around", "qk_norm": "head", "activation": "gelu_tanh", "logits_cap": 3.0,
        "window_rope": RopeSpec(theta=50.0), "cache": (CacheGroup((0,), window=7), CacheGroup((1,))), "scores_cap": 2.0,
    },
    "gpt_oss": {"sinks": True, "cache": (CacheGroup((0,)), CacheGroup((1,), window=21)), "experts": MIXTURE},
    "deepseek_v3": {
        **LATENTS, "num_heads": 4, "num_kv_heads": 4, "head_dim": 28, "rope": RopeSpec(interleaved=True), "experts": GROUPED,
        "latent": LatentSpec(kv_rank=32, rope_dim=16, nope_dim=12, v_dim=20, q_rank=28), **NO_BIAS,
    },
    "gpt2": {"norm": "layer", "rope": None, "gated": False, "activation": "gelu_tanh"},
}  # fmt: skip
"""What each family has beside all biases, or without them."""


def spec(family: str, dtype: torch.dtype) -> ModelSpec:
    own = dict(OWN[family])
    if (experts := own.get("experts")) is not None and dtype == torch.bfloat16:  # a near tie would fall to either side
        routing = replace(experts.routing, num_active=experts.count, num_top_groups=experts.routing.num_groups)
        own["experts"] = replace(experts, routing=routing)
    shape = {
        "family": family,
        "vocab_size": 300,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_layers": 2,
        "num_heads": 4,
        "head_dim": 16,
        "rope": RopeSpec(scaling="llama3", factor=4.0, original_max_position=16),
        "max_position": 64,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
    }
    return small(**{**shape, **own})


def runner(family: str, dtype: torch.dtype, device: str) -> Runner:
    decoder = Decoder(spec(family, dtype), ParallelLayout(1, 1, (2,)), 0, Group(), dtype, torch.device(device), 64)
    dummy(decoder.parameters())
    return Runner(decoder, Group(), Pipeline(), 2)


def logits(model: Runner) -> torch.Tensor:
    """Of every position of some sequences, run in mixed steps."""
    generator = torch.Generator().manual_seed(2)
    sequences = [torch.randint(300, (length,), generator=generator).tolist() for length in LENGTHS]
    return torch.cat(model.run(sequences, mixed(LENGTHS, PROMPTS, SIZES))).cpu()


def dtypes(family: str, other: str) -> tuple[torch.dtype, ...]:
    """Those to compare. The interpreter is slow: there bfloat16 is for what differs most."""
    both = other == "cuda" or family in ("qwen3", "gemma3", "deepseek_v3")
    return (torch.float32, torch.bfloat16) if both else (torch.float32,)


def main(other: str) -> None:
    for family in OWN:
        for dtype in dtypes(family, other):
            model = runner(family, dtype, "cpu")
            expected = logits(model)
            if other == "cuda":
                got = logits(runner(family, dtype, "cuda"))
            else:
                torch.Tensor.is_cuda = property(lambda tensor: True)  # type: ignore[assignment]
                with ExitStack() as stack:
                    of_experts = [
                        stack.enter_context(patch.object(room, op, wraps=getattr(room, op))) for room, op in MIXTURE_OPS
                    ]
                    got = logits(model)
                del torch.Tensor.is_cuda
                assert {op.called for op in of_experts} == {spec(family, dtype).experts is not None}, "experts have kernels, too"
            print(family, dtype, float((got - expected).abs().max()))


if __name__ == "__main__":
    main(sys.argv[1])
