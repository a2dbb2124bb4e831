"""Find the final residual add in a layer's forward, and rewrite it as a call of the site.

A decoder layer's forward ends in `hidden_states = residual + hidden_states`. `rewrite_forward` finds, in the forward's
syntax tree, every sum that may become the returned hidden state. It compiles the forward again with `self.<site>(left,
right)` in place of these sums. `rewrite` edits other places of the tree, which sublayers.py finds.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType
from typing import Any, NoReturn, TypeAlias, TypeVar

__all__ = [
    "NONE", "Add", "Call", "Edit", "Handle", "Other", "Reader", "Refusal", "ResidualNotFound", "Source", "Tuple",
    "Values", "analyse", "bypass_of_hooks", "cached", "called_paths", "final_adds", "names_in_final_adds", "rewrite",
    "rewrite_forward", "unusual_input",
]  # fmt: skip


_F = TypeVar("_F", bound=Callable[..., Any])
cached: Callable[[_F], _F] = functools.cache  # type: ignore[assignment]  # mypy takes no class for hashable
_T = TypeVar("_T")
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
    return rewrite(cls, lambda source: [Edit(add.node, site) for add in final_adds(Reader(source))], with_input)


@dataclass(frozen=True)
class Edit:
    """A call of a method of the layer, put into a forward.

    Attributes:
        node: the node of the tree.
        method: the name of the method.
        where: "add" replaces the add `node` by a call with its operands. "output" passes the result of the call `node`
            to the method. "input" passes the first argument of the call `node`.
        branch: the operand of an add, "left" or "right", that is passed as `branch`; the other one is `residual`. None
            passes both by position.
    """

    node: ast.AST
    method: str
    where: str = "add"
    branch: str | None = None


def rewrite(cls: type, edits: Callable[[Source], Sequence[Edit]], with_input: bool = True) -> Callable[..., Any]:
    """Return `cls.forward` with edits. `rewrite_forward` is a special case of it.

    Args:
        edits: returns the edits for the forward's source. Of several edits at one node the first is the innermost.
        with_input: whether each method also gets the forward's first argument.

    Raises:
        ResidualNotFound: the forward cannot be rewritten.
    """
    try:
        wrappers, function = _unwrap(getattr(cls, "forward", None))
        with warnings.catch_warnings():  # the source's syntax warnings were shown when it was imported
            warnings.simplefilter("ignore", SyntaxWarning)
            source = Source.of(function)
            _Replace(edits(source), source.self_name(), with_input).visit(source.tree)
            if with_input:
                source.keep_input(_INPUT)
            code = source.compile(function)
        return _rewrap(wrappers, function, _copy_function(function, code, {}))
    except Refusal as refusal:
        raise ResidualNotFound(f"{cls.__name__}.forward {refusal}") from None


@functools.cache  # asked of each layer of a class
def called_paths(cls: type) -> frozenset[str]:
    """Return the paths below `self` that `cls.forward` names, such as "mlp".

    Raises:
        ResidualNotFound: the forward has no source to read.
    """

    def paths(source: Source) -> frozenset[str]:
        name = source.self_name()
        return frozenset(path for node in ast.walk(source.tree) if (path := _below(node, name)) is not None)

    return analyse(cls, paths)


def analyse(cls: type, read: Callable[[Source], _T]) -> _T:
    """Return what `read` finds in the source of `cls.forward`.

    Raises:
        ResidualNotFound: there is no source to read, or it is not understood.
    """
    try:
        return read(Source.of(_unwrap(getattr(cls, "forward", None))[1]))
    except Refusal as refusal:
        raise ResidualNotFound(f"{cls.__name__}.forward {refusal}") from None


def bypass_of_hooks(cls: type) -> str | None:
    """Return the place where `cls.forward` calls the `forward` of modules in a loop, past their hooks: "line 3: ...".

    None: there is no such place, or no source to read.
    """

    def place(source: Source) -> str | None:
        loops = [node.target for node in ast.walk(source.tree) if isinstance(node, ast.For | ast.comprehension)]
        each = {node.id for target in loops for node in ast.walk(target) if isinstance(node, ast.Name)}
        for node in ast.walk(source.tree):
            match node:
                case ast.Call(ast.Attribute(ast.Name(name), "forward")) if name in each:
                    return f"line {node.lineno}: {source.lines[node.lineno - 1].strip()}"
                case ast.Call(ast.Attribute(ast.Subscript(), "forward")):
                    return f"line {node.lineno}: {source.lines[node.lineno - 1].strip()}"
        return None

    try:
        return analyse(cls, place)
    except ResidualNotFound:
        return None


@cached
def unusual_input(cls: type) -> str | None:
    """Return the shape of the hidden state that `cls.forward`, a decoder's, gives its layers, if it is unusual.

    "(tokens, rows, d)" as XLNet's, "(streams, rows, tokens, d)" as Gemma 3n's, or "(rows, tokens, streams, d)" as
    DeepSeek-V4's. None: it is (rows, tokens, d), or there is no source to read.
    """

    def found(source: Source) -> str | None:
        for node in ast.walk(source.tree):
            match node:
                case ast.Call(
                    ast.Attribute(ast.Name("input_ids" | "inputs_embeds"), "transpose"),
                    [ast.Constant(0), ast.Constant(1)],
                ):
                    return "(tokens, rows, d)"
                case ast.Assign(
                    [ast.Name("hidden_states")],
                    ast.Call(ast.Attribute(ast.Name("torch"), "stack"), [_], [ast.keyword("dim", ast.Constant(0))]),
                ):
                    return "(streams, rows, tokens, d)"
                case ast.Call(ast.Attribute(ast.Name("inputs_embeds"), "unsqueeze"), [ast.Constant(2)]):
                    return "(rows, tokens, streams, d)"
        return None

    try:
        return analyse(cls, found)
    except ResidualNotFound:
        return None


def _below(node: ast.AST, name: str) -> str | None:
    """The path of an attribute below the local `name`: of `self.a.b` "a.b"; None of anything else."""
    match node:
        case ast.Attribute(ast.Name(root), attribute) if root == name:
            return attribute
        case ast.Attribute(inner, attribute) if (path := _below(inner, name)) is not None:
            return f"{path}.{attribute}"
    return None


def names_in_final_adds(cls: type) -> list[frozenset[str]]:
    """Return the local names in each sum that may become the hidden state which `cls.forward` returns.

    Raises:
        ResidualNotFound: on some path the forward does not return such a sum.
    """
    adds = analyse(cls, lambda source: final_adds(Reader(source)))
    names = []
    for add in sorted(adds, key=_line):
        names.append(frozenset(part.id for part in ast.walk(add.node) if isinstance(part, ast.Name)))
    return names


class Refusal(Exception):
    """The reason why a forward cannot be rewritten, as the end of a sentence that begins with the forward's name."""


#: The local name under which a rewritten forward keeps its first argument, which it may assign to later.
_INPUT = "fused_steer_block_input"


# ---------------------------------------------------------------------------------------------------------------------
# The source of a function, and back


@dataclass(frozen=True)
class Source:
    """The parsed file of a function. Names, `super()` and `self.__name` compile the same only in the whole file."""

    lines: list[str]
    module: ast.Module
    tree: ast.FunctionDef  # a node of `module`

    @classmethod
    def of(cls, function: FunctionType) -> Source:
        code = function.__code__
        try:
            lines, _ = inspect.findsource(function)
            module = ast.parse("".join(lines))
        except (OSError, TypeError, SyntaxError):
            raise Refusal("has no source to read") from None
        # Other functions and classes of the file do not matter. Without them compiling is faster.
        module.body = [node for node in module.body if not isinstance(node, _Definition) or _spans(node, code)]
        functions = (node for node in ast.walk(module) if isinstance(node, ast.FunctionDef))
        tree = next((node for node in functions if (node.name, _first_line(node)) == _position(code)), None)
        # It differs for a file edited since its import, and for a forward rewritten before. That would be lost.
        if tree is None or (source := cls(lines, module, tree)).compile(function) != code:
            raise Refusal(f"is not the function of its source ({code.co_filename}, line {code.co_firstlineno})")
        return source

    def compile(self, function: FunctionType) -> CodeType:
        """Compile the file and return the code at the function's place."""
        old = function.__code__
        flags = old.co_flags & __future__.annotations.compiler_flag
        module = compile(self.module, old.co_filename, "exec", flags, dont_inherit=True)
        found = (code for code in _nested_code(module) if _position(code) == _position(old))
        return next(found, module)  # the module's own code never equals a function's

    def refuse(self, why: str, node: Node) -> NoReturn:
        raise Refusal(f"{why} (line {node.lineno}: {self.lines[node.lineno - 1].strip()})")

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
    """Makes edits in a syntax tree."""

    def __init__(self, edits: Sequence[Edit], self_name: str, with_input: bool) -> None:
        self.self_name, self.with_input = self_name, with_input
        self.edits: dict[ast.AST, list[Edit]] = {}
        for edit in edits:
            self.edits.setdefault(edit.node, []).append(edit)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        return self._add(node, node.left, node.right) if node in self.edits else node

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        self.generic_visit(node)
        if node not in self.edits or not isinstance(node.target, ast.Name):
            return node
        left = ast.copy_location(ast.Name(node.target.id, ast.Load()), node.target)
        return ast.copy_location(ast.Assign([node.target], self._add(node, left, node.value)), node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        result: ast.expr = node
        for edit in self.edits.get(node, ()):
            if edit.where == "output":
                result = self._call(edit.method, node, [result, *self._entering()])
            elif node.args:
                node.args[0] = self._call(edit.method, node, [node.args[0], *self._entering()])
            else:
                node.keywords[0].value = self._call(edit.method, node, [node.keywords[0].value, *self._entering()])
        return result

    def _add(self, node: ast.expr | ast.stmt, left: ast.expr, right: ast.expr) -> ast.expr:
        """The add's two operands go to the first edit, the sum that it gives to those that follow."""
        first, *others = self.edits[node]
        entering = self._entering()
        if first.branch is None:
            result = self._call(first.method, node, [left, right, *entering])
        else:  # by name, in the order in which they are computed
            names = ("branch", "residual") if first.branch == "left" else ("residual", "branch")
            operands = zip((*names, "entering"), (left, right, *entering), strict=False)
            result = self._call(first.method, node, [], [ast.keyword(name, value) for name, value in operands])
        for edit in others:
            result = self._call(edit.method, node, [result, *self._entering()])
        return result

    def _entering(self) -> list[ast.expr]:
        return [ast.Name(_INPUT, ast.Load())] if self.with_input else []

    def _call(
        self, method: str, at: ast.AST, arguments: list[ast.expr], keywords: Sequence[ast.keyword] = ()
    ) -> ast.expr:
        function = ast.Attribute(ast.Name(self.self_name, ast.Load()), method, ast.Load())
        return ast.fix_missing_locations(ast.copy_location(ast.Call(function, arguments, list(keywords)), at))


# ---------------------------------------------------------------------------------------------------------------------
# Which sums may be the returned hidden state


@dataclass(frozen=True)
class Add:
    """The result of `left + right` or `left += right`. Its operands are in `Reader.operands`."""

    node: ast.BinOp | ast.AugAssign


@dataclass(frozen=True)
class Tuple:
    """A tuple. Only its first element matters. An empty `first` means the empty tuple."""

    first: Values


@dataclass(frozen=True, eq=False)
class Other:
    """Any other value, made at `node`. `what` ends the sentence "forward returns ...".

    Attributes:
        operands: the values from which it was made, each with all that it may be. None: they are not known.
    """

    node: Node
    what: str = "a value that is not a sum"
    operands: tuple[Values, ...] | None = ()


@dataclass(frozen=True, eq=False)
class Call(Other):
    """The result of `self.<path>(...)`, or the first element of it, unchanged. The operands are the arguments."""

    path: str = ""


@dataclass(frozen=True, eq=False)
class Handle(Other):
    """`self.<path>` itself, passed to a function."""

    path: str = ""


Node: TypeAlias = ast.stmt | ast.expr | ast.arg  # what has a line
Values: TypeAlias = "frozenset[Add | Tuple | Other]"  # one entry for each way in which a value may have come about
NONE: Values = frozenset()


@dataclass
class _State:
    """The analysis's knowledge at one point of the function, over all paths to it."""

    names: dict[str, Values]  # what each local name may hold
    read: Values  # values that may have been read, so that others may hold them too
    ran: frozenset[Add] = frozenset()  # adds that may have run

    def copy(self) -> _State:
        return _State(dict(self.names), self.read, self.ran)

    def join(self, other: _State) -> _State:
        # If one side lacks a name, reading it raises there, so only the other side's values count.
        names = {name: self.names.get(name, NONE) | other.names.get(name, NONE) for name in self.names | other.names}
        return _State(names, self.read | other.read, self.ran | other.ran)


def final_adds(reader: Reader) -> frozenset[Add]:
    """Return the adds that may make the returned hidden state. In each call exactly one of them runs, once."""
    source = reader.source
    others = [value for value in reader.returned if isinstance(value, Other)]
    if others:
        other = min(others, key=_line)
        source.refuse(f"returns {other.what}", other.node)
    adds = frozenset(value for value in reader.returned if isinstance(value, Add))
    for add in sorted(adds, key=_line):
        for earlier in sorted(reader.ran_before[add] & adds, key=_line):
            source.refuse(f"may run two final adds in one call, of line {_line(earlier)} and a later one", add.node)
    if not adds:
        source.refuse("never returns", source.tree)
    return adds


def _line(value: Add | Other) -> int:
    return value.node.lineno


class Reader:
    """Follows the values of local names through a function, statement by statement.

    Sequences, `if` and `with` are followed, with the assumption that context managers do not swallow exceptions. Other
    compound statements are opaque: the names that they assign become unknown, and they must not return. These include
    loops, because an add in a loop may run more than once.
    """

    def __init__(self, source: Source) -> None:
        for node in ast.walk(source.tree):
            if isinstance(node, (ast.Global, ast.Nonlocal, ast.Yield, ast.YieldFrom)):
                source.refuse("has a statement that is not followed", node)
        self.source = source
        self.returned: Values = NONE  # for a tuple, its first element
        self.ran_before: dict[Add, frozenset[Add]] = {}
        self.operands: dict[Add, tuple[Values, Values]] = {}
        self.written: set[Add | Call] = set()  # what may have been written to in place after it was made
        #: Where the local names of what a module of the layer gave are read, other than to give it another name.
        self.uses: dict[Call, set[ast.Name]] = {}
        self.self_name = source.self_name()
        parameters = [node for node in ast.walk(source.tree.args) if isinstance(node, ast.arg)]
        names: dict[str, Values] = {p.arg: frozenset({Other(p, f"its argument `{p.arg}`")}) for p in parameters}
        start = _State(names, read=NONE.union(*names.values()))  # the caller holds the arguments
        if self._block(source.tree.body, start) is not None:
            self.returned |= {Other(source.tree, "nothing where its end is reached")}

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
                    self._forget(item, Other(item.context_expr, operands=None), state)
                return self._block(body, state)
            case ast.Return(value):
                self._side_effects(statement, state)
                self.returned |= _hidden(self._value(value, state), statement) if value else {Other(statement)}
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
        self._side_effects(value, state, renames=isinstance(value, ast.Name))
        values = self._value(value, state)
        for target in targets:
            self._side_effects(target, state)
            if isinstance(target, ast.Name):
                state.names[target.id] = values
                continue
            self._forget(target, Other(target, operands=(values,)), state)
            if isinstance(target, ast.Tuple) and isinstance(target.elts[0], ast.Name):
                state.names[target.elts[0].id] = frozenset(_first(value, target) for value in values)

    def _augmented_assign(self, name: str, statement: ast.AugAssign, state: _State) -> None:
        self._side_effects(statement.value, state)
        old = state.names.get(name, NONE)
        right = self._value(statement.value, state)
        new: Values = frozenset({Other(statement, operands=(old, right))})
        in_place = not all(isinstance(value, Tuple) for value in old)
        if in_place:
            self._written_in_place(statement, state)
        if in_place and old & state.read:
            # `h += x` writes into h's memory, but the rewritten add does not. So no other object may hold that memory.
            if isinstance(statement.op, ast.Add):
                what = "a sum written into memory that others may hold"
                new = frozenset({Other(statement, what, (old, right))})
            state.read |= new
        elif isinstance(statement.op, ast.Add):
            new = self._sum(statement, old, right, state)
        state.names[name] = new

    def _opaque(self, statement: ast.stmt, state: _State) -> None:
        self._side_effects(statement, state)
        self._forget(statement, Other(statement, "a value assigned by a statement that is not followed", None), state)
        nodes = [] if isinstance(statement, _Definition) else ast.walk(statement)
        if any(isinstance(node, ast.Return) for node in nodes):
            self.returned |= {Other(statement, "from inside a statement that is not followed", None)}

    def _forget(self, node: ast.AST, other: Other, state: _State) -> None:
        state.names |= dict.fromkeys(_stored_names(node), frozenset({other}))

    def _side_effects(self, node: ast.AST, state: _State, renames: bool = False) -> None:
        """Record reads, assignments inside expressions, and writes into the memory of tensors.

        Args:
            renames: whether a read only gives the value another name.
        """
        asked = {part for test in ast.walk(node) if _asks_for_class(test) for part in ast.walk(test)}
        for part in ast.walk(node):
            match part:
                case ast.Name(name, ast.Load()):
                    values = state.names.get(name, NONE)
                    state.read |= values
                    for value in values:
                        if isinstance(value, Call) and not renames and part not in asked:
                            self.uses.setdefault(value, set()).add(part)
                case ast.NamedExpr():
                    self._forget(part.target, Other(part, operands=None), state)
                case ast.Attribute(ast.Name(self.self_name), ctx=ast.Store()):
                    pass  # `self.x = ...` writes into no tensor
                case ast.AugAssign() | ast.Attribute(ctx=ast.Store()) | ast.Subscript(ctx=ast.Store()):
                    self._written_in_place(part, state)
                case ast.Call(ast.Attribute(attr=name) | ast.Name(name), keywords=keywords):
                    # In PyTorch's naming, `add_` and similar methods write into their argument.
                    in_place = name.endswith("_") and not name.endswith("__")
                    if in_place or any(keyword.arg in ("out", "inplace") for keyword in keywords):
                        self._written_in_place(part, state)

    def _written_in_place(self, node: Node, state: _State) -> None:
        # It is unknown which tensors share memory, so no earlier add can be relied on.
        what = "a sum after which a tensor may be written in place"
        for name, values in state.names.items():
            self.written |= {value for value in values if isinstance(value, (Add, Call))}
            known = not _holds_add(values)
            state.names[name] = _touched(values, node) if known else frozenset({Other(node, what, (values,))})

    def _value(self, node: ast.expr, state: _State) -> Values:
        match node:
            case ast.Name(name) if name in state.names:
                return state.names[name]
            case ast.IfExp(_, body, orelse):
                no = state.copy()
                values = self._value(body, state) | self._value(orelse, no)
                state.ran |= no.ran
                return values
            case ast.Tuple([]):
                return frozenset({Tuple(NONE)})
            case ast.Tuple([first, *_]):
                return frozenset({Tuple(self._value(first, state))})
            case ast.Subscript(sequence, index):
                values = self._value(sequence, state)
                is_first = isinstance(index, ast.Constant) and index.value == 0
                if is_first and all(isinstance(value, Tuple) for value in values):
                    return _hidden(values, node)
                if is_first and values and all(isinstance(value, Call) for value in values):
                    return values
                return frozenset({Other(node, operands=(values,))})
            case ast.BinOp(left, operator, right):
                values, others = self._value(left, state), self._value(right, state)
                if isinstance(operator, ast.Add):
                    return self._sum(node, values, others, state)
                return frozenset({Other(node, operands=(values, others))})
            case ast.Call(ast.Attribute(cast, name)) if name in _CASTS:
                return _touched(self._value(cast, state), node)
            case ast.Call(ast.Attribute(attr=name)) if name in _DESCRIPTIONS:
                return frozenset({Other(node)})
            case ast.Call():
                return frozenset({self._called(node, state)})
            case ast.Attribute(attr=name) if name in _DESCRIPTIONS:
                return frozenset({Other(node)})
            case ast.UnaryOp(operand=operand) | ast.Attribute(operand):
                return frozenset({Other(node, operands=(self._value(operand, state),))})
            case ast.Name() | ast.Constant():
                return frozenset({Other(node)})
        return frozenset({Other(node, operands=None)})

    def _called(self, node: ast.Call, state: _State) -> Other:
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        starred = any(isinstance(argument, ast.Starred) for argument in node.args)
        operands = tuple(self._value(argument, state) for argument in given)
        path = _below(node.func, self.self_name)
        if path is not None:
            return Call(node, operands=None if starred else operands, path=path)
        root: ast.expr = node.func
        while isinstance(root, ast.Attribute):
            root = root.value
        if isinstance(root, ast.Name) and root is node.func and root.id in state.names:
            return Other(node, operands=None)  # a function, or a module, that the forward has chosen
        # What is given modules or methods of the layer may run them.
        if isinstance(node.func, ast.Attribute) and node.func.attr.endswith("_as"):
            given, operands = [], ()  # of an argument of `expand_as` and the like the shape or dtype counts
        handles = (Handle(node, path=path) for argument in given for path in _passed(argument, self.self_name))
        on = () if isinstance(root, ast.Name) and root.id not in state.names else (self._value(root, state),)
        return Other(node, operands=(*on, *operands, *(frozenset({handle}) for handle in handles)))

    def _sum(self, node: ast.BinOp | ast.AugAssign, left: Values, right: Values, state: _State) -> Values:
        if any(isinstance(value, Tuple) for value in left | right):
            return _concatenation(node, left, right)
        if all(map(_is_no_tensor, left)) or all(map(_is_no_tensor, right)):
            return frozenset({Other(node, "a sum of something that is no tensor", (left, right))})
        add = Add(node)
        self.operands[add] = left, right
        self.ran_before[add] = state.ran
        state.ran |= {add}
        return frozenset({add})


#: Tensor methods that change only the dtype or the device.
_CASTS = ("to", "type", "type_as", "float", "half", "bfloat16", "double")

#: Attributes and methods of a tensor that hold none of its values.
_DESCRIPTIONS = ("shape", "size", "dtype", "device", "ndim", "dim")

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


def _touched(values: Values, node: Node) -> Values:
    """The values, but for what modules gave: that may have been changed."""
    return frozenset(
        Other(node, operands=(frozenset({value}),)) if isinstance(value, Call) else value for value in values
    )


def _first(value: Add | Tuple | Other, node: ast.expr) -> Other:
    """The first of what a value is unpacked to."""
    if isinstance(value, Call):
        return value
    return Other(node, operands=(value.first if isinstance(value, Tuple) else frozenset({value}),))


def _passed(node: ast.AST, self_name: str) -> Iterator[str]:
    """The paths below `self` of what an expression names without calling it."""
    path = _below(node, self_name)
    if path is not None:
        yield path
        return
    called = node.func if isinstance(node, ast.Call) and _below(node.func, self_name) is not None else None
    for part in ast.iter_child_nodes(node):
        if part is not called:
            yield from _passed(part, self_name)


def _asks_for_class(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"


def _holds_add(values: Values) -> bool:
    return any(isinstance(value, Add) or isinstance(value, Tuple) and _holds_add(value.first) for value in values)


def _hidden(values: Values, node: Node) -> Values:
    """Return the hidden state in a returned value: the value itself, or a tuple's first element."""
    hidden: Values = NONE
    for value in values:
        hidden |= (value.first or {Other(node, "an empty tuple")}) if isinstance(value, Tuple) else {value}
    return frozenset(Other(node, "a tuple in a tuple") if isinstance(value, Tuple) else value for value in hidden)


def _concatenation(node: Node, left: Values, right: Values) -> Values:
    if not all(isinstance(value, Tuple) for value in left):
        return frozenset({Other(node, "a tuple of unknown beginning", (left,))})
    result: Values = frozenset(value for value in left if value != Tuple(NONE))
    if len(result) == len(left):
        return result
    return result | (right if all(isinstance(value, Tuple) for value in right) else {Other(node)})


def _is_no_tensor(value: Add | Tuple | Other) -> bool:
    """Return whether the value is plainly a number, string or collection: a literal, or an expression without names."""
    if not isinstance(value, Other) or not isinstance(value.node, ast.expr):
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
    raise Refusal(f"is not an ordinary function, but of type {type(function).__name__}")


def _rewrap(wrappers: list[FunctionType], old: FunctionType, new: FunctionType) -> FunctionType:
    for wrapper in reversed(wrappers):
        if not any(_content(cell) is old for cell in wrapper.__closure__ or ()):
            raise Refusal(f"is wrapped by {wrapper.__code__.co_name}, which does not hold it in its closure")
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
