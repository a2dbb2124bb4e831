"""Tests of `python -m bench.joint` on a tiny random model: runs, measurements, report, and resuming."""

import dataclasses
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from models import HIDDEN, LAYERS, build
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from fused_steer.tools.demo import Encoder
from fused_steer.tools.listops import OPERATORS

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))
try:
    joint = importlib.import_module("bench.joint")
finally:
    sys.path.remove(str(ROOT))

STEPS, BATCH, HELD_OUT = 2, 3, 6
SETTINGS = joint.Settings("tiny", STEPS, BATCH, HELD_OUT)
WORDS = ["<eos>", "<unk>", "=", "]", "[", *OPERATORS, *map(str, range(10))]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="module")
def saved_model(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build(eos_token_id=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def invoke(*arguments):
    return CliRunner().invoke(joint.app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def run(saved_model):
    def run(out, seeds, steps=STEPS):
        sizes = ("--steps", steps, "--batch-size", BATCH, "--held-out", HELD_OUT)
        return invoke("--out", out, "--model", saved_model, "--seeds", seeds, *sizes)

    return run


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory) -> Path:
    """Return the path of the results of one seed."""
    out = tmp_path_factory.mktemp("finished")
    result = run(out, 1)
    assert result.exit_code == 0, result.output
    return joint.results_file(out)


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    file = joint.results_file(tmp_path)
    file.parent.mkdir()
    file.write_bytes(finished.read_bytes())
    return file


def without_times(results: dict) -> dict:
    """Return the runs by method and seed, without fields that change from run to run."""
    times = {"seconds", "commit", "dirty", "date"}
    return {
        (run["method"], run["seed"]): {key: value for key, value in run.items() if key not in times}
        for run in results["runs"]
    }


# ----------------------------------------------------------------------------------------------------------- the runs


def test_joint_bench_every_method_is_run_and_measured(finished):
    results = joint.load(finished)
    runs = {run["method"]: run for run in results["runs"]}
    assert list(runs) == ["lora", "steering", "joint", "joint-orth"]
    assert results["settings"]["steps"] == STEPS
    assert {"torch", "transformers", "peft"} <= results["machine"]["versions"].keys()
    assert results["machine"]["cores"] and results["machine"]["fused_steer"]
    assert set(results["task"]["exact"]) <= {"0", "1"} and len(results["task"]["exact"]) == HELD_OUT
    for method, run in runs.items():
        assert len(run["losses"]) == len(run["seconds"]) == STEPS
        assert len(run["exact"]) == HELD_OUT
        # Fresh adapters change nothing, so the first batch has the untrained model's loss in every method.
        assert run["losses"][0] == runs["lora"]["losses"][0]
        assert ("overlap" in run) == (method in joint.JOINT)
    assert len({run["losses"][1] for run in runs.values()}) == 4, "two methods took the same step"
    assert runs["steering"]["trained"] == LAYERS * 2 * 8 * HIDDEN
    assert runs["joint"]["trained"] == runs["joint-orth"]["trained"]
    assert runs["joint"]["trained"] == runs["lora"]["trained"] + runs["steering"]["trained"]


def test_joint_bench_the_overlap_is_nought_only_with_the_constraint(finished):
    found = {run["method"]: run["overlap"] for run in joint.load(finished)["runs"] if "overlap" in run}
    for overlap in found.values():
        assert len(overlap["layers"]) == len(overlap["weight_overlap"]) == LAYERS
        assert sum(overlap["histogram"]) == sum(layer["tokens"] for layer in overlap["layers"]) > 0
    assert min(found["joint"]["weight_overlap"]) > 0.01
    assert max(found["joint-orth"]["weight_overlap"]) < 1e-5
    assert min(layer["mean_abs"] for layer in found["joint"]["layers"]) > 0.01
    assert max(layer["max_abs"] for layer in found["joint-orth"]["layers"]) < 1e-5
    middle = found["joint-orth"]["histogram"][joint.BINS // 2]
    assert middle == sum(found["joint-orth"]["histogram"]) > found["joint"]["histogram"][joint.BINS // 2]


def test_joint_bench_a_finished_run_is_not_repeated(run, copied, monkeypatch):
    before = copied.read_bytes()
    monkeypatch.setattr(joint, "run_one", lambda *arguments: pytest.fail("a run was repeated"))
    result = run(copied.parents[1], 1)
    assert result.exit_code == 0, result.output
    assert "all 4 runs are in" in result.output
    assert copied.read_bytes() == before


def test_joint_bench_it_goes_on_where_it_stopped_with_the_same_numbers(run, copied):
    results = joint.load(copied)
    complete = without_times(results)
    first = results["runs"][0]
    results["runs"] = [first]
    joint.write_json(results, copied)
    result = run(copied.parents[1], 1)
    assert result.exit_code == 0, result.output
    again = joint.load(copied)
    assert again["runs"][0] == first
    assert without_times(again) == complete


def test_joint_bench_another_seed_is_added(run, copied):
    before = joint.load(copied)["runs"]
    assert run(copied.parents[1], 2).exit_code == 0
    runs = joint.load(copied)["runs"]
    assert runs[:4] == before
    assert [run["seed"] for run in runs[4:]] == [1, 1, 1, 1]
    assert runs[4]["losses"] != runs[0]["losses"]


def test_joint_bench_a_run_that_fails_leaves_those_before_it(run, tmp_path, monkeypatch):
    run_one = joint.run_one

    def fails_at_steering(base, encoder, method, *others):
        if method == "steering":
            raise RuntimeError("the loss is nan")
        return run_one(base, encoder, method, *others)

    monkeypatch.setattr(joint, "run_one", fails_at_steering)
    result = run(tmp_path, 1)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "bench.joint: the loss is nan"
    assert [run["method"] for run in joint.load(joint.results_file(tmp_path))["runs"]] == ["lora"]


def test_joint_bench_no_expression_is_both_trained_on_and_held_out():
    parts = [joint.draw(SETTINGS, seed) for seed in range(3)]
    assert parts[0][0] == parts[1][0] == parts[2][0]
    every = [*parts[0][0], *(expression for _, training in parts for expression in training)]
    assert len(set(every)) == len(every) == HELD_OUT + 3 * STEPS * BATCH


def test_joint_bench_adapters_of_a_seed_start_from_the_same_values():
    def parameters(method, seed=1):
        _, groups = joint.adapt(build(), method, SETTINGS, seed)
        return [[p.detach().clone() for p in group["params"]] for group in groups], [group["lr"] for group in groups]

    (lora,), lora_rates = parameters("lora")
    (steering,), steering_rates = parameters("steering")
    for method in joint.JOINT:
        both, rates = parameters(method)
        assert rates == [*lora_rates, *steering_rates] == [SETTINGS.lora_lr, SETTINGS.steering_lr]
        for ours, alone in zip(both, (lora, steering), strict=True):
            assert all(torch.equal(*pair) for pair in zip(ours, alone, strict=True))
    (other,), _ = parameters("lora", seed=2)
    assert not all(torch.equal(*pair) for pair in zip(other, lora, strict=True))


def test_joint_bench_the_shifts_are_those_that_the_model_computes(tokenizer):
    """The shifts equal what each steered layer adds to its input and what LoRA adds to its base layer's output."""
    model, groups = joint.adapt(build(), "joint", SETTINGS, 0)
    shifts = joint.Shifts(model.eval(), SETTINGS)
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for group in groups for p in group["params"]):
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    encoder = Encoder(tokenizer, torch.device("cpu"))
    rows = [encoder.prompt(expression) for expression in joint.draw(SETTINGS, 0)[0]]
    inputs = encoder.inputs(rows)
    seen = {}

    def keep(module, args, output):
        seen[module] = output - (args[0] + args[1] if len(args) > 1 else module.base_layer(args[0]))

    sites, writers = shifts.sites, [writer for (writer,) in shifts.writers]
    for module in (*sites, *writers):
        module.register_forward_hook(keep)
    found = list(shifts.of_batch(model, inputs))
    tokens = inputs["attention_mask"].bool()
    assert not tokens.all(), "no row is padded"
    for site, writer, (steering, lora) in zip(sites, writers, found, strict=True):
        assert len(steering) == len(lora) == sum(map(len, rows))
        torch.testing.assert_close(steering, seen[site][tokens])
        torch.testing.assert_close(lora, seen[writer][tokens])


# ----------------------------------------------------------------------------------------------------------- refusals


def test_joint_bench_other_settings_are_refused(run, copied):
    before = copied.read_bytes()
    result = run(copied.parents[1], 1, steps=3)
    assert result.exit_code == 1
    assert result.stderr == f"bench.joint: steps is 3 but 2 in {copied}; expected the same\n"
    assert copied.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is no JSON"), ('{"schema": 7}', "has schema 7; expected one of bench.joint, 1"), ("[]", "has schema None")],
)
def test_joint_bench_what_is_no_results_file_is_refused(run, tmp_path, content, message):
    file = joint.results_file(tmp_path)
    file.parent.mkdir()
    file.write_text(content)
    for result in (run(tmp_path, 1), invoke("--report", "--out", tmp_path, "--docs", tmp_path / "docs")):
        assert result.exit_code == 1
        assert message in result.stderr and result.stderr.count("\n") == 1
    assert file.read_text() == content
    assert not (tmp_path / "docs").exists()


@pytest.mark.parametrize("name", ["steps", "batch_size", "held_out", "threads"])
def test_joint_bench_sizes_are_at_least_one(name):
    with pytest.raises(ValueError, match=f"{name.replace('_', ' ')} is 0; expected at least 1"):
        dataclasses.replace(SETTINGS, **{name: 0})


# --------------------------------------------------------------------------------------------------------- the report


def of_exact(**by_method: list[str]) -> dict:
    """Make results of a few methods from the exact matches of each seed."""
    return {
        "runs": [
            {"method": method.replace("_", "-"), "seed": seed, "exact": exact}
            for method, rows in by_method.items()
            for seed, exact in enumerate(rows)
        ]
    }


def test_joint_bench_a_difference_is_that_of_the_same_expressions():
    diff = joint.difference(of_exact(joint_orth=["1110", "1100"], joint=["1000", "1000"]), "joint-orth", "joint")
    assert diff.seeds == [50.0, 25.0]
    assert diff.mean == 37.5
    # The differences by expression are 0, 100, 50 and 0; their standard deviation is 47.87.
    assert diff.error == pytest.approx(47.87 / 2, abs=0.01)
    assert not diff.shown
    assert joint.difference(of_exact(joint_orth=["1"]), "joint-orth", "joint") is None


@pytest.mark.parametrize(
    ("seeds", "error", "shown"),
    [([5, 6], 2.0, True), ([-5, -6], 2.0, True), ([5, 6], 3.0, False), ([20, -1], 1.0, False), ([20, 0], 1.0, False)],
)
def test_joint_bench_a_difference_is_shown_where_seeds_agree_and_it_is_beyond_the_error(seeds, error, shown):
    assert joint.Difference(seeds, error).shown is shown


@pytest.mark.parametrize(
    ("orthogonal", "naive", "headline"),
    [
        ("1" * 30 + "0" * 10, "0" * 40, "Joint-orth is better than naive joint here."),
        ("0" * 40, "1" * 30 + "0" * 10, "Joint-orth is worse than naive joint here."),
        ("1" + "0" * 39, "0" * 40, "Joint-orth is not shown to be better than naive joint here, nor worse."),
    ],
)
def test_joint_bench_the_outcome_is_said_as_it_is(finished, orthogonal, naive, headline):
    results = joint.load(finished)
    for run in results["runs"]:
        run["exact"] = {"joint-orth": orthogonal, "joint": naive}.get(run["method"], naive)
    assert f"**{headline}**" in joint.report_text(joint.complete(results))


def test_joint_bench_the_report_has_the_figures_of_the_results(finished, tmp_path):
    result = invoke("--report", "--out", finished.parents[1], "--docs", tmp_path)
    assert result.exit_code == 0, result.output
    files = {"joint-listops.md", "joint-listops-losses.png", "joint-listops-cosines.png"}
    assert {path.name for path in tmp_path.iterdir()} == files
    text = (tmp_path / "joint-listops.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(([^)]*\.png)\)", text)) == files - {"joint-listops.md"}
    for name in files - {"joint-listops.md"}:
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG\r\n") and len(content) < 200_000
    results = joint.load(finished)
    assert f"{STEPS} steps, 1 seed and no tuning" in " ".join(text.split())
    assert f"torch {torch.__version__}" in text
    for run in results["runs"]:
        start = f"| {joint.METHODS[run['method']]} | {run['trained']:,} "
        row = next(line for line in text.splitlines() if line.startswith(start))
        assert f"| {run['held_out_loss']:.3f} | {sum(run['losses']) / STEPS:.3f} |" in row
    naive = next(run for run in results["runs"] if run["method"] == "joint")
    for index, layer in enumerate(naive["overlap"]["layers"]):
        quantiles = " | ".join(f"{quantile:+.3f}" for quantile in layer["quantiles"])
        assert f"\n| {index} | {quantiles} | {layer['mean_abs']:.3f} |" in text


def test_joint_bench_a_report_needs_a_seed_of_all_methods(copied, tmp_path):
    results = joint.load(copied)
    results["runs"] = results["runs"][:2]
    joint.write_json(results, copied)
    result = invoke("--report", "--out", tmp_path, "--docs", tmp_path / "docs")
    assert result.exit_code == 1
    expected = "expected a seed with all of LoRA, steering, naive joint, joint-orth"
    assert result.stderr == f"bench.joint: the runs are of LoRA 0, steering 0; {expected}\n"
    assert not (tmp_path / "docs").exists()


def test_joint_bench_a_seed_that_not_all_methods_have_is_left_out_and_said_to_be(finished):
    results = joint.load(finished)
    text = joint.report_text(joint.complete(results))
    results["runs"].append(results["runs"][0] | {"seed": 1, "exact": "1" * HELD_OUT})
    found = joint.complete(results)
    assert found["runs"] == joint.load(finished)["runs"]
    said = "Not all methods were run with every seed; left out: LoRA of seed 1."
    assert " ".join(joint.report_text(found).split()).replace(f" {said}", "") == " ".join(text.split())
    assert said in " ".join(joint.report_text(found).split())


def test_joint_bench_the_report_in_docs_is_that_of_the_results():
    file = joint.results_file(joint.FOLDER)
    text = (ROOT / "docs" / "joint-listops.md").read_text(encoding="utf-8")
    assert text == joint.report_text(joint.complete(joint.load(file)))
