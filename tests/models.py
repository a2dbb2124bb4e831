"""Tiny random models, and the reference for steered models: plain forward hooks with autograd."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

# For these tiny models a second thread costs more time than it saves: on a busy machine, a hundredfold.
torch.set_num_threads(1)

VOCABULARY, HIDDEN, LAYERS = 64, 32, 3
DRAWS = 4

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # large enough that logits differ clearly
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_EIGHT_WIDE_HEADS = {"head_dim": 8}
_WITHOUT_GROUPED_HEADS = {"num_key_value_heads": None}

#: name -> model type, and its config's fields beside the common sizes (None removes a common size).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", _EIGHT_WIDE_HEADS),
    "gemma2": ("gemma2", _EIGHT_WIDE_HEADS),
    "gemma3": ("gemma3_text", _EIGHT_WIDE_HEADS),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {"residual_multiplier": 0.5}),
    "cohere": ("cohere", {"logit_scale": 1.0}),
    "gpt_neox-parallel": ("gpt_neox", {"use_parallel_residual": True, **_WITHOUT_GROUPED_HEADS}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False, **_WITHOUT_GROUPED_HEADS}),
    "gpt2": ("gpt2", {"n_inner": 64, "intermediate_size": None, **_WITHOUT_GROUPED_HEADS}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "qwen3_moe",
        {**_EIGHT_WIDE_HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
}


def build(family: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Build a model of the family with random weights from `seed`, in float32 and eval mode."""
    model_type, own = FAMILIES[family]
    fields = {name: value for name, value in {**_SIZES, **own}.items() if value is not None or name.endswith("_id")}
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields | overrides)).eval()


def classifier(family: str = "llama", seed: int = 0, cls: Any = AutoModelForSequenceClassification) -> PreTrainedModel:
    """Build a model of the family with a random head, by default a classifier of three classes, in eval mode."""
    config = build(family).config
    config.num_labels = 2 if cls is AutoModelForQuestionAnswering else 3
    torch.manual_seed(seed)
    return cls.from_config(config).eval()


def tokens(seed: int = 0, batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def build_frozen(family: str = "llama", **overrides: Any) -> PreTrainedModel:
    """Build a frozen model, as patching leaves it. PyTorch may multiply frozen matrices in another order."""
    return build(family, **overrides).requires_grad_(False)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def generate(model: PreTrainedModel, **options: Any) -> tuple[Tensor, Tensor]:
    """Generate six greedy tokens; return the whole sequences and the logits of each step."""
    options |= {"return_dict_in_generate": True, "output_logits": True}
    output = model.generate(tokens(), max_new_tokens=6, do_sample=False, **options)
    return output.sequences, torch.stack(output.logits)


def gradients(
    model: nn.Module, parameters: Mapping[str, Tensor], draws: int = DRAWS, **options: Any
) -> dict[str, Tensor]:
    """Compute the gradients of the language-modelling loss for several draws of tokens: (draws, ...) per parameter."""
    found: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for seed in range(draws):
        for parameter in parameters.values():
            parameter.grad = None
        torch.manual_seed(seed)  # the same dropout each time
        model(tokens(seed), labels=tokens(seed), **options).loss.backward()
        for name, parameter in parameters.items():
            found[name].append(parameter.grad)
    return {name: torch.stack(drawn) for name, drawn in found.items()}


def input_gradient(model: PreTrainedModel, **options: Any) -> Tensor:
    """Compute the gradient of the embedded tokens: the only gradient of a frozen model without adapters."""
    found = []
    for seed in range(DRAWS):
        embedded = model.get_input_embeddings()(tokens(seed)).detach().requires_grad_()
        torch.manual_seed(seed)  # the same dropout each time
        model(inputs_embeds=embedded, labels=tokens(seed), **options).loss.backward()
        found.append(embedded.grad)
    return torch.stack(found)


def steering_parameters(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """Return an adapter's parameters by path, without its name: `model.layers.0.post_block.steer_up.weight`."""
    named = ((name.split(f".{adapter}."), p) for name, p in model.named_parameters() if ".steer_" in name)
    return {".".join(parts): p for parts, p in named if len(parts) == 2}


def randomize(model: nn.Module, adapter: str = "default", seed: int = 1) -> dict[str, nn.Parameter]:
    """Give all parameters of an adapter random values, so that it changes the model's output."""
    generator = torch.Generator().manual_seed(seed)
    parameters = steering_parameters(model, adapter)
    assert parameters
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return parameters


class Hooked:
    """The reference: a copy of an unpatched model, steered by forward hooks and differentiated by autograd.

    Attributes:
        leaves: copies of the adapter's parameters, by the same names.
        states: the last output of each hook, by the path of the layer, or of a site that is not post_block.
        calls: how often each hook ran, by the site's path.
        modules: the module of a layer where each site is that is not post_block.
    """

    def __init__(
        self,
        base: nn.Module,
        parameters: Mapping[str, Tensor],
        *,
        scale: float = 1.0,
        activation: Callable[[Tensor], Tensor] = F.silu,
        modules: Mapping[str, str] | None = None,
    ) -> None:
        self.modules = modules or {}
        self.calls: dict[str, int] = {}
        self.base = copy.deepcopy(base)
        self.model = copy.deepcopy(base).requires_grad_(False)
        self.leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in parameters.items()}
        self.states: dict[str, Tensor] = {}
        self.scale, self.activation = scale, activation
        for path in dict.fromkeys(name.partition(".steer_")[0] for name in parameters):
            layer, _, site = path.rpartition(".")
            module = self.model.get_submodule(layer if site == "post_block" else f"{layer}.{self.modules[site]}")
            if site == "pre_mlp":
                module.register_forward_pre_hook(self._pre_hook(path), with_kwargs=True)
            else:
                module.register_forward_hook(self._hook(path))

    def double(self) -> Hooked:
        """Return this model in float64, as the truth. Parts of a model's own code may still use less."""
        base = copy.deepcopy(self.base).double()
        if hasattr(base, "set_experts_implementation"):
            base.set_experts_implementation("eager")  # the grouped products do not support float64
        leaves = {name: leaf.double() for name, leaf in self.leaves.items()}
        return Hooked(base, leaves, scale=self.scale, activation=self.activation, modules=self.modules)

    def _hook(self, path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            in_sequence = isinstance(output, (tuple, list))
            hidden, *rest = output if in_sequence else (output,)
            steered = self._steer(path, hidden)
            return type(output)((steered, *rest)) if in_sequence else steered

        return hook

    def _pre_hook(self, path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if args:
                return (self._steer(path, args[0]), *args[1:]), kwargs
            name, hidden = next(iter(kwargs.items()))
            return args, {**kwargs, name: self._steer(path, hidden)}

        return hook

    def _steer(self, path: str, hidden: Tensor) -> Tensor:
        steered = hidden + self.scale * self._shift(path, hidden)
        self.states[path.removesuffix(".post_block")] = steered
        self.calls[path] = self.calls.get(path, 0) + 1
        return steered

    def _shift(self, path: str, hidden: Tensor) -> Tensor:
        w1, b1, w2, b2 = (
            self.leaves.get(f"{path}.{name}")
            for name in ("steer_down.weight", "steer_down.bias", "steer_up.weight", "steer_up.bias")
        )
        if w1 is None:
            return b2.expand_as(hidden)
        return F.linear(self.activation(F.linear(hidden, w1, b1)), w2, b2)


Result = Tensor | Mapping[str, Tensor]

#: The relative difference allowed to float32 sums in another order.
ROUNDING = 1e-6


def _kinds(result: Result) -> dict[str, Tensor]:
    """Concatenate each kind of parameter over all layers. A short bias may nearly cancel in one layer, not in all."""
    if isinstance(result, Tensor):
        return {"": result.detach().double().flatten()}
    kinds: dict[str, list[Tensor]] = {}
    for name in sorted(result):
        kinds.setdefault(re.sub(r"\d+", "*", name), []).append(result[name].detach().double().flatten())
    return {kind: torch.cat(parts) for kind, parts in kinds.items()}


def difference(actual: Result, expected: Result) -> dict[str, float]:
    """Compute ‖actual − expected‖ / ‖expected‖ by kind of parameter; a single tensor has the name ""."""
    of, to = _kinds(actual), _kinds(expected)
    assert of.keys() == to.keys() and of
    assert all(truth.isfinite().all() and truth.norm() > 0 for truth in to.values())
    return {kind: ((of[kind] - truth).norm() / truth.norm()).item() for kind, truth in to.items()}


def assert_close(actual: Result, expected: Result, *, unsteered: Sequence[Result] | None = None) -> None:
    """Assert that two results are equal up to rounding.

    unsteered: the unsteered model's results in two ways, if PyTorch or transformers may compute the model in either.
    Twice the difference between them is allowed.
    """
    _assert_same_form(actual, expected)
    bound = ROUNDING + (2 * max(difference(*unsteered).values()) if unsteered else 0.0)
    for kind, error in difference(actual, expected).items():
        assert error <= bound, f"relative difference {kind} {error:.2e}; expected at most {bound:.1e}"


def assert_no_worse(actual: Result, hooked: Result, truth: Result) -> None:
    """Assert that the error is at most twice that of plain hooks in the same dtype, plus rounding."""
    _assert_same_form(actual, hooked)
    errors, bounds = difference(actual, truth), difference(hooked, truth)
    for kind, error in errors.items():
        bound = 2 * bounds[kind] + ROUNDING
        assert error <= bound, f"relative error {kind} {error:.2e}; expected at most {bound:.1e}"


def _assert_same_form(actual: Result, expected: Result) -> None:
    form = [
        {name: (t.shape, t.dtype) for name, t in (r.items() if isinstance(r, Mapping) else [("", r)])}
        for r in (actual, expected)
    ]
    assert form[0] == form[1] and form[0]


def assert_as_exact_as_hooks(
    model: nn.Module, parameters: Mapping[str, Tensor], hooked: Hooked, truth: Hooked | None = None
) -> None:
    """Assert that logits and gradients of a steered model are as exact as with hooks.

    The truth, unless given, is the hooked model in float64.
    """
    truth = truth or hooked.double()
    assert_no_worse(*map(logits, (model, hooked.model, truth.model)))
    pairs = (model, parameters), (hooked.model, hooked.leaves), (truth.model, truth.leaves)
    assert_no_worse(*(gradients(network, leaves) for network, leaves in pairs))


def skip_without_add_adapter() -> None:
    """Skip a test of `model.add_adapter` or `load_adapter` if transformers needs a newer PEFT than is installed.

    transformers 5.24, for instance, needs PEFT 0.22 for these methods.
    """
    from transformers.integrations.peft import MIN_PEFT_VERSION

    if Version(metadata.version("peft")) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"this transformers needs PEFT {MIN_PEFT_VERSION} or later to add adapters")


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Record everything of a model that patching may change. It must be the same after unpatching or a refusal."""
    modules = {
        path: (type(module), sorted(vars(module)), _hooks(module._forward_hooks), _hooks(module._forward_pre_hooks))
        for path, module in model.named_modules()
    }
    parameters = {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()}
    return {"modules": modules, "parameters": parameters, "state": list(model.state_dict())}


def _hooks(hooks: Mapping[int, Any]) -> list[Any]:
    return list(hooks.values())


@contextlib.contextmanager
def refused(
    error: type[BaseException] | tuple[type[BaseException], ...], *parts: str, model: nn.Module | None = None
) -> Iterator[None]:
    """Assert that the `with` block raises a one-line error with all of `parts` and leaves `model` unchanged."""
    before = snapshot(model) if model is not None else None
    with pytest.raises(error) as caught:
        yield
    message = caught.value.args[0]  # not str(), because str() of a KeyError has quotes
    assert "\n" not in message
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in {message!r}"
    assert model is None or snapshot(model) == before
