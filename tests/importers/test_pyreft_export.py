"""Tests that adapters exported to pyreft compute the same there and, imported again, here; and of refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from command import assert_refused, invoke, plain_output  # noqa: F401 - an autouse fixture
from foreign import LLAMA, PHI, RANK, SCALE, Intervention, file_name, hooked
from models import HIDDEN, LAYERS, assert_close, build, difference, logits, randomize, tokens
from torch import Tensor, nn

from fused_steer import SteerConfig, patch_model
from fused_steer.adapters.files import read_adapter, write_adapter
from fused_steer.adapters.parameters import Place
from fused_steer.importers.pyreft import import_pyreft

DOWN, DOWN_BIAS, UP, UP_BIAS = ("steer_down.weight", "steer_down.bias", "steer_up.weight", "steer_up.bias")
needs_pyreft = pytest.mark.skipif(
    find_spec("pyreft") is None, reason="needs `pip install --no-deps pyreft==0.1.0 pyvene==0.1.8`"
)


def save(directory: Path, config: SteerConfig, kind: str = "") -> nn.Module:
    """Save an adapter of random values that bfloat16 holds; return the steered model.

    kind: "direft" makes W2 orthonormal, "consreft" also W1 = −W2ᵀ.
    """
    model = patch_model(build(), config)
    randomize(model)
    model.steering.save(directory)
    found = read_adapter(directory)
    for named in found.tensors.values():
        for name, tensor in named.items():
            named[name] = tensor.bfloat16().float()
        if kind:
            nn.init.orthogonal_(named[UP], generator=torch.Generator().manual_seed(3))
        if kind == "consreft":
            named[DOWN] = -named[UP].t().contiguous()
    write_adapter(directory, found)
    return patch_model(build(), directory)


#: name -> the config, what `save` makes of it, and pyreft's class and rank.
CASES: dict[str, tuple[SteerConfig, str, str, int]] = {
    "loreft": (SteerConfig("loreft", RANK), "", "Loreft", RANK),
    "loreft scaled": (SteerConfig("loreft", RANK, scale=SCALE), "", "Nodireft", RANK),
    "consreft": (SteerConfig(rank=RANK, activation="identity", down_bias=True), "consreft", "Consreft", RANK),
    "direft": (SteerConfig(rank=RANK, activation="identity"), "direft", "Direft", RANK),
    "direft silu": (SteerConfig(rank=RANK, down_bias=True), "direft", "Direft", RANK),
    "direft scaled": (SteerConfig(rank=RANK, scale=SCALE), "direft", "Nodireft", RANK),
    "consreft not linear": (SteerConfig(rank=RANK, activation="relu", down_bias=True), "consreft", "Direft", RANK),
    "some layers": (SteerConfig(rank=RANK, layers=[0, 2]), "", "Nodireft", RANK),
    "scaled": (SteerConfig(rank=RANK, down_bias=True, up_bias=True, scale=-SCALE), "", "Nodireft", RANK + 1),
    "as wide as the model": (SteerConfig("loreft", HIDDEN), "", "Loreft", HIDDEN),
    "wider": (SteerConfig(rank=HIDDEN, down_bias=True, up_bias=True), "", "Nodireft", HIDDEN + 1),
    "vector": (SteerConfig("vector"), "", "Lobireft", 1),
    "vector scaled": (SteerConfig("vector", scale=SCALE, layers=[1]), "", "Lobireft", 1),
    **{
        f"{phi} {'b1 ' * b1}{'b2' * b2}".strip(): (
            SteerConfig(rank=RANK, activation=phi, down_bias=b1, up_bias=b2),
            "",
            "Nodireft",
            RANK + b2,
        )
        for phi in PHI
        for b1, b2 in ((False, False), (True, False), (True, True))
    },
}


def exported(directory: Path, case: str) -> tuple[nn.Module, str]:
    """Export an adapter by the command; return the steered model, and the code that the command printed."""
    config, kind, name, rank = CASES[case]
    model = save(directory / "ours", config, kind)
    result = invoke("export", "pyreft", directory / "ours", "--out", directory / "theirs")
    assert result.exit_code == 0, result.output
    told, _, usage = result.stdout.partition("\n")
    assert told.startswith(f"{name}Intervention of rank {rank}, positions all, written to ")
    return model, usage


def imported(directory: Path, case: str) -> dict[Place, dict[str, Tensor]]:
    config, _, name, _ = CASES[case]
    phi = None if name in ("Consreft", "Lobireft") else config.activation
    found = import_pyreft(directory / "theirs", positions="all", activation=phi, **LLAMA)
    assert found.config.layers == config.layers and found.config.scale == 1
    write_adapter(directory / "back", found)
    return found.tensors


@pytest.mark.parametrize("case", CASES)
def test_pyreft_export_computes_the_same_there_and_imported_again(case, tmp_path):
    model, _ = exported(tmp_path, case)
    imported(tmp_path, case)
    expected = logits(model)
    assert difference(logits(build()), expected)[""] > 0.01  # the adapter has an effect
    assert_close(logits(patch_model(build(), tmp_path / "back")), expected)
    config, _, name, rank = CASES[case]
    if name == "Loreft":  # its state dict has no module's names; test_loreft.py compares its bits
        return
    shifts = {}
    for layer in config.layers or range(LAYERS):
        intervention = Intervention(name, config.activation, bias=False, rank=rank)
        intervention.load_state_dict(torch.load(tmp_path / "theirs" / file_name(layer), weights_only=True))
        if hasattr(intervention, "rotate_layer"):
            r_t = intervention.rotate_layer.columns
            assert_close(r_t.t() @ r_t, torch.eye(rank))
        shifts[layer] = intervention.shift
    assert_close(logits(hooked(shifts)), expected)


@pytest.mark.parametrize("case", ["consreft", "direft", "direft silu", "silu b1", "some layers"])
def test_pyreft_export_and_back_to_the_bit(case, tmp_path):
    exported(tmp_path, case)
    back, ours = imported(tmp_path, case), read_adapter(tmp_path / "ours").tensors
    assert back.keys() == ours.keys()
    for place, named in ours.items():
        for name in (DOWN, DOWN_BIAS, UP):
            expected = named.get(name, torch.zeros(RANK))
            assert torch.equal(back[place][name], expected), name


@pytest.mark.parametrize("phi", PHI)
def test_pyreft_export_keeps_a_b2_to_the_bit(phi, tmp_path):
    """The added rank computes φ(32), exactly 32 or 1, in both dtypes of pyreft; its column times that is b2."""
    exported(tmp_path, f"{phi} b1 b2")
    for place, named in imported(tmp_path, f"{phi} b1 b2").items():
        assert not named[DOWN][RANK].any()
        for dtype in (torch.float32, torch.bfloat16):
            value = PHI[phi](named[DOWN_BIAS][RANK].to(dtype)).float()
            b2 = read_adapter(tmp_path / "ours").tensors[place][UP_BIAS]
            assert torch.equal(named[UP][:, RANK] * value, b2)


def test_pyreft_export_rounds_a_vector_twice_at_most(tmp_path):
    exported(tmp_path, "vector")
    for place, named in imported(tmp_path, "vector").items():
        vector = read_adapter(tmp_path / "ours").tensors[place][UP_BIAS]
        assert ((named[UP_BIAS] - vector).abs() <= torch.finfo(torch.float32).eps * vector.abs()).all()


def test_pyreft_export_of_a_vector_of_zeros(tmp_path):
    patch_model(build(), SteerConfig("vector")).steering.save(tmp_path / "ours")
    assert invoke("export", "pyreft", tmp_path / "ours", "--out", tmp_path / "theirs").exit_code == 0
    for named in imported(tmp_path, "vector").values():
        assert torch.equal(named[UP_BIAS], torch.zeros(HIDDEN))


def test_pyreft_export_refusals_write_nothing(tmp_path):
    save(tmp_path / "mlp", SteerConfig(rank=2, site="post_mlp"))
    save(tmp_path / "two", SteerConfig(rank=2, site=["post_mlp", "post_block"]))
    save(tmp_path / "huge", SteerConfig("vector", layers=[1]))
    found = read_adapter(tmp_path / "huge")
    ones = replace(
        found, config=SteerConfig("vector", layers=[1], scale=3e38), tensors={Place(1): {UP_BIAS: torch.ones(HIDDEN)}}
    )
    write_adapter(tmp_path / "huge", ones)
    for source, parts in (
        ("mlp", ("steers at post_mlp", "expected post_block, pyreft's block_output")),
        ("two", ("steers at post_mlp, post_block", "expected post_block")),
        ("huge", ("the length of the vector of layer 1 overflows", "scale is 3e+38", "expected at most 3.4e+38")),
    ):
        assert_refused(invoke("export", "pyreft", tmp_path / source, "--out", tmp_path / "out"), *parts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["huge", "mlp", "two"]


@needs_pyreft
@pytest.mark.parametrize("case", CASES)
def test_pyreft_export_loads_in_pyreft_itself(case, tmp_path, monkeypatch):
    """The printed code loads the files into pyreft's own classes. The logits are those of the steered model."""
    model, usage = exported(tmp_path, case)
    import pyreft

    if "dtype=model.dtype" not in usage:  # ReftModel.load creates W and b1 in bfloat16, which holds these values
        for name in ("Direft", "Loreft"):
            kind = getattr(pyreft, f"{name}Intervention")
            monkeypatch.setattr(kind, "forward", in_float32(kind.forward))
    names = {"model": build()}
    exec(usage, names)
    ids = tokens()
    found = names["reft_model"](base={"input_ids": ids}, unit_locations=None)[1].logits
    assert_close(found.detach(), model(input_ids=ids).logits.detach())
    types = json.loads((tmp_path / "theirs" / "config.json").read_text())["intervention_types"]
    loaded = [str(type(intervention)) for intervention in names["reft_model"].interventions.values()]
    assert loaded == types


def in_float32(forward):
    """Compute an intervention in float32, so that only the loaded numbers matter."""

    def run(self, *arguments, **options):
        self.learned_source.float()
        return forward(self, *arguments, **options)

    return run
