/* Products of a few rows with a matrix that is read once, in the numbers in which it is stored:
   what a model does for each token that it writes. Weights of any width are widened exactly and
   summed in the same order, so the results have the same bits. */
#include "narrow.h"
/* Rows of the matrix that are read side by side. */
enum { STREAMS = 4 };

/* out[m, n] = sum over k of x[m, k] * w[n, k]; columns a multiple of LANES. Two sums of every other
   vector hide the time that one addition takes. */
#define SLIM_PRODUCT(NAME, TYPE)                                                                                   \
    void tandem_slim_##NAME(const float *x, const TYPE *w, float *out, index_t rows, index_t outputs,              \
                            index_t columns, index_t threads) {                                                    \
        _Pragma("omp parallel for schedule(static) num_threads(threads)")                                          \
        for (index_t n = 0; n < outputs; n += STREAMS) {                                                           \
            const int streams = outputs - n < STREAMS ? (int)(outputs - n) : STREAMS;                              \
            for (index_t m = 0; m < rows; m++) {                                                                   \
                vec even[STREAMS], odd[STREAMS];                                                                   \
                const TYPE *row[STREAMS];                                                                          \
                for (int s = 0; s < STREAMS; s++) {                                                                \
                    even[s] = odd[s] = splat(0.0f);                                                                \
                    row[s] = w + (n + (s < streams ? s : 0)) * columns;                                            \
                }                                                                                                  \
                const float *left = x + m * columns;                                                               \
                index_t k = 0;                                                                                     \
                for (; k + 2 * LANES <= columns; k += 2 * LANES) {                                                 \
                    vec first = load(left + k), second = load(left + k + LANES);                                   \
                    for (int s = 0; s < STREAMS; s++) {                                                            \
                        even[s] += first * widen_##NAME(row[s] + k);                                               \
                        odd[s] += second * widen_##NAME(row[s] + k + LANES);                                       \
                    }                                                                                              \
                }                                                                                                  \
                if (k < columns)                                                                                   \
                    for (int s = 0; s < STREAMS; s++) even[s] += load(left + k) * widen_##NAME(row[s] + k);        \
                for (int s = 0; s < streams; s++) out[m * outputs + n + s] = sum_lanes(even[s] + odd[s]);          \
            }                                                                                                      \
        }                                                                                                          \
    }

SLIM_PRODUCT(f32, float)
SLIM_PRODUCT(bf16, uint16_t)
#if defined(__F16C__)
SLIM_PRODUCT(f16, uint16_t)
#endif
