"""Quantized checkpoints become exactly the numbers that they stand for, whatever part of a tensor a rank takes."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.quantized import BLOCK, fp8, mxfp4, spread
from tpserve.errors import UserError
from tpserve.weights.checkpoint import Checkpoint
from tpserve.weights.load import Loaded, load
from tpserve.weights.names import LLAMA
from tpserve.weights.parameter import Parameter
from tpserve.weights.source import Source
from tpserve.weights.unused_weights import checkpoint_notes

NAME = "model.layers.0.mlp.up_proj.weight"
STACK = "model.layers.0.mlp.experts.gate_up_proj"
CPU = torch.device("cpu")


def taken(tensors: dict[str, torch.Tensor], directory: Path, dtype: torch.dtype, *sources: Source) -> tuple[torch.Tensor, Loaded]:
    """What a parameter of the sources holds after loading."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    parameter = Parameter.empty(sources, dtype, CPU)
    parameter.tensor.fill_(torch.nan)
    return parameter.tensor, load([parameter], Checkpoint.open(directory, LLAMA))


def ranges(total: int) -> list[range]:
    """Whole, and in parts that respect no block."""
    cuts = [0, 1, total // 3, total // 2 + 7, total]
    return [range(total), *(range(a, b) for a, b in pairwise(cuts) if a < b)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(256, 384), (300, 200), (40, 60), (20, 129)])
def test_block_fp8(rows: int, columns: int, dtype: torch.dtype, tmp_path: Path) -> None:
    codes, scales = fp8(torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.02)
    meant = (codes.float() * spread(scales, rows, columns)).to(dtype)
    if rows % BLOCK == columns % BLOCK == 0:
        assert torch.equal(meant, Fp8Dequantize(None)._dequantize_one(codes, scales, dtype)), "transformers says the same"
    for dim, total in enumerate((rows, columns)):
        for part in ranges(total):
            tensors = {NAME: codes, f"{NAME}_scale_inv": scales}
            got, loaded = taken(tensors, tmp_path, dtype, Source(NAME, (rows, columns), dim, part))
            assert torch.equal(got, meant.narrow(dim, part.start, len(part)))
            turned, _ = taken(tensors, tmp_path, dtype, Source(NAME, (rows, columns), dim, part, transposed=True))
            assert torch.equal(turned, got.T)
            touched = len(range(part.start // BLOCK, -(-part.stop // BLOCK))) * scales.shape[1 - dim]
            assert loaded.requested_bytes == got.numel() + 4 * touched, "a byte an element, and the scales that are needed"


def test_every_code_of_fp8(tmp_path: Path) -> None:
    """Subnormal ones too; only those that are no numbers are left out."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes & 127 != 127].view(torch.float8_e4m3fn).unsqueeze(0)
    for scale in (1.0, 2.0**-120, 3.14159e-4):
        tensors = {NAME: codes, f"{NAME}_scale_inv": torch.full((1, 2), scale)}
        got, _ = taken(tensors, tmp_path, torch.float32, Source(NAME, (1, 254), 0, range(1)))
        assert torch.equal(got, codes.float() * torch.tensor(scale))


def test_block_fp8_in_slabs_from_several_files(tmp_path: Path) -> None:
    """More rows than are computed at once; the scales are in another file; experts are stacked."""
    generator = torch.Generator().manual_seed(2)
    codes, scales = fp8(torch.randn(2, 3000, 200, generator=generator))
    save_file({STACK: codes}, tmp_path / "model-1.safetensors")
    save_file({f"{STACK}_scale_inv": scales}, tmp_path / "model-2.safetensors")
    index = {"weight_map": {STACK: "model-1.safetensors", f"{STACK}_scale_inv": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    source = Source(STACK, (3000, 200), 0, range(100, 2999), expert=1, num_experts=2)
    parameter = Parameter.empty((source,), torch.bfloat16, CPU)
    load([parameter], Checkpoint.open(tmp_path, LLAMA))
    assert torch.equal(parameter.tensor, (codes[1].float() * spread(scales, 3000, 200)[1]).bfloat16()[100:2999])


def gate_up(hidden: int, channels: int, expert: int, experts: int, part: range) -> list[Source]:
    """Gate rows above up rows, of a stack in which they alternate."""
    stripes = (range(2 * part.start + i, 2 * part.stop - 1 + i, 2) for i in (0, 1))
    return [Source(STACK, (hidden, 2 * channels), 1, s, transposed=True, expert=expert, num_experts=experts) for s in stripes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantized", [True, False])
def test_mxfp4(quantized: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """Gate and up alternate; channels of gate-up and of down are cut anywhere; the plain form gives the same."""
    experts, hidden, channels = 3, 96, 160
    up_blocks, up_scales = mxfp4(torch.randn(experts, hidden, 2 * channels, generator=torch.Generator().manual_seed(3)))
    blocks, scales = mxfp4(torch.randn(experts, channels, hidden, generator=torch.Generator().manual_seed(4)))
    up_meant, meant = (
        convert_moe_packed_tensors(*pair, dtype=torch.float32).to(dtype) for pair in ((up_blocks, up_scales), (blocks, scales))
    )
    down = "model.layers.0.mlp.experts.down_proj"
    packed = {f"{STACK}_blocks": up_blocks, f"{STACK}_scales": up_scales, f"{down}_blocks": blocks, f"{down}_scales": scales}
    tensors = packed if quantized else {STACK: up_meant, down: meant}
    for expert in range(experts):
        for part in ranges(channels):
            got, loaded = taken(tensors, tmp_path, dtype, *gate_up(hidden, channels, expert, experts, part))
            wanted = [up_meant[expert, :, 2 * part.start + i : 2 * part.stop : 2].T for i in (0, 1)]
            assert torch.equal(got, torch.cat(wanted))
            if quantized:
                assert loaded.requested_bytes == 2 * len(part) * (hidden // 2 + hidden // 32)
            source = Source(down, (channels, hidden), 0, part, transposed=True, expert=expert, num_experts=experts)
            got, loaded = taken(tensors, tmp_path, dtype, source)
            assert torch.equal(got, meant[expert, part.start : part.stop].T)
            if quantized:
                groups = len(range(part.start // 32, -(-part.stop // 32)))
                assert loaded.requested_bytes == hidden * groups * 17 <= loaded.physical_bytes


def test_every_byte_of_mxfp4(tmp_path: Path) -> None:
    """Every pair of numbers and every scale but 255, which is none, as transformers reads them."""
    blocks = torch.arange(256, dtype=torch.uint8).repeat(1, 255).view(1, 255 * 16, 1, 16)
    scales = torch.arange(255, dtype=torch.uint8).repeat_interleave(16).view(1, 255 * 16, 1)
    tensors = {f"{STACK}_blocks": blocks, f"{STACK}_scales": scales}
    source = Source(STACK, (32, 255 * 16), 0, range(32), transposed=True, num_experts=1)
    for dtype in (torch.float32, torch.bfloat16):
        got, _ = taken(tensors, tmp_path, dtype, source)
        wanted = convert_moe_packed_tensors(blocks, scales, dtype=dtype)[0].T
        assert torch.equal(got, wanted)


PAIR = {NAME: torch.zeros(200, 130).to(torch.float8_e4m3fn), f"{NAME}_scale_inv": torch.ones(2, 2)}
BLOCKS = {f"{STACK}_blocks": torch.zeros(2, 8, 3, 16, dtype=torch.uint8), f"{STACK}_scales": torch.ones(2, 8, 3).byte()}
MATRIX = Source(NAME, (200, 130), 0, range(10))
EXPERT = Source(STACK, (96, 8), 0, range(96), transposed=True, expert=1, num_experts=2)


@pytest.mark.parametrize(
    ("tensors", "source", "message"),
    [
        ({NAME: PAIR[NAME]}, MATRIX, r"up_proj\.weight in .* is F8_E4M3 without .*up_proj\.weight_scale_inv"),
        ({**PAIR, NAME: torch.zeros(200, 130)}, MATRIX, r"up_proj\.weight in .* is F32: supported are F8_E4M3"),
        ({**PAIR, f"{NAME}_scale_inv": torch.ones(2, 3)}, MATRIX, r"_scale_inv in .* has shape \[2, 3\], .* \[2, 2\]"),
        ({**PAIR, f"{NAME}_scale_inv": torch.ones(2, 2).int()}, MATRIX, r"_scale_inv in .* is torch.int32: supported are F32"),
        ({f"{NAME}_scale_inv": torch.ones(2, 2)}, MATRIX, r"up_proj\.weight is missing from .*model\.safetensors"),
        ({f"{STACK}_scales": BLOCKS[f"{STACK}_scales"]}, EXPERT, r"gate_up_proj_blocks is missing"),
        (
            {**BLOCKS, f"{STACK}_scales": torch.ones(2, 8, 4).byte()},
            EXPERT,
            r"_scales in .* has shape \[2, 8, 4\], .* 3\]",
        ),
    ],
)
def test_what_is_not_whole_is_named(tensors: dict[str, torch.Tensor], source: Source, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        taken(tensors, tmp_path, torch.float32, source)


@pytest.mark.parametrize(("tensors", "source", "title"), [(PAIR, MATRIX, "block-FP8"), (BLOCKS, EXPERT, "MXFP4")])
def test_what_becomes_of_them_is_said(tensors: dict[str, torch.Tensor], source: Source, title: str, tmp_path: Path) -> None:
    def said(sources: Sequence[Source]) -> list[str]:
        return checkpoint_notes(sources, Checkpoint.open(tmp_path, LLAMA), 1, "bfloat16")

    save_file({**tensors, "model.norm.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    norm = Source("model.norm.weight", (1,), 0, range(1))
    assert said([source, norm]) == [f"{title} weights are dequantised to bfloat16: 2 bytes a weight"]
    assert said([source])[1:] == ["not used of the checkpoint: 1 tensor: model.norm.weight"]
