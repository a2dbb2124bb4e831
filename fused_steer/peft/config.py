"""PostBlockConfig: the PEFT config of a steering adapter."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Optional

from .._requirements import warn_untried
from .._version import __version__
from ..adapters.files import (
    CONFIG_NAME,
    PEFT_TYPE,
    WEIGHTS_NAME,
    check_config,
    fields_digest,
    peft_weights_digest,
    read_with_heads,
    sealed,
)
from ..adapters.parameters import SITE
from ..config import SteerConfig

warn_untried("peft")

from peft import PeftConfig  # noqa: E402
from peft.utils import PeftType  # noqa: E402


def _add_peft_type() -> PeftType:
    """Add and return PeftType.POST_BLOCK. PEFT finds a method by this enumeration and has no function to extend it."""
    member = str.__new__(PeftType, PEFT_TYPE)
    member._name_, member._value_ = PEFT_TYPE, PEFT_TYPE
    PeftType._member_names_.append(PEFT_TYPE)
    PeftType._member_map_[PEFT_TYPE] = member
    PeftType._value2member_map_[PEFT_TYPE] = member
    type.__setattr__(PeftType, PEFT_TYPE, member)
    return member


POST_BLOCK: PeftType = getattr(PeftType, PEFT_TYPE, None) or _add_peft_type()


@dataclass
class PostBlockConfig(PeftConfig):
    """A steering adapter's PEFT config. Fields named as in `SteerConfig` mean the same.

    The fields about orthogonality to a LoRA are read from files only. To train with that constraint, use `patch_model`.
    `hidden_size` and `num_layers` are the sizes of the adapter's model, set when it is added to one.

    Args:
        r: the rank. `rank`, its name in adapter files, is the same.
        modules_to_save: names of modules that train and are saved beside the adapter, as in PEFT. None means the heads
            that were not loaded from a checkpoint (of a classifier, a reward model, a question answerer).

    Raises:
        TypeError: an unknown field, or a value of the wrong type.
        ValueError: a value out of range.
    """

    r: Optional[int] = None  # noqa: UP045  (PEFT's own parser of its configs reads these)
    form: str = "lowrank"
    activation: Optional[str] = None  # noqa: UP045
    layers: Optional[list[int]] = None  # noqa: UP045
    site: str = SITE
    scale: float = 1.0
    down_bias: Optional[bool] = None  # noqa: UP045
    up_bias: Optional[bool] = None  # noqa: UP045
    init_scale: float = 1.0
    dtype: str = "float32"
    orthogonal_to: Optional[str] = None  # noqa: UP045
    orthogonal_modules: str = "mlp"
    positions: str = "all"
    hidden_size: Optional[int] = None  # noqa: UP045
    num_layers: Optional[int] = None  # noqa: UP045
    rank: Optional[int] = None  # noqa: UP045
    modules_to_save: Optional[list[str]] = None  # noqa: UP045
    fused_steer_version: Optional[str] = None  # noqa: UP045
    weights_sha256: Optional[str] = None  # noqa: UP045
    tensors_sha256: Optional[str] = None  # noqa: UP045
    config_sha256: Optional[str] = None  # noqa: UP045

    #: PEFT matches modules by this name. The sites are put into the layers before it looks.
    target_modules: ClassVar[str] = SITE

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = POST_BLOCK
        if self.r is not None and self.rank is not None and self.r != self.rank:
            raise ValueError(f"r is {self.r} and rank is {self.rank}; expected one of them, or the same")
        self.rank = self.r if self.rank is None else self.rank
        if self.steer_config().sites != (SITE,):
            raise ValueError(f"site is {self.site!r}; expected {SITE!r}, PEFT's only site (patch_model has others)")
        self._take(self.steer_config())
        modules = self.modules_to_save
        if modules is None and self.fused_steer_version is not None:
            modules = []  # a file names every saved module
        if modules is not None:
            if not isinstance(modules, (list, tuple, set)) or not all(isinstance(n, str) and n for n in modules):
                raise TypeError(f"modules_to_save is {modules!r:.200}; expected a list of names")
            self.modules_to_save = list(modules)  # a copy, because PEFT adds the names of heads to it
        #: The modules beside the adapter in its file, without the heads that PEFT adds to `modules_to_save`.
        self.modules_in_file = list(modules or ())
        self._check_digest()

    def _take(self, steer: SteerConfig) -> None:
        for field in dataclasses.fields(SteerConfig):
            setattr(self, field.name, getattr(steer, field.name))
        self.r = self.rank
        self.layers = None if steer.layers is None else list(steer.layers)

    def _check_digest(self) -> None:
        """Check that a file's fields are unchanged since saving. Then drop the digests, because fields may change."""
        digests = {name: getattr(self, name) for name in ("tensors_sha256", "weights_sha256") if getattr(self, name)}
        fields = {**self.to_dict(), "fused_steer_version": self.fused_steer_version, **digests}
        if self.config_sha256 is not None and self.config_sha256 != fields_digest(fields):
            raise ValueError(
                f"the config's fields were changed after saving; expected config_sha256 {self.config_sha256} (remove "
                "that line if you edited the config on purpose)"
            )
        self.tensors_sha256 = self.weights_sha256 = self.config_sha256 = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """Load a config as PEFT does, and check the weights beside it before PEFT changes a model.

        Raises:
            ValueError: a file is broken, or the weights have values that are not finite or overflow float32.
        """
        folder = folder_of(pretrained_model_name_or_path, subfolder, cls._split_kwargs(kwargs)[0])
        file = None
        if (folder / CONFIG_NAME).exists():
            if (folder / WEIGHTS_NAME).exists():
                file, _ = read_with_heads(folder)
            else:
                check_config(folder)
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        if file is not None:  # the config inside the weights file is valid even if several processes save at once
            config._take(file.config)
            config.hidden_size, config.num_layers = file.layout.hidden, file.layout.num_layers
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the config as PEFT does. The digests of the tensors and the weights are valid for this save only."""
        if self.tensors_sha256 is not None:  # PEFT has written the weights before
            modules = self.modules_to_save or ()
            self.weights_sha256 = peft_weights_digest(Path(save_directory), self.tensors_sha256, modules)
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.tensors_sha256 = self.weights_sha256 = None

    def steer_config(self) -> SteerConfig:
        """Return the same settings as a SteerConfig."""
        return SteerConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(SteerConfig)})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as both libraries' files hold them. While tensors are being saved, digests are added."""
        peft = {field.name: getattr(self, field.name) for field in dataclasses.fields(PeftConfig)}
        sizes = {"hidden_size": self.hidden_size, "num_layers": self.num_layers}
        fields = {**peft, **sizes, **self.steer_config().to_dict(), "fused_steer_version": __version__}
        if self.modules_to_save:
            fields["modules_to_save"] = sorted(set(self.modules_to_save))
        if self.tensors_sha256 is None:
            return fields
        weights = {} if self.weights_sha256 is None else {"weights_sha256": self.weights_sha256}
        return sealed({**fields, "tensors_sha256": self.tensors_sha256, **weights})


def folder_of(repo_id: str, subfolder: str | None, options: dict[str, Any]) -> Path:
    """Return the local folder of an adapter, by its path or hub id. If there is none, return a missing folder, and PEFT
    raises.

    Args:
        options: arguments of `huggingface_hub.hf_hub_download`.
    """
    folder = Path(repo_id, subfolder or "")
    if folder.is_dir():
        return folder
    from huggingface_hub import hf_hub_download

    for name in (CONFIG_NAME, WEIGHTS_NAME):
        with contextlib.suppress(Exception):
            folder = Path(hf_hub_download(repo_id, name, subfolder=subfolder, **options)).parent
    return folder


def _named_fields(config: type[PostBlockConfig]) -> type[PostBlockConfig]:
    """Make the config refuse unknown fields. PEFT would drop them and load an adapter that computes something else."""
    init = config.__init__

    def __init__(self: PostBlockConfig, *args: Any, **fields: Any) -> None:
        known = [field.name for field in dataclasses.fields(config)]
        unknown = sorted(fields.keys() - set(known))
        if unknown:
            written = fields.get("fused_steer_version")
            by = f" (written by fused-steer {written}, this is {__version__})" if written else ""
            raise TypeError(f"PostBlockConfig has no field {', '.join(map(repr, unknown))}{by}; expected {known}")
        init(self, *args, **fields)

    config.__init__ = __init__  # type: ignore[method-assign]
    return config


_named_fields(PostBlockConfig)
