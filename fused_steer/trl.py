"""TRL's trainers of a patched model: checkpoints that hold adapters, and the base model as the reference.

TRL takes the reference of a model that is not PEFT's from where the model came from, and loads it a second time; of
PEFT's models it switches PEFT's adapters off and would leave the steering on. Here the reference is the model itself
without steering and LoRA: no copy.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from torch import nn

from ._requirements import warn_untried

warn_untried("trl")

from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTTrainer  # noqa: E402

from .joint import steering_of  # noqa: E402
from .model.decoder import inside_peft  # noqa: E402
from .trainer import SteeringTrainer  # noqa: E402

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class Reference(nn.Module):
    """The base model within a patched one, as a model of its own: the same parameters, steering and LoRA off."""

    def __init__(self, model: nn.Module) -> None:
        """Raises ValueError if `model` is not patched."""
        super().__init__()
        steering_of(model)
        self.model: Any = model
        self.config = model.config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Instead of forward, which TRL replaces on each model by its own; that of the patched model is the one to run.
        with contextlib.ExitStack() as stack:
            stack.enter_context(steering_of(self.model).disabled())
            if inside_peft(self.model) is not self.model:
                stack.enter_context(self.model.disable_adapter())
            return self.model(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self(*args, **kwargs)


class SteeringSFTTrainer(SteeringTrainer, SFTTrainer):
    """TRL's SFTTrainer with the checkpoints of `SteeringTrainer`."""


class SteeringDPOTrainer(SteeringTrainer, DPOTrainer):
    """TRL's DPOTrainer: the checkpoints of `SteeringTrainer`, and the base model as the reference if none is given."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        *rest: Any,
        **kw: Any,
    ) -> None:
        """Raises ValueError if `model` is not patched, or the reference is to follow the model."""
        steering_of(model)
        if ref_model is None:
            _check_reference_stays(args)
            reference: Any = Reference(model)  # a module like any other to TRL
        else:
            reference = ref_model
        super().__init__(model, reference, args, *rest, **kw)


class SteeringGRPOTrainer(SteeringTrainer, GRPOTrainer):
    """TRL's GRPOTrainer: the checkpoints of `SteeringTrainer`, and for `beta` > 0 the base model as the reference."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *rest: Any,
        **kw: Any,
    ) -> None:
        """Raises ValueError if `model` is not patched, the reference is to follow the model, or vLLM, which does not
        know of the steering, is to generate."""
        steering_of(model)
        _check_reference_stays(args)
        if args is not None and args.use_vllm:
            raise ValueError("use_vllm is True; expected False: vLLM would generate without the steering")
        beta = 0.0 if args is None else args.beta
        if args is not None:
            args.beta = 0.0  # for any other TRL loads a reference of its own
        try:
            super().__init__(model, reward_funcs, args, *rest, **kw)
        finally:
            if args is not None:
                args.beta = beta
        self.beta = beta
        if beta:
            patched: Any = self.model
            reference: Any = Reference(patched)
            self.ref_model = reference


def _check_reference_stays(args: Any) -> None:
    if args is not None and args.sync_ref_model:
        raise ValueError("sync_ref_model is True; expected False: the reference is the base model, which stays")
