/* Products of a few rows with a matrix that is read once, in the numbers in which it is stored:
   what a model does for each token that it writes. Weights of any width are widened exactly and
   summed in the same order, so the results have the same bits. */
#include "narrow.h"

/* Rows of the matrix that are read side by side, and rows of x that share what is widened of them:
   as many as there are registers for. */
enum { STREAMS = 4, SHARING = LANES == 16 ? 2 : 1 };

/* out[m, n] = sum over k of x[m, k] * w[n, k]; columns a multiple of LANES. Two sums of every other
   vector hide the time that one addition takes; how many rows share changes no sum. */
#define SLIM_PRODUCT(NAME, TYPE)                                                                                   \
    INLINE void slim_rows_##NAME(const float *x, const TYPE *const *row, float *out, index_t outputs,              \
                                 index_t columns, const int streams, const int rows) {                             \
        vec even[SHARING][STREAMS], odd[SHARING][STREAMS];                                                         \
        _Pragma("GCC unroll 8")                                                                                    \
        for (int r = 0; r < rows; r++)                                                                             \
            _Pragma("GCC unroll 8")                                                                                \
            for (int s = 0; s < STREAMS; s++) even[r][s] = odd[r][s] = splat(0.0f);                                \
        index_t k = 0;                                                                                             \
        for (; k + 2 * LANES <= columns; k += 2 * LANES)                                                           \
            _Pragma("GCC unroll 8")                                                                                \
            for (int s = 0; s < STREAMS; s++) {                                                                    \
                vec first = widen_##NAME(row[s] + k), second = widen_##NAME(row[s] + k + LANES);                   \
                _Pragma("GCC unroll 8")                                                                            \
                for (int r = 0; r < rows; r++) {                                                                   \
                    even[r][s] += load(x + r * columns + k) * first;                                               \
                    odd[r][s] += load(x + r * columns + k + LANES) * second;                                       \
                }                                                                                                  \
            }                                                                                                      \
        if (k < columns)                                                                                           \
            for (int s = 0; s < STREAMS; s++)                                                                      \
                for (int r = 0; r < rows; r++)                                                                     \
                    even[r][s] += load(x + r * columns + k) * widen_##NAME(row[s] + k);                            \
        for (int r = 0; r < rows; r++)                                                                             \
            for (int s = 0; s < streams; s++) out[r * outputs + s] = sum_lanes(even[r][s] + odd[r][s]);            \
    }                                                                                                              \
    void tandem_slim_##NAME(const float *x, const TYPE *w, float *out, index_t rows, index_t outputs,              \
                            index_t columns, index_t threads) {                                                    \
        _Pragma("omp parallel for schedule(static) num_threads(threads)")                                          \
        for (index_t n = 0; n < outputs; n += STREAMS) {                                                           \
            const int streams = outputs - n < STREAMS ? (int)(outputs - n) : STREAMS;                              \
            const TYPE *row[STREAMS];                                                                              \
            for (int s = 0; s < STREAMS; s++) row[s] = w + (n + (s < streams ? s : 0)) * columns;                  \
            index_t m = 0;                                                                                         \
            for (; m + SHARING <= rows; m += SHARING)                                                              \
                slim_rows_##NAME(x + m * columns, row, out + m * outputs + n, outputs, columns, streams, SHARING); \
            for (; m < rows; m++)                                                                                  \
                slim_rows_##NAME(x + m * columns, row, out + m * outputs + n, outputs, columns, streams, 1);       \
        }                                                                                                          \
    }

SLIM_PRODUCT(f32, float)
SLIM_PRODUCT(bf16, uint16_t)
#if defined(__F16C__)
SLIM_PRODUCT(f16, uint16_t)
#endif
