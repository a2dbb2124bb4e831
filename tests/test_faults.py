"""Tests that an exception at any line leaves model, files and pool unchanged, or that `unpatch()` restores the base.

Each operation runs once to record the package's lines that it executes. It then runs again from the same state with an
exception raised at one of these lines. By default a sample of the lines is tried; `pytest tests/test_faults.py
--every-line` tries all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import Line, lines_of, raise_at, within
from models import HIDDEN, build, logits, randomize
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fused_steer import SteerConfig, load_joint, lora_parameters, patch_model, save_joint
from fused_steer.adapters.files import read_adapter

SAMPLED = 8  # number of lines to try per operation, spread evenly
CONFIG = SteerConfig(rank=2)
INNER = SteerConfig(rank=2, site=["post_attention", "pre_mlp", "post_mlp"])
LOREFT = SteerConfig(rank=2, form="loreft", site=["post_block", "post_mlp"], positions="prompt")


@dataclass
class State:
    """A model before an operation, and the paths of its files."""

    model: Any
    folder: Path


@dataclass(frozen=True)
class Operation:
    """An operation to interrupt.

    Attributes:
        prepare: brings a model into the state before the operation.
        run: the operation.
        after: brings a prepared model into the other state that it may be in afterwards.
        check: checks other conditions afterwards.
        bare: makes the model before anything steers it.
    """

    prepare: Callable[[State], None]
    run: Callable[[State], Any]
    after: Callable[[State], Any] | None = None
    check: Callable[[State], None] = lambda state: None
    bare: Callable[[], nn.Module] = build


def signature(model: nn.Module) -> list[Any]:
    """Record everything of a base model that patching may change."""
    return [
        (
            path,
            type(module),
            sorted(name for name in vars(module) if not name.startswith("_cached")),
            len(module._forward_hooks) + len(module._forward_pre_hooks),
            [(name, p.requires_grad) for name, p in module._parameters.items() if p is not None],
        )
        for path, module in model.named_modules()
    ]


def steered(state: State, *names: str) -> None:
    for name in names:
        if not hasattr(state.model, "steering"):
            patch_model(state.model, CONFIG, adapter_name=name)
        else:
            state.model.steering.add(name, CONFIG)
        randomize(state.model, name, seed=len(name))
    state.model.steering.use(names[0])


def saved(state: State, name: str = "polite", config: SteerConfig = CONFIG, seed: int = 5) -> Path:
    model = patch_model(build(), config, adapter_name=name)
    randomize(model, name, seed=seed)
    model.steering.save(state.folder / name)
    return state.folder / name


def whole(folder: Path) -> Tensor:
    """Return the values of the adapter in a folder; raise if the adapter is not whole."""
    layers = read_adapter(folder).tensors
    return torch.cat([layers[i][name].flatten() for i in sorted(layers) for name in sorted(layers[i])])


def one_of_two(folder: Path) -> Callable[[State], None]:
    def check(state: State) -> None:
        found = whole(state.folder / folder)
        olds = whole(state.folder / "old"), whole(state.folder / "new")
        assert any(torch.equal(found, old) for old in olds)
        assert {path.name for path in (state.folder / folder).iterdir()} >= {
            "adapter_config.json",
            "adapter_model.safetensors",
        }

    return check


def prepare_save(state: State) -> None:
    steered(state, "a")
    state.model.steering.save(state.folder / "old")
    state.model.steering.save(state.folder / "out")
    randomize(state.model, "a", seed=9)
    state.model.steering.save(state.folder / "new")


def with_lora() -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(build(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()


def fill_both(state: State, value: float) -> None:
    with torch.no_grad():
        for parameter in (*lora_parameters(state.model), *state.model.steering.parameters()):
            parameter.fill_(value)


def prepare_save_joint(state: State) -> None:
    before = [parameter.detach().clone() for parameter in lora_parameters(state.model)]
    steered(state, "a")
    fill_both(state, 1.0)
    save_joint(state.model, state.folder / "out")
    fill_both(state, 2.0)
    with torch.no_grad():  # what the model computes is compared with the model before it was steered
        for parameter, values in zip(lora_parameters(state.model), before, strict=True):
            parameter.copy_(values)


def save_both(state: State) -> None:
    lora = lora_parameters(state.model)
    before = [parameter.detach().clone() for parameter in lora]
    try:
        fill_both(state, 2.0)
        save_joint(state.model, state.folder / "out")
    finally:
        with torch.no_grad():
            for parameter, values in zip(lora, before, strict=True):
                parameter.copy_(values)


def check_both(state: State) -> None:
    """Both parts are of one save, which is found."""
    loaded = load_joint(build(), state.folder / "out", trainable=True)
    found = {p.unique().tolist()[0] for p in (*lora_parameters(loaded), *loaded.steering.parameters())}
    assert found in ({1.0}, {2.0})


def prepare_pool(state: State) -> None:
    saved(state, "polite"), saved(state, "terse", seed=6)
    steered(state, "a")
    pool = state.model.steering.make_pool(slots=2, rank=2)
    for name in ("polite", "terse"):
        pool.register(name, state.folder / name)


def check_pool(state: State) -> None:
    """Check that every adapter can still get a slot, and that every slot is free again."""
    pool = state.model.steering.pool
    for _ in range(2):
        for name in ("polite", "terse"):
            with pool.hold([name], timeout=1):
                pass
    with pool.hold(["polite", "terse"], timeout=1):
        pass


def batch(state: State) -> Any:
    with state.model.steering.batch(["a", None]):
        return logits(state.model)


def pooled_batch(state: State) -> Any:
    with state.model.steering.batch(["polite", "terse"]):
        return logits(state.model)


def several_places(state: State) -> None:
    steered(state, "a")
    for name, config in (("b", INNER), ("c", LOREFT)):
        state.model.steering.add(name, config)
        randomize(state.model, name, seed=ord(name))
    state.model.steering.use("b")


def batch_of_places(state: State) -> Any:
    with state.model.steering.batch(["a", "b"], scale=[0.5, 2.0]):
        return logits(state.model)


def disabled(state: State) -> Any:
    with state.model.steering.disabled():
        return logits(state.model)


def disabled_in_batch(state: State) -> Any:
    with state.model.steering.batch(["a", None]):
        disabled(state)
        return logits(state.model)


def vectors(state: State) -> None:
    steered(state, "a")
    for name, layer in (("v", 0), ("w", 2)):
        state.model.steering.add_vector(name, {layer: torch.ones(HIDDEN)})


def prepare_evict(state: State) -> None:
    prepare_pool(state)
    pool = state.model.steering.pool
    pool.register("third", saved(state, "third", seed=7))
    for name in ("polite", "terse"):
        pool.load(name)


def evict(state: State) -> None:
    pool = state.model.steering.pool
    pool.reload("polite")
    pool.load("polite")
    pool.load("third")


def set_scale(state: State) -> None:
    state.model.steering.scale = 0.5


OPERATIONS: dict[str, Operation] = {
    "patch": Operation(lambda state: None, lambda state: patch_model(state.model, CONFIG)),
    "patch-file": Operation(
        saved,
        lambda state: patch_model(state.model, state.folder / "polite"),
        lambda state: patch_model(state.model, state.folder / "polite"),
    ),
    "add": Operation(lambda state: steered(state, "a"), lambda state: state.model.steering.add("b", CONFIG)),
    "patch-sites": Operation(lambda state: None, lambda state: patch_model(state.model, INNER)),
    "add-sites": Operation(lambda state: steered(state, "a"), lambda state: state.model.steering.add("b", INNER)),
    "unpatch-sites": Operation(
        lambda state: (steered(state, "a"), state.model.steering.add("b", INNER)),
        lambda state: state.model.steering.unpatch(),
        lambda state: state.model.steering.unpatch(),
    ),
    "patch-loreft": Operation(lambda state: None, lambda state: patch_model(state.model, LOREFT)),
    "load": Operation(
        lambda state: (saved(state), steered(state, "a")),
        lambda state: state.model.steering.load(state.folder / "polite", name="b"),
    ),
    "use": Operation(
        lambda state: steered(state, "a", "bb"),
        lambda state: state.model.steering.use("bb"),
        lambda state: state.model.steering.use("bb"),
    ),
    "scale": Operation(lambda state: steered(state, "a"), set_scale, set_scale),
    "remove": Operation(
        lambda state: steered(state, "a", "bb"),
        lambda state: state.model.steering.remove("a"),
        lambda state: state.model.steering.remove("a"),
    ),
    "restore": Operation(
        lambda state: (steered(state, "a"), saved(state)),
        lambda state: state.model.steering.restore(state.folder / "polite"),
        lambda state: state.model.steering.restore(state.folder / "polite"),
    ),
    "unpatch": Operation(
        lambda state: steered(state, "a", "bb"),
        lambda state: state.model.steering.unpatch(),
        lambda state: state.model.steering.unpatch(),
    ),
    "disabled": Operation(lambda state: steered(state, "a"), disabled),
    "disabled-in-batch": Operation(lambda state: steered(state, "a"), disabled_in_batch),
    "combine": Operation(vectors, lambda state: state.model.steering.combine({"v": 0.5, "w": 2.0}, "c")),
    "batch": Operation(lambda state: steered(state, "a"), batch),
    "batch-pool": Operation(prepare_pool, pooled_batch, check=check_pool),
    "make-pool": Operation(
        lambda state: steered(state, "a"), lambda state: state.model.steering.make_pool(slots=2, rank=2)
    ),
    "evict": Operation(prepare_evict, evict, check=check_pool),
    "hold": Operation(prepare_pool, lambda state: hold(state), check=check_pool),
    "load-sites": Operation(
        lambda state: (saved(state, config=LOREFT), steered(state, "a"), state.model.steering.add("b", INNER)),
        lambda state: state.model.steering.load(state.folder / "polite", name="c"),
    ),
    "use-sites": Operation(
        several_places,
        lambda state: state.model.steering.use("c"),
        lambda state: state.model.steering.use("c"),
    ),
    "scale-sites": Operation(several_places, set_scale, set_scale),
    "remove-sites": Operation(
        several_places,
        lambda state: state.model.steering.remove("b"),
        lambda state: state.model.steering.remove("b"),
    ),
    "batch-sites": Operation(several_places, batch_of_places),
    "save": Operation(
        prepare_save, lambda state: state.model.steering.save(state.folder / "out"), check=one_of_two("out")
    ),
    "save-joint": Operation(prepare_save_joint, save_both, check=check_both, bare=with_lora),
    "save-pretrained": Operation(
        lambda state: steered(state, "a"), lambda state: state.model.save_pretrained(state.folder / "whole")
    ),
    "save-first": Operation(
        lambda state: steered(state, "a"), lambda state: state.model.steering.save(state.folder / "first")
    ),
}


def hold(state: State) -> None:
    with state.model.steering.pool.hold(["polite"]):
        pass


def prepared(operation: Operation, folder: Path) -> State:
    folder.mkdir()
    state = State(operation.bare(), folder)
    operation.prepare(state)
    return state


def check_after(operation: Operation, state: State, before: list[Tensor], base: Tensor, marks: list[Any]) -> None:
    """Check that the model is in the state before or after the operation, and that unpatching restores the base."""
    model = state.model
    steering = getattr(model, "steering", None)
    if steering is not None:
        assert any(torch.equal(logits(model), one) for one in before), "steered by halves"
        operation.check(state)
        steering.unpatch()
    assert torch.equal(logits(model), base), "not the base model"
    assert signature(model) == marks, "the base model is changed"
    patch_model(model, CONFIG)  # the model can be steered again
    model.steering.unpatch()


@pytest.mark.parametrize("name", OPERATIONS)
def test_faults_leave_nothing_half_done(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    operation = OPERATIONS[name]
    plain = operation.bare()
    base, marks = logits(plain), signature(plain)

    state = prepared(operation, tmp_path / "first")
    before = [logits(state.model)]
    lines = lines_of(lambda: operation.run(state))
    state = prepared(operation, tmp_path / "second")
    if operation.after is not None:
        operation.after(state)
        before.append(logits(state.model))
    elif name.startswith("patch"):
        before = [base]

    chosen: list[Line] = lines
    if not request.config.getoption("--every-line"):
        chosen = lines[:: max(1, len(lines) // SAMPLED)]
    wrong: list[str] = []
    tried = 0
    for number, line in enumerate(chosen):
        state = prepared(operation, tmp_path / str(number))
        if not raise_at(line, lambda: operation.run(state)):  # noqa: B023
            continue  # a line that a process executes once: an import, or making a class of steered layers
        tried += 1
        try:
            with within(20):
                check_after(operation, state, before, base, marks)
        except BaseException as error:
            wrong.append(
                f"{Path(line[0]).name}:{line[1]}: {type(error).__name__}: {' '.join(str(error).split())[:150]}"
            )
    assert wrong == [], f"{len(wrong)} of {tried} lines"
    assert tried > 2
