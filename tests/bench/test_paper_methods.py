"""Tests of the rivals in bench/paper/ against their formulas, and of joint training as released step by step.

Also of the tokens that are trained and that end an answer.
"""

import copy
import importlib
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import HIDDEN, LAYERS, build, logits, tokens
from torch import nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from fused_steer.paper.answering import Text, answers, reachable
from fused_steer.paper.data import Example
from fused_steer.paper.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))
try:
    heads, methods, released, smoke, training = (
        importlib.import_module(f"bench.paper.{name}") for name in ("heads", "methods", "released", "smoke", "training")
    )
    from bench.paper.settings import RATES, Settings
finally:
    sys.path.remove(str(ROOT))

HEADS, WIDTH = 4, HIDDEN // 4
SETTINGS = Settings("tiny", batch_size=4, activation="silu")
METHODS = methods.METHODS


def attached(name, settings=SETTINGS, seed=0):
    torch.manual_seed(seed)
    return METHODS[name].attach(build(), settings, 5e-3)


@pytest.fixture(scope="module")
def features():
    rows = [row.tolist() for row in tokens(batch=16)]
    return [{"input_ids": row, "attention_mask": [1] * 9, "labels": [-100] * 4 + row[4:]} for row in rows]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tiny")
    smoke.write_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="module")
def train(features, tokenizer):
    def train(model, stage, name, epochs=1, settings=SETTINGS):
        return training.train(model, stage, METHODS[name], features, tokenizer, settings, epochs, 0)["losses"]

    return train


def assert_as_exact(found, formula, *arguments):
    """Assert that the error from the formula in float64 is at most twice that of the formula in float32."""
    truth = formula(*(a.double() for a in arguments))
    error, plain = (
        float((x.double() - truth).norm() / truth.norm()) for x in (found, formula(*(a.float() for a in arguments)))
    )
    assert error <= 2 * plain + 1e-6


# ----------------------------------------------------------------------------------------------------- chat template

GEMMAS = (
    "{% for m in messages %}<start_of_turn>{{ {'assistant': 'model'}.get(m.role, m.role) }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def chat_text(tokenizer, template=GEMMAS):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    tokenizer.chat_template = template
    return Text(tokenizer, chat=True)


def test_paper_training_supervises_the_end_of_turn(tokenizer):
    example = Example("Is it?\n", "Answer: True.", "true")

    def trained(text):
        row, _ = text.features(example, 512)
        return [
            text.tokenizer.decode([i for i, label in zip(row["input_ids"], row["labels"], strict=True) if here(label)])
            for here in (lambda label: label == -100, lambda label: label != -100)
        ]

    prompt = (
        "<start_of_turn>system\nYou are a helpful assistant.<end_of_turn>\n<start_of_turn>user\nIs it?<end_of_turn>\n"
        "<start_of_turn>model\n"
    )
    assert trained(chat_text(tokenizer)) == [prompt, "Answer: True.<end_of_turn>\n"]
    assert trained(Text(tokenizer, chat=False)) == ["Is it?\n", "Answer: True."]
    assert trained(Text(tokenizer, chat=False, end=True)) == ["Is it?\n", "Answer: True.<eos>"]
    other = chat_text(tokenizer, GEMMAS.replace("model\n{% endif", "model {% endif"))
    with pytest.raises(
        ValueError, match="ends a prompt in '.*model ', but a chat with an answer in '.*True.<end_of_turn>"
    ):
        other.features(example, 512)
    # The end of a turn is not part of the answer that has to fit.
    task = replace(TASKS["boolq"], new_tokens=len("Answer: True."))
    assert reachable(chat_text(tokenizer), task, [example]) == (1, 1)


@pytest.mark.parametrize(("own", "ends"), [(None, []), (5, [5]), ([5, 6], [5, 6])])
def test_paper_answers_end_where_the_turn_ends(tokenizer, own, ends):
    """And where the model's generation config says, and with `end` at the end of the sequence, which is token 0."""
    model, asked = build(), []
    model.generation_config.eos_token_id = own
    model.generate = lambda input_ids, eos_token_id, **_: asked.append(eos_token_id) or input_ids
    texts = (
        chat_text(tokenizer),
        Text(tokenizer, chat=False, end=True),
        chat_text(tokenizer, GEMMAS.replace("<end_of_turn>", "|")),
    )
    for text in texts:
        answers(model, text, TASKS["boolq"], [Example("?", "Answer: True.", "true")], 1, "")
    turn = texts[0].tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert asked == [sorted({*ends, turn}), [0, *ends], ends or None]


# ------------------------------------------------------------------------------------------------- LoFiT and JoLA


@torch.no_grad()
def test_paper_methods_lofit_is_its_formula():
    edit = heads.Lofit(HEADS, WIDTH)
    edit.scale.normal_()
    edit.offset.normal_()
    edit.chosen[1:3] = 1
    z = torch.randn(2, 5, HIDDEN)

    def formula(z, scale, offset, chosen):
        parts = [(1 + scale[i]) * part + chosen[i] * offset[i] for i, part in enumerate(z.split(WIDTH, -1))]
        return torch.cat(parts, -1)

    assert_as_exact(edit(z), formula, z, edit.scale, edit.offset, edit.chosen)


@pytest.mark.parametrize("make", [heads.Lofit, heads.Jola])
def test_paper_methods_heads_are_edited_before_the_output_projection(make):
    """A model with the edit gives the same output as a model with the edit written before its projections."""
    model, other = build(), build()
    torch.manual_seed(0)
    edits = heads.attach(model, make, "edit")
    for edit in edits:
        nn.init.normal_(edit.scale)
    for layer, edit in zip(other.model.layers, edits, strict=True):
        projection = layer.self_attn.o_proj
        projection.forward = lambda z, edit=edit, weight=projection.weight: F.linear(edit(z), weight)
    assert torch.equal(logits(model.eval()), logits(other))
    assert not torch.equal(logits(model), logits(build()))
    assert {n.split(".")[-1] for n, p in model.named_parameters() if p.requires_grad} >= {"scale"}
    assert all("edit" in n for n, p in model.named_parameters() if p.requires_grad)


def test_paper_methods_heads_are_as_many_as_the_attention_has():
    """Models such as Laguna have attentions of other numbers of heads than the config's."""
    model = build()
    for layer in model.model.layers:
        layer.self_attn.num_heads = 2 * HEADS
    assert [edit.scale.shape for edit in heads.attach(model, heads.Lofit, "edit")] == [(2 * HEADS, WIDTH // 2)] * LAYERS
    other = build()
    other.model.layers[1].self_attn.num_heads = 2 * HEADS
    with pytest.raises(ValueError, match=f"layer 1 has {2 * HEADS} heads; expected {HEADS}, as layer 0"):
        heads.attach(other, heads.Lofit, "edit")


@pytest.mark.parametrize("family", ["phi3", "gpt2"])
def test_paper_methods_lora_is_on_every_linear_layer(family):
    model, _ = METHODS["lora"].attach(build(family), SETTINGS, 1e-3)
    linears = {name for name, m in build(family).named_modules() if isinstance(m, (nn.Linear, Conv1D))} - {"lm_head"}
    adapted = {name for name, m in model.get_base_model().named_modules() if hasattr(m, "lora_B")}
    assert adapted == linears and len(linears) == 4 * LAYERS


def test_paper_methods_lofit_selects_the_heads_of_the_largest_scales_and_trains_their_offsets_alone():
    model, (first, second) = attached("lofit", replace(SETTINGS, lofit_share=0.25))
    edits = [layer.self_attn.lofit for layer in model.model.layers]
    assert (first.rate, second.rate) == (SETTINGS.lofit_rate, 5e-3)
    penalty = first.penalty().item()
    assert penalty == pytest.approx(SETTINGS.lofit_l1 * sum(float(e.scale.detach().abs().sum()) for e in edits))
    with torch.no_grad():
        for edit in edits:
            edit.scale.fill_(0.01)
        edits[2].scale[3], edits[0].scale[1], edits[1].scale[0] = 3.0, -2.0, 1.0
    first.after()
    chosen = {(i, int(head)) for i, edit in enumerate(edits) for head in edit.chosen.flatten().nonzero()}
    assert chosen == {(2, 3), (0, 1), (1, 0)}
    assert all(not edit.scale.any() and not edit.scale.requires_grad for edit in edits)
    model(tokens(), labels=tokens()).loss.backward()
    moved = {(i, head) for i, e in enumerate(edits) for head in range(HEADS) if e.offset.grad[head].any()}
    assert moved == chosen
    assert {id(p) for p in second.parameters} == {id(edit.offset) for edit in edits}
    assert second.trained == 3 * WIDTH


@torch.no_grad()
def test_paper_methods_jola_is_its_formula_and_its_gates_are_noisy_in_training_alone():
    edit = heads.Jola(HEADS, WIDTH)
    for parameter in edit.parameters():
        parameter.normal_()
    z = torch.randn(2, 5, HIDDEN)

    def formula(z, scale, offset, g1, g2):
        parts = [(1 + g2[i] * scale[i]) * part + g1[i] * offset[i] for i, part in enumerate(z.split(WIDTH, -1))]
        return torch.cat(parts, -1)

    def gate(log_gate, noise=None):
        logit = log_gate if noise is None else (log_gate + torch.log(noise / (1 - noise))) / 0.33
        return (1.2 * torch.sigmoid(logit) - 0.1).clamp(0, 1)

    edit.eval()
    assert_as_exact(edit(z), formula, z, edit.scale, edit.offset, gate(edit.log_g1), gate(edit.log_g2))
    edit.train()
    torch.manual_seed(3)
    found = edit(z)
    torch.manual_seed(3)
    noise2, noise1 = ((1 - 2e-6) * torch.rand(HEADS, 1) + 1e-6 for _ in range(2))
    assert_as_exact(found, formula, z, edit.scale, edit.offset, gate(edit.log_g1, noise1), gate(edit.log_g2, noise2))
    assert not torch.equal(found, edit(z))


def test_paper_methods_jola_penalty_moves_from_one_gate_to_the_other():
    edits = [heads.Jola(HEADS, WIDTH) for _ in range(LAYERS)]
    with torch.no_grad():
        for edit in edits:
            edit.log_g1.fill_(50.0)  # open
            edit.log_g2.fill_(-50.0)  # closed
    penalty = heads.JolaPenalty(edits)
    found = [penalty().item() for _ in range(3)]
    weights = [0.1 * 2.718281828459045 ** (-0.01 * step) for step in range(3)]
    assert found == pytest.approx([LAYERS * weight / (LAYERS * HEADS) for weight in weights], rel=1e-4)


def test_paper_methods_heads_of_a_layer_without_a_known_projection_are_refused():
    with pytest.raises(ValueError, match="layer 0, a GPT2Block, has no linear o_proj/.*expected one to edit the heads"):
        heads.attach(build("gpt2"), heads.Lofit, "lofit")


# ----------------------------------------------------------------------------------------------------------- LoReFT


#: Of each ReFT: the child of a layer with the adapter, and the module with the output that is edited.
EDITED = {"reft": ("post_mlp", "mlp"), "reft-post-block": ("post_block", "")}


def loreft_by_hooks(model, chosen, name="reft"):
    """Edit the MLP's output, or the layer's, by h + Rᵀ (W h + b − R h) at the chosen tokens, (B, T), by plain hooks."""
    base = build().to(next(model.parameters()).dtype)
    for edited, layer in zip(model.model.layers, base.model.layers, strict=True):
        adapter = edited.get_submodule(EDITED[name][0]).adapter("default")
        source, bias, matrix = adapter.down.weight, adapter.down.bias, adapter.up.weight
        q, u = torch.linalg.qr(matrix.detach())
        rotation = (q * u.diagonal().sign()).T

        def hook(_, __, output, source=source, bias=bias, rotation=rotation):
            h = output[0] if isinstance(output, tuple) else output
            new = h + (F.linear(h, source, bias) - h @ rotation.T) @ rotation
            new = torch.where(chosen[..., None], new, h)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        layer.get_submodule(EDITED[name][1]).register_forward_hook(hook)
    return base


@torch.no_grad()
@pytest.mark.parametrize("name", EDITED)
@pytest.mark.parametrize("positions", ["first_2+last_1", "all"])
def test_paper_methods_loreft_is_its_formula_and_leaves_other_positions(positions, name):
    """A batch as in training: two prompts of 4 and 5 tokens, then answers; the first row is padded on the right."""
    model, _ = attached(name, replace(SETTINGS, reft_positions=positions))
    for layer in model.model.layers:
        adapter = layer.get_submodule(EDITED[name][0]).adapter("default")
        for parameter in (adapter.down.weight, adapter.down.bias):
            parameter.normal_(std=0.2)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 7:] = 0
    labels = tokens().clone()
    labels[0, :4] = labels[0, 7:] = labels[1, :5] = -100
    edited = {"first_2+last_1": ["110100000", "110010000"], "all": ["1" * 9] * 2}[positions]
    chosen = torch.tensor([[mark == "1" for mark in row] for row in edited])
    given = {"input_ids": tokens(), "attention_mask": mask}
    found = model(**given, labels=labels).logits
    formula = loreft_by_hooks(model, chosen, name)
    plain = formula(**given).logits
    kept = mask.bool()
    assert float((build()(**given).logits - plain)[kept].norm() / plain[kept].norm()) > 0.01
    truth = loreft_by_hooks(model.double(), chosen, name)(**given).logits
    error, allowed = (float((x - truth)[kept].norm() / truth[kept].norm()) for x in (found, plain))
    assert error <= 2 * allowed + 1e-6


def test_paper_methods_loreft_is_the_fused_form_and_stays_orthonormal_in_training(train):
    model, (stage,) = attached("reft")
    before = [p.detach().clone() for p in stage.parameters]
    train(model, stage, "reft", epochs=2)
    assert {entry.kind for entry in model.steering.report()} == {"fused"}
    config = model.steering.config()
    assert (config.form, config.rank, config.positions) == ("loreft", 8, "first_7+last_7")
    assert all(not torch.equal(p, old) for p, old in zip(stage.parameters, before, strict=True))
    for layer in model.model.layers:
        up = layer.post_mlp.adapter("default").weights()[1].detach().double()
        assert float((up.T @ up - torch.eye(8).double()).norm()) < 1e-5


def test_paper_methods_loreft_leaves_tokens_that_are_generated():
    """Generation goes on as that of the base with the prompt's cache edited: by hand, token after token."""
    model, _ = attached("reft", replace(SETTINGS, reft_positions="first_1+last_1"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_mlp.adapter("default").down.bias.normal_(std=3)
    said = model.generate(tokens(), max_new_tokens=3, do_sample=False)
    ids = tokens()
    for _ in range(3):
        chosen = torch.zeros(ids.shape, dtype=torch.bool)
        chosen[:, 0] = chosen[:, 8] = True
        with torch.no_grad():
            ids = torch.cat([ids, loreft_by_hooks(model, chosen)(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(said, ids)
    assert not torch.equal(said, build().generate(tokens(), max_new_tokens=3, do_sample=False))


def test_paper_methods_loreft_positions_that_are_none_are_refused():
    with pytest.raises(ValueError, match="positions has 'f7'; expected 'all'"):
        attached("reft", replace(SETTINGS, reft_positions="f7"))


# ----------------------------------------------------------------------------------------- joint training as released


def joint_as_told(every, settings):
    """Repeat the released joint training by hand: plain hooks, adapters as last parameters, W1 projected in between."""
    torch.manual_seed(0)
    model = methods._with_lora(build(), settings)
    layers = model.base_model.model.model.layers
    adapters = nn.ModuleList()
    for layer in layers:
        down, up = nn.Linear(HIDDEN, 8, bias=False), nn.Linear(8, HIDDEN, bias=False)
        nn.init.kaiming_uniform_(down.weight, a=5**0.5)
        down.weight.data *= 1e-3
        nn.init.zeros_(up.weight)
        layer.register_forward_hook(lambda _, __, h, d=down, u=up: h + u(F.silu(d(h))))
        adapters.append(nn.ModuleList([down, up]))
    model.adapters = adapters

    def project():
        for layer, (down, _) in zip(layers, adapters, strict=True):
            b = layer.mlp.down_proj.lora_B.default.weight.detach()
            v = torch.linalg.svd(b.T, full_matrices=False).Vh.T
            down.weight.data = down.weight.data @ (torch.eye(HIDDEN) - v @ v.T)

    class Projection(TrainerCallback):
        def on_train_begin(self, *arguments, **options):
            if every == "init":
                project()

        def on_epoch_begin(self, *arguments, **options):
            if every == "epoch":
                project()

        def on_step_begin(self, args, state, *arguments, **options):
            if every == "step" or isinstance(every, int) and state.global_step % every == 0:
                project()

    return model, methods.Stage([p for p in model.parameters() if p.requires_grad], 5e-3, callbacks=[Projection()])


@pytest.fixture(scope="module")
def unprojected(train):
    return train(*joint_as_told(None, SETTINGS), "joint-released", epochs=2)


@pytest.mark.parametrize("every", ["step", 3, "epoch", "init"])
def test_paper_methods_adapter_and_projection_as_released_to_the_bit(train, unprojected, every):
    settings = replace(SETTINGS, projection=str(every))
    model, (stage,) = attached("joint-released", settings)
    expected = train(*joint_as_told(every, settings), "joint-released", epochs=2)
    assert train(model, stage, "joint-released", epochs=2) == expected
    assert expected != unprojected, "the projection changes nothing"


@pytest.mark.parametrize(("name", "by_tokens"), [("lowrank", True), ("lofit", True), ("lofit", False), ("jola", False)])
def test_paper_training_accumulates_batches(name, by_tokens, train):
    """Steps of two batches of 2 are those of one batch of 4: the same losses, and the penalty once a step.

    by_tokens: whether the model divides a batch's loss by the tokens of the whole step.
    """
    found = []
    for accumulation in (1, 2):
        settings = replace(SETTINGS, batch_size=4 // accumulation, accumulation=accumulation, lofit_l1=0.02)
        model, stages = attached(name, settings)
        model.accepts_loss_kwargs = by_tokens
        if name == "jola":
            for module in model.modules():
                if isinstance(module, heads.Jola):
                    module.gate = lambda log_gate: torch.sigmoid(log_gate)  # without noise
        found.append(train(model, stages[0], name, epochs=2, settings=settings))
        if name == "jola":
            assert stages[0].penalty.steps == 8
    assert len(found[0]) == 8
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[0][-1] != pytest.approx(found[0][0], rel=1e-3)


@pytest.mark.parametrize("name", ["joint-released", "joint"])
def test_paper_methods_released_projection_before_the_first_step_wipes_the_first_coordinates(name):
    model, _ = attached(name)
    layers = model.base_model.model.model.layers
    before = [released._down(model, i, layer).detach().clone() for i, layer in enumerate(layers)]
    released.project_model(model)  # B = 0
    for i, (layer, old) in enumerate(zip(layers, before, strict=True)):
        now = released._down(model, i, layer)
        assert old[:, :8].any() and not now[:, :8].any()
        assert torch.equal(now[:, 8:], old[:, 8:])


def test_paper_methods_released_projection_is_orthogonal_to_b():
    down, b = torch.randn(8, HIDDEN).double(), torch.randn(HIDDEN, 3).double()
    found = released.project(down, b)
    assert float((found @ b).norm()) < 1e-12 * float(down.norm() * b.norm())
    assert torch.linalg.matrix_rank(found) == 8


@pytest.mark.parametrize("every", ["", "0", "-1", "steps", 0])
def test_paper_methods_released_projection_of_no_period_is_refused(every):
    with pytest.raises(ValueError, match="expected step, epoch, init or a number of steps"):
        released.ReleasedProjection(every)


def test_paper_methods_released_projection_without_a_lora_is_refused():
    model, _ = attached("lowrank")
    with pytest.raises(ValueError, match="layer 0 has no adapter with a W1 beside a LoRA on mlp.down_proj"):
        released.project_model(model)


# -------------------------------------------------------------------------------------------------------- all methods

SHARES = {
    "untrained": 0,
    "reft": LAYERS * (2 * 8 * HIDDEN + 8),
    "reft-post-block": LAYERS * (2 * 8 * HIDDEN + 8),
    "lowrank": LAYERS * 2 * 8 * HIDDEN,
    "rank1": LAYERS * 2 * HIDDEN,
    "vector": LAYERS * HIDDEN,
    "jola": LAYERS * (2 * HIDDEN + 2 * HEADS),
    "lofit": 0,  # until its heads are chosen
}


@pytest.mark.parametrize("name", RATES)
def test_paper_methods_method_trains_what_it_says_under_its_schedule(name, train, monkeypatch):
    model, stages = attached(name)
    trained = sum(stage.trained for stage in stages[-1:])
    lora = 0 if "joint" not in name and name != "lora" else sum(p.numel() for p in methods.lora_parameters(model))
    assert trained == SHARES.get(name, lora + (SHARES["lowrank"] if "joint" in name else 0)) or name == "full"
    if name == "full":
        assert trained == sum(p.numel() for p in build().parameters())
    base = {n: p for n, p in model.named_parameters() if not any(id(p) == id(q) for s in stages for q in s.parameters)}
    before = {n: p.detach().clone() for n, p in base.items()}
    rates = []

    class Watch(TrainerCallback):
        def on_step_end(self, *arguments, optimizer, **options):
            rates.append(optimizer.param_groups[0]["lr"])

    for stage in stages:
        stage.callbacks = [*stage.callbacks, Watch()]
        old = [p.detach().clone() for p in stage.parameters]
        rates.clear()
        train(model, stage, name)
        # W1 has no gradient until W2 has moved. After four steps all trained parameters have moved.
        assert any(not torch.equal(p, q) for p, q in zip(stage.parameters, old, strict=True))
        if METHODS[name].schedule == "constant":
            assert set(rates) == {stage.rate}
        else:
            assert rates[0] == stage.rate and rates == sorted(rates, reverse=True) and rates[-1] == 0
    assert all(torch.equal(p, before[n]) for n, p in base.items()), "something of the base has changed"


@pytest.mark.parametrize(
    ("name", "schedule", "warmup", "expected"),
    [
        ("vector", "linear", 0.25, [0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]),
        ("vector", None, 0.25, [0.5, *[1] * 7]),  # a warm-up before the constant rate
        ("lora", "constant", 0.0, [1] * 8),
        ("lora", None, 0.25, [0.5, *((1 + math.cos(math.pi * step / 6)) / 2 for step in range(7))]),
    ],
)
def test_paper_methods_schedule_and_warmup_that_are_chosen(name, schedule, warmup, expected, train):
    settings = replace(SETTINGS, batch_size=4, schedule=schedule, warmup=warmup)
    model, (stage,) = attached(name, settings)
    rates = []

    class Watch(TrainerCallback):
        def on_step_end(self, *arguments, lr_scheduler, **options):
            rates.append(lr_scheduler.get_last_lr()[0] / stage.rate)

    stage.callbacks = [Watch()]
    train(model, stage, name, epochs=2, settings=settings)
    assert rates == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", [n for n in RATES if n not in ("full", "untrained", "joint-released")])
def test_paper_methods_method_trains_float32_parameters_in_a_bfloat16_model(name):
    torch.manual_seed(0)
    model, stages = METHODS[name].attach(build().bfloat16(), SETTINGS, 5e-3)
    assert {p.dtype for stage in stages for p in stage.parameters} == {torch.float32}
    labels = tokens()
    labels[:, :4] = -100
    output = model(tokens(), labels=labels)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert any(p.grad is not None and p.grad.any() for p in stages[0].parameters)


def test_paper_methods_methods_warm_up_as_the_paper_says():
    warmed = {name: METHODS[name].warmup for name in RATES if METHODS[name].warmup}
    assert warmed == {"full": 0.1, "lora": 0.06, "joint": 0.06, "joint-orth": 0.06, "joint-released": 0.06}
    assert {name for name in RATES if METHODS[name].schedule == "cosine"} == set(warmed)


@pytest.mark.parametrize("site", ["post_attention", "pre_mlp", "post_mlp", "post_block"])
def test_paper_methods_steering_is_at_the_chosen_site(site):
    """All methods of a site steer there, with the parameters and the schedule that they have at any site."""
    for name in methods.SITED:
        if (name, site) == ("joint-orth", "pre_mlp"):
            continue
        named = methods.at_site(name, site)
        model, stages = attached(named)
        assert {entry.site for entry in model.steering.report()} == {site}, named
        assert sum(stage.trained for stage in stages) == sum(stage.trained for stage in attached(name)[1])
        assert (METHODS[named].schedule, METHODS[named].warmup) == (METHODS[name].schedule, METHODS[name].warmup)
    titles = {methods.METHODS[methods.at_site(name, site)].title for name in methods.SITED}
    assert len(titles) == len(methods.SITED) and (site == "post_block") == ("post-block" in titles)


@pytest.mark.parametrize("name", ["lowrank", "rank1", "joint", "joint-orth", "vector", "reft"])
def test_paper_methods_init_scale_multiplies_w1(name):
    plain, scaled = (attached(name, replace(SETTINGS, init_scale=scale))[1][0].parameters for scale in (1, 0.001))
    changed = [(p, q) for p, q in zip(plain, scaled, strict=True) if not torch.equal(p, q)]
    # A vector has no W1, ReFT's is W − R.
    assert len(changed) == (0 if name in ("vector", "reft") else LAYERS)
    assert all(torch.equal(p * 0.001, q) for p, q in changed)


def test_paper_methods_sites_are_named():
    found = methods.at_sites(["lora", "vector"], ["pre_mlp", "post_block"])
    assert found == {"lora": "lora", "vector-pre-mlp": "vector", "vector": "vector"}
