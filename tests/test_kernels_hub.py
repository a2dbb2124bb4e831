"""Tests of the layout for Hugging Face's Kernels hub: the generated package imports and computes, without a network."""

import ast
import importlib.util
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import fused_steer.kernels
import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "integrations" / "kernels_hub" / "generate.py"
hub = runpy.run_path(str(SCRIPT))
LIBRARY = next((found for found in metadata.distributions(name="kernels")), None)


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    return hub["generate"](tmp_path_factory.mktemp("hub") / "repository")


@pytest.fixture(scope="module")
def loaded(package):
    """Import the package as the library `kernels` does: by its path, under a name of its own."""
    name = "fused_steer_kernels_0123abcd"
    spec = importlib.util.spec_from_file_location(
        name, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for other in [other for other in sys.modules if other.partition(".")[0] == name]:
        del sys.modules[other]


def test_kernels_hub_op_gives_the_same_bits(loaded, device):
    """On each backend the generated op and ours give the same results and gradients, in one process."""
    torch.manual_seed(0)
    given = [torch.randn(3, 5, 48, device=device), torch.randn(3, 5, 48, device=device)]
    given += [torch.randn(4, 48, device=device), torch.randn(48, 4, device=device)]
    found = []
    for op in (loaded.post_block, fused_steer.kernels.post_block):
        operands = [tensor.clone().requires_grad_() for tensor in given]
        out = op(*operands, activation="gelu", scale=0.5)
        out.square().sum().backward()
        found.append([out.detach(), *(operand.grad for operand in operands)])
    assert all(map(torch.equal, *found))


def test_kernels_hub_ops_have_their_own_namespace(loaded, package):
    own = hub["namespace"](
        {path.name: path.read_text() for path in (ROOT / "kernels").glob("*.py") if path.name not in hub["_TOOLS"]}
    )
    assert hasattr(getattr(torch.ops, own), "post_block") and own != "fused_steer"
    text = "".join(path.read_text(encoding="utf-8") for path in package.glob("*.py"))
    assert "torch.ops.fused_steer." not in text and '"fused_steer"' not in text and '"fused_steer::' not in text


def test_kernels_hub_modules_are_the_sources_but_for_the_namespace(package):
    for path in package.glob("*.py"):
        source = (ROOT / "kernels" / path.name).read_text(encoding="utf-8").splitlines()
        for ours, theirs in zip(source, path.read_text(encoding="utf-8").splitlines(), strict=True):
            assert theirs == ours or "fused_steer_" in theirs and "fused_steer" in ours


def test_kernels_hub_modules_import_only_what_the_hub_allows(package):
    """The standard library, torch with Triton, and the package itself by relative imports."""
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for path in package.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert {name.partition(".")[0] for name in names} <= allowed, path.name


def test_kernels_hub_build_file_has_what_the_builder_reads(package):
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    build = tomllib.loads((package.parents[1] / "build.toml").read_text(encoding="utf-8"))
    assert build["general"].keys() >= {"name", "version", "edition", "license", "backends", "hub"}
    assert build["general"]["name"].replace("-", "_") == package.name and build["torch-noarch"] == {}
    for name in ("flake.nix", "CARD.md", "LICENSE", "tests/test_post_block.py"):
        assert (package.parents[1] / name).is_file()


#: Runs away from the checkout, where a folder kernels/ hides the library `kernels`.
WITH_THE_LIBRARY = """
import json, shutil, sys
from pathlib import Path

import kernels, torch
from kernels._rust import Build

repository = Path(sys.argv[1])
print(*sorted(map(str, Build.open(repository).general.backends)))
variant = repository / "build" / "torch-cpu"
shutil.copytree(repository / "torch-ext" / "fused_steer_kernels", variant)
entries = {"id": "_fused_steer_kernels_cpu_0123abc", "name": "fused-steer-kernels", "version": 1}
entries |= {"license": "Apache-2.0", "python-depends": [], "backend": {"type": "cpu"}}
(variant / "metadata.json").write_text(json.dumps(entries))
hub = kernels.get_local_kernel(repository, backend="cpu")
torch.manual_seed(0)
x, branch, down, up = torch.randn(3, 48), torch.randn(3, 48), torch.randn(4, 48), torch.randn(48, 4)
torch.save((x, branch, down, up, hub.post_block(x, branch, down, up, activation="gelu")), repository / "found.pt")
"""


@pytest.mark.skipif(LIBRARY is None, reason="needs `pip install kernels`")
def test_kernels_hub_the_library_loads_the_repository(tmp_path):
    """The builder's own parser takes build.toml. `get_local_kernel` loads the modules, laid out as a built variant."""
    hub["generate"](tmp_path / "repository")
    command = [sys.executable, "-c", WITH_THE_LIBRARY, tmp_path / "repository"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["cpu", "cuda", "rocm", "xpu"]
    *operands, found = torch.load(tmp_path / "repository" / "found.pt")
    assert torch.equal(found, fused_steer.kernels.post_block(*operands, activation="gelu"))


def test_kernels_hub_a_full_folder_is_refused(tmp_path):
    (tmp_path / "mine").write_text("")
    result = subprocess.run([sys.executable, SCRIPT, tmp_path], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "is not empty" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
