"""fit: the adapter that brings a base model's hidden states closest to a tuned model's.

The oracle of a layer is δh = h_tuned − h_base (arXiv 2603.00425, §3.3): adding it to each token would give the tuned
model's hidden state exactly. An adapter is a function of the hidden state, and an identity adapter a linear one of rank
r, so it expresses a share of the oracle only: 1 − Σ‖h_tuned − h_steered‖² / Σ‖δh‖², over tokens. The best identity
adapter is known in closed form (regression.py); one with another activation is found by descent (nonlinear.py).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.files import AdapterFile
from ..adapters.parameters import DOWN, DOWN_BIAS, SITE, UP, UP_BIAS, ByPlace, Place
from ..config import DTYPES, SteerConfig, checked_bool, checked_number
from ..kernels import post_block
from ..model.decoder import Decoder, inside_peft
from ..positions import ALL, kept_tokens
from ..steering import Steering
from .lockstep import Batch, Stream, evaluating, with_site
from .nonlinear import best_nonlinear
from .regression import Moments, Shift, best_affine, check_tokens

#: λ of the ridge, if none is given: enough that directions without variance do no harm, too little to be seen.
RIDGE = 1e-6


@dataclass(frozen=True)
class LayerFit:
    """How well the adapters fit after one layer.

    Attributes:
        layer: the layer's index.
        oracle: the size of the oracle δh = h_tuned − h_base: the median over tokens of ‖δh‖ / ‖h_base‖.
        share: the share of the oracle that the adapters of this layer and those before it make up for,
            1 − Σ‖h_tuned − h_steered‖² / Σ‖δh‖². NaN where there is no oracle.
        held_out: the same over prompts that were not fitted on. None without them.
        token: the median over tokens of 1 − ‖h_tuned − h_steered‖² / ‖δh‖², of those held out if there are any. The
            sums of `share` may be those of a few tokens with far larger hidden states, such as a prompt's first. Tokens
            without an oracle, such as those before the first trained one, do not count. NaN if all are without.
        rest: of what the adapters before it left, the share that this layer's adapter makes up for. None without one.
        reach: an upper bound of `share`: that of the best function of the token with values in as many directions as
            the adapter has ranks (and its bias). None at a layer without an adapter.
        growth: the distance to the tuned hidden states before this layer's adapter, divided by that after the layer
            before. None at the first layer, at sites inside a block, and where nothing was left.
    """

    layer: int
    oracle: float
    share: float
    held_out: float | None
    token: float
    rest: float | None
    reach: float | None
    growth: float | None


@dataclass(frozen=True)
class Fit:
    """A fitted adapter, and how well it fits.

    Attributes:
        adapter: the adapter, for `write_adapter`.
        layers: the fit after each layer.
        tokens: the numbers of tokens fitted on and held out.
    """

    adapter: AdapterFile
    layers: tuple[LayerFit, ...]
    tokens: tuple[int, int]

    @property
    def share(self) -> float:
        """The share of the oracle after the last layer, which is all that the head of the model reads."""
        return self.layers[-1].share

    @property
    def missed(self) -> tuple[float, int]:
        """The largest share of the oracle that is missed after a layer with an adapter, and the first such layer.

        It is that of held-out prompts, if there are any with an oracle.
        """
        steered = [layer for layer in self.layers if layer.rest is not None]
        shares = [
            (layer.share if layer.held_out is None or math.isnan(layer.held_out) else layer.held_out, layer.layer)
            for layer in steered
        ]
        missed = [(1 - share, -index) for share, index in shares if not math.isnan(share)]
        worst, index = max(missed, default=(0.0, 0))
        return worst, -index

    @property
    def held_out(self) -> float | None:
        return self.layers[-1].held_out

    @property
    def token(self) -> float:
        return self.layers[-1].token

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
    """Fit an adapter after the blocks of `base` to the hidden states of `tuned`. No gradient goes through a model.

    Both models run in eval mode, a layer at a time; afterwards they are as they were. All sums are in float64.

    Args:
        base: a decoder-only language model, unpatched.
        tuned: one of the same sizes: fine-tuned, with a LoRA of PEFT's, or patched with another adapter.
        batches: inputs of both, `input_ids` (B, T) and what else their forward takes. Tokens that `attention_mask`
            (B, T) masks do not count.
        config: rank, activation, layers, biases and dtype of the adapter; None is the identity of rank 8 with a bias at
            every layer. Of form "vector" it is the mean of what is left to do.
        held_out: batches that are measured and not fitted on.
        ridge: λ, a share of the mean variance of the hidden state (see regression.py).
        sequence: fit each layer on the stream as the adapters before it have left it, to what is left of the way to the
            tuned state. False: each on the base's own stream, to the oracle of that layer, as §3.3 states it. This
            tells how well a layer's oracle can be expressed. Adapters so fitted are not for use together, because each
            makes up for all layers before it once more.

    Raises:
        ValueError: the models have other sizes, or layers that cannot be run one by one; the config is of form
            "loreft", has a strength, or a b1 with the identity; the rank is beyond the hidden size; the tuned model's
            adapter has positions; there are too few tokens; or a hidden state is not finite.
        RuntimeError: a batch of the tuned model is running.
        TypeError: a batch is no mapping with `input_ids`, or its mask is no tensor.
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
    if hasattr(base, "steering"):
        raise ValueError("the base model is steered; expected one that is not (model.steering.unpatch)")
    site = configs[0].sites[0]
    own, target = Stream(base, "base", site), Stream(tuned, "tuned", site)
    check_decoders(own.decoder, target.decoder)
    for config in configs:
        check_config(config, own.decoder)
        if config.site != site:
            raise ValueError(f"the configs have the sites {site} and {config.site}; expected the same")
    check_ridge(ridge)
    checked_bool("sequence", sequence)
    check_tuned(tuned, site)
    _warn_of_families(own.decoder, target.decoder)
    device = own.device if own.device.type == "cuda" else torch.device("cpu")  # others may have no float64
    parts = [_Part(some, len(own), device) for some in (batches, held_out)]
    check_tokens(parts[0].tokens, max(config.rank for config in configs))
    fits = [_Growing(config, own.decoder) for config in configs]
    with evaluating([base, tuned]), with_site([base, tuned], site):
        for part in parts:
            part.enter(own, target)
        # On the base's own stream all read the same; in sequence each has a stream that it steers.
        groups = [(own.branch(), [one]) for one in fits] if sequence else [(own, fits)]
        for index in range(len(own)):
            target.advance(index)
            for stream, growing in groups:
                stream.advance(index)
                moments = Moments()
                for x, d in parts[0].pairs(index, stream, target):
                    moments.add(x, d)
                for one in growing:
                    shift = one.adapt(index, moments, ridge, partial(parts[0].pairs, index, stream, target))
                    left = [part.left(index, stream, target, shift) for part in parts]
                    reach = None if shift is None else one.out_of_reach(moments)
                    before = one.left if site == SITE else None
                    one.layers.append(_measured(index, parts, left, reach, before))
                    one.left = float(left[0][1 if sequence else 0].sum())
                    if sequence and shift is not None:
                        steered = partial(_steered, tensors=one.tensors[Place(index, site)], config=one.config)
                        stream.steer(index, steered)
    return [one.fit(parts) for one in fits]


def fit_within(
    base: nn.Module, tuned: nn.Module, batches: Iterable[Batch], config: SteerConfig, error: float, **options: Any
) -> Fit:
    """`fit` with the first rank of 1, 2, 4, … at which no layer misses more than a share `error` of the oracle.

    The share is that of the prompts held out, if there are any.

    Args:
        config: as for `fit`; its rank is not used.
        options: those of `fit`.

    Raises:
        ValueError: see `fit`; or no rank is enough.
    """
    if not 0 < checked_number("error", error) < 1:
        raise ValueError(f"error is {error}; expected a share of the oracle, above 0 and below 1")
    if config.form == "vector":
        raise ValueError("form is 'vector', which has no rank; expected a form with one")
    batches, hidden = list(batches), Stream(base, "base").decoder.hidden
    options["held_out"] = list(options.get("held_out", ()))
    tokens = sum(int(kept_tokens(batch).sum()) for batch in batches)
    most = min(hidden, max(tokens - 2, 1))
    tried: list[tuple[float, int, int]] = []
    for rank in sorted({*(2**power for power in range(most.bit_length())), most}):
        found = fit(base, tuned, batches, dataclasses.replace(config, rank=rank), **options)
        missed, layer = found.missed
        if missed <= error:
            return found
        tried.append((missed, rank, layer))
    missed, rank, layer = min(tried)
    raise ValueError(
        f"error is {error:g}, and of the ranks 1, 2, 4 to {most}, rank {rank} comes closest, missing {missed:.1%} of "
        f"the oracle after layer {layer}; expected an error above that, or more prompts"
    )


class _Growing:
    """A fit, layer after layer."""

    def __init__(self, config: SteerConfig, decoder: Decoder) -> None:
        self.config, self.layout = config, decoder.layout
        self.indices = set(check_config(config, decoder))
        self.tensors: ByPlace = {}
        self.layers: list[LayerFit] = []
        self.left: float | None = None  # Σ‖h_tuned − h‖² after the layer before

    def adapt(
        self, index: int, moments: Moments, ridge: float, pairs: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    ) -> Shift | None:
        """Fit the adapter of the layer `index`, and return what it computes; None where it has none.

        pairs: gives the tokens x and their shifts d, of which `moments` are.
        """
        if index not in self.indices:
            return None
        config = self.config
        if config.form == "vector" or config.activation == "identity":
            best = best_affine(moments, config.rank, ridge, config.up_bias)
        else:
            check_tokens(moments.tokens, config.rank)
            x, d = (torch.cat(rows) for rows in zip(*pairs(), strict=True))
            biases = {"down_bias": config.down_bias, "up_bias": config.up_bias}
            best = best_nonlinear(x, d, config.rank, ridge, config.activation, **biases)
        tensors = self.tensors[Place(index, config.sites[0])] = _tensors(best, config)
        return _rounded(tensors, config, moments.xx.device)

    def out_of_reach(self, moments: Moments) -> float:
        return moments.out_of_reach(self.config.rank, self.config.up_bias)

    def fit(self, parts: Sequence[_Part]) -> Fit:
        file = AdapterFile(self.config, self.layout, self.tensors)
        return Fit(file, tuple(self.layers), (parts[0].tokens, parts[1].tokens))


class _Part:
    """Some batches: their tokens that count, and for each layer and token ‖δh‖² (`oracle`) and ‖h_base‖² (`size`)."""

    def __init__(self, batches: Iterable[Batch], layers: int, device: torch.device) -> None:
        """device: of the sums, which are in float64."""
        self.batches, self.device = list(batches), device
        self.kept = [kept_tokens(batch) for batch in self.batches]
        self.tokens = sum(int(kept.sum()) for kept in self.kept)
        self.oracle: list[list[Tensor]] = [[] for _ in range(layers)]
        self.size: list[list[Tensor]] = [[] for _ in range(layers)]
        self._first = 0  # the place of its first batch in a stream

    def enter(self, own: Stream, target: Stream) -> None:
        self._first = len(own.states)
        for batch, kept in zip(self.batches, self.kept, strict=True):
            for index, pair in enumerate(zip(own.enter(batch), target.enter(batch), strict=True)):
                h, wanted = (_tokens(states, kept, self.device) for states in pair)
                self.oracle[index].append((wanted - h).square().sum(1).cpu())
                self.size[index].append(h.square().sum(1).cpu())

    def pairs(self, index: int, own: Stream, target: Stream) -> Iterator[tuple[Tensor, Tensor]]:
        """After the layer `index`, for each batch: the hidden states x before the adapter, and h_tuned − x."""
        for number, kept in enumerate(self.kept, self._first):
            x, wanted = (_tokens(stream.read[number], kept, self.device) for stream in (own, target))
            for stream, states in ((own, x), (target, wanted)):
                if not states.isfinite().all():
                    raise ValueError(
                        f"the {stream.name} model's hidden states after layer {index} are NaN or infinite; expected "
                        "finite ones"
                    )
            yield x, wanted - x

    def left(self, index: int, own: Stream, target: Stream, shift: Shift | None) -> tuple[Tensor, Tensor]:
        """Of each token, ‖h_tuned − h‖² with h before the adapter, and after it."""
        before, after = [], []
        for x, d in self.pairs(index, own, target):
            before.append(d.square().sum(1))
            after.append(before[-1] if shift is None else (d - shift(x)).square().sum(1))
        return _joined(before), _joined(after)


def _joined(rows: Sequence[Tensor]) -> Tensor:
    return torch.cat([row.cpu() for row in rows]) if rows else torch.empty(0)


def _measured(
    index: int,
    parts: Sequence[_Part],
    left: Sequence[tuple[Tensor, Tensor]],
    out_of_reach: float | None,
    left_before: float | None,
) -> LayerFit:
    """The figures of one layer.

    Args:
        left: of each part, see `_Part.left`.
        out_of_reach: see `Moments.out_of_reach`; None at a layer without an adapter.
        left_before: Σ‖h_tuned − h‖² after the layer before, or None.
    """
    oracles = [_joined(part.oracle[index]) for part in parts]
    sizes = _joined(parts[0].size[index])
    shares = [_share(oracle, after) for oracle, (_, after) in zip(oracles, left, strict=True)]
    shown = 1 if len(oracles[1]) else 0
    whole, coming = float(oracles[0].sum()), float(left[0][0].sum())
    return LayerFit(
        index,
        float((oracles[0] / sizes).sqrt().median()),
        shares[0],
        shares[1] if shown else None,
        _median_share(oracles[shown], left[shown][1]),
        None if out_of_reach is None else _share(*left[0]),
        None if out_of_reach is None or not whole else 1 - out_of_reach / whole,
        math.sqrt(coming / left_before) if left_before else None,
    )


def _share(whole: Tensor, rest: Tensor) -> float:
    """1 − Σ rest / Σ whole; NaN where there is nothing."""
    total = float(whole.sum())
    return 1 - float(rest.sum()) / total if total else math.nan


def _median_share(oracle: Tensor, after: Tensor) -> float:
    """The median over the tokens with an oracle of 1 − after / oracle; NaN where there is none."""
    there = oracle > 0
    return float((1 - after[there] / oracle[there]).median()) if there.any() else math.nan


def _tokens(states: Tensor, kept: Tensor, device: torch.device) -> Tensor:
    """(B, T, d) -> (N, d) in float64, without what the mask leaves out."""
    return states.flatten(0, 1)[kept.to(states.device)].to(device).double()


def _tensors(shift: Shift, config: SteerConfig) -> dict[str, Tensor]:
    """An adapter's tensors at one layer, in the dtype of its parameters."""
    named = {DOWN: shift.down, UP: shift.up, DOWN_BIAS: shift.down_bias, UP_BIAS: shift.bias}
    there = {name: tensor for name, tensor in named.items() if tensor is not None and tensor.numel()}
    return {name: tensor.to("cpu", DTYPES[config.dtype]) for name, tensor in there.items()}


def _rounded(tensors: dict[str, Tensor], config: SteerConfig, device: torch.device) -> Shift:
    """What the adapter computes: its shares are those of the parameters as they are saved."""
    there = {name: tensor.to(device).double() for name, tensor in tensors.items()}
    nothing = torch.empty(0, 0, dtype=torch.float64, device=device)  # of a vector
    down, up = there.get(DOWN, nothing), there.get(UP, nothing)
    return Shift(down, up, there.get(UP_BIAS), there.get(DOWN_BIAS), config.activation if down.numel() else "identity")


def _steered(states: Tensor, tensors: dict[str, Tensor], config: SteerConfig) -> Tensor:
    there = {name: tensor.to(states.device) for name, tensor in tensors.items()}
    return post_block(
        states,
        None,
        there.get(DOWN),
        there.get(UP),
        down_bias=there.get(DOWN_BIAS),
        up_bias=there.get(UP_BIAS),
        activation=config.activation if DOWN in there else "identity",
    )


def check_ridge(ridge: float) -> None:
    """Refuse a ridge that is no finite number of 0 or more."""
    if checked_number("ridge", ridge) < 0:
        raise ValueError(f"ridge is {ridge}; expected a finite number, 0 or more")


def check_site(what: str, site: str) -> None:
    """Refuse a site inside the blocks for a tuned model that is steered: its blocks have the sites of its adapter."""
    if site != SITE:
        raise ValueError(
            f"site is {site!r} and {what} is steered; expected {SITE!r}, or a fine-tuned model or a LoRA alone"
        )


def check_tuned(tuned: nn.Module, site: str) -> None:
    """Refuse a steered model whose layers cannot be run one by one.

    Raises:
        ValueError: its adapter has positions, or the site of the fitted adapter is another than post_block.
        RuntimeError: a batch is running.
    """
    steering = getattr(inside_peft(tuned), "steering", None)
    if isinstance(steering, Steering):
        steering.check_measurable("fit is called", disabled=True)
        check_site("the tuned model", site)
        if steering.active is not None:
            check_positions("the tuned model's adapter", steering.config())


def check_positions(what: str, config: SteerConfig) -> None:
    """Refuse an adapter that steers some tokens only. The fitted one steers all of them."""
    if config.positions != ALL:
        raise ValueError(f"{what} has positions {config.positions!r}; expected {ALL!r}: a fitted adapter has no others")


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


def _warn_of_families(base: Decoder, tuned: Decoder) -> None:
    """Warn of a tuned model whose layers are of other classes than the base's. Converted ones compute the same."""
    names = [sorted({type(layer).__name__ for layer in decoder.layers}) for decoder in (base, tuned)]
    if names[0] != names[1]:
        warnings.warn(
            f"the tuned model has layers {', '.join(names[1])}, the base {', '.join(names[0])}; expected a model "
            "that was tuned from the base: the fit takes all that the two compute differently for the tuning",
            stacklevel=4,
        )


def check_config(config: SteerConfig, decoder: Decoder) -> Sequence[int]:
    """The layers that get an adapter.

    Raises:
        ValueError: the config is of form "loreft", has several sites, a strength, or a b1 with the identity, or does
            not fit the decoder.
    """
    if config.form == "loreft":
        raise ValueError(f"form is {config.form!r}; expected 'lowrank' or 'vector', of what is fitted")
    if config.scale != 1.0:
        raise ValueError(f"scale is {config.scale!r}; expected 1.0, of what is fitted")
    if config.down_bias and config.activation == "identity":
        raise ValueError("down_bias is True with the activation identity; expected False, as b2 does the same")
    if len(config.sites) > 1:
        raise ValueError(f"site is {', '.join(config.sites)}; expected one")
    if config.orthogonal_to is not None:
        raise ValueError(
            f"orthogonal_to is {config.orthogonal_to!r}; expected None, as there is no LoRA to be kept from"
        )
    if config.rank > decoder.hidden:
        raise ValueError(f"rank is {config.rank}; expected at most {decoder.hidden}, the hidden size")
    return decoder.layout.indices(config)
