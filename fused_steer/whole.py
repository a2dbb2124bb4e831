"""save_pretrained of a patched model: the whole model as transformers writes it, and the steering adapters beside it.

What transformers writes has the steering's parameters among the weights, from which its Trainer resumes, but not what
they compute: `from_pretrained` passes them over and gives the base model. So the adapter in use is written beside, as
`steering.save` writes one. `patch_model(model, directory)` reads it there, and `from_pretrained(directory)` itself does
once `fused_steer.peft` is imported, through PEFT.

A model that PEFT has wrapped is saved by PEFT, without the steering; where that loses it, there is a warning.
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
from .adapters.files import CHECKPOINT_FOLDER, AdapterFile, refuse_foreign, write_adapter

_NAME = "save_pretrained"
#: Of a model in one file. In a folder without it, transformers' Trainer takes adapter files for all that there is.
_ONE_FILE = "model.safetensors"


class Adapters(Protocol):
    """The part of `Steering` that is needed here."""

    @property
    def active(self) -> str | None: ...

    def files(self, state: Mapping[str, Tensor] | None) -> dict[str, AdapterFile]: ...


class SavePretrained:
    """`model.save_pretrained` while the model is patched; the signature is that of transformers'."""

    def __init__(self, model: Any, steering: Adapters) -> None:
        self.model, self.steering = model, steering
        self.earlier = vars(model).get(_NAME)  # another library may have put one on the instance

    @property
    def __wrapped__(self) -> Any:
        return self.earlier or getattr(type(self.model), _NAME).__get__(self.model)

    def install(self) -> None:
        setattr(self.model, _NAME, self)

    def remove(self) -> None:
        """Leave `model.save_pretrained` as it was; one that was put in its place since stays."""
        if vars(self.model).get(_NAME) is self:
            delattr(self.model, _NAME)
            if self.earlier is not None:
                setattr(self.model, _NAME, self.earlier)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Write the whole model as transformers does, then the adapters.

        The adapter in use lies in the directory itself, if the weights are one file there and no LoRA lies there
        instead. If not, or if there are several adapters, each lies in `fused_steer/<name>/`.

        Raises:
            ValueError: an adapter cannot be saved (see `Steering.save`), or another method's lies in the directory;
                nothing is written then.
        """
        signature = inspect.signature(getattr(type(self.model), _NAME))
        given = dict(signature.bind(self.model, *args, **kwargs).arguments)
        given.pop("self")
        options = given.pop("kwargs", {})
        push = given.pop("push_to_hub", False)
        target = Path(given["save_directory"])
        beside_lora = getattr(self.model, "_hf_peft_config_loaded", False)
        if not beside_lora:
            refuse_foreign(target)
        files = self.steering.files(given.get("state_dict"))
        self.__wrapped__(**given, **({} if push else options))
        if given.get("is_main_process", is_first()):
            self._write(target, files, not beside_lora and (target / _ONE_FILE).is_file())
            if push:  # by way of another folder, as transformers uploads nothing that was written after its own files
                hub = {name: given[name] for name in ("token", "max_shard_size") if name in given}
                self.model.push_to_hub(options.pop("repo_id", target.name), **hub, **options)

    def _write(self, target: Path, files: Mapping[str, AdapterFile], at_top: bool) -> None:
        active = files.get(str(self.steering.active)) if at_top else None
        if active is None or len(files) > 1:
            for name, file in files.items():
                write_adapter(target / CHECKPOINT_FOLDER / name, file)
        if active is not None:
            write_adapter(target, active)
            if importlib.util.find_spec("peft") is not None:
                with contextlib.suppress(ImportError):  # of a version that our method is not made for
                    from . import peft  # noqa: F401  (from_pretrained knows the method from then on)


def saving_of(given: Any, model: Any, steering: Adapters) -> SavePretrained | PeftCheckpoints | None:
    """What is put around the saving of a patched model, `model`, which may be inside one of PEFT's, `given`."""
    if not hasattr(given, _NAME):
        return None
    return SavePretrained(model, steering) if given is model else PeftCheckpoints(given, steering)


class PeftCheckpoints:
    """Warnings where a Trainer's checkpoint of a model that PEFT has wrapped lacks the steering, or is loaded without.

    PEFT saves and loads its own adapters alone. `SteeringTrainer` and `SteeringCallback` answer for the steering.
    """

    def __init__(self, model: Any, steering: Adapters) -> None:
        self.watched = {name: _Watched(model, steering, name, says) for name, says in _WARNINGS.items()}

    def install(self) -> None:
        for name, watched in self.watched.items():
            setattr(watched.model, name, watched)

    def remove(self) -> None:
        for name, watched in self.watched.items():
            if vars(watched.model).get(name) is watched:
                delattr(watched.model, name)


_WARNINGS = {
    _NAME: "{} gets PEFT's adapters without the steering adapter {!r}",
    "load_adapter": "PEFT's adapters are loaded from {}, and the steering adapter {!r} stays as it is",
}


class _Watched:
    """A method of a PeftModel that warns where a Trainer calls it that does not answer for the steering."""

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


def _trainer_forgets_steering() -> bool:
    """Whether one of transformers' Trainers is at work, and neither it nor a callback of it keeps the steering.

    PEFT's methods are not told who calls them. A callback hears of checkpoints, not of `trainer.save_model`.
    """
    transformers = sys.modules.get("transformers.trainer")
    if transformers is None:
        return False
    trainer, entered = None, set()
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), transformers.Trainer):
            trainer = frame.f_locals["self"]
            entered.add(frame.f_code.co_name)
        frame = frame.f_back
    if trainer is None or getattr(trainer, "keeps_steering", False):
        return False
    told = "train" in entered  # checkpoints are written, and read, while it trains
    return not (told and any(getattr(one, "keeps_steering", False) for one in trainer.callback_handler.callbacks))
