"""The interface of a model that keeps the activations of its last run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


@dataclass
class ModelInfo:
    name: str
    n_params_estimate: int
    n_layers: int
    n_heads: int
    d_model: int
    d_vocab: int


class TransparentLlm(ABC):
    @abstractmethod
    def model_info(self) -> ModelInfo: ...

    @abstractmethod
    def tokens(self) -> Tensor:
        """``[batch, token]``."""

    @abstractmethod
    def residual_in(self, layer: int) -> Tensor:
        """``[batch, token, d_model]``, as the next three."""

    @abstractmethod
    def residual_after_attn(self, layer: int) -> Tensor: ...

    @abstractmethod
    def residual_out(self, layer: int) -> Tensor: ...

    @abstractmethod
    def ffn_out(self, layer: int) -> Tensor: ...

    @abstractmethod
    def attention_matrix(self, batch_i: int, layer: int, head: int) -> Tensor:
        """``[query, key]``."""

    @abstractmethod
    def decomposed_attn(self, batch_i: int, layer: int) -> Tensor:
        """What each head adds from each source: ``[query, key, head, d_model]``."""
