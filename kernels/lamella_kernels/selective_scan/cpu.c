/* The selective scan on a CPU: the equations of eager.py, one pass over memory.

   A task is one batch row and LANES neighbouring channels. Its states, N x LANES numbers, stay in the first-level cache
   while time runs; the innermost loop is over channels, so it vectorises without any sum across lanes but those of dB
   and dC. Forward keeps the state before every S-th token; backward recomputes the S states in between.

   B batch, T time, I channels, N states; arrays are contiguous, in the order of their names in cpu.py. A2 is A log2(e).
   Every task writes its own memory: partial sums over channels (dB, dC) and over batch rows (dA, dD) are added up by the
   caller, in a fixed order. */

#include "../native.h"

typedef struct {
    int64_t batch, time, channels, states, every; /* every: tokens between two saved states */
} Sizes;

WIDE void lamella_scan_forward(const Sizes *s, int64_t first, int64_t last, const float *x, const float *dt,
                               const float *A2, const float *B, const float *C, const float *D, const uint8_t *reset,
                               const float *initial, float *y, float *final, float *saved, float *work) {
    const int64_t T = s->time, I = s->channels, N = s->states, S = s->every;
    const int64_t blocks = (I + LANES - 1) / LANES, keeps = (T + S - 1) / S;
    float *h = work, *a2 = work + N * LANES;
    float d[LANES], xs[LANES], dts[LANES], us[LANES], ys[LANES];
    for (int64_t task = first; task < last; task++) {
        const int64_t b = task / blocks, i = task % blocks * LANES, lanes = I - i < LANES ? I - i : LANES;
        load_rows(a2, A2 + i, N, I, lanes);
        if (initial)
            load_rows(h, initial + b * N * I + i, N, I, lanes);
        else
            memset(h, 0, sizeof(float) * N * LANES);
        if (D)
            load(d, D + i, lanes);
        else
            memset(d, 0, sizeof d);
        for (int64_t t = 0; t < T; t++) {
            const int64_t at = (b * T + t) * I + i;
            if (saved && t % S == 0) store_rows(saved + (b * keeps + t / S) * N * I + i, h, N, I, lanes);
            if (reset && reset[b * T + t]) memset(h, 0, sizeof(float) * N * LANES);
            load(xs, x + at, lanes);
            load(dts, dt + at, lanes);
            for (int l = 0; l < LANES; l++) us[l] = dts[l] * xs[l], ys[l] = d[l] * xs[l];
            for (int64_t n = 0; n < N; n++) {
                const float bn = B[(b * T + t) * N + n], cn = C[(b * T + t) * N + n];
                float *hn = h + n * LANES, *an = a2 + n * LANES;
                for (int l = 0; l < LANES; l++) {
                    hn[l] = power2(dts[l] * an[l]) * hn[l] + us[l] * bn;
                    ys[l] += cn * hn[l];
                }
            }
            memcpy(y + at, ys, sizeof(float) * lanes);
        }
        store_rows(final + b * N * I + i, h, N, I, lanes);
    }
}

/* work: (2 S + 5) N LANES numbers. dB and dC are [blocks, B, T, N], dA is [B, N, I], dD is [B, I]. */
WIDE void lamella_scan_backward(const Sizes *s, int64_t first, int64_t last, const float *x, const float *dt,
                                const float *A2, const float *B, const float *C, const float *D, const uint8_t *reset,
                                const float *saved, const float *dy, const float *dfinal, float *dx, float *ddt,
                                float *dA, float *dB, float *dC, float *dD, float *dinitial, float *work) {
    const int64_t T = s->time, I = s->channels, N = s->states, S = s->every, NL = N * LANES;
    const int64_t blocks = (I + LANES - 1) / LANES, keeps = (T + S - 1) / S;
    float *g = work, *a2 = g + NL, *da = a2 + NL, *start = da + NL, *hs = start + NL, *as = hs + S * NL;
    float d[LANES], dd[LANES], xs[LANES], dts[LANES], us[LANES], dys[LANES], dus[LANES], ddts[LANES];
    for (int64_t task = first; task < last; task++) {
        const int64_t b = task / blocks, i = task % blocks * LANES, lanes = I - i < LANES ? I - i : LANES;
        float *dBs = dB + (task % blocks * s->batch + b) * T * N, *dCs = dC + (task % blocks * s->batch + b) * T * N;
        load_rows(a2, A2 + i, N, I, lanes);
        load_rows(g, dfinal + b * N * I + i, N, I, lanes);
        memset(da, 0, sizeof(float) * NL);
        memset(dd, 0, sizeof dd);
        if (D)
            load(d, D + i, lanes);
        else
            memset(d, 0, sizeof d);
        for (int64_t keep = keeps - 1; keep >= 0; keep--) {
            const int64_t begin = keep * S, end = begin + S < T ? begin + S : T;
            load_rows(start, saved + (b * keeps + keep) * N * I + i, N, I, lanes);
            for (int64_t t = begin; t < end; t++) {
                const int64_t at = (b * T + t) * I + i;
                const float *before = t == begin ? start : hs + (t - begin - 1) * NL;
                float *h = hs + (t - begin) * NL, *a = as + (t - begin) * NL;
                const int fresh = reset && reset[b * T + t];
                load(xs, x + at, lanes);
                load(dts, dt + at, lanes);
                for (int l = 0; l < LANES; l++) us[l] = dts[l] * xs[l];
                for (int64_t n = 0; n < N; n++) {
                    const float bn = B[(b * T + t) * N + n];
                    for (int l = 0; l < LANES; l++) {
                        const int64_t k = n * LANES + l;
                        a[k] = fresh ? 0.0f : power2(dts[l] * a2[k]);
                        h[k] = a[k] * before[k] + us[l] * bn;
                    }
                }
            }
            for (int64_t t = end - 1; t >= begin; t--) {
                const int64_t at = (b * T + t) * I + i;
                const float *before = t == begin ? start : hs + (t - begin - 1) * NL;
                const float *h = hs + (t - begin) * NL, *a = as + (t - begin) * NL;
                load(xs, x + at, lanes);
                load(dts, dt + at, lanes);
                load(dys, dy + at, lanes);
                for (int l = 0; l < LANES; l++) us[l] = dts[l] * xs[l], dus[l] = 0.0f, ddts[l] = 0.0f;
                for (int64_t n = 0; n < N; n++) {
                    const float bn = B[(b * T + t) * N + n], cn = C[(b * T + t) * N + n];
                    const float *hn = h + n * LANES, *an = a + n * LANES, *pn = before + n * LANES, *A2n = a2 + n * LANES;
                    float *gn = g + n * LANES, *dan = da + n * LANES;
                    float sum_b = 0.0f, sum_c = 0.0f;
#pragma omp simd reduction(+ : sum_b, sum_c)
                    for (int l = 0; l < LANES; l++) {
                        const float total = gn[l] + cn * dys[l], passed = total * an[l], w = passed * pn[l];
                        sum_b += us[l] * total;
                        sum_c += dys[l] * hn[l];
                        dus[l] += bn * total;
                        ddts[l] += w * A2n[l];
                        dan[l] += w * dts[l];
                        gn[l] = passed;
                    }
                    dBs[t * N + n] = sum_b;
                    dCs[t * N + n] = sum_c;
                }
                for (int l = 0; l < LANES; l++) {
                    ddts[l] = ddts[l] * 0.69314718f + dus[l] * xs[l]; /* A = A2 ln 2 */
                    dus[l] = dus[l] * dts[l] + d[l] * dys[l];
                    dd[l] += dys[l] * xs[l];
                }
                memcpy(dx + at, dus, sizeof(float) * lanes);
                memcpy(ddt + at, ddts, sizeof(float) * lanes);
            }
        }
        store_rows(dA + b * N * I + i, da, N, I, lanes);
        store_rows(dinitial + b * N * I + i, g, N, I, lanes);
        memcpy(dD + b * I + i, dd, sizeof(float) * lanes);
    }
}
