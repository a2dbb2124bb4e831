"""Tests of recipes: what YAML is accepted, what is refused before anything is loaded, and the forms of rows."""

from __future__ import annotations

import json

import pytest
import yaml
from models import refused

from fused_steer import SteerConfig
from fused_steer.evaluation.on_paper import load_documents
from fused_steer.paper.tasks import TASKS
from fused_steer.recipes import Recipe, read_recipe
from fused_steer.recipes.recipe import SHIPPED, Data, shipped
from fused_steer.recipes.rows import read_rows, text_of

LEAST = {"model": "base", "out": "here", "data": {"train": "rows.jsonl"}}


@pytest.fixture
def recipe(tmp_path):
    def write(fields, *changes) -> Recipe:
        (tmp_path / "recipe.yaml").write_text(fields if isinstance(fields, str) else yaml.safe_dump(fields))
        return read_recipe(tmp_path / "recipe.yaml", changes)

    return write


def test_recipe_defaults_are_the_papers_set_up(recipe):
    found = recipe(LEAST)
    assert found.steer_config() == SteerConfig(rank=8, activation="identity")
    assert (found.schedule, found.rates) == (("constant", 0.0), (2e-3, 2e-3))
    t = found.training
    assert (t.batch_size, t.epochs, t.weight_decay, t.max_grad_norm) == (8, 1.0, 0.0, 1.0)
    joint = recipe({**LEAST, "method": {"kind": "joint-orth"}})
    assert joint.steer_config() == SteerConfig(rank=8, activation="identity", orthogonal_to="lora")
    assert joint.schedule == ("cosine", 0.06) and joint.rates[0] == joint.rates[1]
    lora = recipe({**LEAST, "method": {"kind": "lora"}})
    assert lora.steer_config() is None and lora.schedule == ("cosine", 0.06)


def test_recipe_of_any_site_and_form(recipe):
    for fields in (
        {"form": "vector", "layers": [1, 2], "site": "post_mlp"},
        {"form": "loreft", "rank": 4, "positions": "first_2+last_2"},
        {"rank": 2, "activation": "tanh", "site": ["pre_mlp", "post_attention"], "up_bias": True},
    ):
        assert recipe({**LEAST, "method": {"steering": fields}}).steer_config() == SteerConfig(**fields)


def test_recipe_numbers_as_people_write_them(recipe):
    text = "model: m\nout: o\ndata: {train: x}\ntraining: {learning_rate: 2e-3, warmup: 0, epochs: 3}\n"
    found = recipe(text, "training.max_steps=20", "method.steering.rank=4", "data.columns={prompt: question}")
    assert found.training.learning_rate == 0.002 and found.training.epochs == 3.0 and found.training.warmup == 0
    assert found.training.max_steps == 20 and found.steer_config().rank == 4
    assert found.data.columns == {"prompt": "question"}
    assert recipe(yaml.safe_dump(found.to_dict())) == found  # a recipe is written as it is read


def test_recipe_null_takes_a_key_out(recipe):
    """So each shipped recipe becomes its LoRA baseline, at the default rate of a LoRA."""
    changes = ("method.kind=lora", "method.steering=null", "training.learning_rate=null", "model=null")
    for name in shipped():
        found = read_recipe(name, changes)
        assert found.steer_config() is None and found.model is None
        assert (found.rates[0], found.schedule) == (2e-4, ("cosine", 0.06))
    given = {**LEAST, "method": {"steering": {"rank": 2, "activation": "silu"}}, "training": None}
    found = recipe(given, "method.steering.activation=null", "training.epochs=null", "method.lora=null")
    assert found.steer_config() == SteerConfig(rank=2, activation="identity")
    assert found == recipe({**LEAST, "method": {"steering": {"rank": 2, "activation": None}}})
    with refused(ValueError, "unknown key method.steering.rnak; expected method.steering.rank"):
        recipe(LEAST, "method.steering.rnak=null")
    with refused(ValueError, "unknown key training.epoch; expected training.epochs"):
        recipe(LEAST, "training.epoch=null")
    with refused(ValueError, "the recipe has no data.train"):
        recipe(LEAST, "data.train=null")


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"modle": "x"}, ("unknown key modle; expected model (the nearest of data, out, model",)),
        ({"training": {"learning_rte": 1}}, ("unknown key training.learning_rte; expected training.learning_rate",)),
        ({"training": {"zzz": 1}}, ("unknown key training.zzz; expected learning_rate, lora",)),
        ({"data": {"train": "x", "colums": {}}}, ("unknown key data.colums; expected data.columns",)),
        ({"method": {"steering": {"rnak": 3}}}, ("unknown key method.steering.rnak; expected method.steering.rank",)),
        ({"method": {"lora": {"aplha": 3}}}, ("unknown key method.lora.aplha; expected method.lora.alpha",)),
        ({"data": {}}, ("the recipe has no data.train; expected one",)),
        ({"data": {"task": "gsm8k"}}, ("data.task is 'gsm8k'; expected one task, such as paper:gsm8k",)),
        ({"data": {"task": "paper"}}, ("data.task is 'paper'; expected one task",)),
        ({"data": {"task": "paper:gsm"}}, ("the task is 'paper:gsm'", "did you mean paper:gsm8k?")),
        ({"data": {"task": "paper:arc", "held_out": 0.1}}, ("data.held_out is given with data.task",)),
        ({"data": {"task": "paper:arc", "template": {"prompt": "x"}}}, ("data.template is given with data.task",)),
        ({"data": {"train": "x", "chat": True}}, ("data.chat is given without data.task",)),
        (
            {"data": {"task": "paper:arc", "chat": True, "end_of_text": False}},
            ("data.end_of_text is given with data.chat",),
        ),
        ({"out": None}, ("the recipe has no out; expected one",)),
        ({"method": {"kind": "full"}}, ("method.kind is 'full'; expected one of steering, lora, joint",)),
        ({"method": {"steering": {"rank": 999}}}, ("method.steering: rank is 999; expected 1 to 256",)),
        ({"method": {"kind": "lora", "steering": {"rank": 1}}}, ("with kind 'lora'", "method.steering=null")),
        (
            {"method": {"steering": {"orthogonal_to": "lora"}}},
            ("orthogonal_to has kind 'steering'; expected kind",),
        ),
        ({"training": {"batch_size": 0}}, ("training.batch_size is 0; expected at least 1",)),
        ({"training": {"learning_rate": -1}}, ("training.learning_rate is -1.0; expected more than 0",)),
        ({"training": {"lora_learning_rate": 1}}, ("lora_learning_rate is given with kind 'steering'",)),
        ({"training": {"warmup": 1}}, ("training.warmup is 1.0; expected a share",)),
        ({"data": {"train": "x", "held_out": 1}}, ("data.held_out is 1.0; expected a share",)),
        ({"data": {"train": "x", "eval": "y", "held_out": 0.1}}, ("data.held_out is given with data.eval",)),
        ({"data": {"train": "x", "eval_split": "test"}}, ("data.eval_split is given without data.eval",)),
        ({"method": {"lora": {"rank": 2}}}, ("method.lora is given with kind 'steering'", "method.lora=null")),
        ({"training": {"weight_decay": -0.1}}, ("training.weight_decay is -0.1; expected 0 or more",)),
        ({"training": {"seed": -1}}, ("training.seed is -1; expected 0 to",)),
    ],
)
def test_recipe_refusals(recipe, fields, parts):
    with refused(ValueError, *parts):
        recipe({**LEAST, **fields})


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"training": {"batch_size": "many"}}, "training.batch_size is 'many'; expected an integer"),
        ({"training": {"batch_size": True}}, "training.batch_size is True; expected an integer"),
        ({"training": {"learning_rate": "fast"}}, "training.learning_rate is 'fast'; expected a number"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate is nan; expected a number"),
        ({"training": {"gradient_checkpointing": 1}}, "training.gradient_checkpointing is 1; expected true or false"),
        ({"training": [1]}, "training is [1]; expected the keys"),
        ({"data": "rows.jsonl"}, "data is 'rows.jsonl'; expected the keys train, task"),
        ({"model": 3}, "model is 3; expected a text"),
    ],
)
def test_recipe_refuses_values_of_another_type(recipe, fields, part):
    with refused(TypeError, part):
        recipe({**LEAST, **fields})


def test_recipe_refuses_files(recipe, tmp_path):
    with refused(FileNotFoundError, "no file none; expected a recipe", "smollm2"):
        read_recipe("none")
    with refused(ValueError, "is no YAML"):
        recipe("a: [")
    with refused(ValueError, "--set model=[ is no YAML"):
        recipe(LEAST, "model=[")
    with refused(ValueError, "has 'out' twice (line 2); expected each key once"):
        recipe("out: a\nout: b")
    with refused(ValueError, "has 'rank' twice (line 3); expected each key once"):
        recipe("out: a\nmethod: {steering: {rank: 1,\n rank: 2}}")
    with refused(ValueError, "--set training={seed: 1, seed: 2} has 'seed' twice"):
        recipe(LEAST, "training={seed: 1, seed: 2}")
    with refused(ValueError, "holds a list; expected the keys data, out"):
        recipe("- 1")
    with refused(ValueError, "--set is 'training'; expected such as training.max_steps=20"):
        recipe(LEAST, "training")
    with refused(ValueError, "--set is 'model='; expected such as training.max_steps=20, or KEY=null"):
        recipe(LEAST, "model=")
    with refused(ValueError, "but model holds no keys"):
        recipe(LEAST, "model.name=3")
    (tmp_path / "file").write_text("")
    with refused(ValueError, "a file; expected a directory"):
        recipe({**LEAST, "out": str(tmp_path / "file")})


def test_recipe_shipped_ones_are_read():
    models = {name: read_recipe(name).model for name in shipped()}
    assert set(models.values()) == {
        "meta-llama/Llama-3.2-1B",
        "google/gemma-3-1b-pt",
        "Qwen/Qwen3-4B",
        "meta-llama/Llama-3.1-8B",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    }
    for name in models:
        found, first = read_recipe(name), (SHIPPED / f"{name}.yaml").read_text().splitlines()[0]
        if name != "smollm2":
            assert found.data == Data(task="paper:gsm8k") and found.data.longest == TASKS["gsm8k"].max_length
            assert found.steer_config() == SteerConfig(rank=8, activation="identity") and found.training.epochs == 3
            assert found.training.batch_size * found.training.accumulate == 8 and found.schedule == ("constant", 0.0)
        assert first.startswith("# ") and len(first) > 40
    laptop = read_recipe("smollm2").data
    assert (laptop.train, laptop.max_rows, laptop.held_out) == ("rows.jsonl", 300, 0.1)  # as its comment says


# --------------------------------------------------------------------------------------------------------------- rows


def rows(tmp_path, given, name="rows.jsonl", **fields):
    text = json.dumps(given) if name.endswith(".json") else "\n".join(map(json.dumps, given))
    (tmp_path / name).write_text(text)
    return read_rows(Data(str(tmp_path / name), **{"held_out": 0.0, **fields}))


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def test_recipe_rows_of_every_kind(tmp_path):
    completion = {"prompt": "a", "completion": "b", "more": 1}
    assert rows(tmp_path, [completion]) == ("completion", [{"prompt": "a", "completion": "b"}], [])
    assert rows(tmp_path, [{"text": "a"}], "rows.json") == ("text", [{"text": "a"}], [])
    kind, [row], _ = rows(tmp_path, [{"messages": CHAT}])
    assert (kind, row) == ("messages", {"prompt": CHAT[:1], "completion": CHAT[1:]}) and text_of(row) == CHAT
    preference = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert rows(tmp_path, [preference])[:2] == ("preference", [preference]) and text_of(preference) == "ab"
    mixed = {"prompt": CHAT[:1], "chosen": "b", "rejected": CHAT[1:]}
    _, [row], _ = rows(tmp_path, [mixed])
    assert row == {**mixed, "chosen": [{"role": "assistant", "content": "b"}]}
    kind, found, _ = rows(tmp_path, [{"instruction": "Do {it}", "input": "x", "output": "y"}] * 2)
    assert kind == "alpaca" and found[0]["completion"] == "y"
    assert found[0]["prompt"].endswith("### Instruction:\nDo {it}\n\n### Input:\nx\n\n### Response:\n")
    _, [row], _ = rows(tmp_path, [{"instruction": "Do", "output": "y", "input": None}])
    assert "### Input" not in row["prompt"]


def test_recipe_rows_are_split_and_renamed(tmp_path):
    given = [{"question": str(i), "answer": "b"} for i in range(10)]
    columns = {"prompt": "question", "completion": "answer"}
    kind, train, held_out = rows(tmp_path, given, columns=columns, held_out=0.25, max_rows=8)
    assert kind == "completion" and [row["prompt"] for row in train + held_out] == list("01234567") and len(train) == 6
    (tmp_path / "eval.jsonl").write_text(json.dumps(given[9]))
    _, train, held_out = rows(tmp_path, given, columns=columns, eval=str(tmp_path / "eval.jsonl"))
    assert (len(train), [row["prompt"] for row in held_out]) == (10, ["9"])


GSM8K = [{"question": f"{i} and {i}?", "answer": f"{i} + {i} = {2 * i}\n#### {2 * i}"} for i in range(10)]


def test_recipe_rows_of_a_task_are_those_that_eval_tests(tmp_path):
    """The text of each row is the prompt and the completion of the task, and the splits are those of `eval --data`."""
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").write_text("\n".join(map(json.dumps, GSM8K)))
    kind, train, held_out = read_rows(Data(str(tmp_path), task="paper:gsm8k"))
    tested = load_documents(["gsm8k"], tmp_path)["gsm8k"]
    assert kind == "paper:gsm8k" and (len(train), len(held_out), len(tested)) == (6, 2, 2)
    task, texts = TASKS["gsm8k"], {text_of(row) for row in train + held_out}
    assert texts <= {task.prompt(row) + task.completion(row) for row in GSM8K}
    assert not texts & {example.prompt + example.completion for example in tested}
    assert "9 and 9?\n9 + 9 = 18\nAnswer: 18" in texts | {example.prompt + example.completion for example in tested}
    _, [row], _ = read_rows(Data(str(tmp_path), task="paper:gsm8k", chat=True, max_rows=1))
    assert [message["role"] for message in text_of(row)] == ["system", "user", "assistant"]
    assert text_of(row)[1]["content"] + text_of(row)[2]["content"] == text_of(train[0])
    with refused(FileNotFoundError, "data.train is rows.jsonl; expected a folder with gsm8k/train.jsonl, or none"):
        read_rows(Data("rows.jsonl", task="paper:gsm8k"))


def test_recipe_rows_by_a_template(tmp_path):
    columns = {"prompt": "question", "completion": "answer"}
    template = {"prompt": "{{question}}\n", "completion": "{{answer.split('####')[1].strip()}}."}
    kind, found, _ = rows(tmp_path, GSM8K, template=template)
    assert kind == "completion" and found[9] == {"prompt": "9 and 9?\n", "completion": "18."}
    _, found, held_out = rows(
        tmp_path, GSM8K, template={"prompt": "Q: {{question}}"}, columns={"completion": "answer"}, held_out=None,
        eval=str(tmp_path / "rows.jsonl"),
    )  # fmt: skip
    assert found[1] == held_out[1] == {"prompt": "Q: 1 and 1?", "completion": GSM8K[1]["answer"]}
    for fields, parts in (
        ({"template": {"prompt": "{{qustion}}"}}, ("data.template.prompt fails on row 1 of", "'qustion' is undefined")),
        ({"template": {"completion": "{{answer[0] + 1}}"}}, ("data.template.completion fails on row 1",)),
        ({"template": {"prompt": "{{question"}}, ("data.template.prompt fails on it (unexpected end",)),
        ({"template": {"prompt": 3}}, ("data.template.prompt is 3; expected a text",)),
        ({"template": template, "columns": columns}, ("data.columns and data.template both have completion",)),
        ({"template": {**template, "promt": "x"}}, ("data.template names 'promt'; expected prompt, completion",)),
    ):
        with refused(ValueError, *parts):
            rows(tmp_path, GSM8K, **fields)


@pytest.mark.parametrize(
    ("given", "fields", "parts"),
    [
        ([{"question": "a", "answer": "b"}], {}, ("has the columns question, answer; expected those of a kind",)),
        (
            [{"prompt": "a"}],
            {"kind": "completion"},
            ("row 1 of", "has the columns prompt; expected prompt, completion"),
        ),
        ([{"text": "a"}, {"txt": "b"}], {}, ("row 2 of", "has the columns txt; expected text")),
        ([{"prompt": "a", "completion": 3}], {}, ("row 1 of", "completion is 3; expected a text")),
        ([{"prompt": "a", "completion": ""}], {}, ("completion is ''",)),
        ([{"instruction": "a", "output": "b", "input": 5}], {}, ("row 1 of", "input is 5; expected a text")),
        ([{"text": "a"}, {"text": "\ud800"}], {}, ("row 2 of", "text is '\\ud800', half of a surrogate pair")),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": CHAT[:1], "completion": CHAT[1:]}],
            {},
            ("row 2 of", "is of messages; expected texts, as row 1"),
        ),
        ([{"text": "a"}], {"kind": "txt"}, ("data.kind is 'txt'; expected one of preference, completion",)),
        ([{"text": "a"}], {"columns": {"prompt": "q"}}, ("data.columns names 'prompt'; expected text, of kind text",)),
        ([{"messages": CHAT[:1]}], {}, ("expected a list that ends with the assistant's",)),
        ([["a"]], {}, ("row 1 of", "is a list; expected an object")),
        ([{"messages": CHAT}], {"end_of_text": False}, ("data.end_of_text is given with rows of kind messages",)),
        ([], {}, ("has no rows",)),
    ],
)
def test_recipe_refuses_rows(tmp_path, given, fields, parts):
    with refused(ValueError, *parts):
        rows(tmp_path, given, **fields)


def test_recipe_refuses_files_of_rows(tmp_path, monkeypatch):
    with refused(FileNotFoundError, "no file", "none.jsonl; expected rows"):
        read_rows(Data(str(tmp_path / "none.jsonl")))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n\n{')
    with refused(ValueError, "row 2 of", "is no JSON"):
        read_rows(Data(str(tmp_path / "bad.jsonl")))
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"question": "a", "answer": "b"}])
    columns = {"prompt": "question", "completion": "answer"}
    assert read_rows(Data("openai/gsm8k", columns=columns, config="main"))[1] == [{"prompt": "a", "completion": "b"}]

    def none(*_, **__):
        raise ValueError("no\nsplit")

    monkeypatch.setattr("datasets.load_dataset", none)
    with refused(ValueError, "me/none is no file, and the hub gave no split 'train' of it (no split)"):
        read_rows(Data("me/none"))
