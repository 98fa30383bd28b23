// Pieces that the CPU kernels share: register tiles, channels sorted by magnitude, attention rows. Included once per
// instruction set.
#pragma once
#include "kernels.h"
#include "simd.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <limits>
#include <mutex>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace flowroutes {
namespace FLOWROUTES_ISA {
namespace {

constexpr int MR = 6;          // rows of a register tile
constexpr int NR = 2 * LANES;  // its columns
constexpr int ROWS = 4 * MR;   // queries that a thread works on together
constexpr int BUCKETS = 96;    // magnitude classes of |y|, four per factor of two

// No more than there are processors or OpenMP was told: where the system refuses a thread, OpenMP ends the process.
inline int thread_count(int asked) {
#ifdef _OPENMP
    return asked > 0 ? std::min(asked, std::max(omp_get_max_threads(), omp_get_num_procs())) : omp_get_max_threads();
#else
    (void)asked;
    return 1;
#endif
}

// What the threads of an OpenMP region do goes through here: an exception must not leave the region. After the first
// one the rest is skipped, and it is thrown again after the region.
class Failure {
  public:
    template <class Work>
    void guard(Work&& work) noexcept {
        if (failed.load(std::memory_order_relaxed)) return;
        try {
            work();
        } catch (...) {
            const std::lock_guard<std::mutex> one(lock);
            if (!failed.exchange(true)) first = std::current_exception();
        }
    }
    void rethrow() const {
        if (first) std::rethrow_exception(first);
    }

  private:
    std::atomic<bool> failed{false};
    std::exception_ptr first;
    std::mutex lock;
};

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// four rows of four numbers each, transposed
inline void transpose4(const float* rows, int64_t stride, float* out, int64_t out_stride) {
    const vec4 a = load4(rows), b = load4(rows + stride), c = load4(rows + 2 * stride), d = load4(rows + 3 * stride);
    const vec4 ab = FLOWROUTES_SHUFFLE(a, b, 0, 4, 1, 5), cd = FLOWROUTES_SHUFFLE(c, d, 0, 4, 1, 5);
    const vec4 AB = FLOWROUTES_SHUFFLE(a, b, 2, 6, 3, 7), CD = FLOWROUTES_SHUFFLE(c, d, 2, 6, 3, 7);
    const vec4 columns[4] = {FLOWROUTES_SHUFFLE(ab, cd, 0, 1, 4, 5), FLOWROUTES_SHUFFLE(ab, cd, 2, 3, 6, 7),
                             FLOWROUTES_SHUFFLE(AB, CD, 0, 1, 4, 5), FLOWROUTES_SHUFFLE(AB, CD, 2, 3, 6, 7)};
    for (int i = 0; i < 4; ++i) std::memcpy(out + i * out_stride, &columns[i], sizeof columns[i]);
}

// rows [n, d] -> panels [ceil(n / NR)][d][NR], zero padded
inline void pack(const float* rows, int64_t stride, int64_t n, int64_t d, float* panels) {
    for (int64_t p = 0; p < n; p += NR) {
        float* out = panels + p * d;
        const int64_t width = std::min<int64_t>(NR, n - p), whole = width == NR ? d / 4 * 4 : 0;
        for (int64_t r = 0; r < NR; r += 4)
            for (int64_t c = 0; c < whole; c += 4)
                transpose4(rows + (p + r) * stride + c, stride, out + c * NR + r, NR);
        for (int64_t c = whole; c < d; ++c)
            for (int64_t r = 0; r < NR; ++r) out[c * NR + r] = r < width ? rows[(p + r) * stride + c] : 0.f;
    }
}

// out[r, 0:NR] = <a_r, panel column> for R rows
template <int R>
inline void tile_of(const float* a, int64_t a_row, const float* panel, int64_t d, float* out, int64_t out_row) {
    vec acc[R][2] = {};
    for (int64_t c = 0; c < d; ++c) {
        const vec b0 = load(panel + c * NR), b1 = load(panel + c * NR + LANES);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            const vec x = splat(a[r * a_row + c]);
            acc[r][0] += x * b0;
            acc[r][1] += x * b1;
        }
    }
    for (int r = 0; r < R; ++r) {
        store(out + r * out_row, acc[r][0]);
        store(out + r * out_row + LANES, acc[r][1]);
    }
}

// <a, b_k> of four vectors
inline vec4 dots(const float* a, const float* b0, const float* b1, const float* b2, const float* b3, int64_t n) {
    vec x0 = {}, x1 = {}, x2 = {}, x3 = {};
    int64_t c = 0;
    for (; c + LANES <= n; c += LANES) {
        const vec x = load(a + c);
        x0 += x * load(b0 + c);
        x1 += x * load(b1 + c);
        x2 += x * load(b2 + c);
        x3 += x * load(b3 + c);
    }
    vec4 out = sums(x0, x1, x2, x3);
    for (; c < n; ++c) out += a[c] * vec4{b0[c], b1[c], b2[c], b3[c]};
    return out;
}

// out[j] = <a, row j> for `count` rows as they are stored, and 0 up to `padded`: for few vectors, where packing would
// cost more
inline void dots_of_rows(const float* a, const float* rows, int64_t stride, int64_t count, int64_t padded, int64_t d,
                         float* out) {
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) {
        const float* b = rows + j * stride;
        const vec4 found = dots(a, b, b + stride, b + 2 * stride, b + 3 * stride, d);
        std::memcpy(out + j, &found, sizeof found);
    }
    for (; j < count; ++j) {
        const float* b = rows + j * stride;
        out[j] = dots(a, b, b, b, b, d)[0];
    }
    for (; j < padded; ++j) out[j] = 0.f;
}

// the same for 1 to MR rows
inline void tile(const float* a, int64_t a_row, int rows, const float* panel, int64_t d, float* out, int64_t out_row) {
    switch (rows) {
        case 1: return tile_of<1>(a, a_row, panel, d, out, out_row);
        case 2: return tile_of<2>(a, a_row, panel, d, out, out_row);
        case 3: return tile_of<3>(a, a_row, panel, d, out, out_row);
        case 4: return tile_of<4>(a, a_row, panel, d, out, out_row);
        case 5: return tile_of<5>(a, a_row, panel, d, out, out_row);
        default: return tile_of<MR>(a, a_row, panel, d, out, out_row);
    }
}

// out[r, 0:NR] += sum_c a[r, c] b[c, 0:NR] for R rows
template <int R>
inline void add_tile_of(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t count, float* out,
                        int64_t out_row) {
    vec acc[R][2] = {};
    for (int64_t c = 0; c < count; ++c) {
        const vec b0 = load(b + c * b_row), b1 = load(b + c * b_row + LANES);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            const vec x = splat(a[r * a_row + c]);
            acc[r][0] += x * b0;
            acc[r][1] += x * b1;
        }
    }
    for (int r = 0; r < R; ++r) {
        store(out + r * out_row, load(out + r * out_row) + acc[r][0]);
        store(out + r * out_row + LANES, load(out + r * out_row + LANES) + acc[r][1]);
    }
}

// the same for 1 to MR rows and 1 to NR columns
inline void add_tile(const float* a, int64_t a_row, int rows, const float* b, int64_t b_row, int64_t count, int width,
                     float* out, int64_t out_row) {
    if (width < NR) {
        for (int r = 0; r < rows; ++r)
            for (int x = 0; x < width; ++x) {
                float sum = 0.f;
                for (int64_t c = 0; c < count; ++c) sum += a[r * a_row + c] * b[c * b_row + x];
                out[r * out_row + x] += sum;
            }
        return;
    }
    switch (rows) {
        case 1: return add_tile_of<1>(a, a_row, b, b_row, count, out, out_row);
        case 2: return add_tile_of<2>(a, a_row, b, b_row, count, out, out_row);
        case 3: return add_tile_of<3>(a, a_row, b, b_row, count, out, out_row);
        case 4: return add_tile_of<4>(a, a_row, b, b_row, count, out, out_row);
        case 5: return add_tile_of<5>(a, a_row, b, b_row, count, out, out_row);
        default: return add_tile_of<MR>(a, a_row, b, b_row, count, out, out_row);
    }
}

// Channels of one row in ascending classes of |y|. end[b]: how many channels lie in class b or below.
struct Magnitudes {
    std::vector<int32_t> channel, end;  // [queries, d_model], [queries, BUCKETS]
    std::vector<float> sorted;          // [queries, d_model]: y of those channels
    std::vector<int32_t> base;          // [queries]: class number of the first bucket
    std::vector<float> smallest;        // [queries]

    static int32_t magnitude_class(float a) {
        int32_t bits;
        std::memcpy(&bits, &a, 4);
        return bits >> 21;
    }

    Magnitudes(const float* y, int64_t queries, int64_t d, int threads)
        : channel(queries * d + LANES),
          end(queries * BUCKETS),
          sorted(queries * d + LANES),
          base(queries),
          smallest(queries) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t i = 0; i < queries; ++i) {
            const float* row = y + i * d;
            float low = std::numeric_limits<float>::infinity(), high = 0.f;
            for (int64_t c = 0; c < d; ++c) {
                const float a = std::fabs(row[c]);
                low = std::min(low, a);
                high = std::max(high, a);
            }
            smallest[i] = low;
            base[i] = magnitude_class(high) - (BUCKETS - 1);
            int32_t* ends = end.data() + i * BUCKETS;
            int32_t* out = channel.data() + i * d;
            std::fill(ends, ends + BUCKETS, 0);
            for (int64_t c = 0; c < d; ++c) ++ends[bucket(i, std::fabs(row[c]))];
            int32_t start[BUCKETS], total = 0;
            for (int b = 0; b < BUCKETS; ++b) {
                start[b] = total;
                total += ends[b];
                ends[b] = total;
            }
            for (int64_t c = 0; c < d; ++c) {
                const int32_t at = start[bucket(i, std::fabs(row[c]))]++;
                out[at] = static_cast<int32_t>(c);
                sorted[i * d + at] = row[c];
            }
        }
    }

    int bucket(int64_t i, float a) const { return std::clamp(magnitude_class(a) - base[i], 0, BUCKETS - 1); }
    // number of leading channels that hold every channel with |y| <= a
    int32_t prefix(int64_t i, float a) const { return end[i * BUCKETS + bucket(i, a)]; }
};

// Rows i0..i0+rows of alpha for one head, into s[rows, stride]; without panels keys are read as they are stored.
// Returns how many leading keys can be visible.
inline int64_t attention_rows(const Alpha& a, int64_t keys, int64_t head, int64_t group, int64_t i0, int rows,
                              const float* k_panels, float* s, int64_t stride) {
    if (a.pattern) {
        for (int r = 0; r < rows; ++r) {
            const float* from = a.pattern + head * a.pattern_head + (i0 + r) * a.pattern_query;
            std::copy(from, from + keys, s + r * stride);
            std::fill(s + r * stride + keys, s + (r + 1) * stride, 0.f);
        }
        return keys;
    }
    constexpr float none = -std::numeric_limits<float>::infinity();
    const int64_t visible = a.mask ? keys : std::min<int64_t>(keys, a.position(i0 + rows - 1) + 1);
    const int64_t padded = round_up(visible, NR);
    const float* q = a.q + head * a.q_head + i0 * a.q_row;
    const int64_t oldest = !a.mask && a.window > 0 ? std::max<int64_t>(0, a.position(i0) + 1 - a.window) / NR * NR : 0;
    const float* keys_of_head = a.k + head / group * a.k_head;
    for (int r = 0; r < rows && !k_panels; ++r)
        dots_of_rows(q + r * a.q_row, keys_of_head + oldest * a.k_row, a.k_row, visible - oldest, padded - oldest,
                     a.d_qk, s + r * stride + oldest);
    for (int64_t j = oldest; j < padded && k_panels; j += NR)
        for (int r = 0; r < rows; r += MR)
            tile(q + r * a.q_row, a.q_row, std::min(MR, rows - r), k_panels + j * a.d_qk, a.d_qk, s + r * stride + j,
                 stride);
    for (int r = 0; r < rows; ++r) {
        float* row = s + r * stride;
        const int64_t last = a.mask ? keys : std::min<int64_t>(keys, a.position(i0 + r) + 1);
        const int64_t first = !a.mask && a.window > 0 ? std::max<int64_t>(0, last - a.window) : 0;
        std::fill(row, row + first, none);
        std::fill(row + last, row + padded, none);
        const float* mask = a.mask ? a.mask + head * a.mask_head + (i0 + r) * a.mask_query : nullptr;
        if (a.softcap > 0.f)
            for (int64_t j = first; j < last; ++j) row[j] = a.softcap * std::tanh(row[j] * a.scale / a.softcap);
        const float factor = a.softcap > 0.f ? 1.f : a.scale;
        if (mask)
            for (int64_t j = first; j < last; ++j) row[j] = row[j] * factor + mask[j];
        vec top = splat(none);
        const int64_t from = first / NR * NR;
        if (mask)
            for (int64_t j = from; j < padded; j += LANES) top = vmax(top, load(row + j));
        else
            for (int64_t j = from; j < padded; j += LANES) {
                const vec x = load(row + j) * factor;
                store(row + j, x);
                top = vmax(top, x);
            }
        const float high = std::max(largest(top), a.sinks ? a.sinks[head] : none);
        if (high == none || (mask && high < -1e30f)) {  // a row that sees nothing
            std::fill(row, row + padded, 0.f);
            continue;
        }
        std::fill(row, row + from, 0.f);
        vec total = {};
        for (int64_t j = from; j < padded; j += LANES) {
            const vec e = vexp(load(row + j) - high);
            store(row + j, e);
            total += e;
        }
        const float scale = 1.f / (sum(total) + (a.sinks ? std::exp(a.sinks[head] - high) : 0.f));
        for (int64_t j = from; j < padded; j += LANES) store(row + j, load(row + j) * scale);
    }
    return visible;
}

// a masked panel: nothing to do, and s already holds its zero proximities
inline bool all_zero(const float* s, int rows, int64_t stride) {
    vec any = {};
    for (int r = 0; r < rows; ++r) any = vmax(any, vmax(load(s + r * stride), load(s + r * stride + LANES)));
    return !(sum(any) > 0.f);
}

}  // namespace
}  // namespace FLOWROUTES_ISA
}  // namespace flowroutes
