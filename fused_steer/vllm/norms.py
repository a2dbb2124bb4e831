"""Fuses a steered layer's output with the norm that reads it, for servers with the option `steering.fuse_norm`.

A vLLM layer that returns (hidden, residual) leaves its last add to the next norm, which adds and normalises by one
kernel. A linked norm does both, and the steering, by one kernel of `post_block_grouped_norm`. So the steering takes no
launch and no pass of its own. Without adapters in a batch, vLLM's own kernel runs.

The shift is added where the norm reads the layer's output, so nothing else may read it before. That is read from the
sources: the next layer gives the pair to a norm before all else, and the model's loop gives it from layer to layer and
to the last norm. What kind of norm it is, is measured by numbers. Where either cannot be told, the layer is steered at
its end, and `link_norms` says why.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from vllm import envs

from ..kernels.norm_torch import Norm
from ..kernels.norm_torch import forward as formula
from ..kernels.registered import register
from ..model.following import Kind, NotFused, measure
from .layers import UNADDED, SteeringPoint, point_of, returned_state
from .options import KEY

#: Methods of speculative decoding that read no hidden state between two layers.
_READ_NO_STATES = ("ngram", "ngram_gpu", "suffix", "draft_model")
#: vLLM's passes over compiled graphs that look for its own norm.
_PASSES = ("fuse_norm_quant", "fuse_allreduce_rms", "enable_sp")


# ----------------------------------------------------------------------------------------------------------- structure


def _source(cls: type[nn.Module]) -> ast.FunctionDef:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward))))
    except (OSError, TypeError, SyntaxError):
        raise NotFused(f"{cls.__name__} has no source to read") from None
    function = tree.body[0] if len(tree.body) == 1 else None
    if not isinstance(function, ast.FunctionDef) or not function.args.args:
        raise NotFused(f"{cls.__name__}.forward is no plain function")
    return function


def _names(node: ast.AST) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def _path(node: ast.expr, own: str) -> str | None:
    """Return the path of `<own>.<path>`, or None for any other expression."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed(parts)) if parts and isinstance(node, ast.Name) and node.id == own else None


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _norm_call(statements: Sequence[ast.stmt], own: str, hidden: str, residual: str) -> tuple[str, ast.expr] | None:
    """Return the path of `hidden, … = self.<path>(hidden, residual)`, the one statement given, and the second target.

    The statement may lie in the branch of an `if` in which residual is there.
    """
    if len(statements) != 1:
        return None
    (statement,) = statements
    if isinstance(statement, ast.If):
        test = statement.test
        if not (isinstance(test, ast.Compare) and _is_name(test.left, residual) and len(test.ops) == 1):
            return None
        if not (isinstance(test.comparators[0], ast.Constant) and test.comparators[0].value is None):
            return None
        branches = {ast.Is: statement.orelse, ast.IsNot: statement.body}
        return _norm_call(branches.get(type(test.ops[0]), []), own, hidden, residual)
    parts = _call_to_pair(statement)
    if parts is None:
        return None
    call, (first, second) = parts
    path = _path(call.func, own)
    given = [node.id for node in call.args if isinstance(node, ast.Name)]
    if path is None or call.keywords or len(call.args) != 2 or given != [hidden, residual]:
        return None
    return (path, second) if _is_name(first, hidden) else None


def _call_to_pair(statement: ast.stmt) -> tuple[ast.Call, list[ast.expr]] | None:
    """Return the call and the two targets of `a, b = f(…)`, or None for any other statement."""
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return None
    call, target = statement.value, statement.targets[0]
    if not isinstance(call, ast.Call) or not isinstance(target, ast.Tuple) or len(target.elts) != 2:
        return None
    return call, target.elts


@functools.cache
def first_norm(cls: Any) -> str:
    """Return the path of the norm that a decoder layer of this class gives (hidden, residual) before all else.

    Raises:
        NotFused: there is none.
    """
    function = _source(cls)
    own, *arguments = (argument.arg for argument in function.args.args)
    returned = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
    seconds = [value.elts[1] for value in returned if isinstance(value, ast.Tuple) and len(value.elts) == 2]
    residuals = {node.id for node in seconds if isinstance(node, ast.Name)} & set(arguments)
    if len(residuals) == 1:
        (residual,) = residuals
        read: set[str] = set()
        for statement in function.body:
            if residual in _names(statement):
                for hidden in arguments:
                    found = _norm_call([statement], own, hidden, residual)
                    if found is not None and hidden not in read and _is_name(found[1], residual):
                        calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
                        if sum(_path(call.func, own) == found[0] and len(call.args) != 1 for call in calls) == 1:
                            return found[0]
                break
            read |= _names(statement)
    raise NotFused(f"{cls.__name__} does not give its inputs to a norm before all else")


def _reads_for_drafts(statement: ast.stmt) -> bool:
    """Return whether a statement keeps hidden states for speculative decoding, as vLLM's models name that."""
    return "aux_hidden_state" in ast.unparse(statement)


@functools.cache
def last_norm(cls: Any) -> str | None:
    """Check that a model's loop hands (hidden, residual) from layer to layer. Return the path of the norm behind it.

    None if the model does something else with the last layer's output first.

    Raises:
        NotFused: the loop does something else with the pair, or there is no such loop.
    """
    function = _source(cls)
    own = function.args.args[0].arg
    unknown = NotFused(f"{cls.__name__} is not known to hand a layer's output to the next layer unread")
    loops = [(place, node) for place, node in enumerate(function.body) if isinstance(node, ast.For)]
    if not loops:
        raise unknown
    place, loop = loops[-1]
    layers = _layer_names(loop)
    found = [pair for statement in loop.body if (pair := _layer_call(statement, layers)) is not None]
    if len(found) != 1 or loop.orelse:
        raise unknown
    (pair,) = found
    for statement in loop.body:
        if _layer_call(statement, layers) is None and _names(statement) & set(pair):
            stored = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            if stored & set(pair) or not _reads_for_drafts(statement):
                raise unknown
    for statement in _after(function.body[place + 1 :]):
        if _names(statement) & set(pair) and not _reads_for_drafts(statement):
            call = _norm_call([statement], own, *pair)
            return None if call is None else call[0]
    return None


def _layer_names(loop: ast.For) -> set[str]:
    """Return the names of the layer of a turn: the loop's last variable, and those given `self.<path>[i]`."""
    variable = loop.target.elts[-1] if isinstance(loop.target, ast.Tuple) else loop.target
    names = {variable.id} if isinstance(variable, ast.Name) else set()
    for statement in loop.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Subscript):
            names |= {target.id for target in statement.targets if isinstance(target, ast.Name)}
    return names


def _layer_call(statement: ast.stmt, layers: set[str]) -> tuple[str, str] | None:
    """Return the names of `hidden, residual = layer(…, hidden, residual, …)`, or None for any other statement."""
    parts = _call_to_pair(statement)
    if parts is None or not isinstance(parts[0].func, ast.Name) or parts[0].func.id not in layers:
        return None
    call, targets = parts
    names = [node.id for node in targets if isinstance(node, ast.Name)]
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    if len(names) != 2 or any(sum(_is_name(node, name) for node in given) != 1 for name in names):
        return None
    return names[0], names[1]


def _after(statements: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that the last pipeline stage runs."""
    for statement in statements:
        is_stage = isinstance(statement, ast.If) and ast.unparse(statement.test) == "not get_pp_group().is_last_rank"
        if isinstance(statement, ast.If) and is_stage and isinstance(statement.body[-1], ast.Return):
            yield from statement.orelse
        else:
            yield statement


# ------------------------------------------------------------------------------------------------------ kinds of norms


def kind_of(norm: nn.Module, hidden: int, dtype: torch.dtype) -> Kind:
    """Find the kind of a norm by what it computes of a pair.

    Args:
        dtype: that of the hidden states.

    Raises:
        NotFused: it does not add and normalise by an RMSNorm.
    """
    kind = measure(norm, hidden)
    weight = None if kind.weight is None else norm.get_parameter(kind.weight)
    if weight is not None and kind.rounds_first and weight.dtype != dtype:
        raise NotFused(f"the weight of its {type(norm).__name__} is {weight.dtype}, and the hidden state {dtype}")
    device = torch.device("cpu") if weight is None else weight.device
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(3, hidden, generator=generator).to(device, dtype) for _ in range(2))
    try:
        with torch.inference_mode(False), torch.no_grad():
            normed, out = norm(x.clone(), residual.clone())
            expected = formula(residual + x, kind.norm(weight))[0].double()
    except Exception as error:
        raise NotFused(f"its {type(norm).__name__} cannot be tried here ({type(error).__name__})") from error
    close = 4 * torch.finfo(dtype).eps * expected.norm()
    if not torch.equal(out, residual + x) or not bool((normed.double() - expected).norm() <= close):
        raise NotFused(f"its {type(norm).__name__} does not add and normalise")
    return kind


# --------------------------------------------------------------------------------------------------------------- links

#: The attribute of a linked norm that holds its `_Link`, in a tuple that nn.Module does not look into.
_LINK = "steering_link"


class _Link:
    """A norm and the steering point of the layer before it.

    Attributes:
        kind: the kind of the norm.
        native: vLLM's kernel, which adds and normalises in place; None without one for this kind of norm.
    """

    def __init__(self, norm: nn.Module, kind: Kind, point: SteeringPoint) -> None:
        self.norm, self.kind, self.point = norm, kind, point
        plain = kind.weight is not None and not kind.plus_one and kind.rounds_first
        self.native = getattr(torch.ops._C, "fused_add_rms_norm", None) if plain else None

    def described(self) -> Norm:
        weight = None if self.kind.weight is None else self.norm.get_parameter(self.kind.weight).data
        return self.kind.norm(weight)


@functools.cache
def linked_class(base: Any) -> type[nn.Module]:
    """Return a subclass of a norm's class that steers, adds and normalises."""

    def forward(self: nn.Module, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        point: SteeringPoint = getattr(self, _LINK)[0].point
        if residual is None:
            raise RuntimeError(f"the norm behind layer {point.index} got no residual; expected one ({KEY}.fuse_norm)")
        if point.slots is None or not is_compiling() and point.batch.idle:
            return base.forward(self, x, residual)
        if is_compiling():
            # A compiled graph is for all batches: the op looks whether this one is idle.
            torch.ops.fused_steer.steer_and_normalise_in_vllm(x, residual, point.number)
        else:
            point.steer_and_normalise(x, residual, getattr(self, _LINK)[0].described())
        return x, residual

    namespace = {"__module__": base.__module__, "__qualname__": base.__qualname__, "forward": forward}
    metaclass: Any = type(base)
    return metaclass(base.__name__, (base,), namespace)


def _steer_and_normalise(hidden: Tensor, residual: Tensor, number: Tensor) -> None:
    """Steer, add and normalise in place in a compiled graph. In an idle batch vLLM's own kernel runs."""
    point = point_of(number)
    link: _Link = point.link
    norm = link.described()
    if point.batch.idle and link.native is not None:
        link.native(hidden, residual, norm.weight, norm.eps)
    else:
        point.steer_and_normalise(hidden, residual, norm)  # an idle batch has no slots in its ids


register(
    "steer_and_normalise_in_vllm(Tensor(a!) hidden, Tensor(b!) residual, Tensor number) -> ()",
    _steer_and_normalise,
    lambda *inputs: None,
    None,
)


# ------------------------------------------------------------------------------------------------------- in the model


def reason_against(config: Any) -> str:
    """Return why no norm of a server may be fused, or "".

    Args:
        config: vLLM's config.
    """
    speculative, compilation = config.speculative_config, config.compilation_config
    if speculative is not None and speculative.method not in _READ_NO_STATES:
        return f"speculative decoding by {speculative.method} may read hidden states between layers"
    if envs.VLLM_BATCH_INVARIANT:
        return "VLLM_BATCH_INVARIANT is set, and the kernel depends on the number of tokens"
    if getattr(compilation.mode, "value", compilation.mode):
        if passes := [name for name in _PASSES if getattr(compilation.pass_config, name, False)]:
            return f"vLLM's compiler looks for its own norms ({', '.join(passes)})"
        if config.model_config.quantization is not None:
            return f"compiled norms are fused with the quantization ({config.model_config.quantization}) that follows"
    return ""


def link_norms(
    model: nn.Module, layers: Mapping[int, nn.Module], points: Mapping[int, SteeringPoint], count: int, config: Any
) -> dict[int, str]:
    """Link the norms that read the outputs of steered layers. Return why the other layers' are not, by layer.

    Args:
        model: the module with the loop over the layers.
        layers: the layers of this pipeline stage.
        points: those that are steered.
        count: the number of layers of all stages.
        config: vLLM's config.
    """
    if reason := reason_against(config):
        return dict.fromkeys(points, reason)
    reasons: dict[int, str] = {}
    for index, point in points.items():
        try:
            cls: Any = type(layers[index])
            if returned_state(cls) != UNADDED:
                raise NotFused(f"{cls.__name__} returns its output added")
            norm = _reader(model, layers, index, count)
            if hasattr(norm, _LINK):
                raise NotFused(f"its {type(norm).__name__} reads another layer's output too")
            kind = kind_of(norm, point.hidden, config.model_config.dtype)
        except NotFused as error:
            reasons[index] = str(error)
            continue
        point.link = _Link(norm, kind, point)
        setattr(norm, _LINK, (point.link,))
        base: Any = type(norm)
        norm.__class__ = linked_class(base)
    return reasons


def _reader(model: nn.Module, layers: Mapping[int, nn.Module], index: int, count: int) -> nn.Module:
    """Return the norm that reads the output of a layer.

    Raises:
        NotFused: it cannot be told.
    """
    of_model: Any = type(model)
    behind = last_norm(of_model)
    if index + 1 in layers:
        of_layer: Any = type(layers[index + 1])
        return _module(layers[index + 1], first_norm(of_layer))
    if index + 1 < count:
        raise NotFused("the next layer is in another pipeline stage")
    if behind is None:
        raise NotFused(f"{of_model.__name__} does not give its last layer's output to a norm before all else")
    return _module(model, behind)


def _module(parent: nn.Module, path: str) -> nn.Module:
    try:
        return parent.get_submodule(path)
    except AttributeError:
        raise NotFused(f"{type(parent).__name__}.{path} is no module") from None
