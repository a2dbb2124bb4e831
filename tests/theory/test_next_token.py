"""divergence: the KL divergence of next-token distributions against PyTorch's own, and what is refused."""

import copy
import math

import pytest
import torch
from models import build, snapshot, tokens

from fused_steer import SteerConfig, patch_model
from fused_steer.theory import divergence


@pytest.fixture
def pair():
    model = build()
    tuned = copy.deepcopy(model)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.3 * parameter.std() * torch.randn_like(parameter)
    return model, tuned


def batches():
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[1, 5:] = mask[3, :7] = 0
    return [
        {"input_ids": tokens(0, batch=4, length=9), "attention_mask": mask, "labels": tokens(0, 4, 9)},
        {"input_ids": tokens(1, batch=2, length=5)},
    ]


@pytest.mark.parametrize("rows", [1, 1 << 20], ids=["a token at a time", "all at once"])
def test_divergence_is_the_kl_of_the_tokens_that_count(pair, monkeypatch, rows):
    model, tuned = pair
    monkeypatch.setattr("fused_steer.theory.next_token._LOGITS", rows)
    kl, same = [], []
    for batch in batches():
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        with torch.no_grad():
            ours, theirs = (
                one.eval()(input_ids=batch["input_ids"], attention_mask=mask.long()).logits[mask].double()
                for one in (model, tuned)
            )
        each = torch.nn.functional.kl_div(ours.log_softmax(1), theirs.log_softmax(1), log_target=True, reduction="none")
        kl += each.sum(1).tolist()
        same += (ours.argmax(1) == theirs.argmax(1)).tolist()
    found = divergence(model, tuned, batches())
    assert found.tokens == len(kl) == 4 * 9 - 11 + 10
    assert found.kl == pytest.approx(sum(kl) / len(kl), rel=1e-5)
    assert found.same == sum(same) / len(same)
    assert 0 < found.same < 1 and found.kl > 0.01


def test_divergence_of_a_model_to_itself_and_modes_are_left(pair):
    model, tuned = pair
    model.train()
    before = snapshot(model)
    found = divergence(model, model, batches())
    assert found.kl == 0 and found.same == 1
    steered = patch_model(copy.deepcopy(model), SteerConfig())  # W2 is 0
    assert divergence(steered, tuned, batches()) == divergence(model, tuned, batches())
    assert model.training and snapshot(model) == before


def test_divergence_over_the_tokens_of_the_model_where_the_tuned_one_has_more():
    model, larger = build(vocab_size=64), build(vocab_size=72)
    larger.load_state_dict(
        {
            name: torch.cat([w, w.new_full((8, w.shape[1]), 9.0)]) if "embed" in name or "lm_head" in name else w
            for name, w in model.state_dict().items()
        }
    )
    given = [{"input_ids": tokens(0, batch=2, length=5) % 64}]
    assert divergence(model, larger, given).kl == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="the tuned model has 64 tokens; expected 72, as the model has"):
        divergence(larger, model, given)


def test_divergence_refusals(pair):
    model, tuned = pair
    with pytest.raises(ValueError, match="the batches have no token; expected at least one"):
        divergence(model, tuned, [])
    with pytest.raises(TypeError, match="a batch is a Tensor; expected a mapping with a tensor input_ids"):
        divergence(model, tuned, [tokens(0)])
    with torch.no_grad():
        tuned.lm_head.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="logits are NaN or infinite; expected finite ones"):
        divergence(model, tuned, batches())
