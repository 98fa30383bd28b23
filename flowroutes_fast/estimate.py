"""``estimate()``: what a trace will take, from a config alone; ``check_memory()``: a refusal with figures instead of a killed process.

Bytes are counted from shapes, tensor by tensor, for the forward pass, for one layer of ours, and for what the trace keeps. What shapes do
not say (how many sub-edges lie above the floor, what the C allocator keeps back, what share of a matrix product's speed is reached) was
measured once on the demo model and stands in the constants below.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowroutes_fast.certify import CAPACITY, MEASURES
from flowroutes_fast.layer import FEW_KEYS, Options
from flowroutes_fast.load import DEMO, DEMO_NAME, _quiet, config_of, copy_of, demo_file, gguf_file, gguf_head, model_folder, named
from flowroutes_fast.models.families import blocks_of, context_length, family_of
from flowroutes_fast.ops import BACKENDS, choose_backend

DENSE_LIMIT = 10**9  # bytes: as in trace()
EDGES_PER_HEAD = {"certified": 9.3, "exact": 13.9, "signed": 14.3}  # listed per row and layer at a floor of 1e-3 (SmolLM2-135M)
EDGES_FLOOR = 0.67  # ... times (1e-3 / floor) to this power
NEURONS_PER_ROW = 0.027  # of the FFN's neurons above a floor of 1e-3
EDGE_BYTES, NEURON_BYTES = 16, 12
KERNEL_EDGE_BYTES = 48  # while a kernel's list is joined and handed over
TOKENIZER_BYTES = 1000  # per entry of the vocabulary
ALLOCATOR_SHARE, ALLOCATOR_BYTES = 0.75, 64 * 2**20  # kept back by the C allocator: of what comes and goes, at most per thread
ROOM = 192 * 2**20  # bytes of address space below which libraries' new threads abort the process
CONTEXT_BYTES = 500 * 10**6  # a CUDA context
CHUNK_BYTES = 6 * 64 * 2**20  # temporaries of the reference backend's chunks
DENSE_CHUNK_BYTES = 2 * 256 * 2**20  # u = v W_O and its float copies in the CUDA backend
ROWS = 24  # queries that a native thread works on together
BUCKETS = 96  # magnitude classes of a row
FORWARD_SHARE = 0.67  # of a matrix product's speed; those of our kernels follow (benchmarks/results)
SHARES = {"certified": 0.17, "exact": 0.24, "signed": 0.4}
REFERENCE_SPEED = 2e8  # elements of [query, key, head, d_model] per second: PyTorch on two cores
DATASHEET = {  # dense FLOP/s in 16 bits and in float32, NVIDIA's datasheets
    "B200": (2.25e15, 75e12), "H200": (989e12, 67e12), "H100": (989e12, 67e12), "A100": (312e12, 19.5e12), "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12), "A10": (125e12, 31.2e12), "V100": (125e12, 15.7e12), "T4": (65e12, 8.1e12), "4090": (165e12, 82.6e12),
}  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """Peak memory in bytes and duration in seconds of one ``trace()``. :meth:`rows` says what is measured and what is predicted.

    Attributes:
        weights: parameters and buffers of the model. process: Python, torch, transformers and whatever else this process holds, and the
            tokenizer (on a GPU: the CUDA context).
        activations: the forward pass's own peak. captured: those of one layer that our kernels read; they live while our kernels run.
        buffers: what our kernels allocate for one layer. results: what the Trace keeps, all layers together (always in main memory).
        allocator: freed memory that the C allocator keeps back.
        throughput: FLOP per second that a matrix product reaches; seconds follow from it. throughput_source: where it comes from.
        flops: floating point operations, the forward pass's and ours. read: bytes read from disk while streaming (0: none).
        bandwidth: bytes per second of that disk, measured; None if the checkpoint is not here.
    """

    model: str
    tokens: int
    batch: int
    precision: str
    measure: str
    backend: str
    device: str
    dtype: str
    weights: int
    process: int
    activations: int
    captured: int
    buffers: int
    results: int
    allocator: int
    seconds: float
    throughput: float
    throughput_source: str
    process_measured: bool = False
    notes: tuple[str, ...] = ()
    flops: float = 0.0
    read: int = 0
    bandwidth: float | None = None

    @property
    def additional(self) -> int:
        """Bytes that a process needs beyond the opened model. The forward pass's temporaries are gone when our buffers are there."""
        working = max(self.activations, self.captured + self.buffers) + self.allocator
        return working + (self.results if self.device == "cpu" else 0)

    @property
    def total(self) -> int:
        """Peak bytes: resident memory of the process, or the device's on a GPU."""
        return self.weights + self.process + self.additional

    def rows(self) -> list[tuple[str, int, str]]:
        """(item, bytes, how it is known)."""
        where = "" if self.device == "cpu" else ", in main memory, not in the total"
        process = "Python, torch, transformers: measured; tokenizer: predicted" if self.process_measured else "CUDA context: predicted"
        return [
            ("weights", self.weights, f"counted, {self.dtype}" + (", those in memory at a time" if self.read else "")),
            ("process", self.process, process),
            ("activations", self.activations, "predicted from shapes: the forward pass's peak"),
            ("buffers", self.buffers, f"predicted from shapes: one layer's, beside {_size(self.captured)} of its activations"),
            ("results", self.results, f"predicted from sub-edges per row of the demo model{where}"),
            ("allocator", self.allocator, "predicted: freed memory kept back"),
            ("total", self.total, "peak; of activations and buffers (with what they read) the larger counts"),
        ]

    def __str__(self) -> str:
        head = (
            f"{self.model}, {self.tokens} tokens"
            + (f" × {self.batch}" if self.batch > 1 else "")
            + f", {self.precision}, {self.measure}, backend {self.backend}"
        )
        table = "\n".join(f"{name:12}{_size(size):>10}  {how}" for name, size, how in self.rows())
        return "\n".join([head, table, f"{'time':12}{_duration(self.seconds):>10}  {self.time_source}", *self.notes])

    @property
    def floor(self) -> float | None:
        """Seconds that reading the weights takes by itself; None if they are not here."""
        return None if not self.read or self.bandwidth is None else self.read / self.bandwidth

    @property
    def time_source(self) -> str:
        return f"{self.flops / 1e12:.3g} TFLOP, predicted at {self.throughput / 1e9:.3g} GFLOP/s of a matrix product ({self.throughput_source})"


def _size(size: float) -> str:
    unit, name = next(((u, n) for u, n in ((1e12, "TB"), (1e9, "GB")) if size >= u), (1e6, "MB"))
    return f"{size / unit:.2f} {name}" if unit > 1e6 else f"{size / unit:.0f} MB"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


@dataclass(frozen=True)
class Shape:
    """What a config says about a decoder's tensors."""

    layers: int
    heads: int
    kv_heads: int
    d_qk: int
    d_head: int
    d_model: int
    ffn: int  # neurons that one token passes through
    vocabulary: int
    window: int
    eager: bool

    @property
    def w_o(self) -> int:
        return self.heads * self.d_head * self.d_model


def _largest(config: Any, name: str) -> Any:
    """A config's value; where layers differ, the largest."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers' way to say that layers differ
        return max(getattr(layer, name) for layer in config.per_layer_config)


def shape_of(config: Any) -> Shape:
    """Read a transformers config; ``ValueError`` naming what is missing."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config

    def number(*names: str, otherwise: int | None = None) -> int:
        for name in names:
            found = _largest(config, name)
            if isinstance(found, (list, tuple)) and found and isinstance(found[0], int):
                found = max(found)
            if isinstance(found, int) and not isinstance(found, bool):
                return found
        if otherwise is None:
            raise ValueError(f"the config of {getattr(config, 'model_type', 'this model')!r} has no {names[0]}")
        return otherwise

    d_model, heads = number("hidden_size", "n_embd", "d_model"), number("num_attention_heads", "n_head", "n_heads")
    d_head = number("head_dim", otherwise=d_model // heads)
    latent = number("qk_nope_head_dim", otherwise=0) + number("qk_rope_head_dim", otherwise=0)
    dense = number("intermediate_size", "n_inner", "ffn_dim", otherwise=4 * d_model)
    experts = number("num_experts_per_tok", otherwise=0) * number("moe_intermediate_size", otherwise=dense)
    windowed = getattr(config, "use_sliding_window", True)
    return Shape(
        number("num_hidden_layers", "n_layer"), heads, number("num_key_value_heads", otherwise=heads) or heads, latent or d_head,
        number("v_head_dim", otherwise=d_head), d_model, max(dense, experts), number("vocab_size", otherwise=0),
        number("sliding_window", otherwise=0) if windowed else 0, getattr(config, "_attn_implementation", None) == "eager" or _hooked(config),
    )  # fmt: skip


def _hooked(config: Any) -> bool:
    try:
        return family_of(config).hooked
    except ValueError:
        return False


@dataclass(frozen=True)
class Need:
    """Bytes of one trace beyond the model."""

    activations: int
    captured: int
    buffers: int
    results: int
    allocator: int


def needs(s: Shape, tokens: int, options: Options, *, device: str, element: int, batch: int = 1) -> Need:
    """Bytes from shapes. ``element``: bytes of a number in the model's dtype."""
    t, d, h = tokens, s.d_model, s.heads
    precision, measure, backend, dense, neurons = options.precision, options.measure, options.backend, options.dense, options.neurons
    square = h * t * t
    heads_q, heads_v, kv = h * s.d_qk, h * s.d_head, s.kv_heads * (s.d_qk + s.d_head)
    masked = s.eager or 0 < s.window < t
    mask = t * t * (element if s.eager else 1) if masked else 0
    ffn = 3 * d + heads_q + kv + 4 * s.ffn  # input, state between, normalised; q, k, v; gate, up, their activation and product
    attention = 2 * d + kv + 3 * heads_q + 3 * heads_v  # input, normalised; rotary temporaries, repeated keys and values, output
    scores = square * (2 * element + 4) if s.eager else 0
    forward = batch * (element * t * max(ffn, attention) + scores + mask + 8 * s.vocabulary)
    captured = batch * element * t * (4 * d + heads_q + kv + (s.ffn if neurons else 0)) + batch * mask
    kind = measure if measure == "signed" else precision
    edges = min(EDGES_PER_HEAD[kind] * (1e-3 / max(options.floor, 1e-6)) ** EDGES_FLOOR, (t + 1) / 2) * h * t
    copies = 4 * (2 * t * d + t * (heads_q + kv) + s.w_o) if element != 4 else 0  # in float32: states, q, k, v, W_O
    g = 4 * (t * heads_v + 2 * t * d)  # and signs
    additive = 6 * t * t if masked else 0
    threads = options.threads or torch.get_num_threads()
    if backend == "cpu":
        sorted_rows = 4 * t * (2 * d + BUCKETS + 2)
        per_thread = 4 * ROWS * t * (h * (2 if measure == "signed" else 1) + 1)
        listed = 0.0 if dense else KERNEL_EDGE_BYTES * edges
        whole = precision == "exact" or t <= FEW_KEYS
        packed = 4 * t * (h * (s.d_qk + s.d_head + d + 1) if whole else kv + s.kv_heads)
        buffers: float = copies + g + sorted_rows + per_thread * threads + listed + packed + (4 * square if dense else 0)
    elif backend == "reference":
        buffers = (
            copies + g + min(CHUNK_BYTES, 24 * square * d) + (120 if precision == "certified" else 16) * square
        )  # int64 lists of whole rows; patterns
    else:
        copies = 4 * 3 * t * d
        if precision == "certified":
            buffers = copies + g + 2 * t * heads_v * element + 12 * t * h + 18 * t * CAPACITY
        else:
            buffers = copies + g + (6 if backend == "triton" else 14) * square + (0 if backend == "triton" else DENSE_CHUNK_BYTES)
    results = 4.0 * s.layers * t * (3 * h + 6) + (4 * s.layers * square if dense else s.layers * edges * EDGE_BYTES)
    if neurons:
        split = t * s.ffn * (5 if backend == "cpu" else 9) + 4 * (s.ffn * d * (1 if element == 4 else 2) + 3 * t * d)
        buffers = max(buffers, split + (0 if backend == "cpu" else CHUNK_BYTES))
        results += s.layers * t * (NEURONS_PER_ROW * s.ffn * NEURON_BYTES + 8)
    working = max(forward, captured + additive + buffers)
    limit = ALLOCATOR_BYTES * threads if device == "cpu" else working
    share = ALLOCATOR_SHARE if device == "cpu" else 0.1
    return Need(int(forward), int(captured), int(additive + buffers), int(batch * results), int(min(share * working, limit)))


def estimate(
    model: Any,
    tokens: int,
    *,
    precision: str = "certified",
    backend: str = "auto",
    dtype: Any = None,
    dense: bool | None = None,
    neurons: bool = False,
    measure: str = "proximity",
    floor: float = 1e-3,
    batch: int = 1,
    threads: int = 0,
    memory: str | int | None = None,
) -> Estimate:
    """Peak memory and duration of :func:`flowroutes_fast.trace`, before anything is loaded.

    Args:
        model: a transformers model, a config, or a name that :func:`flowroutes_fast.load` knows, of which the configuration alone is read.
        tokens: length of the prompt.
        dtype: of the weights (torch dtype or its name); None: the loaded model's; for a hub name the checkpoint's; else float32.
        backend: ``"auto"``: for a loaded model that of its device, else ``"triton"`` where torch sees a GPU and ``"cpu"`` elsewhere. Others
            need not be available here.
        batch: sequences per forward pass.
        memory: weights stay on disk, and those in memory at a time may take so much (:func:`flowroutes_fast.open_streaming`). Other arguments: as for :func:`flowroutes_fast.trace`.

    Returns:
        Bytes and seconds, see :class:`Estimate`. The process is measured as it is now, without the model that is passed: call it in a fresh
        process for the peak of a fresh process (``flowroutes estimate`` does). On a GPU memory is the device's.

    Raises:
        ValueError: fewer than 1 token, more than the context holds, an unknown option or family. FileNotFoundError: no such model.
    """
    for name, value, known in (
        ("precision", precision, ("certified", "exact")),
        ("measure", measure, MEASURES),
        ("backend", backend, ("auto", *BACKENDS)),
    ):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(map(repr, known))}")
    if measure == "signed" and precision == "exact":
        raise ValueError("measure='signed' is known exactly with precision='certified'; precision='exact' is about proximities")
    for name, number in (("tokens", tokens), ("batch", batch)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    loaded, label, wanted = _opened(model)
    limit = context_length(loaded.config)
    if limit is not None and tokens > limit:
        raise ValueError(f"{tokens} tokens were asked for but the context of {label} holds {limit}")
    blocks_of(loaded)  # refuses unknown families
    s = shape_of(loaded.config)
    real = isinstance(model, nn.Module)
    dtype = _dtype(dtype) or (loaded.dtype if real else wanted) or torch.float32
    device = _device(loaded if real else None, backend)
    if backend == "auto":
        backend = choose_backend("auto", torch.empty(0, device=device)) if device == "cpu" or torch.cuda.is_available() else "triton"
    if dense is None:
        dense = precision == "exact" and 4 * s.layers * s.heads * tokens**2 < DENSE_LIMIT
    options = Options(precision, measure, backend, dense, floor, threads=threads, neurons=neurons)
    need = needs(s, tokens, options, device=device, element=dtype.itemsize, batch=batch)
    process = CONTEXT_BYTES if device != "cpu" else _resident() - (_resident_weights(loaded) if real else TOKENIZER_BYTES * -s.vocabulary)
    speed, source = _speed(dtype, device)
    kind = measure if measure == "signed" else precision
    forward, ours = _flops(loaded, s, tokens, neurons)
    seconds = batch * (forward / FORWARD_SHARE + ours / SHARES[kind]) / speed
    if backend == "reference":
        seconds += batch * s.layers * tokens**2 / 2 * s.heads * s.d_model / REFERENCE_SPEED
    notes = []
    weights, read = _weights(loaded, dtype), 0
    disk: float | None = None
    if memory is not None:
        weights, read, disk = _streamed(model, loaded, dtype, device, memory)
        least = read / disk if disk else None
        notes.append(
            f"Streaming reads {_size(read)} from disk, once for all prompts: "
            + (
                f"at least {_duration(least)} at {disk / 1e9:.2f} GB/s (measured here)."
                if least and disk
                else "the checkpoint is not here, so its disk's speed is not known."
            )
        )
        seconds = max(seconds, least or 0.0)
    if device != "cpu" and precision == "certified":
        notes.append(f"Rows that must be evaluated whole take up to {_size(17 * s.heads * tokens**2)} of device memory more for a moment.")
    return Estimate(
        label, tokens, batch, precision, measure, backend, device, str(dtype).removeprefix("torch."), weights, max(process, 0),
        need.activations, need.captured, need.buffers, need.results, need.allocator, seconds, speed, source, device == "cpu", tuple(notes),
        batch * (forward + ours), read, disk,
    )  # fmt: skip


def _streamed(name: Any, model: nn.Module, dtype: torch.dtype, device: str, memory: str | int) -> tuple[int, int, float | None]:
    """Bytes of weights in memory at a time, bytes to read, bytes per second."""
    from flowroutes_fast.feed import plan
    from flowroutes_fast.reading import reading
    from flowroutes_fast.streaming import parse_memory

    decoded = isinstance(name, (str, os.PathLike)) and (os.fspath(name) == DEMO or os.fspath(name).endswith(".gguf"))
    blocks = [block.module for block in blocks_of(model)]
    ends = None if decoded else _dtype(getattr(model.config, "dtype", None))
    found = plan(model, blocks, parse_memory(memory), ahead=decoded or device != "cpu", dtype=dtype, ends=ends)
    from_disk = reading(name, model)
    return found.weights, from_disk.bytes, from_disk.bandwidth


def _opened(model: Any) -> tuple[Any, str, torch.dtype | None]:
    """A model (of meta tensors unless one was passed), its name, and the dtype that loading it would give."""
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

    wanted = None
    if isinstance(model, nn.Module):
        config = getattr(model, "config", None)
        return model, str(getattr(config, "_name_or_path", "") or getattr(config, "model_type", type(model).__name__)), None
    if isinstance(model, PretrainedConfig):
        config, label = model, str(model._name_or_path or model.model_type)
    elif isinstance(model, (str, os.PathLike)):
        options: dict[str, Any] = {}
        source = label = os.fspath(model)
        if label == DEMO or label.endswith(".gguf"):
            file = demo_file() if label == DEMO else gguf_file(label)
            gguf_head(file)
            copy = copy_of(file)  # made by load(); read much faster
            source, options = (str(copy), {}) if copy is not None else (str(file.parent), {"gguf_file": file.name})
            label = DEMO_NAME if label == DEMO else file.stem
        elif Path(label).is_dir():
            model_folder(label)
        elif label.startswith(("/", "./", "../", "~")) or label.count("/") > 1:
            raise FileNotFoundError(f"no folder or file at '{label}'")
        try:
            if Path(source).is_dir() and not options:
                config = config_of(Path(source))
            else:
                with _quiet():
                    config = AutoConfig.from_pretrained(source, **options)
        except OSError as error:
            if Path(source).is_dir():
                raise
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise FileNotFoundError(
                f"model '{label}' cannot be opened: {first.rstrip('.')}. Give 'demo', a local folder, a .gguf file or a hub id"
            ) from error
        if source == label and not Path(label).is_dir():
            wanted = getattr(config, "dtype", None)
    else:
        raise TypeError(f"model must be a transformers model, a config or a name, got {type(model).__name__}")
    with torch.device("meta"), named(f"the config of '{label}'"):
        return AutoModelForCausalLM.from_config(config), label, _dtype(wanted)


def _dtype(dtype: Any) -> torch.dtype | None:
    if isinstance(dtype, str):
        found = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise ValueError(f"unknown dtype {dtype!r}: choose float32, bfloat16 or float16")
        return found
    return dtype


def _device(model: nn.Module | None, backend: str) -> str:
    if backend == "cpu":
        return "cpu"
    if model is not None and backend in ("auto", "reference"):
        found = next(model.parameters()).device.type
        return found if found != "meta" else "cpu"
    return "cuda" if backend in ("triton", "cuda") or torch.cuda.is_available() else "cpu"


def _weights(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of all parameters and buffers once (tied ones are one), in ``dtype`` where they are floating point and not yet loaded."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    return sum(t.numel() * (dtype.itemsize if t.is_meta and t.is_floating_point() else t.element_size()) for t in tensors)


def _flops(model: nn.Module, s: Shape, tokens: int, neurons: bool) -> tuple[float, float]:
    """Floating point operations of the forward pass and of ours; a multiply-add counts two, causal halves are halves."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    experts = (
        getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or getattr(config, "n_routed_experts", None)
    )
    active = (getattr(config, "num_experts_per_tok", None) or experts) / experts if experts else 1.0
    ends = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}  # type: ignore[operator]
    body = sum(p.numel() * (active if ".experts." in name else 1.0) for name, p in model.named_parameters() if id(p) not in ends)
    attention = s.layers * tokens**2 * s.heads * (s.d_qk + s.d_head)
    ours = s.layers * 2.0 * tokens * s.w_o + attention + (s.layers * 2.0 * tokens * s.ffn * s.d_model if neurons else 0.0)
    return 2.0 * tokens * body + attention + 2.0 * s.vocabulary * s.d_model, ours


def _speed(dtype: torch.dtype, device: str) -> tuple[float, str]:
    """FLOP per second of a matrix product, and where the figure comes from."""
    if device == "cpu":
        return _matmul_speed(dtype), "measured here"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "H100"
    known = next((key for key in DATASHEET if key in name), "H100")
    here = "" if torch.cuda.is_available() and known in name else ", which is not here"
    return DATASHEET[known][0 if dtype.itemsize == 2 else 1], f"datasheet of {known}{here}: predicted"


@cache
def _matmul_speed(dtype: torch.dtype, n: int = 768) -> float:
    x = torch.randn(n, n).to(dtype)
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 0.1 and len(times) < 20):
        start = time.perf_counter()
        x @ x
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def _resident() -> int:
    """Bytes of main memory that this process holds now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        import resource
        import sys

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _resident_weights(model: nn.Module) -> int:
    """Bytes of main memory that a model's tensors hold now; of those mapped from a file, the pages that were read."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers()) if t.device.type == "cpu"}
    total = sum(t.nbytes for t in tensors.values())
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return total
    inside: list[torch.Tensor] = []
    for line in lines:
        first = line.split(None, 5)
        if "-" in first[0] and not first[0].endswith(":"):
            start, end = (int(x, 16) for x in first[0].split("-"))
            inside = [t for p, t in tensors.items() if start <= p < end] if first[4] != "0" else []
        elif inside and line.startswith("Rss:"):
            total += int(first[1]) * 1024 - sum(t.nbytes for t in inside)
    return total


def check_memory(model: nn.Module, tokens: int, options: Options, batch: int = 1) -> None:
    """``MemoryError`` with figures if a trace needs more bytes than are available, beyond the opened model. Silent where nothing is known."""
    if (left := _address_space()) is not None and left < ROOM:
        raise MemoryError(
            f"the address space of this process is limited (ulimit -v, RLIMIT_AS): {_size(max(left, 0))} are left, and a trace takes up to {_size(ROOM)} "
            "for threads and libraries"
        )
    try:
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
        s = shape_of(model.config)
    except (AttributeError, ValueError, TypeError):
        return
    device = "cuda" if weight.device.type not in ("cpu", "meta") else "cpu"
    need = needs(s, tokens, options, device=device, element=_element(model), batch=batch)
    working = max(need.activations, need.captured + need.buffers)
    host = need.results + (working if device == "cpu" else 0)
    places = [(host, available_memory(), "")]
    if device == "cuda":
        places.append((working, available_device_memory(weight.device), f" on {weight.device}"))
    for wanted, available, where in places:
        if available is None or wanted <= available:
            continue
        parts = [("activations", need.activations), ("one layer's buffers", need.captured + need.buffers), ("results", need.results)]
        if device == "cuda":
            parts = parts[2:] if not where else parts[:2]
        ways = [
            "fewer tokens",
            *(["precision='certified'"] if options.precision == "exact" else []),
            *(["dense=False"] if options.dense else []),
        ]
        ways += [*(["neurons=False"] if options.neurons else []), "positions=[...]"]
        raise MemoryError(
            f"tracing {tokens} tokens needs about {_size(wanted)} more{where} ({', '.join(f'{name} {_size(size)}' for name, size in parts)}), "
            f"{_size(available)} are available; ways out: {', '.join(ways)}"
        )


def working_memory(model: nn.Module, tokens: int, options: Options, batch: int) -> int:
    """Bytes that come and go while one layer of a batch is worked on; 0 where nothing is known."""
    try:
        need = needs(shape_of(model.config), tokens, options, device="cpu", element=_element(model), batch=batch)
    except (AttributeError, ValueError, TypeError):
        return 0
    return max(need.activations, need.captured + need.buffers) + need.allocator


def _element(model: nn.Module) -> int:
    """Bytes of a number in a model's activations."""
    norms = [p for p in model.parameters() if p.dim() == 1 and p.is_floating_point()]
    return (norms[0] if norms else next(model.parameters())).element_size()


def available_memory() -> int | None:
    """Bytes of main memory that this process can still take: the least of what the system, its cgroups and RLIMIT_AS leave; None if unknown."""
    found = [x for x in (_system_memory(), _cgroup_memory(), _address_space()) if x is not None]
    return max(0, min(found)) if found else None


def available_device_memory(device: torch.device) -> int | None:
    """Bytes free on a CUDA device, with those that torch holds unused; None if unknown."""
    try:
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    except (RuntimeError, ValueError, AssertionError):
        return None


def _table(path: Path) -> dict[str, int]:
    """Lines ``name[:] number [kB]`` of a file; empty if it cannot be read."""
    try:
        fields = [line.replace(":", " ").split() for line in path.read_text().splitlines()]
        return {f[0]: int(f[1]) * (1024 if f[-1] == "kB" else 1) for f in fields if len(f) > 1 and f[1].isdigit()}
    except (OSError, ValueError):
        return {}


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # also "max"
        return None


def _system_memory(path: Path = Path("/proc/meminfo")) -> int | None:
    found = _table(path)
    return found["MemAvailable"] + found.get("SwapFree", 0) if "MemAvailable" in found else None


def _cgroup_memory(processes: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the cgroups (version 1 or 2) of this process and those above leave, file pages that can be dropped included."""
    try:
        lines = processes.read_text().splitlines()
    except OSError:
        return None
    left = []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            top, limit, usage, dropped = root, "memory.max", "memory.current", ("inactive_file", "active_file")
        elif "memory" in controllers.split(","):
            top, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            dropped = ("total_inactive_file", "total_active_file")
        else:
            continue
        below = top / path.strip("/")
        for folder in (below, *below.parents):
            if top not in (folder, *folder.parents):
                break
            most, used = _number(folder / limit), _number(folder / usage)
            if most is not None and used is not None:
                stat = _table(folder / "memory.stat")
                left.append(most - used + sum(stat.get(name, 0) for name in dropped))
    return min(left) if left else None


def _address_space() -> int | None:
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit == resource.RLIM_INFINITY:
            return None
        return limit - int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (ImportError, OSError, ValueError, IndexError):
        return None
