// Proximity of rank-1 parts activation * w, the neurons of an FFN, on the CPU.
// Compiled once per instruction set, with FLOWROUTES_ISA naming the namespace.
#include "rows.h"

namespace flowroutes {
namespace FLOWROUTES_ISA {

// Only channels with |y_d| < |activation| * max_d |w_d| can take anything off the bound.
void rank1(const float* activation, const float* w, const float* whole, float* proximities, int64_t rows, int64_t parts,
           int64_t d, int threads) {
    threads = thread_count(threads);
    const Magnitudes order(whole, rows, d, threads);
    std::vector<float> reach(parts);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < parts; ++n)
            for (int64_t c = 0; c < d; ++c) reach[n] = std::max(reach[n], std::fabs(w[n * d + c]));
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; ++i) {
            const int32_t* channel = order.channel.data() + i * d;
            const float* y = order.sorted.data() + i * d;
            for (int64_t n = 0; n < parts; ++n) {
                float& out = proximities[i * parts + n];
                const float a = activation[i * parts + n];
                if (!(out > 0.f)) {
                    out = 0.f;
                    continue;
                }
                const int32_t count = order.prefix(i, std::fabs(a) * reach[n] * (1.f + 1e-6f));
                float over = 0.f;
                for (int32_t c = 0; c < count; ++c) {
                    const float z = a * w[n * d + channel[c]];
                    over += std::max(0.f, (std::signbit(y[c]) ? -z : z) - std::fabs(y[c]));
                }
                out = std::max(0.f, out - 2.f * over);
            }
        }
    }
}

}  // namespace FLOWROUTES_ISA
}  // namespace flowroutes
