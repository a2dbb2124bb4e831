"""Tests of `extract`: hidden states, directions, separation and the adapter, against formulas written out."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch
from models import (
    HIDDEN,
    LAYERS,
    VOCABULARY,
    assert_close,
    assert_no_worse,
    build,
    build_frozen,
    difference,
    logits,
    randomize,
    refused,
    snapshot,
    tokens,
)
from text import tokenizer
from torch import Tensor

from fused_steer import SteerConfig, patch_model
from fused_steer.adapters.files import read_adapter, write_adapter
from fused_steer.tools import coverage
from fused_steer.vectors import extract
from fused_steer.vectors.directions import direction, separation
from fused_steer.vectors.hidden import hidden_states

PAIRS = 12


def rows(seed: int, count: int = PAIRS) -> list[list[int]]:
    """Draw token ids of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (count,), generator=generator).tolist()
    return [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def batches(rows: list[list[int]], size: int = 5) -> list[dict[str, Tensor]]:
    """Return batches padded on the right with a token that would be noticed."""
    found = []
    for some in (rows[i : i + size] for i in range(0, len(rows), size)):
        longest = max(map(len, some))
        ids = torch.tensor([row + [7] * (longest - len(row)) for row in some])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in some])
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def each_alone(rows: list[list[int]], token: str) -> Tensor:
    """Return the layers' outputs (layers, texts, d) by hooks, in float64, one text at a time without padding."""
    model, outputs = build_frozen().double(), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, output: outputs.append(output[0]))
    states = []
    for row in rows:
        outputs.clear()
        with torch.no_grad():
            model(torch.tensor([row]))
        states.append(torch.stack([state[-1] if token == "last" else state.mean(0) for state in outputs]))
    return torch.stack(states, 1)


def alone_in_32(rows: list[list[int]], token: str) -> Tensor:
    model = build_frozen()
    return torch.cat([hidden_states(model, batches([row]), token) for row in rows], 1)


@pytest.mark.parametrize("token", ["last", "mean"])
def test_extraction_hidden_states_are_those_of_each_text_alone(token):
    """Padding and batches change nothing but rounding: at most twice the error of one text at a time."""
    given, truth = rows(0), each_alone(rows(0), token)
    found = hidden_states(build_frozen(), batches(given), token)
    assert found.dtype == torch.float32 and found.shape == (LAYERS, PAIRS, HIDDEN)
    bound = 2 * difference(alone_in_32(given, token), truth)[""] + 1e-6
    assert difference(found, truth)[""] <= bound


def test_extraction_from_an_encoder_that_takes_no_token_ids():
    model = coverage.build("bert")
    with torch.no_grad():
        states = model(tokens(), output_hidden_states=True).hidden_states[1:]
    found = hidden_states(model, [{"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}], "last")
    assert_close(found, torch.stack(states)[:, :, -1])


def principal(differences: np.ndarray) -> np.ndarray:
    """Return the first principal component by the covariance's eigenvectors."""
    values, vectors = np.linalg.eigh(np.cov(differences, rowvar=False))
    assert values[-1] > values[-2]
    return vectors[:, -1]


def repeng(positive: np.ndarray, negative: np.ndarray, method: str) -> np.ndarray:
    """repeng's `read_representations` (version 0.4.0), with PCA written out."""
    h = np.empty((2 * len(positive), positive.shape[1]))
    h[::2], h[1::2] = positive, negative
    if method == "pca":
        train = h[::2] - h[1::2]
    else:
        center = (h[::2] + h[1::2]) / 2
        train = h.copy()
        train[::2] -= center
        train[1::2] -= center
    found = principal(train)
    projected = h @ found / np.linalg.norm(found)
    smaller = np.mean([projected[i] < projected[i + 1] for i in range(0, len(h), 2)])
    larger = np.mean([projected[i] > projected[i + 1] for i in range(0, len(h), 2)])
    return -found if smaller > larger else found


@pytest.mark.parametrize("method", ["mean", "pca", "pca-center"])
@pytest.mark.parametrize("seed", range(4))
def test_extraction_directions_are_those_of_the_formulas(method, seed):
    generator = torch.Generator().manual_seed(seed)
    positive, negative = torch.randn(2, PAIRS, HIDDEN, generator=generator, dtype=torch.float64)
    positive = positive + 2 * torch.randn(HIDDEN, generator=generator, dtype=torch.float64)
    found = direction(positive, negative, method)
    if method == "mean":
        truth = np.mean([p - n for p, n in zip(positive.numpy(), negative.numpy(), strict=True)], 0)
    else:
        truth = repeng(positive.numpy(), negative.numpy(), method)
        assert float(found.norm()) == pytest.approx(1, abs=1e-12)
    assert_close(found, torch.from_numpy(truth))


def test_extraction_direction_points_to_the_positive_side():
    torch.manual_seed(0)
    positive, negative = torch.randn(PAIRS, HIDDEN), torch.randn(PAIRS, HIDDEN)
    positive[:, 0] += 20 * torch.rand(PAIRS)  # the differences' spread lies along this axis
    for method in ("mean", "pca", "pca-center"):
        assert direction(positive, negative, method)[0] > 0.5
        assert direction(negative, positive, method)[0] < -0.5


def test_extraction_separation_is_by_definition():
    positive, negative = torch.tensor([[3.0, 9.0], [1.0, -9.0], [2.0, 0.0]]), torch.tensor([[0.0, 5.0], [2.0, 5.0]])
    found = separation(positive, negative, torch.tensor([4.0, 0.0]))
    assert found.auc == (2 + 1 + 1.5) / 6  # 3 > 0, 2; 1 > 0; 2 > 0 and a tie
    assert found.d == pytest.approx((2 - 1) / math.sqrt((2 / 3 + 1) / 2))
    assert separation(positive, positive, torch.ones(2)).auc == 0.5
    assert math.isinf(separation(torch.ones(2, 2), torch.zeros(2, 2), torch.ones(2)).d)


def test_extraction_is_an_adapter_that_adds_the_difference(tmp_path):
    sides = rows(0), rows(1)
    found = extract(build(), *map(batches, sides), token="mean", layers=[2, 0], scale=-0.5)
    states, plain = ([of(side, "mean") for side in sides] for of in (each_alone, alone_in_32))
    truth, alone = ((positive - negative).mean(1) for positive, negative in (states, plain))
    for layer, vector in found.vectors.items():
        assert_no_worse(vector, alone[layer], truth[layer])
    assert found.adapter.config == SteerConfig("vector", layers=[0, 2], scale=-0.5)
    assert [row.layer for row in found.layers] == list(range(LAYERS))
    for row in found.layers:
        lengths = states[0][row.layer].norm(dim=1)
        assert row.norm == pytest.approx(float(truth[row.layer].norm()))
        assert row.share == pytest.approx(row.norm / float(lengths.sort().values[(len(lengths) - 1) // 2]))
    write_adapter(tmp_path, found.adapter)
    assert read_adapter(tmp_path).config == found.adapter.config
    model, other = patch_model(build(), tmp_path), patch_model(build())
    other.steering.add_vector("same", found.vectors, scale=-0.5)
    other.steering.use("same")
    assert torch.equal(logits(model), logits(other))


def test_extraction_normalised_and_held_out():
    sides = [batches(rows(seed), 1) for seed in (0, 1)]
    states = [hidden_states(build(), side, "last") for side in sides]
    found = extract(build(), *sides, normalise=True, held_out=0.25)
    assert (found.texts, found.held_out) == ((9, 9), (3, 3)) and extract(build(), *sides).held_out == (0, 0)
    for row in found.layers:
        vector = direction(*(side[row.layer, :9] for side in states), "mean")
        assert torch.equal(found.vectors[row.layer], (vector / vector.norm()).float())
        assert row.norm == float(vector.norm())
        expected = separation(*(side[row.layer, 9:] for side in states), vector)
        assert (row.d, row.auc) == (expected.d, expected.auc)
        assert row.d != separation(*(side[row.layer] for side in states), vector).d


def test_extraction_leaves_the_model_as_it_was():
    model = build().train()
    model.model.layers[1].eval()
    before = snapshot(model)
    modes = [module.training for module in model.modules()]
    extract(model, batches(rows(0)), batches(rows(1)))
    assert snapshot(model) == before and modes == [module.training for module in model.modules()]


def test_extraction_of_a_steered_model_is_that_of_its_base():
    model = patch_model(build())
    randomize(model)
    steered = logits(model)
    found = extract(model, batches(rows(0)), batches(rows(1)))
    plain = extract(build_frozen(), batches(rows(0)), batches(rows(1)))
    assert all(torch.equal(found.vectors[i], plain.vectors[i]) for i in range(LAYERS))
    assert torch.equal(logits(model), steered)


def test_extraction_of_two_sets_of_different_sizes():
    found = extract(build(), batches(rows(0)), batches(rows(1, 7)), paired=False, held_out=0.3)
    assert (found.texts, found.held_out) == ((9, 5), (3, 2))
    sides = rows(0)[:9], rows(1, 7)[:5]
    truth, plain = (
        states[0].mean(1) - states[1].mean(1)
        for states in ([of(side, "last") for side in sides] for of in (each_alone, alone_in_32))
    )
    assert_no_worse(torch.stack([found.vectors[i] for i in range(LAYERS)]), plain, truth)


def test_extraction_refusals():
    model = build()
    sides = batches(rows(0)), batches(rows(1))

    def refuses(*parts, sides=sides, **options):
        with refused(ValueError, *parts, model=model):
            extract(model, *sides, **options)

    refuses("method is 'median'; expected one of mean, pca, pca-center", method="median")
    refuses("method is 'pca' for two sets of texts; expected 'mean', or pairs", method="pca", paired=False)
    refuses("token is 'first'; expected one of last, mean", token="first")
    refuses("token is 3; expected one of last, mean", token=3)
    refuses("positive is empty; expected batches", sides=([], []))
    refuses("negative is empty; expected batches", sides=(sides[0], []))
    padding = [{**sides[1][0], "attention_mask": sides[1][0]["attention_mask"].clone()}]
    padding[0]["attention_mask"][1] = 0
    for token in ("last", "mean"):
        told = "negative has a text whose attention_mask is all 0; expected at least one token"
        refuses(told, sides=(sides[0], padding), token=token, paired=False)
    uneven = [{**sides[0][0], "attention_mask": torch.ones(2, 3)}]
    refuses("attention_mask (2, 3); expected batches", sides=(uneven, sides[1]))
    for given, part in (
        (["good"], "positive has a str"),
        ("good", "positive is a str"),
        (sides[0][0], "positive is a dict"),
        ([{"input_ids": tokens()}], "positive has a batch of input_ids"),
    ):
        with refused(TypeError, part, "expected batches with tensors input_ids and attention_mask", model=model):
            extract(model, given, sides[1])
    for name in ("normalise", "paired"):
        with refused(TypeError, f"{name} is 'no'; expected True or False", model=model):
            extract(model, *sides, **{name: "no"})
    with refused(TypeError, "held out is 'x'; expected a number", model=model):
        extract(model, *sides, held_out="x")
    refuses("held out is 1.0", held_out=1.0)
    refuses(f"layers has {LAYERS}; expected indices below {LAYERS}", layers=[LAYERS])
    refuses("12 positive and 7 negative texts; expected pairs", sides=(sides[0], batches(rows(1, 7))))
    refuses("no direction by 'mean'", sides=(sides[0], sides[0]))
    refuses("no direction by 'pca'", sides=(batches(rows(0, 1)), batches(rows(1, 1))), method="pca")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
    refuses("hidden states are NaN or infinite")


# ------------------------------------------------------------------------- the packages themselves, where installed

TEXTS = [("what a good day", "what a bad day"), ("i am glad", "i am sad!"), ("yes, please", "no!"), ("ok", "not ok")]


def missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


def compare_with(theirs: dict[int, Tensor], method: str) -> None:
    """Assert that our vectors are at least as near to the float64 truth as another package's, in each layer."""
    ids = [[tokenizer()(text)["input_ids"] for text in side] for side in zip(*TEXTS, strict=True)]
    found = extract(build(), *map(batches, ids), method=method)
    states = [each_alone(side, "last") for side in ids]
    layers = sorted(theirs)
    truth = torch.stack([direction(states[0][i], states[1][i], method) for i in layers])
    assert_no_worse(*(torch.stack([vectors[i] for i in layers]) for vectors in (found.vectors, theirs)), truth)
    assert difference(torch.stack([theirs[i] for i in layers]), truth)[""] < 0.001, "they compute something else"


@pytest.mark.skipif(missing("repeng"), reason="compares with repeng; pip install --no-deps repeng scikit-learn")
@pytest.mark.parametrize("method", ["pca", "pca-center"])
def test_extraction_equals_repengs_own(method, monkeypatch):
    """repeng itself. It reads the last layer after the final norm, so that layer is left out."""
    monkeypatch.setattr(np, "float_", np.float64, raising=False)  # repeng 0.4.0 names it, NumPy 2 removed it
    from repeng.extract import DatasetEntry, read_representations

    encoder = tokenizer()
    encoder.padding_side = "right"
    entries, theirs = [DatasetEntry(*pair) for pair in TEXTS], {"pca": "pca_diff", "pca-center": "pca_center"}[method]
    vectors = read_representations(build(), encoder, entries, range(LAYERS - 1), batch_size=3, method=theirs)
    assert sorted(vectors) == list(range(LAYERS - 1))
    compare_with({layer: torch.from_numpy(vector) for layer, vector in vectors.items()}, method)


@pytest.mark.skipif(missing("steering_vectors"), reason="compares with steering-vectors; pip install --no-deps it")
def test_extraction_equals_steering_vectors_own():
    """The package steering-vectors computes contrastive activation addition (CAA)."""
    from steering_vectors import train_steering_vector

    vectors = train_steering_vector(build(), tokenizer(), TEXTS, batch_size=1).layer_activations
    assert sorted(vectors) == list(range(LAYERS))
    compare_with(vectors, "mean")
