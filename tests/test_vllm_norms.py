"""Tests of `steering.fuse_norm`: in vLLM the norm behind a layer steers, adds and normalises by one kernel."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pkgutil
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm_compiled_on_cpu
from test_vllm import run
from torch import Tensor, nn
from vllm_models import (
    CONFIGS,
    PROMPTS,
    SIZES,
    answers,
    engine_options,
    save_adapter,
    save_lora,
    save_model,
    second_runner,
)

from fused_steer import SteerConfig

pytestmark = pytest.mark.vllm

HIDDEN = 64


# ---------------------------------------------------------------------------------------------------------------------
# Engines

FUSED = {"additional_config": {"steering": {"rank": 8, "fuse_norm": True}}}


@pytest.mark.parametrize(
    "way",
    [
        "without LoRA",
        *(pytest.param(way, marks=pytest.mark.every_engine) for way in ("with LoRA", "second runner", "compiled")),
    ],
)
def test_vllm_norms_answers_are_those_of_hugging_face(tmp_path, way):
    model = save_model(tmp_path / "model")
    for seed, (name, config) in enumerate(CONFIGS.items(), 1):
        save_adapter(model, tmp_path / name, config, seed)
    save_lora(tmp_path / "lora", seed=7)
    names = [None, *CONFIGS, *(["lora"] if way == "with LoRA" else [])]
    options = dict(FUSED) if way == "with LoRA" else {**FUSED, "enable_lora": False}
    environment: dict[str, str] = {}
    if way == "second runner":
        options |= {"block_size": 32}
        environment = second_runner(tmp_path)
    elif way == "compiled":
        options |= {"enforce_eager": False}
        environment = {
            "PYTHONPATH": str(vllm_compiled_on_cpu.install(tmp_path / "plugin")),
            "VLLM_CACHE_ROOT": str(tmp_path / "cache"),
        }
    requests = [(name, name and str(tmp_path / name), prompt) for prompt in PROMPTS for name in names]
    tokens, log = run(tmp_path / "out.json", engine_options(model, **options), requests, **environment)
    right = {name: answers(model, tmp_path / name if name in CONFIGS else None) for name in names}
    if "lora" in right:
        right["lora"] = answers(model, None, 7)
    assert tokens == [right[name][index] for index in range(len(PROMPTS)) for name in names]
    assert "fused with the norms behind 3 of 3 layers" in log and "Not fused" not in log


#: Families by what can be fused: norms with 1 + weight; a finished state, where nothing can.
FAMILIES = {"gemma3": 3, "qwen3": 3, "mixtral": 3, "cohere": 0}


@pytest.mark.every_engine
@pytest.mark.parametrize("family", FAMILIES)
def test_vllm_norms_of_other_models(tmp_path, family):
    model = save_model(tmp_path / "model", family, **SIZES)
    adapter = save_adapter(model, tmp_path / "steered", SteerConfig(rank=4), 5)
    requests = [(n, p, prompt) for prompt in PROMPTS for n, p in ((None, None), ("steered", str(adapter)))]
    options = engine_options(model, enable_lora=False, **FUSED)
    tokens, log = run(tmp_path / "out.json", options, requests)
    assert tokens == [row for pair in zip(answers(model), answers(model, adapter), strict=True) for row in pair]
    assert f"fused with the norms behind {FAMILIES[family]} of 3 layers" in log
    assert ("Not fused with the norm: layers 0, 1, 2, because CohereDecoderLayer returns" in log) == (
        family == "cohere"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Structure


def test_vllm_norms_are_found_in_vllms_own_sources():
    from vllm.model_executor.models import commandr, gemma3, gpt_oss, llama, mixtral, nemotron_h, qwen2, qwen3

    from fused_steer.vllm.norms import NotFused, first_norm, last_norm

    pairs = [
        (llama.LlamaDecoderLayer, llama.LlamaModel, "input_layernorm", "norm"),
        (qwen3.Qwen3DecoderLayer, qwen3.Qwen3Model, "input_layernorm", "norm"),
        (qwen2.Qwen2DecoderLayer, qwen2.Qwen2Model, "input_layernorm", "norm"),
        (gemma3.Gemma3DecoderLayer, gemma3.Gemma3Model, "input_layernorm", "norm"),
        (mixtral.MixtralDecoderLayer, mixtral.MixtralModel, "input_layernorm", "norm"),
        (nemotron_h.NemotronHMLPDecoderLayer, nemotron_h.NemotronHModel, "norm", "norm_f"),
        (gpt_oss.TransformerBlock, gpt_oss.GptOssModel, "input_layernorm", "norm"),
    ]
    for layer, model, first, last in pairs:
        assert (first_norm(layer), last_norm(model)) == (first, last), layer
    with pytest.raises(NotFused, match="CohereDecoderLayer does not give its inputs to a norm before all else"):
        first_norm(commandr.CohereDecoderLayer)


def test_vllm_norms_most_of_vllms_models_are_known(capsys):
    """Most layer classes and loops of vLLM have a norm that is found. The numbers are printed."""
    import vllm.model_executor.models as models

    from fused_steer.vllm.layers import UNADDED, Unreachable, returned_state
    from fused_steer.vllm.norms import NotFused, first_norm, last_norm

    layers, loops = [], []
    for module in pkgutil.iter_modules(models.__path__):
        try:
            names = vars(importlib.import_module(f"{models.__name__}.{module.name}"))
        except Exception:  # it needs a package or a device that is not here
            continue
        for name, cls in names.items():
            if not (inspect.isclass(cls) and issubclass(cls, nn.Module) and cls.__module__.endswith(f".{module.name}")):
                continue
            if "Layer" in name or "Block" in name:
                with contextlib.suppress(Unreachable, NotFused, OSError):
                    if returned_state(cls) == UNADDED:
                        layers.append(False)
                        layers[-1] = bool(first_norm(cls))
            elif "Model" in name or "Decoder" in name:
                with contextlib.suppress(NotFused, OSError, TypeError):
                    source = inspect.getsource(inspect.unwrap(cls.forward))
                    if "residual" in source and "for " in source:
                        loops.append(False)
                        loops[-1] = last_norm(cls) is not None
    with capsys.disabled():
        print(f"norms known: {sum(layers)} of {len(layers)} layer classes, {sum(loops)} of {len(loops)} loops")
    assert sum(layers) >= 0.8 * len(layers) > 40 and sum(loops) >= 0.75 * len(loops) > 30


def defined(name: str, source: str, tmp_path: Any) -> type[nn.Module]:
    """Return a class with a `forward` of this source, which inspect can read."""
    file = tmp_path / f"{name.lower()}.py"
    text = f"from torch import nn\n\n\nclass {name}(nn.Module):\n{textwrap.indent(textwrap.dedent(source), '    ')}"
    file.write_text(text, encoding="utf-8")
    space: dict[str, Any] = {"__name__": name.lower()}
    exec(compile(text, str(file), "exec"), space)
    return space[name]


FIRST = """
def forward(self, positions, hidden, residual):
    {before}
    if residual is None:
        residual = hidden
        hidden = self.norm(hidden)
    else:
        hidden, residual = self.norm(hidden, residual)
    hidden = self.mlp(hidden)
    {behind}
    return hidden, residual
"""


@pytest.mark.parametrize(
    ("before", "behind", "found"),
    [
        ("pass", "pass", True),
        ("rows = positions.shape[0]", "hidden, residual = self.other(hidden, residual)", True),
        ("kept = hidden", "pass", False),
        ("hidden = hidden * 2", "pass", False),
        ("residual = self.scaled(residual)", "pass", False),
        ("pass", "hidden, residual = self.norm(hidden, residual)", False),
    ],
)
def test_vllm_norms_a_layer_that_reads_its_inputs_first_is_not_fused(before, behind, found, tmp_path):
    from fused_steer.vllm.norms import NotFused, first_norm

    cls = defined("Layer", FIRST.format(before=before, behind=behind), tmp_path)
    if found:
        assert first_norm(cls) == "norm"
    else:
        with pytest.raises(NotFused, match="Layer does not give its inputs to a norm before all else"):
            first_norm(cls)


LOOP = """
def forward(self, positions, hidden, residual):
    for index, layer in enumerate(self.layers):
        {before}
        hidden, residual = {call}
        {behind}
    if not get_pp_group().is_last_rank:
        return IntermediateTensors(dict(hidden=hidden, residual=residual))
    {last}
    return hidden
"""
CALL, LAST = "layer(positions, hidden, residual)", "hidden, _ = self.norm(hidden, residual)"


@pytest.mark.parametrize(
    ("before", "call", "behind", "last", "found"),
    [
        ("pass", CALL, "pass", LAST, "norm"),
        ("pass", "layer(positions=positions, hidden=hidden, residual=residual)", "pass", LAST, "norm"),
        ("layer = self.layers[index]", CALL, "self._maybe_add_aux_hidden_state(hidden, residual)", LAST, "norm"),
        ("pass", CALL, "pass", "hidden = hidden + residual; hidden = self.norm(hidden)", None),
        ("pass", CALL, "hidden = hidden + deep[index]", LAST, "refused"),
        ("kept.append(hidden)", CALL, "pass", LAST, "refused"),
        ("pass", CALL, "aux_hidden_states, hidden = self.take(hidden)", LAST, "refused"),
        ("pass", "layer(positions, hidden, hidden + residual)", "pass", LAST, "refused"),
        ("pass", "self.one(positions, hidden, residual)", "pass", LAST, "refused"),
    ],
)
def test_vllm_norms_a_model_that_reads_a_layers_output_is_not_fused(before, call, behind, last, found, tmp_path):
    from fused_steer.vllm.norms import NotFused, last_norm

    cls = defined("Model", LOOP.format(before=before, call=call, behind=behind, last=last), tmp_path)
    if found == "refused":
        with pytest.raises(NotFused, match="Model is not known to hand a layer's output to the next layer unread"):
            last_norm(cls)
    else:
        assert last_norm(cls) == found


# ---------------------------------------------------------------------------------------------------------------------
# A model of vLLM's parts


@pytest.fixture
def config():
    """vLLM's config, without which its layers cannot be made."""
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()) as _:
        yield


class Layer(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm, self.mlp = norm(), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden: Any, residual: Any) -> Any:
        if residual is None:
            residual = hidden
            hidden = self.norm(hidden)
        else:
            hidden, residual = self.norm(hidden, residual)
        hidden = self.mlp(hidden)
        return hidden, residual


class Model(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(norm) for _ in range(3))
        self.norm = norm()

    def forward(self, hidden: Any) -> Any:
        residual = None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        hidden, residual = self.norm(hidden, residual)
        return hidden, residual


def reached_in(model: nn.Module, fuse_norm: bool = True, **changes: Any) -> Any:
    from fused_steer.vllm.reached import reach
    from fused_steer.vllm.room import Room

    config = SimpleNamespace(
        model_config=SimpleNamespace(
            hf_text_config=SimpleNamespace(num_hidden_layers=3), get_hidden_size=lambda: HIDDEN, dtype=torch.float32,
            quantization=None,
        ),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=16),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=None, mode=0, pass_config=SimpleNamespace()),
        parallel_config=SimpleNamespace(), speculative_config=None, lora_config=None,
        additional_config={"steering": {"rank": 4, "fuse_norm": fuse_norm}},
    )  # fmt: skip
    for name, value in changes.items():
        setattr(config, name, value)
    return reach(model, config, Room(4), "cpu")


def steered(model: nn.Module, reached: Any) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for point in reached.points.values():
        point.make_slots(2)
        tensors = {"steer_down.weight": (4, HIDDEN), "steer_up.weight": (HIDDEN, 4), "steer_up.bias": (HIDDEN,)}
        values = {name: torch.randn(shape, generator=generator) / 8 for name, shape in tensors.items()}
        point.put(1, values, "silu")
    return model


def rms_norm() -> nn.Module:
    from vllm.model_executor.layers.layernorm import RMSNorm

    norm = RMSNorm(HIDDEN, eps=1e-5)
    nn.init.normal_(norm.weight, 1, 0.3)
    return norm


def gemma_norm() -> nn.Module:
    from vllm.model_executor.layers.layernorm import GemmaRMSNorm

    norm = GemmaRMSNorm(HIDDEN)
    nn.init.normal_(norm.weight, 0, 0.3)
    return norm


def both(norm: Any, **changes: Any) -> tuple[nn.Module, Any, nn.Module, Any]:
    """Return a model fused and one unfused, with the same weights and adapters, and what was reached in each."""
    found: list[Any] = []
    for fuse_norm in (True, False):
        torch.manual_seed(0)
        model = Model(norm)
        reached = reached_in(model, fuse_norm, **changes)
        found += [steered(model, reached), reached]
    return tuple(found)  # type: ignore[return-value]


def fill(reached: Any) -> None:
    reached.batch.fill([1, -1, 1], [2.0, 0.0, -0.5], [None] * 3, [3, 1, 2], [0, 0, 0], [3, 1, 2])


@pytest.mark.parametrize("norm", [rms_norm, gemma_norm])
def test_vllm_norms_steer_as_layers_do(config, norm):
    fused, of_fused, plain, of_plain = both(norm)
    assert of_fused.unfused == of_plain.unfused == {}
    assert all(type(layer) is Layer for layer in fused.layers) and all(p.link for p in of_fused.points.values())
    x = torch.randn(6, HIDDEN)
    with torch.inference_mode():
        for reached in (of_fused, of_plain):
            reached.batch.rest()
        assert all(torch.equal(a, b) for a, b in zip(fused(x.clone()), plain(x.clone()), strict=True))
        for reached in (of_fused, of_plain):
            fill(reached)
        for a, b in zip(fused(x.clone()), plain(x.clone()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        of_plain.batch.rest()
        assert not torch.allclose(fused(x.clone())[1], plain(x.clone())[1], rtol=1e-2)


@pytest.mark.parametrize("norm", [rms_norm, gemma_norm])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_vllm_norms_take_one_call_a_layer_and_none_of_vllms(config, compiled, norm):
    """A steered batch calls the op of one launch once a layer. In an idle one vLLM's own kernel runs, if it has one."""
    fused, reached, *_ = both(norm)
    calls: list[str] = []
    for index, point in reached.points.items():
        original = point.steer_and_normalise
        point.steer_and_normalise = lambda *a, f=original, i=index: (calls.append(f"steer {i}"), f(*a))[1]
        native = point.link.native
        assert (native is None) == (norm is gemma_norm), "vLLM has no kernel for Gemma's norm"
        if native is not None:
            point.link.native = lambda *a, f=native: (calls.append("own"), f(*a))[1]
    model = torch.compile(fused, fullgraph=True, backend="aot_eager") if compiled else fused
    ours = [f"steer {i}" for i in range(3)]
    expected = {"steered": ours, "idle": [] if not compiled else ours if norm is gemma_norm else ["own"] * 3}
    x = torch.randn(6, HIDDEN)
    with torch.inference_mode():
        for batch in ("steered", "idle", "steered"):
            fill(reached) if batch == "steered" else reached.batch.rest()
            calls.clear()
            out = model(x.clone())
            assert calls == expected[batch]
            exact = fused(x.clone())
            for a, b in zip(out, exact, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_vllm_norms_a_compiled_graph_has_no_copies_and_no_norm_beside_the_op(config):
    """Inductor's code has the op once a layer, in place, and no other kernel but the products and the first norm."""
    from torch._inductor.utils import run_and_get_code

    fused, reached, *_ = both(rms_norm)
    fill(reached)
    with torch.inference_mode():
        _, (code,) = run_and_get_code(torch.compile(fused, fullgraph=True), torch.randn(6, HIDDEN))
    assert code.count("fused_steer.steer_and_normalise_in_vllm.default(") == 3
    assert not any(other in code for other in ("fused_add_rms_norm", "cpp_fused_", "copy_(", ".clone("))


def test_vllm_norms_what_cannot_be_fused_says_why(config, monkeypatch):
    """Each case is steered at the layers' ends, with the reason."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(HIDDEN)

        def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
            return self.norm(x) if residual is None else (self.norm(x + residual), x + residual)

    compilation = {"max_cudagraph_capture_size": None, "mode": 3}
    quantized = SimpleNamespace(
        hf_text_config=SimpleNamespace(num_hidden_layers=3), get_hidden_size=lambda: HIDDEN, dtype=torch.float32,
        quantization="fp8",
    )  # fmt: skip
    passes, none = SimpleNamespace(fuse_allreduce_rms=True), SimpleNamespace()
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (Shifted, {}, "Shifted is no RMSNorm: it has other tensors than one weight of the hidden size"),
        (
            rms_norm,
            {"speculative_config": SimpleNamespace(method="eagle3")},
            "speculative decoding by eagle3 may read hidden states between layers",
        ),
        (
            rms_norm,
            {"compilation_config": SimpleNamespace(**compilation, pass_config=passes)},
            "vLLM's compiler looks for its own norms (fuse_allreduce_rms)",
        ),
        (
            rms_norm,
            {
                "compilation_config": SimpleNamespace(**compilation, pass_config=none),
                "model_config": quantized,
            },
            "compiled norms are fused with the quantization (fp8) that follows",
        ),
    ]
    x = torch.randn(6, HIDDEN)
    for norm, changes, reason in cases:
        fused, of_fused, plain, of_plain = both(norm, **changes)
        assert of_fused.unfused == dict.fromkeys(range(3), reason)
        assert not any(point.link for point in of_fused.points.values())
        for reached in (of_fused, of_plain):
            fill(reached)
        with torch.inference_mode():
            assert all(torch.equal(a, b) for a, b in zip(fused(x.clone()), plain(x.clone()), strict=True))
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert set(reached_in(Model(rms_norm)).unfused.values()) == {
        "VLLM_BATCH_INVARIANT is set, and the kernel depends on the number of tokens"
    }


def test_vllm_norms_one_norm_for_two_layers_is_fused_once(config):
    torch.manual_seed(0)
    model = Model(rms_norm)
    model.layers[2].norm = model.layers[1].norm
    reached = reached_in(model)
    assert reached.unfused == {1: "its RMSNorm reads another layer's output too"}


def test_vllm_norms_a_path_that_is_no_module_is_not_fused(config):
    """A layer may lack the norm that its class's source names. It is steered at its end."""
    torch.manual_seed(0)
    model = Model(rms_norm)
    del model.layers[2].norm
    model.layers[2].norm = None
    assert reached_in(model).unfused == {1: "Layer.norm is no module"}


def test_vllm_norms_another_stage_and_layers_without_slots(config):
    from vllm.model_executor.models.utils import PPMissingLayer

    torch.manual_seed(0)
    model = Model(rms_norm)
    model.layers[2] = PPMissingLayer()
    reached = reached_in(model)
    assert reached.unfused == {1: "the next layer is in another pipeline stage"}
    assert reached.points[0].link is not None


def test_vllm_norms_a_residual_that_is_missing_is_an_error(config):
    fused, reached, *_ = both(rms_norm)
    fill(reached)
    with pytest.raises(RuntimeError, match="the norm behind layer 2 got no residual; expected one"):
        fused.norm(torch.randn(6, HIDDEN))


def test_vllm_norms_the_option_is_true_or_false():
    from fused_steer.vllm.options import read_server_options

    assert read_server_options({"fuse_norm": True}).fuse_norm and not read_server_options({}).fuse_norm
    with pytest.raises(TypeError, match="steering.fuse_norm is 'yes'; expected true or false"):
        read_server_options({"fuse_norm": "yes"})
