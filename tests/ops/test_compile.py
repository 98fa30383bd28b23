"""Every kernel in every configuration it can be launched with, compiled ahead of time for three GPU generations: no GPU
needed.

No configuration may spill registers, and 16-bit operands must reach the matrix units. fp32 operands are multiplied
exactly, so not there.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import partial

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# compute capability: shared memory of a block, KiB (8.0 stands for all with mma.sync)
TARGETS = {80: 99, 90: 227, 100: 227}
WIDTHS = (64, 80, 128, 256)
TILED = ("rows", "levels", "bounds", "pair_rests", "gradient", "pairs", "dense")
CASES = [
    (kernel, dtype, width, target)
    for target in TARGETS
    for kernel in TILED
    for dtype in ("bfloat16", "float32")
    for width in WIDTHS
]
SMALL = ("parts", "values", "list", "sums", "open", "states")  # one shape is as good as another
CASES += [(kernel, "bfloat16", 64, target) for target in TARGETS for kernel in SMALL]
CASES += [(f"{kernel}-plain", "bfloat16", 128, target) for target in TARGETS for kernel in TILED]  # as most models are
CASES += [(kernel, "bfloat16", 1, 90) for kernel in TILED]  # every size is 1, which the launcher makes a constant
MATRIX = re.compile(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma")
WORKERS = 2


def name(case):
    return "-".join(map(str, case))


@pytest.fixture(scope="session")
def compiled(request, tmp_path_factory):
    """Results of the selected cases, from child processes in which the kernels are not interpreted."""
    wanted = [item.callspec.params["case"] for item in request.session.items if item.name.startswith("test_compiles[")]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, __file__, json.dumps(wanted[i::WORKERS])],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(min(WORKERS, len(wanted)))
    ]
    results = {}
    for child in children:
        results |= json.loads(child.communicate()[0].strip().splitlines()[-1])
    return results


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_compiles(compiled, case):
    kernel, dtype, _, target = case
    kernel = kernel.removesuffix("-plain")
    found = compiled[name(case)]
    assert "error" not in found, found
    assert found["stack"] == found["local"] == 0, f"spills: {found}"
    assert found["shared"] <= 1024 * TARGETS[target], found
    passes = kernel in ("levels", "bounds", "pair_rests")  # g and v are float16 whatever the model is
    assert found["matrix"] == (passes or (dtype == "bfloat16" and kernel not in SMALL)), found


class Recorder:
    """Stands in for a kernel and keeps the arguments it would be launched with."""

    def __init__(self, kernel):
        self.kernel, self.arguments = kernel, None

    def __getitem__(self, grid):
        return lambda **arguments: setattr(self, "arguments", arguments)


def record(module, name):
    kernel = getattr(module, name)
    recorder = kernel if isinstance(kernel, Recorder) else Recorder(kernel)
    setattr(module, name, recorder)
    return recorder


def launch(kernel, dtype, width, target):
    """Kernel, its launch arguments and tile, from the library's own wrappers.

    Grouped queries, window, soft cap, row scale and gate, none of these for names that end in -plain; with a width of 1
    instead everything has size 1 and there is a mask.
    """
    import torch

    from flowroutes_fast.kernels import attention, bound, common, decide, dense, gradient, pairs, parts

    dtype = getattr(torch, dtype)
    n, heads, group, channels = (32, 4, 2, 64) if width > 1 else (1, 1, 1, 1)
    q, k, v = (torch.zeros(h, n, width, dtype=dtype) for h in (heads, heads // group, heads // group))
    g, lse, row, whole = torch.zeros(n, heads, width), torch.zeros(heads, n), torch.zeros(n), torch.zeros(n, channels)
    w_o = torch.zeros(channels, heads, width, dtype=dtype).permute(1, 2, 0)
    if kernel.endswith("-plain"):
        kernel, options, gate = kernel.removesuffix("-plain"), {"scaling": 0.5}, {}
    elif width > 1:
        options, gate = {"scaling": 0.5, "window": 16, "softcap": 30.0, "row_scale": row}, {"gate": g}
    else:
        options, gate = {"scaling": 0.5, "mask": torch.zeros(1, 1, 1)}, {}
    if kernel in ("levels", "bounds", "list", "pair_rests"):
        record(bound, "list_kernel")
        recorder, tiles = record(bound, f"{kernel}_kernel"), bound.configurations(width, width, dtype)
        halves = [
            gradient.Halves(
                torch.zeros(*shape, width, dtype=torch.float16), *(torch.zeros(shape[0], shape[1]) for _ in range(3))
            )
            for shape in ((heads // group, n), (n, heads))
        ]
        inputs = (q, k, *halves, lse, row)
    if kernel == "rows":
        recorder, tiles = record(attention, "rows_kernel"), bound.configurations(width, width, dtype)
        call = partial(attention.attention_rows, q, k, sinks=row[:heads], **options)
    elif kernel == "levels":
        call = partial(bound.sums_below, *inputs, **options)
    elif kernel in ("bounds", "list"):

        def call(tile):
            record(bound, "bounds_kernel")
            # the kernel that counts does not run; "list" needs something
            torch.empty = torch.zeros if kernel == "bounds" else torch.ones
            next(bound.bounds(*inputs, torch.zeros(n, heads), row[:16].to(torch.int32), tile=tile, **options))

    elif kernel == "sums":
        recorder, tiles = record(bound, "sums_kernel"), parts.configurations()

        def call(tile):
            bound.segment_sums(row, torch.arange(n + 1))

    elif kernel in ("open", "states"):
        recorder, tiles = record(decide, f"{kernel}_kernel"), parts.configurations()
        two = torch.zeros(2)

        def call(tile):
            if kernel == "open":
                decide.mark_open(torch.zeros(3, n, dtype=torch.int32), row, row, row, two, row.to(torch.int32))
            else:
                decide.pair_states(torch.arange(n), row, row, row, 0.1, two, size=5, n_key=n, floor=0.1, well=4.0)

    elif kernel == "values":
        recorder, tiles = record(gradient, "values_kernel"), parts.configurations()

        def call(tile):
            gradient.values(v, 64)

    elif kernel == "pair_rests":
        call = partial(bound.pair_rests, *inputs, row, **options)
    elif kernel == "gradient":
        recorder, tiles = record(gradient, "gradient_kernel"), gradient.configurations(dtype, width)
        call = partial(gradient.gradient, whole, w_o, **gate)
    elif kernel == "pairs":
        recorder, tiles = record(pairs, "pairs_kernel"), pairs.configurations(width, dtype)
        call = partial(
            pairs.pair_proximity, q, k, v, w_o, whole, lse, torch.zeros(3, n, dtype=torch.int32), **gate, **options
        )
    elif kernel == "dense":
        recorder, tiles = record(dense, "dense_kernel"), dense.configurations(dtype)
        call = partial(dense.dense_proximity, q, k, v, w_o, whole, lse, **options)
    else:
        recorder, tiles = record(parts, "parts_kernel"), parts.configurations()
        call = partial(parts.part_proximity, whole.to(dtype), whole)
    tile = common.suited(tiles, target // 10)
    call(tile=tile)
    return recorder.kernel, recorder.arguments, tile


def source(kernel, arguments):
    """What the launcher would compile: constants for constexprs, None and 1; pointers and sizes of 16 as divisible
    by 16.
    """
    import torch
    from triton.compiler import ASTSource

    pointers = {
        torch.float32: "*fp32",
        torch.bfloat16: "*bf16",
        torch.float16: "*fp16",
        torch.int32: "*i32",
        torch.int64: "*i64",
        torch.int8: "*i8",
    }
    signature, constants, attributes = {}, {}, {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = pointers[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        if signature[parameter.name].startswith("*") or (signature[parameter.name] == "i32" and value % 16 == 0):
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def resources(cubin, directory):
    """Registers, stack and local memory of a compiled kernel."""
    from triton import knobs

    path = os.path.join(directory, f"{os.getpid()}.cubin")
    with open(path, "wb") as file:
        file.write(cubin)
    text = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "-res-usage", path], check=True, capture_output=True, text=True
    ).stdout
    return {field.lower(): int(re.search(rf"\b{field}:(\d+)", text)[1]) for field in ("REG", "STACK", "LOCAL")}


def compile_all(cases):
    import triton
    from triton.backends.compiler import GPUTarget

    results = {}
    for case in cases:
        function, arguments, tile = launch(*case)
        options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
        try:
            binary = triton.compile(
                source(function, arguments), target=GPUTarget("cuda", case[-1], 32), options=options
            )
        except Exception as error:
            results[name(case)] = {"tile": tile, "error": f"{type(error).__name__}: {str(error)[-2000:]}"}
            continue
        used = resources(binary.asm["cubin"], os.environ["TRITON_CACHE_DIR"])
        matrix = sorted(set(MATRIX.findall(binary.asm["ptx"])))
        results[name(case)] = {
            "tile": tile,
            **used,
            "shared": binary.metadata.shared,
            "matrix": bool(matrix),
            "instructions": matrix,
        }
    return results


if __name__ == "__main__":
    print(json.dumps(compile_all(json.loads(sys.argv[1]))))
