// Proximity of whole parts to their states on the CPU.
// Compiled once per instruction set, with FLOWROUTES_ISA naming the namespace.
#include "parts.h"

namespace flowroutes {
namespace FLOWROUTES_ISA {

void parts(const float* part, const float* whole, float* out, int64_t rows, int64_t part_rows, int64_t d, int threads) {
#pragma omp parallel for num_threads(thread_count(threads)) schedule(static)
    for (int64_t n = 0; n < rows; ++n) out[n] = proximity(part + (n % part_rows) * d, whole + n * d, d);
}

}  // namespace FLOWROUTES_ISA
}  // namespace flowroutes
