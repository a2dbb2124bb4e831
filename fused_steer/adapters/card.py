"""Model cards of adapters: what it is, how to load it, and how it was trained."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .._version import __version__
from ..config import SteerConfig
from .files import AdapterFile
from .locating import HUB_ID
from .parameters import SITE

CARD_NAME = "README.md"
LIBRARY, CARD_TAGS = "fused-steer", ("fused-steer", "post-block-steering", "arxiv:2603.00425")


@dataclass(frozen=True)
class Training:
    """How an adapter was trained, for its model card. `training_of` takes it from a Trainer.

    Attributes:
        hyperparameters: the training's settings, by name.
        data: the data sets, by their use, such as {"training": "1,000 rows of org/name"}.
        evaluation: the metrics of each evaluation, in order, each with "step" and perhaps "epoch".
        trained: the number of trained steering parameters, or None.
        versions: the versions of the libraries, by name.
    """

    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    evaluation: Sequence[Mapping[str, float]] = ()
    trained: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


def model_card(adapter: AdapterFile, repo_id: str, training: Training | None = None) -> str:
    """Return the README.md of an adapter on the hub: searchable metadata, both ways of loading, and the training."""
    from huggingface_hub import ModelCardData

    # The hub refuses a path as the name of a base model.
    name = adapter.layout.base
    base = name if HUB_ID.fullmatch(name) and not os.path.exists(name) else None
    relation: dict[str, Any] = {"base_model_relation": "adapter"} if base else {}
    data = ModelCardData(
        base_model=base,
        library_name=LIBRARY,
        pipeline_tag="text-generation",
        tags=list(CARD_TAGS),
        **relation,
    )
    sections = [card_usage(repo_id, base, adapter.config), card_config(adapter.config)]
    if training is not None:
        sections.append(card_training(training))
    return f"---\n{data.to_yaml()}\n---\n\n# {repo_id.rpartition('/')[2]}\n\n" + "\n".join(sections)


def card_usage(repo_id: str, base: str | None, config: SteerConfig) -> str:
    """Return the part of a model card that tells what the adapter is and how to load it."""
    only_post_block = config.sites == (SITE,)
    at = "" if only_post_block else f", for the sites {', '.join(config.sites)} of each layer"
    usage = (
        "A post-block steering adapter ([arXiv 2603.00425](https://arxiv.org/abs/2603.00425)) of "
        f"{f'[{base}](https://huggingface.co/{base})' if base else 'a language model'}, made with fused-steer "
        f"{__version__}{at}.\n\n```python\nfrom fused_steer import patch_model\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({base or 'BASE_MODEL'!r})\n"
        f"model = patch_model(model, {repo_id!r})\n```\n"
    )
    if not only_post_block:  # PEFT has no other site
        return usage
    return (
        f"{usage}\nPEFT loads it too, once `fused_steer.peft` is imported, which makes the method known:\n\n"
        "```python\nimport fused_steer.peft\nfrom peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({base or 'BASE_MODEL'!r})\n"
        f"model = PeftModel.from_pretrained(model, {repo_id!r})\n```\n"
    )


def card_config(config: SteerConfig) -> str:
    """Return the table of an adapter's fields."""
    return _table(("field", "value"), [(f"`{name}`", f"`{value!r}`") for name, value in config.to_dict().items()])


def card_training(training: Training, hyperparameters: bool = True) -> str:
    """Return the part of a model card on the training: hyper-parameters, data, evaluation, versions.

    Args:
        hyperparameters: whether to list the hyper-parameters, which Trainer's own cards have already.
    """
    parts = []
    if hyperparameters and training.hyperparameters:
        rows = [(f"`{name}`", f"`{_plain(value)}`") for name, value in training.hyperparameters.items()]
        parts.append("## Hyper-parameters\n\n" + _table(("name", "value"), rows))
    if training.trained is not None:
        parts.append(f"{training.trained:,} steering parameters were trained.\n")
    if training.data:
        lines = "\n".join(f"- {use}: {_plain(what)}" for use, what in training.data.items())
        parts.append(f"## Data\n\n{lines}\n")
    if training.evaluation:
        names = list(dict.fromkeys(name for metrics in training.evaluation for name in metrics))
        scores = [[_number(metrics.get(name)) for name in names] for metrics in training.evaluation]
        parts.append("## Evaluation\n\n" + _table(names, scores))
    if training.versions:
        told = ", ".join(f"{name} {version}" for name, version in training.versions.items())
        parts.append(f"Trained with {told}.\n")
    return "\n".join(parts)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _plain(value: Any) -> str:
    """Return a value as text that stays in its cell or line."""
    return " ".join(str(value).split()).replace("|", "\\|")
