"""Tests of the playground's page without a browser, and of its command's refusals before a model is loaded."""

import importlib.util
import json
import socket
import sys

import pytest
from command import assert_refused, invoke, plain_output  # noqa: F401
from models import build, randomize
from text import save_tiny, tokenizer

from fused_steer import SteerConfig, patch_model
from fused_steer.playground import Answer, Token, Variant
from fused_steer.playground import command as playground
from fused_steer.playground.page import OWN, TOGETHER, Page, render, variants_of

GRADIO = pytest.mark.skipif(not importlib.util.find_spec("gradio"), reason="Gradio is not installed")


@pytest.fixture
def page(tmp_path):
    model = patch_model(build(), SteerConfig(rank=2), adapter_name="a")
    model.steering.add("b", SteerConfig(rank=1, activation="tanh"))
    for seed, name in enumerate("ab"):
        model.steering.use(name)
        randomize(model, name, seed=seed + 1)
    return Page(model, tokenizer(), "base/model", tmp_path)


def shown(*tokens, **variant) -> str:
    return render([Answer(Variant("a", **variant), tokens, True)])


def test_page_columns_are_the_base_each_strength_and_the_sum():
    assert [v.label for v in variants_of({"a": 1.0, "b": 0.0}, OWN, True)] == ["base", "a"]
    found = variants_of({"a": 1.0, "b": -0.5}, "last_3", True)
    assert [(v.label, dict(v.strengths), v.positions) for v in found] == [
        ("base", {}, None),
        ("a", {"a": 1.0}, "last_3"),
        ("b", {"b": -0.5}, "last_3"),
        (TOGETHER, {"a": 1.0, "b": -0.5}, "last_3"),
    ]
    assert len(variants_of({"a": 1.0, "b": -0.5}, OWN, False)) == 3


def test_page_tints_tokens_by_their_shift():
    page = shown(Token(1, "x", 0.1, False), Token(2, "y", 0.4, True), Token(3, "z", None, True), strengths={"a": 1.0})
    assert page.index("0.212)") < page.index(">x<") < page.index("0.850)") < page.index(">y<")
    assert 'class="fs-answer">z<' in page and "mean ‖δ‖/‖h‖ 0.25" in page and "1 × a" in page
    assert "rgba" not in shown(Token(1, "x", None, True))


def test_page_text_is_never_markup():
    assert "<b>" not in shown(Token(1, "<b>", 0.1, True), strengths={"<i>": 1.0})
    assert "<b>" not in render([], {"sum": "<b>"})


def test_page_answers_and_says_why_a_sum_cannot_be(page):
    steps = list(page.answer("a steered model", False, OWN, True, 3, 0.0, 1.0, 0.5))
    assert len(steps) == 4 and "▍" in steps[0] and "▍" not in steps[-1]
    assert steps[-1].count('<div class="fs-column">') == 4
    assert "ranks of two activations cannot be stacked" in steps[-1]
    (error,) = page.answer("a steered model", False, "everywhere", True, 3, 0.0, 1.0, 0.5)
    assert "positions has &#x27;everywhere&#x27;" in error


def test_page_exports_an_adapter_only_below_its_directory(page):
    assert "patch_model" in page.save("a", "found", "generated", 0.25, 1.0)
    config = patch_model(build(), page.out / "found").steering.config()
    assert (config.scale, config.positions) == (0.25, "generated")
    assert page.save("a", "found", OWN, 1.0, 1.0).startswith("not saved: ")
    assert "is there already" in page.save("a", "found", OWN, 1.0, 1.0)
    assert "expected letters" in page.save("a", "../found", OWN, 1.0, 1.0)
    assert "two activations" in page.save(TOGETHER, "sum", OWN, 1.0, 1.0)
    assert "no column 'b' now; expected one of base, a" in page.save("b", "b", OWN, 1.0, 0.0)
    assert [path.name for path in page.out.iterdir()] == ["found"]


def test_page_makes_a_request_body(page):
    body = json.loads(page.body("a", "Hi", True, "generated", 8, 0.5, 0.25, 1.0))
    assert body.pop("vllm_xargs") == {"steering": '{"scale": 0.25, "positions": "generated"}'}
    messages = [{"role": "user", "content": "Hi"}]
    assert body == {"model": "a", "messages": messages, "max_tokens": 8, "temperature": 0.5}


# ------------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def no_model(monkeypatch):
    """Fail if the command loads a model, and let it pass for one with Gradio."""

    def load(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(playground, "load_model", load)
    monkeypatch.setattr(playground, "check_gradio", lambda: None)


def test_playground_refuses_a_port_in_use(no_model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_refused(invoke("playground", "--adapter", "a=x", "--port", port), f"port {port} of 127.0.0.1", "--port")
    assert_refused(invoke("playground", "--adapter", "a=x", "--port", 70000), "port is 70000; expected 1 to 65535")


@pytest.mark.parametrize(
    "adapters, parts",
    [
        ([], ["no adapter is given", "--adapter polite=DIR"]),
        (["base=x"], ["adapter name is 'base', the title of another column"]),
        (["a b=x"], ["adapter name is 'a b'"]),
        (["a=x", "A=y"], ["'A'"]),
        (["a=missing"], ["missing"]),
    ],
)
def test_playground_refuses_bad_adapters_before_a_model_is_loaded(no_model, adapters, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [word for given in adapters for word in ("--adapter", given)]
    assert_refused(invoke("playground", *options, "--port", free_port()), *parts)


def test_playground_refuses_an_adapter_of_another_model_before_one_is_loaded(no_model, tmp_path):
    patch_model(build(hidden_size=64), SteerConfig(rank=2)).steering.save(tmp_path / "wide")
    result = invoke(
        "playground",
        save_tiny(tmp_path / "m"),
        "--adapter",
        tmp_path / "wide",
        "--port",
        free_port(),
        "--device",
        "cpu",
    )
    assert_refused(result, "hidden size 64; expected 32")


def test_playground_without_gradio_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert_refused(invoke("playground", "--adapter", "a=x"), "needs Gradio", "pip install 'fused-steer[playground]'")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
