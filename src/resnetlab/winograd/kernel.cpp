// 3x3 convolutions of stride 1 and padding 1, forward and backward, by Winograd's algorithm F(4x4, 3x3) in fp32
// (Lavin and Gray 2015, arXiv:1509.09308, sections 4.1 to 4.3, whose matrices B, G and A these are).
//
// A tile of 4x4 outputs depends on a patch of 6x6 inputs. Transformed, it costs 36 products for a pair of channels,
// where the sum over the window costs 144. Each of the 36 places of the patch is a matrix product of its own:
//
//   output        M = V U    V: transformed patches of x    (tile, C)    U: transformed filters (C, K)
//   gradient of w U = V' M   M: transformed tiles of dy     (tile, K)
//   gradient of x V = M U'   M: transformed patches of dy   (tile, K)    U: filters turned by 180 degrees
//
// Outputs may be max-pooled 2x2 on their way out, since a tile holds whole windows: what was before the pool is never
// stored, forward or backward.
//
// x and y are NHWC, w is (K, 3, 3, C); C and K are multiples of 8. All that is transformed lies in panels, as the
// innermost loop reads it: [36][channels / PANEL][tile or other channel][PANEL]. Work goes by blocks of tiles that stay
// in the cache.

#include <algorithm>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __linux__
// The threads that PyTorch computes with, where OpenMP is known to the process: they look out for work for some
// milliseconds after each of its operations, and threads of our own would have to share the cores with them.
extern "C" {
[[gnu::weak]] void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
[[gnu::weak]] int omp_get_thread_num();
[[gnu::weak]] int omp_get_num_threads();
}
#endif

namespace {

#ifdef __AVX512F__
constexpr long WIDTH = 16;  // floats of a register
#else
constexpr long WIDTH = 8;
#endif
constexpr long PANEL = 2 * WIDTH, ROWS = 6;  // of the block of results that stays in registers
constexpr long BLOCK = 36;                   // tiles; of 12 to 192 the best or near it for most shapes, and a multiple of ROWS
constexpr long PLACES = 36, OCT = 8;
constexpr long GROUP = 8;  // filters transformed together, so that they are written in runs

typedef float Register __attribute__((vector_size(4 * WIDTH)));
typedef float Oct __attribute__((vector_size(4 * OCT)));
typedef int Ints __attribute__((vector_size(4 * OCT)));
typedef unsigned char Bytes __attribute__((vector_size(OCT)));

struct Shape {
    long images, height, width;
    long down() const { return (height + 3) / 4; }
    long across() const { return (width + 3) / 4; }
    long tiles() const { return images * down() * across(); }
};

struct Tile {
    long image, top, left;  // of its outputs
    Tile(const Shape& s, long index)
        : image(index / s.across() / s.down()), top(index / s.across() % s.down() * 4), left(index % s.across() * 4) {}
};

long panels(long channels) { return (channels + PANEL - 1) / PANEL; }
// Floats from one of the 36 places to the next: an odd number of panel rows, so that the places of a tile do not all fall
// on the same few sets of the cache.
long stride(long channels, long rows) { return (panels(channels) * rows | 1) * PANEL; }
long size(long channels, long rows) { return PLACES * stride(channels, rows); }

// Vectors at any address: tensors need not be aligned as vectors are.
template <class V> V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
template <class V> void store(void* to, const V& v) { std::memcpy(to, &v, sizeof v); }

// --- The transforms, along one axis --------------------------------------------------------------------------------

template <class V> void transform_patch(const V* d, long s, V* out, long t) {  // B' d: 6 -> 6
    V a = d[4 * s] - 4 * d[2 * s], b = d[3 * s] - 4 * d[s], c = d[4 * s] - d[2 * s], e = 2 * (d[3 * s] - d[s]);
    out[0] = 4 * d[0] - 5 * d[2 * s] + d[4 * s];
    out[t] = a + b, out[2 * t] = a - b, out[3 * t] = c + e, out[4 * t] = c - e;
    out[5 * t] = 4 * d[s] - 5 * d[3 * s] + d[5 * s];
}

template <class V> void transform_back(const V* m, long s, V* out, long t) {  // A' m: 6 -> 4
    V a = m[s] + m[2 * s], b = m[s] - m[2 * s], c = m[3 * s] + m[4 * s], d = m[3 * s] - m[4 * s];
    out[0] = m[0] + a + c, out[t] = b + 2 * d, out[2 * t] = a + 4 * c, out[3 * t] = b + 8 * d + m[5 * s];
}

template <class V> void transform_tile(const V* y, long s, V* out, long t) {  // A y: 4 -> 6
    V a = y[0] + y[2 * s], b = y[s] + y[3 * s], c = y[0] + 4 * y[2 * s], d = 2 * y[s] + 8 * y[3 * s];
    out[0] = y[0], out[t] = a + b, out[2 * t] = a - b, out[3 * t] = c + d, out[4 * t] = c - d, out[5 * t] = y[3 * s];
}

template <class V> void transform_filter(const V* g, long s, V* out, long t) {  // G g: 3 -> 6
    V a = (g[0] + g[2 * s]) * (-1 / 6.f), b = g[s] * (-1 / 6.f), c = g[0] * (1 / 24.f) + g[2 * s] * (1 / 6.f);
    V d = g[s] * (1 / 12.f);
    out[0] = g[0] * 0.25f, out[t] = a + b, out[2 * t] = a - b, out[3 * t] = c + d, out[4 * t] = c - d;
    out[5 * t] = g[2 * s];
}

template <class V> void gather_filter(const V* u, long s, V* out, long t) {  // G' u: 6 -> 3
    V a = (u[s] + u[2 * s]) * (-1 / 6.f), b = (u[2 * s] - u[s]) * (1 / 6.f), c = u[3 * s] + u[4 * s];
    out[0] = u[0] * 0.25f + a + c * (1 / 24.f), out[t] = b + (u[3 * s] - u[4 * s]) * (1 / 12.f);
    out[2 * t] = a + c * (1 / 6.f) + u[5 * s];
}

// --- Images and tiles ----------------------------------------------------------------------------------------------

// Images as they are; outside of them there are zeros.
struct Whole {
    const float* x;
    Shape s;
    long channels;

    struct Pixel {
        const float* x = nullptr;
        Oct read(long c) const { return x ? load<Oct>(x + c) : Oct{}; }
    };
    Pixel pixel(long image, long r, long c) const {
        if (r < 0 || c < 0 || r >= s.height || c >= s.width) return {};
        return {x + ((image * s.height + r) * s.width + c) * channels};
    }
};

// A gradient of what was max-pooled, as that of what was before: each value where its window had its largest, and zeros.
struct Unpooled {
    const float* x;
    const unsigned char* winners;  // which of its window each value was: 0 to 3, row by row
    Shape s;                       // before
    long channels;

    struct Pixel {
        const float* x = nullptr;
        const unsigned char* winners = nullptr;
        int which = 0;
        Oct read(long c) const {
            if (!x) return Oct{};
            const Ints mask = __builtin_convertvector(load<Bytes>(winners + c), Ints) == which;
            return (Oct)(load<Ints>(x + c) & mask);
        }
    };
    Pixel pixel(long image, long r, long c) const {
        const long height = s.height / 2, width = s.width / 2;
        if (r < 0 || c < 0 || r / 2 >= height || c / 2 >= width) return {};
        const long offset = ((image * height + r / 2) * width + c / 2) * channels;
        return {x + offset, winners + offset, int(r % 2 * 2 + c % 2)};
    }
};

// Transform side x side pixels of each tile, from `before` pixels above and to the left of it.
template <int side, int before, class Images>
void spread(const Images& images, long first, long count, float* out) {
    const long channels = images.channels, step = stride(channels, count);
    for (long n = 0; n < count; n++) {
        const Tile tile(images.s, first + n);
        typename Images::Pixel pixel[side * side];
        for (long i = 0; i < side; i++)
            for (long j = 0; j < side; j++)
                pixel[side * i + j] = images.pixel(tile.image, tile.top + i - before, tile.left + j - before);
        for (long c = 0; c < channels; c += OCT) {
            Oct d[side * side], half[6 * side], whole[PLACES];
            for (long i = 0; i < side * side; i++) d[i] = pixel[i].read(c);
            for (long j = 0; j < side; j++)
                if constexpr (side == 6) transform_patch(d + j, 6, half + j, 6);
                else transform_tile(d + j, 4, half + j, 4);
            for (long i = 0; i < 6; i++)
                if constexpr (side == 6) transform_patch(half + 6 * i, 1, whole + 6 * i, 1);
                else transform_tile(half + 4 * i, 1, whole + 6 * i, 1);
            float* o = out + (c / PANEL * count + n) * PANEL + c % PANEL;
            for (long f = 0; f < PLACES; f++) store(o + f * step, whole[f]);
        }
    }
}

template <class Images> void transform_patches(const Images& images, long first, long count, float* out) {
    spread<6, 1>(images, first, count, out);
}

template <class Images> void transform_tiles(const Images& images, long first, long count, float* out) {
    spread<4, 0>(images, first, count, out);
}

// Write the largest of each of the four 2x2 windows of a tile, and which of the window it was. As in PyTorch, the first of
// equals counts, and NaN is larger than all.
void write_pooled(const Oct* outputs, const Shape& s, const Tile& tile, long channels, float* y,
                  unsigned char* winners) {
    const long height = s.height / 2, width = s.width / 2;
    for (long i = 0; i < 2; i++)
        for (long j = 0; j < 2; j++) {
            const long r = tile.top / 2 + i, c = tile.left / 2 + j;
            if (r >= height || c >= width) continue;
            const Oct* window = outputs + 8 * i + 2 * j;
            Oct most = window[0];
            Ints which = {};
            for (int n = 1; n < 4; n++) {
                const Oct value = window[n / 2 * 4 + n % 2];
                const Ints more = (value > most) | (value != value);
                most = more ? value : most;
                which = more ? Ints{} + n : which;
            }
            const long offset = ((tile.image * height + r) * width + c) * channels;
            store(y + offset, most);
            store(winners + offset, __builtin_convertvector(which, Bytes));
        }
}

// Pooled where `winners` is not null.
void transform_products(const float* m, const Shape& s, long channels, long first, long count, float* y,
                        unsigned char* winners) {
    const long step = stride(channels, count);
    for (long n = 0; n < count; n++) {
        const Tile tile(s, first + n);
        const long rows = std::min(4L, s.height - tile.top), columns = std::min(4L, s.width - tile.left);
        for (long c = 0; c < channels; c += OCT) {
            Oct d[PLACES], half[24], whole[16];
            const float* from = m + (c / PANEL * count + n) * PANEL + c % PANEL;
            for (long f = 0; f < PLACES; f++) d[f] = load<Oct>(from + f * step);
            for (long j = 0; j < 6; j++) transform_back(d + j, 6, half + j, 6);
            for (long i = 0; i < 4; i++) transform_back(half + 6 * i, 1, whole + 4 * i, 1);
            if (winners) {
                write_pooled(whole, s, tile, channels, y + c, winners + c);
                continue;
            }
            float* to = y + ((tile.image * s.height + tile.top) * s.width + tile.left) * channels + c;
            for (long i = 0; i < rows; i++)
                for (long j = 0; j < columns; j++) store(to + (i * s.width + j) * channels, whole[4 * i + j]);
        }
    }
}

// --- Threads -------------------------------------------------------------------------------------------------------

// Call work(i) for every i below `threads`, at once where that can be.
template <class Work> void parallel(long threads, const Work& work) {
#ifdef __linux__
    if (threads > 1 && GOMP_parallel && omp_get_thread_num && omp_get_num_threads) {
        struct Team {
            const Work& work;
            long threads;
        } all{work, threads};
        const auto member = [](void* data) {
            const auto& team = *static_cast<Team*>(data);
            for (long i = omp_get_thread_num(); i < team.threads; i += omp_get_num_threads()) team.work(i);
        };
        GOMP_parallel(member, &all, unsigned(threads), 0);
        return;
    }
#endif
    std::vector<std::thread> others;
    long begun = 1;
    try {
        for (; begun < threads; begun++) others.emplace_back(work, begun);
    } catch (const std::system_error&) {  // no more threads here: their shares are done below
    }
    for (long i = begun; i < threads; i++) work(i);
    work(0);
    for (auto& other : others) other.join();
}

// Call work(thread, first, last) for equal shares of the items: always the same ones, so that sums come out the same.
template <class Work> void share(long items, long threads, const Work& work) {
    parallel(threads, [&](long i) { work(i, items * i / threads, items * (i + 1) / threads); });
}

// --- Filters -------------------------------------------------------------------------------------------------------

// w (K, 3, 3, C) -> [36][K / PANEL][C][PANEL]; turned by 180 degrees: [36][C / PANEL][K][PANEL].
void transform_filters(const float* w, long C, long K, bool turned, float* u, long threads) {
    const long rows = turned ? K : C, columns = turned ? C : K, groups = (rows + GROUP - 1) / GROUP;
    share(panels(columns) * groups, threads, [&](long, long item, long last) {
        for (; item < last; item++) {
            const long p = item / groups, first = item % groups * GROUP;
            const long count = std::min(GROUP, rows - first), filled = std::min(PANEL, columns - p * PANEL);
            Oct out[PLACES][GROUP][PANEL / OCT];
            for (long r = 0; r < count; r++) {
                float g[9][PANEL] = {};
                for (long i = 0; i < 9; i++)
                    for (long q = 0; q < filled; q++)
                        g[i][q] = turned ? w[((first + r) * 9 + 8 - i) * C + p * PANEL + q]
                                         : w[((p * PANEL + q) * 9 + i) * C + first + r];
                for (long q = 0; q < PANEL / OCT; q++) {
                    Oct d[9], half[18], whole[PLACES];
                    for (long i = 0; i < 9; i++) d[i] = load<Oct>(g[i] + q * OCT);
                    for (long j = 0; j < 3; j++) transform_filter(d + j, 3, half + j, 3);
                    for (long i = 0; i < 6; i++) transform_filter(half + 3 * i, 1, whole + 6 * i, 1);
                    for (long f = 0; f < PLACES; f++) out[f][r][q] = whole[f];
                }
            }
            float* to = u + (p * rows + first) * PANEL;
            for (long f = 0; f < PLACES; f++, to += stride(columns, rows))
                std::copy_n((const float*)out[f], count * PANEL, to);
        }
    });
}

// The gradient of the transformed filters, [36][K / PANEL][C][PANEL] and one of each thread to be added -> that of w
// (K, 3, 3, C).
void gather_filters(const float* u, long C, long K, float* w, long threads) {
    const long groups = C / GROUP;
    share(panels(K) * groups, threads, [&](long, long item, long last) {
        for (; item < last; item++) {
            const long p = item / groups, first = item % groups * GROUP, filled = std::min(PANEL, K - p * PANEL);
            Oct in[PLACES][GROUP][PANEL / OCT];
            for (long f = 0; f < PLACES; f++) {
                const float* from = u + f * stride(K, C) + (p * C + first) * PANEL;
                std::copy_n(from, GROUP * PANEL, (float*)in[f]);
                for (long thread = 1; thread < threads; thread++) {
                    from += size(K, C);
                    for (long r = 0; r < GROUP; r++)
                        for (long q = 0; q < PANEL / OCT; q++) in[f][r][q] += load<Oct>(from + r * PANEL + q * OCT);
                }
            }
            for (long r = 0; r < GROUP; r++)
                for (long q = 0; q < filled / OCT; q++) {
                    Oct d[PLACES], half[18], whole[9];
                    for (long f = 0; f < PLACES; f++) d[f] = in[f][r][q];
                    for (long j = 0; j < 6; j++) gather_filter(d + j, 6, half + j, 6);
                    for (long i = 0; i < 3; i++) gather_filter(half + 6 * i, 1, whole + 3 * i, 1);
                    float* to = w + (p * PANEL + q * OCT) * 9 * C + first + r;
                    for (long o = 0; o < OCT; o++)
                        for (long i = 0; i < 9; i++, to += C) *to = whole[i][o];
                }
        }
    });
}

// --- Products ------------------------------------------------------------------------------------------------------

// A sum over `outer` panels of `inner` products each (in the last panel `last`), for some rows by PANEL columns of c.
struct Sum {
    long outer, inner, last;
    long a_step, b_step;  // from panel to panel
    bool add;             // to what c holds
};

template <int rows, long row_step, long step> void block(const Sum& s, const float* a, const float* b, float* c) {
    Register sums[rows][2] = {};
    for (long p = 0; p < s.outer; p++) {
        const float *x = a + p * s.a_step, *y = b + p * s.b_step;
        const long count = p == s.outer - 1 ? s.last : s.inner;
        for (long k = 0; k < count; k++, x += step, y += PANEL) {
            const Register left = load<Register>(y), right = load<Register>(y + WIDTH);
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++) {
                sums[i][0] += x[i * row_step] * left;
                sums[i][1] += x[i * row_step] * right;
            }
        }
    }
    for (int i = 0; i < rows; i++, c += PANEL) {
        store(c, s.add ? load<Register>(c) + sums[i][0] : sums[i][0]);
        store(c + WIDTH, s.add ? load<Register>(c + WIDTH) + sums[i][1] : sums[i][1]);
    }
}

template <long row_step, long step> void blocks(long rows, const Sum& s, const float* a, const float* b, float* c) {
    long i = 0;
    for (; i + ROWS <= rows; i += ROWS) block<ROWS, row_step, step>(s, a + i * row_step, b, c + i * PANEL);
    for (; i + 4 <= rows; i += 4) block<4, row_step, step>(s, a + i * row_step, b, c + i * PANEL);
    for (; i < rows; i++) block<1, row_step, step>(s, a + i * row_step, b, c + i * PANEL);
}

// out (tile, K) = v (tile, C) u (C, K), at each place.
void multiply(const float* v, const float* u, long tiles, long C, long K, float* out) {
    const long P = panels(C), Q = panels(K);
    const Sum sum{P, PANEL, C - (P - 1) * PANEL, tiles * PANEL, PANEL * PANEL, false};
    for (long f = 0; f < PLACES; f++, v += stride(C, tiles), u += stride(K, C), out += stride(K, tiles))
        for (long q = 0; q < Q; q++)
            blocks<PANEL, 1>(tiles, sum, v, u + q * C * PANEL, out + q * tiles * PANEL);
}

// du (C, K) += v (tile, C) transposed, times m (tile, K), at each place.
void correlate(const float* v, const float* m, long tiles, long C, long K, float* du) {
    const long P = panels(C), Q = panels(K);
    const Sum sum{1, tiles, tiles, 0, 0, true};
    for (long f = 0; f < PLACES; f++, v += stride(C, tiles), m += stride(K, tiles), du += stride(K, C))
        for (long q = 0; q < Q; q++)
            for (long p = 0; p < P; p++)
                blocks<1, PANEL>(std::min(PANEL, C - p * PANEL), sum, v + p * tiles * PANEL, m + q * tiles * PANEL,
                                 du + (q * C + p * PANEL) * PANEL);
}

}  // namespace

extern "C" {

// Return how many floats `scratch` must have room for.
long winograd_scratch(long C, long K, long threads) {
    return std::max(size(K, C), size(C, K)) + threads * (size(C, BLOCK) + size(K, BLOCK) + size(K, C));
}

// y is pooled where `winners`, of its shape, is not null.
void winograd_forward(const float* x, const float* w, float* y, unsigned char* winners, float* scratch, long images,
                      long height, long width, long C, long K, long threads) {
    const Shape s{images, height, width};
    float *u = scratch, *rest = u + size(K, C);
    transform_filters(w, C, K, false, u, threads);
    share(s.tiles(), threads, [&](long thread, long first, long last) {
        float *v = rest + thread * (size(C, BLOCK) + size(K, BLOCK)), *m = v + size(C, BLOCK);
        for (long count; first < last; first += count) {
            count = std::min(BLOCK, last - first);
            transform_patches(Whole{x, s, C}, first, count, v);
            multiply(v, u, count, C, K, m);
            transform_products(m, s, K, first, count, y, winners);
        }
    });
}

// dx may be null; `winners` is what the forward pass wrote.
void winograd_backward(const float* x, const float* w, const float* dy, const unsigned char* winners, float* dx,
                       float* dw, float* scratch, long images, long height, long width, long C, long K,
                       long threads) {
    const Shape s{images, height, width};
    float *u = scratch, *du = u + size(C, K), *rest = du + threads * size(K, C);
    if (dx) transform_filters(w, C, K, true, u, threads);
    const auto pass = [&](const auto& gradients) {
        share(s.tiles(), threads, [&](long thread, long first, long last) {
            float *v = rest + thread * (size(C, BLOCK) + size(K, BLOCK)), *m = v + size(C, BLOCK);
            float* sum = du + thread * size(K, C);
            std::fill_n(sum, size(K, C), 0.f);
            for (long count; first < last; first += count) {
                count = std::min(BLOCK, last - first);
                transform_patches(Whole{x, s, C}, first, count, v);
                transform_tiles(gradients, first, count, m);
                correlate(v, m, count, C, K, sum);
                if (!dx) continue;
                transform_patches(gradients, first, count, m);
                multiply(m, u, count, K, C, v);
                transform_products(v, s, C, first, count, dx, nullptr);
            }
        });
    };
    if (winners) pass(Unpooled{dy, winners, s, K});
    else pass(Whole{dy, s, K});
    gather_filters(du, C, K, dw, threads);
}
}
