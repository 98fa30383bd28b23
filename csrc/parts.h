// Proximity of one part to its state. Included once per instruction set.
#pragma once
#include "rows.h"

namespace flowroutes {
namespace FLOWROUTES_ISA {
namespace {

// proximity of z to y
inline float proximity(const float* z, const float* y, int64_t d) {
    vec acc = {};
    float total = 0.f;
    int64_t c = 0;
    for (; c + LANES <= d; c += LANES) {
        const vec yc = load(y + c), w = flip(load(z + c), yc);
        acc += vmin(w, 2.f * vabs(yc) - w);
    }
    for (; c < d; ++c) {
        const float w = std::signbit(y[c]) ? -z[c] : z[c];
        total += std::min(w, 2.f * std::fabs(y[c]) - w);
    }
    total += sum(acc);
    return total < 0.f ? 0.f : total;  // NaN stays NaN
}

}  // namespace
}  // namespace FLOWROUTES_ISA
}  // namespace flowroutes
