"""Tests of the command `fused-steer`: help, doctor and inspect, with their exit codes and one-line errors."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata

import pytest
import torch
import typer
from command import assert_refused, invoke, plain_output  # noqa: F401 - an autouse fixture
from models import LAYERS, build

from fused_steer import SteerConfig, __version__, patch_model
from fused_steer._requirements import OPTIONAL, TRIED
from fused_steer.adapters.files import CONFIG_NAME, WEIGHTS_NAME
from fused_steer.cli import app
from fused_steer.tools.doctor import Finding

VERBS = ("demo", "fit", "extract", "train", "serve-plan", "verify-vllm", "eval", "chat", "doctor", "inspect")
VERBS += ("compare", "kernels", "bench", "coverage", "diagnose", "import", "export", "playground")


# --------------------------------------------------------------------------------------------------------------- help


def test_cli_help_names_the_program_and_its_verbs():
    result = invoke("--help")
    assert result.exit_code == 0
    assert "Usage: fused-steer " in result.stdout
    for verb in VERBS:
        assert re.search(rf"^\W*{verb} ", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("verb", VERBS)
def test_cli_each_verb_has_help(verb):
    result = invoke(verb, "--help")
    assert result.exit_code == 0
    assert f"Usage: fused-steer {verb}" in result.stdout


def test_cli_help_loses_no_words_in_brackets():
    """rich takes [word] in a help text for markup and leaves it out, such as an extra's name."""
    from rich.text import Text

    commands = [typer.main.get_command(app)]
    for command in commands:
        commands += getattr(command, "commands", {}).values()
        for text in [command.help, *(getattr(option, "help", None) for option in command.params)]:
            assert Text.from_markup(text or "").plain == (text or "")


def test_cli_version():
    assert invoke("--version").stdout == f"fused-steer {__version__}\n"


@pytest.mark.parametrize("arguments", [["inspect"], ["demo", "--steps", "many"], ["doctor", "--no-such"], ["nothing"]])
def test_cli_usage_errors_are_2(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr


def test_cli_the_command_starts_without_torch():
    """`--help` in a fresh process does not import torch."""
    code = (
        "import sys; from fused_steer.cli import app; app(['--help'], standalone_mode=False)\n"
        "print(sorted({'torch', 'triton', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


def test_cli_no_value_may_be_empty(capsys):
    """An empty path would mean the current directory."""
    import typer

    def checked(command, *path):
        for name, one in getattr(command, "commands", {}).items():
            yield from checked(one, *path, name)
        before = []
        for parameter in [] if hasattr(command, "commands") else command.params:
            is_flag = getattr(parameter, "is_flag", False) or parameter.name in ("help", "doses")
            if parameter.param_type_name == "argument":
                yield parameter.opts[0], [*path, *before, ""]
                before.append("x")
            elif not is_flag and parameter.default != "":
                yield parameter.opts[0], [*path, parameter.opts[0], ""]

    command = typer.main.get_command(app)
    found = list(checked(command))
    assert len(found) > 100
    for name, arguments in found:
        assert command.main(arguments, standalone_mode=False) == 1
        assert capsys.readouterr().err == f"fused-steer: {name} is ''; expected a value that is not empty\n"


def test_cli_a_point_is_the_current_directory(tmp_path, monkeypatch):
    patch_model(build(), SteerConfig(form="vector", layers=[1])).steering.save(tmp_path / "vector")
    monkeypatch.chdir(tmp_path)
    assert invoke("export", "vector", "vector", "--out", "v.pt").exit_code == 0
    (tmp_path / "here").mkdir()
    monkeypatch.chdir("here")
    known = ("--scale", 1, "--num-layers", LAYERS, "--layers-path", "model.layers")
    result = invoke("import", "vector", "../v.pt", "--out", ".", *known)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "here" / CONFIG_NAME).is_file()


def test_cli_a_narrow_or_piped_table_cuts_no_path(tmp_path, monkeypatch):
    path = tmp_path / ("long" * 30) / ("name" * 10)
    patch_model(build(), SteerConfig(form="vector")).steering.save(path)
    assert "…" not in invoke("inspect", path).stdout
    monkeypatch.delenv("COLUMNS")  # a pipe says nothing of its width
    assert str(path) in invoke("inspect", path).stdout


@pytest.mark.parametrize("goes", [False, True], ids=["of any encoding", "whose reader goes"])
def test_cli_stdout(goes):
    code = """
from fused_steer.cli.shared import app, echo, errors_in_one_line

@app.command()
def say():
    with errors_in_one_line():
        echo("‖W1‖" * 100_000)

@app.command()
def no():
    pass

app(["say"])
"""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) as process:
        out = b"" if goes else process.stdout.read()
        process.stdout.close()
        error = process.stderr.read()
    assert error == b""
    assert (process.returncode, out) == ((1, b"") if goes else (0, rb"\u2016W1\u2016" * 100_000 + b"\n"))


# ------------------------------------------------------------------------------------------------------------- doctor


def findings(result) -> dict[str, str]:
    """Return the doctor's lines by subject."""
    lines = re.findall(r"^(ok|unused|untried|absent|NOT WELL) +(\S+?):? (.*)$", result.stdout, re.MULTILINE)
    return {subject: f"{mark}: {text}" for mark, subject, text in lines}


@pytest.fixture
def installed(monkeypatch):
    """Pretend that fused-steer is installed and all its requirements are met; a test may change the entries."""
    requires = ["torch>=2.11,<2.99", "safetensors", "nothing-such; sys_platform == 'none'", "gguf>=99; extra == 'demo'"]
    versions = {"fused-steer": __version__, "torch": "2.13.0+cpu", "safetensors": "0.8.0"}
    state = {"requires": requires, "versions": versions, "python": ">=3.10"}

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda name: state["requires"])
    monkeypatch.setattr(metadata, "metadata", lambda name: {"Requires-Python": state["python"]})
    return state


def test_cli_doctor_finds_all_well(installed):
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    found = findings(result)
    assert found["torch"] == f"ok: 2.13.0+cpu (tried: {TRIED['torch']})"
    assert found["safetensors"] == "ok: 0.8.0 (supported: any version)"
    assert {"fused-steer", "python", "cpu"} <= found.keys()
    assert "nothing-such" not in found  # a requirement of another platform
    assert "NOT WELL" not in result.stdout


@pytest.mark.parametrize("reason", [None, "it has no FixedLayout"])
def test_cli_doctor_says_how_compiled_layers_are_started(installed, monkeypatch, reason):
    from fused_steer.kernels import inductor

    monkeypatch.setattr(inductor, "missing", lambda: reason)
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    mark = "ok: generated code" if reason is None else "untried: a layer's kernels are started through PyTorch's disp"
    line = findings(result)["torch.compile"]
    assert line.startswith(mark) and (reason or "") in line


@pytest.mark.skipif(torch.accelerator.is_available(), reason="with a GPU, only its kernels are shown")
def test_cli_doctor_lists_the_kernels_of_every_target(installed):
    rows = re.findall(r"(sm_\d+|gfx\w+)\W+(\w+_kernel)", invoke("doctor").stdout)
    assert {target for target, _ in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {kernel for _, kernel in rows} == {
        "pack_adapter_kernel",
        "post_block_fwd_kernel",
        "post_block_bwd_rows_kernel",
        "post_block_bwd_columns_kernel",
        "post_block_bwd_finish_kernel",
    }


@pytest.mark.parametrize(
    ("spoil", "subject", "line"),
    [
        (
            lambda s: s["versions"].update(torch="2.10.1"),
            "torch",
            "NOT WELL: 2.10.1; expected <2.99,>=2.11; pip install 'torch<2.99,>=2.11'",
        ),
        (
            lambda s: s["versions"].pop("torch"),
            "torch",
            "NOT WELL: not installed; expected <2.99,>=2.11; pip install 'torch<2.99,>=2.11'",
        ),
        (
            lambda s: s["versions"].pop("fused-steer"),
            "fused-steer",
            f"NOT WELL: not installed; expected =={__version__}; pip install 'fused-steer=={__version__}'",
        ),
        (
            lambda s: s["versions"].update({"fused-steer": "9"}),
            "fused-steer",
            f"NOT WELL: 9; expected =={__version__}; pip install 'fused-steer=={__version__}'",
        ),
        (
            lambda s: s.update(python=">=4"),
            "python",
            f"NOT WELL: {'.'.join(map(str, sys.version_info[:3]))}; expected >=4",
        ),
    ],
    ids=["old torch", "no torch", "not installed", "another version of ours", "old python"],
)
def test_cli_doctor_says_which_version_is_expected(installed, spoil, subject, line):
    spoil(installed)
    result = invoke("doctor")
    assert result.exit_code == 1
    assert findings(result)[subject] == line
    assert [text for text in findings(result).values() if text.startswith("NOT WELL")] == [line]


@pytest.mark.parametrize("state", ["absent", "tried", "newer", "older"])
def test_cli_doctor_shows_optional_libraries(installed, state):
    """The doctor shows optional libraries: version, whether it was tried, how to install it. None is a failure."""
    expected = {}
    for library, tried in OPTIONAL.items():
        command = f"pip install '{library}=={tried.series[-1]}.*'"
        version = {"absent": None, "tried": f"{tried.series[-1]}.3", "newer": "99.0", "older": "0.0.1"}[state]
        installed["versions"].update({library: version} if version else {})
        expected[library] = {
            "absent": f"absent: not installed (for {tried.use}); {command}",
            "tried": f"ok: {version} (tried: {tried})",
        }.get(state, f"untried: {version} (for {tried.use}); expected one that was tried: {tried}; {command}")
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    found = findings(result)
    assert {library: found.get(library) for library in OPTIONAL} == expected


@pytest.mark.parametrize("library", ["torch", "transformers"])
@pytest.mark.parametrize("version", ["99.0", "1.1.0"], ids=["newer than setup.py's range", "in the range"])
def test_cli_doctor_shows_an_untried_core_library(installed, library, version):
    tried = TRIED[library]
    installed["requires"] = [f"{library}>=1.0,<{tried.series[-1]}"]
    installed["versions"][library] = version
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    command = f"pip install '{library}=={tried.series[-1]}.*'"
    assert findings(result)[library] == f"untried: {version}; expected one that was tried: {tried}; {command}"


def test_cli_doctor_reports_an_unknown_backend(installed, monkeypatch):
    monkeypatch.setenv("FUSED_STEER_BACKEND", "bogus")
    result = invoke("doctor")
    assert result.exit_code == 1
    assert findings(result)["cpu"] == "NOT WELL: FUSED_STEER_BACKEND is 'bogus'; expected one of triton, torch"


@pytest.mark.parametrize("spoil", [lambda t: t * 1.001, lambda t: t * float("nan")], ids=["wrong", "NaN"])
def test_cli_doctor_notices_wrong_numbers(installed, monkeypatch, spoil):
    import fused_steer.kernels as kernels

    right = kernels.post_block
    monkeypatch.setattr(kernels, "post_block", lambda *tensors: spoil(right(*tensors)))
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "is wrong" in findings(result)["cpu"]


def test_cli_doctor_notices_a_backend_that_raises(installed, monkeypatch):
    import fused_steer.kernels as kernels

    def broken(*tensors):
        raise OSError("no compiler\nfound")

    monkeypatch.setattr(kernels, "post_block", broken)
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "raises OSError: no compiler found; expected" in findings(result)["cpu"]


def test_cli_a_ruled_out_device_is_unused_where_another_will_do():
    assert Finding("cpu", "is ruled out", "a GPU", "unused").well
    assert not Finding("cpu", "is ruled out", "a GPU").well


def test_cli_doctor_compiles_for_a_target():
    """The doctor compiles for a target. It runs in a subprocess, because this process may interpret its kernels."""
    code = (
        "from fused_steer.cli.shared import new_console; from fused_steer.tools.doctor import _launches\n"
        "table, amiss = _launches(['sm_90'], True)\n"
        "new_console().print(table); print([str(finding) for finding in amiss])"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
    # target, kernel, grid, tile, warps, registers, spills, local, shared
    rows = [line.split()[5:] for line in result.stdout.splitlines() if "_kernel" in line]
    assert len(rows) == 5, "one kernel packs, one is the forward, three the backward"
    assert all(int(registers) > 0 and (spills, local) == ("0", "0") for registers, spills, local, _ in rows)


def test_cli_doctor_cannot_compile_what_is_interpreted(installed, monkeypatch):
    from fused_steer.kernels import aot

    monkeypatch.setattr(aot, "INTERPRETED", True)
    result = invoke("doctor", "--compile")
    assert result.exit_code == 1
    assert "TRITON_INTERPRET is set, so kernels cannot be compiled; expected it unset" in result.stdout


# ------------------------------------------------------------------------------------------------------------ inspect


@pytest.fixture
def saved(tmp_path):
    """Save an adapter with all its optional parts, on two of three layers; return it with its model."""
    config = SteerConfig(rank=4, activation="tanh", layers=[0, 2], down_bias=True, up_bias=True, scale=0.5)
    model = patch_model(build(), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.steering.parameters():
            parameter.normal_()
    model.steering.save(tmp_path / "adapter")
    return tmp_path / "adapter", model


def test_cli_inspect_as_json(saved):
    directory, model = saved
    result = invoke("inspect", directory, "--json")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert shown["config"] == model.steering.config().to_dict()
    assert shown["file_bytes"] == (directory / WEIGHTS_NAME).stat().st_size
    assert shown["parameters"] == sum(p.numel() for p in model.steering.parameters())
    assert (shown["adapter"], shown["hidden_size"], shown["num_layers"]) == (str(directory), 32, LAYERS)
    assert [row["layer"] for row in shown["layers"]] == [0, 2]
    for row in shown["layers"]:
        site = model.model.layers[row["layer"]].post_block
        down, up = site.steer_down["default"], site.steer_up["default"]
        expected = {
            "down": down.weight.norm(),
            "up": up.weight.norm(),
            "product": torch.linalg.matrix_norm(up.weight @ down.weight, 2),  # from the whole d x d product
            "down_bias": down.bias.norm(),
            "up_bias": up.bias.norm(),
        }
        assert {name: row[name] for name in expected} == pytest.approx({k: v.item() for k, v in expected.items()})


def test_cli_inspect_as_tables(saved):
    directory, model = saved
    result = invoke("inspect", directory)
    assert result.exit_code == 0
    shape = json.loads(invoke("inspect", directory, "--json").stdout)
    assert re.search(r"activation\W+tanh\W", result.stdout)
    assert re.search(rf"parameters\W+{shape['parameters']:,}\W", result.stdout)
    for row in shape["layers"]:
        norms = r"\W+".join(re.escape(f"{row[name]:.4g}") for name in ("down", "up", "product", "down_bias", "up_bias"))
        assert re.search(rf"{row['layer']}\W+{norms}\W", result.stdout)


def test_cli_inspect_a_vector(tmp_path):
    patch_model(build(), SteerConfig(form="vector")).steering.save(tmp_path)
    shown = json.loads(invoke("inspect", tmp_path, "--json").stdout)
    assert [row["layer"] for row in shown["layers"]] == list(range(LAYERS))
    nothing = dict.fromkeys(("down", "up", "product", "down_bias"))
    assert all(
        row == {"layer": row["layer"], **nothing, "up_bias": 0.0, "site": "post_block"} for row in shown["layers"]
    )
    table = invoke("inspect", tmp_path).stdout
    assert "‖b2‖" in table and "‖W1‖" not in table


def test_cli_inspect_several_sites(tmp_path):
    patch_model(build(), SteerConfig(rank=2, site=["pre_mlp", "post_mlp"])).steering.save(tmp_path)
    shown = json.loads(invoke("inspect", tmp_path, "--json").stdout)
    assert shown["config"]["site"] == ["pre_mlp", "post_mlp"]
    places = [(row["layer"], row["site"]) for row in shown["layers"]]
    assert sorted(places) == sorted((i, site) for i in range(LAYERS) for site in ("pre_mlp", "post_mlp"))
    table = invoke("inspect", tmp_path).stdout
    assert "pre_mlp" in table and "post_mlp" in table


def test_cli_inspect_refuses_what_is_no_adapter(saved, tmp_path):
    directory, _ = saved
    assert_refused(invoke("inspect", tmp_path / "nowhere"), tmp_path / "nowhere", "expected")
    assert_refused(invoke("inspect", tmp_path), CONFIG_NAME)
    assert_refused(invoke("inspect", directory / CONFIG_NAME), "is a file")


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_cli_inspect_refuses_a_damaged_file(saved, name):
    directory, _ = saved
    content = (directory / name).read_bytes()
    (directory / name).write_bytes(content[: len(content) // 2])
    assert_refused(invoke("inspect", directory), directory / name, "cannot be loaded")


def test_cli_inspect_refuses_weights_that_the_config_does_not_describe(saved):
    directory, _ = saved
    config = json.loads((directory / CONFIG_NAME).read_text())
    (directory / CONFIG_NAME).write_text(json.dumps({**config, "rank": 5}))
    assert_refused(invoke("inspect", directory), "its fields were changed after saving; expected config_sha256")
    del config["config_sha256"]  # as a person does who edits the config on purpose
    (directory / CONFIG_NAME).write_text(json.dumps({**config, "rank": 5}))
    assert_refused(invoke("inspect", directory), "layers.0", "(4, 32)", "expected", "(5, 32)")
    (directory / CONFIG_NAME).write_text(json.dumps({**config, "layers": None}))
    assert_refused(invoke("inspect", directory), "layers.1", "expected one of shape")
