"""What loading takes at its peak: the packed model and one parameter, or one expert of a stack. In a process of its own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from msgspec.structs import replace

from tests.specs import EXPERTS, LATENTS, small
from tests.unit.weights_case import decoder
from tpserve.models.held_bytes import held_tensors
from tpserve.weights import dummy
from tpserve_kernels.cpu.library import load

SCRIPT = """
import re
from msgspec.structs import replace
from tests.specs import EXPERTS, small
from tests.unit.weights_case import decoder

def resident(name):
    return int(re.search(rf"{name}:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10

def measure(name, quantization, spec):
    model = decoder(spec=spec)
    plain, *_ = sizes = sorted((parameter.tensor.nbytes for parameter in model.parameters()), reverse=True)
    before = resident("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # forgets the peak
    held = model.prepack(quantization, lambda parameter: parameter.tensor.fill_(0.01))
    print(name, quantization, sum(sizes), sizes[0], held, resident("VmHWM") - before)

wide = dict(hidden_size=1024, num_layers=2, num_heads=8, num_kv_heads=2, head_dim=64, vocab_size=256, max_position=64)
experts = replace(EXPERTS, count=16, size=512, shared_size=0, layers=(0, 1))
decoder(spec=small()).prepack("int8", lambda parameter: parameter.tensor.zero_())  # what libraries take at their first use
for quantization in (None, "int8"):
    measure("dense", quantization, small(**wide, intermediate_size=8192))
    measure("experts", quantization, small(**wide, intermediate_size=64, experts=experts))
"""
SLACK = 16 << 20
SPECS = {
    "dense": small(qkv_bias=True, tie_embeddings=True),
    "experts": small(experts=replace(EXPERTS, layers=(0, 2))),
    "latents": small(**LATENTS),
}
ROOT = Path(__file__).resolve().parents[2]


class Peak(NamedTuple):
    """Bytes: the plain model, its largest parameter, the packed model, what loading took at its peak."""

    plain: int
    largest: int
    held: int
    taken: int


@pytest.fixture(scope="module")
def peaks() -> dict[tuple[str, str], Peak]:
    if load()[0] is None:
        pytest.skip("no library of CPU kernels")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed goes back to the system
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = (line.split() for line in done.stdout.splitlines())
    return {(kind, quantization): Peak(*map(int, sizes)) for kind, quantization, *sizes in rows}


@pytest.mark.parametrize("quantization", ["None", "int8"])
def test_a_wide_model_takes_itself_and_one_parameter(quantization: str, peaks: dict[tuple[str, str], Peak]) -> None:
    peak = peaks["dense", quantization]
    quantized = peak.largest // 4 if quantization == "int8" else 0  # on its way into panels
    most = peak.held + peak.largest + quantized + SLACK
    assert peak.held < peak.taken < most < (0.75 if quantization == "int8" else 1.5) * peak.plain


@pytest.mark.parametrize("quantization", ["None", "int8"])
def test_experts_are_filled_and_packed_one_by_one(quantization: str, peaks: dict[tuple[str, str], Peak]) -> None:
    peak = peaks["experts", quantization]
    assert peak.held < peak.taken < peak.held + 2 * (peak.largest // 16) + SLACK < peak.held + peak.largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_filled_one_by_one_is_what_loaded_at_once_is(name: str, dtype: torch.dtype) -> None:
    loaded, filled = decoder(spec=SPECS[name], dtype=dtype), decoder(spec=SPECS[name], dtype=dtype)
    dummy.dummy(loaded.parameters(), seed=5)
    for parameter in filled.parameters():
        parameter.tensor.view(torch.uint8).fill_(255)  # NaN
    loaded.prepack()
    filled.prepack(fill=lambda parameter: dummy.fill(parameter, seed=5))
    ours, others = list(held_tensors(loaded.held())), list(held_tensors(filled.held()))
    assert len(ours) == len(others) > 10
    for one, other in zip(ours, others, strict=True):
        assert torch.equal(one.to_dense(), other.to_dense()) if one.is_mkldnn else torch.equal(one, other)
