// The CUDA kernels, their launchers and their bindings as a Python module for machines without a GPU.
#include "cuda_emulation.h"

#include "../csrc/kernels_cuda.cu"

#include "../csrc/bindings_cuda.h"

PYBIND11_MODULE(cuda_emulation, m) {
    flowroutes::cuda::bind(m);
    m.def("conditions", [](bool lazy_copies, bool descending) {
        emulation::lazy_copies = lazy_copies;
        emulation::descending = descending;
    });
}
