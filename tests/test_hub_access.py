"""Tests that a hub that cannot be reached is told at once, by a port of this machine at which nobody listens."""

import socket
import time

import pytest
from command import assert_refused, invoke, plain_output  # noqa: F401 - an autouse fixture
from huggingface_hub import constants

from fused_steer import _hub_access
from fused_steer._hub_access import reaching_hub

datasets = pytest.importorskip("datasets", reason="rows of the hub need datasets (the extra trl)")


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """The hub is at a free port of this machine. Return its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_hub_access, "WAITS", (0, 0.01))
    monkeypatch.setattr(_hub_access, "_known", [])
    return address


class _Client:
    """A client whose attempts end as given: by an error, or by an answer."""

    def __init__(self, *ends):
        self.ends, self.made = list(ends), 0

    def head(self, url, timeout):
        self.made += 1
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end


def test_hub_that_cannot_be_reached_is_refused_at_once(online, tmp_path):
    """Rows, a model and a recipe's rows: within seconds, where each took 24 and more."""
    (tmp_path / "recipe.yaml").write_text(f"out: {tmp_path / 'out'}\ndata: {{train: me/rows}}\n")
    start = time.monotonic()
    told = f"the hub cannot be reached (no connection to {online}"
    assert_refused(invoke("eval", "paper:boolq"), "google/boolq cannot be loaded", "expected a connection")
    for command in (["chat", "--model", "me/model", "me/adapter"], ["serve-plan", "me/model"]):
        assert_refused(invoke(*command), "no model me/model here or in the hub's cache", told)
    assert_refused(invoke("train", tmp_path / "recipe.yaml", "--check"), "me/rows", "the hub cannot be reached")
    assert time.monotonic() - start < 12
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE


def test_hub_that_answers_now_and_then_is_left_to_the_libraries(monkeypatch):
    """One attempt that fails, an error that is an answer, or a slow answer are no reason to be offline."""
    for ends in ([ConnectionError("reset"), "200"], [OSError("503")], [TimeoutError("read")]):
        client = _Client(*ends)
        monkeypatch.setattr("huggingface_hub.utils.get_session", lambda client=client: client)
        for _ in range(2):  # and it is asked once
            with reaching_hub("me/model", "model"):
                assert not constants.HF_HUB_OFFLINE
        assert client.made == len(ends)
        _hub_access._known.clear()
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: _Client(*[ConnectionError("down")] * 2))
    with reaching_hub("me/model", "model"):  # and what is in the cache is used
        assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE


def test_hub_is_not_asked_for_what_is_here(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils.get_session", None)
    for source in (None, str(tmp_path)):
        with reaching_hub(source, "model"):
            pass
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = r"^no model me/model here or in the hub's cache, and the hub cannot be reached \(HF_HUB_OFFLINE is set\)"
    with pytest.raises(FileNotFoundError, match=offline), reaching_hub("me/model", "model"):
        raise OSError("own")
