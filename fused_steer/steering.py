"""`model.steering`: adds, switches, scales, combines, batches, saves and loads the adapters of a patched model.

It is one file because it is one class: the methods that users call, each with its documentation and one call.
"""

from __future__ import annotations

import contextlib
import copy
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .adapters.combining import combine_adapters
from .adapters.distributed import check_averaged, check_unsharded, first_writes, is_first
from .adapters.factors import Adapter
from .adapters.files import AdapterFile, read_adapter, write_adapter
from .adapters.hub import check_options, push_adapter
from .adapters.parameters import SITE, Place, by_lower, check_name, refuse_clash
from .config import SteerConfig, checked_bool, checked_number
from .lora.constraints import Constraints
from .lora.layers import adapter_parameters, computing_by
from .merging import Merged, check_mergeable, find_merged, warn_of_rounding
from .model.decoder import check_rows, execution_device, inside_peft
from .model.decoder_hooks import warn_of_frozen
from .model.patched import PatchedModel, describe
from .model.stored import adapter_file, check_same_config, files_of_state, restore_values, vectors_file
from .model.watch import Report
from .model.weak import Weakly, WeakMethod, leave_out_rest, what_is_left
from .positions import ALL, read_positions, shown
from .serving.batch import Batch, run_batch
from .serving.continuous import generate_inside
from .serving.gains import Gains
from .serving.holding import checked_size, hold_adapters, make_slots
from .serving.pool import AdapterPool
from .serving.requests import Request, checked_requests
from .serving.rows import steer_by_rows
from .whole import saving_of


class Steering:
    """The adapters of one patched model, available as `model.steering`.

    One adapter is active at a time: only it steers, and only it trains. `batch` (inference only) allows one per row.
    The model and its decoder keep this alive, not the reverse.
    """

    # What is left of a model whose decoder somebody keeps.
    _given = Weakly[Any](lambda self: self._model)
    _model = Weakly[Any](lambda self: self._decoder.module)

    def __init__(self, model: nn.Module, fuse_norm: bool = False) -> None:
        """Find the model's decoder. The model is not changed until an adapter is added. See `patch_model`."""
        given, model = model, inside_peft(model)
        self._patched = PatchedModel(model, adapter_parameters, fuse_norm)
        self._given, self._model, self._decoder = given, model, self._patched.decoder
        self._configs: dict[str, SteerConfig] = {}
        self._active: str | None = None
        self._constraints = Constraints(model, self._decoder)
        self._scopes = self._patched.scopes
        self._pool: AdapterPool | None = None
        self._unpatched = False
        self._batch: Batch | None = None
        methods = (WeakMethod(self, name) for name in ("_is_idle", "_is_tracing", "_batch_of_active"))
        self._gains = Gains(model, self._decoder.module, *methods)
        self._saving = saving_of(self._given, model, self._decoder.module, self)

    def __deepcopy__(self, memo: dict[Any, Any]) -> Steering:
        """Copy this with its model. A copy of the decoder alone has its own steering, too, and no rest of the model."""
        given = what_is_left(self, "_given")
        if given is not None and id(given) not in memo and id(self._decoder.module) in memo:
            leave_out_rest(given, memo)
        twin = memo[id(self)] = object.__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse what is no setting: Python would keep `steering.positions = "generated"`, unread."""
        if name != "scale" and not name.startswith("_"):
            raise AttributeError(
                f"steering.{name} is set; expected steering.scale, or steering.use(name), or positions "
                "in its SteerConfig or in steering.batch"
            )
        super().__setattr__(name, value)

    # ------------------------------------------------------------------------------------------------------- adapters

    @property
    def names(self) -> list[str]:
        """The names of the adapters, in order of addition."""
        return list(self._configs)

    @property
    def active(self) -> str | None:
        """The name of the active adapter, or None."""
        return self._active

    def config(self, name: str | None = None) -> SteerConfig:
        """Return the config of an adapter (default: the active one) with its present strength."""
        return self._configs[self._known(name)]

    @torch.inference_mode(False)  # inference tensors never train
    def add(self, name: str, config: SteerConfig | None = None) -> None:
        """Add a fresh adapter. Call `use` to train it.

        Raises:
            TypeError: `config` is no SteerConfig.
            ValueError: the name is taken or invalid, the config does not fit the model or its LoRA, or FSDP or ZeRO
                has sharded the model.
        """
        config = SteerConfig() if config is None else config
        if not isinstance(config, SteerConfig):
            raise TypeError(f"config is a {type(config).__name__}; expected a SteerConfig")
        self._check_new_name(name)
        check_unsharded(self._decoder.layers, "adapters to be added")
        places = list(self._decoder.layout.places(config))
        layers, hidden = self._decoder.layers, self._decoder.hidden
        self._patched.check(places)
        self._constraints.check(config)
        devices = {place: execution_device(layers[place.layer]) for place in places}
        self._insert(name, config, {p: Adapter.fresh(config, hidden, device) for p, device in devices.items()})

    @torch.inference_mode(False)  # inference tensors never train
    def load(self, source: str | os.PathLike[str], name: str = "default", *, check_base: bool = True) -> None:
        """Load a saved adapter from a directory or the hub under `name`. Call `use` to steer by it.

        Raises:
            FileNotFoundError: there is no such adapter.
            ValueError: the files are broken, the adapter does not fit the model or (if `check_base`) names another
                base model, or FSDP or ZeRO has sharded the model.
        """
        checked_bool("check_base", check_base)
        self._check_new_name(name)
        check_unsharded(self._decoder.layers, "adapters to be loaded")
        self._insert_file(name, read_adapter(source, self._decoder.layout, check_base=check_base))

    @torch.inference_mode(False)  # inference tensors never train
    def add_vector(
        self, name: str, vectors: Mapping[int, Any], *, scale: float = 1.0, site: str = SITE, positions: str = ALL
    ) -> None:
        """Add an adapter of `form="vector"`: h -> h + scale · vector. Call `use` to steer by it.

        Args:
            name: the adapter's name.
            vectors: a tensor or array (d,) for each layer, by its index from 0. It is copied to float32.
            scale: as in `SteerConfig`.
            site: as in `SteerConfig`.
            positions: as in `SteerConfig`.

        Raises:
            TypeError, ValueError: a vector is not of d finite numbers, the model lacks a layer, the name is taken or
                invalid, or FSDP or ZeRO has sharded the model.
        """
        self._check_new_name(name)
        check_unsharded(self._decoder.layers, "adapters to be added")
        options: dict[str, Any] = {"scale": scale, "site": site, "positions": positions}
        self._insert_file(name, vectors_file(vectors, self._decoder.layout, **options))

    @torch.inference_mode(False)  # inference tensors never train
    def combine(self, weights: Mapping[str, float], name: str = "combined") -> None:
        """Add an adapter that shifts by Σ weight · scale · shift of several adapters. Call `use` to steer by it.

        It computes the sum for every h: vectors are added up, and the ranks of adapters of one activation are stacked
        (LoReFT's is the identity). It has strength 1; later changes of the parts do not change it.

        Args:
            weights: the weight of each adapter, on top of its own strength: {"polite": 0.7, "terse": 0.3}.
            name: the new adapter's name.

        Raises:
            KeyError: there is no such adapter.
            TypeError, ValueError: the adapters have different activations or positions, the ranks add up to more than
                256, a weight is not finite, or the name is taken or invalid.
        """
        self._check_new_name(name)
        check_unsharded(self._decoder.layers, "adapters to be combined")
        if not isinstance(weights, Mapping):
            raise TypeError(f"weights is a {type(weights).__name__}; expected a weight for each adapter, by its name")
        files = {part: (weight, self._file(self._named(part))[0]) for part, weight in weights.items()}
        self._insert_file(name, combine_adapters(files))

    def restore(self, source: str | os.PathLike[str], name: str | None = None) -> None:
        """Copy the saved values and strength of an adapter (default: the active one) into the present one.

        The parameters stay the same objects, so an optimizer can go on with them. With several processes, each reads
        the files and takes its own part.

        Raises:
            KeyError, FileNotFoundError: there is no such adapter in the model, or no saved one.
            ValueError: the saved adapter is broken or has another config, a running batch uses the adapter, or FSDP1 or
                ZeRO has sharded it.
        """
        name = self._known(name)
        file = read_adapter(source, self._decoder.layout)
        check_same_config(source, file.config, name, self._configs[name])
        with self._changing("steering.restore is called"):
            self._check_not_in_batch(name, "restored")
            restore_values(file, name, self._patched.sites, self._decoder.layers)
            self._configs[name] = replace(self._configs[name], scale=file.config.scale)
            self._use(self._active)

    def use(self, name: str | None) -> None:
        """Make `name` the active adapter, which steers and trains. None deactivates steering.

        Inside `batch` it takes effect afterwards, because the rows there have adapters of their own. Call `backward`
        before: PyTorch drops the gradient of an adapter that does not train by then.

        Raises:
            KeyError: there is no such adapter.
            RuntimeError: the model runs in another thread, or `disabled` or a batch is open in one. Or `generate` runs,
                and the active adapter has positions.
        """
        if name is not None:
            self._known(name)
        with self._changing("steering.use is called"):
            if self._batch is not None and self._batch.by == "generate":
                raise RuntimeError(
                    "steering.use is called while generate runs, and the active adapter has positions; expected it "
                    "before or afterwards"
                )
            self._use(name)

    def _use(self, name: str | None) -> None:
        self._active = name
        config = None if name is None else self._configs[name]
        positions = None if config is None or config.positions == ALL else read_positions(config.positions)
        self._gains.use(positions)
        for site in self._patched.sites.values():
            if config is None:
                site.use(None, "identity", 1.0)
            else:
                site.use(name, config.activation, config.scale, None if positions is None else self._gains)
        self._constraints.use(name)

    def remove(self, name: str) -> None:
        """Remove an adapter. If it was active, none is.

        Raises:
            KeyError: there is no such adapter.
            ValueError: a running batch uses it.
            RuntimeError: see `use`.
        """
        self._named(name)
        with self._changing("steering.remove is called"):
            self._check_not_in_batch(name, "removed")
            if name == self._active:
                self._use(None)
            del self._configs[name]
            for site in self._patched.sites.values():
                if site.adapter(name) is not None:
                    site.detach(name)
            self._constraints.remove(name)

    def save(self, directory: str | os.PathLike[str], name: str | None = None) -> None:
        """Save an adapter (default: the active one) to `directory`: its config, present strength and weights.

        If this fails, the earlier files stay. A saved adapter that is kept orthogonal to a LoRA satisfies the
        constraint.

        In a process group only the first process writes. If FSDP has sharded the adapter, or layers were removed from
        the model (a pipeline's stages), all processes have to call this, and wait until it is done. With DDP or tensor
        parallelism the others need not call it.

        Raises:
            ValueError: the parameters have several dtypes, or the shards do not form a whole adapter.
            NotADirectoryError, OSError: see `write_adapter`.
        """
        file, together = self._file(self._known(name), merged=True)
        first_writes(lambda: write_adapter(directory, file), together=together)

    def push_to_hub(self, repo_id: str, name: str | None = None, **options: Any) -> str:
        """Upload an adapter (default: the active one) to the hub: the files of `save`, and a model card.

        The repository is created if needed. An existing README.md is kept. `patch_model(model, repo_id)` loads the
        adapter. In a process group only the first process uploads; see `save` for which have to call this.

        Args:
            repo_id: the repository, "user/name".
            name: the adapter.
            options: private, token, revision and commit_message of `huggingface_hub.HfApi`; training, a record of
                `fused_steer.trainer.training_of` for the card.

        Returns:
            The URL of the commit, or "" in a process that is not the first.

        Raises:
            KeyError: there is no such adapter.
            TypeError: an option has another name, or training is no such record.
            ValueError: see `save`.
        """
        check_options(options)
        file, _ = self._file(self._known(name), merged=True)
        return push_adapter(repo_id, file, **options) if is_first() else ""

    def files(self, state: Mapping[str, Tensor] | None) -> dict[str, AdapterFile]:
        """Return all adapters as file contents, by name. With a state dict, return its adapters and values."""
        if state is None:
            return {name: self._file(name)[0] for name in self.names}
        return files_of_state(self._configs, self._decoder.layout, state)

    def _file(self, name: str, merged: bool = False) -> tuple[AdapterFile, bool]:
        """Return an adapter as file contents, and whether all processes gathered it together.

        Args:
            merged: take layers that are not in this process's model from the others, which then have to call this.
        """
        constrained, absent = self._constraints.values(name), self._patched.absent() if merged else ()
        return adapter_file(name, self._configs[name], self._decoder.layout, self._patched.sites, constrained, absent)

    # -------------------------------------------------------------------------------------------------------- running

    @property
    def scale(self) -> float:
        """The strength s of the active adapter. It is not set inside `batch`, which takes strengths itself.

        Nor is it set while `generate` runs and the adapter has positions.
        """
        return self.config().scale

    @scale.setter
    def scale(self, value: float) -> None:
        name = self._known(None)
        config = replace(self._configs[name], scale=checked_number("scale", value))
        with self._changing("steering.scale is set"):
            if self._batch is not None:
                raise RuntimeError(
                    f"steering.scale is set while {self._batch.by} runs with the strengths that it began with; "
                    "expected it before or afterwards"
                )
            self._configs[name] = config
            for site in self._patched.sites.values():
                site.set_scale(config.scale)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Run exactly the base model inside this context, for the thread or task that entered it. Others are refused.

        Raises:
            RuntimeError: the model runs in another thread, or `disabled` or a batch is open in one.
        """
        with self._disable("steering.disabled()"):
            yield

    @contextlib.contextmanager
    def _disable(self, what: str) -> Iterator[None]:
        undo = contextlib.ExitStack()
        with self._patched.disable(what, undo.close):
            generate_inside(self._model, what, undo)
            yield

    @contextlib.contextmanager
    def mode(self, mode: str) -> Iterator[None]:
        """Let a model with LoRA and steering compute by "both", only by its "lora", or only by "steering".

        The model is restored on exit, also after an exception. A part that is left out gets no gradient.

        Raises:
            ValueError: an unknown mode, or one that needs a LoRA on a model that carries none.
        """
        with computing_by(mode, self._model, self._open, self._disable):
            yield

    @contextlib.contextmanager
    def _open(self, what: str, undo: contextlib.ExitStack) -> Iterator[None]:
        with self._scopes.open(what, undo.close):
            generate_inside(self._model, what, undo)
            yield

    @contextlib.contextmanager
    def batch(
        self,
        names: Sequence[str | None],
        *,
        scale: float | Sequence[float | None] | None = None,
        positions: str | tuple[str, int] | list[Any] | None = None,
    ) -> Iterator[None]:
        """Steer each row of a batch by its own adapter, as if it ran alone. For inference.

        Rows are the rows of `model.generate(...)` or `model(...)`. Beams and returned sequences belong to their row.
        Another thread's batch waits for this one. Other passes in another thread or task are refused meanwhile. A
        thread started inside, as for a streamer, takes part if it has a copy of the context:
        `Thread(target=contextvars.copy_context().run, args=(model.generate,), kwargs=...)`.

        Args:
            names: each row's adapter, of the model or its pool. None gives the base model's bits.
            scale: the strength, for all rows or for each. None means the adapter's own.
            positions: the steered tokens, for all rows or (as a list) for each: "all", "prompt", "generated",
                "last_prompt", "first_7" or "last_7" of the prompt (any number; ("last", 7) is the same), or several of
                them joined by "+". None means the adapter's own. Padding by the attention mask does not count. In
                `generate` the prompt is its input with the cached tokens. Outside it, a pass without cached tokens is a
                prompt, and later passes are generated tokens.

        Raises:
            TypeError, ValueError: names, strengths or positions of a wrong form or length, or a model that has no rows
                to tell apart.
            KeyError: neither the model nor its pool has such an adapter.
            FileNotFoundError, ValueError, TimeoutError: the pool cannot load an adapter: see `AdapterPool.hold`.
            RuntimeError: a batch is running in this thread already, the model runs in another, or this thread is inside
                `prompts`.
        """
        if self._gains.told:
            raise RuntimeError(
                "steering.batch is entered inside steering.prompts; expected it outside: it knows its prompts"
            )
        check_rows(self._decoder.module, "a batch steers each row by its own adapter", "steering.use")
        with self._by_rows(checked_requests(names, scale, positions, self._servable), self._pool, "steering.batch"):
            yield

    @contextlib.contextmanager
    def _by_rows(self, requests: list[Request], pool: AdapterPool | None, by: str) -> Iterator[None]:
        """Open a batch of checked requests, with its adapters in the pool's slots or (None) in slots of their own."""
        if next(self._model.parameters()).dtype == torch.float64:
            raise TypeError("the model is float64; expected float32, bfloat16 or float16 to steer a batch by rows")
        self._scopes.heal()
        if self._batch is not None and self._batch.opener == threading.get_ident():
            raise RuntimeError("a batch is running already; expected one at a time")
        undo = contextlib.ExitStack()
        with self._scopes.turn, self._scopes.open("steering.batch", undo.close):
            sites = self._patched.sites
            distinct = list(dict.fromkeys(request.name for request in requests if request.name is not None))
            held = undo.enter_context(hold_adapters(pool, sites, self._configs, distinct))
            undo.callback(setattr, self, "_batch", None)
            batch = Batch(requests, held, self._scopes, by)
            for request, where in zip(requests, batch.where, strict=True):
                self._gains.check_steers(where if request.name is not None else None)
            self._batch = batch
            run_batch(self._model, self._decoder.module, self._patched.sites_left, batch, undo)
            yield

    @contextlib.contextmanager
    def prompts(self, given: Any) -> Iterator[None]:
        """Set where the prompts end, for this thread's passes inside the context and an adapter with positions.

        For training without labels in the model's call, such as a loss of your own. `generate` and `batch` know where
        their prompts end, and are refused inside.

        Args:
            given: the number of prompt tokens of each row, without padding and with cached tokens; or a mask (rows,
                tokens), not 0 for prompt tokens. Packed rows need a mask.

        Raises:
            RuntimeError: a batch is running.
            ValueError: it is neither; or, in a pass, its number of rows or tokens is another, a length is more than the
                row's tokens in training or without a cache, or it is a mask in a pass that continues a cache, and
                positions counts tokens.
        """
        if self._batch is not None and self._scopes.foreign() is None:
            raise RuntimeError(
                f"steering.prompts is entered while {self._batch.by} runs, which knows its prompts; expected "
                "it before or afterwards"
            )
        with self._gains.prompts(given):
            yield

    def check_measurable(self, what: str, disabled: bool = False) -> None:
        """Refuse to measure the active adapter where it does not steer.

        Args:
            what: the action, for the error message: "sweep is called".
            disabled: accept that steering is disabled.

        Raises:
            RuntimeError: a batch is running, or steering is disabled.
        """
        if self._batch is not None:
            raise RuntimeError(f"{what} inside steering.batch; expected it outside")
        if self._patched.disabled and not disabled:
            raise RuntimeError(f"{what} while steering is disabled; expected it outside (of steering.disabled())")

    def _is_idle(self) -> bool:
        return self._batch is not None or self._patched.disabled or not self._patched.layers

    def _is_tracing(self) -> bool:
        return self._constraints.tracing

    @contextlib.contextmanager
    def _batch_of_active(self, rows: int) -> Iterator[None]:
        # Not in the pool's slots, whose rank, sites and dtype may be others, and which may all be in use.
        with self._by_rows([Request(self._active, None, None)] * rows, None, "generate"):
            yield

    def _check_not_in_batch(self, name: str, what: str) -> None:
        if self._batch is not None and name in self._batch.held.numbers:
            by = "a running batch" if self._batch.by == "steering.batch" else self._batch.by
            raise ValueError(f"adapter {name!r} is in use by {by}; expected it to be {what} afterwards")

    def _servable(self, name: str) -> None:
        if name in self._configs or self._pool is not None and name in self._pool:
            return
        pool = "" if self._pool is None else f", or of the {len(self._pool)} of its pool"
        raise KeyError(f"no adapter {shown(name)}; expected one of {self.names}{pool}")

    @property
    def pool(self) -> AdapterPool | None:
        """The pool of adapters that are loaded when a batch uses them. None before `make_pool`."""
        return self._pool

    @torch.inference_mode(False)  # inference tensors cannot be written to outside inference mode
    def make_pool(
        self,
        *,
        slots: int = 64,
        rank: int = 16,
        layers: Sequence[int] | None = None,
        site: str | Sequence[str] = SITE,
        dtype: str = "float32",
        check_base: bool = True,
    ) -> AdapterPool:
        """Make a pool for adapters that are loaded on demand. It is `steering.pool` from then on.

        Each layer gets a site, if it has none, and slots on its device. A slot takes 2 r d + r + d values.

        Args:
            slots: the number of adapters on the device at a time, at least the number of different ones in a batch.
            rank: the highest rank of an adapter. 0 for steering vectors only.
            layers: the layers that adapters may steer. None means all.
            site: the sites that adapters may steer at, as `SteerConfig` has it.
            dtype: the slots' dtype: "float32", "bfloat16" or "float16".
            check_base: refuse an adapter if its base model has another name.

        Raises:
            TypeError, ValueError: a size, layer or dtype is out of range, there is a pool already, or FSDP or ZeRO has
                sharded the model.
        """
        slots, rank, kept = checked_size(slots, rank, dtype)
        checked_bool("check_base", check_base)
        if self._pool is not None:
            raise ValueError("there is a pool already; expected close_pool() first")
        if self._batch is not None:
            raise RuntimeError("a batch is running; expected the pool to be made before or afterwards")
        check_unsharded(self._decoder.layers, "a pool to be made")
        places = list(self._decoder.layout.places(SteerConfig(layers=layers, site=site)))
        self._patched.check(places)
        room = make_slots(self._decoder, places, slots, rank, kept)
        with self._changing("steering.make_pool is called"):
            self._patched.patch(places)
            configs = self._configs  # without `self`, which keeps the pool
            pool = self._pool = AdapterPool(room, self._decoder, lambda: configs, check_base)
        return pool

    def close_pool(self) -> None:
        """Delete the pool with its slots and names.

        Raises:
            RuntimeError: a batch is running.
        """
        if self._batch is not None:
            raise RuntimeError("a batch is running; expected the pool to be closed afterwards")
        self._pool = None

    def report(self) -> Report:
        """Return how each site of each layer is steered, by which backend, and how often since `reset_calls`."""
        return self._patched.report()

    def reset_calls(self) -> None:
        """Set the report's call counts to 0."""
        self._patched.reset_calls()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters of the active adapter."""
        return (p for p in self._patched.parameters() if p.requires_grad)

    def count_parameters(self, name: str | None = None) -> int:
        """Return the number of parameters of an adapter (default: the active one), over all layers."""
        return self._decoder.layout.count(self.config(name))

    def __repr__(self) -> str:
        if not self._decoder.alive:
            return "Steering of a deleted model"
        return describe(self._configs, self._active, self.count_parameters, self._decoder, self._model)

    # ------------------------------------------------------------------------------------------ patching and unpatching

    def attach(self, name: str) -> None:
        """Freeze the base (not PEFT's adapters), watch the decoder, set `model.steering` and activate an adapter."""
        self._patched.freeze(self._before_training)
        model: Any = self._model
        model.steering = self
        for saving in self._saving:
            saving.install()
        self.use(name)

    def unpatch(self) -> Any:
        """Remove all steering from the model, which is then exactly as before `patch_model`. Return the model.

        The adapters are lost. A second call does nothing, or continues after an exception.

        Raises:
            RuntimeError: another library has since changed a layer's class, a batch is running, or the model runs in
                another thread. Nothing is undone.
            ValueError: FSDP or ZeRO has sharded the model.
        """
        check_unsharded(self._decoder.layers, "the model to be unpatched")
        with self._scopes.change("steering.unpatch is called"):
            if self._batch is not None:
                raise RuntimeError("a batch is running; expected the model to be unpatched afterwards")
            self._patched.undo()
            self._gains.use(None)
            self._constraints.close()
            for saving in self._saving:
                saving.remove()
            self._configs.clear()
            self._pool = self._active = None
            vars(self._model).pop("steering", None)
            self._unpatched = True
        return self._given

    def merge_and_unload(self) -> Any:
        """Write the active adapter, at its strength, into the model's own weights, and unpatch. Return the model.

        The merged model computes what the steered one does, up to rounding. `save_pretrained` then writes a plain
        checkpoint, which costs nothing more to run. Weights hold what is linear: vectors at any site, and low ranks
        with φ = identity, and LoReFT, at post_mlp, pre_mlp and post_attention; at all positions. If a linear layer has
        no bias and the shift needs one, an option of the model's config (such as Llama's `mlp_bias`) becomes True. The
        other adapters are lost. PEFT's wrapper of a LoRA that was merged before is not returned.

        Raises:
            KeyError: no adapter is active.
            ValueError: the active adapter or the model cannot be merged (docs/merging.md), or FSDP or
                ZeRO has sharded the model. Nothing is changed.
            RuntimeError: a batch is running, steering is disabled, or the model runs in another thread.

        Warns:
            UserWarning: rounding to the weights' dtype changes much of the shift.
        """
        model, _ = self._merge()
        return model

    def _merge(self) -> tuple[Any, Merged]:
        """Do `merge_and_unload`. Return the model and what was merged."""
        self.check_measurable("merge_and_unload is called")
        name = self._known(None)
        check_mergeable(self._configs[name], name)
        check_unsharded(self._decoder.layers, "the model to be merged")
        with self._scopes.change("steering.merge_and_unload is called"):
            with self._disable("steering.merge_and_unload"):
                merged = find_merged(self._model, self._patched, name)
            model = self._model
            with merged.written():
                given = self.unpatch()
            # PEFT's wrapper of a merged LoRA would save an empty adapter. One of soft prompts still holds them.
            model = given if hasattr(given, "prompt_encoder") else model
        warn_of_rounding(merged)
        return model, merged

    @contextlib.contextmanager
    def _changing(self, what: str) -> Iterator[None]:
        """Let adapters change inside this context. No other thread may run the model. An exception undoes changes.

        Raises:
            RuntimeError: the model is unpatched; or see `Scopes.change`.
        """
        if self._unpatched:
            raise RuntimeError(f"{what} after steering.unpatch(); expected patch_model to be called again")
        with self._patched.changing(what):
            configs, active, pool, positions = dict(self._configs), self._active, self._pool, self._gains.positions
            give_back = self._constraints.remember()
            try:
                yield
            except BaseException:
                give_back()
                self._configs.clear()
                self._configs |= configs
                self._active, self._pool = active, pool
                self._gains.use(positions)
                raise

    def _insert(self, name: str, config: SteerConfig, adapters: dict[Place, Adapter]) -> None:
        """Put an adapter's parameters at its places, and patch the places that are not yet patched; all or none."""
        with self._changing("an adapter is added"):
            self._check_new_name(name)  # another thread may have taken the name since
            self._patched.patch(adapters)
            if self._batch is not None:  # new sites have to follow it, not the active adapter
                steer_by_rows(self._patched.sites, self._batch, self._batch.held.slots)
            sites = {place: site for place, site in self._patched.sites.items() if place in adapters}
            for place, adapter in adapters.items():
                sites[place].attach(name, adapter)
            self._constraints.add(name, config, sites)
            self._configs[name] = config
            self._use(self._active)  # an adapter that is not active does not train

    def _insert_file(self, name: str, file: AdapterFile) -> None:
        layers = self._decoder.layers
        adapters = {
            p: Adapter.of_tensors(t, execution_device(layers[p.layer]), file.config.form)
            for p, t in file.tensors.items()
        }
        self._insert(name, file.config, adapters)

    def _before_training(self, training: bool) -> None:
        """Prepare a forward pass with gradients: enforce constraints. `training` is the decoder's training mode."""
        if self._constraints.tracing:
            return
        steers = self._active is not None and not self._patched.disabled
        if training:  # also a LoRA that trains without the steering
            check_averaged(self._active if steers else None, self._patched.parameters, adapter_parameters)
        if self._active is None or not steers:
            return
        # Values that functional_call puts in place of the parameters train, if at all, outside of the model.
        if training and all(isinstance(p, nn.Parameter) and not p.requires_grad for p in self._patched.parameters()):
            warn_of_frozen(self._active)
        self._constraints.before_training(self._active, training)

    def _known(self, name: str | None) -> str:
        if name is None:
            if self._active is None:
                raise KeyError(f"no adapter is in use; expected one of {self.names} to be named, or used")
            return self._active
        return self._named(name)

    def _named(self, name: Any) -> str:
        if not isinstance(name, str) or name not in self._configs:
            raise KeyError(f"no adapter {shown(name)}; expected one of {self.names}")
        return name

    def _check_new_name(self, name: str) -> None:
        check_name(name)
        refuse_clash(name, by_lower(self._configs))
        if self._pool is not None:
            self._pool.refuse_clash(name)
