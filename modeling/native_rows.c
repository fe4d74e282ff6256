// Products with some rows of a matrix, for decoding: every row is read once, where it lies.
//
// Rows are float32 or bfloat16 (uint16_t); vectors and sums are float32. What a row or column sums to does not depend on the number of threads.
#include "native_vectors.h"

#define CHAINS 4 // sums of a row that run side by side
#define STEP (LANES * CHAINS)
#define ROWS 8 // picked rows that are read side by side: one by one, each would wait for its page's address and its first line
#define AHEAD 256 // bytes of the next rows that are asked for while these are read

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static inline void ask_for(const void *row) {
    for (int at = 0; at < AHEAD; at += 64) __builtin_prefetch((const char *)row + at);
}

#define DOT(NAME, TYPE)                                                                                                        \
    static inline float dot_##NAME(const TYPE *row, int64_t width, const float *x) {                                           \
        floats sum[CHAINS] = {{0}};                                                                                            \
        float rest = 0;                                                                                                        \
        int64_t d = 0;                                                                                                         \
        for (; d + STEP <= width; d += STEP)                                                                                   \
            for (int c = 0; c < CHAINS; c++) sum[c] += load_##NAME(row + d + c * LANES) * load_float(x + d + c * LANES);       \
        for (; d < width; d++) rest += one_##NAME(row + d) * x[d];                                                             \
        return total((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;                                                            \
    }

// out[a] = <matrix[a], x>, rows in order
#define ALL(NAME, TYPE)                                                                                                        \
    void all_##NAME(const TYPE *matrix, const float *x, float *out, int64_t count, int64_t width, int threads) {               \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1)") for (int64_t a = 0; a < count; a++) {                \
            if (a + 1 < count) ask_for(matrix + (a + 1) * width);                                                              \
            out[a] = dot_##NAME(matrix + a * width, width, x);                                                                 \
        }                                                                                                                      \
    }

// out[a] = <matrix[index[a]], x>; what a block lacks of ROWS are copies of its first row
#define DOTS(NAME, TYPE)                                                                                                       \
    void dots_##NAME(const TYPE *matrix, const int64_t *index, const float *x, float *out, int64_t count, int64_t width,       \
                     int threads) {                                                                                            \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1)") for (int64_t a = 0; a < count; a += ROWS) {          \
            int64_t here = smaller(ROWS, count - a), next = smaller(ROWS, count - a - here), d = 0;                            \
            const TYPE *row[ROWS];                                                                                             \
            floats sum[ROWS][2] = {{{0}}};                                                                                     \
            for (int r = 0; r < ROWS; r++) row[r] = matrix + index[r < here ? a + r : a] * width;                              \
            for (int r = 0; r < next; r++) ask_for(matrix + index[a + ROWS + r] * width);                                      \
            for (; d + 2 * LANES <= width; d += 2 * LANES) {                                                                   \
                floats v = load_float(x + d), w = load_float(x + d + LANES);                                                   \
                for (int r = 0; r < ROWS; r++) {                                                                               \
                    sum[r][0] += load_##NAME(row[r] + d) * v;                                                                  \
                    sum[r][1] += load_##NAME(row[r] + d + LANES) * w;                                                          \
                }                                                                                                              \
            }                                                                                                                  \
            for (int r = 0; r < here; r++) {                                                                                   \
                float rest = 0;                                                                                                \
                for (int64_t left = d; left < width; left++) rest += one_##NAME(row[r] + left) * x[left];                      \
                out[a + r] = total(sum[r][0] + sum[r][1]) + rest;                                                              \
            }                                                                                                                  \
        }                                                                                                                      \
    }

// out[d] = sum_a weights[a] matrix[index[a], d]; each thread has its own columns
#define SUM(NAME, TYPE)                                                                                                        \
    void sum_##NAME(const TYPE *matrix, const int64_t *index, const float *weights, float *out, int64_t count, int64_t width,  \
                    int threads) {                                                                                             \
        int64_t part = (width / threads + STEP - 1) / STEP * STEP;                                                             \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1)") for (int t = 0; t < threads; t++) {                  \
            int64_t from = smaller(t * part, width), to = t == threads - 1 ? width : smaller(from + part, width);              \
            memset(out + from, 0, (to - from) * sizeof *out);                                                                  \
            for (int64_t a = 0; a < count; a += ROWS) {                                                                        \
                int64_t here = smaller(ROWS, count - a), next = smaller(ROWS, count - a - here);                               \
                const TYPE *row[ROWS];                                                                                         \
                float weight[ROWS];                                                                                            \
                for (int r = 0; r < here; r++) row[r] = matrix + index[a + r] * width, weight[r] = weights[a + r];             \
                for (int r = 0; r < next; r++) ask_for(matrix + index[a + ROWS + r] * width + from);                           \
                int64_t d = from;                                                                                              \
                for (; here == ROWS && d + LANES <= to; d += LANES) {                                                          \
                    floats v = load_float(out + d);                                                                            \
                    for (int r = 0; r < ROWS; r++) v += weight[r] * load_##NAME(row[r] + d);                                   \
                    store_float(out + d, v);                                                                                   \
                }                                                                                                              \
                for (; d + LANES <= to; d += LANES) {                                                                          \
                    floats v = load_float(out + d);                                                                            \
                    for (int r = 0; r < here; r++) v += weight[r] * load_##NAME(row[r] + d);                                   \
                    store_float(out + d, v);                                                                                   \
                }                                                                                                              \
                for (; d < to; d++)                                                                                            \
                    for (int r = 0; r < here; r++) out[d] += weight[r] * one_##NAME(row[r] + d);                               \
            }                                                                                                                  \
        }                                                                                                                      \
    }

#define BOTH(KIND)                                                                                                             \
    KIND(float, float)                                                                                                         \
    KIND(bfloat16, uint16_t)

BOTH(DOT)
BOTH(ALL)
BOTH(DOTS)
BOTH(SUM)

// out[a] = <codes[a], x>, exact: the caller keeps x so small that sums fit
void dots_int8(const int8_t *codes, const int16_t *x, int32_t *out, int64_t count, int64_t width, int threads) {
    _Pragma("omp parallel for num_threads(threads) if (threads > 1)") for (int64_t a = 0; a < count; a++) {
        const int8_t *row = codes + a * width;
        if (a + 1 < count) ask_for(row + width);
        int32_t sum = 0;
        for (int64_t d = 0; d < width; d++) sum += (int32_t)row[d] * x[d];
        out[a] = sum;
    }
}
