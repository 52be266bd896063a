// 3x3 convolutions of stride 1 and padding 1, forward and backward, by Winograd's algorithm F(4x4, 3x3) in fp32, and in
// bf16 where the processor multiplies it (Lavin and Gray 2015, arXiv:1509.09308, sections 4.1 to 4.3, whose matrices B, G
// and A these are but for the points they are made from: NEAR and FAR below).
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
// x and y are NHWC, w is (K, 3, 3, C) and always fp32; C and K are multiples of 8. All that is transformed lies in panels,
// as the innermost loop reads it: [36][channels / PANEL][tile or other channel][PANEL]. What it multiplies is an element
// of 32 bits: a float, or two numbers of bf16 that follow one another in the sum. Transforms and sums are fp32 always.
// Work goes by blocks of tiles that stay in the cache.

#include "common.h"

namespace {

constexpr long PANEL = 2 * WIDTH, ROWS = 6;  // of the block of results that stays in registers
constexpr long BLOCK = 36;                   // tiles; of 12 to 192 the best or near it for most shapes, and a multiple of ROWS
constexpr long SUMMED = 2 * BLOCK;  // rows that gradients of filters are summed over at once, at most
constexpr long PLACES = 36;
constexpr long GROUP = 8;  // filters transformed together, so that they are written in runs

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

// --- The transforms, along one axis --------------------------------------------------------------------------------

// The points are 0, NEAR, -NEAR, FAR, -FAR and infinity. With these rounding is half of what it is with 1 and 2, the
// usual ones, and no product of a transform needs more bits than a float has.
constexpr float NEAR = 0.75f, FAR = 1.5f, NEAR2 = NEAR * NEAR, FAR2 = FAR * FAR;
constexpr float AT_ZERO = 1 / (NEAR2 * FAR2), AT_NEAR = 0.5f / (NEAR2 * (NEAR2 - FAR2)), AT_FAR = 0.5f / (FAR2 * (FAR2 - NEAR2));

template <class V> void transform_patch(const V* d, long s, V* out, long t) {  // B' d: 6 -> 6
    V a = d[4 * s] - FAR2 * d[2 * s], b = NEAR * (d[3 * s] - FAR2 * d[s]);
    V c = d[4 * s] - NEAR2 * d[2 * s], e = FAR * (d[3 * s] - NEAR2 * d[s]);
    out[0] = NEAR2 * FAR2 * d[0] - (NEAR2 + FAR2) * d[2 * s] + d[4 * s];
    out[t] = a + b, out[2 * t] = a - b, out[3 * t] = c + e, out[4 * t] = c - e;
    out[5 * t] = NEAR2 * FAR2 * d[s] - (NEAR2 + FAR2) * d[3 * s] + d[5 * s];
}

template <class V> void transform_back(const V* m, long s, V* out, long t) {  // A' m: 6 -> 4
    V a = m[s] + m[2 * s], b = NEAR * (m[s] - m[2 * s]), c = m[3 * s] + m[4 * s], d = FAR * (m[3 * s] - m[4 * s]);
    out[0] = m[0] + a + c, out[t] = b + d, out[2 * t] = NEAR2 * a + FAR2 * c;
    out[3 * t] = NEAR2 * b + FAR2 * d + m[5 * s];
}

template <class V> void transform_tile(const V* y, long s, V* out, long t) {  // A y: 4 -> 6
    V a = y[0] + NEAR2 * y[2 * s], b = NEAR * (y[s] + NEAR2 * y[3 * s]);
    V c = y[0] + FAR2 * y[2 * s], d = FAR * (y[s] + FAR2 * y[3 * s]);
    out[0] = y[0], out[t] = a + b, out[2 * t] = a - b, out[3 * t] = c + d, out[4 * t] = c - d, out[5 * t] = y[3 * s];
}

template <class V> void transform_filter(const V* g, long s, V* out, long t) {  // G g: 3 -> 6
    V a = AT_NEAR * (g[0] + NEAR2 * g[2 * s]), b = AT_NEAR * NEAR * g[s];
    V c = AT_FAR * (g[0] + FAR2 * g[2 * s]), d = AT_FAR * FAR * g[s];
    out[0] = AT_ZERO * g[0], out[t] = a + b, out[2 * t] = a - b, out[3 * t] = c + d, out[4 * t] = c - d;
    out[5 * t] = g[2 * s];
}

template <class V> void gather_filter(const V* u, long s, V* out, long t) {  // G' u: 6 -> 3
    V a = AT_NEAR * (u[s] + u[2 * s]), b = AT_NEAR * NEAR * (u[s] - u[2 * s]);
    V c = AT_FAR * (u[3 * s] + u[4 * s]), d = AT_FAR * FAR * (u[3 * s] - u[4 * s]);
    out[0] = AT_ZERO * u[0] + a + c, out[t] = b + d, out[2 * t] = NEAR2 * a + FAR2 * c + u[5 * s];
}

// --- Images and tiles ----------------------------------------------------------------------------------------------

// Images as they are; outside of them there are zeros.
struct Whole {
    const Value* x;
    Shape s;
    long channels;

    struct Pixel {
        const Value* x = nullptr;
        template <class V> V read(long c) const { return x ? Number::read<V>(x + c) : V{}; }
    };
    Pixel pixel(long image, long r, long c) const {
        if (r < 0 || c < 0 || r >= s.height || c >= s.width) return {};
        return {x + ((image * s.height + r) * s.width + c) * channels};
    }
};

// A gradient of what was max-pooled, as that of what was before: each value where its window had its largest, and zeros.
struct Unpooled {
    const Value* x;
    const unsigned char* winners;  // which of its window each value was: 0 to 3, row by row
    Shape s;                       // before
    long channels;

    struct Pixel {
        const Value* x = nullptr;
        const unsigned char* winners = nullptr;
        int which = 0;
        template <class V> V read(long c) const {
            if (!x) return V{};
            using I = IntsOf<V>;
            using B = BytesOf<V>;
            const I mask = __builtin_convertvector(load<B>(winners + c), I) == which;
            return (V)((I)Number::read<V>(x + c) & mask);
        }
    };
    Pixel pixel(long image, long r, long c) const {
        const long height = s.height / 2, width = s.width / 2;
        if (r < 0 || c < 0 || r / 2 >= height || c / 2 >= width) return {};
        const long offset = ((image * height + r / 2) * width + c / 2) * channels;
        return {x + offset, winners + offset, int(r % 2 * 2 + c % 2)};
    }
};

// Read side x side pixels of a tile, from `before` pixels above and to the left of it, and transform them.
template <int side, int before, class Images> struct Reader {
    typename Images::Pixel pixels[side * side];

    Reader() = default;
    Reader(const Images& images, long index) {
        const Tile tile(images.s, index);
        for (long i = 0; i < side; i++)
            for (long j = 0; j < side; j++)
                pixels[side * i + j] = images.pixel(tile.image, tile.top + i - before, tile.left + j - before);
    }
    // Ask for what the tile to the left does not hold already: the rows of an image lie too far apart to be foreseen.
    void prefetch(long c) const {
        for (long i = 0; i < side; i++)
            for (long j = side - 4; j < side; j++) __builtin_prefetch(pixels[side * i + j].x + c);
    }
    template <class V> void transform(long c, V* whole) const {
        V d[side * side], half[6 * side];
        for (long i = 0; i < side * side; i++) d[i] = pixels[i].template read<V>(c);
        for (long j = 0; j < side; j++)
            if constexpr (side == 6) transform_patch(d + j, 6, half + j, 6);
            else transform_tile(d + j, 4, half + j, 4);
        for (long i = 0; i < 6; i++)
            if constexpr (side == 6) transform_patch(half + 6 * i, 1, whole + 6 * i, 1);
            else transform_tile(half + 4 * i, 1, whole + 6 * i, 1);
    }
};

// Call work(zero, c) for the channels c on, as many as the vector `zero` has numbers: those of a register while they last.
template <class Work> void by_width(long channels, const Work& work) {
    long c = 0;
    for (; c + WIDTH <= channels; c += WIDTH) work(Register{}, c);
    if (c < channels) work(Oct{}, c);
}

// Patches as `multiply` sums over them: the numbers of an element are neighbouring channels.
template <class Images>
void transform_for_product(const Images& images, long first, long count, float* out) {
    constexpr long WIDE = PANEL * PAIR;
    const long step = stride(images.channels / PAIR, count) * PAIR, last = images.s.tiles() - 1;
    for (long n = 0; n < count; n++) {
        const Reader<6, 1, Images> patch(images, first + n), next(images, std::min(first + n + 1, last));
        by_width(images.channels, [&](auto zero, long c) {
            decltype(zero) whole[PLACES];
            next.prefetch(c);
            patch.transform(c, whole);
            auto* o = (Value*)out + (c / WIDE * count + n) * WIDE + c % WIDE;
            for (long f = 0; f < PLACES; f++) Number::write(o + f * step, whole[f]);
        });
    }
}

// Patches or tiles as `correlate` sums over them: the numbers of an element are neighbouring tiles, the last one's zeros.
template <int side, int before, class Images>
void transform_for_sum(const Images& images, long first, long count, float* out) {
    const long rows = (count + PAIR - 1) / PAIR, step = stride(images.channels, rows);
    const long last = images.s.tiles() - 1;
    for (long n = 0; n < rows; n++) {
        Reader<side, before, Images> tiles[PAIR], next[PAIR];
        for (long i = 0; i < PAIR; i++) {
            const long tile = first + n * PAIR + i;
            if (tile < first + count) tiles[i] = {images, tile};
            next[i] = {images, std::min(tile + PAIR, last)};
        }
        by_width(images.channels, [&](auto zero, long c) {
            decltype(zero) whole[PAIR][PLACES], pair[PAIR];
            for (long i = 0; i < PAIR; i++) {
                next[i].prefetch(c);
                tiles[i].transform(c, whole[i]);
            }
            float* o = out + (c / PANEL * rows + n) * PANEL + c % PANEL;
            for (long f = 0; f < PLACES; f++, o += step) {
                for (long i = 0; i < PAIR; i++) pair[i] = whole[i][f];
                store(o, Number::pack(pair));
            }
        });
    }
}

// Write the largest of each of the four 2x2 windows of a tile, and which of the window it was. As in PyTorch, the first of
// equals counts, and NaN is larger than all.
void write_pooled(const Oct* outputs, const Shape& s, const Tile& tile, long channels, Value* y,
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
            Number::write(y + offset, most);
            store(winners + offset, __builtin_convertvector(which, Bytes));
        }
}

// Pooled where `winners` is not null.
void transform_products(const float* m, const Shape& s, long channels, long first, long count,
                        Value* y, unsigned char* winners) {
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
            auto* to = y + ((tile.image * s.height + tile.top) * s.width + tile.left) * channels + c;
            for (long i = 0; i < rows; i++)
                for (long j = 0; j < columns; j++) Number::write(to + (i * s.width + j) * channels, whole[4 * i + j]);
        }
    }
}

// --- Filters -------------------------------------------------------------------------------------------------------

// w (K, 3, 3, C) -> [36][K / PANEL][C / PAIR][PANEL]; turned by 180 degrees: [36][C / PANEL][K / PAIR][PANEL].
void transform_filters(const float* w, long C, long K, bool turned, float* u, long threads) {
    constexpr long OCTS = PANEL / OCT;
    const long rows = turned ? K : C, columns = turned ? C : K, groups = rows / GROUP;
    share(panels(columns) * groups, threads, [&](long, long item, long last) {
        for (; item < last; item++) {
            const long p = item / groups, first = item % groups * GROUP, filled = std::min(PANEL, columns - p * PANEL);
            float g[GROUP][9][PANEL] = {};  // read in runs: a lone number of each filter would cost a cache line each
            for (long i = 0; i < 9; i++)
                if (turned)
                    for (long r = 0; r < GROUP; r++)
                        std::copy_n(w + ((first + r) * 9 + 8 - i) * C + p * PANEL, filled, g[r][i]);
                else
                    for (long q = 0; q < filled; q++)
                        for (long r = 0; r < GROUP; r++) g[r][i][q] = w[((p * PANEL + q) * 9 + i) * C + first + r];
            Oct out[PLACES][GROUP / PAIR * OCTS][PAIR];
            for (long r = 0; r < GROUP; r++)
                for (long q = 0; q < OCTS; q++) {
                    Oct d[9], half[18], whole[PLACES];
                    for (long i = 0; i < 9; i++) d[i] = load<Oct>(g[r][i] + q * OCT);
                    for (long j = 0; j < 3; j++) transform_filter(d + j, 3, half + j, 3);
                    for (long i = 0; i < 6; i++) transform_filter(half + 3 * i, 1, whole + 6 * i, 1);
                    for (long f = 0; f < PLACES; f++) out[f][r / PAIR * OCTS + q][r % PAIR] = whole[f];
                }
            float* to = u + (p * rows + first) / PAIR * PANEL;
            for (long f = 0; f < PLACES; f++, to += stride(columns, rows / PAIR))
                for (long i = 0; i < GROUP / PAIR * OCTS; i++) store(to + i * OCT, Number::pack(out[f][i]));
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
            float g[PANEL][9][GROUP];
            for (long r = 0; r < GROUP; r++)
                for (long q = 0; q < filled / OCT; q++) {
                    Oct d[PLACES], half[18], whole[9];
                    for (long f = 0; f < PLACES; f++) d[f] = in[f][r][q];
                    for (long j = 0; j < 6; j++) gather_filter(d + j, 6, half + j, 6);
                    for (long i = 0; i < 3; i++) gather_filter(half + 6 * i, 1, whole + 3 * i, 1);
                    for (long o = 0; o < OCT; o++)
                        for (long i = 0; i < 9; i++) g[q * OCT + o][i][r] = whole[i][o];
                }
            for (long q = 0; q < filled; q++)
                for (long i = 0; i < 9; i++) std::copy_n(g[q][i], GROUP, w + ((p * PANEL + q) * 9 + i) * C + first);
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

template <int rows, int registers, long row_step, long step>
void block(const Sum& s, const Element* a, const float* b, float* c) {
    Register sums[rows][registers] = {};
    for (long p = 0; p < s.outer; p++) {
        const auto* x = a + p * s.a_step;
        const float* y = b + p * s.b_step;
        const long count = p == s.outer - 1 ? s.last : s.inner;
        for (long k = 0; k < count; k++, x += step, y += PANEL) {
            Register values[registers];
            for (int j = 0; j < registers; j++) values[j] = load<Register>(y + j * WIDTH);
#pragma GCC unroll 16
            for (int i = 0; i < rows; i++)
                for (int j = 0; j < registers; j++)
                    sums[i][j] = Number::add_product(sums[i][j], load<Element>(x + i * row_step), values[j]);
        }
    }
    for (int i = 0; i < rows; i++, c += PANEL)
        for (int j = 0; j < registers; j++)
            store(c + j * WIDTH, s.add ? load<Register>(c + j * WIDTH) + sums[i][j] : sums[i][j]);
}

template <int registers, long row_step, long step>
void blocks(long rows, const Sum& s, const Element* a, const float* b, float* c) {
    long i = 0;
    for (; i + ROWS <= rows; i += ROWS)
        block<ROWS, registers, row_step, step>(s, a + i * row_step, b, c + i * PANEL);
    for (; i + 4 <= rows; i += 4) block<4, registers, row_step, step>(s, a + i * row_step, b, c + i * PANEL);
    for (; i < rows; i++) block<1, registers, row_step, step>(s, a + i * row_step, b, c + i * PANEL);
}

// The same for a panel of which `filled` columns are in use.
template <long row_step, long step>
void panel(long filled, long rows, const Sum& s, const float* a, const float* b, float* c) {
    const auto* x = (const Element*)a;
    if (filled > WIDTH) blocks<2, row_step, step>(rows, s, x, b, c);
    else blocks<1, row_step, step>(rows, s, x, b, c);
}

// out (tile, K) = v (tile, C) u (C, K), at each place.
void multiply(const float* v, const float* u, long tiles, long C, long K, float* out) {
    C /= PAIR;
    const long P = panels(C), Q = panels(K);
    const Sum sum{P, PANEL, C - (P - 1) * PANEL, tiles * PANEL, PANEL * PANEL, false};
    for (long f = 0; f < PLACES; f++, v += stride(C, tiles), u += stride(K, C), out += stride(K, tiles))
        for (long q = 0; q < Q; q++)
            panel<PANEL, 1>(K - q * PANEL, tiles, sum, v, u + q * C * PANEL, out + q * tiles * PANEL);
}

// du (C, K) = v (tile, C) transposed, times m (tile, K), at each place; or += where `add`.
void correlate(const float* v, const float* m, long tiles, long C, long K, bool add, float* du) {
    tiles = (tiles + PAIR - 1) / PAIR;
    const long P = panels(C), Q = panels(K);
    const Sum sum{1, tiles, tiles, 0, 0, add};
    for (long f = 0; f < PLACES; f++, v += stride(C, tiles), m += stride(K, tiles), du += stride(K, C))
        for (long q = 0; q < Q; q++)
            for (long p = 0; p < P; p++)
                panel<1, PANEL>(K - q * PANEL, std::min(PANEL, C - p * PANEL), sum, v + p * tiles * PANEL,
                                        m + q * tiles * PANEL, du + (q * C + p * PANEL) * PANEL);
}

// --- Convolutions --------------------------------------------------------------------------------------------------

struct Sizes {
    long images, height, width, C, K, threads;
};

void convolve(const Value* x, const float* w, Value* y, unsigned char* winners, float* scratch, const Sizes& z) {
    const Shape s{z.images, z.height, z.width};
    float *u = scratch, *rest = u + size(z.K, z.C);
    transform_filters(w, z.C, z.K, false, u, z.threads);
    share(s.tiles(), z.threads, [&](long thread, long first, long last) {
        float *v = rest + thread * (size(z.C, BLOCK) + size(z.K, BLOCK)), *m = v + size(z.C, BLOCK);
        for (long count; first < last; first += count) {
            count = std::min(BLOCK, last - first);
            transform_for_product(Whole{x, s, z.C}, first, count, v);
            multiply(v, u, count, z.C, z.K, m);
            transform_products(m, s, z.K, first, count, y, winners);
        }
    });
}

void differentiate(const Value* x, const float* w, const Value* dy, const unsigned char* winners, Value* dx, float* dw,
                   float* scratch, const Sizes& z) {
    const Shape s{z.images, z.height, z.width};
    float *u = scratch, *du = u + size(z.C, z.K), *rest = du + z.threads * size(z.K, z.C);
    if (dx) transform_filters(w, z.C, z.K, true, u, z.threads);
    constexpr long most = BLOCK * PAIR * PAIR;  // tiles: two in a row, and twice the rows of fp32
    static_assert(most <= SUMMED * PAIR);
    const auto pass = [&](const auto& gradients) {
        share(s.tiles(), z.threads, [&](long thread, long first, long last) {
            float *v = rest + thread * (size(z.C, SUMMED) + size(z.K, SUMMED)), *m = v + size(z.C, SUMMED);
            float* sum = du + thread * size(z.K, z.C);
            if (first == last) std::fill_n(sum, size(z.K, z.C), 0.f);
            for (long at = first, count; at < last; at += count) {
                count = std::min(most, last - at);
                transform_for_sum<6, 1>(Whole{x, s, z.C}, at, count, v);
                transform_for_sum<4, 0>(gradients, at, count, m);
                correlate(v, m, count, z.C, z.K, at > first, sum);
            }
            for (long at = first, count; dx && at < last; at += count) {
                count = std::min(BLOCK, last - at);
                transform_for_product(gradients, at, count, m);
                multiply(m, u, count, z.K, z.C, v);
                transform_products(v, s, z.C, at, count, dx, nullptr);
            }
        });
    };
    if (winners) pass(Unpooled{dy, winners, s, z.K});
    else pass(Whole{dy, s, z.K});
    gather_filters(du, z.C, z.K, dw, z.threads);
}

}  // namespace

#ifdef OFFERED
extern "C" {

// Return how many floats `scratch` must have room for.
long winograd_scratch(long C, long K, long threads) {
    return std::max(size(K, C), size(C, K)) + threads * (size(C, SUMMED) + size(K, SUMMED) + size(K, C));
}

// y is pooled where `winners`, of its shape, is not null.
void winograd_forward(const Value* x, const float* w, Value* y, unsigned char* winners, float* scratch, long images,
                      long height, long width, long C, long K, long threads) {
    convolve(x, w, y, winners, scratch, {images, height, width, C, K, threads});
}

// `winners` is what the forward pass wrote; dx may be null.
void winograd_backward(const Value* x, const float* w, const Value* dy, const unsigned char* winners, Value* dx, float* dw,
                       float* scratch, long images, long height, long width, long C, long K, long threads) {
    differentiate(x, w, dy, winners, dx, dw, scratch, {images, height, width, C, K, threads});
}
}
#endif
