"""model.steering: the named adapters of a patched model, their strength, files and report."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .adapters.distributed import first_writes, gather, is_dtensor, is_first, part_of, sharder
from .adapters.files import AdapterFile, AdapterHead, read_adapter, write_adapter
from .adapters.hub import push_adapter
from .adapters.parameters import SITE, Adapter
from .config import DTYPES, SteerConfig, checked_number
from .lora.layers import adapter_parameters, lora_layers
from .lora.orthogonality import Orthogonality, check_carries_lora, check_lora
from .lora.writers import Writer, trace_writers
from .model.decoder import execution_device, find_decoder, inside_peft
from .model.layer import PatchedLayer, SteeringSite
from .model.passes import FEW_TOKENS, Packing, tokens_of
from .model.watch import LayerList, LayerReport, Report
from .serving.batch import Batch, Lock, hold_loaded, running
from .serving.pool import NAME, AdapterPool, checked_size
from .serving.requests import checked_requests
from .serving.slots import Held, Slots
from .whole import SavePretrained

#: What a model with LoRA and steering computes by: both, or one of the two.
MODES = ("both", "lora", "steering")


class Steering:
    """The adapters of one patched model, reached as `model.steering`.

    One adapter at a time is in use: it alone steers, and it alone trains. Inside `batch`, each row has its own.
    """

    def __init__(self, model: nn.Module) -> None:
        """Find the decoder; the model is not touched before an adapter is added."""
        self._given = model
        self._model = model = inside_peft(model)
        self._decoder = find_decoder(model)
        self._patched: dict[int, PatchedLayer] = {}
        self._layers: dict[int, nn.Module] = {}  # the patched ones
        self._configs: dict[str, SteerConfig] = {}
        self._active: str | None = None
        self._orthogonal: dict[str, Orthogonality] = {}  # of the adapters whose config asks for it
        self._disabled = 0
        self._tracing = False
        adapted = {id(parameter) for parameter in adapter_parameters(model)}
        # By place: offloading puts another object there.
        self._requires_grad = [
            (module, name, p.requires_grad)
            for module in model.modules()
            for name, p in module.named_parameters(recurse=False)
            if id(p) not in adapted
        ]
        self._hooks: list[Any] = []
        self._layer_list = LayerList(self._decoder.module, self._decoder.path.rpartition(".")[2])
        self._packing = Packing()
        self._pool: AdapterPool | None = None
        self._batch: Batch | None = None
        self._batch_lock = Lock()
        # PEFT saves a model that it has wrapped by its own means, and never as a whole.
        whole = model is self._given and hasattr(model, "save_pretrained")
        self._save_pretrained = SavePretrained(model, self) if whole else None

    # ------------------------------------------------------------------------------------------------------- adapters

    @property
    def names(self) -> list[str]:
        """The adapters, in the order in which they came."""
        return list(self._configs)

    @property
    def active(self) -> str | None:
        """The adapter in use."""
        return self._active

    def config(self, name: str | None = None) -> SteerConfig:
        """The config of an adapter (default: the one in use), with its present strength."""
        return self._configs[self._known(name)]

    @torch.inference_mode(False)  # whose tensors never train
    def add(self, name: str, config: SteerConfig | None = None) -> None:
        """Add a fresh adapter; `use` it to train it.

        Raises:
            ValueError: the name is taken or cannot be one, the config does not fit the model, or its LoRA, or FSDP or
                ZeRO has sharded the model.
        """
        config = SteerConfig() if config is None else config
        if not isinstance(config, SteerConfig):
            raise TypeError(f"config is a {type(config).__name__}; expected a SteerConfig")
        self._check_new_name(name)
        self._check_unsharded("adapters to be added")
        indices = self._indices(config)
        layers, hidden = self._decoder.layers, self._decoder.hidden
        if config.orthogonal_to is not None:
            check_carries_lora(self._model, {i: layers[i] for i in indices})
            check_lora(config, self._trace_writers(indices), {i: execution_device(layers[i]) for i in indices})
        self._insert(name, config, {i: Adapter.fresh(config, hidden, execution_device(layers[i])) for i in indices})

    @torch.inference_mode(False)  # whose tensors never train
    def load(self, source: str | os.PathLike[str], name: str = "default", *, check_base: bool = True) -> None:
        """Load a saved adapter from a directory or the hub under `name`; `use` it to steer by it.

        Raises:
            FileNotFoundError: there is no such adapter.
            ValueError: its files are broken, it does not fit the model, (unless `check_base` is False) it was made
                for a model of another name, or FSDP or ZeRO has sharded the model.
        """
        self._check_new_name(name)
        self._check_unsharded("adapters to be loaded")
        file = read_adapter(source)
        self._check_fits(file, source, check_base)
        self._insert(name, file.config, {i: Adapter.of_tensors(t) for i, t in self._tensors_of(file, source).items()})

    def restore(self, source: str | os.PathLike[str], name: str | None = None) -> None:
        """Take the values and the strength of an adapter (default: the one in use) from where it was saved.

        The parameters stay the same objects, so that an optimizer goes on with them. With several processes each reads
        the files and takes what is its own.

        Raises:
            KeyError: there is no such adapter here; FileNotFoundError: none there.
            ValueError: what was saved is broken, or of another config; or FSDP1 or ZeRO has sharded the adapter.
        """
        name = self._known(name)
        file = read_adapter(source)
        self._check_fits(file, source, check_base=False)
        theirs, ours = (replace(config, scale=1.0).to_dict() for config in (file.config, self._configs[name]))
        for field in dict.fromkeys((*ours, *theirs)):
            if theirs.get(field) != ours.get(field):
                raise ValueError(
                    f"{source} was saved with {field} {theirs.get(field)!r}; expected {ours.get(field)!r}, that of "
                    f"adapter {name!r}"
                )
        saved = self._tensors_of(file, source)
        parts = self._parts(name)
        if not all(map(is_dtensor, parts.values())):
            self._check_unsharded("adapters to be restored")
        with torch.no_grad():
            for i, tensors in saved.items():
                for key, tensor in tensors.items():
                    part = parts[f"{self._decoder.path}.{i}.{SITE}.{key}"]
                    part.copy_(part_of(tensor, part))
        self._configs[name] = replace(self._configs[name], scale=file.config.scale)
        self.use(self._active)

    def _tensors_of(self, file: AdapterFile, source: Any) -> dict[int, dict[str, Tensor]]:
        """The file's tensors by layer and by name below the site, on the layers' devices, each checked."""
        found = {}
        shapes = Adapter.shapes(file.config, file.hidden)
        unused = dict(file.tensors)
        for i in self._indices(file.config):
            tensors = {}
            for key, shape in shapes.items():
                path = f"{self._decoder.path}.{i}.{SITE}.{key}"
                tensor = unused.pop(path, None)
                if tensor is None:
                    raise ValueError(f"{source} has no tensor {path}; expected one of shape {shape}")
                if tuple(tensor.shape) != shape or tensor.dtype != DTYPES[file.config.dtype]:
                    raise ValueError(
                        f"{source}: tensor {path} is {tensor.dtype} {tuple(tensor.shape)}; "
                        f"expected {DTYPES[file.config.dtype]} {shape}"
                    )
                tensors[key] = tensor.to(execution_device(self._decoder.layers[i]))
            found[i] = tensors
        if unused:
            raise ValueError(f"{source} has a tensor {min(unused)}; expected none but those of its config")
        return found

    def use(self, name: str | None) -> None:
        """Steer by the adapter `name`, and make it the one that trains. None: by none.

        Raises:
            KeyError: there is no such adapter.
        """
        if name is not None:
            self._known(name)
        self._active = name
        config = None if name is None else self._configs[name]
        for patched in self._patched.values():
            if config is None:
                patched.site.use(None, "identity", 1.0)
            else:
                patched.site.use(name, config.activation or "identity", config.scale)
        for other, orthogonality in self._orthogonal.items():
            if other != name:
                orthogonality.release()

    def remove(self, name: str) -> None:
        """Forget an adapter. If it was in use, none is.

        Raises:
            KeyError: there is no such adapter.
        """
        self._known(name)
        if self._batch is not None and name in self._batch.held.numbers:
            raise ValueError(f"adapter {name!r} is in use by a running batch; expected it to be removed afterwards")
        if name == self._active:
            self.use(None)
        del self._configs[name]
        if name in self._orthogonal:
            self._orthogonal.pop(name).close()
        for patched in self._patched.values():
            if patched.site.adapter(name) is not None:
                patched.site.detach(name)

    def save(self, directory: str | os.PathLike[str], name: str | None = None) -> None:
        """Write an adapter (default: the one in use) to `directory`: its config, present strength and weights.

        Whole or not at all: what was there before stays if this fails. What is written of an adapter that is kept
        orthogonal to LoRA satisfies the constraint.

        Of the processes in a process group the first writes. Where FSDP has sharded the adapter all have to call this,
        and they go on when it is done; where each has it whole (DDP, tensor parallelism), the others need not.

        Raises:
            ValueError: the parameters are of several dtypes, or parts that make no whole adapter.
            NotADirectoryError, OSError: see `write_adapter`.
        """
        file, together = self.file(self._known(name))
        first_writes(lambda: write_adapter(directory, file), together=together)

    def push_to_hub(
        self,
        repo_id: str,
        name: str | None = None,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload adapter",
    ) -> str:
        """Upload an adapter (default: the one in use) to the hub: what `save` writes, and a model card.

        The repository is made if need be; a README.md that it has stays as it is. Later `patch_model(model, repo_id)`.
        Of several processes the first uploads; which of them have to call this, `save` says.

        Args:
            repo_id: "user/name" of the repository.
            private: whether a repository that is made is private; None is the account's default.
            token: of the hub; None is the one logged in with.
            revision: the branch; None is main.

        Returns:
            The URL of the commit; "" in a process that is not the first.
        """
        file, _ = self.file(self._known(name))
        if not is_first():
            return ""
        return push_adapter(
            repo_id, file, private=private, token=token, revision=revision, commit_message=commit_message
        )

    def file(self, name: str, given: dict[str, Tensor] | None = None) -> tuple[AdapterFile, bool]:
        """What is written of an adapter, and whether all processes had to put it together.

        given: its tensors by path, in place of the model's own.
        """
        tensors = self._parts(name) if given is None else given
        if given is None and name in self._orthogonal and lora_layers(self._model):
            for index, values in self._orthogonal[name].constrained().items():
                tensors |= {f"{self._decoder.path}.{index}.{SITE}.{key}": value for key, value in values.items()}
        kept = {tensor.dtype for tensor in tensors.values()}
        names = [dtype_name for dtype_name, dtype in DTYPES.items() if {dtype} == kept]
        if not names:
            raise ValueError(
                f"adapter {name!r} has parameters of {sorted(map(str, kept))}; expected one of {list(DTYPES)}"
            )
        config = replace(self._configs[name], dtype=names[0])
        together = any(map(is_dtensor, tensors.values())) or (
            given is None and any(sharder(p.site) == "FSDP" for p in self._patched.values())
        )
        if together:
            tensors = gather(tensors, self.shapes(name))
        for path, shape in self.shapes(name).items():
            if tuple(tensors[path].shape) != shape:
                raise ValueError(
                    f"{path} has shape {tuple(tensors[path].shape)} in this process; expected {shape} "
                    "(under DeepSpeed's ZeRO-3, save inside deepspeed.zero.GatheredParameters)"
                )
        try:
            file = AdapterFile(config, self._base, self._decoder.hidden, len(self._decoder.layers), tensors)
        except ValueError as error:
            raise ValueError(f"adapter {name!r} cannot be saved: {error}") from error
        return file, together

    def _parts(self, name: str) -> dict[str, Tensor]:
        """An adapter's tensors by path, as this process has them."""
        adapters = {patched.path: patched.site.adapter(name) for patched in self._patched.values()}
        return {
            f"{path}.{SITE}.{key}": tensor
            for path, adapter in adapters.items()
            if adapter is not None
            for key, tensor in adapter.named_tensors().items()
        }

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Shape of each of an adapter's tensors, by path, whatever this process has of it."""
        config = self._configs[name]
        return {
            f"{self._decoder.path}.{i}.{SITE}.{key}": shape
            for i in self._indices(config)
            for key, shape in Adapter.shapes(config, self._decoder.hidden).items()
        }

    # -------------------------------------------------------------------------------------------------------- running

    @property
    def scale(self) -> float:
        """s, the strength of the adapter in use."""
        return self.config().scale

    @scale.setter
    def scale(self, value: float) -> None:
        name = self._known(None)
        self._configs[name] = replace(self._configs[name], scale=checked_number("scale", value))
        self.use(name)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is exactly the base model."""
        self._disabled += 1
        self._enable()
        try:
            yield
        finally:
            self._disabled -= 1
            self._enable()

    @contextlib.contextmanager
    def mode(self, mode: str) -> Iterator[None]:
        """Inside, a model with LoRA and steering computes by "both", by its "lora" alone, or by "steering" alone.

        Afterwards, also after an exception, all is as it was. What a mode leaves out gets no gradient.

        Raises:
            ValueError: an unknown mode, or one that needs a LoRA on a model that carries none.
        """
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; expected one of {', '.join(map(repr, MODES))}")
        layers = list(lora_layers(self._model).values())
        if not layers:
            raise ValueError(
                f"mode is {mode!r} but {type(self._model).__name__} carries no LoRA; expected one from PEFT"
            )
        with contextlib.ExitStack() as stack:
            if mode == "lora":
                stack.enter_context(self.disabled())
            if mode == "steering":
                enabled = [layer for layer in layers if not layer.disable_adapters]
                # PEFT switches requires_grad along with a layer.
                trained = [(p, p.requires_grad) for layer in enabled for p in layer.parameters()]
                stack.callback(_set_requires_grad, trained)
                for layer in enabled:
                    layer.enable_adapters(False)
                    stack.callback(layer.enable_adapters, True)
            yield

    @contextlib.contextmanager
    def batch(
        self,
        names: Sequence[str | None],
        *,
        scale: float | Sequence[float | None] | None = None,
        positions: str | tuple[str, int] | list[Any] = "all",
    ) -> Iterator[None]:
        """Inside, each row of a batch is steered by its own adapter, as it would be alone; for inference.

        Rows are those of `model.generate(...)`, beams and returned sequences included, or of `model(...)`. A second
        thread's batch waits for this one; any other pass of the model in another thread is refused meanwhile.

        Args:
            names: for each row the adapter, of the model or its pool, or None: the base model to the bit.
            scale: the strength in place of the adapters' own, for all rows or for each; None is an adapter's own.
            positions: which tokens are steered, in all rows or (a list) in each: "all", the "prompt", the "generated"
                ones, the "last" of the prompt, ("first", k) or ("last", k) of the prompt. What is padding by the
                attention mask does not count. In `generate` the prompt is what it is given, with what is cached of it;
                outside, a pass without cached tokens is a prompt, and later passes are generated tokens.

        Raises:
            TypeError, ValueError: what is no list of names, strengths or positions, or of another length.
            KeyError: there is no such adapter, in the model or its pool.
            FileNotFoundError, ValueError, TimeoutError: the pool cannot load one: see `AdapterPool.hold`.
            RuntimeError: a batch is running in this thread already.
        """
        requests = checked_requests(names, scale, positions, self._servable)
        if next(self._model.parameters()).dtype == torch.float64:
            raise TypeError("the model is float64; expected float32, bfloat16 or float16 to steer a batch by rows")
        if self._batch is not None and self._batch.thread == threading.get_ident():
            raise RuntimeError("a batch is running already; expected one at a time")
        with self._batch_lock, contextlib.ExitStack() as stack:
            sites = {index: patched.site for index, patched in self._patched.items()}
            distinct = list(dict.fromkeys(request.name for request in requests if request.name is not None))
            held = stack.enter_context(self._hold(distinct, sites))
            stack.callback(setattr, self, "_batch", None)
            self._batch = stack.enter_context(running(self._model, self._decoder.module, sites, requests, held))
            yield

    def _servable(self, name: str) -> None:
        if self._pool is None or name not in self._pool:
            self._known(name)

    @contextlib.contextmanager
    def _hold(self, names: list[str], sites: dict[int, SteeringSite]) -> Iterator[Held]:
        """The adapters of a batch in slots: the pool's, or of their own where there is no pool."""
        pool = self._pool
        own = [name for name in names if name in self._configs]
        with contextlib.ExitStack() as stack:
            if pool is None:
                yield stack.enter_context(hold_loaded(sites, self._configs, own))
                return
            held = stack.enter_context(pool.hold([name for name in names if name not in self._configs]))
            numbers, scales = dict(held.numbers), dict(held.scales)
            for name in own:
                config = self._configs[name]
                here = {index: site.adapter(name) for index, site in sites.items()}
                tensors = {index: adapter.named_tensors() for index, adapter in here.items() if adapter is not None}
                numbers[name] = stack.enter_context(pool.borrow(name, config, tensors))
                scales[name] = config.scale
            yield Held(numbers, held.slots, scales)

    @property
    def pool(self) -> AdapterPool | None:
        """The adapters that are loaded when a batch asks for them; None before `make_pool`."""
        return self._pool

    @torch.inference_mode(False)  # whose tensors cannot be written to outside it
    def make_pool(
        self,
        *,
        slots: int = 64,
        rank: int = 16,
        layers: Sequence[int] | None = None,
        dtype: str = "float32",
        check_base: bool = True,
    ) -> AdapterPool:
        """Make room for adapters that come and go, and return the pool, which is `pool` from then on.

        Each layer gets its site, if it has none, and slots, on its device: 2 r d + r + d values a slot.

        Args:
            slots: how many adapters are on the device at a time: at least as many as a batch has distinct ones.
            rank: the highest that an adapter may have; 0 for steering vectors alone.
            layers: those that adapters may steer; None is all.
            dtype: of the values in the slots: "float32", "bfloat16" or "float16".
            check_base: refuse an adapter whose base model has another name.

        Raises:
            TypeError, ValueError: a size, layer or dtype out of range, there is a pool already, or FSDP or ZeRO has
                sharded the model.
        """
        kept = checked_size(slots, rank, dtype)
        if self._pool is not None:
            raise ValueError("there is a pool already; expected close_pool() first")
        if self._batch is not None:
            raise RuntimeError("a batch is running; expected the pool to be made before or afterwards")
        self._check_unsharded("a pool to be made")
        indices = self._indices(SteerConfig(layers=layers))
        room = {
            index: Slots(
                slots,
                rank,
                self._decoder.hidden,
                dtype=kept,
                device=execution_device(self._decoder.layers[index]),
                down_bias=rank > 0,
                up_bias=True,
            )
            for index in indices
        }
        self._patch(indices)
        self._enable()
        self._pool = AdapterPool(room, self._check_fits, self._tensors_of, self._configs.__contains__, check_base)
        return self._pool

    def close_pool(self) -> None:
        """Give the pool's slots back. The names that it had are gone.

        Raises:
            RuntimeError: a batch is running.
        """
        if self._batch is not None:
            raise RuntimeError("a batch is running; expected the pool to be closed afterwards")
        self._pool = None

    def report(self) -> Report:
        """How each layer is steered, by what, and how often it was since `reset_calls`."""
        return Report(
            LayerReport(i, p.path, p.base.__name__, p.kind, p.site.backend, p.site.calls, p.reason)
            for i, p in sorted(self._patched.items())
        )

    def reset_calls(self) -> None:
        """Start the report's counts anew."""
        for patched in self._patched.values():
            patched.site.calls, patched.site.backend = 0, None

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the adapter in use."""
        return (p for patched in self._patched.values() for p in patched.site.parameters() if p.requires_grad)

    # ---------------------------------------------------------------------------------------- patching and the way back

    def attach(self) -> None:
        """Freeze the base, watch the decoder, and become `model.steering`. Called by `patch_model`.

        What PEFT added to the model is not its base: LoRA that trains goes on training.
        """
        for module, name, _ in self._requires_grad:
            module.get_parameter(name).requires_grad_(False)
        decoder = self._decoder.module
        self._hooks = [
            decoder.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            decoder.register_forward_hook(self._after_forward, always_call=True),
        ]
        self._model.steering = self
        if self._save_pretrained is not None:
            self._save_pretrained.install()

    def unpatch(self) -> Any:
        """Take every site out of the model, which is then exactly as it came; return it. The adapters are gone.

        Raises:
            RuntimeError: another library has since changed a layer's class, or a batch is running; nothing is undone
                then.
            ValueError: FSDP or ZeRO has sharded the model.
        """
        self._check_unsharded("the model to be unpatched")
        if self._batch is not None:
            raise RuntimeError("a batch is running; expected the model to be unpatched afterwards")
        for patched in self._patched.values():
            patched.check_removable()
        for patched in self._patched.values():
            patched.remove()
        self._patched.clear()
        self._layers.clear()
        self._configs.clear()
        self._pool = None
        while self._orthogonal:
            self._orthogonal.popitem()[1].close()
        self._active = None
        for module, name, required in self._requires_grad:
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(required)
        for hook in self._hooks:
            hook.remove()
        del self._model.steering
        if self._save_pretrained is not None:
            self._save_pretrained.remove()
        return self._given

    def _insert(self, name: str, config: SteerConfig, adapters: dict[int, Adapter]) -> None:
        """Give the layers their parameters, patching those that are not yet; all of them or none."""
        self._patch(adapters)
        for i, adapter in adapters.items():
            self._patched[i].site.attach(name, adapter)
        if config.orthogonal_to is not None:
            sites = {i: self._patched[i].site for i in adapters}
            self._orthogonal[name] = Orthogonality(name, config, self._model, sites, self._trace_writers)
        self._configs[name] = config
        self.use(self._active)  # what is not in use does not train
        self._enable()

    def _patch(self, indices: Iterable[int]) -> None:
        """Give those of these layers a site that have none; all of them or none."""
        new: list[PatchedLayer] = []
        try:
            for i in indices:
                if i not in self._patched:
                    new.append(PatchedLayer(self._decoder.layers[i], i, f"{self._decoder.path}.{i}"))
        except BaseException:
            for patched in new:
                patched.remove()
            raise
        self._patched.update({patched.index: patched for patched in new})
        self._patched = dict(sorted(self._patched.items()))
        self._layers = {index: patched.layer for index, patched in self._patched.items()}

    def _enable(self) -> None:
        for patched in self._patched.values():
            patched.site.enabled = self._disabled == 0

    # ------------------------------------------------------------------------------------------- before a forward pass

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._layer_list.check(self._layers)
        for patched in self._patched.values():
            patched.watch()
        if torch.is_grad_enabled() and self._active is not None and not self._disabled and not self._tracing:
            self._before_training(module)
        self._pack(module, args, kwargs)  # the last that may raise: its end belongs to it

    def _pack(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        tokens = tokens_of(args, kwargs)
        weights = {}
        if tokens > FEW_TOKENS and self._active is not None and not self._disabled and self._batch is None:
            sites = (patched.site for patched in self._patched.values())
            weights = {site: pair for site in sites if (pair := site.low_rank()) is not None}
        dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None) if weights else None
        self._packing.begin(dtype, tokens, weights)

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._packing.end()

    def _before_training(self, module: nn.Module) -> None:
        """What has to be seen to before a forward pass whose gradients may be asked for."""
        if module.training and not any(True for _ in self.parameters()):
            warnings.warn(
                f"adapter {self._active!r} is in use but does not train; adding a LoRA freezes all else: "
                f"model.steering.use({self._active!r}) makes it train again",
                stacklevel=2,
            )
        orthogonality = self._orthogonal.get(self._active or "")
        # Without no_grad a prompt looks like training; an adapter may answer it without the LoRA it was trained beside.
        if orthogonality is not None and orthogonality.trains and (module.training or lora_layers(self._model)):
            orthogonality.before_forward()

    def _trace_writers(self, indices: list[int]) -> dict[int, list[Writer]]:
        """All modules that write into the stream of these layers. The report's counts stay as they are."""
        counts = [(p.site, p.site.calls, p.site.backend) for p in self._patched.values()]
        self._tracing = True
        try:
            layers = {index: self._decoder.layers[index] for index in indices}
            return trace_writers(self._decoder.module, layers, self._decoder.hidden)
        finally:
            self._tracing = False
            for site, calls, backend in counts:
                site.calls, site.backend = calls, backend

    # --------------------------------------------------------------------------------------------------------- checks

    @property
    def _base(self) -> str:
        return getattr(self._model.config, "_name_or_path", "") or ""

    def _known(self, name: str | None) -> str:
        if name is None:
            if self._active is None:
                raise KeyError(f"no adapter is in use; expected one of {self.names} to be named, or used")
            return self._active
        if name not in self._configs:
            raise KeyError(f"no adapter {name!r}; expected one of {self.names}")
        return name

    def _check_new_name(self, name: str) -> None:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"adapter name is {name!r}; expected letters, digits, '_' and '-'")
        if hasattr(nn.ModuleDict(), name):
            raise ValueError(f"adapter name is {name!r}, a word that PyTorch's modules use; expected another")
        if name in self._configs:
            raise ValueError(f"there is an adapter {name!r} already; expected a new name (have {self.names})")
        if self._pool is not None and name in self._pool:
            raise ValueError(f"there is an adapter {name!r} in the pool already; expected a new name")

    def _check_unsharded(self, what: str) -> None:
        # FSDP and ZeRO keep their own account of a layer's parameters: others that come later, or values, are lost.
        for i, layer in enumerate(self._decoder.layers):
            by = sharder(layer)
            if by is not None:
                raise ValueError(f"layer {i} is sharded by {by}; expected {what} before it is")

    def _indices(self, config: SteerConfig) -> list[int]:
        count = len(self._decoder.layers)
        if config.layers is None:
            return list(range(count))
        if config.layers[-1] >= count:
            raise ValueError(f"layers has {config.layers[-1]}; expected indices below {count}, the model's layers")
        return list(config.layers)

    def _check_fits(self, file: AdapterFile | AdapterHead, source: Any, check_base: bool) -> None:
        for what, theirs, ours in (
            ("hidden size", file.hidden, self._decoder.hidden),
            ("number of layers", file.num_layers, len(self._decoder.layers)),
        ):
            if theirs != ours:
                raise ValueError(f"{source} is for a model of {what} {theirs}; expected {ours}")
        # The same model may lie in different places; its own name is the last part.
        theirs, ours = (os.path.basename(base.rstrip("/\\")) for base in (file.base, self._base))
        if check_base and theirs and ours and theirs != ours:
            raise ValueError(
                f"{source} is for the base model {file.base!r}; expected {self._base!r} "
                "(check_base=False loads it all the same)"
            )


def _set_requires_grad(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, required in flags:
        parameter.requires_grad_(required)
