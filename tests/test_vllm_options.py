"""Tests of a steering server's options in vLLM: the bound of the dose, the room of the slots, and no --enable-lora."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fused_steer.kernels.torch_backend import ACTIVATIONS as PHI
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from vllm_models import CONFIGS, NEW_TOKENS, PROMPTS, answers, engine_options, save_adapter, save_lora, save_model
from vllm_worker import ask

from fused_steer import SteerConfig, patch_model

pytestmark = pytest.mark.vllm

LIMIT = 0.25
#: A prompt with a block that vLLM caches.
LONG = list(range(3, 43))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Make a folder with model/, adapters/ with an adapter per entry of CONFIGS, and a LoRA."""
    root = tmp_path_factory.mktemp("served")
    save_model(root / "model")
    for seed, (name, config) in enumerate(CONFIGS.items(), 1):
        save_adapter(root / "model", root / "adapters" / name, config, seed)
    save_lora(root / "lora", seed=7)
    return root


def server(folder: Path, steering: dict[str, Any], **options: Any) -> Any:
    from vllm import LLM

    return LLM(**engine_options(folder / "model", additional_config={"steering": steering}, **options))


def tensors_of(path: Path, form: str) -> dict[int, dict[str, torch.Tensor]]:
    """Return W1, b1, W2 and b2 of an adapter by layer and name."""
    from fused_steer.adapters.parameters import steered

    found: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(path / "adapter_model.safetensors").items():
        layer, _, name = key.partition(".layers.")[2].partition(".")
        found.setdefault(int(layer), {})[name.partition(".")[2]] = tensor
    return {layer: steered(form, tensors) for layer, tensors in found.items()}


def shift_of(tensors: dict[str, torch.Tensor], activation: str, h: torch.Tensor) -> torch.Tensor:
    """Return W2 φ(W1 h + b1) + b2 of an adapter at a layer."""
    shift = torch.zeros_like(h)
    if "steer_down.weight" in tensors:
        a = h @ tensors["steer_down.weight"].to(h).T + tensors.get("steer_down.bias", torch.zeros(1)).to(h)
        shift = PHI[activation][0](a) @ tensors["steer_up.weight"].to(h).T
    return shift + tensors.get("steer_up.bias", torch.zeros(1)).to(h)


def bounded_answer(folder: Path, name: str, prompt: list[int], scale: float, limit: float) -> tuple[list[int], float]:
    """Answer greedily in transformers, with the dose held to the limit by hooks; return the highest dose before."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    config, tensors = CONFIGS[name], tensors_of(folder / "adapters" / name, CONFIGS[name].form)
    highest = 0.0

    def hook(index: int) -> Any:
        def steer(module: Any, inputs: Any, output: Any) -> Any:
            nonlocal highest
            h = output if isinstance(output, torch.Tensor) else output[0]
            shift = scale * shift_of(tensors[index], config.activation, h)
            dose = shift.norm(dim=-1, keepdim=True) / h.norm(dim=-1, keepdim=True)
            highest = max(highest, float(dose.max()))
            h = h + shift * (limit / dose).clamp(max=1)
            return h if isinstance(output, torch.Tensor) else (h, *output[1:])

        return steer

    for index in tensors:
        model.model.layers[index].register_forward_hook(hook(index))
    ids = torch.tensor([prompt])
    out = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    return out[0, len(prompt) :].tolist(), highest


# --------------------------------------------------------------------------------------------------------- the options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"steering is \[\]; expected an object with adapters, slots, rank, dtype, layers, dose"),
        ({"dosis": 1}, "steering has dosis; expected adapters, slots, rank, dtype, layers, dose, fuse_norm alone"),
        ({"dose": {"limit": 1, "action": "stop"}}, "dose.action is 'stop'; expected refuse, clamp or warn"),
        ({"dose": {"action": "warn"}}, "dose has no limit; expected a positive number"),
        ({"dose": {"limit": 0}}, "dose.limit is 0; expected a positive number"),
        ({"dose": {"limit": "high"}}, "dose.limit is 'high'; expected a number"),
        ({"slots": 0}, "slots has 0; expected a whole number of at least 1"),
        ({"rank": 300}, "rank has 300; expected a whole number of 0 to 256"),
        ({"rank": True}, "rank has True; expected a whole number"),
        ({"dtype": "int8"}, "dtype is 'int8'; expected one of float32, bfloat16, float16"),
        ({"layers": []}, r"layers is \[\]; expected a list of layers"),
        ({"adapters": 3}, "adapters is 3; expected the path of a directory"),
    ],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value),
)
def test_vllm_options_that_no_server_has(given, message):
    from fused_steer.vllm.options import read_server_options

    with pytest.raises((TypeError, ValueError), match=message) as caught:
        read_server_options(given)
    assert "\n" not in str(caught.value)


def test_vllm_options_slots_are_vllms_own_with_enable_lora():
    from fused_steer.vllm.options import server_options

    config = SimpleNamespace(additional_config={"steering": {"slots": 3}}, lora_config=SimpleNamespace())
    with pytest.raises(ValueError, match="steering.slots is 3 with --enable-lora; expected --max-loras instead"):
        server_options(config)
    config.lora_config = None
    assert server_options(config).slots == 3
    assert server_options(SimpleNamespace(additional_config={}, lora_config=None)) is None


# ------------------------------------------------------------------------------------------------------------ the dose


def adapters_of_all_kinds(seed: int) -> list[tuple[dict[str, torch.Tensor], str]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    found = []
    for activation in PHI:
        weights = {"steer_down.weight": draw(4, 32), "steer_up.weight": draw(32, 4)}
        found += [
            (weights, activation),
            ({**weights, "steer_down.bias": draw(4), "steer_up.bias": draw(32)}, activation),
        ]
    return [*found, ({"steer_up.bias": draw(32)}, "identity")]


def test_vllm_dose_no_hidden_state_gets_more_than_the_bound():
    """Random hidden states, and the worst ones that a search finds, of at least the norm that the option names."""
    from fused_steer.adapters.parameters import Place
    from fused_steer.vllm.dose import highest_dose

    for tensors, activation in adapters_of_all_kinds(3):
        for norm in (0.5, 20.0):
            bound = highest_dose({Place(0): tensors}, activation, norm)
            h = torch.randn(64, 32, generator=torch.Generator().manual_seed(5)).requires_grad_()
            optimizer = torch.optim.Adam([h], lr=0.1)
            for _ in range(100):
                size = h.norm(dim=1, keepdim=True)
                of_norm = h * size.clamp(min=norm) / size
                doses = shift_of(tensors, activation, of_norm).norm(dim=1) / of_norm.norm(dim=1)
                assert float(doses.max()) <= bound * (1 + 1e-5)
                optimizer.zero_grad()
                (-doses.sum()).backward()
                optimizer.step()
        if activation == "identity" and len(tensors) == 2:
            assert float(doses.max()) > 0.95 * bound  # and for a linear adapter the bound is met


def test_vllm_dose_of_biases_has_no_bound_without_a_norm():
    from fused_steer.adapters.parameters import Place
    from fused_steer.vllm.dose import highest_dose, refusal
    from fused_steer.vllm.options import Dose

    dose = Dose(0.5)
    for tensors, activation in adapters_of_all_kinds(4):
        bound = highest_dose({Place(0): tensors}, activation, None)
        assert (bound == float("inf")) == ("steer_up.bias" in tensors)
        assert refusal(bound, 0.0, dose) is None
        reason = refusal(bound, -1.0, dose)
        assert ("steering.dose.norm" if bound == float("inf") else "a scale of at most") in reason
        if bound < float("inf"):
            assert refusal(bound, 0.5 / bound * 0.999, dose) is None and refusal(bound, 0.5 / bound * 1.001, dose)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("paired", [True, False])
def test_vllm_dose_measured_and_lowered(dtype, paired):
    """A token above the limit gets the limit, in its own direction. Another keeps its gain, bit for bit."""
    from fused_steer.serving.slots import Slots
    from fused_steer.vllm.dose import Meter
    from fused_steer.vllm.options import Dose

    generator = torch.Generator().manual_seed(2)
    slots = Slots(3, 4, 32, up_bias=True)
    adapters = {0: adapters_of_all_kinds(6)[0], 2: adapters_of_all_kinds(6)[-1]}
    for slot, (tensors, activation) in adapters.items():
        slots.put(slot, tensors, activation)
    hidden = torch.randn(40, 32, generator=generator).to(dtype)
    residual = torch.randn(40, 32, generator=generator).to(dtype) if paired else None
    h = hidden.float() + (0 if residual is None else residual.float())
    h[7] = 0
    hidden[7] = 0 if residual is None else -residual[7]
    ids = torch.tensor([0, 2, -1, 0] * 10, dtype=torch.int32)
    gains = torch.linspace(-0.5, 0.5, 40)
    gains[12] = 0
    for action in ("clamp", "warn"):
        meter = Meter(Dose(LIMIT, action), 3, torch.device("cpu"), lambda slot: f"of slot {slot}")
        found = meter.gains(slots, hidden, residual, ids, gains)
        peaks, above = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
        for token in range(40):
            slot, gain = int(ids[token]), float(gains[token])
            shift = torch.zeros(32) if slot < 0 else gain * shift_of(adapters[slot][0], adapters[slot][1], h[token])
            dose = float(shift.norm() / h[token].norm()) if float(shift.norm()) else 0.0
            peaks[slot] = max(float(peaks[slot]), dose)
            above[slot] += dose > LIMIT
            lowered = gain * LIMIT / dose if dose > LIMIT and action == "clamp" else gain
            if lowered == gain:
                assert float(found[token]) == gain
            else:
                torch.testing.assert_close(found[token], torch.tensor(lowered))
        torch.testing.assert_close(meter.peaks, peaks)
        assert meter.above.tolist() == above.tolist() and 0 < above[0] < 20


def test_vllm_dose_says_which_adapters_were_above_it_once_each(monkeypatch):
    from fused_steer.serving.slots import Slots
    from fused_steer.vllm import dose

    said: list[str] = []
    monkeypatch.setattr(dose.logger, "warning", lambda text, *values: said.append(text % values))
    slots = Slots(2, 0, 8, up_bias=True)
    for slot in range(2):
        slots.put(slot, {"steer_up.bias": torch.full((8,), 1.0 + slot)}, "identity")
    meter = dose.Meter(dose.Dose(0.5, "warn"), 2, torch.device("cpu"), lambda slot: ("mild", "strong")[slot])

    def step(gain: float) -> None:
        ids = torch.tensor([0, 1], dtype=torch.int32)
        meter.gains(slots, torch.ones(2, 8), None, ids, torch.full((2,), gain))
        meter.look()
        meter.look()

    step(0.2)
    assert said == []
    step(0.3)
    step(0.4)
    assert said == [
        "Adapter 'strong' reached a relative dose of 0.6, above the limit 0.5 (steering.dose); it was not lowered"
    ]
    step(0.6)
    assert len(said) == 2 and "'mild'" in said[1]
    meter.forget(1)  # another adapter comes into the slot
    step(0.7)
    assert len(said) == 3


# ------------------------------------------------------------------------------------------------------------ the room


def read(path: Path) -> Any:
    from fused_steer.adapters.files import read_adapter

    return read_adapter(path)


def test_vllm_room_is_that_of_the_adapters(folder):
    """The slots take rank, dtype, layers and biases from the adapters; options go first."""
    from fused_steer.serving.slots import Slots
    from fused_steer.vllm.options import read_server_options
    from fused_steer.vllm.room import make_room

    files = {name: read(folder / "adapters" / name) for name in CONFIGS}
    given = read_server_options({"adapters": "here"})
    room = make_room(given, None, [files["linear"]])
    assert (room.rank, room.layers, room.down_bias, room.up_bias) == (8, {0, 2}, False, False)
    room = make_room(given, 64, [files["vector"]])
    assert (room.rank, room.layers, room.down_bias, room.up_bias) == (0, {0, 1, 2}, False, True)
    room.check("it", files["vector"])
    with pytest.raises(ValueError, match=r"it is of rank 4; expected at most 0 \(steering.rank\)"):
        room.check("it", files["silu"])
    with pytest.raises(ValueError, match="steering has no rank and no adapters; expected one of them without"):
        make_room(None, None, [])
    room = make_room(read_server_options({"rank": 4, "layers": [0, 2]}), None, [])
    with pytest.raises(
        ValueError, match=r"it steers in the layers 1; expected the layers 0, 2 alone \(steering.layers\)"
    ):
        room.check("it", files["silu"])
    room = make_room(read_server_options({"rank": 4, "dtype": "float16"}), None, [])
    room.check("it", files["vector"])
    for tensors in files["vector"].tensors.values():
        for tensor in tensors.values():
            tensor.fill_(7e4)
    with pytest.raises(ValueError, match=r"it has values up to 7e\+04 in layer 0; expected at most 6.55e\+04"):
        room.check("it", files["vector"])
    room = make_room(given, None, [files["silu"]])
    with pytest.raises(ValueError, match="it has steer_down.bias; expected none, as the adapters that the slots"):
        room.check("it", files["biases"])
    # Slots for vectors take a row of each layer, without W1 and W2: 64 slots of a model of 32 layers of 4096.
    vectors, lowrank = (
        Slots(1, r.rank, 4096, dtype=r.dtype, device="meta", down_bias=r.down_bias, up_bias=r.up_bias)
        for r in (make_room(read_server_options({"rank": 0, "dtype": "bfloat16"}), 8, []), make_room(None, 8, []))
    )
    assert 64 * 32 * (vectors.nbytes - 4) == 16 << 20 and 64 * 32 * lowrank.nbytes > 544 << 20


def test_vllm_adapters_of_a_directory_leave_out_what_is_still_copied(folder, tmp_path):
    from fused_steer.vllm.sources import registered

    shutil.copytree(folder / "adapters" / "silu", tmp_path / "silu")
    (tmp_path / ".linear").mkdir()
    shutil.copy(folder / "adapters" / "linear" / "adapter_config.json", tmp_path / ".linear")
    assert list(registered(str(tmp_path))) == ["silu"]


def test_vllm_room_of_adapters_in_bfloat16(folder, tmp_path):
    """Slots in the adapters' dtype hold them exactly. A wider adapter is refused, unless the option says to round."""
    from dataclasses import replace

    from fused_steer.adapters.files import AdapterFile, write_adapter
    from fused_steer.vllm.options import read_server_options
    from fused_steer.vllm.room import make_room

    wide = read(folder / "adapters" / "silu")
    narrow = replace(
        wide,
        config=replace(wide.config, dtype="bfloat16"),
        tensors={place: {n: t.bfloat16() for n, t in named.items()} for place, named in wide.tensors.items()},
    )
    assert isinstance(narrow, AdapterFile)
    write_adapter(tmp_path / "narrow", narrow)
    narrow = read(tmp_path / "narrow")
    given = read_server_options({"adapters": "here"})
    room = make_room(given, None, [narrow])
    assert room.dtype == torch.bfloat16
    room.check("it", narrow)
    with pytest.raises(
        ValueError, match=r"it is in float32; expected bfloat16, the dtype of the slots \(steering.dtype\)"
    ):
        room.check("it", wide)
    assert make_room(given, None, [narrow, wide]).dtype == torch.float32
    make_room(read_server_options({"adapters": "here", "dtype": "bfloat16"}), None, [narrow]).check("it", wide)


# ------------------------------------------------------------------------------------------------ without --enable-lora


@pytest.fixture(scope="module")
def alone(folder):
    """An engine without LoRA, with fewer slots than adapters, that holds doses to a limit."""
    steering = {"adapters": str(folder / "adapters"), "slots": 2, "dose": {"limit": LIMIT, "action": "clamp"}}
    options = {"enable_lora": False, "max_loras": 1, "block_size": 32, "enable_prefix_caching": True}
    engine = server(folder, steering, **options, max_num_batched_tokens=32, max_num_seqs=16)
    yield engine
    engine.llm_engine.engine_core.shutdown()


def outputs_of(engine: Any, rows: list[tuple[list[int], Any]]) -> list[list[int]]:
    """Answer a batch of prompts with these steering options."""
    from vllm import SamplingParams

    parameters = [
        SamplingParams(
            temperature=0,
            max_tokens=NEW_TOKENS,
            ignore_eos=True,
            extra_args=None if options is None else {"steering": options},
        )
        for _, options in rows
    ]
    found = engine.generate([{"prompt_token_ids": prompt} for prompt, _ in rows], parameters, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in found]


def test_vllm_alone_adapters_named_by_options_with_doses_held_to_the_limit(alone, folder):
    """Five adapters in two slots, with strengths below and above the limit, cold and from the cache."""
    rows, right = [], []
    for prompt in PROMPTS[:2]:
        rows.append((prompt, None))
        right.append(answers(folder / "model")[PROMPTS.index(prompt)])
        for name in CONFIGS:
            _, dose = bounded_answer(folder, name, prompt, 1.0, float("inf"))
            pair = []
            for scale in (0.5 * LIMIT / dose, -6 * LIMIT / dose):
                answer, highest = bounded_answer(folder, name, prompt, scale, LIMIT)
                assert (highest > LIMIT) == (scale < 0)
                pair.append(answer)
                rows.append((prompt, {"adapter": name, "scale": scale}))
            assert pair[1] != bounded_answer(folder, name, prompt, scale, float("inf"))[0]
            right += pair
    for _ in range(2):
        assert outputs_of(alone, rows) == right


def test_vllm_alone_adapters_named_by_vllms_requests(alone, folder, tmp_path):
    """As with --enable-lora; loaded, pinned, unloaded and retrained under one name."""
    from vllm.lora.request import LoRARequest

    core = alone.llm_engine
    scale = 1e-2
    path = tmp_path / "adapter"
    for seed in (31, 32):
        save_adapter(folder / "model", path, SteerConfig(rank=4, scale=scale), seed)
        assert core.add_lora(LoRARequest("mine", 5, str(path), load_inplace=seed == 32))
        assert core.pin_lora(5) and 5 in core.list_loras()
        model = patch_model(AutoModelForCausalLM.from_pretrained(folder / "model"), path)
        right = model.generate(torch.tensor([LONG]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
        for _ in range(2):  # cold, and from the cache
            assert ask(alone, [("mine", str(path), LONG)], NEW_TOKENS) == right[:, len(LONG) :].tolist()
            assert outputs_of(alone, [(LONG, {"adapter": "mine"})]) == right[:, len(LONG) :].tolist()
    assert core.remove_lora(5) and 5 not in core.list_loras()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "nobody"}, "steering.adapter is 'nobody'; expected a loaded adapter: biases, linear"),
        ({"adapter": ["silu"]}, r"steering.adapter is \['silu'\]; expected a loaded adapter"),
        ({"adapter": None, "scale": 2}, "steering is given with no adapter"),
        ({"adapter": "silu", "dose": 1}, "steering has dose; expected scale and positions alone"),
    ],
    ids=["unknown", "no name", "none", "field"],
)
def test_vllm_alone_options_that_are_refused(alone, folder, options, message):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=message):
        outputs_of(alone, [(PROMPTS[0], options)])
    assert outputs_of(alone, [(PROMPTS[0], None), (PROMPTS[0], {"adapter": None})]) == 2 * answers(folder / "model")[:1]


def test_vllm_alone_adapters_that_cannot_be_served(alone, folder, tmp_path):
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.request import LoRARequest

    save_adapter(folder / "model", tmp_path / "wide", SteerConfig(rank=9), 1)
    for path, message in (
        (folder / "lora", "adapter 'other' does not steer; expected a steering adapter without --enable-lora"),
        (tmp_path / "wide", r"is of rank 9; expected at most 8 \(steering.rank\)"),
    ):
        with pytest.raises(VLLMValidationError, match=message):
            alone.llm_engine.add_lora(LoRARequest("other", 77, str(path)))
        assert 77 not in alone.llm_engine.list_loras()
    assert outputs_of(alone, [(PROMPTS[0], None)]) == answers(folder / "model")[:1]


def test_vllm_refuses_what_could_exceed_the_dose_and_rounds_to_the_slots(folder):
    """x."""
    from vllm.exceptions import VLLMValidationError

    steering = {"dose": {"limit": 1e-6, "action": "refuse", "norm": 1.0}, "layers": [0, 2], "dtype": "bfloat16"}
    engine = server(folder, steering, lora_target_modules=["post_block"])
    path = folder / "adapters" / "linear"
    right = answers(folder / "model")[:1]
    for steered, message in (
        (("linear", str(path), PROMPTS[0]), "adapter 'linear': scale is 0.5, with a relative dose of up to"),
        (
            ("silu", str(folder / "adapters" / "silu"), PROMPTS[0]),
            "steers in the layers 1; expected the layers 0, 2",
        ),
    ):
        with pytest.raises(VLLMValidationError, match=message):
            ask(engine, [steered], NEW_TOKENS)
    # So weak a strength changes nothing, and is let through.
    assert ask(engine, [("linear", str(path), PROMPTS[0], {"scale": 1e-12})], NEW_TOKENS) == right
    assert ask(engine, [("linear", str(path), PROMPTS[0], {"scale": 0})], NEW_TOKENS) == right
    engine.llm_engine.engine_core.shutdown()


# ---------------------------------------------------------------------------------------------------- without an engine


def processor_of(folder: Path) -> Any:
    """Make the part of an engine that reads requests, with the adapters of a folder."""
    text = SimpleNamespace(num_hidden_layers=3)
    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=text, get_hidden_size=lambda: 64),
        additional_config={"steering": {"adapters": str(folder / "adapters")}},
        lora_config=None,
    )
    return SimpleNamespace(vllm_config=config)


def test_vllm_registry_a_load_that_is_broken_off_changes_nothing(folder):
    """A client that leaves while its adapter is loaded takes no name from others. Then the adapter is loaded."""
    from vllm.lora.request import LoRARequest

    from fused_steer.vllm import frontend

    engine = SimpleNamespace(input_processor=processor_of(folder))
    registry = frontend.registry_of(engine.input_processor)
    registry.default, given, loaded = "silu", dict(registry.named), []

    async def leaves(self: Any, request: Any) -> bool:
        raise asyncio.CancelledError

    async def loads(self: Any, request: Any) -> bool:
        loaded.append(request)
        return True

    silu, other = given["silu"], str(folder / "adapters" / "biases")
    for request in (silu, LoRARequest("silu", silu.lora_int_id, other, load_inplace=True)):
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(frontend.add_lora(leaves)(engine, request))
        assert registry.named == given and registry.default == "silu"
        assert registry.is_ready(request) is False
        assert asyncio.run(frontend.add_lora(loads)(engine, silu)) and registry.is_ready(silu)
    assert len({(request.lora_int_id, request.lora_path) for request in loaded}) == 1


def test_vllm_requests_of_other_kinds_that_are_refused(folder):
    """Streamed input whose parts would be steered otherwise than its keys in the cache say, and options for pooling."""
    from vllm import PoolingParams, SamplingParams
    from vllm.engine.protocol import StreamingInput
    from vllm.exceptions import VLLMValidationError

    from fused_steer.vllm import frontend

    def original(self: Any, prompt: Any, params: Any, lora_request: Any = None, resumable: bool = False) -> Any:
        return SimpleNamespace(sampling_params=params.clone(), lora_request=lora_request, cache_salt=None)

    def asked(**options: Any) -> Any:
        return SamplingParams(extra_args={"steering": {"adapter": "silu", **options}})

    processor, process = processor_of(folder), frontend.process_inputs(original)
    for positions in ("generated", "prompt"):
        process(processor, {}, asked(positions=positions))
        with pytest.raises(VLLMValidationError, match=f"positions is '{positions}' for streamed input; expected 'all'"):
            process(processor, {}, asked(positions=positions), resumable=True)
    made = process(processor, {}, asked(scale=2.0), resumable=True)
    assert made.sampling_params.extra_args == {"steering": [2.0, "all"]}
    with pytest.raises(VLLMValidationError, match="steering is given for pooling; expected none"):
        process(processor, {}, PoolingParams(extra_kwargs={"steering": {"scale": 2.0}}))

    async def parts(*parameters: Any) -> Any:
        for each in parameters:
            yield StreamingInput(prompt={}, sampling_params=each)

    async def added(self: Any, request_id: str, input_stream: Any, sampling_params: Any) -> list[Any]:
        return [part async for part in input_stream]

    stream = frontend.stream_request(added)
    assert len(asyncio.run(stream(None, "1", parts(asked(scale=2.0), None), asked(scale=2.0)))) == 2
    with pytest.raises(VLLMValidationError, match="of a part of streamed input is .*'scale': 3.0.*; expected that of"):
        asyncio.run(stream(None, "1", parts(asked(scale=2.0), asked(scale=3.0)), asked(scale=2.0)))


def test_vllm_routes_change_nothing_where_other_processes_would_not_know():
    """Each process of the API has its own names and numbers of adapters."""
    from fastapi import HTTPException

    from fused_steer.vllm import endpoint

    parallel = SimpleNamespace(_api_process_count=2)
    registry = SimpleNamespace(named={}, default=None)
    processor = SimpleNamespace(steering_registry=registry, vllm_config=SimpleNamespace(parallel_config=parallel))
    models = SimpleNamespace(input_processor=processor)
    request = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(openai_serving_models=models)))
    for call in (
        endpoint.load(endpoint.Load(name="it", path="there"), request),
        endpoint.unload(endpoint.Name(name="it"), request),
        endpoint.choose_default(endpoint.Default(name=None), request),
    ):
        with pytest.raises(HTTPException, match="the server has 2 API processes; expected --api-server-count 1"):
            asyncio.run(call)
    assert asyncio.run(endpoint.show(request)) == {"adapters": [], "default": None}


# ------------------------------------------------------------------------------------------------- in a worker's step


def test_vllm_step_maps_tokens_by_itself_where_lora_has_no_layers():
    """vLLM's mapping of tokens is not called, with steering or without. Padding and idle batches have no slots."""
    import numpy as np

    from fused_steer.vllm import gains
    from fused_steer.vllm.adapters import Loaded, Steering
    from fused_steer.vllm.batch import Batch

    def original(*_: Any) -> Any:
        raise AssertionError("vLLM's mapping was called")

    batch = Batch(16, "cpu")
    given = []
    adapters = {7: Loaded(2, 0.5, "seven"), 9: Loaded(0, -1.0, "nine")}
    runner = SimpleNamespace(
        model_steering=Steering(batch, True, adapters.get),
        lora_manager=SimpleNamespace(set_active_adapters=lambda requests, mapping: given.append((requests, mapping))),
        requests={
            "a": SimpleNamespace(sampling_params=SimpleNamespace(extra_args=None)),
            "b": SimpleNamespace(sampling_params=SimpleNamespace(extra_args={"steering": [3.0, "generated"]})),
            "c": SimpleNamespace(sampling_params=None),
        },
    )

    def step(numbers: list[int], counts: list[int]) -> None:
        rows = SimpleNamespace(
            req_ids=["a", "b", "c"],
            request_lora_mapping=np.array(numbers),
            lora_id_to_lora_request={7: "request 7", 9: "request 9"},
            num_prompt_tokens=np.array([4, 2, 1]),
            num_computed_tokens_cpu=np.array([0, 1, 5]),
        )
        gains.set_active_loras(original)(runner, rows, np.array(counts))
        gains.set_active_mapping(original)(runner, tuple(numbers), (), set())

    step([7, 9, 0], [4, 2, 1])
    assert given[0] == ({"request 7", "request 9"}, None)
    assert batch.ids.tolist() == [2] * 4 + [0] * 2 + [-1] * 10 and not batch.idle
    assert batch.gains[:6].tolist() == [0.5] * 4 + [0.0, 3.0]
    step([7, 0, 0], [1, 1, 1])
    assert batch.ids.tolist() == [2] + [-1] * 15 and not batch.idle
    given.clear()
    step([0, 0, 0], [1, 1, 1])
    assert batch.ids.tolist() == [-1] * 16 and batch.idle
    assert given == [(set(), None)]  # of the second runner's method alone


def test_vllm_step_of_many_strengths_is_that_of_one():
    """A strength is a number in a buffer: no slot, no tensor and no operation more."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from fused_steer.serving.options import read_options
    from fused_steer.vllm.adapters import Loaded, Steering
    from fused_steer.vllm.batch import Batch
    from fused_steer.vllm.gains import fill
    from fused_steer.vllm.layers import UNADDED, SteeringPoint
    from fused_steer.vllm.room import Room

    names: list[str] = []

    class Names(TorchDispatchMode):
        looks_inside = True

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.name())
            return function(*args, **(kwargs or {}))

    batch = Batch(256, "cpu")
    point = SteeringPoint(torch.nn.Linear(64, 64), 0, "layers.0", 64, UNADDED, batch, Room(4))
    point.make_slots(2)
    point.put(1, {"steer_down.weight": torch.randn(4, 64), "steer_up.weight": torch.randn(64, 4)}, "silu")
    steering = Steering(batch, True, {7: Loaded(1, 1.0, "seven")}.get)
    done = []
    for scales in ([0.5] * 256, [(n + 1) / 256 for n in range(256)]):
        names.clear()
        with torch.inference_mode(), Names():
            fill(steering, [(7, read_options({"scale": scale}), 4, 4, 1) for scale in scales])
            point((torch.randn(256, 64), torch.randn(256, 64)))
        done.append(list(names))
    assert done[0] == done[1] and "aten::mm" in "".join(done[0])
