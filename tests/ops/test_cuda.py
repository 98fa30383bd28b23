"""The CUDA kernels: run on a GPU if there is one, emulated on the host and compiled for inspection if there is a
compiler.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from flowroutes_fast.ops import cuda, dense, native, pairs, parts, reference

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc", path=os.environ.get("PATH", "") + os.pathsep + "/usr/local/cuda/bin")
GXX = shutil.which("g++")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc not found")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# heads, kv heads, queries, keys, d_head, d_model
ODD = (
    (1, 1, 1, 1, 1, 1),
    (3, 1, 5, 9, 7, 67),
    (4, 2, 70, 70, 24, 131),
    (2, 2, 66, 140, 80, 193),
    (6, 3, 3, 40, 136, 64),
)
REAL = ((12, 12, 300, 300, 64, 768), (32, 8, 257, 513, 128, 4096))


def case(shape, dtype, device, seed=0):
    """Pattern, value, w_o and whole: w_o is a view of a linear layer's weight, whole has outliers, zeros and both
    signs of zero.
    """
    heads, kv, queries, keys, d_head, d_model = shape
    g = torch.Generator().manual_seed(seed)
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    pattern = (2 * torch.randn(heads, queries, keys, generator=g)).masked_fill(hidden, -torch.inf).softmax(-1)
    value = torch.randn(kv, keys, d_head, generator=g).to(dtype)
    w_o = (
        (torch.randn(d_model, heads * d_head, generator=g) / d_head**0.5)
        .to(dtype)
        .view(d_model, heads, d_head)
        .permute(1, 2, 0)
    )
    mixed = pattern @ value.float().repeat_interleave(heads // kv, 0)
    # else no part is close to it
    whole = 2 * torch.einsum("hqd,hdm->qm", mixed, w_o.float()) + torch.randn(queries, d_model, generator=g)
    whole[:, :: max(2, d_model // 3)] *= 100
    whole[:, 1::17] = 0.0
    whole[:, 2::17] = -0.0
    return [t.to(device) for t in (pattern, value, w_o, whole)]


def surrounded(tensor):
    """The same tensor as a view into memory that is NaN all around; rows stay aligned."""
    each = 16 // tensor.element_size()
    shape = [n + 2 * each for n in tensor.shape]
    big = torch.full(shape, torch.nan, dtype=tensor.dtype, device=tensor.device)
    big = torch.nn.functional.pad(big, (0, -big.shape[-1] % each), value=torch.nan)
    inner = big[tuple(slice(each, each + n) for n in tensor.shape)]
    inner.copy_(tensor)
    return inner


def listed(pattern, n, seed=1):
    """n sub-edges in no order, heads unevenly, some twice -> index [3, n]."""
    heads, queries, keys = pattern.shape
    g = torch.Generator().manual_seed(seed)
    head = (torch.rand(n, generator=g) ** 2 * heads).long()
    query = torch.randint(queries, (n,), generator=g)
    key = (torch.rand(n, generator=g) * (query + keys - queries + 1)).long()
    return torch.stack([query, key, head]).to(torch.int32).to(pattern.device)


def double(*tensors):
    return [t if t is None else t.double() for t in tensors]


def check_pairs(shape, dtype, device, n, gated=False, ordered=False):
    pattern, value, w_o, whole = case(shape, dtype, device)
    index = listed(pattern, n)
    if ordered:
        index = index[:, index[2].argsort(stable=True)]
    gate = torch.rand(shape[2], shape[0], shape[4], device=device).to(dtype) if gated else None
    wanted = reference.pair_proximity(
        *double(pattern, value, w_o, whole), index, gate=None if gate is None else gate.double()
    )
    query, key, head = index.long()
    alpha = pattern[head, query, key]
    got = pairs.on_cuda(alpha, surrounded(value), w_o, surrounded(whole), index, gate, ordered=ordered)
    assert got.dtype == torch.float32
    written = (alpha[:, None] * value[head // (shape[0] // shape[1]), key].float()).norm(dim=-1) * w_o.float().flatten(
        1
    ).norm(dim=-1)[head]
    error = (got.double() - wanted).abs()
    # the second term: rounding where channels cancel
    assert (error <= 1e-5 * wanted + 3e-6 * written).all(), error.max()


def check_dense(shape, dtype, device, causal=True):
    pattern, value, w_o, whole = case(shape, dtype, device)
    wanted = reference.attention_proximity(*double(pattern, value, w_o, whole))
    hidden = torch.ones(shape[2], shape[3], dtype=torch.bool, device=device).triu(shape[3] - shape[2] + 1)
    alpha = surrounded(pattern)
    if causal:
        alpha.masked_fill_(hidden, torch.nan)
    by_head = torch.full((shape[2], shape[0]), torch.nan, device=device)
    got = dense.on_cuda(
        alpha, value, w_o, surrounded(whole), causal, out=torch.full_like(pattern, torch.nan), by_head=by_head
    )
    error = (got.double() - wanted).abs() / whole.double().abs().sum(-1)[:, None]
    assert error.max() < 3e-6
    assert (got[:, hidden] == 0).all()
    torch.testing.assert_close(by_head, got.sum(-1).T, rtol=1e-5, atol=1e-6)
    same = alpha.clone()
    assert dense.on_cuda(same, value, w_o, whole, causal, out=same) is same
    assert torch.equal(same, got)


def check_parts(rows, part_rows, d_model, device):
    _, _, _, whole = case((1, 1, rows, rows, 1, d_model), torch.float32, device)
    part = surrounded(whole[:part_rows] / 2 + torch.randn(part_rows, d_model).to(device))
    got = parts.on_cuda(part, surrounded(whole))
    wanted = reference.proximity(part.double().repeat(-(-rows // part_rows), 1)[:rows], whole.double())
    assert (wanted[:part_rows] > 0).any()
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="session")
def emulated_module(tmp_path_factory):
    if NVCC is None or GXX is None:
        pytest.skip("the CUDA headers or g++ not found")
    pybind11 = pytest.importorskip("pybind11")
    dry = subprocess.run(
        [NVCC, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=True
    ).stderr
    include = Path(re.search(r"\bTOP=(.*)", dry).group(1).strip()) / "include"
    target = tmp_path_factory.mktemp("emulation") / f"cuda_emulation{sysconfig.get_config_var('EXT_SUFFIX')}"
    folders = (include, pybind11.get_include(), sysconfig.get_paths()["include"])
    command = [
        GXX,
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        *(f"-I{folder}" for folder in folders),
    ]
    subprocess.run([*command, ROOT / "tests/cuda_emulation.cpp", "-o", target], check=True)
    spec = importlib.util.spec_from_file_location("cuda_emulation", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=[(False, False), (True, True)], ids=["eager", "lazy"])
def emulated(emulated_module, monkeypatch, request):
    """cuda.py on CPU tensors; copies arrive at once or as late as allowed, threads run up or down."""
    emulated_module.conditions(*request.param)
    monkeypatch.setattr(cuda, "extension", lambda: emulated_module)
    monkeypatch.setattr(cuda, "place", lambda device: {"device": 0, "stream": 0})
    monkeypatch.setattr(cuda, "processors", lambda device: 2)
    return emulated_module


@pytest.mark.parametrize("shape", ODD)
@pytest.mark.parametrize("dtype", DTYPES)
def test_emulated_pairs(emulated, shape, dtype):
    check_pairs(shape, dtype, "cpu", n=1 if shape[0] == 1 else 150)


@pytest.mark.parametrize("dtype", DTYPES)
def test_emulated_pairs_gated_ordered_and_split(emulated, dtype, monkeypatch):
    check_pairs(ODD[2], dtype, "cpu", n=100, gated=True, ordered=True)
    monkeypatch.setattr(cuda, "processors", lambda device: 100)
    check_pairs((2, 1, 4, 9, 20, 600), dtype, "cpu", n=70, gated=True)
    check_pairs((2, 1, 4, 9, 20, 600), dtype, "cpu", n=70)


@pytest.mark.parametrize("shape", ODD[:4])
def test_emulated_dense(emulated, shape):
    check_dense(shape, torch.float32, "cpu")
    check_dense(shape, torch.float32, "cpu", causal=False)


def test_emulated_dense_in_chunks_of_heads(emulated, monkeypatch):
    monkeypatch.setattr(cuda, "DENSE_BYTES", 2 * 5 * 40 * 4)
    check_dense((6, 2, 5, 5, 8, 40), torch.bfloat16, "cpu")


def test_emulated_parts(emulated):
    check_parts(9, 9, 67, "cpu")
    check_parts(6, 2, 130, "cpu")


def test_emulated_nan_in_a_state_stays_nan(emulated):
    pattern, value, w_o, whole = case((2, 2, 4, 4, 8, 16), torch.bfloat16, "cpu")
    whole[2, 3] = torch.nan
    index = torch.tensor([[1, 2, 2], [0, 0, 1], [1, 0, 1]])
    assert pairs.on_cuda(torch.ones(3), value, w_o, whole, index).isnan().tolist() == [False, True, True]
    assert dense.on_cuda(pattern, value, w_o, whole, True)[0].isnan().any(1).tolist() == [
        False,
        False,
        True,
        False,
    ]
    assert parts.on_cuda(whole + 1, whole).isnan().tolist() == [False, False, True, False]


def test_emulated_arguments_are_checked(emulated):
    pattern, value, w_o, whole = case((4, 2, 6, 6, 8, 16), torch.bfloat16, "cpu")
    index = listed(pattern, 5)
    alpha = torch.rand(5)
    assert pairs.on_cuda(alpha[:0], value, w_o, whole, index[:, :0]).shape == (0,)
    with pytest.raises(ValueError, match="alpha must have shape"):
        pairs.on_cuda(alpha[:3], value, w_o, whole, index)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        pairs.on_cuda(alpha, value.double(), w_o.double(), whole, index)
    with pytest.raises(ValueError, match="does not divide"):
        pairs.on_cuda(alpha, torch.cat([value, value[:1]]), w_o, whole, index)
    with pytest.raises(ValueError, match="entry 'device' is missing"):
        emulated.cuda_pairs({"piars": 3})
    fields = ("device", "stream", "rows", "part_rows", "part", "whole", "out")
    with pytest.raises(ValueError, match="unknown entry"):
        emulated.cuda_parts({**dict.fromkeys(fields, 0), "d_model": 1, "wohle": 0})
    with pytest.raises(ValueError, match="is missing"):
        emulated.cuda_dense({"heads": 1, "queries": 1, "keys": 1, "d_model": 4})


def test_missing_gpu_is_said():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available"):
        parts.on_cuda(torch.ones(1, 4), torch.ones(1, 4))


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_compiled_kernels(arch, tmp_path):
    """No spills, registers for four blocks of 128 threads, matrix instructions for 16-bit pairs and none for fp32."""
    command = [
        NVCC,
        "-std=c++17",
        "-O3",
        "--threads",
        "2",
        f"-arch={arch}",
        "-Xptxas",
        "-v",
        "-cubin",
        "--keep",
        "--keep-dir",
        tmp_path,
    ]
    done = subprocess.run(
        [*command, ROOT / "csrc/kernels_cuda.cu", "-o", tmp_path / "out.cubin"],
        capture_output=True,
        text=True,
        check=True,
    )
    kernels = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        done.stdout + done.stderr,
        re.DOTALL,
    )
    assert len(kernels) == 10
    for name, stores, loads, registers in kernels:
        assert (stores, loads) == ("0", "0"), name
        assert int(registers) <= 128, name
    ptx = next(tmp_path.glob("*.ptx")).read_text()
    entries = {part.split("(")[0].split()[-1]: part for part in ptx.split(".entry")[1:]}
    for name, text in entries.items():
        kind = "bf16" if "bfloat16" in name else "f16"
        products = text.count(f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32")
        assert (products > 0) == ("pairs_matrix" in name), name
        assert "tf32" not in text, name
    dense = next(text for name, text in entries.items() if "dense_tile" in name)
    # 8 x 4 sub-edges x 4 channels
    assert [len(re.findall(rf"\b{word}\S*f32", dense)) for word in ("fma", "sub")] == [128, 128]


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    reason = cuda.missing()
    if native.load()[0] is None or not native.load()[0].cuda:
        pytest.skip(str(reason))
    return "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ODD + REAL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_gpu_pairs(gpu, shape, dtype, gated):
    n = 1 if shape[0] == 1 else 150 if shape in ODD else 2000
    check_pairs(shape, dtype, gpu, n, gated)
    check_pairs(shape, dtype, gpu, n, gated, ordered=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_pairs_use_much_shared_memory(gpu, dtype):
    check_pairs((2, 1, 40, 40, 256, 1000), dtype, gpu, 500, gated=True)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*ODD, REAL[0]])
@pytest.mark.parametrize("causal", [False, True])
def test_gpu_dense(gpu, shape, causal):
    check_dense(shape, torch.float32, gpu, causal)


@pytest.mark.gpu
def test_gpu_stream_and_parts(gpu):
    check_parts(999, 333, 4099, gpu)
    with torch.cuda.stream(torch.cuda.Stream()):
        check_parts(9, 9, 67, gpu)
        check_pairs(ODD[2], torch.bfloat16, gpu, 150)
