"""`fused-steer coverage`: checks fused-steer on every causal language model of the installed transformers.

Each model type of `AutoModelForCausalLM` is built tiny, with random weights, from its config class. It is patched and
compared with the unpatched model and with plain forward hooks, in a process of its own: at the site post_block, and at
post_mlp.
"""

from __future__ import annotations

import copy
import logging
import math
import multiprocessing
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..adapters.parameters import DOWN, DOWN_BIAS, SITE, UP, UP_BIAS, by_place, of_adapter, split_path
from ..config import SteerConfig
from ..model.sublayers import find_in, parts_of
from ..patch import patch_model
from .coverage_table import TOLERANCE, Row, markdown, summary

__all__ = ["MODEL_TYPES", "Row", "build", "check", "check_all", "markdown", "summary"]

#: All model types that AutoModelForCausalLM knows.
MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# ---------------------------------------------------------------------------------------------------------------------
# Tiny models

VOCABULARY, HIDDEN, HEADS, LAYERS = 128, 64, 4, 3

#: The small value of a number in a config, by the number's name. The first full match counts.
_SIZES: tuple[tuple[str, float], ...] = (
    (r"(.*_)?vocab_size(_.*)?", VOCABULARY),
    (r"(max_|n_)?(position_embeddings|positions|ctx|seq_len|(source|target)_positions|context_length)", 128),
    (r"hidden_size(_global)?|d_model|n_embd|emb_dim|embedding_dim|(.*_)?embedding_size|word_embed_proj_dim", HIDDEN),
    (r"adapter_(input_size|in_dim|out_dim)", HIDDEN),
    (r"(.*_)?(intermediate_size(_mlp)?|ffn_dim|ffn_hidden_size)|n_inner|dff|dim_ff|d_inner|feed_forward_size", 96),
    (r"(num_|n_)?((hidden|encoder|decoder)_)?layers?|num_blocks|depth", LAYERS),
    (r"(.*_)?(num_)?key_value_heads|num_kv_heads|num_query_groups", HEADS // 2),
    (r"(num_)?((.*_)?attention_)?heads|n_heads?|(.*_)?num_attention_heads", HEADS),
    (r"(.*_)?head_dim|d_head|dim_head|d_kv|kv_channels|attention_head_size", HIDDEN // HEADS),
    (r"rotary_dim", HIDDEN // HEADS // 2),
    (r"(.*_)?(lora_rank|lowrank|laurel_rank|rank)", 16),
    (r"(moe_)?num_(local_)?experts|n_routed_experts", 4),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk|n_group|topk_group|num_expert_group", 1),
    (r"(mamba_)?d_state|(ssm_)?state_size", 8),
    (r"(mamba_)?chunk_size", 16),
    (r"initializer_range|init_std", 0.1),
)
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

#: Config values for model types that the rules above do not make buildable.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"clip_qkv": 8.0, "kv_n_heads": HEADS // 2, "rope_theta": 10000.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {"moe_topk": 2, "zero_expert_num": 2},
    "mamba2": {"num_heads": 2 * HEADS},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "nemotron": {"num_key_value_heads": HEADS // 2},
    "qwen4_exp_text": {
        "eos_token_id": 2,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "indexer_head_dim": HIDDEN // HEADS,
        "indexer_kv_heads": 1,
        "indexer_n_heads": HEADS,
        "ngram_vocab_size_base": VOCABULARY,
        "ple_layer_ids": [1],
    },
    "reformer": {"axial_pos_embds_dim": (HIDDEN // 2, HIDDEN // 2), "axial_pos_shape": (8, 16)},
    "xlstm": {"hidden_size": 2 * HIDDEN},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
}


def _tiny(config: PreTrainedConfig) -> dict[str, Any]:
    """Return arguments for a small config like `config`. Numbers follow _SIZES, lists have one entry a layer."""
    values: dict[str, Any] = {}
    own = vars(config)
    # A value whose default is None was computed from the other values. The small config computes it again.
    free = {field.name for field in fields(config) if field.default is not None}
    layers = _layers(config)
    for name, value in own.items():
        if isinstance(value, PreTrainedConfig):
            values[name] = {"model_type": value.model_type} | _tiny(value)
        elif name == "is_decoder":
            values[name] = True
        elif name == "head_dim" and value is None:
            values[name] = HIDDEN // HEADS
        elif name in _TOKENS:
            values[name] = _TOKENS[name]
        elif type(value) in (int, float) and name in free:
            size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)
            if size is not None:
                values[name] = size
        elif isinstance(value, (list, tuple)) and len(value) == getattr(config, "num_hidden_layers", None):
            values[name] = type(value)(value[i] for i in layers)
    if "kv_lora_rank" in values:  # multi-head latent attention has no groups of heads
        values["num_key_value_heads"] = HEADS
    return values | _OVERRIDES.get(config.model_type, {})


def _layers(config: PreTrainedConfig) -> list[int]:
    """Choose LAYERS indices of the layers of `config`: the first of each kind, then the first layers."""
    count = getattr(config, "num_hidden_layers", None) or 0
    kinds = [v for v in vars(config).values() if isinstance(v, (list, tuple)) and v and isinstance(v[0], str)]
    firsts = {kind.index(name) for kind in kinds if len(kind) == count for name in kind}
    return sorted(sorted(range(count), key=lambda i: (i not in firsts, i))[:LAYERS])


def build(model_type: str, seed: int = 0) -> PreTrainedModel:
    """Build a tiny model of the type with random weights from `seed`, in float32, in eval mode and frozen."""
    config_class = CONFIG_MAPPING[model_type]
    config = config_class(**_tiny(config_class()))
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    # For a multimodal model the class may be that of the text part.
    parts = (part for part in (config, *vars(config).values()) if isinstance(part, model_class.config_class))
    torch.manual_seed(seed)
    # Frozen before patching too: PyTorch multiplies matrices that need gradients in another order.
    return model_class._from_config(next(parts, config)).float().eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# The checks

_CONFIG = SteerConfig(rank=4, scale=0.7, down_bias=True, up_bias=True)
_POST_MLP = replace(_CONFIG, site="post_mlp")


class Wrong(Exception):
    """A patched model gave a wrong result. The message says which, in one line."""


def check(
    model: PreTrainedModel,
    model_type: str = "",
    patch: Callable[..., Any] = patch_model,
    config: SteerConfig = _CONFIG,
) -> Row:
    """Patch `model`, compare it with the unpatched model and with plain hooks, and unpatch it.

    After patching, and again after unpatching, logits and greedy generation must equal the original model's bit for
    bit. With a random adapter, logits, generation and the adapter's gradients must equal, within TOLERANCE by norm,
    those of a copy steered by plain forward hooks. Each layer must have steered as often as its hook. Where rounding
    alone moves a gradient further, its error against float64 must be at most twice that of the hooks.
    """
    row = Row(model_type, type(model).__name__, "raises")
    try:
        original = copy.deepcopy(model)
        before, note = _outputs(model)
        if not all(map(torch.equal, before.values(), _outputs(model)[0].values())):
            raise ValueError("two runs unpatched differ")
        if not all(tensor.isfinite().all() for tensor in before.values()):
            raise ValueError("its logits are not finite unpatched")
    except Exception as error:
        return replace(row, outcome="unbuilt", reason=f"does not run unpatched: {_one_line(error)}")
    row = replace(row, note=note)
    structure = _structure(model)
    try:
        patch(model, config)
    except ValueError as error:
        if _structure(model) != structure:
            return replace(row, outcome="wrong", reason=f"refused, but changed: {_one_line(error)}")
        return replace(row, outcome="refused", reason=_one_line(error))
    try:
        steering: Any = model.steering
        report = steering.report()
        hooked = [layer for layer in report if layer.kind != "fused"]
        row = replace(row, layers=len(report), hooked=len(hooked), reason="; ".join({h.reason: 0 for h in hooked}))
        _expect_same(before, _outputs(model)[0], "a fresh patch")
        worst = _compare(model, original)
        steering.unpatch()
        if _structure(model) != structure:
            raise Wrong("unpatch left something behind")
        _expect_same(before, _outputs(model)[0], "the unpatched model")
    except Wrong as wrong:
        return replace(row, outcome="wrong", reason=str(wrong))
    except Exception as error:
        return replace(row, outcome="raises", reason=_one_line(error))
    kinds = {layer.kind for layer in report}
    return replace(row, outcome="mixed" if len(kinds) > 1 else kinds.pop(), error=worst)


def check_norms(model: PreTrainedModel, row: Row, patch: Callable[..., Any] = patch_model) -> Row:
    """Patch `model` with fused norms, and compare it with the same model without them, within TOLERANCE by norm.

    A norm counts as fused if it took over the result of the steering in each pass. Unpatching must restore the model.
    """
    try:
        plain = copy.deepcopy(model)
        _outputs(model)  # some models change themselves in their first run
        structure, found = _structure(model), []
        for one, options in ((plain, {}), (model, {"fuse_norm": True})):
            patch(one, _CONFIG, **options)
            generator = torch.Generator().manual_seed(1)
            for parameter in of_adapter(one.named_parameters(), "default").values():
                parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            found.append(_outputs(one)[0])
        for name in found[0].keys() & {"logits", "generation"}:
            _expect_close(found[1][name], found[0][name], f"{name} with fused norms")
        steering: Any = model.steering
        report = steering.report()
        fused = [layer for layer in report if layer.norm == "fused" and layer.norm_calls == layer.calls]
        missed = [layer.norm for layer in report if layer.norm != "fused"]
        missed += ["its norm reads another tensor" for layer in report if layer.norm == "fused" and layer not in fused]
        steering.unpatch()
        if _structure(model) != structure:
            raise Wrong("unpatch left something of the fused norms behind")
    except Exception as error:
        return replace(row, outcome="wrong", reason=f"with fused norms: {_one_line(error)}")
    return replace(row, layers=len(report), norms=len(fused), norm_reason="; ".join(dict.fromkeys(missed)))


def _outputs(model: PreTrainedModel) -> tuple[dict[str, Tensor], str]:
    """Return logits, and tokens and logits of greedy generation. The note tells if the model does not generate."""
    ids = _tokens()
    with torch.no_grad():
        outputs = {"logits": model(input_ids=ids).logits}
    try:
        generate: Any = model.generate
        generated = generate(
            input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    except Exception as error:
        return outputs, f"does not generate: {_one_line(error)}"
    return outputs | {"generation": torch.stack(generated.logits), "tokens": generated.sequences}, ""


def _tokens() -> Tensor:
    """Return two sequences without special tokens."""
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


def _expect_same(expected: dict[str, Tensor], actual: dict[str, Tensor], what: str) -> None:
    for name, tensor in expected.items():
        if name not in actual:
            raise Wrong(f"{what} does not generate")
        if not torch.equal(actual[name], tensor):
            raise Wrong(f"{what} has other {name}: relative error {_error(actual[name], tensor):.1e}")


def _error(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return math.inf
    error = ((actual - expected).double().norm() / expected.double().norm()).item()
    return math.inf if math.isnan(error) else error


def _compare(model: PreTrainedModel, original: PreTrainedModel) -> float:
    """Return the largest relative error of the model, with a random adapter, against `original` under plain hooks."""
    generator = torch.Generator().manual_seed(1)
    steering: Any = model.steering
    parameters = of_adapter(model.named_parameters(), steering.active)
    for parameter in parameters.values():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    unsteered = _outputs(original)[0]
    hooks = PlainHooks(original, parameters)
    steering.reset_calls()
    worst = 0.0
    expected, actual = _outputs(original)[0], _outputs(model)[0]
    for name in expected.keys() & {"logits", "generation"}:
        if not expected[name].isfinite().all():
            raise ValueError("its logits are not finite when steered by plain hooks")
        if _error(unsteered[name], expected[name]) < 0.01:
            raise Wrong(f"the adapter hardly changes the {name}")
        worst = max(worst, _expect_close(actual[name], expected[name], name))
    calls = {layer.path: layer.calls for layer in steering.report()}
    if calls != hooks.calls:
        raise Wrong(f"the sites were called {calls} times; expected {hooks.calls}")
    names, leaves = zip(*hooks.leaves.items(), strict=True)
    ours, theirs = _gradients(model, [parameters[name] for name in names]), _gradients(original, leaves)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, left, right in zip(names, ours, theirs, strict=True):
        if (left is None) != (right is None):
            raise Wrong(f"the gradient of {name} exists in only one of the steered model and plain hooks")
        if left is not None and right is not None and right.norm() > 0:
            pairs[name] = left, right
    errors = {name: _error(*pair) for name, pair in pairs.items()}
    if not all(error <= TOLERANCE for error in errors.values()):
        _expect_as_exact(pairs, dict(zip(names, _gradients(original.double(), leaves), strict=True)))
    return max(worst, *errors.values())


def _expect_as_exact(pairs: Mapping[str, tuple[Tensor, Tensor]], truths: Mapping[str, Tensor | None]) -> None:
    """Raise Wrong if our error against float64, over all layers, is more than twice that of the hooks plus 1e-6.

    pairs: our gradients and the hooks'. truths: the hooks' gradients in float64.
    """
    kinds: dict[str, list[float]] = {}
    for name, pair in pairs.items():
        truth: Any = truths[name]
        sums = kinds.setdefault(split_path(name)[2], [0.0, 0.0, 0.0])
        for place, value in enumerate((*(one - truth for one in pair), truth)):
            sums[place] += float(value.double().square().sum())
    for kind, (ours, theirs, norm) in kinds.items():
        error, allowed = (ours / norm) ** 0.5, 2 * (theirs / norm) ** 0.5 + 1e-6
        if not error <= allowed:
            raise Wrong(
                f"gradients of {kind}: relative error {error:.1e} against float64; expected at most {allowed:.1e}, "
                "twice that of plain hooks"
            )


def _expect_close(actual: Tensor, expected: Tensor, what: str) -> float:
    error = _error(actual, expected)
    if not error <= TOLERANCE:
        raise Wrong(f"{what}: relative error {error:.1e} against plain hooks; expected at most {TOLERANCE:.0e}")
    return error


def _gradients(model: PreTrainedModel, leaves: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    cached = getattr(model.config, "use_cache", None)
    model.config.use_cache = False  # a cache may be written in place, which autograd refuses
    logits = model(input_ids=_tokens()).logits
    model.config.use_cache = cached
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    return torch.autograd.grad((logits * weights).mean(), leaves, allow_unused=True)


class PlainHooks:
    """Steers a model by plain PyTorch forward hooks and autograd, with copies of a patched model's parameters.

    leaves: the copies, by the parameters' paths. calls: the number of runs of each layer, by path.
    """

    def __init__(self, model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
        self.leaves = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
        layers_path, places = by_place(self.leaves)
        self.calls = {f"{layers_path}.{place.layer}": 0 for place in places}
        for path, place, leaves in zip(self.calls, places, places.values(), strict=True):
            layer = model.get_submodule(path)
            module = layer if place.site == SITE else layer.get_submodule(_mlp(layer))
            module.register_forward_hook(self._hook(path, leaves))

    def _hook(self, path: str, leaves: dict[str, Tensor]) -> Callable[..., Any]:
        down, down_bias, up, up_bias = (leaves[name] for name in (DOWN, DOWN_BIAS, UP, UP_BIAS))

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            self.calls[path] += 1
            hidden, *rest = output if isinstance(output, (tuple, list)) else (output,)
            w1, b1, w2, b2 = (leaf.to(hidden.dtype) for leaf in (down, down_bias, up, up_bias))
            hidden = hidden + _CONFIG.scale * F.linear(F.silu(F.linear(hidden, w1, b1)), w2, b2)
            return type(output)((hidden, *rest)) if isinstance(output, (tuple, list)) else hidden

        return hook


def _mlp(layer: nn.Module) -> str:
    """The path of a layer's MLP, or of the last of the modules that it is."""
    (path,) = find_in(type(layer), "post_mlp", parts_of(layer, type(layer))).modules
    return path


def _structure(model: nn.Module) -> Any:
    """Return everything that patching may change: classes, attributes, hooks and parameters."""
    modules = {
        path: (type(m), sorted(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
        for path, m in model.named_modules()
    }
    return modules, {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}, list(model.state_dict())


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= 200 else f"{text[:199]}…"
    return text if type(error) is ValueError else f"{type(error).__name__}: {text}"


# ---------------------------------------------------------------------------------------------------------------------
# All of them, each in its own process


def run(model_type: str) -> Row:
    """Build and check one model type in this process."""
    start = time.perf_counter()
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    row = Row(model_type, name if isinstance(name, str) else name[0], "unbuilt")
    try:
        model = build(model_type)
    except Exception as error:
        row = replace(row, reason=_one_line(error))
    else:
        row = replace(check(model, model_type), model_class=row.model_class)
        if row.outcome != "unbuilt":
            post_mlp = check(build(model_type), model_type, config=_POST_MLP)
            row = replace(row, post_mlp=replace(post_mlp, model_class=row.model_class))
        if row.passes:
            row = check_norms(build(model_type), row)
    return replace(row, seconds=time.perf_counter() - start)


def check_all(model_types: Sequence[str] = MODEL_TYPES, jobs: int = 2, seconds: float = 120.0) -> Iterator[Row]:
    """Yield a Row for each model type, in order. Each has its own process and `seconds`; `jobs` run at a time.

    Raises:
        ValueError: transformers has no causal language model of a given type, or `jobs` is not positive.
    """
    unknown = [model_type for model_type in model_types if model_type not in MODEL_TYPES]
    if unknown:
        raise ValueError(f"model type is {unknown[0]!r}; expected one of a causal language model, such as 'llama'")
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}; expected at least 1")
    # The fork server has imported everything, so its processes start at once. They are as clean as new ones.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda model_type: _run_apart(context, model_type, seconds), model_types)


def _run_apart(context: Any, model_type: str, seconds: float) -> Row:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, model_type), daemon=True)
    process.start()
    sender.close()  # so that the receiver sees the end of a process that dies
    row = Row(model_type, str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]), "raises")
    try:
        if receiver.poll(seconds):
            return receiver.recv()
        process.kill()
        return replace(row, reason=f"took more than {seconds:g} s", seconds=seconds)
    except EOFError:
        process.join()
        return replace(row, reason=f"its process ended with exit code {process.exitcode}")
    finally:
        process.join()
        receiver.close()


def _work(sender: Connection, model_type: str) -> None:
    torch.set_num_threads(1)  # more threads slow tiny models down
    transformers.logging.set_verbosity_error()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    sender.send(run(model_type))
