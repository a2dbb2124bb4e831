"""Tests of steering adapters behind `vllm serve`, over HTTP on loopback: model names, loading, unloading, load."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm_models import NEW_TOKENS, PROMPTS, answers, save_adapter, save_model, second_runner

from fused_steer import SteerConfig, patch_model

pytestmark = pytest.mark.vllm

RESIDENTS, GUESTS = 12, 4
CONFIGS = [
    SteerConfig(rank=4),
    SteerConfig(rank=2, activation="identity", layers=[1]),
    SteerConfig(form="vector"),
    SteerConfig(rank=3, activation="gelu", down_bias=True),
]


def name_of(number: int) -> str:
    return f"resident-{number}" if number < RESIDENTS else f"guest-{number}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Make a folder with model/ and sixteen adapters."""
    root = tmp_path_factory.mktemp("served")
    save_model(root / "model")
    for number in range(RESIDENTS + GUESTS):
        save_adapter(root / "model", root / name_of(number), CONFIGS[number % 4], 40 + number)
    return root


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def with_lora(folder: Path) -> list[str]:
    """Return the options of a server with --enable-lora."""
    residents = [f"{name_of(n)}={folder / name_of(n)}" for n in range(RESIDENTS)]
    sizes = ["--max-loras", "4", "--max-cpu-loras", "6", "--max-lora-rank", "8"]
    return ["--enable-lora", *sizes, "--lora-modules", *residents]


class Server:
    """A server in a process of its own.

    Args:
        options: those beside the model and its sizes.
        variables: those of the environment.
    """

    def __init__(self, folder: Path, log: Path, options: list[str], **variables: str) -> None:
        port = free_port()
        self.folder, self.url, self.log = folder, f"http://127.0.0.1:{port}", log
        # The module behind `vllm serve`. That command needs a package named "vllm"; the CPU build has another name.
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model"),
            "--served-model-name", "base",
            "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--seed", "0",
            "--max-num-seqs", "16", "--max-num-batched-tokens", "64", "--max-model-len", "64", *options,
        ]  # fmt: skip
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", **variables}
        with open(log, "w") as file:
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)

    def wait(self) -> None:
        for _ in range(1200):
            assert self.process.poll() is None, self.log.read_text()[-8000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return
            time.sleep(0.25)
        pytest.fail(self.log.read_text()[-8000:])

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def client(self) -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)

    def tokens(self, client: Any, model: str, prompt: int, steering: str | None = None) -> list[int]:
        """Request the greedy continuation of PROMPTS[prompt] from an adapter, with steering options, or from "base"."""
        answer = client.completions.create(
            model=model,
            prompt=PROMPTS[prompt],
            temperature=0,
            max_tokens=NEW_TOKENS,
            extra_body={"ignore_eos": True, "return_token_ids": True}
            | ({} if steering is None else {"vllm_xargs": {"steering": steering}}),
        )
        assert answer.model == model
        return answer.choices[0].token_ids

    def post(self, what: str, **fields: Any) -> tuple[int, str]:
        request = urllib.request.Request(
            f"{self.url}/v1/{what}", json.dumps(fields).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def load(self, name: str, path: Path) -> tuple[int, str]:
        return self.post("load_lora_adapter", lora_name=name, lora_path=str(path))

    def unload(self, name: str) -> tuple[int, str]:
        return self.post("unload_lora_adapter", lora_name=name)

    def expected(self, name: str) -> list[list[int]]:
        return answers(self.folder / "model", None if name == "base" else self.folder / name)


@pytest.fixture(scope="module", params=["first runner", pytest.param("second runner", marks=pytest.mark.every_engine)])
def server(request, folder, tmp_path_factory) -> Iterator[Server]:
    """A server with --enable-lora, by vLLM's first model runner. The second is started with --every-engine."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    variables = second_runner(log.parent) if request.param == "second runner" else {}
    server = Server(folder, log, with_lora(folder), VLLM_ALLOW_RUNTIME_LORA_UPDATING="1", **variables)
    try:
        server.wait()
        assert ("Using V2 Model Runner" in log.read_text()) == bool(variables)
        yield server
    finally:
        server.end()


def test_vllm_server_a_client_names_the_adapter_as_the_model(server):
    client = server.client()
    names = [model.id for model in client.models.list()]
    assert names == ["base", *(name_of(number) for number in range(RESIDENTS))]
    for name in ("base", "resident-0", "resident-2"):
        assert [server.tokens(client, name, prompt) for prompt in range(len(PROMPTS))] == server.expected(name)


def test_vllm_server_a_strength_and_positions_for_a_request(server):
    client = server.client()
    model = patch_model(
        AutoModelForCausalLM.from_pretrained(server.folder / "model"), server.folder / "resident-0", adapter_name="one"
    )
    found = []
    for given in ({"scale": 0.5}, {"scale": -3, "positions": "generated"}, {"scale": 4, "positions": ["last", 2]}):
        positions = given.get("positions", "all")
        with model.steering.batch(
            ["one"], scale=given["scale"], positions=tuple(positions) if isinstance(positions, list) else positions
        ):
            ids = torch.tensor([PROMPTS[0]])
            right = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
        found.append(server.tokens(client, "resident-0", 0, json.dumps(given)))
        assert found[-1] == right[0, ids.shape[1] :].tolist()
    assert len({tuple(tokens) for tokens in found}) == 3


def test_vllm_server_loaded_and_unloaded_while_a_request_runs(server):
    """A stream continues with the adapter that it began with, even if the adapter is unloaded meanwhile."""
    import openai

    client = server.client()
    assert server.load("guest-12", server.folder / "guest-12")[0] == 200
    stream = client.completions.create(
        model="guest-12",
        prompt=PROMPTS[0],
        temperature=0,
        max_tokens=56,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    tokens = list(next(stream).choices[0].token_ids)
    assert server.load("guest-13", server.folder / "guest-13")[0] == 200
    assert server.unload("guest-12")[0] == 200
    assert server.tokens(client, "guest-13", 1) == server.expected("guest-13")[1]
    for part in stream:
        for choice in part.choices:
            tokens += choice.token_ids or []
    assert tokens[:NEW_TOKENS] == server.expected("guest-12")[0] and len(tokens) == 56
    with pytest.raises(openai.NotFoundError, match="guest-12"):
        server.tokens(client, "guest-12", 0)
    assert server.unload("guest-13")[0] == 200


def test_vllm_server_what_cannot_be_served_fails_alone(server, tmp_path):
    import openai

    client = server.client()
    with pytest.raises(openai.NotFoundError, match="nobody"):
        server.tokens(client, "nobody", 0)
    assert server.unload("nobody")[0] == 404
    # An adapter that is broken, has another size, is missing, or is already loaded.
    shutil.copytree(server.folder / "resident-0", tmp_path / "broken")
    weights = tmp_path / "broken" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    save_model(tmp_path / "other", hidden_size=96, num_attention_heads=3, num_key_value_heads=1, head_dim=32)
    save_adapter(tmp_path / "other", tmp_path / "wide", SteerConfig(rank=2), 1)
    for path, part in (
        (tmp_path / "broken", "its contents do not match adapter_config.json"),
        (tmp_path / "wide", "is for a model of hidden size 96; expected 64"),
        (tmp_path / "nothing", "No adapter found"),
    ):
        status, text = server.load("bad", path)
        assert status >= 400 and part in text
    assert server.load("resident-0", server.folder / "resident-0")[0] == 400
    # An adapter that is loaded and evicted, and then has its files changed, answers as it was loaded.
    shutil.copytree(server.folder / "resident-0", tmp_path / "later")
    assert server.load("later", tmp_path / "later")[0] == 200
    (tmp_path / "later" / "adapter_model.safetensors").write_bytes(b"")
    for number in range(8):
        server.tokens(client, name_of(number), 0)
    assert server.tokens(client, "later", 0) == server.expected("resident-0")[0]
    assert server.unload("later")[0] == 200
    # Steering options that are unknown, or given to the base model.
    for model, options, part in (
        ("resident-0", '{"strength": 1}', "steering has strength; expected scale and positions alone"),
        ("resident-0", "{", "expected an object, or its JSON text"),
        ("base", '{"scale": 1}', "steering is given with no adapter"),
    ):
        with pytest.raises(openai.BadRequestError, match=part):
            server.tokens(client, model, 0, options)
    assert server.tokens(client, "resident-0", 0) == server.expected("resident-0")[0]
    assert server.tokens(client, "base", 0) == server.expected("base")[0]


def test_vllm_server_a_thousand_requests_with_adapters_coming_and_going(server, tmp_path):
    """With four slots and six places in memory, no request is lost and none is answered by another adapter.

    Meanwhile adapters of other contents are loaded under a name and path that were in use before, their files are
    overwritten or deleted while they are served, and they are unloaded.
    """
    client = server.client()
    wrong: list[Any] = []
    done: list[str] = []

    def ask(name: str, prompt: int, content: str) -> None:
        try:
            tokens = server.tokens(client, name, prompt)
        except Exception as error:
            wrong.append((name, prompt, error))
            return
        if tokens != server.expected(content)[prompt]:
            wrong.append((name, content, prompt, tokens))
        done.append(name)

    def guests(number: int) -> None:
        name, path = name_of(number), tmp_path / str(number)
        for turn in range(5):
            content = name_of(RESIDENTS + (number + turn) % GUESTS)
            shutil.copytree(server.folder / content, path)
            status, text = server.load(name, path)
            if status != 200:
                wrong.append((name, status, text))
            if turn % 2:
                (path / "adapter_model.safetensors").write_bytes(b"overwritten")
            shutil.rmtree(path)
            with ThreadPoolExecutor(5) as few:
                list(few.map(lambda prompt, content=content: ask(name, prompt % len(PROMPTS), content), range(10)))
            status, text = server.unload(name)
            if status != 200:
                wrong.append((name, status, text))

    for name in ("base", *(name_of(number) for number in range(RESIDENTS + GUESTS))):
        server.expected(name)  # computed beforehand, so that the requests come in quick succession
    coming = [threading.Thread(target=guests, args=[RESIDENTS + number]) for number in range(GUESTS)]
    for thread in coming:
        thread.start()
    names = [*(name_of(number) for number in range(RESIDENTS)), "base"]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: ask(names[i % len(names)], i % len(PROMPTS), names[i % len(names)]), range(800)))
    for thread in coming:
        thread.join()
    assert not wrong, wrong[:5]
    assert len(done) == 1000 and set(done) == {*names, *(name_of(RESIDENTS + n) for n in range(GUESTS))}
    assert {*answers_by_content(server)} and server.process.poll() is None


def answers_by_content(server: Server) -> set[tuple[int, ...]]:
    """Return all adapters' answers to one prompt, to check that answers identify their adapter."""
    names = ["base", *(name_of(number) for number in range(RESIDENTS + GUESTS))]
    found = {tuple(server.expected(name)[0]) for name in names}
    assert len(found) == len(names)
    return found


# ------------------------------------------------------------------------------------------------ without --enable-lora


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory) -> Iterator[Server]:
    """A server without LoRA, with routes for steering, two slots, and a low limit of the dose that it warns of."""
    adapters = tmp_path_factory.mktemp("registered")
    for number in range(4):
        (adapters / name_of(number)).symlink_to(folder / name_of(number))
    steering = {"adapters": str(adapters), "slots": 2, "dose": {"limit": 1e-4, "action": "warn"}}
    log = tmp_path_factory.mktemp("log") / "server.log"
    options = ["--additional-config", json.dumps({"steering": steering})]
    server = Server(folder, log, options, VLLM_PLUGINS="fused_steer")
    try:
        server.wait()
        yield server
    finally:
        server.end()


def shown(answer: tuple[int, str]) -> tuple[list[str], str | None]:
    """Return the names and the default in an answer of /v1/steering."""
    assert answer[0] == 200, answer
    found = json.loads(answer[1])
    return [adapter["name"] for adapter in found["adapters"]], found["default"]


def test_vllm_server_without_lora_adapters_are_models_and_options(alone):
    """More adapters than slots, each named as a model, and by the options of a request to the base model."""
    client = alone.client()
    names = [name_of(number) for number in range(4)]
    assert [model.id for model in client.models.list()] == ["base", *names]
    for name in ("base", *names):
        assert [alone.tokens(client, name, prompt) for prompt in (0, 1)] == alone.expected(name)[:2]
    for name in names:
        assert alone.tokens(client, "base", 2, json.dumps({"adapter": name})) == alone.expected(name)[2]
    assert alone.tokens(client, "base", 2) == alone.expected("base")[2]
    assert "reached a relative dose of" in alone.log.read_text() and "'resident-0'" in alone.log.read_text()


def test_vllm_server_without_lora_beams_have_the_options_of_their_search(alone):
    options = {"positions": "last_prompt+generated", "scale": 3.0}
    fields = {"model": "resident-0", "prompt": PROMPTS[0], "temperature": 0, "max_tokens": 6, "ignore_eos": True}
    fields |= {"use_beam_search": True, "n": 3, "return_token_ids": True}
    fields["vllm_xargs"] = {"steering": json.dumps(options)}
    status, text = alone.post("completions", **fields)
    assert status == 200, text
    model = patch_model(
        AutoModelForCausalLM.from_pretrained(alone.folder / "model"), alone.folder / "resident-0", adapter_name="one"
    )
    ids = torch.tensor([PROMPTS[0]])
    with model.steering.batch(["one"], **options):
        right = model.generate(ids, max_new_tokens=6, num_beams=3, do_sample=False, eos_token_id=None)
    assert json.loads(text)["choices"][0]["token_ids"] == right[0, ids.shape[1] :].tolist()


def test_vllm_server_without_lora_routes_load_unload_and_choose_the_default(alone, tmp_path):
    import openai

    client = alone.client()
    residents = [name_of(number) for number in range(4)]
    path = tmp_path / "guest"
    shutil.copytree(alone.folder / "guest-12", path)
    assert shown(alone.post("steering/load", name="guest", path=str(path))) == (["guest", *residents], None)
    shutil.rmtree(path)
    for steering in (None, '{"adapter": "guest"}'):
        assert alone.tokens(client, "guest", 1, steering) == alone.expected("guest-12")[1]
    assert shown(alone.post("steering/default", name="guest"))[1] == "guest"
    assert alone.tokens(client, "base", 1) == alone.expected("guest-12")[1]
    assert alone.tokens(client, "base", 1, '{"adapter": null}') == alone.expected("base")[1]
    assert alone.tokens(client, "resident-1", 1) == alone.expected("resident-1")[1]
    # Replaced in place under its name, and the default with it.
    assert alone.post("steering/load", name="guest", path=str(alone.folder / "guest-13"))[0] == 400
    shutil.copytree(alone.folder / "guest-13", path)
    loaded = alone.post("steering/load", name="guest", path=str(path), in_place=True)
    assert shown(loaded) == (["guest", *residents], "guest")
    shutil.rmtree(path)
    # The files are not read again, and loading them again in vain changes nothing.
    for _ in range(2):
        for model, steering in (("guest", None), ("base", None), ("base", '{"adapter": "guest"}')):
            assert alone.tokens(client, model, 1, steering) == alone.expected("guest-13")[1]
        assert alone.post("steering/load", name="guest", path=str(path), in_place=True)[0] == 404
    assert shown(alone.post("steering/unload", name="guest")) == (residents, None)
    assert alone.tokens(client, "base", 1) == alone.expected("base")[1]
    with pytest.raises(openai.NotFoundError, match="guest"):
        alone.tokens(client, "guest", 1)
    with pytest.raises(openai.BadRequestError, match="steering.adapter is 'guest'; expected a loaded adapter"):
        alone.tokens(client, "base", 1, '{"adapter": "guest"}')
    # Requests that are refused change nothing.
    for what, fields, status, part in (
        ("load", {"name": "bad", "path": str(tmp_path)}, 500, "does not steer"),
        ("load", {"name": "bad", "path": str(tmp_path / "nothing")}, 404, "No adapter found"),
        ("load", {"name": "bad"}, 400, "path"),
        ("unload", {"name": "nobody"}, 404, "nobody"),
        ("default", {"name": "nobody"}, 404, "name is 'nobody'; expected a loaded adapter: resident-0, resident-1"),
        ("default", {"names": "nobody"}, 400, "names"),
    ):
        found, text = alone.post(f"steering/{what}", **fields)
        assert found == status and part in text, (what, fields, found, text)
    assert shown(alone.post("steering/default", name=None)) == (residents, None)
