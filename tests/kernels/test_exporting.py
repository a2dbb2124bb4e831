"""Tests that exported programs of the ops become programs of PyTorch's operations alone."""

import pytest
import torch
from fused_steer.kernels import ACTIVATIONS, decompositions, post_block
from fused_steer.kernels.post_block_norm import post_block_norm
from ops import CALLS, Inputs, make_inputs
from torch import Tensor, nn

each_call = pytest.mark.parametrize(
    "call", [*CALLS.values(), {"rank": 3, "dtype": torch.bfloat16}], ids=[*CALLS, "bfloat16"]
)


class Steered(nn.Module):
    """The op as a module, with the adapter as parameters."""

    def __init__(self, inputs: Inputs, activation: str = "silu", norm: bool = False) -> None:
        super().__init__()
        self.inputs, self.activation, self.norm = inputs, activation, norm
        for name in ("down", "up", "down_bias", "up_bias"):
            value = getattr(inputs, name)
            setattr(self, name, None if value is None else nn.Parameter(value))

    def forward(self, residual: Tensor, branch: Tensor | None = None) -> tuple[Tensor, ...]:
        given, options = self.inputs, {}
        op = post_block
        if self.norm:
            op, options = post_block_norm, {"norm_weight": residual.new_full((24,), 0.5), "eps": 1e-5, "plus_one": True}
        found = op(
            residual, branch, self.down, self.up, down_bias=self.down_bias, up_bias=self.up_bias,
            activation=self.activation, scale=given.scale, gain=given.gain, basis=given.basis, reads=given.reads,
            **options,
        )  # fmt: skip
        return found if isinstance(found, tuple) else (found,)


def ours(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if "fused_steer" in str(node.target)]


def plain(program: torch.export.ExportedProgram, core: bool) -> torch.export.ExportedProgram:
    """Check that the program has nodes of the package, and replace them."""
    assert ours(program)
    table = torch.export.default_decompositions() if core else {}
    table.update(decompositions())
    replaced = program.run_decompositions(table)
    assert not ours(replaced)
    return replaced


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    bound = 2e-5 if found.dtype == torch.float32 else 2e-2
    assert (found.double() - expected.double()).norm() <= bound * (1 + expected.double().norm())


@each_call
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("graded", [False, True])
def test_exporting_leaves_operations_of_pytorch(call, norm, graded):
    inputs = make_inputs(5, 24, **call)
    module = Steered(inputs, norm=norm)
    states = (inputs.residual,) if inputs.branch is None else (inputs.residual, inputs.branch)
    with torch.set_grad_enabled(graded):
        program = torch.export.export(module, states)
        expected = module(*states)
        for core in (False, True):
            for one, other in zip(plain(program, core).module()(*states), expected, strict=True):
                assert_near(one, other)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_exporting_each_activation_for_any_number_of_tokens(activation):
    inputs = make_inputs(5, 24, rank=3, biases=False, gain=False, basis=0)
    module = Steered(inputs, activation).requires_grad_(False)
    tokens = torch.export.Dim("tokens")
    shapes = {"residual": {0: tokens}, "branch": {0: tokens}}
    program = torch.export.export(module, (inputs.residual, inputs.branch), dynamic_shapes=shapes)
    assert ours(program) == ["fused_steer.post_block_inference.default"]
    others = torch.randn(9, 24), torch.randn(9, 24)
    assert_near(plain(program, True).module()(*others)[0], module(*others)[0])


@each_call
@pytest.mark.parametrize("norm", [False, True])
def test_exporting_a_training_graph(call, norm):
    """The backward ops, in a graph that make_fx has recorded."""
    from torch.fx.experimental.proxy_tensor import make_fx

    inputs = make_inputs(5, 24, **call)
    module = Steered(inputs, norm=norm)
    leaves = [inputs.residual] if inputs.branch is None else [inputs.residual, inputs.branch]
    parameters = list(module.parameters())

    def step(*states: Tensor) -> list[Tensor]:
        given = [state.detach().requires_grad_() for state in states]
        loss = sum(result.float().sin().sum() for result in module(*given))
        return list(torch.autograd.grad(loss, [*given, *parameters]))

    expected = make_fx(step)(*leaves)
    found = make_fx(step, decomposition_table=decompositions())(*leaves)
    assert any("backward" in str(node.target) and "fused_steer" in str(node.target) for node in expected.graph.nodes)
    assert not any("fused_steer" in str(node.target) for node in found.graph.nodes)
    for one, other in zip(found(*leaves), expected(*leaves), strict=True):
        assert_near(one, other)


def test_exporting_to_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    inputs = make_inputs(5, 24, rank=3)
    module = Steered(inputs).requires_grad_(False)
    program = plain(torch.export.export(module, (inputs.residual, inputs.branch)), True)
    path = tmp_path / "steered.onnx"
    torch.onnx.export(program, dynamo=True).save(path)
    session = onnxruntime.InferenceSession(path)
    names = [given.name for given in session.get_inputs()]
    (found,) = session.run(None, dict(zip(names, (inputs.residual.numpy(), inputs.branch.numpy()), strict=True)))
    assert_near(torch.from_numpy(found), module(inputs.residual, inputs.branch)[0])
