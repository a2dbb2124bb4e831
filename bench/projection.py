"""Benchmark of the orthogonal projection of joint training: all layers at once, against loops of SVDs over the layers.

The projection runs once per optimizer step. A contender gets B and W2 of each layer as separate tensors and writes
W2' = (I − V Vᵀ) W2 into W2's memory. The fused contender also finds the V that projects the next step's gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from . import timing
from .geometries import DTYPES, ProjectionCase
from .results import Row
from .timing import Timed


@dataclass
class Matrices:
    """The inputs of the projection: B (d, k) and W2 (d, r, float32) of each layer."""

    writers: list[Tensor]
    ups: list[Tensor]


def make_matrices(case: ProjectionCase, device: torch.device, seed: int = 0) -> Matrices:
    generator = torch.Generator().manual_seed(seed)

    def normal(columns: int) -> Tensor:
        return torch.randn(case.hidden, columns, generator=generator)

    writers = [normal(case.writers).to(device, DTYPES[case.dtype]) for _ in range(case.layers)]
    return Matrices(writers, [normal(case.rank).to(device) for _ in range(case.layers)])


class _Writer:
    """Stands in for a module with LoRA; its LoRA has this B."""

    of_mlp, mixed = True, False

    def __init__(self, b: Tensor) -> None:
        self.b = b

    def columns(self) -> list[Tensor]:
        return [self.b]


def fused(matrices: Matrices) -> Callable[[], None]:
    """Return the projection that the runtime does after an optimizer step."""
    from fused_steer import SteerConfig
    from fused_steer.adapters.factors import Adapter
    from fused_steer.adapters.parameters import Place
    from fused_steer.lora.orthogonality import Orthogonality, lora_columns
    from fused_steer.model.site import SteeringSite

    hidden, rank = matrices.ups[0].shape
    sites = {}
    for index, up in enumerate(matrices.ups):
        down = up.new_zeros(rank, hidden)
        site = sites[Place(index)] = SteeringSite()
        site.attach("a", Adapter.of_tensors({"steer_down.weight": down, "steer_up.weight": up}))
        site.use("a", "silu", 1.0)
    writers = {index: [_Writer(b)] for index, b in enumerate(matrices.writers)}
    config = SteerConfig(rank=rank, orthogonal_to="lora")
    keeper = Orthogonality("a", config, sites, lambda: True, lambda _: writers)  # type: ignore[arg-type, return-value]
    return lambda: keeper._project(lora_columns(keeper.writers, config), everything=True)


def svd_loop(matrices: Matrices) -> Callable[[], None]:
    """Return the most economical loop: a thin SVD per layer, without forming V Vᵀ."""

    @torch.no_grad()
    def project() -> None:
        for b, up in zip(matrices.writers, matrices.ups, strict=True):
            v = torch.linalg.svd(b.float(), full_matrices=False)[0]
            up.sub_(v @ (v.T @ up))

    return project


def svd_loop_square(matrices: Matrices) -> Callable[[], None]:
    """Return a loop that forms I − V Vᵀ as a d × d matrix, as the paper's released code does."""

    @torch.no_grad()
    def project() -> None:
        for b, up in zip(matrices.writers, matrices.ups, strict=True):
            v = torch.linalg.svd(b.float(), full_matrices=False)[0]
            up.copy_((torch.eye(v.shape[0], device=v.device) - v @ v.T) @ up)

    return project


def svd_loop_default(matrices: Matrices) -> Callable[[], None]:
    """Return a loop over `torch.linalg.svd` with its defaults, which compute all d left singular vectors."""

    @torch.no_grad()
    def project() -> None:
        for b, up in zip(matrices.writers, matrices.ups, strict=True):
            v = torch.linalg.svd(b.float())[0][:, : b.shape[1]]
            up.sub_(v @ (v.T @ up))

    return project


PROJECTION_CONTENDERS: dict[str, Callable[[Matrices], Callable[[], None]]] = {
    "fused": fused,
    "svd-loop": svd_loop,
    "svd-loop-square": svd_loop_square,
    "svd-loop-default": svd_loop_default,
}


def check(case: ProjectionCase, name: str, device: torch.device) -> str:
    """Return what is wrong with a contender, or "". It must remove exactly the part of W2 in the span of B."""
    matrices = make_matrices(case, device)
    before = [up.double() for up in matrices.ups]
    PROJECTION_CONTENDERS[name](matrices)()
    for b, old, new in zip(matrices.writers, before, matrices.ups, strict=True):
        b, new = b.double(), new.double()
        expected = old - b @ torch.linalg.lstsq(b, old).solution
        error = float((new - expected).norm() / expected.norm())
        if not error <= 1e-5:
            return f"wrong: it differs from (I − V Vᵀ) W2 by {error:.2e}; expected at most 1e-5"
    return ""


def measure_projection(case: ProjectionCase, device: torch.device, names: Sequence[str], rounds: int = 20) -> list[Row]:
    """Time one projection of all layers for each contender, interleaved.

    The calls run eagerly, as in an optimizer step: host time counts, and a CUDA graph cannot capture an SVD. Each
    contender gets as many rounds as fit into ten seconds, at least two and at most `rounds`.
    """
    rows = {name: Row("projection", "step", name, asdict(case)) for name in names}
    ready = []
    for name in names:
        try:
            rows[name].status = check(case, name, device) or "ok"
            if rows[name].status == "ok":
                timed = Timed(name, [PROJECTION_CONTENDERS[name](make_matrices(case, device))])
                timed.prepare(device, graph=False)
                timed.sample(device)
                ready.append(timed)
        except Exception as error:  # a rival may fail in any way, and the run goes on
            rows[name].status = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    shares = {timed.name: max(2, min(rounds, int(10 / timed.samples[0]))) for timed in ready}
    for timed in ready:
        timed.samples.clear()
    for number in range(rounds):
        timing.interleave([timed for timed in ready if number < shares[timed.name]], device, 1, first=number)
    for timed in ready:
        rows[timed.name].samples = timed.samples
    return list(rows.values())
