"""The query, key and value heads of a step's rows: bias, norm, rotation and the write to the KV cache in one launch.

The norm is that of `norm`, over a head (QK norm); Su et al., "RoFormer" (2021), https://arxiv.org/abs/2104.09864, for the
rotation; Kwon et al., "PagedAttention" (2023), https://arxiv.org/abs/2309.06180, for the cache. Each stage is computed in float32
and rounded to the rows' dtype, as if it were a kernel of its own.

Legend: T rows, N query heads, K key/value heads, A = N + 2 K, D channels of a head, of which 2 E rotate, P positions, S slots of
the cache (block * entries + entry), L channels of a latent, R of the key beside it. One program computes some heads of one row.
"""

import torch
import triton
import triton.language as tl

from tpserve_kernels.cpu import qkv_heads
from tpserve_kernels.cpu.qkv_heads import HeadNorms, Rotation
from tpserve_kernels.norm import rms_norm_reference

HEADS_A_PROGRAM = 8


def place_heads(
    q_TND: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    k_cache_SKD: torch.Tensor,
    v_cache_SKD: torch.Tensor,
    slots_T: torch.Tensor,
    norms: HeadNorms | None = None,
    rotation: Rotation | None = None,
    bias_AD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add the bias, norm and rotate queries and keys, and write keys and values to their slots: returns the queries [T, N, D].

    Rows of all three have one dtype, that of the caches and the bias: float32, float16 or bfloat16. Heads and channels of a row
    are adjacent, rows may be strided (slices of a packed projection). Caches: contiguous. slots_T: [T] int64, below S (not
    checked), no slot twice; a negative one is written nowhere. D is even. bias_AD: [(N + 2 K) D], of queries, keys and values.
    `norms` and `rotation` as in `qkv_heads`; positions are not checked. Returns new contiguous queries.
    Errors: AssertionError when shapes, dtypes or layouts differ from this.
    """
    (num_rows, num_heads, dim), num_kv_heads = q_TND.shape, k_TKD.shape[1]
    for x, cache in ((q_TND, None), (k_TKD, k_cache_SKD), (v_TKD, v_cache_SKD)):
        assert x.shape[::2] == (num_rows, dim) and x.stride()[1:] == (dim, 1) and x.dtype == q_TND.dtype
        assert cache is None or (cache.shape[1:] == x.shape[1:] and cache.is_contiguous() and cache.dtype == x.dtype)
    assert v_TKD.shape == k_TKD.shape and dim % 2 == 0
    assert slots_T.shape == (num_rows,) and slots_T.dtype == torch.int64 and slots_T.stride(0) == 1
    size = (num_heads + 2 * num_kv_heads) * dim
    assert bias_AD is None or (bias_AD.shape == (size,) and bias_AD.dtype == q_TND.dtype and bias_AD.stride(0) == 1)
    assert norms is None or all(w.shape == (dim,) and w.stride(0) == 1 for w in norms[:2])
    angles = _check(rotation, num_rows, dim)
    out_TND = torch.empty(num_rows, num_heads, dim, dtype=q_TND.dtype, device=q_TND.device)
    positions, cos, sin, interleaved = (slots_T, out_TND, out_TND, False) if rotation is None else rotation
    q_norm, k_norm, eps, offset = (out_TND, out_TND, 0.0, 0.0) if norms is None else norms
    block = min(HEADS_A_PROGRAM, triton.next_power_of_2(num_heads))
    programs = triton.cdiv(num_heads, block) + 2 * triton.cdiv(num_kv_heads, block)
    _place_heads_kernel[(num_rows, programs)](
        q_TND, k_TKD, v_TKD, out_TND, k_cache_SKD, v_cache_SKD, slots_T, out_TND if bias_AD is None else bias_AD,
        q_norm, k_norm, positions, cos, sin, q_TND.stride(0), k_TKD.stride(0), v_TKD.stride(0), eps, offset,
        Q_HEADS=num_heads, K_HEADS=num_kv_heads, DIM=dim, ANGLES=angles or dim // 2, BIAS=bias_AD is not None,
        NORM=norms is not None, ROTATE=rotation is not None, INTERLEAVED=interleaved, BLOCK=block,
        BLOCK_E=triton.next_power_of_2(angles or dim // 2), BLOCK_REST=triton.next_power_of_2(max(1, dim - 2 * angles)),
        BLOCK_V=triton.next_power_of_2(dim // 2),
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out_TND


def place_heads_reference(
    q_TND: torch.Tensor,
    k_TKD: torch.Tensor,
    v_TKD: torch.Tensor,
    k_cache_SKD: torch.Tensor,
    v_cache_SKD: torch.Tensor,
    slots_T: torch.Tensor,
    norms: HeadNorms | None = None,
    rotation: Rotation | None = None,
    bias_AD: torch.Tensor | None = None,
) -> torch.Tensor:
    """`place_heads` in plain torch, on any device."""
    if bias_AD is not None:
        biases = bias_AD.view(-1, q_TND.shape[2]).split((q_TND.shape[1], k_TKD.shape[1], v_TKD.shape[1]))
        q_TND, k_TKD, v_TKD = (x + bias for x, bias in zip((q_TND, k_TKD, v_TKD), biases, strict=True))
    return qkv_heads.place_heads_reference(q_TND, k_TKD, v_TKD, k_cache_SKD, v_cache_SKD, slots_T, norms, rotation)


def place_latents(
    latent_TL: torch.Tensor,
    key_TR: torch.Tensor,
    q_TNR: torch.Tensor,
    q_out_TNR: torch.Tensor,
    cache_SD: torch.Tensor,
    slots_T: torch.Tensor,
    weight_L: torch.Tensor,
    eps: float,
    offset: float,
    rotation: Rotation,
) -> None:
    """Write each row's normed latent and rotated key to its slot, [L + R], and its rotated queries to `q_out_TNR`.

    All of one dtype but for the weight. Channels of a row and of a head are adjacent, rows and heads may be strided. All R
    channels rotate. cache_SD: [S, L + R], contiguous. slots_T: as in `place_heads`.
    Errors: AssertionError when shapes, dtypes or layouts differ from this.
    """
    (num_rows, latent_dim), (_, num_heads, rope_dim) = latent_TL.shape, q_TNR.shape
    assert key_TR.shape == (num_rows, rope_dim) and q_out_TNR.shape == q_TNR.shape and len(q_TNR) == num_rows
    assert cache_SD.shape[1:] == (latent_dim + rope_dim,) and cache_SD.is_contiguous() and weight_L.shape == (latent_dim,)
    assert all(x.dtype == cache_SD.dtype and x.stride(-1) == 1 for x in (latent_TL, key_TR, q_TNR, q_out_TNR))
    assert slots_T.shape == (num_rows,) and slots_T.dtype == torch.int64 and slots_T.stride(0) == weight_L.stride(0) == 1
    angles = _check(rotation, num_rows, rope_dim)
    assert 2 * angles == rope_dim
    block = min(HEADS_A_PROGRAM, triton.next_power_of_2(num_heads))
    _place_latents_kernel[(num_rows, 1 + triton.cdiv(num_heads, block))](
        latent_TL, key_TR, q_TNR, q_out_TNR, cache_SD, slots_T, weight_L, *rotation[:3],
        latent_TL.stride(0), key_TR.stride(0), *q_TNR.stride()[:2], *q_out_TNR.stride()[:2], eps, offset,
        HEADS=num_heads, LATENT=latent_dim, ANGLES=angles, INTERLEAVED=rotation.interleaved, BLOCK=block,
        BLOCK_L=triton.next_power_of_2(latent_dim), BLOCK_E=triton.next_power_of_2(angles), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def place_latents_reference(
    latent_TL: torch.Tensor,
    key_TR: torch.Tensor,
    q_TNR: torch.Tensor,
    q_out_TNR: torch.Tensor,
    cache_SD: torch.Tensor,
    slots_T: torch.Tensor,
    weight_L: torch.Tensor,
    eps: float,
    offset: float,
    rotation: Rotation,
) -> None:
    """`place_latents` in plain torch, on any device."""
    q_turned_TNR, key_T1R = qkv_heads.rotate_reference(q_TNR, key_TR.unsqueeze(1), rotation)
    q_out_TNR.copy_(q_turned_TNR)
    written = slots_T >= 0
    rows_TD = torch.cat((rms_norm_reference(latent_TL, weight_L, eps, offset), key_T1R.squeeze(1)), dim=1)
    cache_SD[slots_T[written]] = rows_TD[written]


def _check(rotation: Rotation | None, num_rows: int, dim: int) -> int:
    """The angles of a rotation of heads of `dim` channels, 0 without one; AssertionError unless it is as `qkv_heads` says."""
    if rotation is None:
        return 0
    positions_T, cos_PE, sin_PE, interleaved = rotation
    angles = cos_PE.shape[1]
    assert positions_T.shape == (num_rows,) and positions_T.dtype == torch.int64 and positions_T.stride(0) == 1
    assert cos_PE.shape == sin_PE.shape and cos_PE.dtype == sin_PE.dtype == torch.float32
    assert cos_PE.is_contiguous() and sin_PE.is_contiguous() and (2 * angles == dim if interleaved else 2 * angles <= dim)
    return angles


@triton.jit
def _place(
    x_ptr, head_stride, out_ptr, out_head_stride, bias_ptr, weight_ptr, cos_ptr, sin_ptr, position, first_head, eps, offset,
    HEADS: tl.constexpr, DIM: tl.constexpr, ANGLES: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr, ROTATE: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Heads [first_head, first_head + BLOCK) of one row, from `x_ptr`, its first channel, to `out_ptr`.

    Their channels are in three parts: two of ANGLES, which rotate with each other, and the rest.
    """
    dtype = out_ptr.dtype.element_ty
    head = first_head + tl.arange(0, BLOCK)[:, None]
    angle = tl.arange(0, BLOCK_E)[None, :]
    turns = (head < HEADS) & (angle < ANGLES)
    low_at = 2 * angle if INTERLEAVED else angle
    high_at = 2 * angle + 1 if INTERLEAVED else ANGLES + angle
    low = tl.load(x_ptr + head * head_stride + low_at, mask=turns, other=0.0).to(tl.float32)
    high = tl.load(x_ptr + head * head_stride + high_at, mask=turns, other=0.0).to(tl.float32)
    if BIAS:
        low = (low + tl.load(bias_ptr + head * DIM + low_at, mask=turns, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
        high = (high + tl.load(bias_ptr + head * DIM + high_at, mask=turns, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    if 2 * ANGLES < DIM:
        rest_at = 2 * ANGLES + tl.arange(0, BLOCK_REST)[None, :]
        rests = (head < HEADS) & (rest_at < DIM)
        rest = tl.load(x_ptr + head * head_stride + rest_at, mask=rests, other=0.0).to(tl.float32)
        if BIAS:
            rest = (
                (rest + tl.load(bias_ptr + head * DIM + rest_at, mask=rests, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
            )
    if NORM:
        squares = tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)
        if 2 * ANGLES < DIM:
            squares += tl.sum(rest * rest, axis=1)
        scale = tl.rsqrt(squares / DIM + eps)[:, None]
        inside = angle < ANGLES
        low = low * scale * (offset + tl.load(weight_ptr + low_at, mask=inside, other=0.0).to(tl.float32))
        high = high * scale * (offset + tl.load(weight_ptr + high_at, mask=inside, other=0.0).to(tl.float32))
        low, high = low.to(dtype).to(tl.float32), high.to(dtype).to(tl.float32)
        if 2 * ANGLES < DIM:
            rest = rest * scale * (offset + tl.load(weight_ptr + rest_at, mask=rest_at < DIM, other=0.0).to(tl.float32))
    if ROTATE:
        cos = tl.load(cos_ptr + position * ANGLES + angle, mask=angle < ANGLES, other=0.0)
        sin = tl.load(sin_ptr + position * ANGLES + angle, mask=angle < ANGLES, other=0.0)
        low, high = low * cos - high * sin, high * cos + low * sin
    out_ptr += head * out_head_stride
    tl.store(out_ptr + angle, low.to(dtype), mask=turns)
    tl.store(out_ptr + ANGLES + angle, high.to(dtype), mask=turns)
    if 2 * ANGLES < DIM:
        tl.store(out_ptr + rest_at, rest.to(dtype), mask=rests)


@triton.jit(do_not_specialize_on_alignment=["slots_ptr", "positions_ptr"])
def _place_heads_kernel(
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_cache_ptr, v_cache_ptr, slots_ptr, bias_ptr, q_norm_ptr, k_norm_ptr, positions_ptr,
    cos_ptr, sin_ptr, q_stride, k_stride, v_stride, eps, offset,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, DIM: tl.constexpr, ANGLES: tl.constexpr, BIAS: tl.constexpr,
    NORM: tl.constexpr, ROTATE: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """BLOCK heads of one row: queries first, then keys, then values."""
    Q_BLOCKS: tl.constexpr = (Q_HEADS + BLOCK - 1) // BLOCK
    K_BLOCKS: tl.constexpr = (K_HEADS + BLOCK - 1) // BLOCK
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    position = tl.load(positions_ptr + row).to(tl.int64) if ROTATE else row
    if block < Q_BLOCKS:
        _place(
            q_ptr + row * q_stride, DIM, q_out_ptr + row * Q_HEADS * DIM, DIM, bias_ptr, q_norm_ptr, cos_ptr, sin_ptr, position,
            block * BLOCK, eps, offset, Q_HEADS, DIM, ANGLES, BIAS, NORM, ROTATE, INTERLEAVED, BLOCK, BLOCK_E, BLOCK_REST,
        )  # fmt: skip
        return
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    if block < Q_BLOCKS + K_BLOCKS:
        _place(
            k_ptr + row * k_stride, DIM, k_cache_ptr + slot * K_HEADS * DIM, DIM, bias_ptr + Q_HEADS * DIM, k_norm_ptr, cos_ptr,
            sin_ptr, position, (block - Q_BLOCKS) * BLOCK, eps, offset, K_HEADS, DIM, ANGLES, BIAS, NORM, ROTATE, INTERLEAVED,
            BLOCK, BLOCK_E, BLOCK_REST,
        )  # fmt: skip
    else:
        _place(
            v_ptr + row * v_stride, DIM, v_cache_ptr + slot * K_HEADS * DIM, DIM, bias_ptr + (Q_HEADS + K_HEADS) * DIM,
            k_norm_ptr, cos_ptr, sin_ptr, position, (block - Q_BLOCKS - K_BLOCKS) * BLOCK, eps, offset, K_HEADS, DIM, DIM // 2,
            BIAS, False, False, False, BLOCK, BLOCK_V, 1,
        )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["slots_ptr", "positions_ptr"])
def _place_latents_kernel(
    latent_ptr, key_ptr, q_ptr, q_out_ptr, cache_ptr, slots_ptr, weight_ptr, positions_ptr, cos_ptr, sin_ptr,
    latent_stride, key_stride, q_stride, q_head_stride, q_out_stride, q_out_head_stride, eps, offset,
    HEADS: tl.constexpr, LATENT: tl.constexpr, ANGLES: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """What one row leaves in the cache, or the rotation of BLOCK query heads of it."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    position = tl.load(positions_ptr + row).to(tl.int64)
    if block > 0:
        _place(
            q_ptr + row * q_stride, q_head_stride, q_out_ptr + row * q_out_stride, q_out_head_stride, q_ptr, q_ptr, cos_ptr,
            sin_ptr, position, (block - 1) * BLOCK, eps, 0.0, HEADS, 2 * ANGLES, ANGLES, False, False, True, INTERLEAVED, BLOCK,
            BLOCK_E, 1,
        )  # fmt: skip
        return
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    out_ptr = cache_ptr + slot * (LATENT + 2 * ANGLES)
    channel = tl.arange(0, BLOCK_L)
    inside = channel < LATENT
    latent = tl.load(latent_ptr + row * latent_stride + channel, mask=inside, other=0.0).to(tl.float32)
    weight = offset + tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    normed = latent * tl.rsqrt(tl.sum(latent * latent, axis=0) / LATENT + eps) * weight
    tl.store(out_ptr + channel, normed.to(cache_ptr.dtype.element_ty), mask=inside)
    _place(
        key_ptr + row * key_stride, 0, out_ptr + LATENT, 0, key_ptr, key_ptr, cos_ptr, sin_ptr, position, 0, eps, 0.0,
        1, 2 * ANGLES, ANGLES, False, False, True, INTERLEAVED, 1, BLOCK_E, 1,
    )  # fmt: skip
