"""Tests of rewritten forwards: the original's bits from one call of the site, and refusal of unclear forwards."""

from __future__ import annotations

import dis
import functools
import importlib
import importlib.util
import inspect
import itertools
import random
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers.modeling_layers import GradientCheckpointingLayer

from fused_steer.model.residual import ResidualNotFound, rewrite_forward


class Layer(nn.Module):
    """Base class of this file's layers."""

    def __init__(self, flag: bool = False) -> None:
        super().__init__()
        self.flag = flag
        self.attn, self.mlp = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.multiplier = 0.22


def site(self: Any, left: Tensor, right: Tensor) -> Tensor:
    self.results.append(left + right)
    return self.results[-1]


class ReassignsItsInput(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """A docstring stays the first statement."""
        x = x * 2
        return x + y


class TakesAnything(nn.Module):
    def forward(self, *args: Tensor) -> Tensor:
        x, y = args[0] * 2, args[1]
        return x + y


@pytest.mark.parametrize(("cls", "named"), [(ReassignsItsInput, True), (TakesAnything, False)])
def test_residual_a_site_is_given_the_first_argument_as_it_came(cls, named):
    given = []

    def site(self: Any, left: Tensor, right: Tensor, entering: Tensor | None) -> Tensor:
        given.append(entering)
        return left + right

    forward = rewrite_forward(cls, "site", with_input=True)
    layer = type(cls.__name__, (cls,), {"forward": forward, "site": site})()
    x, y = torch.randn(3), torch.randn(3)
    assert torch.equal(layer(x, y), cls()(x, y))
    assert len(given) == 1 and given[0] is (x if named else None)
    assert forward.__doc__ == cls.forward.__doc__
    assert forward.__code__.co_firstlineno == cls.forward.__code__.co_firstlineno


def with_site(cls: type) -> type:
    return type(cls.__name__, (cls,), {"forward": rewrite_forward(cls, "site"), "site": site, "results": []})


def hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def assert_rewritten(cls: type, *flags: bool, **kwargs: Any) -> None:
    """Assert that the rewritten forward gives the same bits with one call of the site, for each value of the flag."""
    new_cls = with_site(cls)
    for flag in flags or (False, True):
        torch.manual_seed(0)
        layer = cls(flag)
        x = torch.randn(2, 3, 8)
        expected = layer(x.clone(), **kwargs)
        layer.__class__, layer.results = new_cls, []
        output = layer(x.clone(), **kwargs)
        assert type(output) is type(expected)
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
        assert len(layer.results) == 1
        assert hidden(output) is layer.results[0]


def refusal(cls: type) -> str:
    with pytest.raises(ResidualNotFound) as caught:
        rewrite_forward(cls, "site")
    message = str(caught.value)
    assert message.startswith(f"{cls.__name__}.forward ") and "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------------------------------
# Structures that are rewritten


class PreNorm(Layer):
    def forward(self, hidden_states: Tensor) -> Tensor:
        residual = hidden_states
        hidden_states = self.attn(self.norm(hidden_states))
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.mlp(self.norm(hidden_states))
        hidden_states = residual + hidden_states
        return hidden_states


class DirectReturn(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x) * self.multiplier


class ThreeTerms(Layer):
    def forward(self, x: Tensor) -> Tensor:
        h = x * 1e4 + self.attn(x) + self.mlp(x)
        return h


class BothBranches(Layer):
    def forward(self, hidden_states: Tensor) -> Tensor:
        attn_output = self.attn(hidden_states)
        if self.flag:
            mlp_output = self.mlp(self.norm(hidden_states))
            hidden_states = mlp_output + attn_output + hidden_states
        else:
            attn_output = attn_output + hidden_states
            mlp_output = self.mlp(self.norm(attn_output))
            hidden_states = mlp_output + attn_output
        return hidden_states


class EarlyReturn(Layer):
    def forward(self, x: Tensor) -> Any:
        if self.flag:
            return x + self.attn(x), None
        elif self.multiplier > 1:
            raise ValueError("unreachable")
        y = x + self.mlp(x)
        return y


class ConditionalExpression(Layer):
    def forward(self, x: Tensor) -> Tensor:
        h = self.attn(x)
        return x + h if self.flag else h + x


class ConditionalOperand(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x + (self.attn(x) if self.flag else self.mlp(x))


class InPlace(Layer):
    def forward(self, x: Tensor) -> Tensor:
        h = self.mlp(x)
        h += x
        return h


class InPlaceAfterSum(Layer):
    def forward(self, x: Tensor) -> Tensor:
        h = self.attn(self.norm(x))
        h = self.mlp(h)
        h = x + h
        h += self.norm(x)
        return h


class Annotated(Layer):
    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = x + self.mlp(x)
        return h


class Copied(Layer):
    def forward(self, x: Tensor) -> Tensor:
        out = last = x + self.mlp(x)
        del last
        renamed = out
        return renamed


class ReturnsTuple(Layer):
    def forward(self, x: Tensor) -> tuple:
        weights = self.attn(x)
        x = x + weights
        return x, weights


class ReturnsOneTuple(Layer):
    def forward(self, x: Tensor) -> tuple:
        return (x + self.mlp(x),)


class GrowingTuple(Layer):
    def forward(self, x: Tensor) -> tuple:
        weights = self.attn(x)
        x = x + weights
        outputs = (x,)
        if self.flag:
            outputs += (weights,)
        outputs = outputs + (None,)
        return outputs


class TuplePlusRest(Layer):
    def forward(self, x: Tensor) -> tuple:
        rest = (self.attn(x), None)[1:]
        x = x + self.mlp(x)
        return (x,) + rest


class EmptyTupleFirst(Layer):
    def forward(self, x: Tensor) -> tuple:
        rest = ()
        if self.flag:
            rest += (x,)
        outputs = () + (x + self.mlp(x),) + rest
        return outputs


class FirstOfTuple(Layer):
    def forward(self, x: Tensor) -> tuple:
        outputs = (x + self.mlp(x), x)
        h = outputs[0]
        return h, None


class WithBlock(Layer):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False) as context:
            x = x + self.mlp(x)
        del context
        return x


class UnrelatedStatements(Layer):
    def forward(self, x: Tensor, *, scale: float = 1.0, **kwargs: Any) -> Tensor:
        h = self.mlp(x)
        for _ in range(2):
            h = h + self.attn(x)
        try:
            h = h * kwargs["factor"]
        except KeyError:
            h = h * scale
        h[..., 0] = 0
        h.mul_(0.5)
        x = x + h
        self.last = x
        if x.shape != h.shape:
            raise ValueError
        return x


class UsedTwice(Layer):
    def forward(self, x: Tensor) -> tuple:
        x = x + self.mlp(x)
        captured = [x.detach(), [part for part in x]]
        return x, captured, (lambda: x)()


class PositionalOnly(Layer):
    def forward(this, x: Tensor, /) -> Tensor:
        return x + this.mlp(x)


class EndsInACast(Layer):
    def forward(self, x: Tensor) -> tuple:
        dtype = x.dtype
        if self.flag:
            h = (x + self.mlp(x)).to(dtype=dtype)
        else:
            h = (x + self.mlp(x)).type_as(x)
        return (h,)


class Inherited(PreNorm):
    pass


class WithSuper(PreNorm):
    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        return x + h


class _Mangled(Layer):
    __scale = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x) * self.__scale


ACCEPTED = [
    PreNorm,
    DirectReturn,
    ThreeTerms,
    BothBranches,
    EarlyReturn,
    ConditionalExpression,
    ConditionalOperand,
    InPlace,
    InPlaceAfterSum,
    Annotated,
    Copied,
    ReturnsTuple,
    ReturnsOneTuple,
    GrowingTuple,
    TuplePlusRest,
    EmptyTupleFirst,
    FirstOfTuple,
    WithBlock,
    UnrelatedStatements,
    UsedTwice,
    PositionalOnly,
    EndsInACast,
    Inherited,
    WithSuper,
    _Mangled,
]


@pytest.mark.parametrize("cls", ACCEPTED)
def test_residual_same_bits_through_one_site_call(cls: type) -> None:
    assert_rewritten(cls)


def test_residual_cast_follows_the_site() -> None:
    class Casts(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return (x.double() + self.mlp(x)).to(x.dtype)

    layer = with_site(Casts)()
    layer.site = lambda left, right: left + right + 2.0**-30
    x = torch.randn(4, 8)
    out = layer(x)
    # The site gets the sum in its own dtype, and the layer still returns its original dtype.
    assert out.dtype == torch.float32
    assert torch.equal(out, (x.double() + layer.mlp(x) + 2.0**-30).float())


def test_residual_operands_keep_their_order() -> None:
    layer = with_site(ThreeTerms)()
    seen: list[Tensor] = []
    layer.site = lambda left, right: seen.extend((left, right)) or left
    x = torch.randn(4, 8)
    layer(x)
    assert torch.equal(seen[0], x * 1e4 + layer.attn(x))
    assert torch.equal(seen[1], layer.mlp(x))


# ---------------------------------------------------------------------------------------------------------------------
# Structures that are refused


class PostNorm(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(x)
        x = self.norm(x)
        return x


class OneWayUnchanged(Layer):
    def forward(self, x: Tensor) -> Tensor:
        if self.flag:
            x = x + self.mlp(x)
        return x


class ClampsHalf(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(x)
        if x.dtype == torch.float16:
            x = torch.clamp(x, -1, 1)
        return x


class AddsThenAddsMore(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        if self.flag:
            x = x + self.mlp(x)
        return x


class AddsBoth(Layer):
    def forward(self, x: Tensor) -> Tensor:
        first, second = self.attn(x), self.mlp(x)
        first = x + first
        second = x + second
        return first if self.flag else second


class AddsInElseThenAgain(Layer):
    def forward(self, x: Tensor) -> Tensor:
        if self.flag:
            pass
        else:
            first = x + self.attn(x)
        second = x + self.mlp(x)
        return second if self.flag else first


class AddsBothInExpression(Layer):
    def forward(self, x: Tensor) -> Tensor:
        first = x + self.attn(x) if self.flag else x + self.mlp(x)
        second = x + self.norm(x)
        return second if self.multiplier > 1 else first


class LoopCarried(Layer):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.mlp(x)
        return x


class WhileElse(Layer):
    def forward(self, x: Tensor) -> Tensor:
        while x.sum() < 0:
            break
        else:
            x = x + 1.0 * x
        return x


class ReturnsFromLoop(Layer):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            return x + self.mlp(x)
        return x + self.attn(x)


class InTry(Layer):
    def forward(self, x: Tensor) -> Tensor:
        try:
            y = x + self.mlp(x)
        except RuntimeError:
            raise
        return y


class InMatch(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = x + self.mlp(x)
        match x.shape:
            case [y, *_]:
                pass
        return y


class Walrus(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = x + self.mlp(x)
        if (y := self.norm(y)) is None:
            raise ValueError
        return y


class Unpacked(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = x + self.mlp(x)
        y, _ = self.norm(y), None
        return y


class Indexed(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = x + self.mlp(x)
        y[..., 0] = 0
        return y


class IndexedInLoop(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = x + self.mlp(x)
        for i in range(8):
            y[..., i] += 1
        return y


class InPlaceMethod(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = x + self.mlp(x)
        y.clamp_(-1, 1)
        return y


class InPlaceThroughView(Layer):
    def forward(self, x: Tensor) -> tuple:
        y = x + self.mlp(x)
        outputs = (y,)
        view = y.view(-1)
        view *= 2
        return outputs


class InPlaceOut(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = x + self.mlp(x)
        torch.relu(x) if self.flag else torch.abs(x, out=y)
        return y


class InPlaceFlag(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = x + self.mlp(x)
        nn.functional.relu(y, inplace=True)
        return y


class InPlaceData(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = x + self.mlp(x)
        y.data = x
        return y


class AddsIntoArgument(Layer):
    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.mlp(x)
        residual += x
        return residual


class AddsIntoShared(Layer):
    def forward(self, x: Tensor) -> tuple:
        h = self.mlp(x)
        before = h
        h += x
        return h, before


class AddsIntoHeld(Layer):
    def forward(self, x: Tensor) -> tuple:
        h = self.mlp(x)
        outputs = [h]
        h += x
        return h, outputs


class AddsTwiceIntoHeld(Layer):
    def forward(self, x: Tensor) -> tuple:
        h = self.mlp(x)
        before = h
        h *= 2
        h += x
        return h, before


class AddsIntoArgumentItself(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x += 1.0 * self.multiplier
        return x


class AddsIntoSometimesHeld(Layer):
    def forward(self, x: Tensor) -> Tensor:
        h = self.mlp(x)
        if self.flag:
            self.last = h
        h += x
        return h


class Scales(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(x)
        x *= self.multiplier
        return x


class ScalesHeld(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(x)
        self.last = x
        x *= self.multiplier
        return x


class AddsNumber(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) + 1.0


class AddsNamedNumber(Layer):
    def forward(self, x: Tensor) -> Tensor:
        offset = -1
        return self.mlp(x) + offset


class AddsLists(Layer):
    def forward(self, x: Tensor) -> list:
        return [x] + [self.mlp(x)]


class AddsUnknownToTuple(Layer):
    def forward(self, x: Tensor) -> tuple:
        rest = tuple([x])
        return rest + (x + self.mlp(x),)


class MaybeEmptyTuple(Layer):
    def forward(self, x: Tensor) -> tuple:
        outputs = ()
        if self.flag:
            outputs = (x + self.mlp(x),)
        return outputs


class RepeatsTuple(Layer):
    def forward(self, x: Tensor) -> tuple:
        outputs = (x + self.mlp(x),)
        outputs *= 0
        return outputs


class NestedTuple(Layer):
    def forward(self, x: Tensor) -> tuple:
        return ((x + self.mlp(x), x), x)


class StarredFirst(Layer):
    def forward(self, x: Tensor) -> tuple:
        return (*x, x + self.mlp(x))


class SecondOfTuple(Layer):
    def forward(self, x: Tensor) -> tuple:
        return self.attn(x), x + self.mlp(x)


class ReturnsDict(Layer):
    def forward(self, x: Tensor) -> dict:
        return {"hidden": x + self.mlp(x)}


class TakesApart(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return (x + self.mlp(x)).flatten(1)


class FallsOff(Layer):
    def forward(self, x: Tensor) -> Any:
        if self.flag:
            return x + self.mlp(x)


class ReturnsNothing(Layer):
    def forward(self, x: Tensor) -> Any:
        if self.flag:
            return x + self.mlp(x)
        return


class OnlyRaises(Layer):
    def forward(self, x: Tensor) -> Any:
        raise NotImplementedError


class Nonlocal(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = x + self.mlp(x)

        def change() -> None:
            nonlocal y
            y = self.norm(y)

        change()
        return y


class Redefined(Layer):
    def forward(self, x: Tensor) -> Any:
        y = x + self.mlp(x)
        self.last = y

        def y() -> None:
            return None

        return y


class BoundByWith(Layer):
    def forward(self, x: Tensor) -> Any:
        y = x + self.mlp(x)
        self.last = y
        with torch.no_grad() as y:
            pass
        return y


class Generator(Layer):
    def forward(self, x: Tensor) -> Iterator[Tensor]:
        yield x
        return x + self.mlp(x)


class ReassignsSelf(Layer):
    def forward(self, x: Tensor) -> Tensor:
        self = self.mlp
        return x + self(x)


class WithoutSelf(Layer):
    def forward(*args: Any) -> Tensor:
        return args[1] + args[1]


class IsLambda(Layer):
    forward = lambda self, x: x + x  # noqa: E731


class IsStatic(Layer):
    forward = functools.partial(torch.add)


class NoForward:
    pass


NOT_A_SUM = "returns a value that is not a sum"
IN_PLACE = "returns a sum after which a tensor may be written in place"
OTHERS_HOLD = r"a sum written into memory that others may hold .*\+="
NOT_FOLLOWED = "a statement that is not followed"
REFUSED = [
    (PostNorm, NOT_A_SUM + r" \(line {line}: x = self.norm\(x\)\)"),
    (OneWayUnchanged, "returns its argument `x`"),
    (ClampsHalf, NOT_A_SUM + r" \(line \d+: x = torch.clamp\(x, -1, 1\)\)"),
    (AddsThenAddsMore, "may run two final adds in one call"),
    (AddsBoth, "may run two final adds in one call"),
    (AddsInElseThenAgain, "may run two final adds in one call"),
    (AddsBothInExpression, "may run two final adds in one call"),
    (LoopCarried, f"assigned by {NOT_FOLLOWED} .*for _ in"),
    (WhileElse, f"assigned by {NOT_FOLLOWED} .*while"),
    (ReturnsFromLoop, f"returns from inside {NOT_FOLLOWED} .*for _ in"),
    (InTry, f"assigned by {NOT_FOLLOWED} .*try:"),
    (InMatch, f"assigned by {NOT_FOLLOWED} .*match"),
    (Walrus, NOT_A_SUM + ".*:="),
    (Unpacked, NOT_A_SUM + ".*y, _ ="),
    (Indexed, IN_PLACE + r".*y\[\.\.\., 0\] = 0"),
    (IndexedInLoop, IN_PLACE + r".*y\[\.\.\., i\] \+= 1"),
    (InPlaceMethod, IN_PLACE + ".*clamp_"),
    (InPlaceThroughView, IN_PLACE + r".*view \*= 2"),
    (InPlaceOut, IN_PLACE + ".*out=y"),
    (InPlaceFlag, IN_PLACE + ".*inplace=True"),
    (InPlaceData, IN_PLACE + ".*y.data = x"),
    (AddsIntoArgument, OTHERS_HOLD),
    (AddsIntoShared, OTHERS_HOLD),
    (AddsIntoHeld, OTHERS_HOLD),
    (AddsTwiceIntoHeld, OTHERS_HOLD),
    (AddsIntoArgumentItself, OTHERS_HOLD),
    (AddsIntoSometimesHeld, OTHERS_HOLD),
    (Scales, NOT_A_SUM + r".*\*="),
    (ScalesHeld, NOT_A_SUM + r".*\*="),
    (AddsNumber, "a sum of something that is no tensor"),
    (AddsNamedNumber, "a sum of something that is no tensor"),
    (AddsLists, "a sum of something that is no tensor"),
    (AddsUnknownToTuple, "a tuple of unknown beginning"),
    (MaybeEmptyTuple, "an empty tuple"),
    (RepeatsTuple, NOT_A_SUM + r".*\*= 0"),
    (NestedTuple, "a tuple in a tuple"),
    (StarredFirst, NOT_A_SUM),
    (SecondOfTuple, NOT_A_SUM + ".*self.attn"),
    (ReturnsDict, NOT_A_SUM),
    (TakesApart, NOT_A_SUM + ".*flatten\\(1\\)"),
    (FallsOff, "returns nothing where its end is reached"),
    (ReturnsNothing, NOT_A_SUM + r" \(line \d+: return\)"),
    (OnlyRaises, "never returns"),
    (Nonlocal, f"has {NOT_FOLLOWED} .*nonlocal"),
    (Redefined, f"assigned by {NOT_FOLLOWED} .*def y"),
    (BoundByWith, NOT_A_SUM + ".*as y"),
    (Generator, f"has {NOT_FOLLOWED} .*yield"),
    (ReassignsSelf, "assigns `self`"),
    (WithoutSelf, "takes no `self`"),
    (IsLambda, "is not the function of its source"),
    (IsStatic, "is not an ordinary function, but of type partial"),
    (NoForward, "is not an ordinary function, but of type NoneType"),
]


@pytest.mark.parametrize(("cls", "message"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_residual_refusal_says_why(cls: type, message: str) -> None:
    said = refusal(cls)
    line = cls.forward.__code__.co_firstlineno + 2 if cls is PostNorm else 0
    assert_matches(message.replace("{line}", str(line)), said)


def assert_matches(pattern: str, text: str) -> None:
    assert re.search(pattern, text), text


def test_residual_already_rewritten_is_refused() -> None:
    assert "is not the function of its source" in refusal(with_site(PreNorm))


def test_residual_source_that_cannot_be_read_is_refused() -> None:
    namespace: dict[str, Any] = {}
    exec("class Unreadable:\n    def forward(self, x):\n        return x + self.mlp(x)\n", namespace)
    assert "has no source to read" in refusal(namespace["Unreadable"])


def test_residual_file_edited_since_its_import_is_refused(tmp_path: Path) -> None:
    lines = ["class Edited:", "    def forward(self, x):", "        return x + self.mlp(x)", ""]
    module = import_source(tmp_path / "edited_since.py", "\n".join(lines))
    (tmp_path / "edited_since.py").write_text("\n".join(lines).replace("mlp", "attn_and_mlp"))
    assert "is not the function of its source" in refusal(module.Edited)


@pytest.mark.parametrize("name", ["", "a b", "class", "__steer", "x.y"])
def test_residual_site_must_name_an_attribute(name: str) -> None:
    with pytest.raises(ValueError, match="expected an attribute name"):
        rewrite_forward(PreNorm, name)


# ---------------------------------------------------------------------------------------------------------------------
# Properties of a function beside its body: globals, closure, metadata, lines, decorators


def helper(x: Tensor) -> Tensor:
    return x * 2


class CallsHelper(Layer):
    """A layer with forward's docstring and defaults, which the rewrite must keep."""

    def forward(self, x: Tensor, scale: float = 0.5, *, offset: float = 0.25) -> Tensor:
        """The layer, scaled."""
        return x + helper(x) * scale + offset * x


def test_residual_globals_are_those_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(globals())
    layer, x = with_site(CallsHelper)(), torch.randn(3, 8)
    monkeypatch.setattr(sys.modules[__name__], "helper", lambda x: x * 3)
    assert torch.equal(layer(x), x + x * 3 * 0.5 + 0.25 * x)
    assert set(globals()) == before


def test_residual_metadata_and_defaults_are_kept() -> None:
    old, new = CallsHelper.forward, rewrite_forward(CallsHelper, "site")
    assert new is not old
    for name in ("__name__", "__qualname__", "__module__", "__doc__", "__defaults__", "__kwdefaults__", "__globals__"):
        assert getattr(new, name) == getattr(old, name), name
    assert new.__annotations__ == old.__annotations__ == {
        "x": "Tensor", "scale": "float", "offset": "float", "return": "Tensor"
    }  # fmt: skip
    assert not hasattr(new, "__wrapped__")
    for name in ("co_filename", "co_firstlineno", "co_flags", "co_varnames"):
        assert getattr(new.__code__, name) == getattr(old.__code__, name), name
    assert_rewritten(CallsHelper, offset=0.5)


def test_residual_closures_are_shared_with_the_original() -> None:
    factor, unused = 2.0, object()

    class Closed(Layer):
        def forward(self, x: Tensor) -> Tensor:
            parts = [factor * part for part in (x,)]
            return x + self.mlp(parts[0])

        def see(self) -> object:
            return unused

    assert_rewritten(Closed)
    new = with_site(Closed)()
    x = torch.randn(3, 8)
    factor = 3.0
    assert torch.equal(new(x), x + new.mlp(3.0 * x))


def test_residual_closure_cell_may_be_filled_later() -> None:
    class Closed(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return x + later * self.mlp(x)

    new = with_site(Closed)()
    later, x = 2.0, torch.randn(3, 8)
    assert torch.equal(new(x), x + 2.0 * new.mlp(x))


def test_residual_super_stays_that_of_the_original_class() -> None:
    assert_rewritten(type("Sub", (WithSuper,), {}))


class Fails(Layer):
    def forward(self, x: Tensor) -> Tensor:
        if self.flag:
            raise ArithmeticError("on purpose")
        text = """a string
        over lines"""
        return x + self.mlp(
            x,
        ) * len(text)


def test_residual_tracebacks_show_the_original_lines() -> None:
    def frames(layer: nn.Module, x: Tensor) -> list[tuple[Any, ...]]:
        with pytest.raises(Exception) as caught:  # noqa: B017
            layer(x)
        found = [f for f in traceback.extract_tb(caught.value.__traceback__) if f.name == "forward"]
        own = [f for f in found if f.filename == __file__]
        assert own
        return [(f.lineno, f.line, getattr(f, "colno", None), getattr(f, "end_colno", None)) for f in own]

    for flag, x in ((True, torch.randn(3, 8)), (False, torch.randn(3, 7))):
        assert frames(with_site(Fails)(flag), x) == frames(Fails(flag), x)
    assert_rewritten(Fails, False)


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        wrapper.calls += 1
        return function(self, *args, **kwargs)

    wrapper.calls = 0
    return wrapper


def renamed(old: str, new: str) -> Callable[..., Any]:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def rename(*args: Any, strict: bool = True, **kwargs: Any) -> Any:
            if old in kwargs:
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return rename

    return decorate


class Decorated(Layer):
    @counted
    @renamed("hidden", "x")
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def test_residual_decorators_are_rebuilt_around_the_new_function() -> None:
    new_cls = with_site(Decorated)
    old, new, layer = Decorated.forward, new_cls.forward, new_cls()
    x = torch.randn(3, 8)
    output = layer(hidden=x)
    assert output is layer.results[0] and not output.requires_grad
    assert (new.calls, old.calls) == (1, 0)  # a wrapper that refers to itself refers to its copy
    assert new.__code__ is old.__code__ and new.__wrapped__.__code__ is old.__wrapped__.__code__
    chain = [new]
    while hasattr(chain[-1], "__wrapped__"):
        chain.append(chain[-1].__wrapped__)
    assert len(chain) == 4 and "site" in chain[-1].__code__.co_names
    assert chain[1].__kwdefaults__ == {"strict": True}
    assert "site" not in Decorated.forward.__wrapped__.__wrapped__.__wrapped__.__code__.co_names


class Holder:
    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        functools.update_wrapper(self, function)

    def __get__(self, instance: Any, owner: type) -> Any:
        return self


def held_elsewhere(function: Callable[..., Any]) -> Callable[..., Any]:
    held = [function]

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return held[0](*args)

    return wrapper


def not_said(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(self: Any, *args: Any) -> Any:
        return function(self, *args)

    return wrapper


@pytest.mark.parametrize(
    ("decorator", "message"),
    [
        (Holder, "is not an ordinary function, but of type Holder"),
        (held_elsewhere, "is wrapped by wrapper, which does not hold it in its closure"),
        (not_said, NOT_A_SUM + ".*return function"),
    ],
)
def test_residual_decorators_that_cannot_be_rebuilt_are_refused(decorator: Callable[..., Any], message: str) -> None:
    class Opaque(Layer):
        @decorator
        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(x)

    assert_matches(message, refusal(Opaque))


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch and transformers


@pytest.mark.parametrize("cls", [PreNorm, BothBranches, GrowingTuple, WithSuper])
def test_residual_compiles_without_graph_breaks(cls: type) -> None:
    torch._dynamo.reset()
    new = type(cls.__name__, (cls,), {"forward": rewrite_forward(cls, "site"), "site": lambda self, x, y: x + y})
    layer, x = new(True), torch.randn(2, 8)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(hidden(compiled(x)), hidden(layer(x)))


class Checkpointed(GradientCheckpointingLayer, Layer):
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return hidden_states + self.mlp(hidden_states).square()


@pytest.mark.parametrize("set_late", [False, True])
def test_residual_gradient_checkpointing_recomputes_the_site(set_late: bool) -> None:
    new_cls = with_site(Checkpointed)
    if set_late:  # so that only the copied checkpointing wrapper exists, not the subclass's own
        new_cls.forward = rewrite_forward(Checkpointed, "site")
    layer, x = Checkpointed(), torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    expected, x.grad = x.grad, None
    layer.__class__, layer.results = new_cls, []
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    with set_checkpoint_early_stop(False):  # the add saves nothing, so the recomputation would stop before it
        output = layer(x)
        assert len(layer.results) == 1
        output.sum().backward()
    assert len(layer.results) == 2
    assert torch.equal(x.grad, expected)


FAMILIES = {
    "cohere": "CohereDecoderLayer",
    "gemma2": "Gemma2DecoderLayer",
    "gemma3": "Gemma3DecoderLayer",
    "gpt2": "GPT2Block",
    "gpt_neox": "GPTNeoXLayer",
    "granite": "GraniteDecoderLayer",
    "llama": "LlamaDecoderLayer",
    "mistral": "MistralDecoderLayer",
    "mixtral": "MixtralDecoderLayer",
    "olmo2": "Olmo2DecoderLayer",
    "phi3": "Phi3DecoderLayer",
    "qwen2": "Qwen2DecoderLayer",
    "qwen3": "Qwen3DecoderLayer",
    "qwen3_moe": "Qwen3MoeDecoderLayer",
}


def operations(function: Callable[..., Any]) -> Counter[str]:
    """Count the adds and the site's calls in the function without its decorators."""
    instructions = list(dis.get_instructions(inspect.unwrap(function)))
    adds = [i for i in instructions if i.opname == "BINARY_ADD" or (i.opname == "BINARY_OP" and i.argrepr == "+")]
    return Counter(add=len(adds), site=sum(i.argval == "steering_site" for i in instructions))


@pytest.mark.parametrize(("family", "name"), FAMILIES.items())
def test_residual_transformers_layers_are_rewritten(family: str, name: str) -> None:
    cls = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)
    before, after = operations(cls.forward), operations(rewrite_forward(cls, "steering_site"))
    sites = 2 if family == "gpt_neox" else 1  # one for each value of use_parallel_residual
    assert before["site"] == 0 and after["site"] == sites
    assert before["add"] - after["add"] == sites
    assert operations(cls.forward) == before


# ---------------------------------------------------------------------------------------------------------------------
# Random forwards: an accepted one must be correct


def import_source(path: Path, source: str) -> ModuleType:
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Program:
    """A random forward over the variables a, b, c (tensors) and t (a tuple), with branches on the flags p, q, r."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def source(self) -> str:
        body = ["b = f(a)", "c = b", "t = (a, b)", *self.block(self.random.randint(1, 4), 0), self.returned()]
        return "\n".join(
            ["class Random:", "    def forward(self, a, p, q, r, f):", *("        " + line for line in body), ""]
        )

    def block(self, size: int, depth: int) -> list[str]:
        return [line for _ in range(size) for line in self.statement(depth)]

    def statement(self, depth: int) -> list[str]:
        kinds = ["add"] * 5 + [
            "copy",
            "call",
            "tuple",
            "grow",
            "take",
            "augment",
            "index",
            "method",
            "return",
            "walrus",
        ]
        kinds += ["if", "if", "if", "with", "for", "try"] if depth < 2 else []
        kind, name, other, flag = self.random.choice(kinds), self.name(), self.name(), self.random.choice("pqr")
        simple = {
            "add": f"{name} = {self.sum()}",
            "copy": f"{name} = {other}",
            "call": f"{name} = f({other})",
            "tuple": f"t = ({name}, {self.sum()})",
            "grow": self.random.choice([f"t += ({name},)", f"t = t + ({name},)", f"t = ({self.sum()},) + t"]),
            "take": f"{name} = t[0]",
            "augment": f"{name} += {other}",
            "index": f"{name}[0] = 0",
            "method": f"{name}.mul_(2)",
            "return": f"if {flag}: {self.returned()}",
            "walrus": f"({name} := f({other}))",
        }
        if kind in simple:
            return [simple[kind]]
        inner = ["    " + line for line in self.block(self.random.randint(1, 2), depth + 1)]
        if kind == "if":
            orelse = ["    " + line for line in self.block(self.random.randint(1, 2), depth + 1)]
            return [f"if {flag}:", *inner, *self.random.choice([[], ["else:", *orelse]])]
        if kind == "try":
            return ["try:", *inner, "finally:", "    pass"]
        return [{"with": "with self.context():", "for": f"for _ in range(1 + {flag}):"}[kind], *inner]

    def name(self) -> str:
        return self.random.choice("abc")

    def sum(self) -> str:
        left, right = self.name(), self.name()
        return self.random.choice([f"{left} + f({right})", f"{left} + {right}", f"{left} + {right} + f({left})"])

    def returned(self) -> str:
        name, flag = self.name(), self.random.choice("pqr")
        values = [name, name, name, f"{name}, {self.name()}", "t", self.sum(), f"{name} if {flag} else {self.sum()}"]
        return f"return {self.random.choice(values)}"


class Runner:
    """Runs a forward and records the site's calls."""

    def __init__(self) -> None:
        self.results: list[Tensor] = []

    context = torch.no_grad
    site = site

    def run(self, forward: Callable[..., Any], flags: tuple[bool, ...]) -> tuple[Any, Tensor]:
        """Return the output, and the argument after the call."""
        x = torch.arange(1.0, 5.0, dtype=torch.float64)
        return forward(self, x, *flags, lambda y: (y * 3 - 1) / 7), x


def test_residual_random_forwards_are_right_or_refused(tmp_path: Path) -> None:
    accepted = 0
    for seed in range(800):
        source = Program(seed).source()
        forward_cls = import_source(tmp_path / f"random_{seed}.py", source).Random
        try:
            forward = rewrite_forward(forward_cls, "site")
        except ResidualNotFound:
            continue
        accepted += 1
        for flags in itertools.product((False, True), repeat=3):
            runner = Runner()
            expected, got = Runner().run(forward_cls.forward, flags), runner.run(forward, flags)
            torch.testing.assert_close(got, expected, rtol=0, atol=0, msg=source)
            assert [hidden(got[0]) is result for result in runner.results] == [True], source
    assert accepted > 100
