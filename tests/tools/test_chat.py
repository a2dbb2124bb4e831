"""Tests of the chat: answers are those of `generate`, commands change the steering, and nothing else changes."""

from __future__ import annotations

import shutil
from threading import Event, Thread, Timer
from types import SimpleNamespace

import pytest
import torch
from command import assert_refused, invoke, plain_output  # noqa: F401 - an autouse fixture
from models import build, logits, randomize, refused
from text import save_tiny, tokenizer
from typer.testing import CliRunner

from fused_steer import SteerConfig, patch_model
from fused_steer.cli import app
from fused_steer.cli.shared import new_console
from fused_steer.tools.chat import HELP, Chat
from fused_steer.tools.chat_terminal import talk as talk_to

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + '-' + m['content'] + '!' }}{% endfor %}"
    "{% if add_generation_prompt %}a-{% endif %}"
)


def chat(template: bool = True, **options) -> Chat:
    model = patch_model(build(eos_token_id=1), SteerConfig(rank=4), adapter_name="low")
    model.steering.add("vec", SteerConfig(form="vector", scale=2.0))
    for seed, name in enumerate(("low", "vec")):
        randomize(model, name, seed)
    encoder = tokenizer()
    if template:
        encoder.chat_template = TEMPLATE
    return Chat(model, encoder, "low", new_tokens=8, **options)


def alone(name, text, scale=None, positions=None, new_tokens=8) -> str:
    """Return the answer by `generate` of a model with one adapter in use, or none."""
    other = chat().model
    with other.steering.batch([name], scale=scale, positions=positions):
        ids = torch.tensor([tokenizer()(text)["input_ids"]])
        found = other.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    row = found[0, ids.shape[1] :].tolist()
    return tokenizer().decode(row[: row.index(1)] if 1 in row else row, skip_special_tokens=True)


def last(chat: Chat, text: str) -> list[str]:
    *_, said = chat.answer(text)
    return said


def test_chat_ends_at_the_positions_of_the_model():
    model = patch_model(build("gpt2"), SteerConfig(rank=4), adapter_name="low")
    talk = Chat(model, tokenizer(), "low", new_tokens=200)
    assert len(last(talk, "a" * 60)[0].split()) <= 4
    with refused(ValueError, "tokens; expected fewer than 64, the positions of the model (/reset forgets it)"):
        last(talk, "a" * 60)
    talk.command("/reset")
    last(talk, "a" * 63)


def test_chat_answers_are_those_of_generate():
    talk = chat()
    assert last(talk, "hi") == [alone("low", "u-hi!a-")]
    talk.command("/adapter vec")
    talk.command("/reset")
    assert last(talk, "hi") == [alone("vec", "u-hi!a-")]
    talk.command("/scale -1.5")
    talk.command("/reset")
    assert last(talk, "hi") == [alone("vec", "u-hi!a-", scale=-1.5)]
    talk.command("/positions prompt")
    talk.command("/reset")
    assert last(talk, "hi") == [alone("vec", "u-hi!a-", scale=-1.5, positions="prompt")]
    talk.command("/off")
    talk.command("/reset")
    assert last(talk, "hi") == [alone(None, "u-hi!a-")]


def test_chat_base_and_steered_side_by_side_from_one_batch():
    talk, rows = chat(both=True), []
    talk.model.model.register_forward_pre_hook(
        lambda _, args, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    assert talk.columns == ["base", "low"]
    said = last(talk, "hi")
    assert set(rows) == {2}
    assert said == [alone(None, "u-hi!a-"), alone("low", "u-hi!a-")] and said[0] != said[1]
    assert talk.messages[-1] == {"role": "assistant", "content": said[1]}
    talk.command("/one")
    assert talk.columns == ["low"]


def test_chat_goes_on_from_the_conversation():
    talk = chat()
    [first] = last(talk, "hi")
    assert last(talk, "ok") == [alone("low", f"u-hi!a-{first}!u-ok!a-")]
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    talk.command("/reset")
    assert last(talk, "hi") == [first]
    plain = chat(template=False)
    [first] = last(plain, "hi")
    assert first == alone("low", "hi") and last(plain, "ok") == [alone("low", f"hi{first}ok")]


def test_chat_streams_and_can_be_stopped():
    talk = chat()
    talk.new_tokens = 40
    whole = list(talk.answer("hi"))
    assert len(whole) > 1 and all(now[0].startswith(before[0]) for before, now in zip(whole, whole[1:], strict=False))
    talk.command("/reset")
    answer = talk.answer("hi")
    next(answer)
    answer.close()  # as Ctrl-C does
    assert talk.messages == []
    before = logits(talk.model)
    assert last(talk, "hi") == whole[-1] and torch.equal(logits(talk.model), before)


def test_chat_answers_after_an_answer_that_was_stopped_twice(monkeypatch):
    """The second Ctrl-C ended the wait for the generating thread, and the next message was refused meanwhile."""
    talk, gate = chat(), Event()
    first = last(talk, "hi")
    talk.command("/reset")
    passes = []

    def wait(*_):
        passes.append(None)
        if len(passes) > 1:
            gate.wait(20)

    def join(thread):
        raise KeyboardInterrupt

    hook = talk.model.model.layers[0].register_forward_pre_hook(wait)
    with monkeypatch.context() as patch:
        answer = talk.answer("hi")
        next(answer)
        patch.setattr(Thread, "join", join)
        with pytest.raises(KeyboardInterrupt):
            answer.close()
    assert talk.messages == []
    release = Timer(0.2, gate.set)
    release.start()
    assert last(talk, "hi") == first
    release.join()
    hook.remove()


def test_chat_errors_of_the_model_reach_the_caller(monkeypatch):
    talk = chat()

    def broken(*_, **__):
        raise RuntimeError("no memory")

    monkeypatch.setattr(type(talk.model), "forward", broken)
    with refused(RuntimeError, "no memory"):
        last(talk, "hi")
    assert talk.messages == []


def test_chat_goes_on_after_an_answer_that_fails(capsys):
    """Logits that are infinite or NaN, too little memory, or a template that refuses a message ended the chat."""
    talk = chat(temperature=1.0)
    talk.tokenizer.chat_template = "{{ raise_exception('no x') if 'x' in messages[-1]['content'] else 'a' }}"
    lines = ["hi", "/scale 1e38", "ho", "x", "/scale own", "ha"]
    talk_to(talk, iter(lines), new_console())
    found = capsys.readouterr().out.splitlines()
    assert len(found) == 1 + len(lines) and "probability tensor contains either" in found[3]
    assert found[4].startswith("the tokenizer's chat template fails on [{'role': 'user', 'content': 'hi'}, ")
    assert found[4].endswith(" (no x); expected messages that it takes")
    assert [message["content"] for message in talk.messages[::2]] == ["hi", "ha"]


def test_chat_commands_that_are_refused_change_nothing():
    talk = chat()
    state = talk.state()
    for line, part in (
        ("/adapter none", "no adapter 'none'; expected one of low, vec"),
        ("/scale much", "/scale is 'much'; expected a number, or own"),
        ("/scale nan", "/scale is 'nan'"),
        ("/positions somewhere", "somewhere"),
        ("/scale", "/scale has 0 arguments; expected 1"),
        ("/off now", "/off has 1 arguments; expected 0"),
        ("/dance", "there is no /dance; expected one of /adapter"),
        ("/", "there is no /; expected one of /adapter"),
        ("/scale 'a", "cannot be read"),
    ):
        with refused(ValueError, part):
            talk.command(line)
        assert talk.state() == state
    with refused(ValueError, "the message is empty"):
        last(talk, " ")
    assert talk.command("/help") == HELP
    assert "vec, strength 2, at all tokens" in talk.command("/adapter vec")
    assert "strength 0.5" in talk.command("/scale 0.5") and "strength 2" in talk.command("/scale own")
    assert "beside the base" in talk.command("/both") and "steering: off" in talk.command("/off")


def test_chat_command_answers_lines(tmp_path):
    save_tiny(tmp_path / "base")
    for name, config in (("one", SteerConfig(rank=4)), ("two", SteerConfig("vector"))):
        model = patch_model(build(), config)
        randomize(model)
        model.steering.save(tmp_path / name)
    lines = "hi\n\n/scale 3\n/dance\n/both\nhi\n/quit\nhi\n"
    arguments = ["chat", tmp_path / "one", f"b={tmp_path / 'two'}", "--model", tmp_path / "base", "--device", "cpu"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--new-tokens", "4"], input=lines)
    assert result.exit_code == 0, result.output
    shown = [line.partition(":")[0] for line in result.stdout.splitlines() if ":" in line]
    assert shown == ["steering", "one", "steering", "steering", "base", "one"]
    assert "adapters: one, b" in result.stdout and "there is no /dance" in result.stdout


def test_chat_command_goes_on_after_a_line_that_is_no_text(tmp_path):
    """The decoder's or the tokenizer's error ended the chat."""
    save_tiny(tmp_path / "base")
    patch_model(build(), SteerConfig(rank=4)).steering.save(tmp_path / "one")
    arguments = ["chat", tmp_path / "one", "--model", tmp_path / "base", "--device", "cpu", "--new-tokens", "2"]
    result = CliRunner().invoke(app, list(map(str, arguments)), input=b"hi \xe9\nho\n")
    assert result.exit_code == 0, result.output
    _, refusal, answer = result.stdout.splitlines()
    assert refusal == "the message has bytes that are no text, 'hi \\udce9'; expected the input's encoding"
    assert answer.startswith("one: ")


def test_chat_command_refusals(tmp_path, monkeypatch):
    save_tiny(tmp_path / "base")
    patch_model(build(), SteerConfig(rank=4)).steering.save(tmp_path / "one")
    one = tmp_path / "one"

    def refuses(*parts, given=(one,)):
        assert_refused(invoke("chat", *given, "--model", tmp_path / "base"), *parts)

    refuses("no adapter directory", given=(tmp_path / "none",))
    refuses("there are two adapters 'one'", given=(one, one))
    refuses("an adapter has the name 'base', that of the base model; expected another", given=(f"base={one}",))
    refuses("there is an adapter 'one' already, and 'ONE' differs only in letter case", given=(one, f"ONE={one}"))
    config = tmp_path / "broken" / "config.json"
    config.parent.mkdir()
    config.write_text("{")
    broken = (f"{config} cannot be loaded: it is no JSON", "expected a JSON object")
    assert_refused(invoke("chat", one, "--model", config.parent), *broken)
    for file, content in (("tokenizer.json", "{}"), ("model.safetensors", "cut"), ("tokenizer_config.json", "{")):
        copy = shutil.copytree(tmp_path / "base", tmp_path / file / "base")
        (copy / file).write_text(content)
        part = f"the {'model' if 'model' in file else 'tokenizer'} in {copy} cannot be loaded"
        assert_refused(invoke("chat", one, "--model", copy), part, "expected whole files")
    refuses("new tokens is 0", given=(one, "--new-tokens", 0))
    refuses("temperature is -1.0", given=(one, "--temperature", -1))
    for option in ("temperature", "scale"):
        for value in ("nan", "inf"):
            refuses(f"{option} is {value}; expected a finite number", given=(one, f"--{option}", value))
    terminal = SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("fused_steer.tools.chat_terminal.sys", terminal)
    monkeypatch.setattr("fused_steer.tools.chat_terminal.find_spec", lambda name: None)
    refuses("pip install 'fused-steer[chat]'")


def test_chat_samples_at_a_temperature():
    talk = chat(temperature=5.0)
    found = set()
    for _ in range(4):
        talk.messages.clear()
        found.add(last(talk, "hi")[0])
    assert len(found) > 1
    with pytest.raises(ValueError):
        talk.command("/temperature")
