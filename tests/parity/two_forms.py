"""Runs a random model in both forms of every operation and prints how far their logits are apart.

python -m tests.parity.two_forms cuda            the CPU against a CUDA device
python -m tests.parity.two_forms interpreter     the CPU against the kernels in Triton's interpreter (TRITON_INTERPRET=1)
"""

import sys
from typing import Any

import torch

from tests.parity.harness import Runner, mixed
from tests.specs import small
from tpserve.models.decoder import Decoder
from tpserve.parallel.group import Group
from tpserve.parallel.pipeline import Pipeline
from tpserve.types.layout import ParallelLayout
from tpserve.types.model_spec import ModelSpec, RopeSpec
from tpserve.weights.dummy import dummy

LENGTHS, PROMPTS, SIZES = (4, 20, 40), (3, 19, 38), (17, 40, 5)


OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"qk_norm": "head"},
    "olmo2": {"qk_norm": "all", "norm_place": "output", "rope": RopeSpec(num_channels=12, magnitude=1.2)},
    "gpt2": {"norm": "layer", "rope": None, "gated": False, "activation": "gelu_tanh"},
}
"""What each family has beside all biases."""


def spec(family: str) -> ModelSpec:
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
    return small(**{**shape, **OWN[family]})


def logits(family: str, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Of every position of some sequences, run in mixed steps."""
    decoder = Decoder(spec(family), ParallelLayout(1, 1, (2,)), 0, Group(), dtype, torch.device(device), 64)
    dummy(decoder.parameters())
    generator = torch.Generator().manual_seed(2)
    sequences = [torch.randint(300, (length,), generator=generator).tolist() for length in LENGTHS]
    runner = Runner(decoder, Group(), Pipeline(), 2)
    return torch.cat(runner.run(sequences, mixed(LENGTHS, PROMPTS, SIZES))).cpu()


def main(other: str) -> None:
    for family in OWN:
        for dtype in (torch.float32, torch.bfloat16):
            expected = logits(family, dtype, "cpu")
            if other == "cuda":
                got = logits(family, dtype, "cuda")
            else:
                torch.Tensor.is_cuda = property(lambda tensor: True)  # type: ignore[assignment]
                got = logits(family, dtype, "cpu")
                del torch.Tensor.is_cuda
            print(family, dtype, float((got - expected).abs().max()))


if __name__ == "__main__":
    main(sys.argv[1])
