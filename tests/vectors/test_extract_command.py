"""Tests of `fused-steer extract` and of its files of pairs, end to end on a tiny model."""

import json

import pytest
import torch
from command import assert_refused, invoke, plain_output  # noqa: F401 (a fixture)
from models import LAYERS, build, logits
from text import save_tiny, tokenizer
from transformers import AutoModelForCausalLM

from fused_steer import SteerConfig, patch_model
from fused_steer.tools.prompts import encode
from fused_steer.vectors import extract, sweep
from fused_steer.vectors.pairs import read_pairs, read_sets

PAIRS = [("what a good day", "what a bad day"), ("i am glad", "i am sad"), ("yes, please", "no!"), ("ok", "not ok")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extract")
    save_tiny(folder / "base")
    lines = [json.dumps({"positive": positive, "negative": negative}) for positive, negative in PAIRS]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    for side, name in enumerate(("good", "bad")):
        (folder / f"{name}.txt").write_text("\n".join(pair[side] for pair in PAIRS))
    return folder


def run(folder, out, *more):
    return invoke("extract", "--model", folder / "base", "--out", out, "--device", "cpu", *more)


def expected(**options):
    sides = [encode(tokenizer(), list(side), 512, 8) for side in zip(*PAIRS, strict=True)]
    return extract(build(), *sides, **options), sides


def test_extract_command_writes_an_adapter_a_picture_and_figures(folder, tmp_path):
    more = ("--layers", "0,2", "--scale", "0.5", "--held-out", "0.25", "--doses", "0,1", "--say", "i am")
    result = run(folder, tmp_path / "v", folder / "pairs.jsonl", *more)
    assert result.exit_code == 0, result.output
    found, sides = expected(layers=[0, 2], scale=0.5, held_out=0.25)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = patch_model(base, tmp_path / "v")
    assert model.steering.config() == SteerConfig("vector", layers=[0, 2], scale=0.5)
    other = patch_model(build())
    other.steering.add_vector("v", found.vectors, scale=0.5)
    other.steering.use("v")
    assert torch.equal(logits(model), logits(other))
    figures = json.loads((tmp_path / "v" / "extraction.json").read_text())
    assert figures["layers"] == found.as_dict()["layers"] and len(figures["layers"]) == LAYERS
    doses = sweep(build(), found.vectors, *sides, [*sides[0], *sides[1]], [0, 1])
    assert [row["perplexity"] for row in figures["doses"]] == [dose.perplexity for dose in doses]
    assert len(figures["continuations"]) == 2
    assert (tmp_path / "v" / "extraction.png").read_bytes()[:4] == b"\x89PNG"
    assert "3 positive and 3 negative texts" in result.stdout and "the 1 + 1 texts held out" in result.stdout
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    assert [row[0] for row in rows] == ["0", "1", "2", "0", "1"]
    assert [row[5] for row in rows[:LAYERS]] == ["yes", "", "yes"]
    assert rows[1][1] == f"{found.layers[1].norm:.4g}" and rows[3][2] == f"{doses[0].perplexity:.4g}"
    assert "at 1      i am" in result.stdout


def test_extract_command_of_two_sets_as_json(folder, tmp_path):
    sets = ("--positive", folder / "good.txt", "--negative", folder / "bad.txt")
    result = run(folder, tmp_path, *sets, "--json", "--token", "mean", "--normalise", "--doses", "", "--held-out", 0)
    assert result.exit_code == 0, result.output
    found, _ = expected(token="mean", normalise=True, paired=False)
    shown = json.loads(result.stdout)
    assert shown["layers"] == found.as_dict()["layers"] and shown["doses"] == [] and shown["normalise"] is True
    adapter = patch_model(build(), tmp_path, check_base=False).steering.files(None)["default"]
    assert all(torch.equal(adapter.tensors[p]["steer_up.bias"], found.vectors[p.layer]) for p in adapter.tensors)


def test_extract_command_tries_each_layer_and_other_texts(folder, tmp_path):
    (tmp_path / "texts.txt").write_text("the sun\nthe sea")
    more = ("--each-layer", "--doses", "0,2", "--method", "pca", "--texts", tmp_path / "texts.txt", "--json")
    result = run(folder, tmp_path / "v", folder / "pairs.jsonl", *more)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["doses"]
    assert [(row["layers"], row["dose"]) for row in rows] == [([i], d) for i in range(LAYERS) for d in (0.0, 2.0)]
    assert len({row["perplexity"] for row in rows if row["dose"] == 0}) == 1


def test_extract_command_pairs_of_every_form(tmp_path):
    chat = [{"role": "user", "content": "how are you?"}]
    lines = [
        {"positive": "a", "negative": "b"},
        {"prompt": "I am ", "positive": "glad", "negative": "sad"},
        {"prompt": chat, "positive": "fine", "negative": "bad"},
        {"positive": [*chat, {"role": "assistant", "content": "x"}], "negative": chat, "label": 3},
    ]
    (tmp_path / "pairs.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    found = read_pairs(tmp_path / "pairs.jsonl")
    answer = {"role": "assistant", "content": "fine"}
    assert found.positive == ["a", "I am glad", [*chat, answer], lines[3]["positive"]]
    assert found.negative == ["b", "I am sad", [*chat, answer | {"content": "bad"}], chat] and found.paired
    (tmp_path / "one.txt").write_text("a\nb\n")
    sets = read_sets(*2 * [tmp_path / "one.txt"])
    assert (sets.positive, sets.negative, sets.paired) == (["a", "b"], ["a", "b"], False)


def test_extract_command_reads_the_answers_own_last_token():
    """With `whole`, a chat ends with the answer's last token, not with the template's closing ones."""
    encoder = tokenizer()
    encoder.chat_template = (
        "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '!' }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    whole, cut = (encode(encoder, [chat], 64, 1, whole=whole)[0]["input_ids"][0] for whole in (True, False))
    assert encoder.decode(whole).replace(" ", "").endswith("yes") and encoder.decode(cut).replace(" ", "").endswith(
        "yes!"
    )


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ('{"positive": "a"}', ("line 2 has 'positive'; expected a field 'negative'",)),
        ('{"negativ": "a", "positive": "b"}', ("line 2 has 'negativ', 'positive'; expected a field 'negative'",)),
        ("[1]", ("line 2 has a list",)),
        ("{", ("line 2 is no JSON",)),
        ('{"positive": 3, "negative": "b"}', ("line 2: 'positive' is 3; expected a text",)),
        ('{"positive": "", "negative": "b"}', ("line 2: 'positive' is ''; expected a text that is not empty",)),
        ('{"positive": "b", "negative": "b"}', ("line 2: positive and negative are the same",)),
        ('{"positive": [{"role": "user"}], "negative": "b"}', ("line 2: 'positive' is [{'role'",)),
        (
            '{"prompt": "x", "positive": [{"role": "user", "content": ""}], "negative": "b"}',
            ("after a prompt that is",),
        ),
    ],
)
def test_extract_command_refuses_a_pair(folder, tmp_path, line, parts):
    (tmp_path / "pairs.jsonl").write_text('{"positive": "a", "negative": "b"}\n' + line)
    # The model does not exist: pairs are refused first.
    result = invoke("extract", tmp_path / "pairs.jsonl", "--model", tmp_path / "none", "--out", tmp_path / "v")
    assert_refused(result, *parts)
    assert not (tmp_path / "v").exists()


def test_extract_command_refusals(folder, tmp_path):
    out, pairs = tmp_path / "v", folder / "pairs.jsonl"
    (tmp_path / "empty.jsonl").write_text("\n")
    good = ("--positive", folder / "good.txt")

    def refuses(*parts, given=(pairs,)):
        assert_refused(run(folder, out, *given), *parts)
        assert not out.exists()

    refuses("PAIRS or --positive and --negative have to be given, and none is", given=())
    refuses("and all are", given=(pairs, *good))
    refuses("--negative is not given", given=good)
    refuses("no file", given=(tmp_path / "none.jsonl",))
    refuses("expected a .jsonl", given=(folder / "good.txt",))
    refuses("holds no pair", given=(tmp_path / "empty.jsonl",))
    refuses("method is 'pca' for two sets", given=(*good, "--negative", folder / "bad.txt", "--method", "pca"))
    refuses("method is 'best'", given=(pairs, "--method", "best"))
    refuses("token is 'first'", given=(pairs, "--token", "first"))
    refuses(f"layers has {LAYERS}", given=(pairs, "--layers", LAYERS))
    refuses("layers is 'all' (--layers)", given=(pairs, "--layers", "all"))
    refuses("--doses is '1;2'", given=(pairs, "--doses", "1;2"))
    refuses("a dose is inf", given=(pairs, "--doses", "inf"))
    refuses("held out is 1.0", given=(pairs, "--held-out", 1))
    refuses("batch size is 0", given=(pairs, "--batch-size", 0))
    refuses("a text has 15 tokens", "expected 1 to 14", given=(pairs, "--max-length", 14))
    for option in (("--say", "we"), ("--texts", folder / "good.txt"), ("--each-layer",)):
        refuses(f"{option[0]} is given and --doses is empty", given=(pairs, "--doses", "", *option))
    refuses("say is empty", given=(pairs, "--say", " "))
    refuses("is a file", given=(pairs, "--out", pairs))
