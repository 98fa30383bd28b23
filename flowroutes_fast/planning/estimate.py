"""``estimate()``: what a trace will take, from a config alone.

Bytes are counted from shapes, tensor by tensor, for the forward pass, for one layer of ours, and for what the trace
keeps. What shapes do not say (how many sub-edges lie above the floor, what the C allocator keeps back, what share of a
matrix product's speed is reached) was measured once on the demo model and stands in the constants below.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowroutes_fast.loading.load import (
    DEMO,
    DEMO_NAME,
    _quiet,
    config_of,
    copy_of,
    demo_file,
    gguf_file,
    gguf_head,
    model_folder,
    named,
)
from flowroutes_fast.models.families import blocks_of, context_length
from flowroutes_fast.ops import BACKENDS, choose_backend
from flowroutes_fast.tracing.memory import DENSE_LIMIT, Shape, kept_states, needs, shape_of, size_text
from flowroutes_fast.tracing.options import one_of, shown, taken

TOKENIZER_BYTES = 1000  # per entry of the vocabulary
CONTEXT_BYTES = 500 * 10**6  # a CUDA context
FORWARD_SHARE = 0.67  # of a matrix product's speed; those of our kernels follow (benchmarks/results)
SHARES = {"certified": 0.17, "exact": 0.24, "signed": 0.4}
REFERENCE_SPEED = 2e8  # elements of [query, key, head, d_model] per second: PyTorch on two cores
DATASHEET = {  # dense FLOP/s in 16 bits and in float32, NVIDIA's datasheets
    "B200": (2.25e15, 75e12),
    "H200": (989e12, 67e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "A10": (125e12, 31.2e12),
    "V100": (125e12, 15.7e12),
    "T4": (65e12, 8.1e12),
    "4090": (165e12, 82.6e12),
}


UNUSED = ("thresholds", "tolerance", "bias")  # options that change neither memory nor duration by much


@dataclass(frozen=True)
class Estimate:
    """Peak memory in bytes and duration in seconds of one ``trace()``. :meth:`rows` says what is measured and what is
    predicted.

    Attributes:
        weights: parameters and buffers of the model. process: Python, torch, transformers and whatever else this
            process holds, and the tokenizer (on a GPU: the CUDA context).
        activations: the forward pass's own peak. captured: those of one layer that our kernels read; they live while
            our kernels run.
        buffers: what our kernels allocate for one layer. results: what the Trace keeps, all layers together (always in
            main memory).
        allocator: freed memory that the C allocator keeps back.
        throughput: FLOP per second that a matrix product reaches; seconds follow from it. throughput_source: where it
            comes from.
        flops: floating point operations, the forward pass's and ours. read: bytes read from disk while streaming (0:
            none).
        bandwidth: bytes per second of that disk, measured; None if the checkpoint is not here.
        states: bytes that a lazy trace keeps instead of ``results``: ``whole`` (by reference), ``inputs`` (block
            inputs, keys and values; as much with ``host`` and ``disk``), ``cache`` (keys and values, which the caller
            has already).
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
    states: dict[str, int] = field(default_factory=dict)

    @property
    def additional(self) -> int:
        """Bytes that a process needs beyond the opened model. The forward pass's temporaries are gone when our
        buffers are there.
        """
        working = max(self.activations, self.captured + self.buffers) + self.allocator
        return working + (self.results if self.device == "cpu" else 0)

    @property
    def total(self) -> int:
        """Peak bytes: resident memory of the process, or the device's on a GPU."""
        return self.weights + self.process + self.additional

    def rows(self) -> list[tuple[str, int, str]]:
        """(item, bytes, how it is known)."""
        where = "" if self.device == "cpu" else ", in main memory, not in the total"
        process = (
            "Python, torch, transformers: measured; tokenizer: predicted"
            if self.process_measured
            else "CUDA context: predicted"
        )
        return [
            ("weights", self.weights, f"counted, {self.dtype}" + (", those in memory at a time" if self.read else "")),
            ("process", self.process, process),
            ("activations", self.activations, "predicted from shapes: the forward pass's peak"),
            (
                "buffers",
                self.buffers,
                f"predicted from shapes: one layer's, beside {size_text(self.captured)} of its activations",
            ),
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
        table = "\n".join(f"{name:12}{size_text(size):>10}  {how}" for name, size, how in self.rows())
        return "\n".join(
            [head, table, *self._lazy(), f"{'time':12}{_duration(self.seconds):>10}  {self.time_source}", *self.notes]
        )

    def _lazy(self) -> list[str]:
        if not self.states:
            return []
        kept = ", ".join(f"{size_text(size)} {name}" for name, size in self.states.items())
        return [f"{'lazy=True':12}{'':>10}  keeps instead of results: {kept} (predicted from shapes)"]

    @property
    def floor(self) -> float | None:
        """Seconds that reading the weights takes by itself; None if they are not here."""
        return None if not self.read or self.bandwidth is None else self.read / self.bandwidth

    @property
    def time_source(self) -> str:
        return (
            f"{self.flops / 1e12:.3g} TFLOP, predicted at {self.throughput / 1e9:.3g} GFLOP/s of a matrix product "
            f"({self.throughput_source})"
        )


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


@shown(but=UNUSED)
def estimate(
    model: Any,
    tokens: int,
    *,
    dtype: Any = None,
    batch: int = 1,
    memory: str | int | None = None,
    **options: Any,
) -> Estimate:
    """Peak memory and duration of :func:`flowroutes_fast.trace`, before anything is loaded.

    Args:
        model: a transformers model, a config, or a name that :func:`flowroutes_fast.load` knows, of which the
            configuration alone is read.
        tokens: length of the prompt.
        dtype: of the weights (torch dtype or its name); None: the loaded model's; for a hub name the checkpoint's; else
            float32.
        batch: sequences per forward pass.
        memory: weights stay on disk, and those in memory at a time may take so much
            (:func:`flowroutes_fast.open_streaming`).
        options: those of :class:`flowroutes_fast.Options` that matter for memory and duration. ``backend="auto"``: for
            a loaded model that of its device, else ``"triton"`` where torch sees a GPU and ``"cpu"`` elsewhere; others
            need not be available here.

    Returns:
        Bytes and seconds, see :class:`Estimate`. The process is measured as it is now, without the model that is
        passed: call it in a fresh process for the peak of a fresh process (``flowroutes estimate`` does). On a GPU
        memory is the device's.

    Raises:
        ValueError: fewer than 1 token, more than the context holds, an unknown option or family. FileNotFoundError: no
            such model.
    """
    asked = taken(options, "estimate", UNUSED, ("dtype", "batch", "memory")).check()
    precision, measure, backend, neurons = asked.precision, asked.measure, asked.backend, asked.neurons
    one_of("backend", backend, ("auto", *BACKENDS))
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
        backend = (
            choose_backend("auto", torch.empty(0, device=device))
            if device == "cpu" or torch.cuda.is_available()
            else "triton"
        )
    dense = asked.dense
    if dense is None:
        dense = precision == "exact" and 4 * s.layers * s.heads * tokens**2 < DENSE_LIMIT
    chosen = replace(asked, backend=backend, dense=dense, thresholds=())
    need = needs(s, tokens, chosen, device=device, element=dtype.itemsize, batch=batch)
    process = (
        CONTEXT_BYTES
        if device != "cpu"
        else _resident() - (_resident_weights(loaded) if real else TOKENIZER_BYTES * -s.vocabulary)
    )
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
            f"Streaming reads {size_text(read)} from disk, once for all prompts: "
            + (
                f"at least {_duration(least)} at {disk / 1e9:.2f} GB/s (measured here)."
                if least and disk
                else "the checkpoint is not here, so its disk's speed is not known."
            )
        )
        seconds = max(seconds, least or 0.0)
    if device != "cpu" and precision == "certified":
        notes.append(
            f"Rows that must be evaluated whole take up to {size_text(17 * s.heads * tokens**2)} of device memory "
            f"more for a moment."
        )
    return Estimate(
        label,
        tokens,
        batch,
        precision,
        measure,
        backend,
        device,
        str(dtype).removeprefix("torch."),
        weights,
        max(process, 0),
        need.activations,
        need.captured,
        need.buffers,
        need.results,
        need.allocator,
        seconds,
        speed,
        source,
        device == "cpu",
        tuple(notes),
        batch * (forward + ours),
        read,
        disk,
        {} if read else kept_states(s, tokens, dtype.itemsize, batch),
    )


def _streamed(
    name: Any, model: nn.Module, dtype: torch.dtype, device: str, memory: str | int
) -> tuple[int, int, float | None]:
    """Bytes of weights in memory at a time, bytes to read, bytes per second."""
    from flowroutes_fast.loading.disk_speed import reading
    from flowroutes_fast.loading.layer_feed import plan
    from flowroutes_fast.loading.streaming import parse_memory

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
        return (
            model,
            str(getattr(config, "_name_or_path", "") or getattr(config, "model_type", type(model).__name__)),
            None,
        )
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
                f"model '{label}' cannot be opened: {first.rstrip('.')}. Give 'demo', a local folder, a .gguf file or "
                f"a hub id"
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
    """Bytes of all parameters and buffers once (tied ones are one), in ``dtype`` where they are floating point and
    not yet loaded.
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    return sum(
        t.numel() * (dtype.itemsize if t.is_meta and t.is_floating_point() else t.element_size()) for t in tensors
    )


def _flops(model: nn.Module, s: Shape, tokens: int, neurons: bool) -> tuple[float, float]:
    """Floating point operations of the forward pass and of ours; a multiply-add counts two, causal halves are
    halves.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    experts = (
        getattr(config, "num_local_experts", None)
        or getattr(config, "num_experts", None)
        or getattr(config, "n_routed_experts", None)
    )
    active = (getattr(config, "num_experts_per_tok", None) or experts) / experts if experts else 1.0
    ends = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}  # type: ignore[operator]
    body = sum(
        p.numel() * (active if ".experts." in name else 1.0)
        for name, p in model.named_parameters()
        if id(p) not in ends
    )
    attention = s.layers * tokens**2 * s.heads * (s.d_qk + s.d_head)
    ours = (
        s.layers * 2.0 * tokens * s.w_o + attention + (s.layers * 2.0 * tokens * s.ffn * s.d_model if neurons else 0.0)
    )
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
