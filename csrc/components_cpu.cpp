// Proximity of every component's output to one state on the CPU.
// Compiled once per instruction set, with FLOWROUTES_ISA naming the namespace.
#include "parts.h"

namespace flowroutes {
namespace FLOWROUTES_ISA {

void components(const float* output, int64_t stride, int64_t count, const float* whole, float* out, int64_t rows,
                int64_t d, int threads) {
#pragma omp parallel for num_threads(thread_count(threads)) schedule(static)
    for (int64_t n = 0; n < rows; ++n)
        for (int64_t f = 0; f < count; ++f)
            out[n * count + f] = proximity(output + n * stride + f * d, whole + n * d, d);
}

}  // namespace FLOWROUTES_ISA
}  // namespace flowroutes
