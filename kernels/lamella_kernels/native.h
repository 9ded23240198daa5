/* What the compiled CPU kernels share: lanes of channels, and the exponential. */

#ifndef LAMELLA_NATIVE_H
#define LAMELLA_NATIVE_H

#include <stdint.h>
#include <string.h>

#define LANES 64 /* channels of a task; native.py says so too */
#define INLINE static inline __attribute__((always_inline))

/* One binary for every x86-64: the loader picks the widest instructions the processor has. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDE
#endif

/* 2^x for x <= 0, to 1 ulp; below 2^-126 it stays there, which nothing of size 1 can tell from 0. */
INLINE float power2(float x) {
    x = x < -126.0f ? -126.0f : x;
    float whole = (x + 12582912.0f) - 12582912.0f, f = x - whole;
    float p = 1.5252734e-5f;
    p = p * f + 1.5403530e-4f;
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    union {
        int32_t i;
        float f;
    } scale = {.i = ((int32_t)whole + 127) << 23};
    return p * scale.f;
}

INLINE float sigmoid(float x) {
    float e = power2((x < 0 ? x : -x) * 1.44269504f);
    return (x < 0 ? e : 1.0f) / (1.0f + e);
}

/* A row of some lanes, zeros beyond them. */
INLINE void load(float *to, const float *from, int64_t lanes) {
    if (lanes == LANES) {
        memcpy(to, from, sizeof(float) * LANES);
    } else {
        memset(to, 0, sizeof(float) * LANES);
        memcpy(to, from, sizeof(float) * lanes);
    }
}

/* Several rows, `stride` apart. */
INLINE void load_rows(float *to, const float *from, int64_t rows, int64_t stride, int64_t lanes) {
    for (int64_t n = 0; n < rows; n++) load(to + n * LANES, from + n * stride, lanes);
}

INLINE void store_rows(float *to, const float *from, int64_t rows, int64_t stride, int64_t lanes) {
    for (int64_t n = 0; n < rows; n++) memcpy(to + n * stride, from + n * LANES, sizeof(float) * lanes);
}

#endif
