"""Checkpoints as they are published quantized: block FP8 and MXFP4, made of plain tensors, and what they mean in float32."""

import torch
import torch.nn.functional as F

BLOCK, GROUP = 128, 32
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
CONFIG = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic", "fmt": "e4m3"}


def fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., R, C] as 8-bit floats, and a scale for each block of 128 x 128; those at the end are smaller."""
    *outer, rows, columns = weight.shape
    blocks = -(-rows // BLOCK), -(-columns // BLOCK)
    padded = F.pad(weight, (0, blocks[1] * BLOCK - columns, 0, blocks[0] * BLOCK - rows))
    scales = padded.abs().view(*outer, blocks[0], BLOCK, blocks[1], BLOCK).amax((-1, -3)) / torch.finfo(torch.float8_e4m3fn).max
    return (weight / spread(scales, rows, columns)).to(torch.float8_e4m3fn), scales


def spread(scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Each element's scale."""
    return scales.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)[..., :rows, :columns]


def fp8_checkpoint(plain: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The checkpoint with the matrices of its layers quantized, but routers, and the float32 tensors that it stands for."""
    stored, meant = dict(plain), dict(plain)
    for name, tensor in plain.items():
        if tensor.ndim > 1 and ".layers." in name and not name.endswith("mlp.gate.weight"):
            stored[name], scales = fp8(tensor.float())
            stored[f"{name}_scale_inv"] = scales
            meant[name] = stored[name].float() * spread(scales, *tensor.shape[-2:])
    return stored, meant


def mxfp4(plain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[experts, C, R], C a multiple of 32, as blocks [experts, R, C / 32, 16] and scales [experts, R, C / 32]."""
    groups = plain.transpose(1, 2).float().unflatten(2, (-1, GROUP))
    powers = torch.floor(torch.log2(groups.abs().amax(-1))) - 2
    scaled = groups * torch.exp2(-powers).unsqueeze(-1)
    codes = (scaled.abs().unsqueeze(-1) - E2M1).abs().argmin(-1) + 8 * (scaled < 0)
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8), (powers + 127).to(torch.uint8)
