"""Functions of numbers whose bits are the same on every device.

A draw and a threshold compare exponentials and logarithms, and those of torch, of a card and of Triton's interpreter differ in
the last bit. The ones here are additions, multiplications and divisions of IEEE 754 alone, none of them fused (a launch passes
`enable_fp_fusion=False`). Each Triton function has its form in torch beside it, the specification: both give the same bits.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def exp32(x):
    """exp(x) of float32, within two units in the last place; 0 below -87.3, inf above 88.7, NaN for NaN.

    Source: reduction by ln 2 in two parts (Cody and Waite 1980) and a polynomial of degree 6 (Cephes, expf). The library of CPU
    kernels has the same one with fused multiplications, and so with other bits.
    """
    clamped = tl.minimum(tl.maximum(x, -87.33654), 88.72283)
    scaled = clamped * 1.44269504088896341 + 12582912.0  # 1.5 * 2^23: the integer part lands in the low bits
    n = scaled.to(tl.int32, bitcast=True) - 0x4B400000
    whole = scaled - 12582912.0
    r = clamped - whole * 0.693359375
    r = r + whole * 2.12194440e-4
    p = 1.9875691500e-4 * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    y = (p * (r * r) + r) + 1.0
    half = n >> 1  # 2^n in two factors: n may be 128
    y = y * ((half + 127) << 23).to(tl.float32, bitcast=True) * ((n - half + 127) << 23).to(tl.float32, bitcast=True)
    y = tl.where(x < -87.33654, 0.0, y)
    y = tl.where(x > 88.72283, float("inf"), y)
    return tl.where(x == x, y, x)


def exp32_reference(x: torch.Tensor) -> torch.Tensor:
    """`exp32` in torch."""
    clamped = x.clamp(-87.33654, 88.72283)
    scaled = clamped * 1.44269504088896341 + 12582912.0
    n = scaled.view(torch.int32) - 0x4B400000
    whole = scaled - 12582912.0
    r = clamped - whole * 0.693359375
    r = r + whole * 2.12194440e-4
    p = 1.9875691500e-4 * r + 1.3981999507e-3
    for coefficient in (8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + coefficient
    y = (p * (r * r) + r) + 1.0
    half = n >> 1
    y = y * ((half + 127) << 23).view(torch.float32) * ((n - half + 127) << 23).view(torch.float32)
    return y.masked_fill(x < -87.33654, 0.0).masked_fill(x > 88.72283, float("inf"))


@triton.jit
def log64(x):
    """log(x) of a positive normal float64, within one unit in the last place; the bits of the library of CPU kernels.

    Source: fdlibm, e_log.c (Sun Microsystems 1993).
    """
    bits = x.to(tl.int64, bitcast=True)
    power = ((bits - 0x3FE6A09E667F3BCD + (1023 << 52)) >> 52) - 1023  # the exponent of x / sqrt(1/2)
    f = (bits - (power << 52)).to(tl.float64, bitcast=True) - 1.0
    s = f / (f + 2.0)
    z = s * s
    w = z * z
    square = f * f * 0.5
    even = w * (w * (w * 1.531383769920937332e-1 + 2.222219843214978396e-1) + 3.999999999940941908e-1)
    odd = w * (w * (w * 1.479819860511658591e-1 + 1.818357216161805012e-1) + 2.857142874366239149e-1) + 6.666666666666735130e-1
    whole = power.to(tl.float64)
    rest = s * (square + (z * odd + even)) + whole * 1.90821492927058770002e-10
    return whole * 6.93147180369123816490e-1 - ((square - rest) - f)


def log64_reference(x: torch.Tensor) -> torch.Tensor:
    """`log64` in torch."""
    bits = x.view(torch.int64)
    power = ((bits - 0x3FE6A09E667F3BCD + (1023 << 52)) >> 52) - 1023
    f = (bits - (power << 52)).view(torch.float64) - 1.0
    s = f / (f + 2.0)
    z = s * s
    w = z * z
    square = f * f * 0.5
    even = w * (w * (w * 1.531383769920937332e-1 + 2.222219843214978396e-1) + 3.999999999940941908e-1)
    odd = w * (w * (w * 1.479819860511658591e-1 + 1.818357216161805012e-1) + 2.857142874366239149e-1) + 6.666666666666735130e-1
    whole = power.double()
    rest = s * (square + (z * odd + even)) + whole * 1.90821492927058770002e-10
    return whole * 6.93147180369123816490e-1 - ((square - rest) - f)


@triton.jit
def as_integer(x, ONE: tl.constexpr):
    """round(x * ONE) to the nearest, ties to even, as int64. ONE: a power of two; x: float32, 0 <= x * ONE < 2^63."""
    y = x * ONE  # exact; from 2^23 on it has no fraction
    return tl.where(y < 8388608.0, (y + 8388608.0) - 8388608.0, y).to(tl.int64)


def as_integer_reference(x: torch.Tensor, one: float) -> torch.Tensor:
    """`as_integer` in torch."""
    return (x.double() * one).round().long()


@triton.jit
def finish(x, scale, cap, CAPPED: tl.constexpr):
    """A logit from what the LM head gave: scale * x, and of that cap * tanh(. / cap). float32."""
    y = x.to(tl.float32) * scale
    if CAPPED:  # tanh(u) = 1 - 2 / (exp(2 u) + 1)
        y = cap * (1.0 - tl.div_rn(2.0, exp32(tl.div_rn(y, cap) * 2.0) + 1.0))
    return y


def finish_reference(x: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
    """`finish` in torch."""
    y = x.float() * scale
    if cap is None:
        return y
    two, divisor = y.new_tensor(2.0), y.new_tensor(cap)  # a card multiplies by the inverse of a number of the host
    return cap * (1.0 - two / (exp32_reference(y / divisor * 2.0) + 1.0))
