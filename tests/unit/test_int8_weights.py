"""Weights that are quantized while loading: what becomes int8, what it takes in memory, and what is refused."""

import pytest
import torch

from tests.specs import EXPERTS, small
from tpserve.errors import UserError
from tpserve.layers.row_parallel import pack_row_parallel
from tpserve.models.decoder import Decoder
from tpserve.parallel.group import Group
from tpserve.quant.int8 import Int8Weight, check_inner
from tpserve.quant.matmul import matmul
from tpserve.quant.packed import pack
from tpserve.types.layout import ParallelLayout
from tpserve.types.model_spec import ModelSpec
from tpserve.weights.dummy import dummy
from tpserve_kernels.cpu import int8, product
from tpserve_kernels.cpu.library import library

pytestmark = pytest.mark.skipif(library() is None, reason="int8 needs the library of CPU kernels")


def decoder(spec: ModelSpec) -> Decoder:
    made = Decoder(spec, ParallelLayout(1, 1, (spec.num_layers,)), 0, Group(), torch.bfloat16, torch.device("cpu"), 64)
    dummy(made.parameters())
    return made


def test_the_bytes_that_stay() -> None:
    """Every matrix of a layer in its packed int8 form, the rest as it was."""
    spec = small(num_layers=2, hidden_size=96)
    norms, embedding = (2 * 2 + 1) * 96 * 2, 517 * 96 * 2
    layer = int8.packed_bytes(96, 96) + int8.packed_bytes(96, 64) + int8.packed_bytes(344, 96) + int8.packed_bytes(96, 172)
    plain_head, head = product.packed_bytes(torch.bfloat16, 517, 96), int8.packed_bytes(517, 96)
    assert decoder(spec).prepack("int8") == norms + embedding + 2 * layer + plain_head
    assert decoder(spec).prepack("int8-head") == norms + embedding + 2 * layer + head
    tied = small(num_layers=2, hidden_size=96, tie_embeddings=True)
    assert decoder(tied).prepack("int8-head") == norms + 2 * layer + head, "the embedding is read from the head"


def test_experts_are_quantized_and_routers_are_not() -> None:
    made = decoder(small(experts=EXPERTS))
    made.prepack("int8")
    names = {each.name for each in made.products()}
    assert {"int8 experts bfloat16 64x88", "int8 experts bfloat16 44x64", "matmul float32 64x6"} <= names
    assert "matmul bfloat16 64x517" in names and not any(name.startswith("experts") for name in names)


def test_a_product_in_int8_is_near_the_plain_one() -> None:
    x, weight, bias = torch.randn(5, 96), torch.randn(40, 96), torch.randn(40)
    quantized = pack(weight, int8=True)
    assert isinstance(quantized, Int8Weight)
    expected = x @ weight.T + bias
    assert 0 < float((matmul(x, quantized, bias) - expected).norm() / expected.norm()) < 0.02
    rows = quantized.rows(torch.tensor([3, 39]))
    torch.testing.assert_close(rows, weight[[3, 39]], atol=float(weight.abs().max()) / 254, rtol=0)


def test_sums_that_might_not_fit() -> None:
    check_inner(133_144)
    with pytest.raises(UserError, match="adds up at most 133,144 inner channels of a product, and a layer has 133,145: leave"):
        pack_row_parallel(torch.zeros(1, 133_145), Group(), int8=True)
