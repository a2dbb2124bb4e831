"""Tests of `fused-steer verify-vllm` without vLLM: each check fails if what it checks is untrue."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from command import assert_refused, invoke, plain_output  # noqa: F401 - an autouse fixture
from models import LAYERS, build

from fused_steer.adapters.files import read_adapter
from fused_steer.tools import throwaway, verify_vllm
from fused_steer.tools.engines import Ask
from fused_steer.tools.throwaway import VECTOR, Answer, judge, make_adapters
from fused_steer.tools.verify_vllm import Report, Trial, VerifyOptions

NEW = 6
PROMPTS = verify_vllm.make_prompts(4, 12, 60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Make a folder with model/ and the adapters of a trial: 0, 1 and vector."""
    root = tmp_path_factory.mktemp("verify")
    build().save_pretrained(root / "model")
    sizes = make_adapters(str(root / "model"), "float32", "cpu", PROMPTS, 4, root, 2)
    assert sizes == (LAYERS, 32)
    return root


def answer(folder: Path, row: int, adapter: str | None, **options: Any) -> Answer:
    """Let Hugging Face answer a request."""
    loaded = throwaway.load(str(folder / "model"), "float32", "cpu")
    names: list[str | None] = [None]
    path = None if adapter is None else str(folder / adapter)
    if path is not None:
        loaded, names = throwaway.patch_model(loaded, path, check_base=False), ["default"]
    ids = torch.tensor([PROMPTS[row]])

    def generate() -> Any:
        return loaded.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None)

    if path is None:
        found = generate()
    else:
        with loaded.steering.batch(names, **options):
            found = generate()
    return Answer(PROMPTS[row], found[0, ids.shape[1] :].tolist(), path, **options)


def test_throwaway_adapters_shift_by_the_dose(folder):
    """The shift of each layer has the promised share of the hidden state's norm, and adapters differ."""
    loaded = throwaway.load(str(folder / "model"), "float32", "cpu")
    with torch.no_grad():
        hidden = loaded(torch.tensor(PROMPTS), output_hidden_states=True).hidden_states
    files = [read_adapter(folder / name) for name in ("0", "1", VECTOR)]
    for place, tensors in files[0].tensors.items():
        if place.layer == LAYERS - 1:
            continue
        state = hidden[place.layer + 1].flatten(0, 1)
        down, up = (tensors[name] for name in (throwaway.DOWN, throwaway.UP))
        shift = torch.nn.functional.silu(state @ down.T) @ up.T
        for moved in (shift.norm(dim=1).median(), files[2].tensors[place][throwaway.UP_BIAS].norm()):
            torch.testing.assert_close(moved, throwaway.DOSE * state.norm(dim=1).median())
    first, second = (next(iter(file.tensors.values()))[throwaway.UP] for file in files[:2])
    assert not torch.equal(first, second)


#: A batch's requests in the order of its rows: adapter and options.
REQUESTS: list[tuple[str | None, dict[str, Any]]] = [
    (None, {}), ("0", {}), ("1", {"scale": 2.0, "positions": "generated"}), (VECTOR, {}),
]  # fmt: skip


def readings(folder: Path, answers: list[Answer]) -> tuple[throwaway.Verdict, dict[str, throwaway.Verdict]]:
    """Return the verdicts on answers as they were asked for, and on those of faulty plug-ins."""
    faulty = throwaway.faulty_readings(answers, LAYERS)
    found = judge(str(folder / "model"), "float32", "cpu", {"asked": answers, **faulty})
    return found.pop("asked"), found


def test_judge_takes_right_answers_and_refuses_those_of_a_faulty_plug_in(folder):
    right = [answer(folder, row, name, **options) for row, (name, options) in enumerate(REQUESTS)]
    verdict, faulty = readings(folder, right)
    assert all(verdict.right(row) for row in range(4)) and verdict.same == [NEW] * 4
    assert 0 < verdict.bound < 1e-4
    assert list(faulty) == ["no steering", "half the strength", "other positions", "another adapter", "other layers"]
    for fault, each in faulty.items():
        assert [each.right(row) for row in range(4)] == [True, False, False, False], fault
    assert all(check.kept for check in verify_vllm.check_acts(right, verdict, faulty))


@pytest.mark.parametrize("fault", ["no steering", "half the strength", "other positions", "another adapter"])
def test_verify_vllm_a_faulty_plug_in_is_seen(folder, fault):
    """Hugging Face takes the plug-in's place, with a fault."""
    asked = [Answer(PROMPTS[row], [], name and str(folder / name), **o) for row, (name, o) in enumerate(REQUESTS)]
    given = []
    for row, one in enumerate(throwaway.faulty_readings(asked, LAYERS)[fault]):
        options = {"scale": one.scale, "positions": one.positions} if one.adapter else {}
        tokens = answer(folder, row, one.adapter and Path(one.adapter).name, **options).answer
        given.append(replace(asked[row], answer=tokens))
    verdict, faulty = readings(folder, given)
    acts, _, unsteered, *_ = verify_vllm.check_acts(given, verdict, faulty)
    assert (acts.kept, unsteered.kept) == (False, True) and acts.seen.startswith("0 of 3 requests")


class FakeEngine:
    """An engine that answers by a function of the adapter's contents; `stale` and `leaks` are faults."""

    def __init__(self, folder: Path, stale: bool = False, leaks: bool = False) -> None:
        self.folder, self.stale, self.leaks = folder, stale, leaks
        self.loaded: dict[str, str] = {}
        self.calls: list[tuple[int, int]] = []

    def answer(self, requests: list[Ask], new_tokens: int) -> tuple[list[list[int]], float]:
        self.calls.append((len(requests), new_tokens))
        found = []
        steered = any(one.adapter for one in requests)
        for one in requests:
            word = "base"
            if one.adapter is not None:
                contents = (Path(one.path or "") / "adapter_model.safetensors").read_bytes()
                word = self.loaded.setdefault(one.adapter, str(zlib.crc32(contents)))
            elif steered and self.leaks:
                word = "leak"
            # Python's own hash of a text differs from process to process, and may be that of another.
            found.append([zlib.crc32(f"{word} {list(one.prompt)}".encode()), *range(new_tokens - 1)])
        return found, 0.001 * new_tokens * (2 if steered else 1)

    def forget_prompts(self) -> None:
        pass

    def unload(self, adapter: str) -> bool:
        if not self.stale:
            self.loaded.pop(adapter, None)
        return True


def test_check_neighbours_sees_a_leak(folder):
    trial = Trial(PROMPTS, folder, 2)
    check, answers = verify_vllm.check_neighbours(FakeEngine(folder), trial, NEW)
    assert check.kept and check.seen.startswith("2 of 2 unsteered requests")
    assert [one.adapter and Path(one.adapter).name for one in answers] == [None, "0", None, "1"]
    assert (answers[3].scale, answers[3].positions) == (2.0, "generated")
    check, _ = verify_vllm.check_neighbours(FakeEngine(folder, leaks=True), trial, NEW)
    assert check.kept is False and check.seen.startswith("0 of 2")


def test_check_reload_sees_old_contents(folder):
    trial = Trial(PROMPTS, folder, 2)
    assert verify_vllm.check_reload(FakeEngine(folder), trial, NEW).kept
    check = verify_vllm.check_reload(FakeEngine(folder, stale=True), trial, NEW)
    assert check.kept is False and check.seen.startswith("0 of 4 answers after a reload")


def test_check_acts_sees_wrong_answers_and_its_own_blindness():
    answers = [Answer([1], [2]), Answer([1], [3], "a"), Answer([1], [3], "a"), Answer([1], [3], "b")]

    def verdict(*wrong: int) -> throwaway.Verdict:
        return throwaway.Verdict([0.1 if row in wrong else 0.0 for row in range(4)], [1] * 4, 1e-6)

    told = {"no steering": verdict(2, 3)}
    assert [check.kept for check in verify_vllm.check_acts(answers, verdict(), told)] == [True] * 3
    assert [check.kept for check in verify_vllm.check_acts(answers, verdict(1), told)] == [False, True, True]
    assert [check.kept for check in verify_vllm.check_acts(answers, verdict(0), told)] == [True, True, False]
    # The answers of b would be right without steering, too.
    blind = verify_vllm.check_acts(answers, verdict(), told | {"other layers": verdict(1, 2)})[1]
    assert blind.kept is False and blind.seen == (
        "Hugging Face refuses the same answers after no steering in 2 of 3 requests, other layers in 2 of 3 requests; "
        "not told apart: b with other layers (give more --new-tokens)"
    )


def test_measure_is_in_turn_and_without_the_prompts_time(folder):
    engine = FakeEngine(folder)
    trial = Trial(PROMPTS, folder, 2)
    batches = verify_vllm.contenders(trial, {}, LAYERS)
    assert "hotwire, idle" not in batches and "all, 4 strengths" in batches
    assert "hotwire, all, one layer" in verify_vllm.contenders(trial, {"hotwire": engine}, LAYERS)
    samples = verify_vllm.measure(batches, {"vanilla": engine, "steered": engine}, NEW, 2)
    assert {len(one) for one in samples.values()} == {2} and len(engine.calls) == 2 * 3 * len(batches)
    report = Report(VerifyOptions("m"), {"machine": "x"}, samples=samples)
    ratios = report.ratios()
    assert ratios["vanilla"] == (1.0, 1.0, 1.0) and ratios["idle"][0] == pytest.approx(1.0)
    assert ratios["one request"][0] > 1.9  # the fake's steered batches take twice as long


def test_report_is_one_block_with_all_that_matters():
    checks = [verify_vllm.Check("a", True, "seen"), verify_vllm.Check("b", None, "no GPU: eager")]
    report = Report(VerifyOptions("some/model"), verify_vllm.describe("float32"), checks, {"vanilla": [1.0]}, ["note"])
    text = report.text()
    torch_is = f"torch {metadata.version('torch')}"  # a CUDA build's own version says more
    parts = ["verify-vllm some/model", "machine: ", torch_is, "dtype: float32", "note", "all well"]
    for part in [*parts, "ok       a: seen", "not run  b: no GPU: eager", "1.000 (1.000 to 1.000)"]:
        assert part in text, part
    assert "\n\n" not in text and report.kept
    checks.append(verify_vllm.Check("c", False, "seen"))
    assert not report.kept and report.text().endswith("NOT WELL") and "FAILED   c: seen" in report.text()
    assert json.loads(report.as_json())["ratios"] == {"vanilla": [1.0, 1.0, 1.0]}


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--rows", 3], "rows is 3; expected at least 4"),
        (["--adapters", 9], "adapters is 9; expected at most 8, the rows of a batch"),
        (["--rounds", 0], "rounds is 0; expected at least 1"),
        (["--rank", 257], "rank is 257; expected at most 256"),
        (["--dtype", "int8"], "dtype is 'int8'; expected auto"),
        (["--memory", 1.5], "memory is 1.5; expected a share above 0, at most 1"),
        (["--memory", "nan"], "memory is nan"),
    ],
    ids=str,
)
def test_verify_vllm_bad_options_are_one_line(options, part):
    assert_refused(invoke("verify-vllm", "--model", "some/model", *options), part)


def test_verify_vllm_without_vllm_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(verify_vllm, "_version", lambda name: None)
    assert_refused(invoke("verify-vllm", "--model", "some/model"), "vLLM is not installed; expected it beside")


def test_hotwire_is_named_if_it_cannot_run(monkeypatch):
    monkeypatch.setattr(verify_vllm, "_version", lambda name: None)
    assert verify_vllm.hotwire_state() == (False, "hotwire: not installed (pip install hotwire-vllm)")
    monkeypatch.setattr(verify_vllm, "_version", lambda name: "0.1.2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert verify_vllm.hotwire_state() == (False, "hotwire-vllm 0.1.2: not run, it needs a GPU")


def test_start_engines_without_a_rival_that_does_not_start(folder, monkeypatch):
    """Each engine gets its own plug-ins, and all end. Only hotwire's may fail."""
    started: list[Any] = []

    class Started:
        fails = ("hotwire",)

        def __init__(self, options: dict[str, Any], environment: dict[str, str]) -> None:
            self.options, self.environment, self.closed = options, environment, False
            started.append(self)

        def wait(self) -> None:
            if self.environment["VLLM_PLUGINS"] in self.fails:
                raise RuntimeError("vLLM did not start: no nvcc")

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(verify_vllm, "Engine", Started)
    options, notes = VerifyOptions("m", rows=4, adapters=2, rank=9), []
    with verify_vllm.start_engines(options, "float32", folder, True, notes) as made:
        assert list(made) == ["vanilla", "steered"] and not any(one.closed for one in started)
    assert notes == ["hotwire: not run, vLLM did not start: no nvcc"]
    assert all(one.closed for one in started)
    assert [one.environment["VLLM_PLUGINS"] for one in started] == ["", "fused_steer", "hotwire"]
    assert ["enable_lora" in one.options for one in started] == [False, True, False]
    assert started[1].options["max_lora_rank"] == 16 and started[1].options["max_loras"] == 4
    Started.fails = ("fused_steer",)
    with pytest.raises(RuntimeError, match="no nvcc"):
        with verify_vllm.start_engines(options, "float32", folder, False, notes):
            pytest.fail("entered")
    assert all(one.closed for one in started)
