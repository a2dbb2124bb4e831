"""A variant as an adapter's files, and as the body of a request to vLLM."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..adapters.combining import combine_adapters
from ..adapters.files import AdapterFile
from ..config import checked_number
from ..joint import steering_of
from ..positions import read_positions
from ..serving.options import KEY
from ..tools.prompts import Prompt


@dataclass(frozen=True)
class Variant:
    """One way to steer a model.

    Attributes:
        label: its title.
        strengths: the strength of each adapter, instead of the adapter's own. Empty is the base model; several
            adapters are added up.
        positions: the steered tokens, as `Steering.batch` takes them. None means the adapters' own.

    Raises:
        TypeError, ValueError: a strength is no finite number, or there are no such positions.
    """

    label: str
    strengths: Mapping[str, float] = field(default_factory=dict)
    positions: str | None = None

    def __post_init__(self) -> None:
        for name, strength in self.strengths.items():
            checked_number(f"the strength of {name!r}", strength)
        if self.positions is not None:
            object.__setattr__(self, "positions", read_positions(self.positions).name)


def adapter_of(model: Any, variant: Variant) -> AdapterFile:
    """Return the adapter that steers as `variant` does, with its strength and positions in its config.

    Of one adapter any form will do. Several need one activation: see `Steering.combine`.

    Raises:
        KeyError: the model has no such adapter.
        ValueError: the variant is the base model, or its adapters cannot be added up.
    """
    files = steering_of(model).files(None)
    parts: dict[str, tuple[float, AdapterFile]] = {}
    for name, strength in variant.strengths.items():
        if name not in files:
            raise KeyError(f"no adapter {name!r}; expected one of {', '.join(files) or 'none'}")
        file = files[name]
        positions = file.config.positions if variant.positions is None else variant.positions
        parts[name] = (1.0, replace(file, config=replace(file.config, scale=strength, positions=positions)))
    if not parts:
        raise ValueError(f"{variant.label!r} is the base model; expected a variant with an adapter")
    if len(parts) == 1:
        return next(file for _, file in parts.values())
    return combine_adapters(parts)


def request_body(variant: Variant, base: str, prompt: Prompt, **sampling: Any) -> dict[str, Any]:
    """Return the body of an HTTP request to a vLLM server that answers as `variant` does.

    Text is for /v1/completions, messages are for /v1/chat/completions. The server has to know the adapter by the name
    in "model". Of several adapters that is the variant's label: save `adapter_of` and serve it under that name.

    Args:
        base: the base model's name, for a variant without an adapter.
        sampling: further fields, such as max_tokens.
    """
    what = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
    if not variant.strengths:
        return {"model": base, **what, **sampling}
    if len(variant.strengths) > 1:  # the saved sum has the strengths and the positions in its config
        return {"model": variant.label, **what, **sampling}
    ((name, strength),) = variant.strengths.items()
    options: dict[str, Any] = {"scale": strength}
    if variant.positions is not None:
        options["positions"] = variant.positions
    return {"model": name, **what, **sampling, "vllm_xargs": {KEY: json.dumps(options)}}
