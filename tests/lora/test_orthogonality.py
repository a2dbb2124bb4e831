"""Tests of Joint-Orth on a model: steering stays orthogonal to the LoRA's column space at every step."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import (
    HIDDEN,
    assert_close,
    assert_no_worse,
    build,
    gradients,
    input_gradient,
    logits,
    randomize,
    refused,
    skip_without_add_adapter,
    steering_parameters,
    tokens,
)
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import optimizer as torch_optimizer
from torch.optim.swa_utils import AveragedModel

from fused_steer import SteerConfig, patch_model
from fused_steer.lora.orthogonality import Orthogonality

MLP = ("mlp.down_proj", "mlp.dense_4h_to_h", "mlp.c_proj")
ATTENTION = ("self_attn.o_proj", "attention.dense", "attn.c_proj")
ORTHOGONAL = SteerConfig(rank=4, orthogonal_to="lora")


def with_lora(family: str = "llama", add: bool = False, **options: Any) -> nn.Module:
    """Build a model with LoRA on all linear modules, by get_peft_model or model.add_adapter."""
    model = build(family)
    config = LoraConfig(**{"r": 3, "target_modules": "all-linear", **options})
    if add:
        skip_without_add_adapter()
        model.add_adapter(config)
        return model
    return get_peft_model(model, config)


def joint(family: str = "llama", config: SteerConfig = ORTHOGONAL, add: bool = False, **options: Any) -> nn.Module:
    return patch_model(with_lora(family, add, **options), config).train()


def written(model: nn.Module, places: tuple[str, ...], adapters: tuple[str, ...] = ("default",)) -> list[Tensor]:
    """Return B of each layer, found by the modules' names, the columns of all adapters side by side."""
    found: dict[int, list[Tensor]] = {}
    for path, module in model.named_modules():
        if path.endswith(places) and hasattr(module, "lora_B"):
            index = next(int(part) for part in path.split(".") if part.isdigit())
            b = [module.lora_B[name] for name in adapters]
            found.setdefault(index, []).extend(getattr(part, "weight", part).detach() for part in b)
    return [torch.cat(columns, 1) for _, columns in sorted(found.items())]


def constrained(model: nn.Module, name: str = "steer_up.weight", adapter: str = "default") -> list[Tensor]:
    """Return W2 of each layer, or another parameter of the adapter, as columns."""
    found = [p.detach() for path, p in steering_parameters(model, adapter).items() if path.endswith(name)]
    return [p.unsqueeze(1) if p.dim() == 1 else p for p in found]


def overlap(ups: list[Tensor], writers: list[Tensor]) -> float:
    """Compute the worst layer's ‖BᵀW2‖ / (‖B‖ ‖W2‖). Assert that neither B nor W2 is zero."""
    assert len(ups) == len(writers) > 0
    pairs = [(b.double(), w.double()) for b, w in zip(writers, ups, strict=True)]
    assert all(b.norm() > 0 and w.norm() > 0 for b, w in pairs)
    return max(((b.T @ w).norm() / (b.norm() * w.norm())).item() for b, w in pairs)


def optimizer_of(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def backward(model: nn.Module, seed: int = 0) -> None:
    model(tokens(seed), labels=tokens(seed)).loss.backward()


def steps(model: nn.Module, count: int, optimizer: torch.optim.Optimizer | None = None) -> Iterator[int]:
    """Train; yield each step's number, from 1, after the step."""
    optimizer = optimizer or optimizer_of(model)
    for step in range(count):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        yield step + 1


@pytest.fixture
def projections(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Record each projection: a list with one entry for each."""
    made: list[bool] = []
    project = Orthogonality._project

    def counted(self: Orthogonality, columns: Any, *, everything: bool) -> None:
        made.append(everything)
        project(self, columns, everything=everything)

    monkeypatch.setattr(Orthogonality, "_project", counted)
    return made


# ---------------------------------------------------------------------------------------------------------------------
# It holds at every step


@pytest.mark.parametrize("modules", ["mlp", "all"])
@pytest.mark.parametrize("add", [False, True], ids=["get_peft_model", "add_adapter"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox-parallel", "gpt2"])
def test_orthogonality_after_every_step(family, add, modules):
    config = SteerConfig(rank=4, up_bias=True, orthogonal_to="lora", orthogonal_modules=modules)
    model = joint(family, config, add)
    places = MLP if modules == "mlp" else MLP + ATTENTION
    for _ in steps(model, 4):
        assert overlap(constrained(model), written(model, places)) <= 1e-6
        assert overlap(constrained(model, "steer_up.bias"), written(model, places)) <= 1e-6
    if modules == "mlp":  # the other writers' columns are not removed
        assert overlap(constrained(model), written(model, ATTENTION)) > 1e-3


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_orthogonality_at_every_site_that_writes_into_the_stream(family):
    sites = ("post_attention", "post_mlp", "post_block")
    model = joint(family, SteerConfig(rank=4, site=sites, orthogonal_to="lora"))
    for _ in steps(model, 3):
        found = steering_parameters(model)
        for site in sites:
            ups = [p.detach() for path, p in found.items() if path.endswith(f"{site}.steer_up.weight")]
            assert overlap(ups, written(model, MLP)) <= 1e-6


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
def test_orthogonality_after_steps_in_the_backward_pass(reentrant):
    """An optimizer for each parameter that steps as soon as its gradient is there, as LOMO's and GaLore's do."""

    def train(inside: bool) -> nn.Module:
        torch.manual_seed(0)
        model = joint(init_lora_weights=False)
        randomize(model)
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        optimizers = {p: torch.optim.SGD([p], lr=0.05) for p in model.parameters() if p.requires_grad}

        def step(parameter: Tensor) -> None:
            optimizers[parameter].step()
            parameter.grad = None

        handles = [p.register_post_accumulate_grad_hook(step) for p in optimizers] if inside else []
        for number in range(3):
            backward(model, number)
            for parameter in () if inside else optimizers:
                step(parameter)
            assert overlap(constrained(model), written(model, MLP)) <= 1e-6
        for handle in handles:
            handle.remove()
        return model

    inside, after = train(True), train(False)
    for one, other in zip(inside.parameters(), after.parameters(), strict=True):
        # The rounding of three steps, and of a projection before or after the other layers' steps.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_orthogonality_after_a_backward_pass_that_failed_in_the_middle():
    model = joint(init_lora_weights=False)
    randomize(model)
    up = list(steering_parameters(model).values())[-1]
    optimizer = torch.optim.Adam([up], lr=0.05)  # it moves W2 out of the subspace
    handles = [up.register_post_accumulate_grad_hook(lambda p: optimizer.step())]
    first = model.base_model.model.model.layers[0]
    handles.append(first.register_full_backward_pre_hook(lambda *_: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        backward(model)
    handles.pop().remove()
    backward(model)
    assert overlap(constrained(model), written(model, MLP)) <= 1e-6
    handles.pop().remove()
    optimizer.step()
    assert overlap(constrained(model), written(model, MLP)) <= 1e-6


def test_orthogonality_an_average_of_the_model_made_before_the_first_step():
    model = joint()
    average = AveragedModel(model, avg_fn=lambda mean, new, count: new)
    list(steps(model, 2))
    average.update_parameters(model)
    assert torch.equal(logits(average.module), logits(model))
    list(steps(average.module, 1))
    assert overlap(constrained(average.module), written(average.module, MLP)) <= 1e-6


def test_orthogonality_of_a_computed_w2_is_refused():
    model = joint()
    for site in (module for name, module in model.named_modules() if name.endswith("post_block")):
        weight_norm(site.steer_up["default"])
    with refused(ValueError, "W2 or b2 of adapter 'default' at layer 0 is computed from other parameters"):
        backward(model)


def test_orthogonality_after_every_step_of_a_fused_optimizer():
    # The Trainer's default. Its fused kernels do not raise the versions of the tensors that they change.
    model = joint()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    for _ in steps(model, 4, optimizer):
        assert overlap(constrained(model), written(model, MLP)) <= 1e-6


class ByData(torch.optim.Optimizer):
    """An optimizer that writes through `.data`, which does not raise the versions of the parameters either."""

    def step(self):
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            parameter.data.sub_(self.defaults["lr"] * parameter.grad.sign())


@pytest.mark.parametrize("name", ["by data", "AdamW8bit", "Lion", "PagedAdamW"])
def test_orthogonality_after_every_step_of_another_librarys_optimizer(name):
    model = joint()
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "by data":
        optimizer = ByData(parameters, {"lr": 1e-2})
    else:
        library = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (the extra quant)")
        optimizer = getattr(library.optim, name)(parameters, lr=1e-2)
    for _ in steps(model, 2, optimizer):
        assert overlap(constrained(model), written(model, MLP)) <= 1e-6


@pytest.mark.parametrize("narrow_lora", [False, True], ids=["B in fp32", "B in bf16"])
def test_orthogonality_after_every_step_in_bf16(narrow_lora):
    model = get_peft_model(
        build().bfloat16(), LoraConfig(r=3, target_modules="all-linear"), autocast_adapter_dtype=not narrow_lora
    )
    patch_model(model, ORTHOGONAL).train()
    for _ in steps(model, 4):
        b = written(model, MLP)
        assert b[0].dtype == (torch.bfloat16 if narrow_lora else torch.float32)
        assert overlap(constrained(model), b) <= 1e-6  # master weights are float32


@pytest.mark.parametrize("adapter", [torch.float32, torch.float64], ids=str)
def test_orthogonality_after_every_step_of_a_model_in_float64(monkeypatch, adapter):
    monkeypatch.setenv("FUSED_STEER_BACKEND", "torch")
    model = joint().double()
    for parameter in steering_parameters(model).values():
        parameter.data = parameter.data.to(adapter)
    bound = 1e-6 if adapter == torch.float32 else 1e-14
    for _ in steps(model, 3):
        assert overlap(constrained(model), written(model, MLP)) <= bound


def test_orthogonality_parameters_in_bf16_hold_it_as_far_as_they_can():
    model = joint(config=SteerConfig(rank=4, orthogonal_to="lora", dtype="bfloat16"))
    for _ in steps(model, 3):
        assert overlap(constrained(model), written(model, MLP)) <= torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_orthogonality_under_autocast(dtype, tmp_path):
    """Also with parameters that are narrow in another dtype than autocast's, and with the backward pass inside."""
    model = joint(config=SteerConfig(rank=4, dtype=dtype, orthogonal_to="lora"))
    list(steps(model, 2, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens(3), labels=tokens(3)).loss
        loss.backward()
        model.steering.save(tmp_path)
        model.steering.load(tmp_path, "saved")
    bound = torch.finfo(getattr(torch, dtype)).eps
    assert overlap(constrained(model), written(model, MLP)) <= max(bound, 1e-6)
    assert overlap(constrained_gradients(model), written(model, MLP)) <= max(bound, 1e-6)


def test_orthogonality_a_vector():
    model = joint(config=SteerConfig(form="vector", orthogonal_to="lora"))
    for _ in steps(model, 3):
        assert overlap(constrained(model, "steer_up.bias"), written(model, MLP)) <= 1e-6


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"use_rslora": True, "lora_alpha": 64}], ids=["dora", "rslora"]
)
def test_orthogonality_scalings_of_lora(options):
    model = joint(**options)
    for _ in steps(model, 3):
        assert overlap(constrained(model), written(model, MLP)) <= 1e-6


def test_orthogonality_adalora():
    model = get_peft_model(build(), AdaLoraConfig(init_r=3, target_modules=["down_proj"], total_step=10))
    patch_model(model, ORTHOGONAL).train()
    for step in steps(model, 3):
        if step > 1:  # its B starts at random, its scale at 0
            assert overlap(constrained(model), written(model, MLP)) <= 1e-6


def test_orthogonality_naive_joint_does_not_hold_it():
    model = joint(config=SteerConfig(rank=4))
    assert all(overlap(constrained(model), written(model, MLP)) > 1e-2 for _ in steps(model, 3))


def test_orthogonality_several_active_adapters_are_all_stayed_out_of():
    model = with_lora()
    model.add_adapter("more", LoraConfig(r=2, target_modules=["down_proj"]))
    model.base_model.set_adapter(["default", "more"])
    patch_model(model, ORTHOGONAL).train()
    for _ in steps(model, 3):
        assert overlap(constrained(model), written(model, MLP, ("default", "more"))) <= 1e-6


def test_orthogonality_layers_without_lora_are_free_and_layers_without_steering_do_not_matter():
    config = SteerConfig(rank=4, layers=[0, 1], orthogonal_to="lora")
    model = joint(config=config, target_modules=["down_proj", "q_proj"], layers_to_transform=[1, 2])
    list(steps(model, 3))
    ups, writers = constrained(model), written(model, MLP)
    assert len(ups) == len(writers) == 2
    assert overlap([ups[1]], [writers[0]]) <= 1e-6  # only layer 1 has both
    sites = [model.get_base_model().model.layers[i].post_block for i in range(2)]
    assert sites[0].basis is None and sites[1].basis is not None


def test_orthogonality_layers_of_different_ranks():
    model = joint(rank_pattern={r"layers\.1\.mlp\.down_proj": 5})
    for _ in steps(model, 3):
        assert [b.shape[1] for b in written(model, MLP)] == [3, 5, 3]
        assert overlap(constrained(model), written(model, MLP)) <= 1e-6


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_orthogonality_compiled(backend):
    torch.compiler.reset()
    model = joint()
    compiled = torch.compile(model, backend=backend)
    optimizer = optimizer_of(model)
    for step in range(4):
        compiled(tokens(step), labels=tokens(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert overlap(constrained(model), written(model, MLP)) <= 1e-6
    parameters = steering_parameters(model)
    actual, expected = (gradients(m, parameters) for m in (compiled, model))
    for b, of_draws in zip(written(model, MLP), (g for n, g in actual.items() if "steer_up" in n), strict=True):
        assert max(overlap([g], [b]) for g in of_draws) <= 1e-6
    unsteered = model.steering.unpatch()
    ways = [input_gradient(m) for m in (torch.compile(unsteered, backend=backend), unsteered)]
    assert_close(actual, expected, unsteered=ways)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


def hook_gradients(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Compute autograd's gradients through W2 -> (I − V Vᵀ) W2 on an unpatched copy with hooks; V by a float64 SVD."""
    parameters = steering_parameters(model)
    leaves = {name: p.detach().to(dtype).requires_grad_() for name, p in parameters.items()}
    bases = [torch.linalg.svd(b.double(), full_matrices=False)[0].to(dtype) for b in written(model, MLP)]
    reference = copy.deepcopy(model)
    reference.zero_grad()
    reference.steering.unpatch()
    reference = reference.to(dtype).eval()

    def hook(prefix: str, v: Tensor) -> Any:
        def steer(module: nn.Module, args: Any, hidden: Tensor) -> Tensor:
            down, up = (leaves[f"{prefix}.post_block.steer_{side}.weight"] for side in ("down", "up"))
            return hidden + F.silu(hidden @ down.T) @ (up - v @ (v.T @ up)).T

        return steer

    prefixes = list(dict.fromkeys(name.partition(".post_block.")[0] for name in leaves))
    for prefix, v in zip(prefixes, bases, strict=True):
        reference.get_submodule(prefix).register_forward_hook(hook(prefix, v))
    reference(tokens(9), labels=tokens(9)).loss.backward()
    lora = {name: p.grad for name, p in reference.named_parameters() if "lora_B" in name}
    return {name: leaf.grad for name, leaf in leaves.items()} | lora


def test_orthogonality_gradients_are_those_of_float64_autograd_through_the_projection():
    model = joint()
    list(steps(model, 3))
    expected, truth = (hook_gradients(model, dtype) for dtype in (torch.float32, torch.float64))
    backward(model.eval(), 9)
    trained = {**steering_parameters(model), **{n: p for n, p in model.named_parameters() if "lora_B" in n}}
    assert_no_worse({name: parameter.grad for name, parameter in trained.items()}, expected, truth)
    plain = joint(config=SteerConfig(rank=4))  # without the constraint, the same values have other gradients
    plain.load_state_dict(model.state_dict())
    backward(plain.eval(), 9)
    for ours, theirs in zip(constrained_gradients(model), constrained_gradients(plain), strict=True):
        assert (ours - theirs).norm() > 0.01 * theirs.norm()


def constrained_gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for name, p in steering_parameters(model).items() if name.endswith("steer_up.weight")]


def test_orthogonality_no_projection_while_b_is_zero():
    """In LoRA's initial state, B = 0, the first gradient equals that of naive joint training bit for bit."""
    torch.manual_seed(0)
    model = joint()
    torch.manual_seed(0)
    naive = joint(config=SteerConfig(rank=4))
    randomize(model), randomize(naive)
    backward(model), backward(naive)
    for (name, ours), theirs in zip(
        steering_parameters(model).items(), steering_parameters(naive).values(), strict=True
    ):
        assert torch.equal(ours, theirs) and torch.equal(ours.grad, theirs.grad), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_orthogonality_accumulation_and_checkpointing(projections, reentrant):
    """V is computed once per step: micro-batches and recomputation do not repeat it."""
    start = joint()
    list(steps(start, 2))  # so that B is not zero
    networks = joint(), joint()
    lora = with_lora().train(), with_lora().train()
    for network, unsteered in zip(networks, lora, strict=True):
        network.load_state_dict(start.state_dict())
        unsteered.load_state_dict(start.state_dict(), strict=False)
    model, checkpointed = networks
    for network in (checkpointed, lora[1]):
        network.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            network.enable_input_require_grads()
    optimizers = [optimizer_of(model), optimizer_of(checkpointed)]
    for step in range(3):
        del projections[:]
        for network, optimizer in zip((model, checkpointed), optimizers, strict=True):
            for micro in range(3):
                backward(network, 3 * step + micro)
            optimizer.step()
        # One projection after each optimizer's step; before the first step, one for the initial values.
        assert projections == ([False, True] * 2 if step == 0 else [True] * 2)
        if step == 0:  # later the two optimizers lead to different models
            found = [{name: p.grad for name, p in steering_parameters(m).items()} for m in networks]
            assert_close(*found, unsteered=[input_gradient(m) for m in lora])
        for optimizer in optimizers:
            optimizer.zero_grad()


def test_orthogonality_an_optimizer_of_its_own_for_each_part():
    model = joint()
    steering = torch.optim.AdamW(list(model.steering.parameters()), lr=1e-2)
    lora = torch.optim.AdamW([p for n, p in model.named_parameters() if "lora_" in n], lr=1e-3)
    for step in range(3):
        backward(model, step)
        steering.step()
        lora.step()
        assert overlap(constrained(model), written(model, MLP)) <= 1e-6
        model.zero_grad()


def test_orthogonality_an_adapter_added_after_training_finds_its_writers_too():
    model = joint()
    list(steps(model, 1))
    model.steering.add("second", ORTHOGONAL)
    model.steering.use("second")
    for _ in steps(model, 2):
        assert overlap(constrained(model, adapter="second"), written(model, MLP)) <= 1e-6


def test_orthogonality_finding_the_writers_is_no_call_of_the_layers():
    model = patch_model(build())
    get_peft_model(model, LoraConfig(r=3, target_modules="all-linear"))
    logits(model)
    model.steering.add("joint", ORTHOGONAL)
    assert [layer.calls for layer in model.steering.report()] == [1, 1, 1]


def test_orthogonality_other_models_steps_are_none_of_its_business(projections, tmp_path):
    model = joint()
    list(steps(model, 1))
    model.steering.save(tmp_path)
    patch_model(build(), tmp_path)  # usable without the LoRA, which only training needs
    randomize(model)
    del projections[:]
    other = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=1.0)
    other(torch.ones(2)).sum().backward()
    optimizer.step()
    assert projections == []


# ---------------------------------------------------------------------------------------------------------------------
# Values that change without an optimizer's step


def test_orthogonality_saved_weights_satisfy_it_where_the_parameters_do_not(tmp_path):
    model = joint()
    list(steps(model, 1))
    randomize(model)
    before = [up.clone() for up in constrained(model)]
    assert overlap(before, written(model, MLP)) > 1e-3
    model.steering.save(tmp_path)
    assert all(map(torch.equal, before, constrained(model)))
    fresh = patch_model(build(), tmp_path)
    assert overlap(constrained(fresh), written(model, MLP)) <= 1e-6
    assert fresh.steering.config() == model.steering.config()


def test_orthogonality_what_satisfies_it_is_left_to_the_bit_and_what_does_not_is_projected(projections):
    model = joint()
    list(steps(model, 2))
    state = copy.deepcopy(model.state_dict())
    resumed = joint()
    resumed.load_state_dict(state)
    del projections[:]
    backward(resumed)
    assert projections == [False]
    assert all(map(torch.equal, constrained(resumed), constrained(model)))
    randomize(resumed)  # violates the constraint
    before = [up.clone() for up in constrained(resumed)]
    with torch.no_grad():
        resumed(tokens())
    assert all(map(torch.equal, constrained(resumed), before))  # inference changes nothing
    backward(resumed)
    assert overlap(constrained(resumed), written(resumed, MLP)) <= 1e-6
    backward(resumed)
    assert projections == [False, False]


def test_orthogonality_a_copy_is_kept_orthogonal_too():
    model = joint()
    list(steps(model, 1))
    twin = copy.deepcopy(model)
    untouched = [up.clone() for up in constrained(model)]
    for _ in steps(twin, 2):
        assert overlap(constrained(twin), written(twin, MLP)) <= 1e-6
    assert all(map(torch.equal, constrained(model), untouched))


def test_orthogonality_switching_adapters_switches_the_constraint():
    model = joint()
    model.steering.add("free", SteerConfig(rank=2))
    list(steps(model, 1))
    model.steering.use("free")
    before = [up.clone() for up in constrained(model)]
    backward(model)
    free = steering_parameters(model, "free")
    gradients = [p.grad for name, p in free.items() if name.endswith("steer_up.weight")]
    assert overlap(gradients, written(model, MLP)) > 1e-3
    list(steps(model, 2))
    assert overlap(constrained(model, adapter="free"), written(model, MLP)) > 1e-3
    assert all(map(torch.equal, constrained(model), before))  # not in use, so not changed
    model.steering.use("default")
    for _ in steps(model, 2):
        assert overlap(constrained(model), written(model, MLP)) <= 1e-6


def test_orthogonality_another_adapter_that_comes_leaves_the_gradient_projected(tmp_path):
    """It has the same sites, where the bases are of the adapter that trains."""
    model = joint()
    optimizer = optimizer_of(model)
    list(steps(model, 2, optimizer))
    model.steering.save(tmp_path)
    changes = (
        lambda: model.steering.add("other", ORTHOGONAL),
        lambda: model.steering.load(tmp_path, "loaded"),
        lambda: model.steering.use("default"),
        lambda: model.steering.restore(tmp_path),
    )
    for change in changes:
        change()
        backward(model)
        assert overlap(constrained_gradients(model), written(model, MLP)) <= 1e-6
        optimizer.zero_grad()


def test_orthogonality_nobody_is_told_of_steps_any_more():
    gc.collect()  # removes the optimizer hooks of other tests' models
    hooks = torch_optimizer._global_optimizer_post_hooks
    before = len(hooks)
    model = joint()
    assert len(hooks) == before + 1
    model.steering.add("more", ORTHOGONAL)
    assert len(hooks) == before + 2
    kept = list(model.steering._constraints._kept.values())  # keeps them alive, which must not matter
    model.steering.remove("more")
    assert len(hooks) == before + 1
    assert model.steering.unpatch() is model and len(kept) == 2
    assert len(hooks) == before


# ---------------------------------------------------------------------------------------------------------------------
# LoRA before or after, and both, either or none at run time


def test_orthogonality_lora_added_to_a_patched_model():
    model = patch_model(build())
    wrapped = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear"))
    with pytest.warns(UserWarning, match="in use but does not train"):
        wrapped.train()(tokens())
    wrapped.steering.add("joint", ORTHOGONAL)
    wrapped.steering.use("joint")
    for _ in steps(wrapped, 3):
        ups = constrained(wrapped, adapter="joint")
        assert overlap(ups, written(wrapped, MLP)) <= 1e-6


def test_orthogonality_lora_that_trains_goes_on_training_and_the_base_is_frozen():
    model = with_lora()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    patch_model(model, ORTHOGONAL)
    now = {name for name, p in model.named_parameters() if p.requires_grad and ".post_block." not in name}
    assert now == trained and all("lora_" in name for name in now)
    model.steering.unpatch()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("add", [False, True], ids=["get_peft_model", "add_adapter"])
def test_orthogonality_modes(add):
    model = joint(add=add)
    list(steps(model, 2))
    model.eval()
    next(p for name, p in model.named_parameters() if "lora_A" in name).requires_grad_(False)  # PEFT would undo that
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    both = logits(model)
    with model.steering.mode("lora"):
        lora = logits(model)
    with model.steering.mode("steering"):
        steering = logits(model)
    with model.steering.mode("both"):
        assert torch.equal(logits(model), both)
    with pytest.raises(ZeroDivisionError), model.steering.mode("steering"):
        raise ZeroDivisionError
    assert torch.equal(logits(model), both)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags

    alone = copy.deepcopy(model)
    alone.steering.unpatch()
    assert torch.equal(lora, logits(alone))
    bare = patch_model(build(), SteerConfig(rank=4))
    with torch.no_grad():
        for ours, theirs in zip(steering_parameters(bare).values(), steering_parameters(model).values(), strict=True):
            ours.copy_(theirs)
    assert_close(steering, logits(bare))
    assert len({tuple(x.flatten().tolist()) for x in (both, lora, steering)}) == 3


def test_orthogonality_an_adapter_answers_without_the_lora_it_was_trained_beside_but_does_not_train_so(tmp_path):
    model = joint()
    list(steps(model, 2))
    model.steering.save(tmp_path)
    alone = patch_model(build(), tmp_path)
    with model.steering.mode("steering"):
        expected = logits(model.eval())
    assert_close(logits(alone), expected)
    alone(tokens())  # a forward pass without no_grad is not training yet
    with refused(RuntimeError, "'default'", "orthogonal to a LoRA", "expected"):
        alone.train()(tokens())


# ---------------------------------------------------------------------------------------------------------------------
# Refusals: one line, and nothing is changed


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"target_modules": ["q_proj", "o_proj"]}, ("no active LoRA", "mlp.down_proj", "orthogonal_modules='all'")),
        ({"r": 32}, ("32 directions", "layer 0", f"d = {HIDDEN}")),
    ],
    ids=["elsewhere", "rank"],
)
def test_orthogonality_a_lora_that_it_cannot_be_orthogonal_to(options, parts):
    model = with_lora(**options)
    with refused(ValueError, *parts, "expected", model=model):
        patch_model(model, ORTHOGONAL)
    assert not hasattr(model, "steering")


@pytest.mark.parametrize("value", ["not finite", "on meta"])
def test_orthogonality_values_that_it_cannot_be_orthogonal_to(value):
    model = with_lora()
    b = model.get_base_model().model.layers[1].mlp.down_proj.lora_B["default"]
    if value == "on meta":
        b.to("meta")
    else:
        torch.nn.init.constant_(b.weight, torch.nan)
    with refused(ValueError, "layer 1", value, "expected", model=model):
        patch_model(model, ORTHOGONAL)
    assert not hasattr(model, "steering")


def test_orthogonality_no_lora():
    model = build()
    with refused(ValueError, "orthogonal_to is 'lora'", "LlamaForCausalLM carries no LoRA", "expected", model=model):
        patch_model(model, ORTHOGONAL)
    patch_model(model)
    with refused(ValueError, "carries no LoRA", model=model):
        model.steering.add("joint", ORTHOGONAL)
    assert model.steering.names == ["default"]


def test_orthogonality_unknown_mode_and_a_mode_without_lora():
    model = joint()
    for mode in ("all", torch.zeros(2)):
        with refused(ValueError, f"{mode!r}", "'both', 'lora', 'steering'", model=model), model.steering.mode(mode):
            pass
    plain = patch_model(build())
    with refused(ValueError, "'steering'", "carries no LoRA", model=plain), plain.steering.mode("steering"):
        pass


def test_orthogonality_a_lora_that_diverges_is_not_saved_beside(tmp_path):
    model = joint()
    list(steps(model, 1))
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.down_proj.lora_B["default"].weight.fill_(torch.inf)
    with refused(ValueError, "'default'", "not finite"):
        model.steering.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The transforms of torch.func


def _functional(model: nn.Module) -> Any:
    return lambda values: torch.func.functional_call(model, values, (tokens(),), {"labels": tokens()}).loss


def test_orthogonality_under_the_transforms_of_torch_func():
    """The gradients are those of training, and a W2 that is not orthogonal is projected."""
    model = joint(init_lora_weights=False)
    steering = randomize(model)
    model(tokens(), labels=tokens())  # projects the parameters
    leaves = {name: p for name, p in model.named_parameters() if p.requires_grad and "steer" in name}
    assert len(leaves) == len(steering)
    expected = torch.autograd.grad(_functional(model)(leaves), list(leaves.values()))
    before = {name: p.detach().clone() for name, p in leaves.items()}
    writers = written(model, MLP)
    skewed = dict(before)
    for index, name in enumerate(name for name in before if name.endswith("steer_up.default.weight")):
        skewed[name] = before[name] + writers[index].sum(1, keepdim=True)
    for values in (before, skewed):
        found = torch.func.grad(_functional(model))(values)
        for name, value in zip(leaves, expected, strict=True):
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)
    assert all(torch.equal(p, before[name]) for name, p in leaves.items())


def test_orthogonality_transforms_before_a_pass_or_of_the_lora_are_refused():
    model = joint(init_lora_weights=False)
    steering, lora = (
        {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad and part in name}
        for part in ("steer", "lora_B")
    )
    with refused(RuntimeError, "kept orthogonal to a LoRA that no training pass has seen"):
        torch.func.grad(_functional(model))(steering)
    model(tokens(), labels=tokens())
    torch.func.grad(_functional(model))(steering)
    with refused(RuntimeError, "a transform of torch.func varies LoRA's B"):
        torch.func.grad(_functional(model))(lora)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "down_proj.lora_B" in name).mul_(2)
    with refused(RuntimeError, "kept orthogonal to a LoRA that no training pass has seen"):
        torch.func.grad(_functional(model))(steering)
