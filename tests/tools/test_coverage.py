"""Tests of the coverage table: families of many kinds pass, and wrong, refused or broken models are found."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from command import assert_refused, invoke
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from fused_steer import patch_model
from fused_steer.model.site import SteeringSite
from fused_steer.tools import coverage as coverage_module
from fused_steer.tools.coverage import MODEL_TYPES, Row, build, check, check_all, markdown, run, summary

#: model type -> expected outcome. The types cover all kinds of attention, mixtures of experts, state spaces,
#: recurrences, post-norm, parallel branches, shared layers, other towers.
SOME = {
    "bamba": "fused",
    "bert": "hook",
    "bloom": "hook",
    "cohere2": "fused",
    "deepseek_v3": "fused",
    "falcon": "hook",
    "gemma3": "fused",
    "gemma3n_text": "hook",
    "gemma4_text": "hook",
    "git": "hook",
    "glm4": "fused",
    "gpt_neo": "fused",
    "gpt_oss": "fused",
    "granitemoehybrid": "fused",
    "jamba": "fused",
    "lfm2": "fused",
    "llama4": "fused",
    "mamba": "fused",
    "mbart": "fused",
    "openai-gpt": "hook",
    "phi4_multimodal": "fused",
    "qwen3_5": "fused",
    "recurrent_gemma": "fused",
    "rwkv": "fused",
    "xlnet": "hook",
    "zamba2": "mixed",
}


@pytest.mark.parametrize(("model_type", "outcome"), SOME.items())
def test_coverage_families_pass(model_type: str, outcome: str) -> None:
    row = run(model_type)
    assert (row.outcome, row.passes) == (outcome, True), row
    assert row.layers
    assert bool(row.reason) == bool(row.hooked) == (outcome != "fused")


def test_coverage_float64_decides_where_rounding_is_large() -> None:
    truth = torch.randn(4, 8, dtype=torch.float64)
    noise = 1e-4 * torch.randn(4, 8)
    path, hooks = "model.layers.0.post_block.steer_up.weight", truth.float() + noise
    coverage_module._expect_as_exact({path: (truth.float() - noise, hooks)}, {path: truth})
    with pytest.raises(coverage_module.Wrong, match="gradients of steer_up.weight: relative error .* twice"):
        coverage_module._expect_as_exact({path: (truth.float() + 3 * noise, hooks)}, {path: truth})


def test_coverage_every_class_has_its_row() -> None:
    assert {CONFIG_MAPPING[model_type] for model_type in MODEL_TYPES} == set(MODEL_FOR_CAUSAL_LM_MAPPING)


# ---------------------------------------------------------------------------------------------------------------------
# Errors that the command must find


def steered_by(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a patch_model that gives its sites another forward."""

    def patch(model: nn.Module, config: Any) -> nn.Module:
        patch_model(model, config)
        for module in model.modules():
            if isinstance(module, SteeringSite):
                module.__class__ = type("SteeringSite", (SteeringSite,), {"steer": forward})
        return model

    return patch


def shifted(site: SteeringSite, residual: Any, branch: Any = None, entering: Any = None) -> Any:
    return SteeringSite.steer(site, residual, branch, entering) + 1e-6


def stronger(site: SteeringSite, residual: Any, branch: Any = None, entering: Any = None) -> Any:
    plain = residual if branch is None else residual + branch
    return plain + 1.001 * (SteeringSite.steer(site, residual, branch, entering) - plain)


def without_gradient(site: SteeringSite, residual: Any, branch: Any = None, entering: Any = None) -> Any:
    steered = SteeringSite.steer(site, residual, branch, entering)
    return steered + 0.01 * (steered - steered.detach())


def counted_twice(site: SteeringSite, residual: Any, branch: Any = None, entering: Any = None) -> Any:
    site.calls += 1
    return SteeringSite.steer(site, residual, branch, entering)


def idle(site: SteeringSite, residual: Any, branch: Any = None, entering: Any = None) -> Any:
    site.calls += 1
    return residual if branch is None else residual + branch


def leaving_a_trace(model: nn.Module, config: Any) -> nn.Module:
    model.trace = True
    return patch_model(model, config)


def before_the_branch(model: nn.Module, config: Any) -> nn.Module:
    """Steer the layers' first add instead of the last. The numbers are the same while the adapter is fresh."""
    patch_model(model, config)
    for layer in model.model.layers:
        cls = type(layer)

        def forward(self: Any, x: Any, cls: type = cls, **kwargs: Any) -> Any:
            site = self.post_block
            x = site(x)
            self.post_block = SteeringSite()  # a site adds its two arguments
            self.post_block.patched = site.patched
            try:
                return cls.forward(self, x, **kwargs)
            finally:
                self.post_block = site

        layer.__class__ = type(cls.__name__, (cls,), {"forward": forward})
    return model


def refusing_too_late(model: nn.Module, config: Any) -> nn.Module:
    patch_model(model, config)
    raise ValueError("too late")


@pytest.mark.parametrize(
    ("patch", "reason"),
    [
        (steered_by(shifted), "a fresh patch has other logits"),
        (steered_by(stronger), "relative error"),
        (steered_by(without_gradient), "gradients of"),
        (steered_by(counted_twice), "the sites were called"),
        (steered_by(idle), "relative error"),
        (before_the_branch, "against plain hooks"),
        (leaving_a_trace, "unpatch left something behind"),
        (refusing_too_late, "refused, but changed: too late"),
    ],
)
def test_coverage_wrong_is_found_out(patch: Callable[..., Any], reason: str) -> None:
    row = check(build("llama"), patch=patch)
    assert row.outcome == "wrong" and reason in row.reason, row
    assert not row.passes


@pytest.mark.parametrize(
    ("model_type", "outcome", "reason"),
    [
        ("blt", "unbuilt", "does not run unpatched"),
        ("gemma4_assistant", "unbuilt", "hidden_size_per_layer_input"),
        ("xlm", "refused", "no decoder layers that can be told apart"),
        ("reformer", "raises", "has a ReformerOutput to steer at post_block"),
    ],
)
def test_coverage_reasons_are_given(model_type: str, outcome: str, reason: str) -> None:
    row = run(model_type)
    assert (row.outcome, row.passes) == (outcome, False) and reason in row.reason, row


def test_coverage_encoder_decoder_is_refused() -> None:
    model = build("llama")
    model.config.is_encoder_decoder = True
    row = check(model)
    assert row.outcome == "refused" and "encoder-decoder" in row.reason


# ---------------------------------------------------------------------------------------------------------------------
# Processes, table, command


def test_coverage_each_in_its_process() -> None:
    assert [(row.model_type, row.outcome) for row in check_all(["gpt2", "xlm"], jobs=1)] == [
        ("gpt2", "fused"),
        ("xlm", "refused"),
    ]
    (row,) = check_all(["llama"], jobs=1, seconds=0.01)
    assert row.outcome == "raises" and "took more than 0.01 s" in row.reason


@pytest.mark.parametrize(("arguments", "parts"), [(["nothing"], ("'nothing'", "expected")), (["llama", 0], ("jobs",))])
def test_coverage_bad_arguments_are_refused(arguments: list[Any], parts: tuple[str, ...]) -> None:
    only, jobs = [*arguments, 1][:2]
    assert_refused(invoke("coverage", "--only", only, "--jobs", jobs), *parts)


def test_coverage_refuses_a_directory_as_out_before_it_checks_a_model(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("fused_steer.tools.coverage.check_all", None)
    assert_refused(invoke("coverage", "--out", tmp_path), "a directory; expected a file for the table")


ROWS = [
    Row(
        "llama",
        "LlamaForCausalLM",
        "fused",
        layers=3,
        error=2e-7,
        post_mlp=Row("llama", "LlamaForCausalLM", "inline", "a norm"),
        norms=3,
    ),
    Row("internlm3", "LlamaForCausalLM", "wrong", "a | b", layers=3),
    Row("bert", "BertLMHeadModel", "hook", "no sum", layers=3, hooked=3, error=1e-6),
]


def test_coverage_table() -> None:
    text = markdown(ROWS)
    assert "**2 of 3 model types pass**, 1 of 2 classes;" in text
    assert "error is 1.0e-06" in text and torch.__version__ in text
    assert (
        "| LlamaForCausalLM | internlm3 | wrong | a \\| b |" in text
        and "With `fuse_norm=True` 1 classes" in text
        and "| hook | 1 |" in text
    )
    assert (
        "| LlamaForCausalLM | llama | fused |  | inline | a norm | 3 of 3 |  |" in text
        and "At `post_mlp` 1 of 1 pass" in text
    )
    first, second, third = summary(ROWS).splitlines()
    assert third == "fuse_norm: 1 classes fuse the norm behind every layer, 0 behind some layers"
    assert first.startswith("post_block: 2 of 3 pass: 1 fused, 0 inline, 0 mixed, 1 hook") and first.endswith("1 wrong")
    assert second.startswith("post_mlp: 1 of 1 pass: 0 fused, 1 inline,") and second.endswith("0 wrong")


def test_coverage_command(tmp_path, monkeypatch) -> None:
    out = tmp_path / "docs" / "coverage.md"
    result = invoke("coverage", "--only", "llama", "--jobs", 1, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert (row["model_type"], row["outcome"], row["layers"]) == ("llama", "fused", 3)
    assert "| LlamaForCausalLM | llama | fused |" in out.read_text()
    monkeypatch.setattr(coverage_module, "check_all", lambda types, jobs: iter(ROWS))
    result = invoke("coverage")
    assert result.exit_code == 1 and "wrong    internlm3" in result.stdout
