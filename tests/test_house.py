"""Tests of the package's layout: its map names every file, and imports go one way."""

import ast
import re
import sys
import threading
from pathlib import Path

import pytest
from hardware import alone

ROOT = Path(__file__).parents[1]
PACKAGES = {"fused_steer": ROOT / "fused_steer", "kernels": ROOT / "kernels", "bench": ROOT / "bench"}
_LINE = re.compile(r"^( +)([\w./]+) +\S")


def mapped(package: Path) -> list[str]:
    """Return the files that the map in the package's docstring names, in order, as paths from the package."""
    found: list[str] = []
    folder, depth = "", 4
    for line in (ast.get_docstring(ast.parse((package / "__init__.py").read_text()), clean=False) or "").splitlines():
        entry = _LINE.match(line)
        if entry is None or len(entry[1]) not in (4, 8):
            continue
        if len(entry[1]) < depth:
            folder = ""
        depth = len(entry[1])
        if entry[2].endswith("/"):
            folder = entry[2]
        elif entry[2].endswith(".py"):
            found.append((folder if depth == 8 else "") + entry[2])
    return found


def files(package: Path) -> set[str]:
    """Return the package's files, without pytest's and without bench/stub/, which is a separate program."""
    paths = (path.relative_to(package).as_posix() for path in package.rglob("*.py"))
    return {path for path in paths if not re.search(r"__init__\.py$|^stub/|^test_|^conftest\.py$", path)}


def imports(file: Path, package: Path) -> set[str]:
    """Return the package's files that `file` imports, at any depth and also only for types. kernels counts as one."""
    here = file.relative_to(package).parent.parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = here[: len(here) - node.level + 1]
        assert len(here) >= node.level - 1, f"{file} imports beyond {package.name}"
        parts = (*base, *(node.module or "").split(".")) if node.module else base
        if parts[:1] == ("kernels",):
            found.add("kernels")
            continue
        for name in (alias.name for alias in node.names):
            inner, outer = "/".join((*parts, name)), "/".join(parts)
            for path in (f"{inner}.py", f"{inner}/__init__.py", f"{outer}.py", f"{outer}/__init__.py".lstrip("/")):
                if (package / path).is_file():
                    found.add(path)
                    break
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_house_map_names_every_file_once(package):
    named = mapped(PACKAGES[package])
    assert sorted(named) == sorted(files(PACKAGES[package]))


@pytest.mark.parametrize("package", ["fused_steer", "kernels"])
def test_house_imports_go_up_the_map(package):
    """A file imports only files above it in the map. So no files or folders import each other in a circle."""
    folder = PACKAGES[package]
    order = mapped(folder)
    places = {path: place for place, path in enumerate(order)}
    wrong = []
    for path in order:
        for other in imports(folder / path, folder):
            if other == "kernels" or other == "__init__.py" and package == "kernels":
                continue
            inner = other.removesuffix("/__init__.py")
            last = max((p for name, p in places.items() if name.startswith(f"{inner}/")), default=None)
            place = last if other.endswith("__init__.py") else places[other]
            if place is None or place >= places[path]:
                wrong.append(f"{path} imports {other}")
    assert wrong == []
    folders = [path.rpartition("/")[0] for path in order]
    runs = [name for before, name in zip(["", *folders], folders, strict=False) if name != before and name]
    assert len(runs) == len(set(runs)), "a folder's files stand apart in the map"


def test_house_tests_mirror_the_folders():
    rooms = {path.name for path in (ROOT / "fused_steer").iterdir() if (path / "__init__.py").is_file()}
    tested = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    # A folder "vllm" on the path would pass for vLLM where that is not installed: its tests are tests/test_vllm*.py.
    assert tested == rooms - {"vllm"} | {"kernels", "bench"}


#: Packages that every environment of the tests has. Others may be missing, where only the GPU tests are run.
INSTALLED = {
    *("fused_steer", "bench", "torch", "functorch", "transformers", "tokenizers", "safetensors", "huggingface_hub"),
    *("numpy", "peft", "accelerate", "yaml", "typer", "click", "pytest", "_pytest", "packaging", "triton"),
}


def test_house_tests_are_collected_without_optional_packages():
    """A module of tests imports an optional package inside a test, or after `pytest.importorskip`."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    own = {file.stem for file in files}
    wrong = []
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        skips = any("importorskip" in ast.unparse(node) for node in tree.body if not isinstance(node, ast.FunctionDef))
        for node in tree.body:
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {name.partition(".")[0] for name in names} - INSTALLED - own - sys.stdlib_module_names:
                if not skips and file.name != "vllm_compiled_on_cpu.py":
                    wrong.append(f"{file.name}: {name}")
    assert wrong == []


def test_house_tests_that_take_gigabytes_of_a_gpu_run_one_at_a_time():
    """The test processes share a GPU, and each of these tests takes a large part of its memory."""
    found = {}
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and "past_two_to_the" in node.name:
                marks = " ".join(map(ast.unparse, node.decorator_list))
                found[node.name] = "usefixtures('whole_gpu')" in marks
    assert len(found) == 5 and all(found.values()), found


def test_house_a_lock_lets_one_at_a_time(tmp_path):
    begun, order = threading.Event(), []

    def second() -> None:
        begun.set()
        with alone(tmp_path / "lock"):
            order.append("second")

    other = threading.Thread(target=second)
    with alone(tmp_path / "lock"):
        other.start()
        assert begun.wait(10)
        other.join(0.3)
        order.append("first")
    other.join(10)
    assert order == ["first", "second"]


def test_house_no_file_is_long_without_a_reason():
    long = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / "fused_steer").rglob("*.py")
    }
    unexplained = [
        name
        for name, lines in long.items()
        if lines > 500
        and "one file because" not in (ast.get_docstring(ast.parse((ROOT / name).read_text(encoding="utf-8"))) or "")
    ]
    assert unexplained == []


def test_contributing_names_files_that_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b((?:bench|docs|fused_steer|kernels|tests)/[\w/]+\.(?:py|md))\b", text))
    assert len(named) > 15
    assert [name for name in sorted(named) if "NAME" not in name and not (ROOT / name).is_file()] == []
