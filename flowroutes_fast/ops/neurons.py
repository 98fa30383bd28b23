"""Importances of FFN neurons: rank-1 parts a_n·w_n of the state after the FFN.

A neuron's part is its activation times its column of the down projection. The neurons take the FFN's place among the
parts of the state, so they share one normalisation with the residual (and, in a parallel block, with the attention).
The sign bound of all neurons costs one GEMM, sign(Y) W_down; only neurons above a cut are evaluated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowroutes_fast.ops import reference
from flowroutes_fast.ops.arguments import check_tensors, check_threads
from flowroutes_fast.ops.backends import choose_backend
from flowroutes_fast.ops.rank1 import rank1_proximity
from flowroutes_fast.system.ambient import in_neutral, matmul

FIRST_CUT = 1e-3
REFINE = 0.2
SMALLEST_CUT = 1e-7
CHUNK_BYTES = 64 * 2**20


@dataclass
class NeuronImportances:
    """Neurons of one layer: index ``[2, n]`` (position, neuron; int32), importance ``[n]``, bounds of the
    normaliser ``[token]``.
    """

    index: Tensor
    importance: Tensor
    low: Tensor
    high: Tensor


@in_neutral
def neuron_importances(
    activation: Tensor,
    w_down: Tensor,
    whole: Tensor,
    others: Tensor,
    *,
    floor: float = 1e-3,
    tolerance: float = 1e-2,
    measure: str = "proximity",
    backend: str = "auto",
    threads: int = 0,
) -> NeuronImportances:
    """Neurons whose share of the state after the FFN may be above ``floor``.

    Args:
        activation: what the down projection multiplies ``[token, neuron]``.
        w_down: ``[neuron, d_model]``.
        whole: the state after the FFN ``[token, d_model]``.
        others: summed proximities of the state's other parts ``[token]``; not used for signed flow.
        floor: share above which a neuron is listed.
        tolerance: largest (high − low) / (high + low) of a row's normaliser; 0 evaluates every neuron with a positive
            bound.
        backend: ``"cpu"``: the native kernel, which evaluates every neuron, so that ``low`` and ``high`` are equal;
            ``"reference"``: PyTorch on any device, which evaluates those above a cut; ``"triton"`` and ``"cuda"`` have
            no kernel of their own for neurons: the same, on a CUDA device; ``"auto"``.
        measure: ``"proximity"``, or ``"signed"``: a_n ⟨w_n, sign(y)⟩ / ‖y‖₁.

    Returns:
        importances in the dtype of ``whole`` and positions in ascending order; ``low`` and ``high`` are in units of
        ‖y‖₁ and equal for signed flow.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown measure. TypeError: no floating point numbers.
            RuntimeError: a missing backend.
    """
    if measure not in ("proximity", "signed"):
        raise ValueError(f"measure must be 'proximity' or 'signed', got {measure!r}")
    check_threads(threads)
    check_tensors(activation=(activation, 2), w_down=(w_down, 2), whole=(whole, 2), others=(others, 1))
    if (
        activation.shape != (len(whole), len(w_down))
        or w_down.shape[1] != whole.shape[1]
        or others.shape != whole.shape[:1]
    ):
        shapes = ", ".join(str(list(t.shape)) for t in (activation, w_down, whole, others))
        raise ValueError(
            f"activation [token, neuron], w_down [neuron, d_model], whole [token, d_model] and others [token] do not "
            f"fit: {shapes}"
        )
    backend = choose_backend(backend, whole)
    sign = torch.copysign(torch.ones_like(whole), whole)
    flow = activation * matmul(sign, w_down.T)
    if measure == "signed":
        norm = whole.abs().sum(-1)
        share = flow * torch.where(norm > 0, 1 / norm, 0)[:, None]
        at = (share.abs() > floor).nonzero()
        return NeuronImportances(at.T.to(torch.int32), share[at[:, 0], at[:, 1]], norm, norm.clone())
    bound = flow.clamp_min_(0)
    if backend == "cpu":
        proximities = rank1_proximity(activation, w_down, whole, bound, threads)
        total = others + proximities.sum(-1)
        at = (proximities > (floor * total)[:, None]).nonzero()
        return NeuronImportances(
            at.T.to(torch.int32), proximities[at[:, 0], at[:, 1]] / total[at[:, 0]], total, total.clone()
        )
    proximities = torch.zeros_like(bound)
    done = torch.zeros_like(bound, dtype=torch.bool)
    ceiling = others + bound.sum(-1)
    cut = min(FIRST_CUT, floor) if tolerance else 0.0
    rows = torch.ones_like(others, dtype=torch.bool)
    assumed = others.clamp_min(0.5 * ceiling)
    while True:
        at = ((bound > (cut * assumed)[:, None]) & rows[:, None] & ~done).nonzero()
        proximities[at[:, 0], at[:, 1]] = _evaluate(activation, w_down, whole, at)
        done[at[:, 0], at[:, 1]] = True
        low = others + proximities.sum(-1)
        high = low + torch.where(done, 0, bound).sum(-1)
        rows = ((high - low > tolerance * (high + low)) | (low < assumed)) & (high > low)
        if not bool(rows.any()) or cut == 0:
            break
        assumed = torch.minimum(assumed, low)
        cut = cut * REFINE if cut * REFINE > SMALLEST_CUT else 0.0
    middle = low + (high - low) / 2
    at = (proximities > (floor * low)[:, None]).nonzero()
    value = proximities[at[:, 0], at[:, 1]] / middle[at[:, 0]]
    return NeuronImportances(at.T.to(torch.int32), value, low, high)


def _evaluate(activation: Tensor, w_down: Tensor, whole: Tensor, at: Tensor) -> Tensor:
    """Exact proximity of listed neurons ``at [n, 2]`` -> ``[n]``, a bounded number at a time."""
    out = activation.new_empty(len(at))
    step = max(1, CHUNK_BYTES // (whole.shape[1] * whole.element_size()))
    for first in range(0, len(at), step):
        row, neuron = at[first : first + step].T
        part = activation[row, neuron][:, None] * w_down[neuron]
        out[first : first + step] = reference.proximity(part, whole[row])
    return out
