"""`fused-steer playground`: checks the port and the adapters, loads the model and serves the page."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters.files import read_adapter
from ..adapters.parameters import refuse_clash
from ..model.decoder import find_decoder, meta_model
from ..patch import patch_model
from ..tools.demo import SMOLLM2, choose_device, load_model
from ..tools.sources import note_parts
from .page import build_page, check_gradio, check_names, launch

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class PlaygroundOptions:
    """The options of `fused-steer playground`. The command documents each and holds the defaults.

    Attributes:
        adapters: directories or hub ids, each perhaps with a name before it, as polite=DIR.
    """

    model: str | None
    adapters: tuple[str, ...]
    out: Path
    host: str
    port: int
    device: str
    check_base: bool = True


def check_port(host: str, port: int) -> None:
    """Raise ValueError if nothing can be served at a port.

    A server that is just closing does not count: the page's own server may take its port over, too.
    """
    if not 0 < port < 65536:
        raise ValueError(f"port is {port}; expected 1 to 65535 (--port)")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ValueError(f"port {port} of {host} cannot be used ({error}); expected a free one (--port)") from error


def named(adapters: Sequence[str]) -> dict[str, str]:
    """Return the adapters by name: the name before =, or the last part of the path.

    Raises:
        ValueError: there is none, or a name is not valid or occurs twice.
    """
    found: dict[str, str] = {}
    for given in adapters:
        name, equals, source = given.partition("=")
        if not equals:
            name, source = Path(given).name, given
        check_names([name])
        refuse_clash(name, {other.lower(): other for other in found})
        found[name] = source
    if not found:
        raise ValueError("no adapter is given; expected at least one, such as --adapter polite=DIR")
    return found


def run(options: PlaygroundOptions, console: Console) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        ImportError: Gradio is not installed.
        ValueError: the port is in use, an adapter is broken or does not fit the model, or a name is not valid.
        FileNotFoundError: there is no such adapter.
    """
    check_gradio()
    check_port(options.host, options.port)
    sources = named(options.adapters)
    device = choose_device(options.device)
    # Read before a model is loaded, which takes longer.
    layout = None if options.model is None else find_decoder(meta_model(options.model)).layout
    for source in sources.values():
        read_adapter(source, layout, check_base=options.check_base and layout is not None)
        note_parts(source)
    model, tokenizer = load_model(options.model, device)
    for name, source in sources.items():
        if hasattr(model, "steering"):
            model.steering.load(source, name, check_base=options.check_base)
        else:
            model = patch_model(model, source, adapter_name=name, check_base=options.check_base)
    blocks = build_page(model, tokenizer, options.model or SMOLLM2, options.out)
    console.print(f"http://{options.host}:{options.port} (Ctrl-C ends it)", markup=False, soft_wrap=True)
    launch(blocks, options.host, options.port)
