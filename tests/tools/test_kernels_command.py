"""Tests of `fused-steer kernels`: its tables, its JSON, and its one-line refusals."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from fused_steer.cli import app

SMALL = ("--hidden", "576", "--rank", "16", "--target", "sm_90")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run the command in a subprocess, because this process may interpret its kernels."""
    code = "import sys; from fused_steer.cli import app; app(sys.argv[1:])"
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FORCE_COLOR")}
    command = [sys.executable, "-c", code, "kernels", *arguments]
    return subprocess.run(command, env={**env, **environment}, capture_output=True, text=True, timeout=300)


def test_kernels_command_json_has_every_configuration_that_would_be_launched():
    result = run(*SMALL, "--target", "gfx942", "--json")
    assert result.returncode == 0, result.stderr
    shown = json.loads(result.stdout)
    assert [shown[name] for name in ("hidden", "rank", "dtype")] == [576, 16, "bfloat16"]
    rows = shown["kernels"]
    kernels = {4096: ["pack_adapter", "post_block_fwd"], 8: ["post_block_fwd_down", "post_block_fwd_up"]}
    backward = ["post_block_bwd_rows", "post_block_bwd_columns", "post_block_bwd_finish"]
    assert [(row["tokens"], row["target"], row["pass"], row["kernel"]) for row in rows] == [
        (tokens, target, "backward" if kernel in backward else "forward", f"{kernel}_kernel")
        for tokens in (4096, 8)
        for target in ("sm_90", "gfx942")
        for kernel in kernels[tokens] + backward
    ]
    units = {"fwd": 3, "fwd_down": 2, "fwd_up": 3, "bwd_rows": 1, "bwd_columns": 3, "bwd_finish": 0, "pack_adapter": 0}
    short = [row["kernel"].removeprefix("post_block_").removesuffix("_kernel") for row in rows]
    assert [row["units"] for row in rows] == [units[name] for name in short]
    for row in rows:
        assert row["registers"] > 0 and row["shared"] > 0 and 0 < row["occupancy"] <= 1
        assert row["spills"] == row["local"] == row["local_accesses"] == 0
        if row["units"]:
            assert row["loads_128"] + row["async_copies_128"] > 0 and row["tensor_core"] > 0
    many, few = rows[1], next(row for row in rows if row["tokens"] == 8)
    assert len(many["grid"]) == 1 and many["grid"][0] > 1
    assert few["grid"][0] == 1 and few["grid"][1] > 1
    floors = {(row["tokens"], row["pass"], row["gpu"]): row for row in shown["floors"]}
    assert len(floors) == 2 * 2 * 4
    forward = floors[4096, "forward", "A100"]
    assert (forward["units"], forward["bytes"]) == (3, 3 * 4096 * 576 * 2)
    assert forward["seconds"] == pytest.approx(forward["bytes"] / 2.039e12)
    assert floors[8, "backward", "H200"]["seconds"] == pytest.approx(4 * 8 * 576 * 2 / 4.8e12)


def test_kernels_command_json_says_which_limit_binds_each_pass():
    result = run(*SMALL, "--target", "sm_80", "--gpu", "H100", "--gpu", "A100-40GB", "--json")
    assert result.returncode == 0, result.stderr
    shown = json.loads(result.stdout)
    found = {(row["tokens"], row["pass"], row["gpu"]): row for row in shown["predictions"]}
    passes = {(tokens, name) for tokens in (4096, 8) for name in ("forward", "backward")}
    assert found.keys() == {(*some, gpu) for some in passes for gpu in ("H100", "A100-40GB")}
    moved = {(row["tokens"], row["pass"], target): 0 for row in shown["kernels"] for target in ("sm_80", "sm_90")}
    for row in shown["kernels"]:
        moved[row["tokens"], row["pass"], row["target"]] += row["memory_bytes"]
        assert row["l2_bytes"] > 0 and 0 < row["fill"] <= 1 and row["series"] >= 1
    for (tokens, name, gpu), row in found.items():
        launches = row["launches"]
        each = [max(launch[limit] for limit in ("memory", "l2", "issue")) for launch in launches]
        assert row["host"] == pytest.approx(0.8e-6 * len(launches))
        assert row["seconds"] == pytest.approx(sum(each) + row["host"])
        bandwidth, target = {"H100": (3.35e12, "sm_90"), "A100-40GB": (1.555e12, "sm_80")}[gpu]
        assert row["memory"] == pytest.approx(moved[tokens, name, target] / (0.9 * bandwidth))
        floor = 3 * tokens * 576 * 2 / (0.9 * bandwidth)  # residual, branch, out; or G, out, dx
        assert row["floors"] == pytest.approx(sum(each) / floor)
        assert row["binds"] in ("memory", "l2", "issue", "host")
        for launch, slowest in zip(launches, each, strict=True):
            assert launch[launch["binds"]] == slowest and 0 < launch["busy"] < launch["issue"]


def test_kernels_command_the_smaller_targets_say_what_they_cannot_do():
    result = run(
        "--hidden", "576", "--rank", "16", "--tokens", "64", "--target", "sm_75", "--target", "sm_89", "--json"
    )
    assert result.returncode == 0, result.stderr
    shown = json.loads(result.stdout)
    assert shown["predictions"] == []
    assert {row["target"] for row in shown["kernels"]} == shown["cannot"].keys() == {"sm_75", "sm_89"}
    turing = [row for row in shown["kernels"] if row["target"] == "sm_75"]
    assert "no tensor cores" in shown["cannot"]["sm_75"] and not any(row["tensor_core"] for row in turing)
    assert "no asynchronous copies" in shown["cannot"]["sm_75"] and not any(row["async_copies"] for row in turing)


def test_kernels_command_the_tables_fit_in_80_columns():
    result = run(*SMALL, "--tokens", "100000", COLUMNS="80", NO_COLOR="1")
    assert result.returncode == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80 and "…" not in result.stdout
    lines = [line.split() for line in result.stdout.splitlines()]
    heads = next(line for line in lines if line[:1] == ["target"])
    assert heads == "target kernel grid regs spill smem occ ld128 st128 b16 async mma local".split()
    rows = [dict(zip(heads, line, strict=True)) for line in lines if line[:1] == ["sm_90"] and len(line) == len(heads)]
    assert [row["kernel"] for row in rows] == ["pack_adapter", "fwd", "bwd_rows", "bwd_columns", "bwd_finish"]
    for row in rows:
        assert int(row["regs"]) > 0 and int(row["ld128"]) > 0
        assert row["spill"] == row["local"] == row["b16"] == "0" and row["occ"].endswith("%")
    work = [line for line in lines if line[:1] == ["sm_90"] and len(line) != len(heads)]
    assert [line[1] for line in work] == [row["kernel"] for row in rows]
    assert all(float(sent) > 0 and waves.endswith("%") for _, _, sent, _, waves, _ in work)
    (forward,) = (line for line in lines if line[:2] == ["100000", "forward"])
    assert forward[2:] == ["3", "169", "222", "103", "72"]  # units; 3 x 100000 x 576 x 2 bytes on A100s, H100, H200
    heading = "Predicted, not measured: an uncalibrated model; an H100 took up to twice as long"
    below = result.stdout.splitlines()[result.stdout.splitlines().index(heading) + 1 :]
    table = [line.split() for line in below if line.split()[:1] in (["GPU"], ["H100"], ["H200"])]
    assert table[0] == "GPU N pass memory L2 issue host µs floors binds".split()
    assert [row[:3] for row in table[1:]] == [
        [gpu, "100000", name] for gpu in ("H100", "H200") for name in ("forward", "backward")
    ]
    assert {row[-1] for row in table[1:]} <= {"memory", "L2", "issue", "host"}


def test_kernels_command_with_the_norm_that_follows():
    asked = ["--norm", "--hidden", "2048", "--rank", "2", "--tokens", "16384", "--target", "sm_90", "--gpu", "H100"]
    result = run(*asked, COLUMNS="80", NO_COLOR="1")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in result.stdout
    assert lines[0] == "post_block_norm: d = 2048, r = 2, bfloat16, N = 16384 tokens"
    kernels = ["pack_adapter", "fwd_resident", "pack_adapter", "norm_held", "add_sums", "bwd_finish"]
    assert [line.split()[1] for line in lines if line.split()[:1] == ["sm_90"]] == 2 * kernels
    # The op does not launch the kernels of the backward's other form. It is predicted only.
    floors = [line.split() for line in lines[lines.index("The least time of a pass: its hidden states' bytes at the "
              "datasheet's bandwidth") :] if line.split()[:1] == ["16384"]]  # fmt: skip
    units = [row[-5] for row in floors]
    passes = [" ".join(row[1:-5]) for row in floors]
    assert (passes, units) == (["forward", "backward", "in turn"], ["4", "4", "8"])
    microseconds = {line.split()[2]: float(line.split()[-3]) for line in lines if line.split()[:1] == ["H100"]}
    assert microseconds["backward"] < microseconds["in"]
    assert "in turn: the norm's backward and then post_block's, the form of the backward" in lines


def test_kernels_command_where_the_backward_has_one_form():
    asked = ["--norm", "--hidden", "512", "--rank", "16", "--tokens", "256", "--target", "sm_90", "--gpu", "H100"]
    result = run(*asked, COLUMNS="80", NO_COLOR="1")
    assert result.returncode == 0 and "in turn" not in result.stdout, result.stderr


def test_kernels_command_a_kernel_that_several_shapes_share_is_compiled_once():
    code = (
        "import triton; from fused_steer.tools.kernel_table import Request, describe_kernels\n"
        "compile, calls = triton.compile, []\n"
        "triton.compile = lambda source, **options: calls.append(1) or compile(source, **options)\n"
        "for hidden in (4096, 8192, 4096):\n"
        "    request = Request(hidden, 8, 'bfloat16', (4096, 9000), ('sm_80',), ())\n"
        "    print(len(describe_kernels(request)['kernels']), len(calls))"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    (rows, first), (_, second), (_, third) = (map(int, line.split()) for line in result.stdout.splitlines())
    assert rows == 10 and first <= 6, "one packing and three backward kernels, whatever the number of tokens"
    assert second < 2 * first and third == second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "sm_70"], "target is 'sm_70'; expected one of sm_80, sm_90, sm_100, gfx942, sm_75, sm_86, sm_89"),
        (
            ["--target", "sm_80", "--target", ""],
            "--target is ''; expected a value that is not empty",
        ),
        (["--gpu", "T4"], "gpu is 'T4'; expected one of A100, A100-40GB, H100, H200"),
        (["--dtype", "float64"], "dtype is 'float64'; expected one of bfloat16, float16, float32"),
        (["--hidden", "0"], "hidden is 0; expected 1 to 1048576"),
        (["--hidden", "1048577"], "hidden is 1048577; expected 1 to 1048576"),
        (["--rank", "-1"], "rank is -1; expected 0 to 256"),
        (["--rank", "257"], "rank is 257; expected 0 to 256"),
        (["--tokens", "8", "--tokens", "0"], "tokens is 0; expected 1 to 2147483647"),
        (["--tokens", "2147483648"], "tokens is 2147483648; expected 1 to 2147483647"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["table", "json"])
def test_kernels_command_bad_input_is_one_line(arguments, message, flags):
    result = CliRunner().invoke(app, ["kernels", *arguments, *flags])
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"fused-steer: {message}\n")


def test_kernels_command_interpreted_kernels_cannot_be_shown(monkeypatch):
    monkeypatch.setattr("fused_steer.kernels.aot.INTERPRETED", True)
    result = CliRunner().invoke(app, ["kernels", *SMALL])
    assert (result.exit_code, result.stdout) == (1, "")
    expected = "TRITON_INTERPRET is set, so kernels cannot be compiled; expected it unset"
    assert result.stderr == f"fused-steer: {expected}\n"
