// Products with some rows of a matrix, for decoding: every row is read once, where it lies.
//
// Rows are float32 or bfloat16 (uint16_t); vectors and sums are float32. `index` names the rows, null: rows 0 to count - 1. What a row or column
// sums to does not depend on the number of threads.
#include "native_vectors.h"

#define CHAINS 4 // sums of a row that run side by side
#define STEP (LANES * CHAINS)
#define AHEAD 256 // bytes of the next row that are asked for while this one is read

static inline int64_t row_of(const int64_t *index, int64_t place) { return index ? index[place] : place; }

static inline void ask_for(const void *row) {
    for (int at = 0; at < AHEAD; at += 64) __builtin_prefetch((const char *)row + at);
}

// out[a] = <matrix[index[a]], x>
#define DOTS(NAME, TYPE)                                                                                                       \
    void dots_##NAME(const TYPE *matrix, const int64_t *index, int64_t count, int64_t width, const float *x, float *out,       \
                     int threads) {                                                                                            \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1)") for (int64_t a = 0; a < count; a++) {                \
            const TYPE *row = matrix + row_of(index, a) * width;                                                               \
            if (a + 1 < count) ask_for(matrix + row_of(index, a + 1) * width);                                                 \
            floats sum[CHAINS] = {{0}};                                                                                        \
            int64_t d = 0;                                                                                                     \
            for (; d + STEP <= width; d += STEP)                                                                               \
                for (int c = 0; c < CHAINS; c++) sum[c] += load_##NAME(row + d + c * LANES) * load_float(x + d + c * LANES);   \
            float rest = 0;                                                                                                    \
            for (; d < width; d++) rest += one_##NAME(row + d) * x[d];                                                         \
            out[a] = total((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;                                                      \
        }                                                                                                                      \
    }

// out[d] = sum_a weights[a] matrix[index[a], d]; each thread has its own columns
#define SUM(NAME, TYPE)                                                                                                        \
    void sum_##NAME(const TYPE *matrix, const int64_t *index, int64_t count, int64_t width, const float *weights, float *out,  \
                    int threads) {                                                                                             \
        int64_t part = (width / threads + STEP - 1) / STEP * STEP;                                                             \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1)") for (int t = 0; t < threads; t++) {                  \
            int64_t from = t * part < width ? t * part : width;                                                                \
            int64_t to = t == threads - 1 || from + part > width ? width : from + part;                                        \
            memset(out + from, 0, (to - from) * sizeof *out);                                                                  \
            for (int64_t a = 0; a < count; a++) {                                                                              \
                const TYPE *row = matrix + row_of(index, a) * width;                                                           \
                if (a + 1 < count) ask_for(matrix + row_of(index, a + 1) * width + from);                                      \
                int64_t d = from;                                                                                              \
                for (; d + LANES <= to; d += LANES) {                                                                          \
                    store_float(out + d, load_float(out + d) + weights[a] * load_##NAME(row + d));                             \
                }                                                                                                              \
                for (; d < to; d++) out[d] += weights[a] * one_##NAME(row + d);                                                \
            }                                                                                                                  \
        }                                                                                                                      \
    }

DOTS(float, float)
DOTS(bfloat16, uint16_t)
SUM(float, float)
SUM(bfloat16, uint16_t)

// out[a] = <codes[a], x>, exact: the caller keeps x so small that sums fit
void dots_int8(const int8_t *codes, int64_t count, int64_t width, const int16_t *x, int32_t *out, int threads) {
    _Pragma("omp parallel for num_threads(threads) if (threads > 1)") for (int64_t a = 0; a < count; a++) {
        const int8_t *row = codes + a * width;
        if (a + 1 < count) ask_for(row + width);
        int32_t sum = 0;
        for (int64_t d = 0; d < width; d++) sum += (int32_t)row[d] * x[d];
        out[a] = sum;
    }
}
