// Quantization of inputs and scaling of products in one pass over memory each, on CPUs.
//
// Bit for bit what `codes.py` and `quant/fake.py` compute in several passes: true divisions, ties to even by adding and
// subtracting, no contraction to fused multiply-add (see the flags in `compiled.py`). OpenMP's symbols are those of the
// runtime that torch has loaded: a second one would keep a second pool of spinning threads.
#include <cstdint>
#include <cstring>

namespace {

constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
constexpr int64_t SMALL = 1 << 15;    // elements that one thread finishes before a second one has started

struct Grid {  // `GridParams`, and what goes with it
    float limit, min_scale, max_scale, min_normal, magic, unit;
    int32_t integer, saturate;
};

inline uint32_t bits(float x) { uint32_t b; std::memcpy(&b, &x, 4); return b; }
inline float real(uint32_t b) { float x; std::memcpy(&x, &b, 4); return x; }

// max |x|. As numbers, bits of magnitudes order as the magnitudes do, NaN above infinity, so that NaN wins.
inline float peak(const float* x, int64_t n) {
    uint32_t top = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t b = bits(x[i]) & 0x7FFFFFFFu;
        top = top > b ? top : b;
    }
    return real(top);
}

inline float bounded(float s, const Grid& g) {
    s = s < g.min_scale ? g.min_scale : s;
    return s > g.max_scale ? g.max_scale : s;
}

inline float clamped(float y, float m) {  // NaN stays
    y = y < -m ? -m : y;
    return y > m ? m : y;
}

template <bool INTEGER, bool SATURATE>
inline float rounded(float y, const Grid& g) {
    if (SATURATE) y = clamped(y, g.limit);
    if (INTEGER) {
        const float offset = g.min_normal * g.magic;
        return (y + offset) - offset;
    }
    float p = real(bits(y) & 0x7F800000u);
    p = (p < g.min_normal ? g.min_normal : p) * g.magic;
    return (y + p) - p;
}

template <bool INTEGER, bool SATURATE>
void codes_row(const float* x, int64_t n, float s, const Grid& g, uint8_t* out) {
    for (int64_t i = 0; i < n; i++) {
        float y = x[i] / s;
        if (INTEGER) {
            if (SATURATE) y = clamped(y, g.limit);
        } else {
            y = rounded<INTEGER, SATURATE>(y, g) * g.unit;
        }
        out[i] = static_cast<uint8_t>(bits(y + (ROUND + 128.0f)));
    }
}

template <bool INTEGER, bool SATURATE>
void grid_row(const float* x, int64_t n, float s, const Grid& g, float* out) {
    for (int64_t i = 0; i < n; i++) out[i] = rounded<INTEGER, SATURATE>(x[i] / s, g) * s;
}

template <typename T>
using Row = void (*)(const float*, int64_t, float, const Grid&, T*);

template <typename T>
void each_row(const Row<T> (&kernels)[4], const float* x, int64_t rows, int64_t width, const Grid& g,
              const float* factor, const float* fixed, float* scales, T* out, int threads) {
    const Row<T> row = kernels[2 * (g.integer != 0) + (g.saturate != 0)];
#pragma omp parallel for num_threads(threads) if (rows * width > SMALL)
    for (int64_t r = 0; r < rows; r++) {
        float s;
        const float top = fixed && !scales ? 0.0f : peak(x + r * width, width);
        if (fixed) {
            s = top != top ? top : *fixed;  // codes have no NaN, so the scale shows it
        } else {
            s = bounded(top / g.limit, g);
            if (factor) s = bounded(s * *factor, g);
        }
        if (scales) scales[r] = s = s + s * 0.0f;  // there is no scale for an infinity
        row(x + r * width, width, s, g, out + r * width);
    }
}

}  // namespace

extern "C" {

// Codes plus 128 and scales of the rows of x [rows, width]: absmax scales, those times a factor, or a fixed one.
void fliqs_codes(const float* x, int64_t rows, int64_t width, const Grid* g, const float* factor, const float* fixed,
                 uint8_t* out, float* scales, int threads) {
    static constexpr Row<uint8_t> kernels[4] = {codes_row<false, false>, codes_row<false, true>,
                                                codes_row<true, false>, codes_row<true, true>};
    each_row(kernels, x, rows, width, *g, factor, fixed, scales, out, threads);
}

// Codes less the zero point of their row, plus 128, and scales: the range of a row always holds 0.
void fliqs_one_sided(const float* x, int64_t rows, int64_t width, const Grid* g, uint8_t* out, float* scales,
                     int threads) {
    const float limit = g->limit;
#pragma omp parallel for num_threads(threads) if (rows * width > SMALL)
    for (int64_t r = 0; r < rows; r++) {
        const float* row = x + r * width;
        float low = 0.0f, high = 0.0f;
        for (int64_t i = 0; i < width; i++) {
            low = row[i] < low ? row[i] : low;
            high = row[i] > high ? row[i] : high;
        }
        const float top = peak(row, width);  // comparisons lose NaN
        float s = bounded((high / 2 - low / 2) / limit, *g) * 2;
        scales[r] = s = s + top * 0.0f;
        float zero = ((-low / s) + ROUND) - ROUND;
        zero = zero > limit ? limit : zero;
        for (int64_t i = 0; i < width; i++) {
            float y = ((row[i] / s + ROUND) - ROUND) + zero;
            y = y < 0.0f ? 0.0f : y;
            y = (y > limit ? limit : y) - zero;
            out[r * width + i] = static_cast<uint8_t>(bits(y + (ROUND + 128.0f)));
        }
    }
}

// Rows of x on the grid of the same scales.
void fliqs_grid(const float* x, int64_t rows, int64_t width, const Grid* g, const float* factor, const float* fixed,
                float* out, int threads) {
    static constexpr Row<float> kernels[4] = {grid_row<false, false>, grid_row<false, true>, grid_row<true, false>,
                                              grid_row<true, true>};
    each_row(kernels, x, rows, width, *g, factor, fixed, nullptr, out, threads);
}

// out [rows, width] times the scale of its row, plus the bias, in place; `repeat` rows in turn have one scale.
void fliqs_finish(float* out, int64_t rows, int64_t width, const float* scales, int64_t repeat, const float* bias,
                  int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > SMALL)
    for (int64_t r = 0; r < rows; r++) {
        float* row = out + r * width;
        const float s = scales[r / repeat];
        if (bias)
            for (int64_t i = 0; i < width; i++) row[i] = row[i] * s + bias[i];
        else
            for (int64_t i = 0; i < width; i++) row[i] *= s;
    }
}
}
