"""Find the final residual add in a layer's forward, and rewrite it as a call of the site.

A decoder layer's forward ends in `hidden_states = residual + hidden_states`. `rewrite_forward` finds, in the forward's
syntax tree, every sum that may become the returned hidden state. It compiles the forward again with `self.<site>(left,
right)` in place of these sums.

Nothing is guessed. A small reaching-definitions analysis follows the values. If it does not understand where the
returned value comes from, or if the value changes after the add, `ResidualNotFound` says so in one line.

It is one file because the analysis is one recursion over one syntax tree.
"""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import keyword
import warnings
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType
from typing import Any, NoReturn, TypeAlias

__all__ = ["ResidualNotFound", "names_in_final_adds", "rewrite_forward"]


_Definition: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class ResidualNotFound(LookupError):
    """A class's forward cannot be rewritten. The message says why in one line."""


def rewrite_forward(cls: type, site: str, *, with_input: bool = False) -> Callable[..., Any]:
    """Return `cls.forward` with each final residual add `left + right` replaced by `self.<site>(left, right)`.

    With `with_input` the call is `self.<site>(left, right, input)`. `input` is the unchanged first argument of the
    forward after `self`, or None if it has no named one.

    One call of the new function calls the site exactly once. The site's result is the hidden state that the layer
    returns, as a tensor or first in a tuple, before a final cast to another dtype. Operands keep their order, so a
    site that returns `left + right` changes no bit. Only `h += x` no longer writes into h's memory. The class is not
    changed; the new function is for a subclass. It reads the original's globals and closure cells, keeps its line
    numbers, and is wrapped in copies of its decorators, which are assumed not to change the result.

    Raises:
        ResidualNotFound: the forward is not completely understood.
        ValueError: `site` is not a valid attribute name.
    """
    # Inside a class body, two leading underscores would be mangled with the class's name.
    if not site.isidentifier() or keyword.iskeyword(site) or site.startswith("__"):
        raise ValueError(f"site is {site!r}; expected an attribute name without two leading underscores")
    try:
        wrappers, function = _unwrap(getattr(cls, "forward", None))
        with warnings.catch_warnings():  # the source's syntax warnings were shown when it was imported
            warnings.simplefilter("ignore", SyntaxWarning)
            code = _rewritten_code(function, site, with_input)
        return _rewrap(wrappers, function, _copy_function(function, code, {}))
    except _Refusal as refusal:
        raise ResidualNotFound(f"{cls.__name__}.forward {refusal}") from None


def names_in_final_adds(cls: type) -> list[frozenset[str]]:
    """Return the local names in each sum that may become the hidden state which `cls.forward` returns.

    Raises:
        ResidualNotFound: on some path the forward does not return such a sum.
    """
    try:
        _, function = _unwrap(getattr(cls, "forward", None))
        adds = _final_adds(_Source.of(function))
    except _Refusal as refusal:
        raise ResidualNotFound(f"{cls.__name__}.forward {refusal}") from None
    names = []
    for add in sorted(adds, key=_line):
        names.append(frozenset(part.id for part in ast.walk(add.node) if isinstance(part, ast.Name)))
    return names


class _Refusal(Exception):
    """The reason why a forward cannot be rewritten, as the end of a sentence that begins with the forward's name."""


#: The local name under which a rewritten forward keeps its first argument, which it may assign to later.
_INPUT = "fused_steer_block_input"


def _rewritten_code(function: FunctionType, site: str, with_input: bool) -> CodeType:
    source = _Source.of(function)
    adds = {add.node for add in _final_adds(source)}
    _Replace(adds, source.self_name(), site, with_input).visit(source.tree)
    if with_input:
        source.keep_input(_INPUT)
    return source.compile(function)


# ---------------------------------------------------------------------------------------------------------------------
# The source of a function, and back


@dataclass(frozen=True)
class _Source:
    """The parsed file of a function. Names, `super()` and `self.__name` compile the same only in the whole file."""

    lines: list[str]
    module: ast.Module
    tree: ast.FunctionDef  # a node of `module`

    @classmethod
    def of(cls, function: FunctionType) -> _Source:
        code = function.__code__
        try:
            lines, _ = inspect.findsource(function)
            module = ast.parse("".join(lines))
        except (OSError, TypeError, SyntaxError):
            raise _Refusal("has no source to read") from None
        # Other functions and classes of the file do not matter. Without them compiling is faster.
        module.body = [node for node in module.body if not isinstance(node, _Definition) or _spans(node, code)]
        functions = (node for node in ast.walk(module) if isinstance(node, ast.FunctionDef))
        tree = next((node for node in functions if (node.name, _first_line(node)) == _position(code)), None)
        # It differs for a file edited since its import, and for a forward rewritten before. That would be lost.
        if tree is None or (source := cls(lines, module, tree)).compile(function) != code:
            raise _Refusal(f"is not the function of its source ({code.co_filename}, line {code.co_firstlineno})")
        return source

    def compile(self, function: FunctionType) -> CodeType:
        """Compile the file and return the code at the function's place."""
        old = function.__code__
        flags = old.co_flags & __future__.annotations.compiler_flag
        module = compile(self.module, old.co_filename, "exec", flags, dont_inherit=True)
        found = (code for code in _nested_code(module) if _position(code) == _position(old))
        return next(found, module)  # the module's own code never equals a function's

    def refuse(self, why: str, node: _Node) -> NoReturn:
        raise _Refusal(f"{why} (line {node.lineno}: {self.lines[node.lineno - 1].strip()})")

    def self_name(self) -> str:
        arguments = [*self.tree.args.posonlyargs, *self.tree.args.args]
        if not arguments:
            self.refuse("takes no `self`", self.tree)
        if any(arguments[0].arg in _stored_names(statement) for statement in self.tree.body):
            self.refuse(f"assigns `{arguments[0].arg}`", self.tree)
        return arguments[0].arg

    def keep_input(self, name: str) -> None:
        """Assign the first argument after `self` to `name` at the function's start, or None without a named one."""
        named = [*self.tree.args.posonlyargs, *self.tree.args.args][1:]
        value: ast.expr = ast.Name(named[0].arg, ast.Load()) if named else ast.Constant(None)
        first = self.tree.body[0]
        kept = ast.fix_missing_locations(ast.copy_location(ast.Assign([ast.Name(name, ast.Store())], value), first))
        documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        self.tree.body.insert(1 if documented else 0, kept)


def _first_line(definition: _Definition) -> int:
    return min([definition.lineno, *(decorator.lineno for decorator in definition.decorator_list)])


def _spans(definition: _Definition, code: CodeType) -> bool:
    return _first_line(definition) <= code.co_firstlineno <= (definition.end_lineno or 0)


def _position(code: CodeType) -> tuple[str, int]:
    return code.co_name, code.co_firstlineno


def _nested_code(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _nested_code(constant)


class _Replace(ast.NodeTransformer):
    """Replaces the given adds by `self.<site>(left, right)` or `self.<site>(left, right, input)`."""

    def __init__(self, adds: Set[ast.AST], self_name: str, site: str, with_input: bool) -> None:
        self.adds, self.self_name, self.site, self.with_input = adds, self_name, site, with_input

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        return self._call(node, node.left, node.right) if node in self.adds else self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        if node not in self.adds or not isinstance(node.target, ast.Name):
            return self.generic_visit(node)
        left = ast.copy_location(ast.Name(node.target.id, ast.Load()), node.target)
        return ast.copy_location(ast.Assign([node.target], self._call(node, left, node.value)), node)

    def _call(self, add: ast.expr | ast.stmt, left: ast.expr, right: ast.expr) -> ast.expr:
        site = ast.Attribute(ast.Name(self.self_name, ast.Load()), self.site, ast.Load())
        arguments = [left, right, ast.Name(_INPUT, ast.Load())] if self.with_input else [left, right]
        return ast.fix_missing_locations(ast.copy_location(ast.Call(site, arguments, []), add))


# ---------------------------------------------------------------------------------------------------------------------
# Which sums may be the returned hidden state


@dataclass(frozen=True)
class _Add:
    """The result of `left + right` or `left += right`."""

    node: ast.BinOp | ast.AugAssign


@dataclass(frozen=True)
class _Tuple:
    """A tuple, of which only the first element matters. An empty `first` means the empty tuple."""

    first: _Values


@dataclass(frozen=True)
class _Other:
    """Any other value, made at `node`. `what` ends the sentence "forward returns ..."."""

    node: _Node
    what: str = "a value that is not a sum"


_Node: TypeAlias = ast.stmt | ast.expr | ast.arg  # the syntax nodes that have a line number
_Values: TypeAlias = "frozenset[_Add | _Tuple | _Other]"  # one entry for each possible origin of a value
_NONE: _Values = frozenset()


@dataclass
class _State:
    """The analysis's knowledge at one point of the function, over all paths to it."""

    names: dict[str, _Values]  # the possible values of each local name
    read: _Values  # values that may have been read, so other objects may hold them
    ran: frozenset[_Add] = frozenset()  # adds that may have run

    def copy(self) -> _State:
        return _State(dict(self.names), self.read, self.ran)

    def join(self, other: _State) -> _State:
        # If one side lacks a name, reading it raises there, so only the other side's values count.
        names = {name: self.names.get(name, _NONE) | other.names.get(name, _NONE) for name in self.names | other.names}
        return _State(names, self.read | other.read, self.ran | other.ran)


def _final_adds(source: _Source) -> frozenset[_Add]:
    """Return the adds that may make the returned hidden state. In each call exactly one of them runs, once."""
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.Global, ast.Nonlocal, ast.Yield, ast.YieldFrom)):
            source.refuse("has a statement that is not followed", node)
    reader = _Reader(source)
    others = [value for value in reader.returned if isinstance(value, _Other)]
    if others:
        other = min(others, key=_line)
        source.refuse(f"returns {other.what}", other.node)
    adds = frozenset(value for value in reader.returned if isinstance(value, _Add))
    for add in sorted(adds, key=_line):
        for earlier in sorted(reader.ran_before[add] & adds, key=_line):
            source.refuse(f"may run two final adds in one call, of line {_line(earlier)} and a later one", add.node)
    if not adds:
        source.refuse("never returns", source.tree)
    return adds


def _line(value: _Add | _Other) -> int:
    return value.node.lineno


class _Reader:
    """Follows the values of local names through a function, statement by statement.

    Sequences, `if` and `with` are followed, with the assumption that context managers do not swallow exceptions. Other
    compound statements are opaque: the names that they assign become unknown, and they must not return. These include
    loops, because an add in a loop may run more than once.
    """

    def __init__(self, source: _Source) -> None:
        self.returned: _Values = _NONE  # the first element of a returned tuple
        self.ran_before: dict[_Add, frozenset[_Add]] = {}
        self.self_name = source.self_name()
        parameters = [node for node in ast.walk(source.tree.args) if isinstance(node, ast.arg)]
        names: dict[str, _Values] = {p.arg: frozenset({_Other(p, f"its argument `{p.arg}`")}) for p in parameters}
        start = _State(names, read=_NONE.union(*names.values()))  # the caller holds the arguments
        if self._block(source.tree.body, start) is not None:
            self.returned |= {_Other(source.tree, "nothing where its end is reached")}

    def _block(self, statements: list[ast.stmt], state: _State | None) -> _State | None:
        """Return the state after the statements, or None if their end is never reached."""
        for statement in statements:
            state = state and self._statement(statement, state)
        return state

    def _statement(self, statement: ast.stmt, state: _State) -> _State | None:
        match statement:
            case ast.If(test, body, orelse):
                self._side_effects(test, state)
                yes, no = self._block(body, state.copy()), self._block(orelse, state.copy())
                return yes.join(no) if yes and no else yes or no
            case ast.With(items, body):
                for item in items:
                    self._side_effects(item, state)
                    self._forget(item, _Other(item.context_expr), state)
                return self._block(body, state)
            case ast.Return(value):
                self._side_effects(statement, state)
                self.returned |= _hidden(self._value(value, state), statement) if value else {_Other(statement)}
                return None
            case ast.Raise():
                return None
            case ast.AugAssign(ast.Name(name)):
                self._augmented_assign(name, statement, state)
            case ast.Assign(targets, value):
                self._assign(targets, value, state)
            case ast.AnnAssign(target, value=ast.expr() as value):
                self._assign([target], value, state)
            case _:
                self._opaque(statement, state)
        return state

    def _assign(self, targets: list[ast.expr], value: ast.expr, state: _State) -> None:
        self._side_effects(value, state)
        values = self._value(value, state)
        for target in targets:
            self._side_effects(target, state)
            if isinstance(target, ast.Name):
                state.names[target.id] = values
            else:
                self._forget(target, _Other(target), state)

    def _augmented_assign(self, name: str, statement: ast.AugAssign, state: _State) -> None:
        self._side_effects(statement.value, state)
        old = state.names.get(name, _NONE)
        right = self._value(statement.value, state)
        new: _Values = frozenset({_Other(statement)})
        in_place = not all(isinstance(value, _Tuple) for value in old)
        if in_place:
            _written_in_place(statement, state)
        if in_place and old & state.read:
            # `h += x` writes into h's memory, but the rewritten add does not. So no other object may hold that memory.
            if isinstance(statement.op, ast.Add):
                new = frozenset({_Other(statement, "a sum written into memory that others may hold")})
            state.read |= new
        elif isinstance(statement.op, ast.Add):
            new = self._sum(statement, old, right, state)
        state.names[name] = new

    def _opaque(self, statement: ast.stmt, state: _State) -> None:
        self._side_effects(statement, state)
        self._forget(statement, _Other(statement, "a value assigned by a statement that is not followed"), state)
        nodes = [] if isinstance(statement, _Definition) else ast.walk(statement)
        if any(isinstance(node, ast.Return) for node in nodes):
            self.returned |= {_Other(statement, "from inside a statement that is not followed")}

    def _forget(self, node: ast.AST, other: _Other, state: _State) -> None:
        state.names |= dict.fromkeys(_stored_names(node), frozenset({other}))

    def _side_effects(self, node: ast.AST, state: _State) -> None:
        """Record reads, assignments inside expressions, and writes into the memory of tensors."""
        for part in ast.walk(node):
            match part:
                case ast.Name(name, ast.Load()):
                    state.read |= state.names.get(name, _NONE)
                case ast.NamedExpr():
                    self._forget(part.target, _Other(part), state)
                case ast.Attribute(ast.Name(self.self_name), ctx=ast.Store()):
                    pass  # `self.x = ...` writes into no tensor
                case ast.AugAssign() | ast.Attribute(ctx=ast.Store()) | ast.Subscript(ctx=ast.Store()):
                    _written_in_place(part, state)
                case ast.Call(ast.Attribute(attr=name) | ast.Name(name), keywords=keywords):
                    # In PyTorch's naming, `add_` and similar methods write into their argument.
                    in_place = name.endswith("_") and not name.endswith("__")
                    if in_place or any(keyword.arg in ("out", "inplace") for keyword in keywords):
                        _written_in_place(part, state)

    def _value(self, node: ast.expr, state: _State) -> _Values:
        match node:
            case ast.Name(name) if name in state.names:
                return state.names[name]
            case ast.IfExp(_, body, orelse):
                no = state.copy()
                values = self._value(body, state) | self._value(orelse, no)
                state.ran |= no.ran
                return values
            case ast.Tuple([]):
                return frozenset({_Tuple(_NONE)})
            case ast.Tuple([first, *_]):
                return frozenset({_Tuple(self._value(first, state))})
            case ast.Subscript(sequence, ast.Constant(0)):
                values = self._value(sequence, state)
                if all(isinstance(value, _Tuple) for value in values):
                    return _hidden(values, node)
            case ast.BinOp(left, ast.Add(), right):
                return self._sum(node, self._value(left, state), self._value(right, state), state)
            case ast.Call(ast.Attribute(cast, name)) if name in _CASTS:
                return self._value(cast, state)
        return frozenset({_Other(node)})

    def _sum(self, node: ast.BinOp | ast.AugAssign, left: _Values, right: _Values, state: _State) -> _Values:
        if any(isinstance(value, _Tuple) for value in left | right):
            return _concatenation(node, left, right)
        if all(map(_is_no_tensor, left)) or all(map(_is_no_tensor, right)):
            return frozenset({_Other(node, "a sum of something that is no tensor")})
        add = _Add(node)
        self.ran_before[add] = state.ran
        state.ran |= {add}
        return frozenset({add})


#: Tensor methods that change only the dtype or the device.
_CASTS = ("to", "type", "type_as", "float", "half", "bfloat16", "double")

_DISPLAYS = (ast.List, ast.ListComp, ast.Set, ast.SetComp, ast.Dict, ast.DictComp, ast.GeneratorExp, ast.JoinedStr)


def _stored_names(node: ast.AST) -> set[str]:
    """Return all names that the node may assign or delete, perhaps with names of inner scopes."""
    names = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and not isinstance(part.ctx, ast.Load):
            names.add(part.id)
        # Functions, classes and handlers have a name, imports a name or asname, mapping patterns a rest.
        bound = (getattr(part, field, None) for field in ("name", "asname", "rest"))
        names |= {name.partition(".")[0] for name in bound if isinstance(name, str)}
    return names


def _written_in_place(node: _Node, state: _State) -> None:
    # It is unknown which tensors share memory, so no earlier add can be relied on.
    other = frozenset({_Other(node, "a sum after which a tensor may be written in place")})
    state.names |= {name: other for name, values in state.names.items() if _holds_add(values)}


def _holds_add(values: _Values) -> bool:
    return any(isinstance(value, _Add) or isinstance(value, _Tuple) and _holds_add(value.first) for value in values)


def _hidden(values: _Values, node: _Node) -> _Values:
    """Return the hidden state in a returned value: the value itself, or a tuple's first element."""
    hidden: _Values = _NONE
    for value in values:
        hidden |= (value.first or {_Other(node, "an empty tuple")}) if isinstance(value, _Tuple) else {value}
    return frozenset(_Other(node, "a tuple in a tuple") if isinstance(value, _Tuple) else value for value in hidden)


def _concatenation(node: _Node, left: _Values, right: _Values) -> _Values:
    if not all(isinstance(value, _Tuple) for value in left):
        return frozenset({_Other(node, "a tuple of unknown beginning")})
    result: _Values = frozenset(value for value in left if value != _Tuple(_NONE))
    if len(result) == len(left):
        return result
    return result | (right if all(isinstance(value, _Tuple) for value in right) else {_Other(node)})


def _is_no_tensor(value: _Add | _Tuple | _Other) -> bool:
    """Return whether the value is plainly a number, string or collection: a literal, or an expression without names."""
    if not isinstance(value, _Other) or not isinstance(value.node, ast.expr):
        return False
    return isinstance(value.node, _DISPLAYS) or not any(isinstance(part, ast.Name) for part in ast.walk(value.node))


# ---------------------------------------------------------------------------------------------------------------------
# Functions and the decorators around them


def _unwrap(function: object) -> tuple[list[FunctionType], FunctionType]:
    """Return the wrappers that decorators put around a function, outermost first, and the function itself."""
    wrappers: list[FunctionType] = []
    while isinstance(function, FunctionType):
        if not hasattr(function, "__wrapped__"):
            return wrappers, function
        wrappers.append(function)
        function = function.__wrapped__
    raise _Refusal(f"is not an ordinary function, but of type {type(function).__name__}")


def _rewrap(wrappers: list[FunctionType], old: FunctionType, new: FunctionType) -> FunctionType:
    for wrapper in reversed(wrappers):
        if not any(_content(cell) is old for cell in wrapper.__closure__ or ()):
            raise _Refusal(f"is wrapped by {wrapper.__code__.co_name}, which does not hold it in its closure")
        old, new = wrapper, _copy_function(wrapper, wrapper.__code__, {id(old): new})
    return new


def _copy_function(function: FunctionType, code: CodeType, replace: Mapping[int, object]) -> FunctionType:
    """Copy a function to run `code`, with objects of the given ids replaced in its closure and attributes."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    # A wrapper may refer to itself through its own cell, as transformers' checkpointing does. So must the copy.
    own = CellType()
    for name, cell in cells.items():
        content = _content(cell)
        if content is function:
            cells[name] = own
        elif id(content) in replace:
            cells[name] = CellType(replace[id(content)])
    closure = tuple(cells[name] for name in code.co_freevars)
    copy = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    own.cell_contents = copy
    copy.__kwdefaults__ = function.__kwdefaults__ and dict(function.__kwdefaults__)
    functools.update_wrapper(copy, function, updated=())
    copy.__dict__.clear()  # removes __wrapped__, which update_wrapper adds
    copy.__dict__.update((key, replace.get(id(value), value)) for key, value in function.__dict__.items())
    return copy


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return cell
