"""Every kernel compiles for three generations of cards, fits its shared memory and uses its matrix units, without a card."""

import pytest

from tests.card.compilation import EXACT, compiled, hold

OF_A_DECODE_STEP = {"_place_heads_kernel", "plan_kernel", "attention_kernel", "merge_kernel"}


@pytest.mark.parametrize("target", [90, *(pytest.param(target, marks=pytest.mark.long) for target in (80, 100))])
def test_kernels_compile(target: int) -> None:
    kernels = compiled(target)
    assert {kernel.kernel for kernel in kernels} == {
        "_norm_kernel", "_gated_kernel", "_place_heads_kernel", "_place_latents_kernel", "plan_kernel", "attention_kernel",
        "merge_kernel", "_grouped_kernel", "_router_kernel", "_route_kernel", "_permute_kernel", "_combine_kernel", *EXACT,
    }  # fmt: skip
    hold(kernels)
    variants = {(kernel.kernel, kernel.variant) for kernel in kernels if kernel.sizes}
    assert {name for name, _ in variants} == OF_A_DECODE_STEP
    assert len(variants) == len(OF_A_DECODE_STEP), "the number of requests and the tables' width make no variants"
