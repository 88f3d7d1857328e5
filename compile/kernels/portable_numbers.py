"""Number types of the portable kernels as expressions: float32, bfloat16 and e4m3, whose arithmetic is all float32.

TVM's own conversions of e4m3 are wrong on a CPU (subnormals, and what is beyond 448), so codes are made and read by
integer arithmetic here, by the same rule as `kernels/cuda/fp8.cuh`.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx

E4M3 = "float8_e4m3fn"
E4M3_MAX = 448.0
SMALLEST_LARGEST = 1e-12
"""What a row or group has for its largest magnitude at least, so that zeros have a finite scale."""

Expr = Any


def widened(value: Expr, dtype: str) -> Expr:
    """Return a stored float32, bfloat16 or e4m3 value as float32, exactly; NaN stays NaN."""
    if dtype != E4M3:
        return value.astype("float32")
    code = tirx.reinterpret("uint8", value).astype("uint32")
    low = code & _bits(0x7F)
    mantissa = (code & _bits(7)).astype("float32")
    # e4m3 is the head of a float32 but for the bias of its exponent, which is 7 in place of 127.
    normal = tirx.reinterpret("float32", (low << _bits(20)) + _bits((127 - 7) << 23))
    magnitude = tirx.Select(low < _bits(8), mantissa * _float(2.0**-9), normal)
    magnitude = tirx.Select(low == _bits(0x7F), _float(float("nan")), magnitude)
    return tirx.Select(code == low, magnitude, -magnitude)


def narrowed(value: Expr, dtype: str) -> Expr:
    """Return a float32 value as `dtype` stores it, rounded to nearest even.

    e4m3 is clipped to +-448 first; NaN stays NaN. `value` stands several times in the result: give a variable.
    """
    if dtype == "float32":
        return value
    if dtype == "bfloat16":
        return rounded_to_bfloat16(value).astype(dtype)
    bits = tirx.reinterpret("uint32", value)
    magnitude_bits = bits & _bits(0x7FFFFFFF)
    largest_bits = _bits(0x43E00000)  # of 448; bits of magnitudes are ordered as the magnitudes are
    clipped = tirx.Select(magnitude_bits < largest_bits, magnitude_bits, largest_bits)
    # Normal numbers: half of what is cut off is added, a little less where the last bit that stays is even.
    even = (clipped >> _bits(20)) & _bits(1)
    normal = ((clipped + _bits(0x7FFFF) + even) >> _bits(20)) - _bits((127 - 7) << 3)
    # Below 2^-6 codes are multiples of 2^-9, which is the last bit of 2^14: the sum rounds.
    shift = _float(2.0**14)
    small = tirx.reinterpret("uint32", tirx.reinterpret("float32", clipped) + shift) - _bits(0x46800000)
    code = tirx.Select(clipped < _bits(0x3C800000), small, normal)
    code = tirx.Select(magnitude_bits > _bits(0x7F800000), _bits(0x7F), code)
    sign = (bits >> _bits(24)) & _bits(0x80)
    return tirx.reinterpret(E4M3, (code | sign).astype("uint8"))


def rounded_to_bfloat16(value: Expr) -> Expr:
    """Return a float32 value as the nearest of bfloat16, still as float32.

    TVM computes in float32 what is bfloat16 within a function, and drops casts there and back: a cast alone rounds only
    where a function ends.
    """
    bits = tirx.reinterpret("uint32", value)
    even = (bits >> _bits(16)) & _bits(1)
    rounded = tirx.reinterpret("float32", (bits + _bits(0x7FFF) + even) & _bits(0xFFFF0000))
    # Of a NaN whose payload is cut off an infinity would stay.
    return tirx.Select((bits & _bits(0x7FFFFFFF)) > _bits(0x7F800000), _float(float("nan")), rounded)


def _bits(value: int) -> Expr:
    return tvm.tirx.const(value, "uint32")


def _float(value: float) -> Expr:
    return tvm.tirx.const(value, "float32")
