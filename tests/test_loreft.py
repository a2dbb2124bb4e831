"""LoReFT: its formula in float64, what AdamW leaves of its rotation, and every way in which an adapter is used."""

from __future__ import annotations

import copy
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command import assert_refused, invoke, plain_output  # noqa: F401 - an autouse fixture
from foreign import LLAMA
from models import (
    HIDDEN,
    LAYERS,
    Hooked,
    assert_as_exact_as_hooks,
    assert_close,
    assert_no_worse,
    build,
    difference,
    generate,
    gradients,
    logits,
    randomize,
    refused,
    steering_parameters,
    tokens,
)
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.utils._python_dispatch import TorchDispatchMode

from fused_steer import SteerConfig, patch_model
from fused_steer.adapters import parameters
from fused_steer.adapters.files import read_adapter, write_adapter
from fused_steer.diagnostics import diagnose
from fused_steer.importers.pyreft import import_pyreft
from fused_steer.importers.pyreft_export import export_pyreft
from fused_steer.model.passes import Passes

CONFIG = SteerConfig(form="loreft", rank=4)


class Formula(Hooked):
    """h + s · Rᵀ(W h + b − R h), R by torch's QR, all by autograd."""

    def _shift(self, path: str, hidden: Tensor) -> Tensor:
        w, b, p = (self.leaves[f"{path}.{name}"] for name in ("steer_down.weight", "steer_down.bias", UP))
        q, u = torch.linalg.qr(p)
        r_t = (q * u.diagonal().sign()).to(hidden.dtype)
        return (F.linear(hidden, w.to(hidden.dtype), b.to(hidden.dtype)) - hidden @ r_t) @ r_t.t()

    def double(self) -> Formula:
        leaves = {name: leaf.double() for name, leaf in self.leaves.items()}
        return Formula(self.base.double(), leaves, scale=self.scale)


UP = "steer_up.weight"


def steered(config: SteerConfig = CONFIG, family: str = "llama", **overrides: Any) -> nn.Module:
    model = patch_model(build(family, **overrides), config)
    randomize(model)
    assert difference(logits(model), logits(build(family, **overrides)))[""] > 0.01
    return model


def rotations(model: nn.Module) -> list[Tensor]:
    """R of each layer, as it steers."""
    sites = [module for module in model.modules() if hasattr(module, "steer_up")]
    return [site.adapter("default").steered()[UP].t() for site in sites]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox-parallel"])
def test_loreft_as_exact_as_its_formula(family):
    model = steered(SteerConfig(form="loreft", rank=4, scale=0.7), family)
    parameters = steering_parameters(model)
    assert {report.kind for report in model.steering.report()} == {"fused"}
    assert_as_exact_as_hooks(model, parameters, Formula(build(family), parameters, scale=0.7))


def test_loreft_fresh_changes_nothing_and_trains():
    model = patch_model(build(), CONFIG)
    assert torch.equal(logits(model), logits(build()))
    assert all(drawn.any() for drawn in gradients(model, steering_parameters(model)).values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loreft_adamw_with_weight_decay_keeps_it_orthonormal(dtype):
    model = patch_model(build(), SteerConfig(form="loreft", rank=4, dtype=dtype))
    optimizer = torch.optim.AdamW(model.steering.parameters(), lr=1e-2, weight_decay=0.01)
    first, start = rotations(model), {n: p.detach().clone() for n, p in steering_parameters(model).items()}
    losses = []
    for _ in range(100):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for before, after in zip(first, rotations(model), strict=True):
        assert after.dtype == torch.float32
        assert_close(after.double() @ after.double().t(), torch.eye(4, dtype=torch.float64))
        assert difference(after, before)[""] > 0.1
    assert all(difference(p, start[name])[""] > 0.1 for name, p in steering_parameters(model).items() if UP in name)


def test_loreft_decay_alone_leaves_the_function():
    """pyreft's parametrisation, decayed to nothing, gives R = 0."""
    model = steered()
    before = logits(model)
    with torch.no_grad():
        for name, parameter in steering_parameters(model).items():
            if UP in name:
                parameter *= 1e-5
    assert_close(logits(model), before)


def test_loreft_saved_and_loaded_to_the_bit(tmp_path):
    model = steered()
    model.steering.save(tmp_path / "a")
    loaded = patch_model(build(), tmp_path / "a")
    assert loaded.steering.config() == CONFIG
    assert torch.equal(logits(loaded), logits(model))
    loaded.steering.save(tmp_path / "b")
    assert (tmp_path / "a/adapter_model.safetensors").read_bytes() == (
        tmp_path / "b/adapter_model.safetensors"
    ).read_bytes()
    other = patch_model(build(), CONFIG)
    other.steering.restore(tmp_path / "a")
    assert torch.equal(logits(other), logits(model))
    other = patch_model(build(), CONFIG)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


def test_loreft_files_with_dependent_columns_are_refused(tmp_path):
    model = steered()
    with torch.no_grad():
        steering_parameters(model)[f"model.layers.1.post_block.{UP}"][:, 2] = 0
    with refused(ValueError, f"layers.1.post_block.{UP} has columns that depend on each other", "expected independent"):
        model.steering.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"activation": "silu"}, ("activation is 'silu' with form='loreft'", "'identity'")),
        ({"down_bias": False}, ("down_bias is False", "True")),
        ({"up_bias": True}, ("up_bias is True", "False")),
        ({"init_scale": 0.1}, ("init_scale is 0.1", "expected 1")),
        ({"orthogonal_to": "lora"}, ("orthogonal_to", "loreft", "expected None")),
        ({"rank": 0}, ("rank is 0", "1 to 256")),
    ],
    ids=str,
)
def test_loreft_config_refusals(fields, parts):
    with refused(ValueError, *parts):
        SteerConfig(form="loreft", **fields)


def test_loreft_rank_beyond_the_hidden_size_is_refused():
    model = build()
    with refused(ValueError, f"rank is {HIDDEN + 1}", f"at most {HIDDEN}", model=model):
        patch_model(model, SteerConfig(form="loreft", rank=HIDDEN + 1))


def test_loreft_switched_scaled_and_off():
    model = steered()
    expected = logits(model)
    model.steering.add("other", SteerConfig(rank=2))
    model.steering.use("other")
    assert torch.equal(logits(model), logits(build()))
    model.steering.use("default")
    assert torch.equal(logits(model), expected)
    model.steering.scale = 0.0
    assert torch.equal(logits(model), logits(build()))
    model.steering.scale = 1.0
    with model.steering.disabled():
        assert torch.equal(logits(model), logits(build()))
    assert "LoReFT of rank 4" in repr(model.steering)
    model.steering.unpatch()
    assert torch.equal(logits(model), logits(build()))


def test_loreft_removed_after_a_training_pass_is_freed():
    model = steered().train()
    model(tokens(), labels=tokens()).loss.backward()
    parameters = [weakref.ref(parameter) for parameter in model.steering.parameters()]
    model.steering.add("other", SteerConfig(rank=2))
    model.steering.use("other")
    model(tokens(), labels=tokens()).loss.backward()  # no rotation replaces those of the last pass
    model.steering.remove("default")
    assert not any(parameter() is not None for parameter in parameters)


def test_loreft_in_batches_and_pools(tmp_path):
    model = steered()
    expected, base = logits(model), logits(build())
    model.steering.save(tmp_path / "a")

    def assert_rows(names: list[str | None]) -> None:
        with model.steering.batch(names):
            found = logits(model)
        assert_close(found, torch.stack([expected[0], base[1]]))

    assert_rows(["default", None])
    pool = model.steering.make_pool(slots=2, rank=4)
    pool.register("kept", tmp_path / "a")
    assert_rows(["kept", None])
    assert_rows(["default", None])


def test_loreft_rotations_are_made_once_a_pass_for_all_layers(monkeypatch):
    """With and without gradients. A parameter that is changed between passes shows in the next."""
    model, made = steered(), []
    rotate = parameters.rotate
    monkeypatch.setattr(parameters, "rotate", lambda *pair: made.append(1) or rotate(*pair))
    expected = logits(model)
    assert_close(model(tokens()).logits.detach(), expected)
    with torch.no_grad():
        for parameter in steering_parameters(model).values():
            parameter.data = parameter.data * 1.5 + 0.1
    changed = logits(model)
    assert_close(model(tokens()).logits.detach(), changed)
    assert difference(changed, expected)[""] > 0.01
    assert made == []


class Factorings(TorchDispatchMode):
    """Counts the operations that only the rotations need."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        if name in ("linalg_cholesky_ex", "linalg_solve_triangular", "tril"):
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reentrant", [None, False])
def test_loreft_a_training_step_factors_once_for_all_layers(reentrant):
    """Also under checkpointing, which runs every layer twice."""
    model = steered().train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with Factorings() as mode:
        model(tokens(), labels=tokens()).loss.backward()
    assert mode.counts == {"linalg_cholesky_ex": 1, "linalg_solve_triangular": 2, "tril": 2}


def test_loreft_gradients_are_those_of_each_layer_by_itself(monkeypatch):
    """The same model with every layer's rotation made in the layer: no pass makes them for all."""
    model = steered().train()
    found = gradients(model, steering_parameters(model))
    begin = Passes.begin
    monkeypatch.setattr(Passes, "begin", lambda self, weights: begin(self, {}))
    apart = gradients(model, steering_parameters(model))
    assert_close(found, apart)
    monkeypatch.undo()
    layers = model.model.layers
    outputs = layers[1].register_forward_hook(lambda module, args, output: args[0])  # as if layer 1 had not run
    for parameter in steering_parameters(model).values():
        parameter.grad = None
    model(tokens(), labels=tokens()).loss.backward()
    outputs.remove()
    for name, parameter in steering_parameters(model).items():
        assert (parameter.grad is None) == (".layers.1." in name), name


def test_loreft_two_passes_before_one_backward():
    """Each pass has its own rotations; with and without checkpointing."""
    model = steered().train()
    trained = steering_parameters(model)

    def found() -> dict[str, Tensor]:
        model.zero_grad()
        first, second = (model(tokens(seed), labels=tokens(seed)).loss for seed in (0, 1))
        (first + 2 * second).backward()
        return {name: parameter.grad.clone() for name, parameter in trained.items()}

    apart = []
    for seed in (0, 1):
        model.zero_grad()
        model(tokens(seed), labels=tokens(seed)).loss.backward()
        apart.append({name: parameter.grad.clone() for name, parameter in trained.items()})
    expected = {name: apart[0][name] + 2 * apart[1][name] for name in trained}
    assert_close(found(), expected)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_close(found(), expected)


def test_loreft_a_layer_called_outside_of_a_pass_has_its_gradient():
    """After a training pass, whose rotations the site has kept for checkpointing."""
    model = steered().train()
    model(tokens(), labels=tokens()).loss.backward()
    site = model.model.layers[0].post_block
    up = site.steer_up["default"].weight
    for _ in range(2):
        up.grad = None
        h = torch.randn(1, 3, HIDDEN, requires_grad=True)
        site(h).sum().backward()
        assert up.grad is not None and float(up.grad.norm()) > 0


def test_loreft_a_model_is_copied_after_a_training_pass():
    model = steered().train()
    model(tokens(), labels=tokens()).loss.backward()
    other = copy.deepcopy(model)
    assert_close(logits(other.eval()), logits(model.eval()))


def test_loreft_a_matrix_that_is_replaced_during_a_pass_is_read():
    model = steered()
    matrix = steering_parameters(model)[f"model.layers.1.post_block.{UP}"]
    other = torch.randn_like(matrix.data)
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: setattr(matrix, "data", other))
    found = logits(model)
    hook.remove()
    assert_close(found, logits(model))
    assert matrix.data_ptr() == other.data_ptr()


def test_loreft_generates_as_its_formula():
    model = steered()
    hooked = Formula(build(), steering_parameters(model))
    (found, scores), (expected, exact) = generate(model), generate(hooked.model)
    assert torch.equal(found, expected)
    assert_close(scores, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loreft_in_half_precision(dtype):
    model = steered().to(dtype)
    parameters = steering_parameters(model)
    hooked = Formula(build().to(dtype), parameters | {n: p.float() for n, p in parameters.items() if UP in n})
    truth = Formula(build().to(dtype).double(), {name: p.double() for name, p in parameters.items()})
    assert_no_worse(*(logits(network) for network in (model, hooked.model, truth.model)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_loreft_under_checkpointing(reentrant):
    model = steered()
    expected = gradients(model.train(), steering_parameters(model))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_close(gradients(model, steering_parameters(model)), expected)


def test_loreft_compiled_in_one_graph():
    model = steered()
    expected = logits(model)
    assert_close(logits(torch.compile(model, fullgraph=True, backend="aot_eager")), expected)


def test_loreft_functional_call():
    model = steered()
    values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def loss(of: dict[str, Tensor]) -> Tensor:
        return functional_call(model, of, (tokens(),), {"labels": tokens()}).loss

    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    expected = dict(zip(leaves, torch.autograd.grad(loss(leaves), list(leaves.values())), strict=True))
    assert_close(grad(loss)(values), expected)


def test_loreft_as_a_peft_method(tmp_path):
    import peft

    from fused_steer.peft import PostBlockConfig

    model = peft.get_peft_model(build(), PostBlockConfig(r=4, form="loreft"))
    assert torch.equal(logits(model), logits(build()))
    randomize(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "a")
    assert_close(logits(patch_model(build(), tmp_path / "a")), expected)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(build(), tmp_path / "a")), expected)
    model.base_model.add_weighted_adapter(["default"], [1.0], "sum")
    model.set_adapter("sum")
    assert_close(logits(model), expected)


def test_loreft_inspected_and_diagnosed(tmp_path):
    model = steered()
    model.steering.save(tmp_path / "a")
    shown = json.loads(invoke("inspect", tmp_path / "a", "--json").output)
    assert shown["config"]["form"] == "loreft"
    assert_close(torch.tensor([layer["up"] for layer in shown["layers"]]), torch.full((LAYERS,), 2.0))  # ‖Rᵀ‖ of rank 4
    found = diagnose(model, [{"input_ids": tokens()}])
    assert_close(torch.tensor([layer.spectral_norm for layer in found.layers]), torch.ones(LAYERS))


def test_loreft_exported_to_pyreft_and_back_to_the_bit(tmp_path):
    model = patch_model(build(), SteerConfig(form="loreft", rank=4, layers=[0, 2]))
    randomize(model)
    model.steering.save(tmp_path / "ours")
    assert invoke("export", "pyreft", tmp_path / "ours", "--out", tmp_path / "theirs").exit_code == 0
    theirs = torch.load(tmp_path / "theirs/intkey_layer_2_comp_block_output_unit_pos_nunit_1#0.bin")
    assert list(theirs) == ["weight", "bias", "rotate_layer"]
    assert torch.equal(theirs["rotate_layer"], rotations(model)[1].t())
    found = import_pyreft(tmp_path / "theirs", positions="all", activation="identity", **LLAMA)
    assert found.config == SteerConfig(form="loreft", rank=4, layers=[0, 2])
    for i, state in ((i, torch.load(path)) for i, path in enumerated(tmp_path / "theirs")):
        for name, key in (("steer_down.weight", "weight"), ("steer_down.bias", "bias"), (UP, "rotate_layer")):
            assert torch.equal(found.tensors[parameters.Place(i)][name], state[key])
    write_adapter(tmp_path / "back", found)
    assert torch.equal(logits(patch_model(build(), tmp_path / "back")), logits(model))


def enumerated(folder: Path) -> list[tuple[int, Path]]:
    return [(int(path.name.split("_")[2]), path) for path in sorted(folder.glob("intkey_*.bin"))]


def test_loreft_export_refusals_write_nothing(tmp_path):
    steered().steering.save(tmp_path / "loreft")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for source, out, parts in (
        ("loreft", "full", ("full", "expected a new one")),
        ("nowhere", "out", ("nowhere",)),
    ):
        assert_refused(invoke("export", "pyreft", tmp_path / source, "--out", tmp_path / out), *parts)
    assert not (tmp_path / "out").exists() and [p.name for p in (tmp_path / "full").iterdir()] == ["file"]


def test_loreft_pyrefts_that_lost_its_rotation_is_a_low_rank(tmp_path):
    """As weight decay leaves it there: what it computes is kept, and it is no LoReFT any more."""
    steered().steering.save(tmp_path / "ours")
    export_pyreft(tmp_path / "ours", tmp_path / "theirs")
    for _, path in enumerated(tmp_path / "theirs"):
        state = torch.load(path)
        state["rotate_layer"] *= 0.9
        torch.save(state, path)
    found = import_pyreft(tmp_path / "theirs", positions="all", activation="identity", **LLAMA)
    assert found.config.form == "lowrank"
    ours = read_adapter(tmp_path / "ours").tensors
    for i, named in found.tensors.items():
        r = named[UP].t()
        assert torch.equal(named["steer_down.weight"], (ours[i]["steer_down.weight"].double() - r.double()).float())
