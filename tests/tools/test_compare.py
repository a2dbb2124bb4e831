"""Tests of `fused-steer compare`, against whole d x d matrices."""

from __future__ import annotations

import json
import math

import pytest
import torch
from command import assert_refused, invoke, plain_output  # noqa: F401 - an autouse fixture
from models import HIDDEN, LAYERS, build, randomize
from torch import Tensor

from fused_steer import SteerConfig, patch_model
from fused_steer.adapters.files import read_adapter
from fused_steer.adapters.parameters import Place, steered
from fused_steer.tools.compare import compare


@pytest.fixture
def saved(tmp_path):
    """Save a random adapter under a name; return its directory."""

    def save(name, seed=1, model=None, **fields):
        model = patch_model(model or build(), SteerConfig(**fields))
        randomize(model, seed=seed)
        model.steering.save(tmp_path / name)
        return str(tmp_path / name)

    return save


def whole(directory: str, layer: int) -> tuple[Tensor, Tensor]:
    """Return s W2 W1 (d, d) and s b2 (d,) in float64."""
    file = read_adapter(directory)
    t = {k: v.double() for k, v in steered(file.config.form, file.tensors[Place(layer)]).items()}
    bias = t.get("steer_up.bias", torch.zeros(HIDDEN))
    return file.config.scale * t["steer_up.weight"] @ t["steer_down.weight"], file.config.scale * bias


def angle(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def test_compare_norms_and_angles_are_those_of_the_whole_matrices(saved):
    a = saved("a", rank=3, down_bias=True, up_bias=True, scale=-0.5)
    b = saved("b", 2, form="loreft", rank=5, layers=[1, 2])
    c = saved("c", 3, rank=2, up_bias=True, scale=2.0)
    for first, second in ((a, b), (b, a), (a, c)):
        found = compare(first, second)
        assert [place.layer for place in found.places] == list(range(LAYERS)) and not found.same
        for place in found.places[1:]:
            (m, p), (n, q) = whole(first, place.layer), whole(second, place.layer)
            assert place.norms == pytest.approx((float(m.norm()), float(n.norm())))
            assert place.cosine == pytest.approx(angle(m, n))
            u, v = torch.linalg.svd(m)[0], torch.linalg.svd(n)[0]
            ranks = [int(torch.linalg.matrix_rank(x)) for x in (m, n)]
            written = torch.linalg.svdvals(u[:, : ranks[0]].t() @ v[:, : ranks[1]])[0]
            assert place.written == pytest.approx(float(written))
            x, y = torch.linalg.svd(m)[2], torch.linalg.svd(n)[2]
            assert place.read == pytest.approx(float(torch.linalg.svdvals(x[: ranks[0]] @ y[: ranks[1]].t())[0]))
            if second == c:
                assert place.bias_norms == pytest.approx((float(p.norm()), float(q.norm())))
                assert place.bias_cosine == pytest.approx(angle(p, q))
            else:
                assert None in place.bias_norms and place.bias_cosine is None
    assert compare(a, b).places[0].norms[1] is None and compare(a, b).places[0].cosine is None


def test_compare_the_same_and_the_opposite(saved):
    a, again = saved("a", rank=3, up_bias=True), saved("again", rank=3, up_bias=True)
    found = compare(a, again)
    assert found.same and not found.differences
    for place in found.places:
        for value in (place.cosine, place.written, place.read, place.bias_cosine):
            assert math.isclose(value, 1)
    opposite = compare(a, saved("b", rank=3, up_bias=True, scale=-2.0))
    assert opposite.differences == {"scale": (1.0, -2.0)} and not opposite.same
    assert all(math.isclose(place.cosine, -1) and math.isclose(place.written, 1) for place in opposite.places)
    other = compare(a, saved("c", 2, rank=3, up_bias=True))
    assert not other.same and not other.differences


def test_compare_tells_bits_apart(tmp_path):
    """A zero from a negative one, and a dtype from a wider one that holds the same values."""
    for name, change in (("a", lambda up: up), ("b", torch.neg), ("c", Tensor.bfloat16)):
        model = patch_model(build(), SteerConfig(rank=1, init_scale=0))
        for parameter in model.steering.parameters():
            parameter.data = change(parameter.data)
        model.steering.save(tmp_path / name)
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert compare(a, a).same and not compare(a, b).same and not compare(a, c).same


def test_compare_a_fresh_adapter_has_no_angle(saved, tmp_path):
    patch_model(build(), SteerConfig(rank=3)).steering.save(tmp_path / "fresh")
    [first, *_] = compare(str(tmp_path / "fresh"), saved("a", rank=3)).places
    assert first.norms[0] == 0 and first.cosine is None and first.written is None


def test_compare_command(saved):
    a = saved("a", form="vector", layers=[0, 2])
    b = saved("b", 2, rank=2, up_bias=True, layers=[2], scale=0.5)
    result = invoke("compare", a, b)
    assert result.exit_code == 0, result.output
    found = compare(a, b)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    assert ["scale", "1.0", "0.5"] in rows and ["layers", "[0, 2]", "[2]"] in rows
    last = found.places[1]
    assert rows[-1] == [
        "2", "-", f"{last.norms[1]:.4g}", "-", "-", "-",
        *(f"{value:.4g}" for value in (*last.bias_norms, last.bias_cosine)),
    ]  # fmt: skip
    assert json.loads(invoke("compare", a, b, "--json").stdout) == json.loads(json.dumps(found.as_dict()))
    assert "the same adapter, bit for bit" in invoke("compare", a, a).stdout
    assert "the same settings" in invoke("compare", a, saved("d", 3, form="vector", layers=[0, 2])).stdout


def test_compare_sites(saved):
    a = saved("a", form="vector", site=["pre_mlp", "post_mlp"])
    assert len(compare(a, a).places) == 2 * LAYERS and "pre_mlp" in invoke("compare", a, a).stdout


def test_compare_refusals(saved, tmp_path):
    a = saved("a", rank=2)
    wide = saved("wide", model=build(hidden_size=64), rank=2)
    assert_refused(invoke("compare", a, wide), wide, f"hidden size 64; expected {HIDDEN}")
    assert_refused(invoke("compare", a, tmp_path / "none"), tmp_path / "none", "expected")


def test_compare_norms_of_ranks_that_cancel_each_other(tmp_path):
    model = patch_model(build(), SteerConfig(rank=4, activation="identity"))
    randomize(model)
    for copied in ("b", "c"):
        model.steering.combine({"default": 1.0}, copied)
    for name, weights in (("none", (1.0, -1.0, 0.0)), ("rounded", (0.3, -0.1, -0.2))):
        model.steering.combine(dict(zip(("default", "b", "c"), weights, strict=True)), name)
        model.steering.save(tmp_path / name, name)
    model.steering.save(tmp_path / "whole", "default")
    none, rounded, other = (str(tmp_path / name) for name in ("none", "rounded", "whole"))
    for place in compare(none, other).places:
        assert place.norms[0] == 0 and place.cosine is None
    for place in compare(rounded, other).places:
        m, n = whole(rounded, place.layer)[0], whole(other, place.layer)[0]
        assert 0 < m.norm() < 1e-6 * n.norm()  # what float32 leaves of 0.3 - 0.1 - 0.2
        assert place.norms[0] == pytest.approx(float(m.norm()), rel=1e-6)
        assert place.cosine == pytest.approx(angle(m, n), rel=1e-6)
