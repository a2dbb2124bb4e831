"""TRL's trainers for patched models: checkpoints hold adapters, and the reference is the base model.

For a plain model TRL loads a second copy as the reference. For a PEFT model it disables PEFT's adapters, but would
leave the steering on. Here the reference is the same model without steering and LoRA, so there is no copy.
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
    """The base model inside a patched model: it shares the parameters and runs without steering and LoRA."""

    def __init__(self, model: nn.Module) -> None:
        """Raise ValueError if `model` is not patched."""
        super().__init__()
        steering_of(model)
        self.model: Any = model
        self.config = model.config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # TRL replaces `forward` of each model by its own. The patched model's forward has to run instead.
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
    """TRL's DPOTrainer with the checkpoints of `SteeringTrainer`. The default reference is the base model."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        *rest: Any,
        **kw: Any,
    ) -> None:
        """Raise ValueError if `model` is not patched, or if the reference would follow the model."""
        steering_of(model)
        if ref_model is None:
            _check_reference_stays(args)
            reference: Any = Reference(model)  # TRL treats it like any other module
        else:
            reference = ref_model
        super().__init__(model, reference, args, *rest, **kw)


class SteeringGRPOTrainer(SteeringTrainer, GRPOTrainer):
    """TRL's GRPOTrainer with the checkpoints of `SteeringTrainer`. With `beta` > 0 the reference is the base model."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *rest: Any,
        **kw: Any,
    ) -> None:
        """Raise ValueError if `model` is not patched, the reference would follow the model, or vLLM would generate.

        vLLM would generate without the steering.
        """
        steering_of(model)
        _check_reference_stays(args)
        if args is not None and args.use_vllm:
            raise ValueError("use_vllm is True; expected False: vLLM would generate without the steering")
        beta = 0.0 if args is None else args.beta
        if args is not None:
            args.beta = 0.0  # for any other value TRL loads its own reference
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
        raise ValueError(
            "sync_ref_model is True; expected False: the reference is the base model, which does not change"
        )
