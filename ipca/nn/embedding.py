"""EmbeddingPC: an embedding that trains one window of its pretrained table's singular components."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from ipca.nn.layer_kinds import from_matrix, layer_kind, to_matrix, unsupported_reason
from ipca.nn.subclasses import restore, subclass_of
from ipca.nn.window_layer import LayerOptions, ProductLayer
from ipca.ops.pair import one_pair
from ipca.window import Window

if TYPE_CHECKING:
    from typing_extensions import Unpack


class EmbeddingPC(ProductLayer):
    """``nn.Embedding`` of which a window of the table's singular components trains.

    The table ``T (num, dim)`` is ``Wᵀ`` of a linear layer of one-hot inputs, ``W (out, in) = (dim, num)``::

        y = K[ids] + scaling · (Aᵀ[ids] Bᵀ − A0ᵀ[ids] B0ᵀ)

    ``K`` being the base weight; the last term is the intact form's. The embeddings of BART, Gemma and others multiply
    ``y`` by ``embed_scale``. As in ``nn.Embedding`` no gradient comes from
    ``padding_idx``, so the row of a padding token that is 0 stays 0.

    Shapes: ``ids (…)``, ``y (…, dim)``, ``base_weight, weight (num, dim)``, ``lora_A, lora_A0 (rank, num)``,
    ``lora_B, lora_B0 (dim, rank)``.

    Args:
        embedding: a plain embedding; its settings are taken over, its weight is not.
        window: the window, or the rule that finds it.
        options: ``alpha``, ``form``, ``adapter_dtype``, ``tol``, as for :class:`ipca.nn.LinearPC`.

    Raises:
        TypeError: ``embedding`` is another type, such as a subclass that does more than to multiply by a constant.
        ValueError: it has ``max_norm``, ``sparse`` or ``scale_grad_by_freq``, or an option is out of range.
    """

    def __init__(self, embedding: nn.Module, window: Window, **options: Unpack[LayerOptions]) -> None:
        if layer_kind(embedding) != "embedding":
            raise TypeError(f"expected an nn.Embedding, got {type(embedding).__name__}.")
        assert isinstance(embedding, nn.Embedding)
        why = unsupported_reason(embedding, "embedding", dropout=options.pop("dropout", 0.0))
        if why:
            raise ValueError(f"cannot adapt this Embedding: {why}.")
        base = embedding.weight.detach().to("meta")
        super().__init__(base, None, (base.shape[1], base.shape[0]), window, kind="embedding", **options)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx, self.subclass = embedding.padding_idx, subclass_of(embedding, nn.Embedding)
        self.embed_scale: Tensor | float | None
        _set_scale(self, None if self.subclass is None else getattr(embedding, "embed_scale", None))

    @classmethod
    def _meta_like(cls, plain: nn.Module, window: Window, **options: Unpack[LayerOptions]) -> EmbeddingPC:
        return cls(plain, window, **options)

    def forward(self, x: Tensor) -> Tensor:
        y, scale = super().forward(x), self.embed_scale
        if scale is None:
            return y
        return y * (scale.to(self.base_weight.dtype) if isinstance(scale, Tensor) else scale)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return to_matrix(self.kind, weight)

    def as_weight(self, matrix: Tensor) -> Tensor:
        return from_matrix(self.kind, matrix, self.base_weight.shape)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(x, weight, self.padding_idx)

    def window_product(self, x: Tensor, A: Tensor, B: Tensor, dropout: float) -> Tensor:
        ids, dtype = x.reshape(-1), self.base_weight.dtype
        D, E = F.embedding(ids, A.mT, self.padding_idx).mT, B  # (rank, M): the rows that are looked up alone
        if self.form == "intact":
            D, E = one_pair(D, B, F.embedding(ids, self.lora_A0.mT, self.padding_idx).mT, self.lora_B0)
        low = F.linear(D.mT.to(dtype), E.to(dtype)).view(*x.shape, self.embedding_dim)
        y = self.base_product(x)
        return y + (self.scaling * low).to(y.dtype)

    def to_plain(self, *, base: bool = False) -> nn.Module:
        weight = self.as_weight(self.pretrained_weight() if base else self.effective_weight()).contiguous()
        plain = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        plain.weight = nn.Parameter(weight)
        if self.embed_scale is not None:
            _set_scale(plain, self.embed_scale)
        return restore(plain, self.subclass)


def _set_scale(module: nn.Module, scale: Tensor | float | None) -> None:
    """Keep ``scale`` as its owner in transformers does: a buffer that is not saved, or a number."""
    if isinstance(scale, Tensor):
        module.register_buffer("embed_scale", scale, persistent=False)
    else:
        module.embed_scale = scale  # type: ignore[assignment]
