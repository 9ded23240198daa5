/* The causal depthwise convolution on a CPU: the equations of eager.py, one pass over memory.

   A task is one batch row and LANES neighbouring channels; a tap that would look past its document's start is skipped.
   B batch, T time, I channels, K width; arrays are contiguous, in the order of their names in cpu.py. The K-1 inputs
   before the first token are `initial` [B, K-1, I], or zero. Weights and their gradients are [K, I], the last is now. */

#include "../native.h"

typedef struct {
    int64_t batch, time, channels, width, silu;
} Sizes;

/* The inputs j tokens back, or NULL where there are none. */
INLINE const float *look_back(const Sizes *s, const float *x, const float *initial, const int32_t *position, int64_t b,
                              int64_t t, int64_t j, int64_t i) {
    if (position && position[b * s->time + t] < j) return 0;
    if (t >= j) return x + (b * s->time + t - j) * s->channels + i;
    return initial ? initial + (b * (s->width - 1) + s->width - 1 + t - j) * s->channels + i : 0;
}

/* z = bias + sum of taps, for some lanes. */
INLINE void convolve(const Sizes *s, const float *x, const float *w, const float *bias, const float *initial,
                     const int32_t *position, int64_t b, int64_t t, int64_t i, int64_t lanes, float *z) {
    float seen[LANES];
    memcpy(z, bias, sizeof(float) * LANES);
    for (int64_t j = 0; j < s->width; j++) {
        const float *from = look_back(s, x, initial, position, b, t, j, i), *wj = w + (s->width - 1 - j) * LANES;
        if (!from) continue;
        load(seen, from, lanes);
        for (int l = 0; l < LANES; l++) z[l] += wj[l] * seen[l];
    }
}

/* work: K + 1 rows of lanes. */
WIDE void lamella_conv_forward(const Sizes *s, int64_t first, int64_t last, const float *x, const float *weight,
                               const float *bias, const int32_t *position, const float *initial, float *y, float *work) {
    const int64_t T = s->time, I = s->channels, blocks = (I + LANES - 1) / LANES;
    float *w = work, *bs = work + s->width * LANES, z[LANES];
    for (int64_t task = first; task < last; task++) {
        const int64_t b = task / blocks, i = task % blocks * LANES, lanes = I - i < LANES ? I - i : LANES;
        load_rows(w, weight + i, s->width, I, lanes);
        if (bias)
            load(bs, bias + i, lanes);
        else
            memset(bs, 0, sizeof(float) * LANES);
        for (int64_t t = 0; t < T; t++) {
            convolve(s, x, w, bs, initial, position, b, t, i, lanes, z);
            if (s->silu)
                for (int l = 0; l < LANES; l++) z[l] *= sigmoid(z[l]);
            memcpy(y + (b * T + t) * I + i, z, sizeof(float) * lanes);
        }
    }
}

/* dx is [B, K-1+T, I], begun by the caller; dweight [B, K, I], dbias [B, I]. work: 2 K + 2 rows of lanes. */
WIDE void lamella_conv_backward(const Sizes *s, int64_t first, int64_t last, const float *x, const float *weight,
                                const float *bias, const int32_t *position, const float *initial, const float *dy,
                                float *dx, float *dweight, float *dbias, float *work) {
    const int64_t T = s->time, I = s->channels, K = s->width, blocks = (I + LANES - 1) / LANES;
    float *w = work, *dw = w + K * LANES, *bs = dw + K * LANES, *db = bs + LANES, z[LANES], seen[LANES], dz[LANES];
    for (int64_t task = first; task < last; task++) {
        const int64_t b = task / blocks, i = task % blocks * LANES, lanes = I - i < LANES ? I - i : LANES;
        load_rows(w, weight + i, K, I, lanes);
        memset(dw, 0, sizeof(float) * K * LANES);
        memset(db, 0, sizeof(float) * LANES);
        if (bias)
            load(bs, bias + i, lanes);
        else
            memset(bs, 0, sizeof(float) * LANES);
        for (int64_t t = 0; t < T; t++) {
            load(dz, dy + (b * T + t) * I + i, lanes);
            if (s->silu) {
                convolve(s, x, w, bs, initial, position, b, t, i, lanes, z);
                for (int l = 0; l < LANES; l++) {
                    const float p = sigmoid(z[l]);
                    dz[l] *= p * (1.0f + z[l] * (1.0f - p));
                }
            }
            for (int l = 0; l < LANES; l++) db[l] += dz[l];
            for (int64_t j = 0; j < K; j++) {
                if (position && position[b * T + t] < j) continue;
                const float *from = look_back(s, x, initial, position, b, t, j, i), *wj = w + (K - 1 - j) * LANES;
                float *to = dx + (b * (K - 1 + T) + K - 1 + t - j) * I + i, *dwj = dw + (K - 1 - j) * LANES;
                for (int64_t l = 0; l < lanes; l++) to[l] += wj[l] * dz[l];
                if (!from) continue;
                load(seen, from, lanes);
                for (int l = 0; l < LANES; l++) dwj[l] += dz[l] * seen[l];
            }
        }
        store_rows(dweight + b * K * I + i, dw, K, I, lanes);
        memcpy(dbias + b * I + i, db, sizeof(float) * lanes);
    }
}
