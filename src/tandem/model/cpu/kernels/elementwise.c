/* What lies between the products, each in one pass over memory. Rows do not depend on each other,
   so results do not depend on the number of threads. */
#include "vectors.h"

INLINE vec sigmoid_lanes(vec x) { return splat(1.0f) / (splat(1.0f) + exp_lanes(-x)); }

/* One block of columns of a softmax that is taken over many blocks (Milakov and Gimelshein, arXiv
   1805.02867): scores become exp(scores - peak) and peak, sum are brought up to date. `shrink` is
   what sums over earlier blocks are to be multiplied by.

   scores [rows, columns]; peak, sum, shrink [rows]. */
void tandem_softmax_block(float *scores, float *peak, float *sum, float *shrink, index_t rows, index_t columns,
                          index_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (index_t i = 0; i < rows; i++) {
        float *row = scores + i * columns;
        vec top = splat(-INFINITY);
        index_t c = 0;
        for (; c + LANES <= columns; c += LANES) top = larger(load(row + c), top);
        float best = max_lanes(top);
        for (index_t rest = c; rest < columns; rest++) best = row[rest] > best ? row[rest] : best;
        if (best < peak[i]) best = peak[i];
        vec total = splat(0.0f);
        for (c = 0; c + LANES <= columns; c += LANES) {
            vec e = exp_lanes(load(row + c) - splat(best));
            store(row + c, e);
            total += e;
        }
        float added = sum_lanes(total);
        for (; c < columns; c++) added += row[c] = expf(row[c] - best);
        shrink[i] = expf(peak[i] - best);
        sum[i] = sum[i] * shrink[i] + added;
        peak[i] = best;
    }
}

/* out = silu(gate) * up, all [count]. */
void tandem_swiglu_forward(const float *gate, const float *up, float *out, index_t count, index_t threads) {
    index_t whole = count / LANES;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (index_t i = 0; i < whole; i++) {
        vec g = load(gate + i * LANES);
        store(out + i * LANES, g * sigmoid_lanes(g) * load(up + i * LANES));
    }
    for (index_t i = whole * LANES; i < count; i++) out[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

void tandem_swiglu_backward(const float *d_out, const float *gate, const float *up, float *d_gate, float *d_up,
                            index_t count, index_t threads) {
    index_t whole = count / LANES;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (index_t i = 0; i < whole; i++) {
        vec d = load(d_out + i * LANES), g = load(gate + i * LANES), u = load(up + i * LANES);
        vec s = sigmoid_lanes(g), one = splat(1.0f);
        store(d_gate + i * LANES, d * u * s * (one + g * (one - s)));
        store(d_up + i * LANES, d * g * s);
    }
    for (index_t i = whole * LANES; i < count; i++) {
        float s = 1.0f / (1.0f + expf(-gate[i]));
        d_gate[i] = d_out[i] * up[i] * s * (1.0f + gate[i] * (1.0f - s));
        d_up[i] = d_out[i] * gate[i] * s;
    }
}

/* y = x * inverse * weight with inverse = 1 / sqrt(mean(x^2) + epsilon) of each row
   (arXiv 1910.07467). x, y [rows, width]; inverse [rows]; width a multiple of LANES. */
void tandem_rms_norm_forward(const float *x, const float *weight, float *y, float *inverse, index_t rows,
                             index_t width, float epsilon, index_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (index_t i = 0; i < rows; i++) {
        const float *from = x + i * width;
        vec squares = splat(0.0f);
        for (index_t c = 0; c < width; c += LANES) squares += load(from + c) * load(from + c);
        inverse[i] = 1.0f / sqrtf(sum_lanes(squares) / width + epsilon);
        for (index_t c = 0; c < width; c += LANES)
            store(y + i * width + c, load(from + c) * splat(inverse[i]) * load(weight + c));
    }
}

/* dx = inverse * (weight * dy - n * mean(weight * dy * n)) with n = x * inverse. */
void tandem_rms_norm_backward(const float *d_y, const float *x, const float *weight, const float *inverse,
                              float *d_x, index_t rows, index_t width, index_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (index_t i = 0; i < rows; i++) {
        const float *from = x + i * width, *d = d_y + i * width;
        vec dot = splat(0.0f), scale = splat(inverse[i]);
        for (index_t c = 0; c < width; c += LANES) dot += load(d + c) * load(weight + c) * load(from + c);
        vec mean = splat(sum_lanes(dot) / width) * scale * scale;
        for (index_t c = 0; c < width; c += LANES)
            store(d_x + i * width + c, scale * (load(d + c) * load(weight + c) - load(from + c) * mean));
    }
}

/* Floats in a vector: widths that kernels take whole must be multiples of it. */
index_t tandem_lanes(void) { return LANES; }
