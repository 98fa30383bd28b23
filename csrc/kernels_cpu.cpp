// The table of the CPU's kernels, and what the compiler made of their arithmetic.
// Compiled once per instruction set, with FLOWROUTES_ISA naming the namespace.
#include "rows.h"

namespace flowroutes {
namespace FLOWROUTES_ISA {
namespace {

// What compiler options that define no macro may have changed (clang's -fassociative-math), or null.
const char* arithmetic() {
    volatile float big = 1e8f, one = 1.f, zero = 0.f, minus = -0.f;  // nothing is known while compiling
    const float b = big, o = one, z = zero, m = minus;
    if ((b + o) - b != 0.f) return "sums are reordered";
    const vec rounded = (splat(o) / 4.f + 12582912.f) - 12582912.f;  // as in vexp
    if (rounded[0] != 0.f) return "sums are reordered";
    if (std::signbit(m + 0.f) || !std::signbit(z * -o)) return "the sign of zero is lost";
    for (float n = o; n < 20.f; n += o)
        if (n / 3.f != static_cast<float>(double(n) / double(o + o + o)))
            return "divisions are replaced by approximations";
    const float nothing = z / z, most = o / z;
    if (nothing == nothing || !(most > std::numeric_limits<float>::max())) return "infinity and NaN are not kept";
    return nullptr;
}

}  // namespace

void certified(const Certified&, std::vector<Edge>&, Counts&);
void bound(const Bound&, std::vector<Edge>&);
void pairs(const Certified&, const int32_t*, const int32_t*, const int32_t*, float*, int64_t);
void dense(const Dense&, std::vector<Edge>&);
void rank1(const float*, const float*, const float*, float*, int64_t, int64_t, int64_t, int);
void parts(const float*, const float*, float*, int64_t, int64_t, int64_t, int);
void components(const float*, int64_t, int64_t, const float*, float*, int64_t, int64_t, int);
void conservation(const Conservation&, float*);

}  // namespace FLOWROUTES_ISA

#define FLOWROUTES_JOIN_(a, b) a##b
#define FLOWROUTES_JOIN(a, b) FLOWROUTES_JOIN_(a, b)
#define FLOWROUTES_TEXT_(a) #a
#define FLOWROUTES_TEXT(a) FLOWROUTES_TEXT_(a)
const Kernels& FLOWROUTES_JOIN(kernels_, FLOWROUTES_ISA)() {
    using namespace FLOWROUTES_ISA;
    static const Kernels table{FLOWROUTES_TEXT(FLOWROUTES_ISA),
                               arithmetic,
                               certified,
                               bound,
                               pairs,
                               dense,
                               rank1,
                               parts,
                               components,
                               conservation};
    return table;
}

}  // namespace flowroutes
