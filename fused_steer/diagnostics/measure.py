"""`diagnose`: runs the prompts through the model once and measures each steered layer by hooks."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.distributed import check_unsharded
from ..adapters.factors import Adapter
from ..adapters.parameters import SITE, Place
from ..joint import steering_of
from ..kernels.torch_backend import ACTIVATIONS, accumulation_dtype
from ..lora.layers import is_lora
from ..lora.writers import Writer, choose_writers, trace_writers
from ..model.decoder import check_rows, find_decoder, inside_peft
from ..model.site import Site, SteeringSite
from ..positions import check_like_ids, kept_tokens
from .diagnosis import Diagnosis
from .flow import Flow, first
from .records import BINS, LEADING, LEVELS, Alignment, Cosine, LayerDiagnosis, Spread

if TYPE_CHECKING:
    from ..lora.layers import LoraLayer
    from ..steering import Steering

IGNORED = -100  # the label of a prompt's token


class _Absent(Exception):
    """Raised with the reason why a quantity is not defined at a layer."""


# ------------------------------------------------------------------------------------------------------------ diagnose


def diagnose(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Diagnosis:
    """Measure the effect of the active steering adapter on `model` over `batches`.

    The model runs in eval mode and without gradients. Its modes, hooks and call counts are restored afterwards, also
    after an exception.

    Args:
        model: a model patched by `patch_model`, with or without LoRA from PEFT.
        batches: keyword arguments of the decoder's forward, with `input_ids` (B, T). Tokens masked by
            `attention_mask` (B, T) are not measured, nor those outside of the adapter's positions. `labels` (B, T) say
            which tokens are the prompt's (-100); without them all are.

    Warns:
        UserWarning: layers do nothing. They are `Diagnosis.asleep`.

    Raises:
        RuntimeError: steering is disabled, or a batch is running.
        ValueError: the model is not patched, no adapter is active, the modules that write into the residual stream are
            not found, the batches hold no token to measure, a mask or labels that are used have another shape, layers
            get another hidden state than (B, T, d), or FSDP or ZeRO has sharded the model.
        TypeError: a batch is not a mapping with `input_ids`, or its mask, or labels that are used, are no tensor.
    """
    steering = steering_of(model)
    steering.check_measurable("diagnose is called")
    if steering.active is None:
        raise ValueError(f"no adapter of the model is in use; expected one of {steering.names} (model.steering.use)")
    inner = inside_peft(model)
    decoder = find_decoder(inner)
    check_unsharded(decoder.layers, "diagnose to be called")
    check_rows(decoder.module, "diagnose reads each token's")
    kinds = {Place(entry.index, entry.site): entry.kind for entry in steering.report()}
    every = {place: _site(decoder.layers[place.layer], place.site) for place in kinds}
    sites = {place: site for place, site in every.items() if site.active is not None}
    layers = {place.layer: decoder.layers[place.layer] for place in sites}
    # The hooks would recompile compiled layers, and removing the hooks would recompile them again.
    eager = torch.compiler.set_stance("force_eager")
    with _left_as_it_was(decoder.model, list(every.values())), eager:
        flow = Flow(layers, decoder.hidden)
        with flow.watching(), steering.disabled():
            writers = trace_writers(decoder.model, layers, decoder.hidden)
        observed = [
            _Observed(place, layers[place.layer], site, writers[place.layer], flow.mlp_source(place, writers))
            for place, site in sites.items()
        ]
        tokens = _run(decoder.model, observed, batches, steering)
    diagnosis = Diagnosis(
        model=getattr(inner.config, "_name_or_path", "") or type(inner).__name__,
        adapter=steering.active,
        config=steering.config().to_dict(),
        lora=tuple(dict.fromkeys(name for module in inner.modules() for name in _active_lora(module))),
        tokens=tokens,
        layers=tuple(one.diagnosis(kinds[one.place]) for one in observed),
    )
    if (warning := diagnosis.warning()) is not None:
        warnings.warn(warning, stacklevel=2)
    return diagnosis


def _site(layer: nn.Module, name: str) -> SteeringSite:
    return layer.get_submodule(name)  # type: ignore[return-value]


@contextlib.contextmanager
def _left_as_it_was(decoder: nn.Module, sites: Sequence[SteeringSite]) -> Iterator[None]:
    """Put the decoder in eval mode, and restore its modes and the report's counts on exit."""
    modes = [(module, module.training) for module in decoder.modules()]
    counts = [(site, site.calls, site.backend) for site in sites]
    try:
        decoder.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
        for site, calls, backend in counts:
            site.calls, site.backend = calls, backend


def _run(
    decoder: nn.Module, observed: Sequence[_Observed], batches: Iterable[Mapping[str, Any]], steering: Steering
) -> int:
    """Run the batches while the layers are observed. Return the number of measured tokens."""
    device = next((p.device for p in decoder.parameters()), torch.device("cpu"))
    tokens = measured = 0
    with contextlib.ExitStack() as stack, torch.no_grad():
        for one in observed:
            stack.enter_context(one.watching())
        for batch in batches:
            keep = kept_tokens(batch).nonzero().squeeze(1).to(device)
            if not len(keep):
                continue
            inputs = {
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in batch.items()
                if name != "labels"
            }
            for one in observed:
                one.keep, one.tokens = keep, batch["input_ids"].numel()
            labels = batch.get("labels")
            told: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
            if labels is not None and observed[0].site.gains is not None:
                check_like_ids("labels", labels, batch["input_ids"])
                told = steering.prompts(labels == IGNORED)
            with told:
                decoder(**inputs, use_cache=False)
            tokens += len(keep)
            measured += observed[0].measured
    if not tokens:
        raise ValueError("the batches hold no token; expected at least one that the attention mask keeps")
    if not measured:
        raise ValueError(
            f"the batches hold no token at the adapter's positions, {steering.config().positions}; expected at least "
            "one (labels tell which tokens are generated)"
        )
    return measured


# ---------------------------------------------------------------------------------------------------------- one layer


class _Observed:
    """Collects, at one site, the norms of each token's h, y, δ and ℓ, and the product δ·ℓ. The site steers h."""

    def __init__(
        self,
        place: Place,
        layer: nn.Module,
        site: SteeringSite,
        writers: list[Writer],
        mlp_source: int | str | None,
    ) -> None:
        self.place, self.layer, self.site, self.mlp_source = place, layer, site, mlp_source
        self.mlp = choose_writers(writers, "mlp")
        self.adapted = [writer for writer in self.mlp if _active_lora(writer.module)]
        self.no_lora_shift = self._why_no_lora_shift()
        self.keep: Tensor  # indices of the batch's unmasked tokens
        self.tokens: int  # the number of the batch's tokens, B·T
        self.measured = 0  # the number of these that the pass steered
        self._y: Tensor | None = None
        self._lora: list[Tensor] = []  # LoRA shifts of this pass, each (B·T, d)
        self._rows: dict[str, list[Tensor]] = {}

    def _why_no_lora_shift(self) -> str:
        if self.place.site == "pre_mlp":
            return "the MLP's input is steered, and the LoRA writes into its output"
        if self.place.site == "post_attention":
            return "the attention's output is steered, before the MLP's LoRA writes"
        if not self.adapted:
            return f"no active LoRA on {' or '.join(writer.path for writer in self.mlp[:2])}"
        for module in (writer.module for writer in self.adapted):
            if hasattr(module, "parameter_name"):
                return "its LoRA is on the parameters of experts"
            if module.merged:
                return "its LoRA is merged into the weights"
        places = [re.sub(r"\d+", "#", writer.path) for writer in self.adapted]
        return "" if len(set(places)) == len(places) else "its LoRA is on experts, which see some of the tokens each"

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            handles = [self.site.register_forward_hook(self._on_site)]
            if isinstance(self.mlp_source, str):
                handles.append(self.layer.get_submodule(self.mlp_source).register_forward_hook(self._on_mlp))
            if not self.no_lora_shift:
                handles += [writer.module.register_forward_hook(self._on_lora) for writer in self.adapted]
            for handle in handles:
                stack.callback(handle.remove)
            yield

    def _on_mlp(self, module: nn.Module, args: Any, output: Any) -> None:
        self._y = first(output)

    def _on_lora(self, module: LoraLayer, args: Any, output: Any) -> None:
        self._lora.append(_lora_shift(module, args[0], output).flatten(0, -2))

    def _on_site(self, site: SteeringSite, args: Any, output: Tensor) -> None:
        keep, tokens = self.keep, output.numel() // output.shape[-1]
        if tokens != self.tokens:
            raise ValueError(
                f"{self.place} has a hidden state {tuple(output.shape)}; expected one for each of the batch's "
                f"{self.tokens} tokens"
            )
        if site.gains is not None:
            keep = keep[site.gains.of(output, None).flatten()[keep] != 0]
        self.measured = len(keep)

        def rows(tensor: Tensor) -> Tensor:
            return tensor.flatten(0, -2)[keep]

        with torch.autocast(output.device.type, enabled=False):
            h = steered_state(site, tuple(map(rows, args)))
            adapter = site.adapter(site.active or "")
            assert adapter is not None
            shift = site.scale * unscaled_shift(adapter, site.activation, h)
            y = args[self.mlp_source] if isinstance(self.mlp_source, int) else self._y
            self._record("h", h.norm(dim=1))
            self._record("shift", shift.norm(dim=1))
            if y is not None:
                self._record("mlp", rows(y).to(h.dtype).norm(dim=1))
            if any(part.shape[0] != tokens for part in self._lora):
                self.no_lora_shift = "its LoRA does not see every token"
            if not self.no_lora_shift:
                lora = sum((rows(part).to(h.dtype) for part in self._lora), h.new_zeros(()))
                self._record("lora", lora.norm(dim=1))
                self._record("dot", (shift * lora).sum(1))
        self._y, self._lora = None, []

    def _record(self, name: str, values: Tensor) -> None:
        self._rows.setdefault(name, []).append(values)

    def _all(self, name: str) -> np.ndarray:
        return torch.cat(self._rows[name]).double().cpu().numpy()

    def diagnosis(self, kind: str) -> LayerDiagnosis:
        absent: dict[str, str] = {}

        def measured(name: str, measure: Callable[[], Any]) -> Any:
            try:
                return measure()
            except _Absent as reason:
                absent[name] = str(reason)
                return None

        return LayerDiagnosis(
            layer=self.place.layer,
            kind=kind,
            mlp_source="residual add" if isinstance(self.mlp_source, int) else self.mlp_source,
            mlp_share=measured("mlp_share", self._mlp_share),
            alignment=measured("alignment", self._alignment),
            cosine=measured("cosine", self._cosine),
            spectral_norm=measured("spectral_norm", lambda: _spectral_norm(self.site)),
            shift=measured("shift", lambda: _spread(_ratio(self._all("shift"), self._all("h")))),
            absent=absent,
            site=self.place.site,
        )

    def _alignment(self) -> Alignment:
        if self.place.site == "pre_mlp":
            raise _Absent(self.no_lora_shift)
        return _alignment(self.site, self.adapted, self.mlp)

    def _mlp_share(self) -> Spread:
        if self.place.site != SITE:
            raise _Absent("it is a share of the block's output, which is steered at post_block")
        if self.mlp_source is None:
            raise _Absent("no tensor of the layer is its MLP's output and nothing else")
        return _spread(_ratio(self._all("mlp"), self._all("h")))

    def _cosine(self) -> Cosine:
        if self.no_lora_shift:
            raise _Absent(self.no_lora_shift)
        values = _ratio(self._all("dot"), self._all("shift") * self._all("lora"))
        if not len(values):
            raise _Absent("the steering's shift or the LoRA's is zero on every token")
        values = np.clip(values, -1, 1)  # rounding may lead slightly beyond ±1
        spread = _spread(values)
        counts = np.histogram(values, BINS, (-1, 1))[0]
        return Cosine(spread.tokens, spread.mean, spread.quantiles, tuple(counts.tolist()))


def _ratio(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Return the ratio values / by over the tokens where `by` is not zero."""
    defined = by != 0
    return values[defined] / by[defined]


def _spread(values: np.ndarray) -> Spread:
    if not len(values):
        raise _Absent("what is steered is zero on every token")
    finite = np.isfinite(values).sum()
    if finite < len(values):
        raise _Absent(f"not finite on {len(values) - finite} of {len(values)} tokens")
    quantiles = np.quantile(values, LEVELS).tolist()
    return Spread(len(values), float(values.mean()), dict(zip(map(str, LEVELS), quantiles, strict=True)))


# ---------------------------------------------------------------------------------------------------------- the shifts


def steered_state(site: Site, args: tuple[Tensor, ...]) -> Tensor:
    """Return the hidden state h (..., d) that a site steers, in the dtype of its arithmetic.

    Args:
        args: the site's positional arguments: residual and branch, or the finished sum. Each is (..., d).
    """
    wide = [tensor.to(accumulation_dtype(tensor.dtype)) for tensor in args]
    return wide[1] if site.reads == "branch" else sum(wide[1:], wide[0])


def unscaled_shift(adapter: Adapter, activation: str, h: Tensor) -> Tensor:
    """Return W2 φ(W1 h + b1) + b2 for h (..., d), in h's dtype: an adapter's shift at strength 1."""
    w1, w2, b1, b2 = (None if t is None else t.to(h.dtype) for t in adapter.weights())
    if w1 is None or w2 is None:
        assert b2 is not None
        return b2.expand_as(h)
    return F.linear(ACTIVATIONS[activation][0](F.linear(h, w1, b1)), w2, b2)


def _active_lora(module: nn.Module) -> list[str]:
    """Return the names of the LoRA adapters that are active in a module."""
    if not is_lora(module) or module.disable_adapters:
        return []
    return [name for name in module.active_adapters if name in module.lora_B]


def _lora_shift(module: LoraLayer, x: Tensor, output: Tensor) -> Tensor:
    """Return ℓ, the LoRA's contribution to the output of `module` for the input x: (..., d).

    ℓ is Σ s·B·A·x in float32. For variants such as DoRA and AdaLoRA it is the output with the LoRA minus the output
    without it.
    """
    names = _active_lora(module)
    if any(name in module.lora_variant or isinstance(module.lora_A[name], Tensor) for name in names):
        acc = accumulation_dtype(output.dtype)
        return output.to(acc) - module.base_layer(x).to(acc)
    x = x.to(accumulation_dtype(x.dtype))
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        for name in names:
            a, b = module.lora_A[name], module.lora_B[name]
            bias = None if b.bias is None else b.bias.to(x.dtype)
            low = F.linear(x, a.weight.to(x.dtype))
            total = total + module.scaling[name] * F.linear(low, b.weight.to(x.dtype), bias)
    return total


# --------------------------------------------------------------------------------------------------------- the weights


def _spectral_norm(site: SteeringSite) -> float:
    """Return ‖W2'‖₂ of the W2 that steers. An adapter kept orthogonal to the LoRA already holds (I − V Vᵀ) W2."""
    adapter = site.adapter(site.active or "")
    assert adapter is not None
    up = adapter.weights()[1]
    if up is None:
        raise _Absent("a vector has no W2")
    if not up.isfinite().all():
        raise _Absent("W2 is not finite")
    return float(torch.linalg.matrix_norm(torch.linalg.qr(_exact(up), mode="r").R, 2))


def _alignment(site: SteeringSite, adapted: list[Writer], mlp: list[Writer]) -> Alignment:
    """Compare the column spaces of LoRA's update and of W2 W1 by singular vectors and principal cosines.

    LoRA's update is s·B·A, with the updates of all of the MLP's writers side by side.
    """
    if not adapted:
        raise _Absent(f"no active LoRA on {' or '.join(writer.path for writer in mlp[:2])}")
    adapter = site.adapter(site.active or "")
    assert adapter is not None
    w1, w2, *_ = adapter.weights()
    if w1 is None or w2 is None:
        raise _Absent("a vector has no W2 W1")
    columns: list[Tensor] = []
    small = []
    for writer in adapted:
        module: Any = writer.module
        if hasattr(module, "parameter_name"):
            raise _Absent("its LoRA is on the parameters of experts")
        b, a = zip(*(_lora_factors(module, name) for name in _active_lora(module)), strict=True)
        columns += b
        # Σ s·B·A of one module is [B B ..] [A; A; ..]. Only R of [A; A; ..]ᵀ = Q R changes the left singular vectors.
        small.append(torch.linalg.qr(_exact(torch.cat(a)).t(), mode="r").R)
    lora = _left_singular_vectors("LoRA's update", torch.cat(columns, 1), torch.block_diag(*small).t())
    down = torch.linalg.qr(_exact(w1).t(), mode="r").R.t()
    steering = _left_singular_vectors("W2 W1", w2, down)
    overlap = lora.t() @ steering
    cosines = torch.linalg.svdvals(overlap).clamp(max=1)
    return Alignment(
        tuple(map(tuple, overlap[:LEADING, :LEADING].abs().clamp(max=1).tolist())), tuple(cosines.tolist())
    )


def _lora_factors(module: LoraLayer, name: str) -> tuple[Tensor, Tensor]:
    """Return LoRA's factors B (d, r) and s·A (r, k). DoRA's magnitudes are left out, as in `Writer.columns`."""
    a, b = module.lora_A[name], module.lora_B[name]
    if isinstance(a, Tensor):  # AdaLoRA keeps its singular values in a separate tensor
        return b, module.scaling[name] * a * module.lora_E[name]
    return b.weight, module.scaling[name] * a.weight


def _left_singular_vectors(what: str, left: Tensor, right: Tensor) -> Tensor:
    """Return the left singular vectors of left · right, (d, rank), leading first, without forming the product.

    With left = Q R they are Q times the left singular vectors of R · right. A singular value below the largest times
    the eps of left's dtype counts as a rounded zero.

    Args:
        what: the product's name in error messages.
        left: (d, r).
        right: (r, m), with m no larger than about r.
    """
    left_exact = _exact(left)
    if not (left_exact.isfinite().all() and right.isfinite().all()):
        raise _Absent(f"{what} is not finite")
    q, r = torch.linalg.qr(left_exact)
    u, s, _ = torch.linalg.svd(r @ right)
    rank = int((s > torch.finfo(left.dtype).eps * s[0]).sum())
    if not rank:
        raise _Absent(f"{what} is zero")
    return q @ u[:, :rank]


def _exact(tensor: Tensor) -> Tensor:
    """Return a copy in float64 on the CPU. Some devices have no float64."""
    return tensor.detach().cpu().double()
