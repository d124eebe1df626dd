// float16, converted with arithmetic of float: exact one way, rounded to nearest, ties to even, the other.
#pragma once

#include "cuda_runtime.h"

struct __half {
    std::uint16_t bits;
};

inline float __half2float(__half x) {
    const unsigned sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
    if (rest >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    // the exponent of float is 112 larger; multiplying shifts it, denormal numbers included
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest << 13) * 0x1p112f));
}

inline __half __float2half_rn(float x) {
    const auto sign = static_cast<std::uint16_t>(__float_as_uint(x) >> 16 & 0x8000u);
    const float size = std::fabs(x);
    if (size != size) return {0x7fff};
    if (size >= 65520.0f) return {static_cast<std::uint16_t>(sign | 0x7c00u)};
    if (size < 0x1p-14f) {
        // floats from 0.5 to 1 are as far apart as these: adding rounds
        return {static_cast<std::uint16_t>(sign | (__float_as_uint(size + 0.5f) - __float_as_uint(0.5f)))};
    }
    const unsigned bits = __float_as_uint(size) - (112u << 23);
    return {static_cast<std::uint16_t>(sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13)};
}
