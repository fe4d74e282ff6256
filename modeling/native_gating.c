// Gated activations `h = act(g) u` and their gradients in one pass over memory. Arithmetic is float32, rounded once when it is stored.
#include "native_vectors.h"

// e^x within 2 units in the last place: 2^n e^r with |r| <= ln(2) / 2 (Cody and Waite's reduction), e^r by its Taylor polynomial
static inline floats exponential(floats x) {
    const floats low = (floats){0} - 87.0f, high = (floats){0} + 88.0f;
    words below = (words)(x < low), above = (words)(x > high);
    x = as_floats((as_words(low) & below) | (as_words(high) & above) | (as_words(x) & ~(below | above)));
    floats n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; // adding 1.5 * 2^23 rounds to an integer
    floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    floats p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * as_floats((words)(__builtin_convertvector(n, integers) + 127) << 23);
}

// act(x); its derivative in `slope`
static inline floats silu(floats x, floats *slope) {
    floats sigmoid = 1.0f / (1.0f + exponential(-x));
    sigmoid = as_floats(as_words(sigmoid) & ~(words)(x < -88.0f)); // where `exponential` ends: 1e-38 of a large number is something
    *slope = sigmoid * (1.0f + x * (1.0f - sigmoid));
    return x * sigmoid;
}

static inline floats relu(floats x, floats *slope) {
    words off = (words)(x <= 0.0f); // which NaN is not
    *slope = as_floats(as_words((floats){0} + 1.0f) & ~off);
    return as_floats(as_words(x) & ~off);
}

static inline floats relu2(floats x, floats *slope) {
    floats value = as_floats(as_words(x) & ~(words)(x <= 0.0f));
    *slope = 2.0f * value;
    return value * value;
}

// hidden = act(gate) * up, over `rows` rows of `width` (a multiple of LANES)
#define FORWARD(ACT, NAME, TYPE)                                                                                               \
    void ACT##_forward_##NAME(const TYPE *gate, const TYPE *up, TYPE *hidden, int64_t rows, int64_t width, int threads) {      \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1)") for (int64_t row = 0; row < rows; row++) {           \
            for (int64_t d = row * width; d < (row + 1) * width; d += LANES) {                                                 \
                floats slope, value = ACT(load_##NAME(gate + d), &slope);                                                      \
                store_##NAME(hidden + d, value * load_##NAME(up + d));                                                         \
            }                                                                                                                  \
        }                                                                                                                      \
    }

// From upstream = d loss / d hidden: hidden again, d loss / d gate, d loss / d up, and <hidden, upstream> of every row
#define BACKWARD(ACT, NAME, TYPE)                                                                                              \
    void ACT##_backward_##NAME(const TYPE *gate, const TYPE *up, const TYPE *upstream, TYPE *hidden, TYPE *d_gate, TYPE *d_up, \
                               float *products, int64_t rows, int64_t width, int threads) {                                    \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1)") for (int64_t row = 0; row < rows; row++) {           \
            floats sum = {0};                                                                                                  \
            for (int64_t d = row * width; d < (row + 1) * width; d += LANES) {                                                 \
                floats slope, value = ACT(load_##NAME(gate + d), &slope);                                                      \
                floats u = load_##NAME(up + d), dh = load_##NAME(upstream + d);                                                \
                store_##NAME(hidden + d, value * u);                                                                           \
                store_##NAME(d_gate + d, dh * u * slope);                                                                      \
                store_##NAME(d_up + d, dh * value);                                                                            \
                sum += value * u * dh;                                                                                         \
            }                                                                                                                  \
            products[row] = total(sum);                                                                                        \
        }                                                                                                                      \
    }

#define BOTH(ACT)                                                                                                              \
    FORWARD(ACT, float, float)                                                                                                 \
    FORWARD(ACT, bfloat16, uint16_t)                                                                                           \
    BACKWARD(ACT, float, float)                                                                                                \
    BACKWARD(ACT, bfloat16, uint16_t)

BOTH(silu)
BOTH(relu)
BOTH(relu2)
