// Batch norm, the sum with a shortcut, and the activation behind them: in training in two passes forward and two backward,
// in evaluation, where mean and variance are known, in one.
//
//   y = act((x - mean) / deviation * scale + shift + shortcut)
//
// Computed one after the other, each of them reads and writes the whole array, and keeps one for the backward pass. Here
// only x and the shortcut are kept; the rest is computed once more. Rows are pixels, NHWC; channels are a multiple of
// WIDTH. All arithmetic is fp32. Sums go by blocks of rows that do not depend on the threads, so that results do not either.

#include <cmath>

#include "common.h"

namespace {

constexpr long BLOCKS = 64;

Register fill(float value) { return Register{} + value; }

// --- Activations ---------------------------------------------------------------------------------------------------

// exp(-u) for u >= 0: 2 to a whole power by the exponent's bits, and to the rest of it, at most a half, by Taylor's series.
Register exp_of_minus(const Register& u) {
    const Register t = (u > 87.f ? fill(87.f) : u) * -1.44269504f;
    const Register whole = (t + 12582912.f) - 12582912.f;  // 1.5 * 2^23: what is added to it is rounded
    const Register r = (t - whole) * 0.69314718f;
    Register p = 1 + r * (1 + r * (0.5f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f))))));
    return (Register)((RegisterInts)p + (__builtin_convertvector(whole, RegisterInts) << 23));
}

// x times the normal distribution's integral, found to 7.5e-8 (Abramowitz and Stegun 1964, 26.2.17).
struct Gelu {
    static Register integral(const Register& z, const Register& density) {  // of exp(-z^2 / 2) / sqrt(2 pi)
        const Register size = z < 0 ? -z : z;
        const Register t = 1 / (1 + 0.2316419f * size);
        const Register tail = density * t * (0.31938153f + t * (-0.356563782f + t * (1.781477937f + t * (-1.821255978f + t * 1.330274429f))));
        return z < 0 ? tail : 1 - tail;
    }
    static Register density(const Register& z) { return 0.39894228f * exp_of_minus(0.5f * z * z); }
    static Register value(const Register& z) { return z * integral(z, density(z)); }
    static Register slope(const Register& z) {
        const Register d = density(z);
        return integral(z, d) + z * d;
    }
};

struct Relu {
    static Register value(const Register& z) { return z < 0 ? fill(0) : z; }  // NaN stays NaN
    static Register slope(const Register& z) { return z <= 0 ? fill(0) : fill(1); }  // NaN hands its gradient on
};

// --- Passes --------------------------------------------------------------------------------------------------------

struct Extent {
    long rows, C, threads;
};

// Call work(block, first row, last row) for every block.
template <class Work> void by_blocks(const Extent& z, const Work& work) {
    const long blocks = std::min(BLOCKS, z.rows);
    share(blocks, z.threads, [&](long, long block, long last) {
        for (; block < last; block++) work(block, z.rows * block / blocks, z.rows * (block + 1) / blocks);
    });
}

// Add up what the blocks have, one after the other: sums (BLOCKS, 2, C) -> total (2, C).
void gather(const float* sums, const Extent& z, double* total) {
    std::fill_n(total, 2 * z.C, 0.);
    for (long block = 0; block < std::min(BLOCKS, z.rows); block++)
        for (long c = 0; c < 2 * z.C; c++) total[c] += double(sums[block * 2 * z.C + c]);
}

// What a norm multiplies by and adds: (x - mean) / deviation * scale + shift = x * factor + offset.
struct Affine {
    std::vector<float> factor, offset;
    Affine(const float* scale, const float* shift, const float* mean, const float* variance, double eps, long C) : factor(C), offset(C) {
        for (long c = 0; c < C; c++) {
            factor[c] = float((scale ? scale[c] : 1.) / std::sqrt(variance[c] + eps));
            offset[c] = float((shift ? shift[c] : 0.) - double(mean[c]) * factor[c]);
        }
    }
};

// Mean and variance of a batch.
void measure(const Value* x, float* mean, float* variance, float* scratch, const Extent& z) {
    const long C = z.C;
    // About the first row: sums of squares about zero would lose a variance that is small beside the mean. A first row
    // that is itself far out costs some of it: 30 deviations 0.04 %, 100 0.3 %.
    by_blocks(z, [&](long block, long row, long last) {
        float* sum = scratch + block * 2 * C;
        std::fill_n(sum, 2 * C, 0.f);
        for (const Value* from = x + row * C; row < last; row++, from += C)
            for (long c = 0; c < C; c += WIDTH) {
                const Register d = Number::read<Register>(from + c) - Number::read<Register>(x + c);
                store(sum + c, load<Register>(sum + c) + d);
                store(sum + C + c, load<Register>(sum + C + c) + d * d);
            }
    });
    std::vector<double> total(2 * C);
    gather(scratch, z, total.data());
    for (long c = 0; c < C; c++) {
        const double away = total[c] / z.rows;
        float about[WIDTH];
        store(about, Number::read<Register>(x + c / WIDTH * WIDTH));
        mean[c] = float(about[c % WIDTH] + away);
        variance[c] = float(std::max(0., total[C + c] / z.rows - away * away));
        if (std::isnan(total[C + c])) variance[c] = float(total[C + c]);  // max(0, NaN) would be 0
    }
}

// y = act(x * factor + offset + shortcut).
template <class Act>
void apply(const Value* x, const Value* shortcut, const Affine& affine, Value* y, const Extent& z) {
    const long C = z.C;
    by_blocks(z, [&](long, long row, long last) {
        for (; row < last; row++)
            for (long c = 0; c < C; c += WIDTH) {
                const long at = row * C + c;
                Register value = Number::read<Register>(x + at) * load<Register>(&affine.factor[c]) + load<Register>(&affine.offset[c]);
                if (shortcut) value += Number::read<Register>(shortcut + at);
                Number::write(y + at, Act::value(value));
            }
    });
}

// The gradient before the activation, and for each block its sum and that of its products with x - mean.
template <class Act>
void differentiate(const Value* dy, const Value* x, const Value* shortcut, const Affine& affine, const float* mean, Value* inner,
                   float* scratch, const Extent& z) {
    const long C = z.C;
    by_blocks(z, [&](long block, long row, long last) {
        float* sum = scratch + block * 2 * C;
        std::fill_n(sum, 2 * C, 0.f);
        for (; row < last; row++)
            for (long c = 0; c < C; c += WIDTH) {
                const long at = row * C + c;
                const Register value = Number::read<Register>(x + at);
                Register before = value * load<Register>(&affine.factor[c]) + load<Register>(&affine.offset[c]);
                if (shortcut) before += Number::read<Register>(shortcut + at);
                const Register slope = Number::read<Register>(dy + at) * Act::slope(before);
                Number::write(inner + at, slope);
                store(sum + c, load<Register>(sum + c) + slope);
                store(sum + C + c, load<Register>(sum + C + c) + slope * (value - load<Register>(mean + c)));
            }
    });
}

// From those dx, dscale and dshift; `inner` may be dx.
void finish(const Value* inner, const Value* x, const Affine& affine, const float* mean, const float* variance, double eps, Value* dx,
            float* dscale, float* dshift, const float* scratch, const Extent& z) {
    const long C = z.C;
    std::vector<double> total(2 * C);
    std::vector<float> of_x(C), constant(C);
    gather(scratch, z, total.data());
    for (long c = 0; c < C; c++) {
        const double rate = float(1 / std::sqrt(variance[c] + eps));
        dshift[c] = float(total[c]);
        dscale[c] = float(total[C + c] * rate);
        const double along = -total[C + c] / z.rows * rate * rate * affine.factor[c];
        of_x[c] = float(along);
        constant[c] = float(-total[c] / z.rows * affine.factor[c] - along * mean[c]);
    }
    by_blocks(z, [&](long, long row, long last) {
        for (; row < last; row++)
            for (long c = 0; c < C; c += WIDTH) {
                const long at = row * C + c;
                Number::write(dx + at, Number::read<Register>(inner + at) * load<Register>(&affine.factor[c]) +
                                           Number::read<Register>(x + at) * load<Register>(&of_x[c]) +
                                           load<Register>(&constant[c]));
            }
    });
}

}  // namespace

// For each activation. shortcut, scale, shift and dshortcut may be null; scratch has room for norm_scratch floats.
#define FUNCTIONS(NAME, Act)                                                                                                  \
    void norm_evaluate_##NAME(const Value* x, const Value* shortcut, const float* scale, const float* shift,                  \
                              const float* mean, const float* variance, Value* y, double eps, long rows, long C,              \
                              long threads) {                                                                                 \
        apply<Act>(x, shortcut, Affine(scale, shift, mean, variance, eps, C), y, {rows, C, threads});                         \
    }                                                                                                                         \
    void norm_forward_##NAME(const Value* x, const Value* shortcut, const float* scale, const float* shift, Value* y,         \
                             float* mean, float* variance, float* scratch, double eps, long rows, long C, long threads) {     \
        measure(x, mean, variance, scratch, {rows, C, threads});                                                              \
        apply<Act>(x, shortcut, Affine(scale, shift, mean, variance, eps, C), y, {rows, C, threads});                         \
    }                                                                                                                         \
    void norm_backward_##NAME(const Value* dy, const Value* x, const Value* shortcut, const float* scale, const float* shift, \
                              const float* mean, const float* variance, Value* dx, Value* dshortcut, float* dscale,           \
                              float* dshift, float* scratch, double eps, long rows, long C, long threads) {                   \
        const Affine affine(scale, shift, mean, variance, eps, C);                                                            \
        Value* inner = dshortcut ? dshortcut : dx;                                                                            \
        differentiate<Act>(dy, x, shortcut, affine, mean, inner, scratch, {rows, C, threads});                                \
        finish(inner, x, affine, mean, variance, eps, dx, dscale, dshift, scratch, {rows, C, threads});                       \
    }

#ifdef OFFERED
extern "C" {

long norm_width() { return WIDTH; }
long norm_scratch(long C) { return BLOCKS * 2 * C; }

FUNCTIONS(gelu, Gelu)
FUNCTIONS(relu, Relu)
}
#endif
