"""The sizes of real models, called geometries, and the sizes at which the op is measured."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}

#: Sizes as published with each model.
GEOMETRIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma-3-1b": ("gemma3_text", {
        "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144,
    }),
    "Llama-3.2-1B": ("llama", {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
    }),
    "Qwen3-4B": ("qwen3", {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
    }),
    "Llama-3.1-8B": ("llama", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    }),
    # For CPUs: a real model, and a made-up one.
    "SmolLM2-135M": ("llama", {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True,
    }),
    "small": ("llama", {
        "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512,
    }),
}  # fmt: skip
REAL = ("gemma-3-1b", "Llama-3.2-1B", "Qwen3-4B", "Llama-3.1-8B")

#: A model cut to few layers also has a small vocabulary; otherwise its head would take most of the time.
FEW_LAYERS, FEW_LAYERS_VOCABULARY = 4, 8192

TOKENS = (1, 8, 64, 512, 4096, 16384)
WIDTHS = tuple(GEOMETRIES[name][1]["hidden_size"] for name in REAL)
RANKS = (8, 64, 1)
BASIS = 8  # columns of V, the rank of the LoRA that it comes from


@dataclass(frozen=True)
class OpCase:
    """One size of the op: N tokens, d = hidden, r = rank, φ, k = columns of the basis V (0: no basis).

    `reads` is the tensor that W1 is applied to.
    """

    tokens: int
    hidden: int
    rank: int = 8
    activation: str = "silu"
    basis: int = 0
    dtype: str = "bfloat16"
    reads: str = "sum"

    @property
    def unit_bytes(self) -> int:
        """The bytes of one N × d tensor."""
        return self.tokens * self.hidden * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class ModelCase:
    """One size of a model: a geometry, its layers (0: all, with the whole vocabulary), batch × length tokens.

    `group` names the contenders that are measured together (`contenders.MODEL_GROUPS`). Each group has its own
    measurement of the unsteered and the fused model, so ratios are never taken across groups.
    """

    geometry: str
    layers: int
    batch: int
    length: int
    checkpointing: bool = False
    dtype: str = "bfloat16"
    rank: int = 8
    group: str = "usual"

    def __post_init__(self) -> None:
        if self.geometry not in GEOMETRIES:
            raise ValueError(f"geometry is {self.geometry!r}; expected one of {', '.join(GEOMETRIES)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")


@dataclass(frozen=True)
class ProjectionCase:
    """One size of the orthogonal projection: W2 (d, r) of each layer in float32, B (d, k = writers) in `dtype`."""

    layers: int = 32
    hidden: int = 4096
    writers: int = 8
    rank: int = 8
    dtype: str = "float32"


@dataclass(frozen=True)
class GroupedCase:
    """One size of the op with an adapter for each token: N tokens that share `adapters` adapters.

    prefill: the tokens of an adapter are adjacent, as in prompts. Otherwise they are in any order, as in decoding.
    """

    tokens: int
    hidden: int
    adapters: int
    prefill: bool = False
    rank: int = 8
    activation: str = "silu"
    dtype: str = "bfloat16"

    @property
    def unit_bytes(self) -> int:
        """The bytes of one N × d tensor."""
        return OpCase(self.tokens, self.hidden, dtype=self.dtype).unit_bytes


@dataclass(frozen=True)
class HostCase:
    """One size of the host-time benchmark: rows of one token, and the layers of a model.

    The width hardly matters for host time; 256 is a width that all kernels accept.
    """

    tokens: int = 8
    hidden: int = 256
    rank: int = 8
    layers: int = 8
    adapters: int = 4
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class ServeCase:
    """A served batch: a geometry, its layers (0: all), and rows with a prompt of `length` tokens that use `adapters`
    adapters in turn."""

    geometry: str
    layers: int
    batch: int
    length: int
    adapters: int
    dtype: str = "bfloat16"
    rank: int = 8

    def __post_init__(self) -> None:
        self.model  # noqa: B018 - ModelCase checks geometry and dtype
        if not 1 <= self.adapters <= self.batch:
            raise ValueError(f"adapters is {self.adapters}; expected 1 to {self.batch}, the rows of the batch")

    @property
    def model(self) -> ModelCase:
        """The size of the model and of its prompts."""
        return ModelCase(self.geometry, self.layers, self.batch, self.length, dtype=self.dtype, rank=self.rank)


def op_grid() -> list[OpCase]:
    """Return all sizes of the op. The sizes of the goals come first: many tokens, rank 8, SiLU, no basis.

    The sizes with W1 applied to branch come last, with one hidden size.
    """
    by_importance = (4096, 16384, 8, 512, 64, 1)
    variants = [(r, a, k) for a, k, r in itertools.product(("silu", "identity"), (0, BASIS), RANKS)]
    of_sum = [
        OpCase(tokens, hidden, rank, activation, basis)
        for rank, activation, basis in variants
        for tokens in by_importance
        for hidden in reversed(WIDTHS)
    ]
    return of_sum + [OpCase(tokens, WIDTHS[-1], reads="branch") for tokens in by_importance]


def grouped_grid() -> list[GroupedCase]:
    """Return all sizes with an adapter for each token: decoding with 1 to 256 adapters, prefill with 1 to 64."""
    decode = [
        GroupedCase(tokens, hidden, adapters)
        for hidden in (4096, 2048)
        for tokens in (256, 64, 8, 1)
        for adapters in (256, 64, 16, 1)
        if adapters <= tokens
    ]
    prefill = [
        GroupedCase(tokens, hidden, adapters, prefill=True)
        for hidden in (4096, 2048)
        for tokens in (4096, 16384)
        for adapters in (1, 8, 64)
    ]
    return decode + prefill


def serve_grid() -> list[ServeCase]:
    """Return the served batches of the whole Llama-3.2-1B: 256 rows with 1 to 256 adapters, then smaller batches with
    one adapter per row."""
    many = [ServeCase("Llama-3.2-1B", 0, 256, 256, adapters) for adapters in (256, 1, 16)]
    return many + [ServeCase("Llama-3.2-1B", 0, batch, 256, batch) for batch in (8, 64, 1)]
