"""`save_pretrained` of a patched model: writes the model as transformers does, with the steering adapters beside it.

transformers writes the steering's parameters among the weights, and its Trainer resumes from them. But
`from_pretrained` ignores them and returns the base model. So the adapter in use is also written as `steering.save`
writes it. `patch_model(model, directory)` reads it there. `from_pretrained(directory)` reads it too, through PEFT, once
`fused_steer.peft` is imported.

A model wrapped by PEFT is saved by PEFT, without the steering. If that loses the steering, there is a warning.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from .adapters.distributed import is_first
from .adapters.files import AdapterFile, refuse_foreign, write_adapter
from .adapters.kinds import CHECKPOINT_FOLDER, CONFIG_NAME, PEFT_TYPE, WEIGHTS_NAME, method_in
from .adapters.parameters import SITE
from .adapters.saving import target_folder
from .model.weak import Weakly, what_is_left

_NAME = "save_pretrained"
#: The file of an unsharded model. Without it, transformers' Trainer takes adapter files for the whole checkpoint.
_ONE_FILE = "model.safetensors"


class Adapters(Protocol):
    """The part of `Steering` that this file needs."""

    @property
    def active(self) -> str | None: ...

    def files(self, state: Mapping[str, Tensor] | None) -> dict[str, AdapterFile]: ...


class SavePretrained:
    """The `save_pretrained` of a patched model, with transformers' signature."""

    model = Weakly[Any]()
    steering = Weakly[Adapters]()

    def __init__(self, model: Any, steering: Adapters) -> None:
        self.model, self.steering = model, steering
        self.earlier = vars(model).get(_NAME)  # another library may have set one on the instance

    @property
    def __wrapped__(self) -> Any:
        return self.earlier or getattr(type(self.model), _NAME).__get__(self.model)

    def install(self) -> None:
        setattr(self.model, _NAME, self)

    def remove(self) -> None:
        """Restore `model.save_pretrained`, unless another library has replaced it since."""
        model = what_is_left(self, "model")  # deleted, if somebody keeps its decoder alone
        if model is not None and vars(model).get(_NAME) is self:
            delattr(model, _NAME)
            if self.earlier is not None:
                setattr(model, _NAME, self.earlier)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Write the whole model as transformers does, then the adapters.

        The adapter in use is written to the directory itself if the weights are one file, no LoRA is there, and its
        only site is post_block. Otherwise, or if there are several adapters, each is written to `fused_steer/<name>/`.
        Steering of an earlier save in the directory itself is replaced, or removed.

        Raises:
            ValueError: an adapter cannot be saved (see `Steering.save`), or the directory holds another method's
                adapter. Nothing is written.
        """
        signature = inspect.signature(getattr(type(self.model), _NAME))
        given = dict(signature.bind(self.model, *args, **kwargs).arguments)
        given.pop("self")
        options = given.pop("kwargs", {})
        push = given.pop("push_to_hub", False)
        target = target_folder(given["save_directory"], "the model").absolute()
        beside_lora = getattr(self.model, "_hf_peft_config_loaded", False)
        if not beside_lora:
            refuse_foreign(target)
        files = self.steering.files(given.get("state_dict"))
        self.__wrapped__(**given, **({} if push else options))
        if given.get("is_main_process", is_first()):
            self._write(target, files, not beside_lora and (target / _ONE_FILE).is_file())
            if push:  # from another folder, because transformers uploads nothing written after its own files
                hub = {name: given[name] for name in ("token", "max_shard_size") if name in given}
                self.model.push_to_hub(options.pop("repo_id", target.name), **hub, **options)

    def _write(self, target: Path, files: Mapping[str, AdapterFile], at_top: bool) -> None:
        active = files.get(str(self.steering.active)) if at_top else None
        if active is not None and active.config.sites != (SITE,):
            active = None  # from_pretrained would have it read by PEFT, which has no other site
        if active is None or len(files) > 1:
            for name, file in files.items():
                write_adapter(target / CHECKPOINT_FOLDER / name, file)
        if active is not None:
            write_adapter(target, active)
            if importlib.util.find_spec("peft") is not None:
                with contextlib.suppress(ImportError):  # raised for an untried version of PEFT
                    from . import peft  # noqa: F401  (registers the method for from_pretrained)
        elif files and method_in(target) == PEFT_TYPE:
            # patch_model and from_pretrained would take it for this save's.
            for name in (CONFIG_NAME, WEIGHTS_NAME):
                (target / name).unlink(missing_ok=True)


def saving_of(given: Any, model: Any, decoder: Any, steering: Adapters) -> list[SavePretrained | PeftCheckpoints]:
    """Return the replacements of a patched model's saving methods.

    Args:
        given: the model, or PEFT's wrapper around it. The model in a wrapper has a replacement, too:
            `merge_and_unload` takes it out.
        model: the model.
        decoder: its decoder. It has one, too, and so has each model between them: it can be saved without its head.
        steering: the model's steering.
    """
    around = [module for module in model.modules() if any(part is decoder for part in module.modules())]
    found: list[SavePretrained | PeftCheckpoints] = [SavePretrained(m, steering) for m in around if hasattr(m, _NAME)]
    return found if given is model else [*found, PeftCheckpoints(given, steering)]


class PeftCheckpoints:
    """Warns if a Trainer saves or loads a PEFT-wrapped model without its steering.

    PEFT saves and loads only its own adapters. `SteeringTrainer` and `SteeringCallback` handle the steering.
    """

    def __init__(self, model: Any, steering: Adapters) -> None:
        self.watched = {name: _Watched(model, steering, name, says) for name, says in _WARNINGS.items()}

    def install(self) -> None:
        for name, watched in self.watched.items():
            setattr(watched.model, name, watched)

    def remove(self) -> None:
        for name, watched in self.watched.items():
            model = what_is_left(watched, "model")  # deleted after `merge_and_unload`
            if model is not None and vars(model).get(name) is watched:
                delattr(model, name)


_WARNINGS = {
    _NAME: "{} gets PEFT's adapters without the steering adapter {!r}",
    "load_adapter": "PEFT's adapters are loaded from {}, and the steering adapter {!r} stays as it is",
}


class _Watched:
    """A method of a PeftModel that warns if a Trainer calls it and nothing handles the steering."""

    model = Weakly[Any]()
    steering = Weakly[Adapters]()

    def __init__(self, model: Any, steering: Adapters, name: str, says: str) -> None:
        self.model, self.steering, self.name, self.says = model, steering, name, says

    @property
    def __wrapped__(self) -> Any:
        return getattr(type(self.model), self.name).__get__(self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.steering.active is not None and _trainer_forgets_steering():
            place = args[0] if args else next(iter(kwargs.values()), "")
            warnings.warn(
                f"{self.says.format(place, self.steering.active)}; expected SteeringCallback() among the Trainer's "
                "callbacks, or a SteeringTrainer",
                stacklevel=2,
            )
        return self.__wrapped__(*args, **kwargs)


def running_trainer() -> tuple[Any, set[str]]:
    """Return the Trainer of transformers that runs in this thread, or None, and the names of its methods that run.

    PEFT's methods and a Trainer's callbacks are not told who calls them.
    """
    transformers = sys.modules.get("transformers.trainer")
    trainer, entered = None, set()
    frame = None if transformers is None else inspect.currentframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), transformers.Trainer):  # type: ignore[union-attr]
            trainer = frame.f_locals["self"]
            entered.add(frame.f_code.co_name)
        frame = frame.f_back
    return trainer, entered


def _trainer_forgets_steering() -> bool:
    """Return whether a Trainer is running, and neither it nor its callbacks save the steering.

    A callback is called for checkpoints, but not for `trainer.save_model`.
    """
    trainer, entered = running_trainer()
    if trainer is None or getattr(trainer, "keeps_steering", False):
        return False
    told = "train" in entered  # checkpoints are written and read only during training
    return not (told and any(getattr(one, "keeps_steering", False) for one in trainer.callback_handler.callbacks))
