"""Prompts: read from text and JSON lines, encoded, and refused."""

import contextlib
import json

import pytest
import torch
from models import build, refused

from fused_steer.tools.prompts import encode, read_prompts, refuse_long_texts, room_of

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class Letters:
    """A tokenizer: a letter is a token; of a chat, `<`, the contents, and `>` where the assistant is to answer."""

    chat_template = "there is one"

    def __call__(self, prompt):
        return {"input_ids": list(map(ord, prompt))}

    def apply_chat_template(self, messages, add_generation_prompt, return_dict):
        text = "<" + "".join(message["content"] for message in messages) + ">" * add_generation_prompt
        return self(text) if return_dict else None


def test_prompts_are_cut_and_padded_on_the_right():
    batches = encode(Letters(), ["abcdef", "", "g"], 4, 2)
    assert [batch["input_ids"].tolist() for batch in batches] == [[[97, 98, 99, 100], [0] * 4], [[103]]]
    assert [batch["attention_mask"].tolist() for batch in batches] == [[[1] * 4, [0] * 4], [[1]]]


def test_prompts_of_chats_end_where_the_assistant_answers():
    batches = encode(Letters(), [CHAT[:1], CHAT], 9, 1)
    said = ["".join(map(chr, batch["input_ids"][0].tolist())) for batch in batches]
    assert said == ["<a>", "<ab"]
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        encode(type("Plain", (Letters,), {"chat_template": None})(), [CHAT], 9, 1)


def test_prompts_that_a_chat_template_refuses():
    class TemplateError(Exception):  # jinja2's is of no other type
        pass

    class Refusing(Letters):
        def apply_chat_template(self, *_, **__):
            raise TemplateError("System role not supported")

    with pytest.raises(ValueError, match=r"chat template fails on \[.*\] \(System role not supported\); expected"):
        encode(Refusing(), [CHAT], 9, 1)


def test_prompts_that_are_no_unicode():
    with pytest.raises(ValueError, match="a text has half of a surrogate pair, .*; expected one that UTF-8 can hold"):
        encode(Letters(), ["a", "b\ud800"], 9, 1)


def test_prompts_keep_their_blanks(tmp_path):
    (tmp_path / "p.txt").write_bytes("  a b \r\n\u2028c\n".encode())
    assert read_prompts(tmp_path / "p.txt") == ["  a b ", "\u2028c"]


def test_prompts_of_json_lines_by_their_field(tmp_path):
    lines = [{"text": "t", "prompt": "p"}, {"text": "t"}, {"messages": CHAT}]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    assert read_prompts(file) == ["p", "t", CHAT]
    file.write_text(json.dumps(lines[0]))
    assert read_prompts(file, "text") == ["t"]
    (tmp_path / "p.txt").write_text("a")
    with pytest.raises(ValueError, match="field is 'text' and prompts are in .*p.txt, which has no fields"):
        read_prompts(tmp_path / "p.txt", "text")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", None, "no file .*p.txt; expected prompts"),
        ("p.csv", b"a", "expected a .txt, one a line, or a .jsonl"),
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.txt", b"\xff\xfe", "is no UTF-8 text"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt"', "line 2 is no JSON"),
        ("p.jsonl", b"[1]", "line 1 has a list; expected a field 'prompt' or 'text' or 'messages'"),
        ("p.jsonl", b'{"question": "a"}', "line 1 has the fields question"),
        ("p.jsonl", b'{"prompt": 3}', "line 1: 'prompt' is 3; expected a string, or a list of messages"),
        ("p.jsonl", b'{"messages": ["a"]}', "'messages' is .'a'.; expected a string"),
    ],
)
def test_prompts_refusals(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize(("family", "room"), [("gpt2", 64), ("llama", None)])
@pytest.mark.parametrize("peft", [False, True])
def test_texts_beyond_a_models_learned_positions_are_refused(family, room, peft):
    model = refuse_long_texts(build(family))
    if peft:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    assert room_of(model) == room
    ids = torch.ones(1, 65, dtype=torch.long)
    model(ids[:, 1:], attention_mask=ids[:, 1:])
    with contextlib.nullcontext() if room is None else refused(ValueError, "a text has 65 tokens; expected at most 64"):
        model(input_ids=ids)
    first = model(ids[:, :60], use_cache=True)
    with contextlib.nullcontext() if room is None else refused(ValueError, "a text has 65 tokens; expected at most 64"):
        model(ids[:, 60:], attention_mask=ids, past_key_values=first.past_key_values)
    with contextlib.nullcontext() if room is None else refused(ValueError, "a text has 65 tokens; expected at most 64"):
        model.generate(input_ids=ids[:, 2:], attention_mask=ids[:, 2:], max_new_tokens=4, do_sample=False)
