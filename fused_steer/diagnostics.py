"""What steering does to a model, in five figures that people can look at (after arXiv 2603.00425, Figs. 2, 3, 5 and 6).

Per steered layer, over the tokens of some prompts:

- the MLP's share of the block's output, ‖y‖ / ‖h‖ (Fig. 2);
- how the leading left singular vectors of LoRA's update s·B·A and of steering's W2 W1 align (Fig. 3);
- the cosine between the steering's shift δ and the LoRA's shift ℓ of the same token (Fig. 5);
- the spectral norm of W2' (Fig. 6);
- the size of the shift, ‖δ‖ / ‖h‖.

h is the block's output before steering, and δ = s (W2 φ(W1 h + b1) + b2) what the site adds to it. δ and ℓ are computed
in float32 from what the model computed: the difference of two bfloat16 hidden states would be mostly rounding.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._version import __version__
from .checkpoint import read_adapter
from .joint import LORA_FOLDER, STEERING_FOLDER, load_joint, steering_of
from .kernels.reference import ACTIVATIONS, accumulation_dtype
from .patch import SITE, find_decoder, inside_peft, patch_model
from .sites import SteeringSite
from .writers import MIXING, Writer, choose_writers, is_lora, trace_writers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console
    from rich.table import Table

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 101  # of the cosine, over [-1, 1]; odd, so that 0 is inside one
LEADING = 8  # singular vectors compared

QUANTITIES = ("mlp_share", "alignment", "cosine", "spectral_norm", "shift")
JSON_NAME = "diagnostics.json"


@dataclass(frozen=True)
class Spread:
    """A quantity over the tokens for which it is defined: how many, their mean, and their quantiles at LEVELS."""

    tokens: int
    mean: float
    quantiles: dict[str, float]


@dataclass(frozen=True)
class Cosine(Spread):
    """counts: tokens in each of BINS equal bins of [-1, 1]."""

    counts: tuple[int, ...]


@dataclass(frozen=True)
class Alignment:
    """Of LoRA's update and steering's.

    singular: |u_iᵀ u'_j|, a row for each leading left singular vector u_i of LoRA's, a column for each of steering's.
    principal: the cosines of the principal angles between the two column spaces, largest first.
    """

    singular: tuple[tuple[float, ...], ...]
    principal: tuple[float, ...]


@dataclass(frozen=True)
class LayerDiagnosis:
    """One steered layer. What it has not is None, and `absent` says why, by name.

    mlp_source: what y was: "residual add", the operand of the block's last add; or the path of the module whose output
    it was.
    """

    layer: int
    kind: str
    mlp_source: str | None
    mlp_share: Spread | None
    alignment: Alignment | None
    cosine: Cosine | None
    spectral_norm: float | None
    shift: Spread | None
    absent: dict[str, str]


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found. tokens: looked at, padding excluded; lora: the active LoRA adapters."""

    model: str
    adapter: str
    config: dict[str, Any]
    lora: tuple[str, ...]
    tokens: int
    layers: tuple[LayerDiagnosis, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON has it; every number is finite."""
        fields = json.loads(json.dumps(asdict(self), allow_nan=False))
        return {"fused_steer_version": __version__, "cosine_bin_edges": np.linspace(-1, 1, BINS + 1).tolist(), **fields}

    def save(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Write `diagnostics.json`, and a PNG for each quantity that any layer has; return the files.

        The PNG of an earlier diagnosis in `directory` is removed where this one has none.

        Raises:
            ImportError: matplotlib is missing; nothing is written then.
            NotADirectoryError: `directory` is a file.
        """
        check_matplotlib()
        target = Path(directory)
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(f"{target} is a file; expected a directory to save the diagnosis in")
        target.mkdir(parents=True, exist_ok=True)
        files = [target / JSON_NAME]
        files[0].write_text(json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        for name in QUANTITIES:
            file = target / f"{name}.png"
            layers = [layer for layer in self.layers if getattr(layer, name) is not None]
            if layers:
                _FIGURES[name](layers, file)
                files.append(file)
            else:
                file.unlink(missing_ok=True)
        return files


class _Absent(Exception):
    """Why a layer has no such quantity."""


# ------------------------------------------------------------------------------------------------------------ diagnose


def diagnose(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Diagnosis:
    """Measure what the steering adapter in use does to `model` on `batches`.

    The model runs in eval mode and without gradients; afterwards its modes, hooks and call counts are as they were,
    also after an exception.

    Args:
        model: one that `patch_model` patched, with or without LoRA from PEFT.
        batches: inputs of its decoder: `input_ids` (B, T), and what else its forward takes. Tokens that
            `attention_mask` (B, T) masks are not looked at; `labels` are not needed and left out.

    Raises:
        ValueError: the model is not patched, no adapter is in use, steering is disabled, the modules that write into
            the residual stream are not found, the batches hold no token, or a mask is of another shape.
        TypeError: a batch is no mapping with `input_ids`.
    """
    steering = steering_of(model)
    if steering.active is None:
        raise ValueError(f"no adapter of the model is in use; expected one of {steering.names} (model.steering.use)")
    inner = inside_peft(model)
    decoder = find_decoder(inner)
    kinds = {entry.index: entry.kind for entry in steering.report()}
    patched = {index: decoder.layers[index] for index in kinds}
    layers = {index: layer for index, layer in patched.items() if _site(layer).active is not None}
    if not all(_site(layer).enabled for layer in layers.values()):
        raise ValueError("steering is disabled; expected it enabled (outside of model.steering.disabled())")
    # Compiled layers would be compiled anew for the hooks, and again without them.
    eager = torch.compiler.set_stance("force_eager")
    with _left_as_it_was(decoder.module, [_site(layer) for layer in patched.values()]), eager:
        flow = _Flow(layers, decoder.hidden)
        with flow.watching(), steering.disabled():
            writers = trace_writers(decoder.module, layers, decoder.hidden)
        observed = [_Observed(i, layer, writers[i], flow.mlp_source(i, writers[i])) for i, layer in layers.items()]
        tokens = _run(decoder.module, observed, batches)
    return Diagnosis(
        model=getattr(inner.config, "_name_or_path", "") or type(inner).__name__,
        adapter=steering.active,
        config=steering.config().to_dict(),
        lora=tuple(dict.fromkeys(name for module in inner.modules() for name in _active_lora(module))),
        tokens=tokens,
        layers=tuple(one.diagnosis(kinds[one.index]) for one in observed),
    )


def _site(layer: nn.Module) -> SteeringSite:
    return layer.get_submodule(SITE)  # type: ignore[return-value]


@contextlib.contextmanager
def _left_as_it_was(decoder: nn.Module, sites: Sequence[SteeringSite]) -> Iterator[None]:
    """Inside, the model is in eval mode; afterwards modes and the report's counts are as they were."""
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


def _run(decoder: nn.Module, observed: Sequence[_Observed], batches: Iterable[Mapping[str, Any]]) -> int:
    """Run the batches while each layer is observed; the number of tokens that were looked at."""
    device = next((p.device for p in decoder.parameters()), torch.device("cpu"))
    tokens = 0
    with contextlib.ExitStack() as stack, torch.no_grad():
        for one in observed:
            stack.enter_context(one.watching())
        for batch in batches:
            if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
                raise TypeError(f"a batch is a {type(batch).__name__}; expected a mapping with a tensor input_ids")
            inputs = {
                name: value.to(device) if isinstance(value, Tensor) else value
                for name, value in batch.items()
                if name != "labels"
            }
            ids, mask = inputs["input_ids"], inputs.get("attention_mask")
            if mask is None:
                mask = torch.ones_like(ids)
            if mask.shape != ids.shape:
                raise ValueError(f"attention_mask is {tuple(mask.shape)}; expected {tuple(ids.shape)}, as input_ids")
            keep = mask.reshape(-1).nonzero().squeeze(1)
            if not len(keep):
                continue
            for one in observed:
                one.keep = keep
            decoder(**inputs, use_cache=False)
            tokens += len(keep)
    if not tokens:
        raise ValueError("the batches hold no token; expected at least one that the attention mask keeps")
    return tokens


# -------------------------------------------------------------------------------------------------- the MLP's output


class _Flow:
    """Which tensor is all that a layer's MLP adds to the residual stream: read off the graph of one traced pass.

    Names do not tell: a layer may normalise or scale what its MLP returns, add it left or right, or together with the
    attention's output.
    """

    def __init__(self, layers: Mapping[int, nn.Module], hidden: int) -> None:
        self.layers, self.hidden = layers, hidden
        self.inputs: dict[int, Tensor] = {}
        self.operands: dict[int, tuple[Tensor, ...]] = {}
        self.outputs: dict[int, list[tuple[str, Tensor]]] = {index: [] for index in layers}  # in the order of ending

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for index, layer in self.layers.items():
                handles = [
                    layer.register_forward_pre_hook(self._begin(index), with_kwargs=True),
                    _site(layer).register_forward_pre_hook(self._add(index)),
                ]
                handles += [
                    module.register_forward_hook(self._output(index, path))
                    for path, module in layer.named_modules()
                    if path and path != SITE and not path.startswith(f"{SITE}.")
                ]
                for handle in handles:
                    stack.callback(handle.remove)
            yield

    def _begin(self, index: int) -> Any:
        def hook(layer: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = (t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point())
            hidden = next((t for t in tensors if t.shape[-1] == self.hidden), None)
            if hidden is not None:
                self.inputs[index] = hidden

        return hook

    def _add(self, index: int) -> Any:
        def hook(site: nn.Module, args: Any) -> None:
            self.operands[index] = args if len(args) == 2 else ()

        return hook

    def _output(self, index: int, path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = _first(output)
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None and tensor.shape[-1] == self.hidden:
                self.outputs[index].append((path, tensor))

        return hook

    def mlp_source(self, index: int, writers: list[Writer]) -> int | str | None:
        """The operand of the last add (0 or 1), or else the path of the module, that is the MLP's output and nothing
        else; None if there is none. Of modules the last, which is after a norm of the MLP's output."""
        mlp = {writer.path for writer in choose_writers(writers, "mlp")}
        others = {writer.path for writer in writers} - mlp
        ends = {tensor.grad_fn: path in mlp for path, tensor in self.outputs[index] if path in mlp | others}
        start = self.inputs.get(index)
        if start is None:
            return None
        for operand, tensor in enumerate(self.operands[index]):
            if _only_from_mlp(tensor, ends, start):
                return operand
        size = start.numel()
        found = [
            path
            for path, tensor in self.outputs[index]
            if tensor.numel() == size and _only_from_mlp(tensor, ends, start)
        ]
        return found[-1] if found else None


def _only_from_mlp(tensor: Tensor, ends: Mapping[Any, bool], start: Tensor) -> bool:
    """Whether, back through sums, scalings and norms, a tensor comes from writers of the MLP, and from neither other
    writers nor the layer's input."""
    found = False
    seen: set[Any] = {None}
    todo = [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node is start.grad_fn or getattr(node, "variable", None) is start:
            return False
        if node in ends:
            if not ends[node]:
                return False
            found = True
        elif not MIXING.search(node.name()):
            todo += [parent for parent, _ in node.next_functions]
    return found


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) and output else output


# ---------------------------------------------------------------------------------------------------------- one layer


class _Observed:
    """A steered layer in the run: the norms of each token's h, y, δ and ℓ, and the product δ·ℓ."""

    def __init__(self, index: int, layer: nn.Module, writers: list[Writer], mlp_source: int | str | None) -> None:
        self.index, self.layer, self.site, self.mlp_source = index, layer, _site(layer), mlp_source
        self.mlp = choose_writers(writers, "mlp")
        self.adapted = [writer for writer in self.mlp if _active_lora(writer.module)]
        self.no_lora_shift = self._why_no_lora_shift()
        self.keep: Tensor  # indices of the batch's tokens that are looked at
        self._y: Tensor | None = None
        self._lora: list[Tensor] = []  # of this pass: (B·T, d)
        self._rows: dict[str, list[Tensor]] = {}

    def _why_no_lora_shift(self) -> str:
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
        self._y = _first(output)

    def _on_lora(self, module: nn.Module, args: Any, output: Any) -> None:
        self._lora.append(_lora_shift(module, args[0], output).flatten(0, -2))

    def _on_site(self, site: nn.Module, args: Any, output: Tensor) -> None:
        acc = accumulation_dtype(output.dtype)

        def rows(tensor: Tensor) -> Tensor:
            return tensor.flatten(0, -2)[self.keep].to(acc)

        with torch.autocast(output.device.type, enabled=False):
            h = sum(map(rows, args[1:]), rows(args[0]))
            shift = _steering_shift(self.site, h)
            y = args[self.mlp_source] if isinstance(self.mlp_source, int) else self._y
            self._record("h", h.norm(dim=1))
            self._record("shift", shift.norm(dim=1))
            if y is not None:
                self._record("mlp", rows(y).norm(dim=1))
            tokens = output.numel() // output.shape[-1]
            if any(part.shape[0] != tokens for part in self._lora):
                self.no_lora_shift = "its LoRA does not see every token"
            if not self.no_lora_shift:
                lora = sum(map(rows, self._lora[1:]), rows(self._lora[0]))
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
            layer=self.index,
            kind=kind,
            mlp_source="residual add" if isinstance(self.mlp_source, int) else self.mlp_source,
            mlp_share=measured("mlp_share", self._mlp_share),
            alignment=measured("alignment", lambda: _alignment(self.site, self.adapted, self.mlp)),
            cosine=measured("cosine", self._cosine),
            spectral_norm=measured("spectral_norm", lambda: _spectral_norm(self.site)),
            shift=measured("shift", lambda: _spread(_ratio(self._all("shift"), self._all("h")))),
            absent=absent,
        )

    def _mlp_share(self) -> Spread:
        if self.mlp_source is None:
            raise _Absent("no tensor of the layer is its MLP's output and nothing else")
        return _spread(_ratio(self._all("mlp"), self._all("h")))

    def _cosine(self) -> Cosine:
        if self.no_lora_shift:
            raise _Absent(self.no_lora_shift)
        values = _ratio(self._all("dot"), self._all("shift") * self._all("lora"))
        if not len(values):
            raise _Absent("the steering's shift or the LoRA's is zero on every token")
        values = np.clip(values, -1, 1)  # rounding may lead a little beyond
        spread = _spread(values)
        counts = np.histogram(values, BINS, (-1, 1))[0]
        return Cosine(spread.tokens, spread.mean, spread.quantiles, tuple(counts.tolist()))


def _ratio(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    """values / by, of the tokens where `by` is not zero."""
    defined = by != 0
    return values[defined] / by[defined]


def _spread(values: np.ndarray) -> Spread:
    if not len(values):
        raise _Absent("the block's output is zero on every token")
    finite = np.isfinite(values).sum()
    if finite < len(values):
        raise _Absent(f"not finite on {len(values) - finite} of {len(values)} tokens")
    quantiles = np.quantile(values, LEVELS).tolist()
    return Spread(len(values), float(values.mean()), dict(zip(map(str, LEVELS), quantiles, strict=True)))


# ---------------------------------------------------------------------------------------------------------- the shifts


def _steering_shift(site: SteeringSite, h: Tensor) -> Tensor:
    """δ = s (W2 φ(W1 h + b1) + b2), (N, d), of h (N, d) in h's dtype: not rounded into a hidden state."""
    adapter = site.adapter(site.active or "")
    assert adapter is not None
    w1, b1, w2, b2 = (
        None if t is None else t.to(h.dtype)
        for t in (adapter.down.weight, adapter.down.bias, adapter.up.weight, adapter.up.bias)
    )
    if w1 is None or w2 is None:
        assert b2 is not None
        return (site.scale * b2).expand_as(h)
    return site.scale * F.linear(ACTIVATIONS[site.activation][0](F.linear(h, w1, b1)), w2, b2)


def _active_lora(module: nn.Module) -> list[str]:
    """The LoRA adapters that a module computes with."""
    if not is_lora(module) or module.disable_adapters:
        return []
    return [name for name in module.active_adapters if name in module.lora_B]


def _lora_shift(module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    """ℓ, what the LoRA at `module` adds to its output for the input x: (..., d).

    Σ s·B·A·x in float32; of variants such as DoRA and AdaLoRA the difference of the outputs with and without.
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
    """‖W2'‖₂ of W2 as it steers: an adapter that is kept orthogonal to LoRA holds (I − V Vᵀ) W2."""
    adapter = site.adapter(site.active or "")
    assert adapter is not None
    up = adapter.up.weight
    if up is None:
        raise _Absent("a vector has no W2")
    if not up.isfinite().all():
        raise _Absent("W2 is not finite")
    return float(torch.linalg.matrix_norm(torch.linalg.qr(_exact(up), mode="r").R, 2))


def _alignment(site: SteeringSite, adapted: list[Writer], mlp: list[Writer]) -> Alignment:
    """|u_iᵀ u'_j| and principal cosines of LoRA's s·B·A, of all that the MLP writes by side by side, and of W2 W1."""
    if not adapted:
        raise _Absent(f"no active LoRA on {' or '.join(writer.path for writer in mlp[:2])}")
    adapter = site.adapter(site.active or "")
    assert adapter is not None
    if adapter.up.weight is None or adapter.down.weight is None:
        raise _Absent("a vector has no W2 W1")
    columns, small = [], []
    for module in (writer.module for writer in adapted):
        if hasattr(module, "parameter_name"):
            raise _Absent("its LoRA is on the parameters of experts")
        b, a = zip(*(_lora_factors(module, name) for name in _active_lora(module)), strict=True)
        columns += b
        # Σ s·B·A of one module is [B B ..] [A; A; ..]; of that, R alone of (A)ᵀ = Q R has a say in what lies left.
        small.append(torch.linalg.qr(_exact(torch.cat(a)).t(), mode="r").R)
    lora = _left_singular_vectors("LoRA's update", torch.cat(columns, 1), torch.block_diag(*small).t())
    down = torch.linalg.qr(_exact(adapter.down.weight).t(), mode="r").R.t()
    steering = _left_singular_vectors("W2 W1", adapter.up.weight, down)
    overlap = lora.t() @ steering
    cosines = torch.linalg.svdvals(overlap).clamp(max=1)
    return Alignment(
        tuple(map(tuple, overlap[:LEADING, :LEADING].abs().clamp(max=1).tolist())), tuple(cosines.tolist())
    )


def _lora_factors(module: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """B (d, r) and s·A (r, k). DoRA's magnitudes are left out, as in `Writer.columns`."""
    a, b = module.lora_A[name], module.lora_B[name]
    if isinstance(a, Tensor):  # AdaLoRA, whose singular values stand apart
        return b, module.scaling[name] * a * module.lora_E[name]
    return b.weight, module.scaling[name] * a.weight


def _left_singular_vectors(what: str, left: Tensor, right: Tensor) -> Tensor:
    """Those of left · right, (d, rank), leading first, without forming the product: of left = Q R, Q times R right's.

    left: (d, r). right: (r, m), m at most r or so. Singular values below the largest times the eps of left's dtype are
    taken for the rounding of a zero.
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
    """In float64 on the CPU, which every machine has."""
    return tensor.detach().cpu().double()


# ------------------------------------------------------------------------------------------------------------- figures


def check_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the figures need matplotlib; `pip install 'fused-steer[demo]'`")


def _figure(size: tuple[float, float]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _layer_axes(layers: Sequence[LayerDiagnosis], **labels: str) -> tuple[Any, Axes]:
    """A figure whose x axis is the layers."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure((min(4.5 + 0.12 * len(layers), 12), 4))
    axes = figure.add_subplot(xlabel="layer", **labels)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(layers[0].layer - 0.6, layers[-1].layer + 0.6)
    axes.grid(axis="y", alpha=0.3)
    return figure, axes


def _draw_spreads(axes: Axes, layers: Sequence[LayerDiagnosis], spreads: Sequence[Spread]) -> None:
    """A bar from the 5 % to the 95 % quantile, a wider one from 25 % to 75 %, the median and the mean."""
    at = [layer.layer for layer in layers]
    q = {level: [spread.quantiles[str(level)] for spread in spreads] for level in LEVELS}
    inner = np.subtract(q[0.75], q[0.25])
    axes.vlines(at, q[0.05], q[0.95], color="tab:blue", alpha=0.5, linewidth=1.5, label="5 – 95 % of tokens")
    axes.bar(at, inner, bottom=q[0.25], width=0.5, color="tab:blue", alpha=0.4, label="25 – 75 %")
    axes.plot(at, q[0.5], color="tab:blue", marker="o", markersize=4, linewidth=1, label="median")
    axes.plot(at, [spread.mean for spread in spreads], color="tab:orange", marker="x", linestyle="none", label="mean")
    axes.set_ylim(bottom=0)
    axes.figure.legend(loc="outside lower center", ncols=4, fontsize="small", frameon=False)


def _plot_mlp_share(layers: Sequence[LayerDiagnosis], file: Path) -> None:
    figure, axes = _layer_axes(
        layers, ylabel="‖y‖ / ‖h‖", title="The MLP's output y as a share of the block's output h"
    )
    _draw_spreads(axes, layers, [layer.mlp_share for layer in layers if layer.mlp_share])
    figure.savefig(file, dpi=150)


def _plot_shift(layers: Sequence[LayerDiagnosis], file: Path) -> None:
    figure, axes = _layer_axes(
        layers, ylabel="‖δ‖ / ‖h‖", title="Size of the steering's shift δ against the block's output h"
    )
    _draw_spreads(axes, layers, [layer.shift for layer in layers if layer.shift])
    figure.savefig(file, dpi=150)


def _plot_spectral_norm(layers: Sequence[LayerDiagnosis], file: Path) -> None:
    figure, axes = _layer_axes(layers, ylabel="‖W2'‖₂", title="Spectral norm of the steering's up projection")
    axes.plot([layer.layer for layer in layers], [layer.spectral_norm for layer in layers], marker="o", markersize=4)
    axes.set_ylim(bottom=0)
    figure.savefig(file, dpi=150)


def _plot_cosine(layers: Sequence[LayerDiagnosis], file: Path) -> None:
    """Each layer's histogram as a column of colours, with its median."""
    from matplotlib.colors import PowerNorm

    figure, axes = _layer_axes(layers, ylabel="cosine of δ and ℓ", title="Steering's shift δ against the LoRA's ℓ")
    axes.grid(visible=False)
    cosines = [layer.cosine for layer in layers if layer.cosine]
    first, last = layers[0].layer, layers[-1].layer
    shares = np.full((BINS, last - first + 1), np.nan)  # a layer without is a gap
    for layer, cosine in zip(layers, cosines, strict=True):
        shares[:, layer.layer - first] = np.array(cosine.counts) / cosine.tokens
    edges = np.linspace(-1, 1, BINS + 1)
    image = axes.pcolormesh(
        np.arange(first - 0.5, last + 1), edges, shares, cmap="Blues", norm=PowerNorm(0.5, 0, max(np.nanmax(shares), 0))
    )
    figure.colorbar(image, label=f"share of tokens (bins of {2 / BINS:.2f})")
    axes.plot(
        [layer.layer for layer in layers],
        [cosine.quantiles["0.5"] for cosine in cosines],
        color="tab:orange",
        marker="o",
        markersize=4,
        linewidth=1,
        label="median",
    )
    axes.axhline(0, color="black", linewidth=0.5)
    filled = np.flatnonzero(np.nansum(shares, axis=1))
    reach = min(1.0, 1.2 * max(abs(edges[filled[0]]), abs(edges[filled[-1] + 1]), 0.1))
    axes.set_ylim(-reach, reach)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=150)


def _plot_alignment(layers: Sequence[LayerDiagnosis], file: Path) -> None:
    """A small square of |u_iᵀ u'_j| for each layer, headed by its largest principal cosine."""
    columns = min(len(layers), max(3, math.ceil(math.sqrt(1.5 * len(layers)))))
    rows = math.ceil(len(layers) / columns)
    figure = _figure((max(1.5 * columns + 1.2, 5), 1.75 * rows + 1.2))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    image = None
    for axes, layer in zip(grid.flat, layers, strict=False):
        assert layer.alignment is not None
        values = np.array(layer.alignment.singular)
        extent = (0.5, values.shape[1] + 0.5, values.shape[0] + 0.5, 0.5)
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", extent=extent)
        axes.set_title(f"layer {layer.layer}\nmax {layer.alignment.principal[0]:.2g}", fontsize="small")
        for axis, count in zip((axes.xaxis, axes.yaxis), reversed(values.shape), strict=True):
            axis.set_ticks(sorted({1, count}))
    for axes in list(grid.flat)[len(layers) :]:
        axes.axis("off")
    figure.colorbar(image, ax=grid, label="|cosine| of singular vectors", shrink=0.9)
    figure.suptitle("Left singular vectors of LoRA's update and of W2 W1\n(max: largest principal cosine)", fontsize=11)
    figure.supxlabel("steering's singular vector", fontsize="medium")
    figure.supylabel("LoRA's singular vector", fontsize="medium")
    figure.savefig(file, dpi=150)


_FIGURES: dict[str, Callable[[Sequence[LayerDiagnosis], Path], None]] = {
    "mlp_share": _plot_mlp_share,
    "alignment": _plot_alignment,
    "cosine": _plot_cosine,
    "spectral_norm": _plot_spectral_norm,
    "shift": _plot_shift,
}


# --------------------------------------------------------------------------------------------------------- the command


@dataclass(frozen=True)
class DiagnoseOptions:
    """What `run` does. The command's options document each and hold the defaults.

    Raises:
        ValueError: a value out of range, options that do not go together, or `out` is a file.
    """

    model: str | None
    adapter: str | None
    lora: str | None
    joint: Path | None
    prompts: Path
    field: str
    out: Path
    max_prompts: int | None
    max_length: int
    batch_size: int
    device: str

    def __post_init__(self) -> None:
        if (self.adapter is None) == (self.joint is None):
            given = "both are" if self.adapter else "neither is"
            raise ValueError(f"adapter or joint has to be given, and {given}; expected one of them")
        if self.joint is not None and self.lora is not None:
            raise ValueError("joint and lora are given; expected one of them, as joint holds a LoRA")
        for name in ("max_prompts", "max_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name.replace('_', ' ')} is {value}; expected at least 1")
        for path in (self.out, *self.out.parents):
            if path.exists() and not path.is_dir():
                raise ValueError(f"out is {str(self.out)!r} but {path} is a file; expected a directory")


def read_prompts(file: Path, field: str) -> list[str]:
    """The prompts of a .txt, one a line, or of a .jsonl, the field `field` of each line; empty lines are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another kind, a line is no JSON object with that field, or there is no prompt.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}; expected prompts, a .txt or .jsonl")
    if file.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"prompts are in {file}; expected a .txt, one a line, or a .jsonl")
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        if file.suffix == ".txt":
            found.append(line.rstrip("\r"))
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number} is no JSON ({error}); expected an object a line") from error
        if not isinstance(entry, dict) or field not in entry:
            held = f"the fields {', '.join(sorted(entry))}" if isinstance(entry, dict) else f"a {type(entry).__name__}"
            raise ValueError(f"{file}, line {number} has {held}; expected a field {field!r}")
        if not isinstance(entry[field], str):
            raise ValueError(f"{file}, line {number}: {field!r} is {entry[field]!r}; expected a string")
        found.append(entry[field])
    if not any(prompt.strip() for prompt in found):
        raise ValueError(f"{file} holds no prompt; expected at least one")
    return found


def encode(tokenizer: Any, prompts: Sequence[str], max_length: int, batch_size: int) -> list[dict[str, Tensor]]:
    """Batches of token ids and masks, cut to `max_length`. Padded on the right, where no token attends to it."""
    rows = [tokenizer(prompt)["input_ids"][:max_length] for prompt in prompts]
    batches = []
    for some in (rows[i : i + batch_size] for i in range(0, len(rows), batch_size)):
        longest = max(map(len, some))
        ids = [row + [0] * (longest - len(row)) for row in some]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in some]
        if longest:
            batches.append({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})
    return batches


def _load(options: DiagnoseOptions, device: torch.device) -> tuple[Any, Any]:
    """The adapted model and its tokenizer. What can be refused before the model is loaded is."""
    from .demo import load_model

    if options.joint is not None:
        if not options.joint.is_dir():
            raise FileNotFoundError(f"no directory {options.joint}; expected one that save_joint wrote")
        for part in (STEERING_FOLDER, LORA_FOLDER):
            if not (options.joint / part).is_dir():
                raise FileNotFoundError(f"{options.joint} has no {part}/; expected a directory that save_joint wrote")
    read_adapter(options.adapter or options.joint / STEERING_FOLDER)
    if options.lora is not None:
        from peft import PeftConfig, PeftModel

        PeftConfig.from_pretrained(options.lora)
    model, tokenizer = load_model(options.model, device)
    if options.joint is not None:
        return load_joint(model, options.joint), tokenizer
    if options.lora is not None:
        model = PeftModel.from_pretrained(model, options.lora)
    return patch_model(model, options.adapter), tokenizer


def _table(diagnosis: Diagnosis) -> Table:
    from rich.table import Table

    heads = ("layer", "kind", "MLP share", "‖δ‖/‖h‖", "‖W2'‖₂", "cosine of shifts", "principal cosine")
    table = Table(*heads)
    for column in table.columns:
        column.justify = "right"
    for layer in diagnosis.layers:
        numbers = (
            layer.mlp_share and layer.mlp_share.quantiles["0.5"],
            layer.shift and layer.shift.quantiles["0.5"],
            layer.spectral_norm,
            layer.cosine and layer.cosine.quantiles["0.5"],
            layer.alignment and layer.alignment.principal[0],
        )
        table.add_row(str(layer.layer), layer.kind, *("-" if n is None else f"{n:.3g}" for n in numbers))
    table.caption = "over tokens: medians; of principal cosines the largest"
    return table


def run(options: DiagnoseOptions, console: Console) -> None:
    """Load, measure, save to `options.out`, and print a row for each layer.

    Raises:
        ValueError, FileNotFoundError: an input is missing or does not fit; nothing has been written then.
        ImportError: a library of the extra `demo` is missing.
    """
    from .demo import SMOLLM2, choose_device

    check_matplotlib()
    device = choose_device(options.device)
    prompts = read_prompts(options.prompts, options.field)[: options.max_prompts]
    model, tokenizer = _load(options, device)
    diagnosis = diagnose(model, encode(tokenizer, prompts, options.max_length, options.batch_size))
    files = diagnosis.save(options.out)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(f"model     {options.model or SMOLLM2}, {model.dtype} on {device}")
    say(f"LoRA      {', '.join(diagnosis.lora) or 'none'}")
    say(f"prompts   {len(prompts)} of {options.prompts}, {diagnosis.tokens} tokens")
    console.print(_table(diagnosis))
    reasons: dict[str, list[str]] = {}
    for layer in diagnosis.layers:
        for name, reason in layer.absent.items():
            reasons.setdefault(f"{name}: {reason}", []).append(str(layer.layer))
    for reason, where in reasons.items():
        say(f"absent    {reason} (layers {', '.join(where)})")
    for file in files:
        say(f"wrote     {file}")
