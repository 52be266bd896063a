// What the compiled parts share: vectors, numbers as tensors hold them, threads.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(BF16) && defined(__AVX512BF16__)
#include <immintrin.h>
#endif

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

// --- Vectors -------------------------------------------------------------------------------------------------------

#ifdef __AVX512F__
constexpr long WIDTH = 16;  // floats of a register
#else
constexpr long WIDTH = 8;
#endif
constexpr long OCT = 8;

typedef float Register __attribute__((vector_size(4 * WIDTH)));
typedef int RegisterInts __attribute__((vector_size(4 * WIDTH)));
typedef float Oct __attribute__((vector_size(4 * OCT)));
typedef int Ints __attribute__((vector_size(4 * OCT)));
typedef unsigned char Bytes __attribute__((vector_size(OCT)));
typedef std::uint16_t Halves __attribute__((vector_size(2 * OCT)));
typedef unsigned char RegisterBytes __attribute__((vector_size(WIDTH)));
template <class V> using IntsOf = std::conditional_t<sizeof(V) == sizeof(Oct), Ints, RegisterInts>;
template <class V> using BytesOf = std::conditional_t<sizeof(V) == sizeof(Oct), Bytes, RegisterBytes>;

// Vectors at any address: tensors need not be aligned as vectors are.
template <class V> V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
template <class V> void store(void* to, const V& v) { std::memcpy(to, &v, sizeof v); }

// --- Numbers -------------------------------------------------------------------------------------------------------

// How tensors hold them (Value), and what the innermost loop of a product multiplies: PAIR numbers in an Element. A
// library is compiled for one kind; where the processor has no instructions for it, there is nothing in it to be called.
#if !defined(BF16) || defined(__AVX512BF16__)
#define OFFERED
#endif

#if defined(BF16) && defined(OFFERED)
struct Number {
    using Value = std::uint16_t;
    using Element = std::uint32_t;
    static constexpr long PAIR = 2;
    typedef std::uint16_t Whole __attribute__((vector_size(2 * WIDTH)));

    static Halves round(const Oct& v) { return (Halves)_mm256_cvtneps_pbh((__m256)v); }  // NaN stays NaN
    static Whole round(const Register& v) { return (Whole)_mm512_cvtneps_pbh((__m512)v); }
    template <class V> static V read(const Value* from);
    template <class V> static void write(Value* to, const V& v) { store(to, round(v)); }
    template <class V> static IntsOf<V> pack(const V* v) {
        return __builtin_convertvector(round(v[0]), IntsOf<V>) | __builtin_convertvector(round(v[1]), IntsOf<V>) << 16;
    }
    static Register add_product(const Register& sum, Element x, const Register& y) {
        return (Register)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(x)), (__m512bh)y);
    }
};
template <> inline Oct Number::read<Oct>(const Value* from) {
    return (Oct)(__builtin_convertvector(load<Halves>(from), Ints) << 16);
}
template <> inline Register Number::read<Register>(const Value* from) {
    return (Register)(__builtin_convertvector(load<Whole>(from), RegisterInts) << 16);
}
#else
struct Number {
    using Value = float;
    using Element = float;
    static constexpr long PAIR = 1;

    template <class V> static V read(const Value* from) { return load<V>(from); }
    template <class V> static void write(Value* to, const V& v) { store(to, v); }
    template <class V> static V pack(const V* v) { return v[0]; }
    static Register add_product(const Register& sum, Element x, const Register& y) { return sum + x * y; }
};
#endif
using Value = Number::Value;
using Element = Number::Element;
constexpr long PAIR = Number::PAIR;

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

}  // namespace
