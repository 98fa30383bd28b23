"""What a trace takes, in bytes, from shapes; ``check_memory()``: a refusal with figures instead of a killed process.

What shapes do not say (how many sub-edges lie above the floor, what the C allocator keeps back) was measured once on
the demo model and stands in the constants below.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from flowroutes_fast.models.families import family_of
from flowroutes_fast.models.modules import modules_of
from flowroutes_fast.ops.certified import CAPACITY
from flowroutes_fast.system.memory import address_space, available_device_memory, available_memory
from flowroutes_fast.tracing.importances import FEW_KEYS
from flowroutes_fast.tracing.options import Options

DENSE_LIMIT = 10**9  # bytes: as in trace()
# listed per row and layer at a floor of 1e-3 (SmolLM2-135M)
EDGES_PER_HEAD = {"certified": 9.3, "exact": 13.9, "signed": 14.3}
EDGES_FLOOR = 0.67  # ... times (1e-3 / floor) to this power
NEURONS_PER_ROW = 0.027  # of the FFN's neurons above a floor of 1e-3
EDGE_BYTES, NEURON_BYTES = 16, 12
KERNEL_EDGE_BYTES = 48  # while a kernel's list is joined and handed over
# kept back by the C allocator: of what comes and goes, at most per thread
ALLOCATOR_SHARE, ALLOCATOR_BYTES = 0.75, 64 * 2**20
ROOM = 192 * 2**20  # bytes of address space below which libraries' new threads abort the process
CHUNK_BYTES = 6 * 64 * 2**20  # temporaries of the reference backend's chunks
DENSE_CHUNK_BYTES = 2 * 256 * 2**20  # u = v W_O and its float copies in the CUDA backend
ROWS = 24  # queries that a native thread works on together
BUCKETS = 96  # magnitude classes of a row
SCREEN_WIDTH, SCREEN_BYTES = 16384, 64 << 20  # up to which certified rows have u in steps, as in csrc/certified_layer.h


def size_text(size: float) -> str:
    unit, name = next(((u, n) for u, n in ((1e12, "TB"), (1e9, "GB")) if size >= u), (1e6, "MB"))
    return f"{size / unit:.2f} {name}" if unit > 1e6 else f"{size / unit:.0f} MB"


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
        number("num_hidden_layers", "n_layer"),
        heads,
        number("num_key_value_heads", otherwise=heads) or heads,
        latent or d_head,
        number("v_head_dim", otherwise=d_head),
        d_model,
        max(dense, experts),
        number("vocab_size", otherwise=0),
        number("sliding_window", otherwise=0) if windowed else 0,
        getattr(config, "_attn_implementation", None) == "eager" or _hooked(config),
    )


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
    precision, measure, backend, dense, neurons = (
        options.precision,
        options.measure,
        options.backend,
        options.dense,
        options.neurons,
    )
    square = h * t * t
    heads_q, heads_v, kv = h * s.d_qk, h * s.d_head, s.kv_heads * (s.d_qk + s.d_head)
    masked = s.eager or 0 < s.window < t
    mask = t * t * (element if s.eager else 1) if masked else 0
    # input, state between, normalised; q, k, v; gate, up, their activation and product
    ffn = 3 * d + heads_q + kv + 4 * s.ffn
    # input, normalised; rotary temporaries, repeated keys and values, output
    attention = 2 * d + kv + 3 * heads_q + 3 * heads_v
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
        if not whole and measure != "signed" and h * d <= SCREEN_WIDTH and h * d * t <= SCREEN_BYTES:
            packed += t * h * (d + 4)  # u in steps of 8 bits
        buffers: float = (
            copies + g + sorted_rows + per_thread * threads + listed + packed + (4 * square if dense else 0)
        )
    elif backend == "reference":
        buffers = (
            copies + g + min(CHUNK_BYTES, 24 * square * d) + (120 if precision == "certified" else 16) * square
        )  # int64 lists of whole rows; patterns
    else:
        copies = 4 * 3 * t * d
        if precision == "certified":
            buffers = copies + g + 2 * t * heads_v * element + 12 * t * h + 18 * t * CAPACITY
        else:
            buffers = (
                copies
                + g
                + (6 if backend == "triton" else 14) * square
                + (0 if backend == "triton" else DENSE_CHUNK_BYTES)
            )
    results = 4.0 * s.layers * t * (3 * h + 6) + (4 * s.layers * square if dense else s.layers * edges * EDGE_BYTES)
    if neurons:
        split = t * s.ffn * (5 if backend == "cpu" else 9) + 4 * (s.ffn * d * (1 if element == 4 else 2) + 3 * t * d)
        buffers = max(buffers, split + (0 if backend == "cpu" else CHUNK_BYTES))
        results += s.layers * t * (NEURONS_PER_ROW * s.ffn * NEURON_BYTES + 8)
    working = max(forward, captured + additive + buffers)
    limit = ALLOCATOR_BYTES * threads if device == "cpu" else working
    share = ALLOCATOR_SHARE if device == "cpu" else 0.1
    return Need(
        int(forward), int(captured), int(additive + buffers), int(batch * results), int(min(share * working, limit))
    )


def kept_states(s: Shape, tokens: int, element: int, batch: int = 1) -> dict[str, int]:
    """Bytes of a lazy trace's states by what is kept, from shapes (see :mod:`flowroutes_fast.tracing.on_demand`)."""
    each = batch * s.layers * tokens * element
    kv = s.kv_heads * (s.d_qk + s.d_head)
    return {
        "whole": each * (3 * s.d_model + s.heads * s.d_qk + kv),
        "inputs": each * (s.d_model + kv),
        "cache": each * kv,
    }


def check_memory(model: nn.Module, tokens: int, options: Options, batch: int = 1, lazy: bool = False) -> None:
    """``MemoryError`` with figures if a trace needs more bytes than are available, beyond the opened model. Silent
    where nothing is known.

    ``lazy``: results are those of few rows, and states find their place by their budget.
    """
    if (left := address_space()) is not None and left < ROOM:
        raise MemoryError(
            f"the address space of this process is limited (ulimit -v, RLIMIT_AS): {size_text(max(left, 0))} are "
            f"left, and a trace takes up to {size_text(ROOM)} "
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
    host = (0 if lazy else need.results) + (working if device == "cpu" else 0)
    places = [(host, available_memory(), "")]
    if device == "cuda":
        places.append((working, available_device_memory(weight.device), f" on {weight.device}"))
    for wanted, available, where in places:
        if available is None or wanted <= available:
            continue
        parts = [
            ("activations", need.activations),
            ("one layer's buffers", need.captured + need.buffers),
            ("results", need.results),
        ]
        if device == "cuda":
            parts = parts[2:] if not where else parts[:2]
        ways = [
            "fewer tokens",
            *(["precision='certified'"] if options.precision == "exact" else []),
            *(["dense=False"] if options.dense else []),
        ]
        ways += [*(["neurons=False"] if options.neurons else []), "positions=[...]"]
        raise MemoryError(
            f"tracing {tokens} tokens needs about {size_text(wanted)} more{where} "
            f"({', '.join(f'{name} {size_text(size)}' for name, size in parts)}), "
            f"{size_text(available)} are available; ways out: {', '.join(ways)}"
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
    weights = (p for m in modules_of(model) for p in m._parameters.values() if p is not None)
    first = next(weights)
    return next((p for p in chain([first], weights) if p.dim() == 1 and p.is_floating_point()), first).element_size()
