"""fused-steer fit, end to end on a tiny model: a LoRA, a fine-tuned model and an adapter in, an adapter out."""

import copy
import json

import pytest
import torch
from command import assert_refused, invoke, plain_output  # noqa: F401 (a fixture)
from models import HIDDEN, LAYERS, build, randomize
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import fused_steer.peft  # noqa: F401 (PEFT knows the method)
from fused_steer import SteerConfig, load_joint, patch_model, save_joint
from fused_steer.theory import divergence, fit
from fused_steer.tools.prompts import encode

WORDS = ["<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base with its tokenizer, three ways to have it tuned, models that do not fit, and prompts."""
    folder = tmp_path_factory.mktemp("fit")
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    small = {"num_hidden_layers": 2}, {"vocab_size": 32}
    models = {"base": build(eos_token_id=0), "short": build(**small[0]), "few": build(**small[1])}
    torch.manual_seed(5)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, lora_alpha=1)
    lora = get_peft_model(copy.deepcopy(models["base"]), config)
    lora.save_pretrained(folder / "lora")
    lora.save_pretrained(folder / "checkpoint")
    models["tuned"] = lora.merge_and_unload()
    models["broken"] = copy.deepcopy(models["tuned"])
    with torch.no_grad():
        models["broken"].model.layers[2].mlp.down_proj.weight[0, 0] = float("inf")
    for name, model in models.items():
        model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "base")  # not beside the tuned model, which is given the base's tokens
    steered = patch_model(AutoModelForCausalLM.from_pretrained(folder / "base"))
    randomize(steered)
    steered.steering.save(folder / "steering")
    steered.steering.save(folder / "checkpoint" / "fused_steer" / "default")  # as a Trainer's checkpoint of both
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "lora")
    save_joint(patch_model(wrapped, folder / "steering"), folder / "joint")
    steered.steering.add("generated", SteerConfig(positions="generated"))
    steered.steering.save(folder / "generated", "generated")
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(2, len(WORDS), (40, 7), generator=generator).tolist()
    (folder / "prompts.txt").write_text("\n".join(" ".join(WORDS[i] for i in row) for row in draws))
    (folder / "few.txt").write_text("a b\nc\n")
    return folder, tokenizer


def arguments(folder, out, tuned="lora", *more):
    common = ("--prompts", folder / "prompts.txt", "--device", "cpu", "--out", out, "--rank", 4)
    return ("fit", folder / "base", folder / tuned, *common, *more)


def expected(place, tuned, **options):
    """What the function gives for the command's inputs. tuned: a model, or the name of one."""
    folder, tokenizer = place
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    other = AutoModelForCausalLM.from_pretrained(folder / tuned) if isinstance(tuned, str) else tuned
    prompts = (folder / "prompts.txt").read_text().split("\n")
    parts = [encode(tokenizer, some, 512, 8) for some in (prompts[:36], prompts[36:])]
    config = SteerConfig(rank=4, activation="identity", up_bias=True)
    return fit(base, other, parts[0], config, held_out=parts[1], **options)


def test_fit_command_writes_an_adapter_that_loads_everywhere(place, tmp_path):
    folder, tokenizer = place
    result = invoke(*arguments(folder, tmp_path / "out", "tuned"))
    assert result.exit_code == 0, result.output
    found = expected(place, "tuned")
    for line in (
        "prompts   36 of ",
        "252 tokens; held out 4",
        f"share     {found.share:.1%} of the oracle",
        "rank 4, 864",
    ):
        assert line in result.stdout
    base, wanted = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("base", "tuned"))
    held_out = encode(tokenizer, (folder / "prompts.txt").read_text().split("\n")[36:], 512, 8)
    apart = [divergence(base, wanted, held_out), divergence(patch_model(base, tmp_path / "out"), wanted, held_out)]
    assert 0 < apart[1].kl < 0.9 * apart[0].kl
    assert f"KL to tuned {apart[0].kl:.3g} -> {apart[1].kl:.3g} nats, same likeliest token {apart[0].same:.1%} -> " in (
        result.stdout
    )
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    assert [row[0] for row in rows] == list(map(str, range(LAYERS)))
    second = found.layers[1]
    shares = second.share, second.held_out, second.token, second.rest, second.reach
    assert rows[1][2:] == [*(f"{number:.1%}" for number in shares), f"{second.growth:.2f}"]

    ids = torch.tensor([[2, 3, 4, 5]])
    ours = patch_model(AutoModelForCausalLM.from_pretrained(folder / "base"), tmp_path / "out")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
        plain, wanted = (AutoModelForCausalLM.from_pretrained(folder / name)(ids).logits for name in ("base", "tuned"))
        assert (ours(ids).logits - wanted).norm() < 0.9 * (plain - wanted).norm()
    config = ours.steering.config()
    assert (config.rank, config.activation, config.up_bias, config.layers) == (4, "identity", True, None)


@pytest.mark.parametrize("tuned", ["lora", "steering"])
def test_fit_command_of_a_lora_and_of_an_adapter(place, tmp_path, tuned):
    folder, _ = place
    result = invoke(*arguments(folder, tmp_path / "out", tuned, "--json"))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["tokens"] == 252 and found["tokens_held_out"] == 28 and len(found["layers"]) == LAYERS
    assert all(0 < layer["share"] <= 1 for layer in found["layers"])
    next_token = found["next_token"]
    assert next_token["base"]["tokens"] == next_token["steered"]["tokens"] == 28
    assert next_token["base"]["kl"] > next_token["steered"]["kl"] > 0
    if tuned == "lora":
        merged = expected(place, "tuned").as_dict()  # the same LoRA, in the weights
        for layer, other in zip(found["layers"], merged["layers"], strict=True):
            assert layer["share"] == pytest.approx(other["share"], rel=1e-3)


def test_fit_command_of_a_lora_and_steering_together(place, tmp_path):
    """A directory of save_joint, and a Trainer's checkpoint: both parts are fitted, and a part alone is noted."""
    folder, _ = place
    shares = {}
    for tuned in ("lora", "joint", "checkpoint", "joint/steering"):
        result = invoke(*arguments(folder, tmp_path / "out", tuned, "--json"))
        assert result.exit_code == 0, result.output
        assert ("was trained together" in result.stderr) == (tuned == "joint/steering")
        shares[tuned] = [layer["oracle"] for layer in json.loads(result.stdout)["layers"]]
    both = load_joint(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "joint").eval()
    wanted = [layer.oracle for layer in expected(place, both).layers]
    assert shares["joint"] == shares["checkpoint"] == pytest.approx(wanted, rel=1e-5)
    assert shares["lora"] != pytest.approx(wanted, rel=1e-2) != shares["joint/steering"]


def test_fit_command_options(place, tmp_path):
    folder, _ = place
    more = ("--layers", "0,2", "--no-sequence", "--no-bias", "--held-out", 0, "--max-prompts", 20)
    result = invoke(*arguments(folder, tmp_path / "out", "lora", "--ridge", "0.1", *more))
    assert result.exit_code == 0, result.output
    assert "140 tokens; held out 0" in result.stdout and "share     " not in result.stdout
    assert "(base, on the prompts)" in result.stdout
    config = patch_model(build(), tmp_path / "out", check_base=False).steering.config()
    assert (config.layers, config.up_bias) == ((0, 2), False)


def test_fit_command_with_a_nonlinear_activation_and_within_an_error(place, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)  # its bars are no part of the message
    folder, _ = place
    given = [part for part in arguments(folder, tmp_path / "out", "steering") if part not in ("--rank", 4)]
    result = invoke(*given, "--error", 0.99, "--activation", "silu")
    assert result.exit_code == 0, result.output
    config = patch_model(build(), tmp_path / "out", check_base=False).steering.config()
    assert (config.rank, config.activation, config.down_bias, config.up_bias) == (1, "silu", True, True)
    assert "error     at most" in result.stdout and "rank 1, silu, " in result.stdout
    assert_refused(invoke(*given, "--error", "1e-9"), "expected an error above that, or more prompts")


def test_fit_command_of_the_base_itself_says_that_there_is_no_oracle(place, tmp_path):
    folder, _ = place
    result = invoke(*arguments(folder, tmp_path / "out", "base"))
    assert result.exit_code == 0 and "nan" not in result.stdout
    assert "share     none: the tuned model's hidden states after the last layer are the base's" in result.stdout


def test_fit_command_of_rank_0_is_a_vector(place, tmp_path):
    folder, _ = place
    assert invoke(*arguments(folder, tmp_path / "out", "lora", "--rank", 0)).exit_code == 0
    assert patch_model(build(), tmp_path / "out", check_base=False).steering.config().form == "vector"


def test_fit_command_refusals(place, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)  # its bars are no part of the message
    folder, _ = place
    out = tmp_path / "out"

    def refuses(*parts, tuned="lora", more=()):
        assert_refused(invoke(*arguments(folder, out, tuned, *more)), *parts)
        assert not out.exists()

    (tmp_path / "bad.txt").write_bytes(b"\xff\xff")
    refuses("the tuned model has 2 layers", f"expected {LAYERS} of {HIDDEN}", tuned="short")
    refuses("the tuned model has 32 tokens; expected 64", tuned="few")
    refuses("the tuned model's hidden states after layer 2 are NaN or infinite", tuned="broken")
    refuses("3 tokens to fit on; expected more than 5", more=("--prompts", folder / "few.txt"))
    refuses(f"rank is {HIDDEN + 1}; expected at most {HIDDEN}", more=("--rank", HIDDEN + 1))
    refuses("rank is -1", more=("--rank", -1))
    refuses("no file", more=("--prompts", tmp_path / "none.txt"))
    refuses("is no UTF-8 text", more=("--prompts", tmp_path / "bad.txt"))
    refuses("no directory", tmp_path / "none", tuned=tmp_path / "none")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "adapter_config.json").write_text('{"peft_type":')
    refuses("adapter_config.json cannot be loaded: it is no JSON", "expected a JSON object", tuned=tmp_path / "cut")
    refuses(f"layers has {LAYERS}", more=("--layers", LAYERS))
    with monkeypatch.context() as patch:  # these are refused before a model is loaded
        patch.setattr("fused_steer.tools.demo.load_model", None)
        for ridge in ("-1", "nan", "inf"):
            refuses(f"ridge is {float(ridge)}", more=("--ridge", ridge))
        refuses("has positions 'generated'; expected 'all': a fitted adapter has no others", tuned="generated")
        refuses("is steered; expected 'post_block'", tuned="generated", more=("--site", "post_mlp"))
        words = (folder / "short" if word == folder / "base" else word for word in arguments(folder, out, "joint"))
        assert_refused(invoke(*words), f"is for a model of number of layers {LAYERS}; expected 2")
    refuses("held out is 1.0", more=("--held-out", 1))
    refuses("site is 'mlp'; expected one of", more=("--site", "mlp"))
    refuses("activation is 'swish'; expected one of", more=("--activation", "swish"))
    refuses("activation is 'silu' with rank 0, a vector", more=("--activation", "silu", "--rank", 0))
    refuses("rank is 4 and error is 0.5; expected one of them", more=("--error", 0.5))
    refuses("batch size is 0", more=("--batch-size", 0))
    refuses("is a file", more=("--out", folder / "few.txt"))
