"""Finds a layer's attention and its MLP: the modules that make what the layer adds to the residual stream.

A decoder layer adds to the stream, which enters as its first argument, what its modules make of it:

    hidden = hidden + self.self_attn(self.input_layernorm(hidden), ...)
    hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))

The returned value is followed back through sums, scalings, norms, dropout, depthwise convolutions and functions to the
stream and to modules that mix features, which have matrices. What is added last is the MLP's, what is added first is
the attention's (or that of what a layer has in its place). Where one sum adds both, as parallel layers do, they are
told apart by the order of their calls, and by what they are given: an MLP takes the hidden state alone.

Nothing is guessed: what is not understood is refused in one line, by the exceptions of residual.py.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from .residual import Add, Call, Handle, Other, Reader, Refusal, Source, Tuple, Values, analyse, cached, called_paths

#: What each path below `self` of a forward is in one layer: a class of layers may have layers of several kinds.
Parts = tuple[tuple[str, str], ...]

_STREAM = "stream"
#: What a value may have been made of: modules that mix features, and the stream. One entry for each way.
_Ways = frozenset[frozenset["Call | str"]]
_NOTHING: _Ways = frozenset({frozenset()})
_MOST_WAYS = 64


def parts_of(layer: nn.Module, cls: type) -> Parts:
    """What there is in `layer` under each path that the forward of its class `cls` names.

    "mixes": a module with matrices; "matrix": one with a single matrix, such as a linear layer, alone or with an
    activation, a norm or dropout; "passes": another module, or a function; "method": of the layer itself; "absent":
    nothing, or None; "value": anything else.

    Raises ResidualNotFound if the forward has no source to read.
    """
    return tuple((path, _kind(layer, path)) for path in sorted(called_paths(cls)))


def _kind(layer: nn.Module, path: str) -> str:
    found: object = layer
    for part in path.split("."):
        found = getattr(found, part, None)
    if found is None:
        return "absent"
    if isinstance(found, nn.Module):
        return {0: "passes", 1: "matrix"}.get(matrices(found), "mixes")
    if isinstance(found, (Tensor, torch.dtype)) or not callable(found):
        return "value"
    return "method" if getattr(found, "__self__", None) is not None else "passes"


def matrices(module: nn.Module) -> int:
    """The number of modules in it, itself included, that have a matrix of their own."""
    base = getattr(module, "base_layer", None)
    if isinstance(base, nn.Module):  # inside a LoRA
        return matrices(base)
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels == module.out_channels:
        return 0  # a depthwise convolution mixes tokens, not features
    own = any(t.dim() > 1 for t in itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False)))
    return own + sum(map(matrices, module.children()))


@dataclass(frozen=True)
class Found:
    """Where a site is in a forward.

    at: the nodes: adds, with the operand that is the site's tensor ("left" or "right"), or calls of modules. where:
    "add", "output" or "input" of those calls. modules: their paths. written: whether the forward may write to what is
    there in place. reason: why it is not an add. given: of an input, the paths of the modules that return it, if it is
    given as they return it.
    """

    at: tuple[tuple[ast.AST, str | None], ...]
    where: str
    modules: tuple[str, ...]
    written: bool = False
    reason: str = ""
    given: tuple[str, ...] = ()


def find(site: str, source: Source, parts: Parts) -> Found:
    """Where `site` is: "post_attention", "pre_mlp" or "post_mlp".

    Raises Refusal where the layer has none, or it is not understood.
    """
    anatomy = _Anatomy(source, parts)
    if site == "pre_mlp":
        return anatomy.inputs(site)
    return anatomy.outputs(site, anatomy.mlp() if site == "post_mlp" else anatomy.attention())


@cached
def mlp_in(cls: type, parts: Parts) -> tuple[str, ...]:
    """The paths of the modules that make what `cls.forward` adds last: the MLP, or several that one sum adds.

    A sublayer that some layers of the class add after the MLP, such as Gemma 4's per-layer inputs, does not count.

    Raises ResidualNotFound where it is not understood.
    """
    return analyse(cls, lambda source: _Anatomy(source, parts).mlp_paths())


@cached
def find_in(cls: type, site: str, parts: Parts) -> Found:
    """Where `site` is in `cls.forward`; its nodes are of a tree of its own.

    Raises ResidualNotFound where the layer has none, or it is not understood.
    """
    return analyse(cls, lambda source: find(site, source, parts))


@dataclass(frozen=True)
class _Join:
    """Where the stream and a branch come together: in an add, or in a function (add is None).

    stream: the values of the operand that is the stream; branch: those of each other one.
    """

    add: Add | None
    node: ast.AST
    stream: Values
    branch: tuple[Values, ...]


@dataclass(frozen=True)
class _Sublayer:
    """One join, and the module calls that made its branch. Each way through the forward has one of the calls."""

    join: _Join
    calls: frozenset[Call]
    parallel: bool


class _Anatomy:
    """One forward, with the parts of one layer."""

    def __init__(self, source: Source, parts: Parts) -> None:
        self.source, self.kinds = source, dict(parts)
        self.reader = Reader(source)
        arguments = [*source.tree.args.posonlyargs, *source.tree.args.args][1:]
        self._stream = arguments[0] if arguments else None
        self._known: dict[Add | Tuple | Other, _Ways] = {}

    # -------------------------------------------------------------------------------------------------- what made what

    def _ways(self, values: Values) -> _Ways:
        """One entry for each way; none where the values are never there."""
        return frozenset().union(*map(self._ways_of, values))

    def _ways_of(self, value: Add | Tuple | Other) -> _Ways:
        if value not in self._known:
            self._known[value] = self._made(value)
        return self._known[value]

    def _made(self, value: Add | Tuple | Other) -> _Ways:
        if isinstance(value, Tuple):
            return self._ways(value.first)
        if isinstance(value, Handle):
            if self.kinds[value.path] in ("mixes", "matrix", "method"):
                self._refuse(f"gives self.{value.path} to a function, which is not followed", value)
            return _NOTHING
        if isinstance(value, Call):
            kind = self.kinds[value.path]
            if kind == "absent":
                return frozenset()
            if kind in ("mixes", "matrix"):
                return frozenset({frozenset({value})})
            if kind != "passes":
                self._refuse(f"calls self.{value.path}, which is not followed", value)
        if isinstance(value, Other) and isinstance(value.node, ast.arg):
            return frozenset({frozenset({_STREAM})}) if value.node is self._stream else _NOTHING
        ways = self._combined(operand for operand in self._operands(value) if operand)
        if len(ways) > _MOST_WAYS:
            self._refuse("comes to its output in too many ways", value)
        return ways

    def _combined(self, operands: Iterable[Values]) -> _Ways:
        """The ways of a value that is made of these operands."""
        each = [self._ways(operand) for operand in operands]
        if sum(all(_STREAM in way for way in ways) for ways in each if ways) == 1:
            each = [_branch_ways(ways) for ways in each]
        combined: _Ways = _NOTHING
        for ways in each:
            combined = frozenset(one | other for one in combined for other in ways)
        return combined

    def _operands(self, value: Add | Other) -> tuple[Values, ...]:
        if isinstance(value, Add):
            return self.reader.operands[value]
        if value.operands is None:
            self._refuse("has a value that is not followed", value)
        return value.operands

    def _is_stream(self, values: Values) -> bool:
        return any(_STREAM in way for way in self._ways(values))

    def _calls(self, values: Iterable[Values]) -> frozenset[Call]:
        ways = (way for each in values for way in self._ways(each))
        return frozenset(call for way in ways for call in way if isinstance(call, Call))

    # ------------------------------------------------------------------------------------------------- the joins

    def _joins(self, values: Values) -> list[_Join]:
        """The last joins on each way to the values; none where they are what entered."""
        found: dict[ast.AST, _Join] = {}
        for value in sorted(values, key=lambda value: _place(getattr(value, "node", None))):  # the first one is refused
            found.update((join.node, join) for join in self._joins_of(value))
        return sorted(found.values(), key=lambda join: _place(join.node))  # so that messages are the same in each run

    def _joins_of(self, value: Add | Tuple | Other) -> list[_Join]:
        if not self._ways_of(value):
            return []
        if isinstance(value, Tuple):
            return self._joins(value.first)
        if isinstance(value, Other) and value.node is self._stream:
            return []
        if not any(_STREAM in way for way in self._ways_of(value)):
            self._refuse("returns what is no sum with its input", value)
        operands = self._operands(value)
        streams = [operand for operand in operands if self._is_stream(operand)]
        if len(streams) > 1:
            streams = [operand for operand in streams if all(_STREAM in way for way in self._ways(operand))]
        if len(streams) != 1:
            self._refuse("adds its input, or what holds it, to itself", value)
        branch = tuple(operand for operand in operands if operand is not streams[0] and self._calls([operand]))
        if not branch:
            return self._joins(streams[0])
        return [_Join(value if isinstance(value, Add) else None, value.node, streams[0], branch)]

    def _last(self) -> list[_Join]:
        joins = self._joins(self.reader.returned)
        if not joins:
            self.source.refuse("adds nothing to its input", self.source.tree)
        nodes = {join.node for join in joins}
        # A join that comes after another one of these is left out by some passes: it adds no MLP.
        return [join for join in joins if not any(one.node in nodes for one in self._joins(join.stream))]

    def _sublayers(self, join: _Join) -> tuple[frozenset[Call], frozenset[Call]]:
        """The calls that make the branch of a join; and, where a parallel layer adds what its attention and its MLP
        make at once, those of the attention, which are not among the first.

        Raises Refusal where several modules make the branch otherwise.
        """
        combined: _Ways = _NOTHING
        for operand in join.branch:
            combined = frozenset(one | other for one in combined for other in _branch_ways(self._ways(operand)))
        ways = [sorted((call for call in way if isinstance(call, Call)), key=_position) for way in combined]
        last = frozenset(way[-1] for way in ways)
        attention = frozenset(call for way in ways for call in way[:-1])
        if attention and (
            max(map(len, ways)) > 2
            or attention & last
            or not self._calls([join.stream]) <= attention
            or not all(_arguments(call) > 1 for call in attention)
            or not all(_arguments(call) == 1 for call in last)
        ):
            names = ", ".join(sorted({f"self.{call.path}" for call in attention | last}))
            self._refuse(f"adds what {names} make together", join)
        return last, attention

    def mlp(self) -> list[_Sublayer]:
        """The MLP at each last join."""
        found = []
        for join in self._last():
            calls, attention = self._sublayers(join)
            if not attention and not self._joins(join.stream):
                self._refuse_single(calls, join)
            found.append(_Sublayer(join, calls, bool(attention)))
        return found

    def mlp_paths(self) -> tuple[str, ...]:
        """The modules of the MLP at each last join. If several make its branch together, these are all of them."""
        paths: set[str] = set()
        for join in self._last():
            try:
                calls, _ = self._sublayers(join)
            except Refusal:
                if not self._joins(join.stream):
                    raise  # nothing was added before, so that one of them may be the attention
                calls = self._calls(join.branch)
            paths.update(call.path for call in calls)
        return tuple(sorted(paths))

    def attention(self) -> list[_Sublayer]:
        """The attention, or what the layer has in its place, at each first join."""
        found: dict[ast.AST, _Sublayer] = {}
        todo = last = self._last()
        left_out = None
        between: frozenset[Call] = frozenset()  # the calls of what is added neither first nor last
        while todo:
            join, *todo = todo
            self._check_apart(join)
            before = self._joins(join.stream)
            todo = [*todo, *before]
            if before and join not in last:
                between |= self._calls(join.branch)
            if before and all(way - {_STREAM} for way in self._ways(join.stream)):
                continue
            left_out = join if before else left_out
            calls, attention = self._sublayers(join)
            if not before and join in last and not attention:
                self._refuse_single(calls, join)
            if attention or not before:
                found[join.node] = _Sublayer(join, attention or calls, bool(attention))
        given_more = sorted((call for call in between if _arguments(call) > 1), key=_position)
        for sublayer in found.values():
            if given_more and all(_arguments(call) == 1 for call in sublayer.calls):
                first = min(sublayer.calls, key=_position).path
                self._refuse(f"adds self.{given_more[0].path} after self.{first}, which may be an MLP", sublayer.join)
        if left_out is not None:
            # A stream without what is added first may be one that no pass has: if the attention always runs, it is.
            calls = frozenset(call for sublayer in found.values() for call in sublayer.calls)
            if len(calls) > 1 or not all(self._always_runs(call) for call in calls):
                self._refuse("may leave out what it adds first", left_out)
        return list(found.values())

    def _check_apart(self, join: _Join) -> None:
        """Refuse a sum if one module made both its stream and its branch, such as one that mixes several streams.

        The first module that is added to such a stream is not the attention.
        """
        branch = [way for operand in join.branch for way in _branch_ways(self._ways(operand))]
        both = frozenset.intersection(*branch, *self._ways(join.stream))
        if calls := sorted((call for call in both if isinstance(call, Call)), key=_position):
            self._refuse(f"changes its input by self.{calls[0].path}, and adds what that makes", join)

    def _always_runs(self, call: Call) -> bool:
        """Whether the call is part of each pass through the forward."""
        for statement in self.source.tree.body:
            if any(part is call.node for part in ast.walk(statement)):
                conditional = (ast.If, ast.For, ast.While, ast.Try, ast.Match, ast.IfExp, ast.BoolOp, ast.Lambda)
                return not any(
                    isinstance(part, conditional) and any(inner is call.node for inner in ast.walk(part))
                    for part in ast.walk(statement)
                )
            if any(isinstance(part, ast.Return) for part in ast.walk(statement)):
                return False
        return False

    # ------------------------------------------------------------------------------------------------------- the sites

    def outputs(self, site: str, sublayers: Sequence[_Sublayer]) -> Found:
        """Where what these sublayers return is read: in the add, if that has it as it was returned."""
        calls = sorted({call for sublayer in sublayers for call in sublayer.calls}, key=_position)
        modules = tuple(dict.fromkeys(call.path for call in calls))
        reason = next((why for sublayer in sublayers if (why := self._why_not_in_add(sublayer))), "")
        adds = {sublayer.join.add for sublayer in sublayers}
        if not reason and any(self.reader.ran_before[add] & adds for add in adds if add is not None):
            reason = "several of its adds may run in one call"
        if reason:
            written = not self.reader.written.isdisjoint(calls)
            return Found(tuple((call.node, None) for call in calls), "output", modules, written, reason)
        at = []
        for sublayer in sublayers:
            add = sublayer.join.add
            assert add is not None
            left = self.reader.operands[add][0]
            at.append((add.node, "left" if left == sublayer.join.branch[0] and not self._is_stream(left) else "right"))
        return Found(tuple(at), "add", modules)

    def _why_not_in_add(self, sublayer: _Sublayer) -> str:
        join = sublayer.join
        name = f"self.{min(sublayer.calls, key=_position).path}"
        line = getattr(join.node, "lineno", 0)
        if join.add is None:
            return f"{name} is added by a function (line {line})"
        if sublayer.parallel:
            return f"{name} is added together with other sublayers (line {line})"
        if not all(isinstance(value, Call) and value in sublayer.calls for value in join.branch[0]):
            return f"what {name} returns is changed before it is added (line {line})"
        if join.add in self.reader.written:
            return f"its sum with the stream is written to in place (line {line})"
        inside = set(ast.walk(join.node))
        if any(self.reader.uses.get(call, set()) - inside for call in sublayer.calls):
            return f"what {name} returns is used elsewhere too"
        return ""

    def inputs(self, site: str) -> Found:
        """Where the MLP is given the hidden state. Of an MLP that is several linear layers of the layer's own, that is
        at the first of them."""
        found: dict[Call, None] = {}
        todo = [call for sublayer in self.mlp() for call in sublayer.calls]
        while todo:
            call = todo.pop()
            if not _has_first_argument(call.node):
                self._refuse(f"calls self.{call.path} without an argument that can be told", call)
            first, *others = self._operands(call)
            if self.kinds[call.path] == "mixes" or self._is_stream(first):
                if self.kinds[call.path] == "matrix" and self._calls(others):
                    self._refuse(f"gives self.{call.path} what another module makes", call)
                found[call] = None
                continue
            before = self._ways(first)
            if not all(len(way) == 1 for way in before):
                self._refuse(f"gives self.{call.path} what several modules make", call)
            todo += [one for way in before for one in way if isinstance(one, Call)]
        calls = sorted(found, key=_position)
        values = {value for call in calls for value in self._operands(call)[0]}
        given = sorted({value.path if isinstance(value, Call) else "" for value in values})
        modules = tuple(dict.fromkeys(call.path for call in calls))
        return Found(tuple((call.node, None) for call in calls), "input", modules, given=tuple(given))

    def _refuse_single(self, calls: frozenset[Call], join: _Join) -> NoReturn:
        self._refuse(f"has one sublayer, self.{min(calls, key=_position).path}", join)

    def _refuse(self, why: str, value: Add | Tuple | Other | _Join) -> NoReturn:
        assert not isinstance(value, Tuple)
        self.source.refuse(why, value.node)  # type: ignore[arg-type]


def _branch_ways(ways: _Ways) -> _Ways:
    """Without those in which a branch is the stream itself, as after `if …: … elif …: …`: no pass takes them."""
    if all(_STREAM in way for way in ways):
        return ways
    return frozenset(way for way in ways if _STREAM not in way)


def _position(call: Call) -> tuple[int, int]:
    return _place(call.node)


def _place(node: ast.AST | None) -> tuple[int, int]:
    return getattr(node, "lineno", 0), getattr(node, "col_offset", 0)


def _arguments(call: Call) -> int:
    assert isinstance(call.node, ast.Call)
    return len(call.node.args) + len(call.node.keywords)


def _has_first_argument(node: ast.AST) -> bool:
    assert isinstance(node, ast.Call)
    if node.args:
        return not isinstance(node.args[0], ast.Starred)
    return bool(node.keywords) and node.keywords[0].arg is not None
