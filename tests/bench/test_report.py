"""Tests of `python -m bench.report`: its tables and plots, its refusals, and that README and docs are up to date.

The figures here are made up; they are written only to temporary folders.
"""

import dataclasses
import functools
import importlib
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]


def import_bench(name: str):
    """Import a module of bench/, which is not installed.

    The checkout's root does not stay on sys.path, because it has a folder `kernels`.
    """
    sys.path.append(str(ROOT))
    try:
        return importlib.import_module(f"bench.{name}")
    finally:
        sys.path.remove(str(ROOT))


geometries, results_module = map(import_bench, ("geometries", "results"))
command, pages, plots, read, tables = (
    import_bench(f"report.{name}") for name in ("__main__", "pages", "plots", "read", "tables")
)
demo = importlib.import_module("fused_steer.tools.demo")
draw = plots.draw
pages.draw = functools.cache(draw)  # the tests draw the same few plots; one test checks that drawing is deterministic
OpCase, ModelCase = geometries.OpCase, geometries.ModelCase
GroupedCase, HostCase, ServeCase = geometries.GroupedCase, geometries.HostCase, geometries.ServeCase
Results, Row = results_module.Results, results_module.Row

GPU, CPU = "Imaginary GPU 9000", "Imaginary CPU"
README = "# Title\n\nbefore\n\n<!-- results -->\n<!-- /results -->\n\nafter\n"
BANDWIDTH = 4e12


def machine(kind: str, device: str) -> dict:
    return {
        "kind": kind,
        "device": device,
        "driver": "123.45" if kind == "gpu" else None,
        "versions": {"torch": "2.13.0", "triton": "3.7.1", "transformers": "5.17.0", "peft": None},
        "fused_steer": "0.1.0",
        "commit": "c0ffee",
        "dirty": False,
        "date": "2026-01-02T03:04:05+00:00",
        "command": "python -m bench.gpu",
    }


def rows(level: str, what: str, case, scale: float, **factors: float) -> list:
    """Make a row per contender: 11 samples with the median scale × factor."""
    samples = [scale * (1 + 0.002 * step) for step in range(-5, 6)]
    return [
        Row(level, what, name.replace("_", "-"), asdict(case), [factor * sample for sample in samples], launches=1)
        for name, factor in factors.items()
    ]


def gpu_results() -> Results:
    found = Results(machine("gpu", GPU), BANDWIDTH, {"loreft": "pyreft not installed; `pip install pyreft`"})
    for tokens in (64, 4096):
        for hidden in (1152, 4096):
            case = OpCase(tokens, hidden)
            floor = 3 * case.unit_bytes / BANDWIDTH
            for what, times in (("forward", 1), ("backward", 1), ("both", 2)):
                found.rows += rows(
                    "op", what, case, times * floor,
                    fused=1.25, fused_again=1.2625, hook=3.75, hook_compiled=2.5, add=1.125, copy=0.75,
                )  # fmt: skip
        found.rows += rows("op", "forward", OpCase(tokens, 1152, 64), 1e-5, fused=1, hook=3)
    found.rows.append(Row("accuracy", "error", "fused", asdict(OpCase(8, 4096, dtype="float16")), [0.7, 0.8, 0.9, 1.5]))
    found.rows.append(Row("counters", "forward", "fused", asdict(OpCase(8, 4096)), [0.0]))
    for name, value in (("stall wait", 3.25), ("dram__bytes_read.sum", 3 << 20), ("lts__t_sector_hit_rate.pct", 54.87)):
        found.rows.append(Row("counters", "forward", f"k: {name}", asdict(OpCase(8, 4096)), [value]))
    found.rows += rows("norm", "forward", OpCase(4096, 2048), 1e-5, fused=1, hook=4, hook_liger=2)
    found.rows += rows("norm", "backward", OpCase(4096, 2048, 4), 1e-5, fused=2, in_turn=3)
    found.rows += rows("norm", "bytes", OpCase(4096, 2048), 2.0**20, fused=1, hook=9)
    found.rows += rows("host", "call", HostCase(), 1e-5, fused=0.4, hook=1, unsteered=0.2)
    for prefill in (False, True):
        case = GroupedCase(64, 1152, 16, prefill)
        found.rows += rows("grouped", "forward", case, 1e-5, fused=1, one_adapter=0.9, gather_bmm=3, add=0.5)
        found.rows += rows("grouped", "bytes", case, 2.0**20, fused=1, gather_bmm=9)
    for adapters in (1, 256):
        case = ServeCase("Llama-3.2-1B", 0, 256, 256, adapters)
        times = {"unsteered": 1, "fused": 1.02 if adapters > 1 else 1.01, "one_adapter": 1.01, "gather_bmm": 1.5}
        for level, what in (("serve", "generate"), ("serve", "decode-graph"), ("vllm", "generate")):
            found.rows += rows(level, what, case, 8e-3, **times)
    whole = ModelCase("Llama-3.2-1B", 0, 2, 1024)
    found.rows += rows("model", "train", whole, 0.1, unsteered=1, fused=1.02, hook_compiled=1.1)
    found.rows.append(Row("model", "train", "hook", asdict(whole), status="out of memory: of 80 GiB"))
    found.rows.append(Row("model", "train", "loreft", asdict(whole), status="not run: pyreft not installed"))
    for what in ("decode", "decode-graph"):
        found.rows += rows("model", what, ModelCase("Llama-3.2-1B", 0, 8, 512), 4e-3, unsteered=1, fused=1.01, hook=1.2)
    for layers in (4, 8):
        case = ModelCase("Llama-3.2-1B", layers, 2, 1024)
        unit = 2 * 1024 * 2048 * 2
        found.rows += rows("memory", "kept", case, unit, unsteered=0, fused=1, hook=2)
        found.rows += rows("memory", "peak", case, layers * unit, unsteered=0, fused=1, hook=2.5)
    return found


def cpu_results() -> Results:
    found = Results(machine("cpu", CPU))
    found.rows += rows("op", "forward", OpCase(17, 64, dtype="float32"), 7.77e-4, fused=1, hook=3, add=0.5)
    found.rows += rows("memory", "kept", ModelCase("small", 4, 1, 8, dtype="float32"), 7e3, fused=1, hook=2)
    return found


class Place:
    """A folder with results, docs and README, and a method that runs the command on it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.results, self.docs = folder, folder / "results", folder / "docs"
        self.readme, self.markdown = folder / "README.md", folder / "docs" / "benchmarks.md"
        self.results.mkdir()
        self.readme.write_text(README, encoding="utf-8")

    def put(self, results: Results) -> Path:
        file = self.results / results_module.file_name(results.machine["device"])
        results.save(file)
        return file

    def run(self, *extra: str):
        options = [f"--{name}={getattr(self, name)}" for name in ("results", "docs", "readme")]
        return CliRunner().invoke(command.app, [*options, *extra])

    def run_ok(self, *extra: str) -> str:
        result = self.run(*extra)
        assert result.exit_code == 0, result.output
        return result.stdout

    def fail(self, *extra: str) -> str:
        """Run the command, check that it is refused and changes nothing, and return the line of the refusal."""
        before = self.files()
        result = self.run(*extra)
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
        assert result.stdout == "" and result.stderr.count("\n") == 1
        assert self.files() == before
        return result.stderr

    def files(self) -> dict[str, tuple[bytes, int]]:
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return {str(path.relative_to(self.folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}

    def block(self) -> str:
        begin, end = pages.markers("results")
        return self.readme.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> Place:
    """Report results of a GPU and of a CPU. Tests share it and must not change it."""
    place = Place(tmp_path_factory.mktemp("reported"))
    place.put(gpu_results())
    place.put(cpu_results())
    place.run_ok()
    return place


def copied(reported: Place, folder: Path) -> Place:
    place = Place(folder)
    for name, (content, _) in reported.files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return place


# ------------------------------------------------------------------------------------------------------- the repository


def test_report_readme_and_docs_are_what_the_committed_results_give():
    differing = pages.differing(pages.render(read.FOLDER, ROOT / "docs", ROOT / "README.md"))
    assert not differing, "run `python -m bench.report`"


@pytest.mark.skipif(any(run.on_gpu for run in read.read_runs(read.FOLDER)), reason="bench/results has results of a GPU")
def test_report_without_results_of_a_gpu_nothing_is_claimed():
    for file in (ROOT / "README.md", ROOT / "docs" / "benchmarks.md"):
        assert pages.NOT_MEASURED in file.read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------------- what it says


def cells(text: str, *starts: str) -> list[str]:
    """Return the cells of the only table row that begins with `starts`."""
    found = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    (row,) = [row for row in found if tuple(row[: len(starts)]) == starts]
    return row


def test_report_readme_gives_each_figure_with_its_case_and_device(reported):
    text = reported.readme.read_text(encoding="utf-8")
    assert text.startswith("# Title\n\nbefore\n\n<!-- results -->\n") and text.endswith("<!-- /results -->\n\nafter\n")
    case = "N = 4096, d = 4096, r = 8, silu, no basis, bfloat16"
    # 3 · 4096 · 4096 · 2 bytes at 4 TB/s are 25.17 µs; fused takes 1.25 times that.
    expected = [GPU, "forward", case, "31.5 µs (31.3–31.6)", "1.25×", "80%", "1.01×", "0.900×", "3.00×", "2.00×", "–"]
    assert cells(reported.block(), GPU, "forward") == expected
    assert cells(reported.block(), GPU, "backward")[3:] == expected[3:]
    train = cells(reported.block(), GPU, "training step")
    assert train[2] == "Llama-3.2-1B, 16 layers (all), 2 × 1024 tokens, r = 8, bfloat16"
    assert train[3:] == ["102 ms (101–103)", "–", "–", "–", "0.980×", "out of memory", "1.08×", "not run"]
    assert cells(reported.block(), GPU, "decode, CUDA graph")[8] == "1.19×"
    peak = cells(reported.block(), GPU, "peak memory beyond the unsteered model")
    assert peak[2].startswith("Llama-3.2-1B, 8 layers, 2 × 1024") and peak[3] == "64.0 MiB (63.6–64.4)"


def test_report_docs_give_the_machine_and_every_case(reported):
    text = reported.markdown.read_text(encoding="utf-8")
    for fact in ("driver 123.45", "torch 2.13.0", "triton 3.7.1", "transformers 5.17.0", "commit c0ffee", "2026-01-02"):
        assert fact in text
    assert "bandwidth of a large copy 4,000 GB/s" in text and "command `python -m bench.gpu`" in text
    assert "peft None" not in text
    for heading in ("forward", "backward", "forward and backward"):
        assert f"{GPU}: {heading}, r = 8, silu, no basis, bfloat16" in text
    assert f"<summary>{GPU}: forward, r = 64, silu, no basis, bfloat16</summary>" in text
    assert text.count("<details") == text.count("</details>") > 8


def test_report_docs_open_with_what_is_known_and_fold_every_measured_table(reported):
    text = reported.markdown.read_text(encoding="utf-8")
    assert text.index("| goal |") < text.index("benchmarks/counted.svg") < text.index("roofline.svg")
    depth = 0
    for line in text[text.index(f"## {GPU}") :].splitlines():
        depth += line.startswith("<details") - line.startswith("</details>")
        assert depth or not line.startswith("|"), line


def test_report_counts_are_shown_as_they_are_counted(reported, monkeypatch, tmp_path):
    """The table and the picture show the current counts: other counts change both."""
    text = reported.markdown.read_text(encoding="utf-8")
    counts = pages.counted()
    for name, passes in counts.items():
        numbers = [str(n) for count in passes.values() for n in (count.units, count.launches)]
        assert cells(text, name) == [name, *numbers]
    picture = (reported.docs / "benchmarks" / "counted.svg").read_text(encoding="utf-8")
    for name in ("unsteered", "hook", "fused"):
        for count in counts[name].values():
            assert f">{name}: {count.units}<" in picture and f">{name}: {count.launches}<" in picture
    worse = dataclasses.replace(counts["fused"]["forward"], launches=9)
    monkeypatch.setattr(pages, "counted", lambda: counts | {"fused": counts["fused"] | {"forward": worse}})
    place = copied(reported, tmp_path)
    line = place.fail("--check")
    assert "counted.svg" in line and "benchmarks.md" in line
    place.run_ok()
    assert ">fused: 9<" in (place.docs / "benchmarks" / "counted.svg").read_text(encoding="utf-8")


def test_report_the_demos_figures_stand_in_readme(place):
    figures = demo.Figures(
        "A/Model", "ListOps of MAX", 150, 8, 100, 7, 93, 2_000, 1_000_000, 1_234_567, {"training": 90.0, "files": 30.0},
        192.0, "cpu", 2, {"fused_steer": "0.1.0", "torch": "2.13.0"},
    )  # fmt: skip
    (place.results / "demo").mkdir()
    figures.save(place.results / "demo" / "figures.json")
    assert "<!-- demo -->" in place.fail()
    place.readme.write_text(README + "<!-- demo -->\n<!-- /demo -->\n", encoding="utf-8")
    place.run_ok()
    row = cells(place.readme.read_text(encoding="utf-8"), "7 of 100")
    assert row[1:] == [
        "**93 of 100**",
        "2,000 of 1,000,000 (0.20%)",
        "1.23 MB",
        "2.0 minutes, 3.2 of CPU time, on 2 CPU cores",
    ]


def test_report_host_time_is_shown_beside_the_hooks(reported):
    text = reported.markdown.read_text(encoding="utf-8")
    table = text[text.index("a block's call, lower decile of CPU time") :]
    size = "8 rows, 8 layers, r = 8"
    assert cells(table, "call", size, "fused") == ["call", size, "fused", "3.97 µs", "0.400×", "hook", "1"]


def test_report_accuracy_and_counters_are_shown(reported):
    text = reported.markdown.read_text(encoding="utf-8")
    case = "N = 8, d = 4096, r = 8, silu, no basis, "
    assert cells(text, case + "float16")[1:] == ["0.700×", "0.800×", "0.900×", "1.50×"]
    for name, value in (
        ("stall wait", "3.25"),
        ("dram__bytes_read.sum", "3.00 MiB"),
        ("lts__t_sector_hit_rate.pct", "54.9 %"),
    ):
        counted = ["forward", case + "bfloat16", f"k: {name}"]
        assert cells(text, *counted) == [*counted, value]


def test_report_the_op_and_its_norm(reported):
    row = cells(reported.markdown.read_text(encoding="utf-8"), "4096", "2048", "8")
    assert row[3:5] == ["10.0 µs (9.94–10.1)", "40.0 µs (39.8–40.2), 4.00×"] and row[5].endswith(", 2.00×")
    assert row[6].startswith("1.00 MiB") and row[7].startswith("9.00 MiB")
    backward = cells(reported.markdown.read_text(encoding="utf-8"), "4096", "2048", "4")
    assert backward[3:] == ["20.0 µs (19.9–20.1)", "30.0 µs (29.8–30.2), 1.50×"]


def test_report_a_group_of_models_has_its_own_rows_and_multiples(tmp_path):
    found = gpu_results()
    for group, unsteered in (("usual", 1.0), ("others", 2.0)):
        case = ModelCase("Qwen3-4B", 4, 8, 512, group=group)
        found.rows += rows("model", "prefill", case, 0.1, unsteered=unsteered, fused=2.0)
    place = Place(tmp_path)
    place.put(found)
    text = "\n".join(tables.model_tables(read.read_runs(place.results)[0]))
    case = "Qwen3-4B, 4 layers, 8 × 512 tokens, r = 8, bfloat16"
    assert cells(text, case, "fused")[3] == "2.00×" and cells(text, f"{case}, measured apart", "fused")[3] == "1.00×"


def test_report_added_units_and_kept_units(reported):
    text = reported.markdown.read_text(encoding="utf-8")
    case = "Llama-3.2-1B, 16 layers (all), 2 × 1024 tokens, r = 8, bfloat16"
    # 2 ms in 16 layers is 125 µs per layer. In that time 4 TB/s move 59.6 tensors of 2048 tokens × 2048 × 2 bytes.
    assert cells(text, case, "fused") == [case, "fused", "102 ms (101–103)", "1.02×", "1.00×", "59.6"]
    kept = text[text.index("memory kept for the backward") :].partition("####")[0]
    case = "Llama-3.2-1B, 4 layers, 2 × 1024 tokens, r = 8, bfloat16"
    assert cells(kept, case, "hook")[2:] == ["16.0 MiB (15.9–16.1)", "2.00", "2.00×"]


def test_report_serving_by_rows_and_what_an_adapter_for_each_token_makes(reported):
    text = reported.markdown.read_text(encoding="utf-8")
    decode, prefill = re.findall(r"#### .*: an adapter for each token, .*\n\n(?:\|.*\n)+", text)
    assert "adapters mixed" in decode and "together" in prefill
    assert cells(decode, "silu, bfloat16")[1:] == [
        "64", "1152", "8", "16", "10.0 µs (9.94–10.1)", "5.00 µs (4.97–5.03), 0.500×", "9.00 µs (8.95–9.05), 0.900×",
        "30.0 µs (29.8–30.2), 3.00×", "1.00 MiB (0.994–1.01)", "9.00 MiB (8.95–9.05)",
    ]  # fmt: skip
    for title in ("transformers' generate", "transformers, a decode step, CUDA graph", "vLLM, per token of every row"):
        table = text[text.index(f": {title}") :].partition("####")[0]
        case = "Llama-3.2-1B, 16 layers (all), 256 × 256 tokens, 256 adapters, r = 8, bfloat16"
        row = cells(table, case, "fused")
        assert row[2:] == ["8.16 ms (8.11–8.21)", "31,373", "1.02×", "1.01×", "1.00×"]
    line = cells(reported.block(), GPU, "decode step by rows, CUDA graph")
    assert line[2] == case and line[7] == "0.980×"


def test_report_out_of_memory_is_shown(reported):
    case = "Llama-3.2-1B, 16 layers (all), 2 × 1024 tokens, r = 8, bfloat16"
    row = cells(reported.markdown.read_text(encoding="utf-8"), case, "hook")
    assert row[2:] == ["out of memory", "out of memory", "out of memory", "–"]


def test_report_absent_rivals_are_listed_with_how_to_install_them(reported):
    text = reported.markdown.read_text(encoding="utf-8")
    assert f"### Not run on {GPU}\n\n- `loreft`: pyreft not installed; `pip install pyreft`" in text


def test_report_goals_are_judged_on_the_gpu_only(reported):
    text = reported.markdown.read_text(encoding="utf-8")
    assert (
        f"| goal | in words | limit | counted | measured on {GPU} |" in text
        and CPU not in text[: text.index(f"## {GPU}")]
    )
    assert ", met |" in text and "| not measured |" in text


def test_report_goals_met_missed_and_not_measured(place, monkeypatch):
    outcomes = [
        SimpleNamespace(name=name, value=value, met=met)
        for name, value, met in (("a", 1.1, True), ("b", 1.2, False), ("c", None, None))
    ]
    goals = [SimpleNamespace(name=name, text="in words", limit=1.15, at_most=True) for name in "abc"]
    monkeypatch.setattr(pages.goals, "evaluate", lambda results: outcomes)
    monkeypatch.setattr(pages.goals, "GOALS", goals)
    place.put(gpu_results())
    place.run_ok()
    text = place.markdown.read_text(encoding="utf-8")
    ends = [cells(text, name, "in words")[2:] for name in "abc"]
    assert [end[0] for end in ends] == ["<= 1.15"] * 3
    assert [end[-1] for end in ends] == ["1.10, met", "1.20, **missed**", "not measured"]


def test_report_cpu_is_never_shown_as_speed_of_the_kernels(reported):
    assert CPU not in reported.readme.read_text(encoding="utf-8")
    text = reported.markdown.read_text(encoding="utf-8")
    section = text[text.index(f"## {CPU}") :]
    assert section.startswith(f"## {CPU} (CPU): imaginary-cpu\n\n**These figures say nothing about the kernels**")
    assert "777 µs" in section and "777 µs" not in text[: text.index(f"## {CPU}")]
    assert "Goals" not in section and ".svg" not in section
    assert not any("imaginary-cpu" in path.name for path in (reported.docs / "benchmarks").iterdir())


def test_report_results_of_a_cpu_alone_measure_nothing(place):
    place.put(cpu_results())
    place.run_ok()
    assert pages.NOT_MEASURED in place.block() and "|" not in place.block()
    assert "No run on a GPU has been committed" in place.markdown.read_text(encoding="utf-8")
    assert [file.name for file in (place.docs / "benchmarks").iterdir()] == ["counted.svg"]


def test_report_every_table_and_plot_names_its_device(reported):
    text = reported.markdown.read_text(encoding="utf-8")
    tables = re.findall(r"(.*)\n\n\|", text[text.index(f"## {GPU}") :])
    assert len(tables) > 10 and all(GPU in title or CPU in title for title in tables)
    for row in re.findall(r"^\| .*\d ?[µm]?s .*$", reported.block(), re.MULTILINE):
        assert row.startswith(f"| {GPU} |")
    for file in (reported.docs / "benchmarks").glob("imaginary-*"):
        assert GPU in file.read_text(encoding="utf-8")


def test_report_text_of_a_file_cannot_break_a_table(place):
    results = gpu_results()
    results.rows[0] = dataclasses.replace(results.rows[0], samples=[], status="failed: a | b\nc")
    place.put(results)
    place.run_ok()
    assert "| failed: a \\| b c |" in place.markdown.read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------- plots


def plot(name: str, results: Results, tmp_path: Path):
    place = Place(tmp_path)
    place.put(results)
    (run,) = read.read_runs(place.results)
    return {plot.name: plot for plot in plots.plots(run)}[name]


def test_report_plots_are_svg_and_linked(reported):
    stem = "imaginary-gpu-9000-"
    files = sorted((reported.docs / "benchmarks").glob("imaginary-*"))
    names = ("decode-overhead", "memory-by-layers", "roofline", "speedup-by-tokens")
    assert [file.name for file in files] == [f"{stem}{name}.svg" for name in names]
    for file in files:
        assert ElementTree.parse(file).getroot().tag.endswith("svg")
        assert f"](benchmarks/{file.name})" in reported.markdown.read_text(encoding="utf-8")


def test_report_a_plot_is_the_same_bytes_whatever_the_settings(tmp_path):
    import matplotlib

    roofline = plot("roofline", gpu_results(), tmp_path)
    once = draw(roofline)
    with matplotlib.rc_context({"font.size": 20, "svg.fonttype": "path"}):
        assert draw(roofline) == once
        assert matplotlib.rcParams["font.size"] == 20


def test_report_speedup_is_the_rival_over_ours(tmp_path):
    forward = plot("speedup-by-tokens", gpu_results(), tmp_path).panels[0]
    found = {series.label: [point[:2] for point in series.points] for series in forward.series}
    assert found["hook, d = 4096"] == [(64, pytest.approx(3)), (4096, pytest.approx(3))]
    assert found["fused-again, d = 1152"][0][1] == pytest.approx(1.01)


def test_report_roofline_has_the_floor(tmp_path):
    forward, backward, both = plot("roofline", gpu_results(), tmp_path).panels
    for panel, units in ((forward, 3), (backward, 3), (both, 6)):
        floor, fused = panel.series[:2]
        assert floor.label == f"floor: {units} units at 4,000 GB/s" and fused.label == "fused"
        assert floor.points[-1][0] == units * 4096 * 4096 * 2 / 1e6
        assert fused.points[-1][1] == pytest.approx(1.25 * floor.points[-1][1])


def test_report_memory_by_layers_and_decode_overhead(tmp_path):
    peak, kept = plot("memory-by-layers", gpu_results(), tmp_path).panels
    hook = next(series for series in peak.series if series.label == "hook")
    assert [point[:2] for point in hook.points] == [(4, pytest.approx(80)), (8, pytest.approx(160))]
    (tmp_path / "again").mkdir()
    eager, graph = plot("decode-overhead", gpu_results(), tmp_path / "again").panels
    assert graph.ticks == ("fused", "hook")
    assert [point[1] for point in graph.series[0].points] == pytest.approx([1, 20])


def test_report_only_plots_that_have_rows(place):
    results = gpu_results()
    results.rows = [row for row in results.rows if row.level == "memory"]
    place.put(results)
    place.run_ok()
    drawn = [file.name for file in (place.docs / "benchmarks").iterdir() if file.name != "counted.svg"]
    assert drawn == ["imaginary-gpu-9000-memory-by-layers.svg"]


# ---------------------------------------------------------------------------------------------------- writing, checking


def test_report_second_run_changes_nothing(reported, tmp_path):
    place = copied(reported, tmp_path)
    before = place.files()
    assert place.run_ok() == "nothing to change\n"
    assert place.run_ok("--check") == "nothing to change\n"
    assert place.files() == before


def test_report_check_writes_nothing_and_names_what_differs(place):
    place.put(cpu_results())
    line = place.fail("--check")
    assert "README.md" in line and "benchmarks.md" in line


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md", "docs/benchmarks/imaginary-gpu-9000-roofline.svg"])
def test_report_a_figure_changed_by_hand_is_found(reported, tmp_path, name):
    place = copied(reported, tmp_path)
    file = tmp_path / name
    text = file.read_text(encoding="utf-8")
    figure = "4,000 GB/s" if name.endswith(".svg") else "31.5 µs"
    assert figure in text
    file.write_text(text.replace(figure, figure.replace("5", "4").replace("4,", "5,"), 1), encoding="utf-8")
    line = place.fail("--check")
    assert line.count(file.name) == 1 and line.count("README.md") == (name == "README.md")
    place.run_ok()
    assert file.read_text(encoding="utf-8") == text


def test_report_plot_drawn_by_another_matplotlib_is_the_same_if_its_data_are(reported, tmp_path):
    place = copied(reported, tmp_path)
    file = place.docs / "benchmarks" / "imaginary-gpu-9000-roofline.svg"
    text = file.read_text(encoding="utf-8")
    other = re.sub(r"Matplotlib v[\d.]+", "Matplotlib v3.0.0", text).replace("stroke-width", "stroke-width ")
    assert other != text
    file.write_text(other, encoding="utf-8")
    place.run_ok("--check")
    file.write_text(re.sub(r"drawn from \w+", "drawn from 0123", other), encoding="utf-8")
    assert file.name in place.fail("--check")


def test_report_plots_of_results_that_are_gone_go_too_and_no_other_file(reported, tmp_path):
    place = copied(reported, tmp_path)
    own = place.docs / "benchmarks" / "drawn-by-hand.svg"
    own.write_text("<svg/>", encoding="utf-8")
    (place.results / "imaginary-gpu-9000.json").unlink()
    assert "roofline" in place.fail("--check")
    place.run_ok()
    assert sorted((place.docs / "benchmarks").iterdir()) == [place.docs / "benchmarks" / "counted.svg", own]
    assert pages.NOT_MEASURED in place.block()


# ------------------------------------------------------------------------------------------------------------- refusals


def with_changes(place: Place, **changes) -> None:
    """Write a good results file, and one with some keys changed."""
    place.put(cpu_results())
    file = place.put(gpu_results())
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


ROW = {"level": "op", "what": "forward", "contender": "fused", "case": asdict(OpCase(8, 64)), "samples": [1e-5]}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"schema": 0}, "schema 0; expected 1"),
        ({"extra": 0}, "keys"),
        ({"machine": {"kind": "gpu"}}, "expected a device"),
        ({"machine": {"device": "x", "kind": "tpu"}}, "gpu or cpu"),
        ({"bandwidth": -1.0}, "bandwidth"),
        ({"bandwidth": "fast"}, "bandwidth"),
        ({"absent": ["lora"]}, "absent"),
        ({"rows": [{"contender": "fused"}]}, "row"),
        ({"rows": [ROW | {"what": "sideways"}]}, "'sideways'; expected"),
        ({"rows": [ROW | {"case": {"tokens": 8}}]}, "row 0"),
        ({"rows": [ROW | {"case": ROW["case"] | {"tokens": "8"}}]}, "tokens is '8'; expected int"),
        ({"rows": [ROW | {"case": ROW["case"] | {"dtype": "int8"}}]}, "dtype is 'int8'"),
        ({"rows": [ROW | {"samples": [0.0]}]}, "above 0"),
        ({"rows": [ROW | {"samples": [float("nan")]}]}, "finite"),
        ({"rows": [ROW, ROW]}, "expected it once"),
    ],
)
def test_report_bad_results_are_refused_in_one_line(place, changes, said):
    with_changes(place, **changes)
    line = place.fail()
    assert said in line and "imaginary-gpu-9000.json" in line


def test_report_broken_json_is_refused(place):
    place.put(gpu_results())
    (place.results / "broken.json").write_text('{"schema": 1,', encoding="utf-8")
    assert "broken.json is no JSON" in place.fail()


@pytest.mark.parametrize(
    "readme",
    ["# Title\n", "<!-- results -->\n", "<!-- /results -->\n<!-- results -->\n", README + README],
    ids=["none", "no end", "reversed", "twice"],
)
def test_report_missing_markers_are_refused(place, readme):
    place.put(gpu_results())
    place.readme.write_text(readme, encoding="utf-8")
    assert "markers" in place.fail()


def test_report_missing_folder_and_readme_are_refused(place):
    place.results = place.folder / "nowhere"
    assert "nowhere" in place.fail()
    place.results, place.readme = place.folder / "results", place.folder / "none.md"
    assert "none.md" in place.fail()
