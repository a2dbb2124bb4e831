"""The sites inside a block: each gives what a plain hook on the layer's MLP or attention gives, or is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import (
    Hooked,
    assert_as_exact_as_hooks,
    build_frozen,
    logits,
    randomize,
    snapshot,
)

from fused_steer import SteerConfig, patch_model
from fused_steer.config import SITES
from fused_steer.tools import coverage

INNER = ("post_attention", "pre_mlp", "post_mlp")


def tiny(model_type: str) -> Callable[[], Any]:
    return lambda: coverage.build(model_type)


def family(name: str) -> Callable[[], Any]:
    return lambda: build_frozen(name)


#: name -> the model; the layer's attention and MLP (its first and last module, where it is several); how the outputs of
#: attention and MLP are reached.
CASES: dict[str, tuple[Callable[[], Any], str, str, str, str]] = {
    "llama": (family("llama"), "self_attn", "mlp", "fused", "fused"),
    "qwen3": (family("qwen3"), "self_attn", "mlp", "fused", "fused"),
    "gemma3": (family("gemma3"), "self_attn", "mlp", "inline", "inline"),
    "olmo2": (family("olmo2"), "self_attn", "mlp", "inline", "inline"),
    "granite": (family("granite"), "self_attn", "mlp", "inline", "inline"),
    "cohere": (family("cohere"), "self_attn", "mlp", "fused", "fused"),
    "mixtral": (family("mixtral"), "self_attn", "mlp", "fused", "fused"),
    "gpt_neox-parallel": (family("gpt_neox-parallel"), "attention", "mlp", "inline", "inline"),
    "gpt_neox-sequential": (family("gpt_neox-sequential"), "attention", "mlp", "inline", "inline"),
    "gpt2": (family("gpt2"), "attn", "mlp", "fused", "fused"),
    "falcon": (tiny("falcon"), "self_attention", "mlp", "inline", "inline"),
    "phi": (tiny("phi"), "self_attn", "mlp", "inline", "inline"),
    "opt": (tiny("opt"), "self_attn", "fc1 fc2", "inline", "inline"),
    "mbart": (tiny("mbart"), "self_attn", "fc1 fc2", "inline", "inline"),
    "gemma4": (tiny("gemma4_text"), "self_attn", "mlp", "inline", "inline"),
}


def modules_of(attention: str, mlp: str) -> dict[str, str]:
    first, *_, last = [*mlp.split(), *mlp.split()]
    return {"post_attention": attention, "pre_mlp": first, "post_mlp": last}


@pytest.mark.parametrize("site", [*INNER, INNER, ("post_mlp", "post_block")], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_sites_equal_plain_hooks(name: str, site: Any) -> None:
    make, attention, mlp, of_attention, of_mlp = CASES[name]
    base = make()
    model = patch_model(copy.deepcopy(base), SteerConfig(rank=3, site=site, down_bias=True, up_bias=True))
    assert torch.equal(logits(model), logits(base))
    kinds = {"post_attention": of_attention, "pre_mlp": "inline", "post_mlp": of_mlp}
    assert all(r.kind == kinds[r.site] and bool(r.reason) == (r.kind == "inline" and r.site != "pre_mlp")
               for r in model.steering.report() if r.site != "post_block")  # fmt: skip
    parameters = randomize(model)
    hooked = Hooked(base, parameters, modules=modules_of(attention, mlp))
    model.steering.reset_calls()
    assert_as_exact_as_hooks(model, parameters, hooked)
    calls = {f"{r.path}.{r.site}": r.calls for r in model.steering.report()}
    assert calls == hooked.calls and all(calls.values())
    model.steering.unpatch()
    assert torch.equal(logits(model), logits(base))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox-parallel"])
def test_sites_unpatch_leaves_no_trace(name: str) -> None:
    model = CASES[name][0]()
    before = snapshot(model)
    patch_model(model, SteerConfig(rank=2, site=SITES))
    assert snapshot(model) != before
    model.steering.unpatch()
    assert snapshot(model) == before
