"""Proximity of rank-1 parts activation · w: the neurons of an FFN."""

from __future__ import annotations

from torch import Tensor

from flowroutes_fast.ops import native


def rank1_proximity(activation: Tensor, w_down: Tensor, whole: Tensor, bound: Tensor, threads: int = 0) -> Tensor:
    """Proximity ``[token, neuron]`` of activation[i, n] · w_down[n] to whole[i], on the CPU in float32.

    Args:
        activation: ``[token, neuron]``; w_down: ``[neuron, d_model]``; whole: ``[token, d_model]``.
        bound: the sign bound of every neuron ``[token, neuron]``: activation[i, n] · ⟨w_down[n], sign(whole[i])⟩.

    Raises:
        ValueError, TypeError: shapes that do not fit. RuntimeError: no native extension.
    """
    (rows, parts), d_model = activation.shape, whole.shape[1]
    proximities = native.contiguous(bound.float())
    arguments = native.Arguments(rows=rows, parts=parts, d_model=d_model, threads=threads)
    arguments.take("activation", activation.float(), rows, parts)
    arguments.take("w_down", w_down.float(), parts, d_model, where="w")
    arguments.take("whole", whole.float(), rows, d_model)
    arguments.take("proximities", proximities, rows, parts)
    arguments.call("rank1")
    return proximities
