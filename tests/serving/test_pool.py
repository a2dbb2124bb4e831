"""Tests of the pool: adapters in files that are loaded into slots when a batch uses them."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import math
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import within
from models import assert_close, build, build_frozen, randomize, refused, snapshot, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from fused_steer import SteerConfig, patch_model

PROMPTS = tokens(batch=3, length=6)
CONFIGS = [
    SteerConfig(rank=4),
    SteerConfig(rank=2, activation="identity", layers=[1], scale=0.5),
    SteerConfig(form="vector"),
    SteerConfig(rank=3, activation="tanh", down_bias=True, up_bias=True),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Make a folder with eight adapters, 0 to 7."""
    root = tmp_path_factory.mktemp("adapters")
    for number in range(8):
        model = patch_model(build(), CONFIGS[number % 4])
        randomize(model, seed=number + 1)
        model.steering.save(root / str(number))
    return root


@pytest.fixture(scope="module")
def expected(folder) -> list[Tensor]:
    """Compute the logits of each adapter, without a pool."""
    found = []
    for number in range(8):
        with torch.no_grad():
            found.append(patch_model(build(), folder / str(number))(PROMPTS).logits)
    return found


def pooled(folder: Path, slots: int = 3, **options: Any) -> PreTrainedModel:
    """Build a model with a pool of all eight adapters, and an attached adapter "own"."""
    model = patch_model(build(), CONFIGS[0], adapter_name="own")
    randomize(model, "own", seed=99)
    pool = model.steering.make_pool(slots=slots, rank=4, **options)
    assert pool.register_directory(folder) == [str(number) for number in range(8)]
    return model


def logits(model: PreTrainedModel, names: list[str | None]) -> Tensor:
    with model.steering.batch(names), torch.no_grad():
        return model(PROMPTS[: len(names)]).logits


def assert_serves(model: PreTrainedModel, expected: list[Tensor], numbers: list[int]) -> None:
    out = logits(model, [str(number) for number in numbers])
    for row, number in enumerate(numbers):
        assert_close(out[row], expected[number][row], unsteered=rows_and_all(len(numbers)))


def rows_and_all(count: int) -> tuple[Tensor, Tensor]:
    """Run the first `count` prompts with the unsteered model, alone and within a batch of all."""
    base = build_frozen()
    with torch.no_grad():
        return base(PROMPTS[:count]).logits, base(PROMPTS).logits[:count]


def test_pool_eight_adapters_over_three_slots(folder, expected):
    model = pooled(folder)
    pool = model.steering.pool
    for numbers in ([0, 1, 2], [2, 3, 0], [4, 5, 6], [7, 7, 7], [0, 4, 1], [1, 0, 4]):
        assert_serves(model, expected, numbers)
    done = pool.statistics
    assert (done.hits, done.loads, done.evictions, done.failures) == (5, 11, 8, 0)
    assert set(pool.loaded) == {"0", "1", "4"} and pool.loaded[-1] == "4"
    files = sum(t.nbytes for n in (0, 1, 2, 3, 4, 5, 6, 7, 0, 4, 1) for t in _tensors(folder / str(n)).values())
    assert done.loaded_bytes == files
    assert "8 adapters, 3 in 3 slots of rank 4" in repr(pool) and "\n" not in repr(pool)


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path / "adapter_model.safetensors")


def test_pool_the_least_recently_used_goes(folder):
    pool = pooled(folder).steering.pool
    for name in ("0", "1", "2", "0"):
        pool.load(name)
    assert pool.loaded == ["1", "2", "0"]
    with pool.hold(["1"]):
        pool.load("3")
        assert pool.loaded == ["0", "1", "3"]
    assert pool.load("1") == pool.load("1")


def test_pool_beside_adapters_of_the_model_and_none(folder, expected):
    model = pooled(folder)
    model.steering.use("own")
    with torch.no_grad():
        own = model(PROMPTS).logits
    out = logits(model, ["5", "own", None])
    assert_close(out[0], expected[5][0])
    assert_close(out[1], own[1])
    assert model.steering.pool.loaded == ["5"]  # the other slots are free again
    with torch.no_grad():
        for site in (layer.post_block for layer in model.model.layers):
            site.steer_up["own"].weight.zero_()  # an attached adapter may change between two batches
    with torch.no_grad(), model.steering.disabled():
        base = model(PROMPTS).logits
    assert torch.equal(logits(model, [None, "own", "5"])[:2], base[:2])


def test_pool_no_file_is_mapped(folder, monkeypatch):
    """Cutting a file after its check, while its tensors are copied into slots, does not crash the process."""
    model = pooled(folder)
    pool, path = model.steering.pool, folder / "0" / "adapter_model.safetensors"
    content, write = path.read_bytes(), pool._write
    expected = logits(pooled(folder), ["0", None])

    def cut(*args: Any) -> None:
        assert str(path) not in Path("/proc/self/maps").read_text()
        os.truncate(path, 100)
        write(*args)

    with monkeypatch.context() as context:
        context.setattr(pool, "_write", cut)
        try:
            assert torch.equal(logits(model, ["0", None]), expected)
        finally:
            path.write_bytes(content)


def test_pool_registering_opens_nothing(tmp_path):
    model = pooled_empty()
    for number in range(1000):
        (tmp_path / f"a{number}").mkdir()
        (tmp_path / f"a{number}" / "adapter_config.json").touch()
    (tmp_path / "no-adapter").mkdir()
    start = time.process_time()
    names = model.steering.pool.register_directory(tmp_path)
    assert len(names) == len(model.steering.pool) == 1000 and time.process_time() - start < 5
    assert model.steering.pool.loaded == []


def pooled_empty() -> PreTrainedModel:
    model = patch_model(build(), SteerConfig(rank=2, layers=[1]), adapter_name="own")
    model.steering.make_pool(slots=2, rank=4)
    return model


def test_pool_a_changed_file_is_taken_when_asked(folder, expected, tmp_path):
    model = pooled_empty()
    shutil.copytree(folder / "0", tmp_path / "x")
    model.steering.pool.register("0", tmp_path / "x")
    assert_serves(model, expected, [0])
    shutil.rmtree(tmp_path / "x")
    shutil.copytree(folder / "4", tmp_path / "x")
    assert_serves(model, expected, [0])
    model.steering.pool.reload("0")
    assert_close(logits(model, ["0"])[0], expected[4][0], unsteered=rows_and_all(1))


def test_pool_unpatched_the_model_is_as_it_came(folder, expected):
    model = build()
    before = snapshot(model)
    patch_model(model, SteerConfig(rank=2, layers=[1]))
    model.steering.make_pool(slots=2, rank=4).register_directory(folder)
    assert_serves(model, expected, [3, 0])
    model.steering.unpatch()
    assert snapshot(model) == before


def test_pool_closed_and_made_anew(folder, expected):
    model = pooled(folder)
    model.steering.close_pool()
    assert model.steering.pool is None
    with refused(KeyError, "no adapter '0'"), model.steering.batch(["0"]):
        pass
    model.steering.make_pool(slots=1, rank=8, layers=[1]).register("1", folder / "1")
    assert_serves(model, expected, [1])
    assert copy.deepcopy(model).steering.pool is None


def test_pool_slots_in_bfloat16_take_half_the_memory(folder, expected):
    half, whole = (pooled(folder, dtype=dtype).steering.pool for dtype in ("bfloat16", "float32"))
    codes = sum(slots.codes.nbytes for slots in half.slots.values())
    assert 2 * (half.nbytes - codes) == whole.nbytes - codes
    values = 2 * 4 * 32 + 4 + 32  # W1 and W2, b1, b2
    assert whole.nbytes - codes == 3 * 3 * values * 4


# ------------------------------------------------------------------------------------------------------------ threads


def test_pool_many_threads_few_slots(folder, expected):
    """Batches, loads, failures and removals run at once in many threads, and each batch is correct."""
    model = pooled(folder, slots=3)
    pool = model.steering.pool
    wrong: list[Any] = []
    stop = threading.Event()

    def serve(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(15):
            numbers = torch.randint(8, (2,), generator=generator).tolist()
            try:
                assert_serves(model, expected, numbers)
            except TimeoutError:
                pass  # the other threads hold the slots
            except BaseException as error:
                wrong.append((numbers, error))

    def disturb(name: str) -> None:
        while not stop.is_set():
            try:
                pool.load(name)
            except TimeoutError:
                pass
            with pytest.raises(FileNotFoundError):
                pool.register("gone", folder / "gone")
                try:
                    pool.load("gone")
                finally:
                    pool.remove("gone")
            time.sleep(0.001)

    servers = [threading.Thread(target=serve, args=[seed]) for seed in range(4)]
    other = threading.Thread(target=disturb, args=["7"])
    for thread in (*servers, other):
        thread.start()
    for thread in servers:
        thread.join()
    stop.set()
    other.join()
    assert not wrong
    assert pool.statistics.evictions > 10 and len(pool.loaded) <= 3


def test_pool_two_threads_load_an_adapter_once(folder, monkeypatch):
    pool = pooled(folder).steering.pool
    read, reads = pool._read, []

    def slow(source: str) -> Any:
        reads.append(source)
        time.sleep(0.05)
        return read(source)

    monkeypatch.setattr(pool, "_read", slow)
    threads = [threading.Thread(target=pool.load, args=["0"]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1 and pool.statistics.hits == 3


@contextlib.contextmanager
def held_for_a_moment(pool):
    """Hold all three slots in another thread, until 0.05 s after the context was entered."""
    holding, release = threading.Event(), threading.Event()

    def hold() -> None:
        with pool.hold(["0", "1", "2"]):
            holding.set()
            release.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait()
    threading.Timer(0.05, release.set).start()
    yield
    thread.join()


def test_pool_waiting_for_a_slot(folder):
    pool = pooled(folder).steering.pool
    with pool.hold(["0", "1", "2"]):
        with refused(TimeoutError, "adapter '3' finds no slot: all 3 are in use by running batches"):
            pool.load("3")
        with refused(TimeoutError, "finds no slot"):
            pool.load("3", timeout=0.05)
    with held_for_a_moment(pool):
        assert pool.load("3", timeout=30) in range(3)


@pytest.mark.parametrize("timeout", [None, "1", True, math.nan, np.array([1.0])], ids=str)
def test_pool_timeout_that_is_no_number_is_refused(folder, timeout):
    pool = pooled(folder).steering.pool
    with pool.hold(["0", "1", "2"]), within(20), refused(ValueError, "timeout is", "expected a number of seconds"):
        pool.load("3", timeout=timeout)


@pytest.mark.parametrize("timeout", [math.inf, 10**400, np.float32(30)], ids=["inf", "huge", "np"])
def test_pool_timeout_of_any_size_and_type(folder, timeout):
    pool = pooled(folder).steering.pool
    with held_for_a_moment(pool), within(20):
        assert pool.load("3", timeout=timeout) in range(3)


# ---------------------------------------------------------------------------------------------------------- bad input


def _hidden(path: Path) -> None:
    other = build(hidden_size=64)
    patch_model(other, SteerConfig(rank=2)).steering.save(path)


def _layers(path: Path) -> None:
    patch_model(build(num_hidden_layers=2), SteerConfig(rank=2)).steering.save(path)


def _rank(path: Path) -> None:
    patch_model(build(), SteerConfig(rank=5)).steering.save(path)


def _saved(path: Path) -> tuple[Path, Path]:
    patch_model(build(), SteerConfig(rank=2)).steering.save(path)
    return path / "adapter_model.safetensors", path / "adapter_config.json"


def edit(config: Path, **fields: Any) -> None:
    """Change fields of the config and remove its digest."""
    config.write_text(json.dumps({**json.loads(config.read_text()), "config_sha256": None, **fields}))


def _corrupt(path: Path) -> None:
    weights, _ = _saved(path)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")


def _truncated(path: Path) -> None:
    weights, _ = _saved(path)
    weights.write_bytes(weights.read_bytes()[:40])


def _truncated_without_digest(path: Path) -> None:
    weights, config = _saved(path)
    weights.write_bytes(weights.read_bytes()[:40])
    edit(config, weights_sha256=None, tensors_sha256=None)


def _empty(path: Path) -> None:
    _saved(path)[0].write_bytes(b"")


def _no_json(path: Path) -> None:
    _saved(path)[1].write_text("{")


def _not_finite(path: Path) -> None:
    weights, config = _saved(path)
    tensors = load_file(weights)
    tensors["base_model.model.model.layers.1.post_block.steer_up.weight"][3, 1] = torch.nan
    save_file(tensors, weights)
    edit(config, weights_sha256=None, tensors_sha256=None)


def _strength_beyond_float32(path: Path) -> None:
    _, config = _saved(path)
    edit(config, scale=1e39)


def _foreign(path: Path) -> None:
    _saved(path)[1].write_text(json.dumps({"peft_type": "LORA", "r": 8}))


def _no_files(path: Path) -> None:
    path.mkdir()


def _nothing(path: Path) -> None:
    pass


BROKEN: list[tuple[Any, type[Exception], str]] = [
    (_hidden, ValueError, "is for a model of hidden size 64; expected 32"),
    (_layers, ValueError, "is for a model of number of layers 2; expected 3"),
    (_rank, ValueError, "is of rank 5; expected at most 4, the rank of the pool's slots"),
    (_corrupt, ValueError, "its contents do not match adapter_config.json"),
    (_truncated, ValueError, "adapter_model.safetensors cannot be loaded: its header is of"),
    (_truncated_without_digest, ValueError, "adapter_model.safetensors cannot be loaded"),
    (_empty, ValueError, "adapter_model.safetensors cannot be loaded: it has no header, at 0 bytes"),
    (_no_json, ValueError, "adapter_config.json cannot be loaded"),
    (_not_finite, ValueError, "tensor model.layers.1.post_block.steer_up.weight has values that are NaN or infinite"),
    (_strength_beyond_float32, ValueError, "scale is 1e+39; expected at most"),
    (_foreign, ValueError, "peft_type is 'LORA'; expected 'POST_BLOCK'"),
    (_no_files, FileNotFoundError, "has no adapter_config.json"),
    (_nothing, FileNotFoundError, "no adapter directory"),
]


@pytest.mark.parametrize(("make", "error", "part"), BROKEN, ids=lambda value: getattr(value, "__name__", None))
def test_pool_what_cannot_be_loaded_fails_alone(folder, tmp_path, make, error, part):
    model = pooled(folder)
    pool = model.steering.pool
    before = logits(model, ["0", "1", "2"])
    make(tmp_path / "broken")
    pool.register("broken", tmp_path / "broken")
    loaded = pool.loaded
    for call in (
        lambda: pool.load("broken"),
        lambda: logits(model, ["broken", "0"]),
        lambda: logits(model, ["0", "broken"]),
    ):
        with refused(error, "adapter 'broken' cannot be served", part):
            call()
    assert sorted(pool.loaded) == sorted(loaded) and pool.statistics.failures == 3
    assert torch.equal(logits(model, ["0", "1", "2"]), before)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (PermissionError(errno.EACCES, "no access", "file"), PermissionError),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "no\ntext"), UnicodeError),  # it takes more than a message
        (ImportError("no module"), ImportError),
        (KeyError("k"), LookupError),  # a KeyError would quote the message
        (MemoryError(), MemoryError),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_pool_any_error_names_the_adapter(folder, monkeypatch, error, raised):
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise error

    model = pooled(folder)
    with monkeypatch.context() as patch:
        patch.setattr("fused_steer.serving.pool.read_adapter", fails)
        with refused(raised, "adapter '3' cannot be served: ", " ".join(str(error).split())):
            model.steering.pool.load("3")
    assert model.steering.pool.statistics.failures == 1
    model.steering.pool.load("3")


def test_pool_another_base_model(folder, tmp_path):
    path = tmp_path / "x"
    edit(shutil.copytree(folder / "0", path) / "adapter_config.json", base_model_name_or_path="other")
    model = pooled(folder)
    model.config._name_or_path = "mine"
    model.steering.pool.register("x", path)
    with refused(ValueError, "is for the base model 'other'; expected 'mine'"):
        model.steering.pool.load("x")
    model.steering.close_pool()
    model.steering.make_pool(slots=1, rank=4, check_base=False).register("x", path)
    model.steering.pool.load("x")


def test_pool_values_beyond_the_slots_dtype(folder, tmp_path):
    """They became infinite in float16's slots, and the logits NaN."""
    model = patch_model(build(), SteerConfig(form="vector"), adapter_name="big")
    with torch.no_grad():
        for parameter in model.steering.parameters():
            parameter.fill_(7e4)
    model.steering.save(tmp_path / "saved")
    pool = model.steering.make_pool(slots=2, rank=4, dtype="float16")
    pool.register("saved", tmp_path / "saved")
    pool.register("0", folder / "0")
    pool.load("0")
    beyond = "has values up to 7e+04 in layer 0; expected at most 6.55e+04, the largest of the slots' float16"
    for name in ("saved", "big"):
        with refused(ValueError, beyond):
            logits(model, [name])
    assert pool.loaded == ["0"]
    model.steering.close_pool()
    model.steering.make_pool(slots=2, rank=0, dtype="bfloat16").register("saved", tmp_path / "saved")
    assert logits(model, ["saved", "big"]).isfinite().all()


def test_pool_a_layer_outside_of_the_pool(folder):
    model = patch_model(build(), CONFIGS[0], adapter_name="own")
    pool = model.steering.make_pool(slots=2, rank=4, layers=[1])
    pool.register_directory(folder)
    pool.load("1")
    with refused(ValueError, "steers layer 0; expected those of the pool, [1]"):
        pool.load("0")
    with refused(ValueError, "adapter 'own' steers layer 0; expected those of the pool, [1]"):
        logits(model, ["own"])


def test_pool_in_use_by_a_running_batch(folder, expected):
    model = pooled(folder)
    pool = model.steering.pool
    with model.steering.batch(["0", "1"]), torch.no_grad():
        for call in (pool.remove, pool.reload):
            with refused(ValueError, "adapter '0' is in use by a running batch"):
                call("0")
        with refused(RuntimeError, "a batch is running; expected the pool to be closed afterwards"):
            model.steering.close_pool()
        pool.load("2")
        with refused(TimeoutError, "finds no slot"), pool.hold(["2", "3"]):
            pass
        pool.remove("2")
        assert_close(model(PROMPTS[:2]).logits[0], expected[0][0], unsteered=rows_and_all(2))
    pool.remove("0")
    with refused(KeyError, "no adapter '0'; expected one of ['own']"), model.steering.batch(["0"]):
        pass
    assert_serves(model, expected, [1])


def test_pool_names_and_sizes(folder, tmp_path):
    model = pooled(folder)
    pool = model.steering.pool
    with refused(ValueError, "adapter name is 'a.b'; expected letters"):
        pool.register("a.b", folder / "0")
    with refused(ValueError, "adapter name is []; expected letters"):
        pool.register([], folder / "0")
    with refused(ValueError, "source is ''; expected an adapter's directory"):
        pool.register("new", "")
    with refused(TypeError, "source is a bytes; expected an adapter's directory"):
        pool.register("new", b"x")
    with refused(ValueError, "directory is ''; expected one that holds adapters' directories"):
        pool.register_directory("")
    with refused(ValueError, "adapter '0' is registered already"):
        pool.register("0", folder / "0")
    with refused(ValueError, "there is an adapter 'own' in the model already"):
        pool.register("own", folder / "0")
    with refused(ValueError, "there is an adapter '3' in the pool already", model=model):
        model.steering.load(folder / "3", name="3")
    with refused(KeyError, "no adapter 'x' in the pool; expected one of its 8"):
        pool.load("x")
    for name in (None, ["0"]):
        with refused(TypeError, f"names has {name!r}; expected names of adapters"):
            pool.load(name)
        for call in (pool.remove, pool.reload):
            with refused(KeyError, f"no adapter {name!r} in the pool"):
                call(name)
    with refused(TypeError, "names is '01'; expected a list of names"), pool.hold("01"):
        pass
    with refused(ValueError, "4 adapters are needed at once; expected at most 3"), pool.hold(["0", "1", "2", "3"]):
        pass
    with refused(FileNotFoundError, "no directory"):
        pool.register_directory(tmp_path / "none")
    with refused(NotADirectoryError, "is a file; expected a directory that holds adapters' directories"):
        pool.register_directory(folder / "0" / "adapter_config.json")
    with refused(KeyError, "no adapter 'x'; expected one of ['own'], or of the 8 of its pool"):
        with model.steering.batch(["x"]):
            pass
    shutil.copytree(folder / "0", tmp_path / "new")
    shutil.copytree(folder / "0", tmp_path / ".copying")
    shutil.copytree(folder / "0", tmp_path / "bad.name")
    with refused(ValueError, "adapter name is 'bad.name'"):
        pool.register_directory(tmp_path)
    assert "new" not in pool
    (tmp_path / "bad.name").rename(tmp_path / "good-name")
    assert pool.register_directory(tmp_path) == ["good-name", "new"]
    with refused(ValueError, "there is a pool already; expected close_pool() first"):
        model.steering.make_pool()


@pytest.mark.parametrize(
    ("options", "error", "part"),
    [
        ({"slots": 0}, ValueError, "slots is 0; expected at least 1"),
        ({"slots": 1.5}, TypeError, "slots is 1.5; expected an integer"),
        ({"slots": 10**30}, ValueError, "slots has 100 bits; expected at most 2147483647"),
        ({"rank": 257}, ValueError, "rank is 257; expected at most 256"),
        ({"rank": -1}, ValueError, "rank is -1; expected at least 0"),
        ({"dtype": []}, ValueError, "dtype is []; expected one of float32"),
        ({"dtype": "int8"}, ValueError, "dtype is 'int8'; expected one of float32"),
        ({"layers": [3]}, ValueError, "layers has 3; expected indices below 3"),
    ],
    ids=str,
)
def test_pool_pools_that_cannot_be(options, error, part):
    model = patch_model(build(), SteerConfig(rank=2, layers=[1]))
    with refused(error, part, model=model):
        model.steering.make_pool(**options)
    assert model.steering.pool is None


def test_pool_vectors_alone(folder, expected):
    model = patch_model(build(), SteerConfig(rank=2, layers=[1]))
    model.steering.make_pool(slots=2, rank=0).register_directory(folder)
    assert_serves(model, expected, [2, 6])
    with refused(ValueError, "is of rank 4; expected at most 0"):
        model.steering.pool.load("0")
