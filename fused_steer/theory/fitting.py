"""fit: the adapter that brings a base model's hidden states closest to a tuned model's, in closed form.

The oracle of a layer is δh = h_tuned − h_base (arXiv 2603.00425, §3.3): adding it to each token would give the tuned
model's hidden state exactly. An adapter is a function of the hidden state, and an identity adapter a linear one of rank
r, so it expresses a share of the oracle only: 1 − Σ‖h_tuned − h_steered‖² / Σ‖δh‖², over tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from ..adapters.files import AdapterFile
from ..adapters.parameters import DOWN, UP, UP_BIAS, ByLayer
from ..config import DTYPES, SteerConfig
from ..kernels import post_block
from ..model.decoder import Decoder
from .lockstep import Batch, Stream, evaluating
from .regression import Affine, Moments, best_affine, check_tokens, share

#: λ of the ridge, if none is given: enough that directions without variance do no harm, too little to be seen.
RIDGE = 1e-6


@dataclass(frozen=True)
class LayerFit:
    """One layer.

    oracle: sqrt(Σ‖δh‖² / Σ‖h_base‖²), the size of the oracle. share: of the oracle that the steered stream expresses
    after this layer, with what the adapters before it do; NaN where there is no oracle. held_out: the same over prompts
    that were not fitted on, None without them. rest: of what was left to do at this layer, h_tuned − h before the
    adapter, the share that it expresses; None at a layer without an adapter.
    """

    layer: int
    oracle: float
    share: float
    held_out: float | None
    rest: float | None


@dataclass(frozen=True)
class Fit:
    """A fitted adapter, as files have it, and how well it fits. tokens: those fitted on, and those held out."""

    adapter: AdapterFile
    layers: tuple[LayerFit, ...]
    tokens: tuple[int, int]

    @property
    def share(self) -> float:
        """Of the oracle after the last layer, which is all that the head of the model reads."""
        return self.layers[-1].share

    @property
    def held_out(self) -> float | None:
        return self.layers[-1].held_out

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON has them."""
        layers = [{name: _plain(value) for name, value in asdict(layer).items()} for layer in self.layers]
        return {"tokens": self.tokens[0], "tokens_held_out": self.tokens[1], "layers": layers}


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def fit(
    base: nn.Module,
    tuned: nn.Module,
    batches: Iterable[Batch],
    config: SteerConfig | None = None,
    *,
    held_out: Iterable[Batch] = (),
    ridge: float = RIDGE,
    sequence: bool = True,
) -> Fit:
    """Fit an identity adapter after the blocks of `base` to the hidden states of `tuned`. Nothing is trained.

    Both models run in eval mode, a layer at a time; afterwards they are as they were. All sums are in float64.

    Args:
        base: a decoder-only language model, unpatched.
        tuned: one of the same sizes: fine-tuned, with a LoRA of PEFT's, or patched with another adapter.
        batches: inputs of both: `input_ids` and `attention_mask` (B, T). Masked tokens do not count.
        config: rank, layers, bias and dtype of the adapter; None is rank 8 with a bias at every layer.
        held_out: batches that are measured and not fitted on.
        ridge: λ, a share of the mean variance of the hidden state (see regression.py).
        sequence: fit each layer on the stream as the adapters before it have left it, to what is left of the way to the
            tuned state. False: each on the base's own stream, to the oracle of that layer, as §3.3 states it.

    Raises:
        ValueError: the models have other sizes, or layers that cannot be run one by one; the config is none of an
            identity adapter of low rank; the rank is beyond the hidden size; there are too few tokens; or a hidden
            state is not finite.
    """
    config = SteerConfig(activation="identity", up_bias=True) if config is None else config
    return fit_each(base, tuned, batches, [config], held_out=held_out, ridge=ridge, sequence=sequence)[0]


def fit_each(
    base: nn.Module,
    tuned: nn.Module,
    batches: Iterable[Batch],
    configs: Sequence[SteerConfig],
    *,
    held_out: Iterable[Batch] = (),
    ridge: float = RIDGE,
    sequence: bool = True,
) -> list[Fit]:
    """`fit` for each config, such as of several ranks, with the passes in common done once. See `fit`."""
    own, target = Stream(base, "base"), Stream(tuned, "tuned")
    check_decoders(own.decoder, target.decoder)
    for config in configs:
        check_config(config, own.decoder)
    if not (math.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge is {ridge}; expected a finite number, 0 or more")
    parts = [_Part(batches, len(own)), _Part(held_out, len(own))]
    check_tokens(parts[0].tokens, max(config.rank for config in configs))
    fits = [_Growing(config, own.decoder) for config in configs]
    with evaluating([base, tuned]):
        for part in parts:
            part.enter(own, target)
        # On the base's own stream all read the same; in sequence each has a stream that it steers.
        groups = [(own.branch(), [one]) for one in fits] if sequence else [(own, fits)]
        for index in range(len(own)):
            target.advance(index)
            for stream, growing in groups:
                stream.advance(index)
                fitted, others = (part.moments(index, stream, target) for part in parts)
                for one in growing:
                    tensors = one.grow(index, fitted, others, parts, ridge)
                    if sequence and tensors is not None:
                        stream.states = [_steered(states, tensors) for states in stream.states]
    return [one.fit(parts) for one in fits]


class _Growing:
    """A fit, layer after layer."""

    def __init__(self, config: SteerConfig, decoder: Decoder) -> None:
        self.config, self.layout = config, decoder.layout
        self.indices = set(check_config(config, decoder))
        self.tensors: ByLayer = {}
        self.layers: list[LayerFit] = []

    def grow(
        self, index: int, fitted: Moments, others: Moments, parts: Sequence[_Part], ridge: float
    ) -> dict[str, Tensor] | None:
        """Fit the layer `index`, and measure. Returns the adapter's tensors there, None where it has none."""
        affine = None
        if index in self.indices:
            best = best_affine(fitted, self.config.rank, ridge, self.config.up_bias)
            self.tensors[index] = _tensors(best, self.config)
            affine = _rounded(self.tensors[index])
        self.layers.append(
            LayerFit(
                index,
                math.sqrt(parts[0].oracle[index] / parts[0].size[index]),
                share(parts[0].oracle[index], _rest(fitted, affine)),
                share(parts[1].oracle[index], _rest(others, affine)) if others.tokens else None,
                None if affine is None else share(fitted.total(), fitted.rest(affine)),
            )
        )
        return self.tensors.get(index)

    def fit(self, parts: Sequence[_Part]) -> Fit:
        file = AdapterFile(self.config, self.layout, self.tensors)
        return Fit(file, tuple(self.layers), (parts[0].tokens, parts[1].tokens))


class _Part:
    """Some batches: their tokens that count, and for each layer Σ‖δh‖² (`oracle`) and Σ‖h_base‖² (`size`)."""

    def __init__(self, batches: Iterable[Batch], layers: int) -> None:
        self.batches = list(batches)
        self.kept = [batch["attention_mask"].bool().flatten() for batch in self.batches]
        self.tokens = sum(int(kept.sum()) for kept in self.kept)
        self.oracle, self.size = [0.0] * layers, [0.0] * layers
        self._first = 0  # the place of its first batch in a stream

    def enter(self, own: Stream, target: Stream) -> None:
        self._first = len(own.states)
        for batch, kept in zip(self.batches, self.kept, strict=True):
            for index, pair in enumerate(zip(own.enter(batch), target.enter(batch), strict=True)):
                h, wanted = (_tokens(states, kept) for states in pair)
                self.oracle[index] += float((wanted - h).square().sum())
                self.size[index] += float(h.square().sum())

    def moments(self, index: int, own: Stream, target: Stream) -> Moments:
        """Of the hidden state x before the adapter and of h_tuned − x, after the layer `index`."""
        moments = Moments()
        for number, kept in enumerate(self.kept, self._first):
            x, wanted = (_tokens(stream.states[number], kept) for stream in (own, target))
            for stream, states in ((own, x), (target, wanted)):
                if not states.isfinite().all():
                    raise ValueError(
                        f"the {stream.name} model's hidden states after layer {index} are NaN or infinite; expected "
                        "finite ones"
                    )
            moments.add(x, wanted - x)
        return moments


def _tokens(states: Tensor, kept: Tensor) -> Tensor:
    """(B, T, d) -> (N, d) in float64, without what the mask leaves out."""
    return states.flatten(0, 1)[kept.to(states.device)].double()


def _rest(moments: Moments, affine: Affine | None) -> float:
    return moments.total() if affine is None else moments.rest(affine)


def _tensors(affine: Affine, config: SteerConfig) -> dict[str, Tensor]:
    """An adapter's tensors at one layer, in the dtype of its parameters."""
    named = {DOWN: affine.down, UP: affine.up, UP_BIAS: affine.bias}
    return {name: tensor.to(DTYPES[config.dtype]) for name, tensor in named.items() if tensor is not None}


def _rounded(tensors: dict[str, Tensor]) -> Affine:
    """What the adapter computes: its shares are those of the parameters as they are saved."""
    bias = tensors.get(UP_BIAS)
    return Affine(tensors[DOWN].double(), tensors[UP].double(), None if bias is None else bias.double())


def _steered(states: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    return post_block(states, None, tensors[DOWN], tensors[UP], up_bias=tensors.get(UP_BIAS), activation="identity")


def check_decoders(base: Decoder, tuned: Decoder) -> None:
    """Refuse a tuned model of other sizes than the base's.

    Raises:
        ValueError: it has another number of layers, or another hidden size.
    """
    sizes = [(len(decoder.layers), decoder.hidden) for decoder in (base, tuned)]
    if sizes[0] != sizes[1]:
        layers, hidden = sizes[1]
        raise ValueError(
            f"the tuned model has {layers} layers of hidden size {hidden}; expected {sizes[0][0]} of {sizes[0][1]}, as "
            "the base has"
        )


def check_config(config: SteerConfig, decoder: Decoder) -> Sequence[int]:
    """The layers that get an adapter.

    Raises:
        ValueError: the config is none of an identity adapter of low rank, or does not fit the decoder.
    """
    for name, wanted in (("form", "lowrank"), ("activation", "identity"), ("down_bias", False), ("scale", 1.0)):
        if getattr(config, name) != wanted:
            raise ValueError(f"{name} is {getattr(config, name)!r}; expected {wanted!r}, of what is fitted")
    if config.orthogonal_to is not None:
        raise ValueError(
            f"orthogonal_to is {config.orthogonal_to!r}; expected None, as there is no LoRA to be kept from"
        )
    if config.rank > decoder.hidden:
        raise ValueError(f"rank is {config.rank}; expected at most {decoder.hidden}, the hidden size")
    return decoder.layout.indices(config)
