"""Tests of second derivatives and of forward mode: the ops against autograd on their definitions, on each backend."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from fused_steer.kernels import ACTIVATIONS, post_block
from fused_steer.kernels.grouped import post_block_grouped
from fused_steer.kernels.norm import rms_norm
from fused_steer.kernels.orthogonal import project_gradient, project_out
from fused_steer.kernels.post_block_norm import post_block_norm
from fused_steer.kernels.rotation import rotate, rotate_all
from ops import CALLS, Inputs, definition, make_inputs
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functionalize, grad, hessian, jacrev, jvp, vmap

D = 24
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)

#: A function of tensors that returns one or more tensors, as a tuple.
Function = Callable[..., tuple[Tensor, ...]]


def scattered(shape: Sequence[int], like: Tensor, seed: int) -> Tensor:
    """Numbers of both signs that look random, in the dtype of `like`. vmap refuses random ones."""
    wide = torch.arange(math.prod(shape), dtype=torch.float64)
    return (wide.square() * 0.7 + seed).cos().view(tuple(shape)).to(like.device, like.dtype)


def directions(of: Sequence[Tensor], seed: int = 1) -> tuple[Tensor, ...]:
    return tuple(scattered(t.shape, t, seed + index) for index, t in enumerate(of))


def along(tensors: Sequence[Tensor | None], seed: int = 50) -> Tensor:
    """A number that depends on all tensors, each weighted at random."""
    given = [t for t in tensors if t is not None]
    return sum((t * w).sum() for t, w in zip(given, directions(given, seed), strict=True))


def curved(function: Function) -> Function:
    """The same, so that the gradient of each result depends on the result."""
    return lambda *tensors: tuple(result.sin() for result in function(*tensors))


def assert_near(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    """None is zero: W1's gradient is computed from the output, which depends on b2, so a second derivative is 0."""
    for one, other in zip(found, expected, strict=True):
        if one is None or other is None:
            rest = one if other is None else other
            assert rest is None or rest.abs().max() < 1e-3
        else:
            assert (one.double() - other.double()).norm() <= 2e-5 * (1 + other.double().norm())


def operands(inputs: Inputs, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    given = replace(inputs, basis=None).tensors().values()
    return tuple(t.detach().to(dtype or t.dtype) for t in given)


def of_tensors(run: Callable[[Inputs], tuple[Tensor, ...]], inputs: Inputs) -> Function:
    """Make a call a function of its operands alone. The basis is a constant."""
    names = list(replace(inputs, basis=None).tensors())

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        basis = None if inputs.basis is None else inputs.basis.to(tensors[0].dtype)
        return run(replace(inputs, basis=basis, **dict(zip(names, tensors, strict=True))))

    return function


def steer(activation: str) -> Callable[[Inputs], tuple[Tensor]]:
    def run(x: Inputs) -> tuple[Tensor]:
        return (
            post_block(
                x.residual, x.branch, x.down, x.up, down_bias=x.down_bias, up_bias=x.up_bias, activation=activation,
                scale=x.scale, gain=x.gain, basis=x.basis, reads=x.reads,
            ),
        )  # fmt: skip

    return run


def steer_and_norm(x: Inputs) -> tuple[Tensor, Tensor]:
    return post_block_norm(
        x.residual, x.branch, x.down, x.up, norm_weight=x.residual.new_full(x.residual.shape[-1:], 0.5), eps=1e-5,
        plus_one=True, down_bias=x.down_bias, up_bias=x.up_bias, activation="gelu", scale=x.scale, gain=x.gain,
        basis=x.basis, reads=x.reads,
    )  # fmt: skip


def norm_definition(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


def both_definition(x: Inputs) -> tuple[Tensor, Tensor]:
    out = definition(x, "gelu")
    return out, norm_definition(out, out.new_full(out.shape[-1:], 1.5))


def orders(function: Function, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of first, second and third order, by autograd. The incoming gradient requires one too."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    results = curved(function)(*leaves)
    given = [t.requires_grad_() for t in directions(results, 20)]
    first = torch.autograd.grad(results, leaves, given, create_graph=True)
    second = torch.autograd.grad(along(first), [*leaves, *given], create_graph=True, allow_unused=True)
    third = torch.autograd.grad(along(second, 70), [*leaves, *given], allow_unused=True)
    return [*first, *second, *third]


@each_call
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_of_three_orders(device, call, activation):
    inputs = make_inputs(5, D, **call, device=device)
    expected = orders(of_tensors(lambda x: (definition(x, activation),), inputs), operands(inputs, torch.float64))
    assert_near(orders(of_tensors(steer(activation), inputs), operands(inputs)), expected)


@each_call
def test_derivatives_of_three_orders_behind_a_norm(device, call):
    inputs = make_inputs(5, D, **call, device=device)
    expected = orders(of_tensors(both_definition, inputs), operands(inputs, torch.float64))
    assert_near(orders(of_tensors(steer_and_norm, inputs), operands(inputs)), expected)


def test_derivatives_of_a_norm_alone(device):
    tensors = scattered((2, 5, D), torch.ones(1, device=device), 0), scattered((D,), torch.ones(1, device=device), 1)
    expected = orders(lambda *given: (norm_definition(*given),), [t.double() for t in tensors])
    assert_near(orders(lambda x, weight: (rms_norm(x, weight, eps=1e-5),), tensors), expected)


def test_derivatives_of_second_order_if_only_one_operand_varies(device):
    """Then the output or `a` is not among the saved tensors, or has no gradient of its own. The loss is linear."""
    inputs = make_inputs(5, D, rank=3, device=device)

    def second(function: Function, tensors: tuple[Tensor, ...], place: int) -> list[Tensor | None]:
        leaves = [t.clone().requires_grad_(index == place) for index, t in enumerate(tensors)]
        (first,) = torch.autograd.grad(along(function(*leaves)), leaves[place], create_graph=True)
        if not first.requires_grad:
            return [None]
        return list(torch.autograd.grad(along([first]), leaves[place], allow_unused=True))

    given, exact = operands(inputs), operands(inputs, torch.float64)
    for place in range(len(given)):
        for run, formula in ((steer("silu"), lambda x: (definition(x, "silu"),)), (steer_and_norm, both_definition)):
            expected = second(of_tensors(formula, inputs), exact, place)
            assert_near(second(of_tensors(run, inputs), given, place), expected)


def mixed(function: Function, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Derivatives by torch.func: forward, twice forward, and each of forward and reverse over the other."""
    of, along_all = tuple(range(len(tensors))), directions(tensors)

    def loss(*given: Tensor) -> Tensor:
        return along(curved(function)(*given))

    def slopes(*given: Tensor) -> tuple[Tensor, ...]:
        return grad(loss, of)(*given)

    def forward(*given: Tensor) -> Tensor:
        return jvp(loss, given, along_all)[1]

    return [
        *jvp(curved(function), tensors, along_all)[1],
        jvp(forward, tensors, directions(tensors, 30))[1],
        *jvp(slopes, tensors, along_all)[1],
        *grad(forward, of)(*tensors),
        *grad(lambda *given: along(slopes(*given)), of)(*tensors),
        hessian(lambda first: loss(first, *tensors[1:]))(tensors[0]),
        jacrev(jacrev(lambda last: loss(*tensors[:-1], last)))(tensors[-1]),
        vmap(lambda x: grad(lambda y: along(slopes(y, *tensors[1:])))(x))(torch.stack([tensors[0], -tensors[0]])),
    ]


@each_call
def test_derivatives_by_torch_func(device, call):
    inputs = make_inputs(3, D, **call, device=device)
    exact = operands(inputs, torch.float64)
    expected = mixed(of_tensors(lambda x: (definition(x, "silu"),), inputs), exact)
    assert_near(mixed(of_tensors(steer("silu"), inputs), operands(inputs)), expected)
    expected = mixed(of_tensors(both_definition, inputs), exact)
    assert_near(mixed(of_tensors(steer_and_norm, inputs), operands(inputs)), expected)


@each_call
@pytest.mark.parametrize("graded", [True, False])
def test_derivatives_of_dual_tensors(device, call, graded):
    """Also without gradients, where a kernel would be started on the memory of the tensors."""
    inputs = make_inputs(5, D, **call, device=device)

    def tangents(function: Function, tensors: tuple[Tensor, ...]) -> list[Tensor]:
        with forward_ad.dual_level(), torch.set_grad_enabled(graded):
            duals = [forward_ad.make_dual(*pair) for pair in zip(tensors, directions(tensors), strict=True)]
            return [forward_ad.unpack_dual(result).tangent for result in function(*duals)]

    exact = operands(inputs, torch.float64)
    found = tangents(of_tensors(steer("gelu"), inputs), operands(inputs))
    assert_near(found, tangents(of_tensors(lambda x: (definition(x, "gelu"),), inputs), exact))
    found = tangents(of_tensors(steer_and_norm, inputs), operands(inputs))
    assert_near(found, tangents(of_tensors(both_definition, inputs), exact))


def test_derivatives_by_autograd_of_those_by_torch_func(device):
    """Autograd differentiates from outside of a transform, where its own function does not see it."""
    inputs = make_inputs(5, D, rank=3, device=device)

    def outer(function: Function, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        inner = grad(lambda *given: along(curved(function)(*given)), tuple(range(len(leaves))))(*leaves)
        return torch.autograd.grad(along(inner), leaves)

    expected = outer(of_tensors(lambda x: (definition(x, "tanh"),), inputs), operands(inputs, torch.float64))
    assert_near(outer(of_tensors(steer("tanh"), inputs), operands(inputs)), expected)


def test_derivatives_of_a_call_that_is_zero_keep_its_bits(device):
    """A fresh adapter is exactly zero, also in forward mode."""
    inputs = replace(make_inputs(5, D, rank=3, biases=False, device=device), up=torch.zeros(D, 3, device=device))
    inputs.residual[0, 0] = inputs.branch[0, 0] = -0.0
    with forward_ad.dual_level():
        (out,) = steer("silu")(replace(inputs, up=forward_ad.make_dual(inputs.up, torch.ones_like(inputs.up))))
        primal, tangent = forward_ad.unpack_dual(out)
    expected = inputs.residual + inputs.branch
    assert torch.equal(primal.view(torch.int32), expected.view(torch.int32)) and tangent.any()


@pytest.mark.parametrize("run", [steer("tanh"), steer_and_norm], ids=["op", "norm"])
@pytest.mark.parametrize("zero", ["gain", "scale"])
def test_derivatives_at_a_strength_of_zero(device, zero, run):
    """The shift is zero there, and its derivative by the strength is not."""
    inputs = make_inputs(4, D, rank=3, device=device)
    inputs = replace(inputs, **{zero: torch.zeros_like(getattr(inputs, zero))})
    formula = both_definition if run is steer_and_norm else lambda x: (definition(x, "tanh"),)
    given, exact = operands(inputs), operands(inputs, torch.float64)
    for derive in (orders, lambda function, tensors: jvp(function, tensors, directions(tensors))[1]):
        assert_near(derive(of_tensors(run, inputs), given), derive(of_tensors(formula, inputs), exact))


def test_derivatives_in_a_graph_follow_a_basis(device):
    """A call with a basis after one of the same shapes without: a plan made for one would leave out the other's."""
    inputs = make_inputs(5, D, rank=3, scale=False, device=device)
    for given in (replace(inputs, basis=None), inputs):
        exact = replace(given.map(lambda t: t.double()), scale=inputs.scale)
        (found,) = vmap(lambda x, given=given: steer("silu")(replace(given, residual=x)))(inputs.residual[None])
        assert_near([found[0]], [definition(exact, "silu")])
        found = grad(lambda up, given=given: along(steer("silu")(replace(given, up=up))))(inputs.up)
        expected = grad(lambda up, exact=exact: along((definition(replace(exact, up=up), "silu"),)))(exact.up)
        assert_near([found], [expected])


def at_once(results: tuple[Tensor, ...], leaves: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of several weights of the results: by `is_grads_batched`, by vmap, and one by one."""
    given = [scattered((3, *result.shape), result, 90) for result in results]

    def of(given: Sequence[Tensor], **options: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(results, leaves, given, retain_graph=True, **options)

    found = [of(given, is_grads_batched=True), vmap(lambda *given: of(given))(*given)]
    each = [torch.stack(gradients) for gradients in zip(*map(of, zip(*given, strict=True)), strict=True)]
    for batched in found:
        assert_near(batched, [g.double() for g in each])
    return each


@each_call
def test_derivatives_of_several_gradients_at_once(device, call):
    """A tensor of several has no memory that a kernel could read."""
    inputs = make_inputs(5, D, **call, device=device)
    for run, formula in ((steer("silu"), lambda x: (definition(x, "silu"),)), (steer_and_norm, both_definition)):
        leaves = [t.clone().requires_grad_() for t in operands(inputs)]
        exact = [t.detach().double().requires_grad_() for t in leaves]
        found = at_once(of_tensors(run, inputs)(*leaves), leaves)
        assert_near(found, at_once(of_tensors(formula, inputs)(*exact), exact))


def test_derivatives_of_several_gradients_of_the_other_ops_at_once(device):
    """LoReFT's rotation, a norm, and the projections beside a LoRA."""
    w1, w2, weight = (
        scattered(shape, torch.ones(1, device=device), seed).requires_grad_()
        for seed, shape in enumerate(((3, D), (D, 3), (D,)))
    )
    basis = torch.linalg.qr(w2.detach())[0]
    at_once(rotate(w1, w2), [w1, w2])
    at_once(rotate_all([(w1, w2), (w1 + 1, 2 * w2)])[1], [w1, w2])
    at_once((rms_norm(w1, weight, eps=1e-5),), [w1, weight])
    at_once((project_out(w2[None] + 1, basis[None]),), [w2])
    at_once((project_gradient(w2, basis),), [w2])


def test_derivatives_by_pytorchs_own_checks(monkeypatch):
    """Numerically, in float64, which no kernel computes: of both orders, in both modes, and in batches."""
    monkeypatch.setenv("FUSED_STEER_BACKEND", "torch")
    inputs = make_inputs(3, 8, rank=2, basis=2)
    inputs = replace(inputs.map(lambda t: t.double()), basis=inputs.basis.double())
    leaves = [t.clone().requires_grad_() for t in operands(inputs)]
    for run in (steer("gelu"), steer_and_norm):
        function = of_tensors(run, inputs)
        assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, leaves, check_fwd_over_rev=True, check_batched_grad=True)


def test_derivatives_in_a_functionalized_call(device):
    inputs = make_inputs(3, D, rank=3, device=device)

    def slope(x: Tensor) -> Tensor:
        return grad(lambda x: along(curved(lambda x: steer("silu")(replace(inputs, residual=x)))(x)))(x)

    assert_near([functionalize(slope)(inputs.residual)], [slope(inputs.residual)])


# ------------------------------------------------------------------------------------------------------------- refusals


def test_derivatives_that_no_op_has_are_refused(device):
    x, w1, w2 = (scattered(shape, torch.ones(1, device=device), 0) for shape in ((5, D), (2, 3, D), (2, D, 3)))
    ids = torch.zeros(5, dtype=torch.int32, device=device)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="post_block_grouped was called inside .* forward-mode") as error:
            post_block_grouped(dual, None, w1, w2, ids)
        assert "\n" not in str(error.value)
        scale = torch.ones((), device=device)
        for requires in (False, True):
            down = w1[0].clone().requires_grad_(requires)
            for op in (
                lambda down: torch.ops.fused_steer.post_block_inference(dual, x, down, w2[0], scale, "silu"),
                lambda down: torch.ops.fused_steer.post_block(
                    dual, x, down, w2[0], None, None, None, scale, None, 1.0, "silu", "sum", True
                ),
            ):
                with pytest.raises(RuntimeError, match="got a forward-mode tangent; expected post_block") as error:
                    op(down)
                assert "\n" not in str(error.value)


def test_derivatives_of_graphs_are_refused_in_forward_mode(device):
    class Steered(torch.nn.Module):
        def forward(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
            return post_block(x, x, down, up)

    inputs = make_inputs(5, D, rank=3, device=device)
    given = inputs.residual, inputs.down, inputs.up
    exported = torch.export.export(Steered(), given).module()
    compiled = torch.compile(Steered(), backend="aot_eager")
    for run in (exported, compiled):
        with torch.no_grad(), forward_ad.dual_level():
            run(*given)
            dual = forward_ad.make_dual(given[0], torch.ones_like(given[0]))
            with pytest.raises(RuntimeError, match="outside of compiled and exported graphs"):
                run(dual, *given[1:])


def test_derivatives_of_a_compiled_transform(device):
    """The op runs uncompiled there."""
    inputs = make_inputs(3, D, rank=3, scale=False, device=device)
    exact = replace(inputs.map(lambda t: t.double()), scale=inputs.scale)

    def second(run: Callable[[Inputs], tuple[Tensor]], given: Inputs) -> list[Tensor]:
        def slope(x: Tensor) -> Tensor:
            return grad(lambda x: along(curved(lambda x: run(replace(given, residual=x)))(x)))(x)

        return [
            torch.compile(lambda x: jvp(slope, (x,), (x.cos(),))[1], backend="aot_eager")(given.residual),
            torch.compile(grad(lambda x: along([slope(x)])), backend="aot_eager")(given.residual),
        ]

    try:
        found = second(steer("silu"), inputs)
        assert_near(found, second(lambda x: (definition(x, "silu"),), exact))
    finally:
        torch._dynamo.reset()  # PyTorch marks the code that it could not compile


# ------------------------------------------------------------------------------------------------- LoReFT's rotation


def rotation_definition(source: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """By PyTorch's QR decomposition, with its signs turned so that U's diagonal is positive."""
    q, upper = torch.linalg.qr(matrix)
    q = q * upper.diagonal().sign()
    return source - q.t(), q


@pytest.mark.parametrize("turned", [False, True], ids=["any matrix", "orthonormal columns"])
def test_derivatives_of_a_rotation(turned):
    matrix = scattered((D, 3), torch.ones(1), 1)
    tensors = scattered((3, D), torch.ones(1), 0), torch.linalg.qr(matrix)[0] if turned else matrix
    exact = [t.double() for t in tensors]
    expected = orders(rotation_definition, exact)
    assert_near(orders(rotate, tensors), expected)
    pairs = [tensors, (tensors[0] + 1, 2 * tensors[1])]
    both = [t for pair in pairs for t in pair]

    def at_once(*given: Tensor) -> tuple[Tensor, ...]:
        first, second = rotate_all([given[:2], given[2:]])
        return *first, *second

    def each(*given: Tensor) -> tuple[Tensor, ...]:
        return *rotation_definition(*given[:2]), *rotation_definition(*given[2:])

    assert_near(orders(at_once, both), orders(each, [t.double() for t in both]))
    expected = jvp(rotation_definition, tuple(exact), directions(exact))[1]
    assert_near(jvp(rotate, tensors, directions(tensors))[1], expected)
    assert torch.equal(rotate(*tensors)[1], jvp(rotate, tensors, directions(tensors))[0][1])
