"""`fused-steer chat`: a chat in the terminal, with streamed answers in columns."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel

from ..adapters.files import read_adapter
from ..model.decoder import find_decoder, meta_model
from ..patch import patch_model
from .chat import HELP, Chat
from .sources import note_parts, sources


def start(model: str | None, adapters: list[str], device: str, check_base: bool = True, **options: Any) -> Chat:
    """Load a model and its adapters. The adapters' files are checked before the model is loaded.

    Args:
        check_base: refuse an adapter if its base model has another name.

    Raises:
        FileNotFoundError, ValueError: an adapter is missing or does not fit the model.
    """
    from .demo import choose_device, load_model

    found, chosen = sources(adapters), choose_device(device)
    layout = None if model is None else find_decoder(meta_model(model)).layout
    for source in found.values():
        read_adapter(source, layout, check_base=check_base and layout is not None)
        note_parts(source)
    loaded, tokenizer = load_model(model, chosen)
    first, *others = found
    steering = patch_model(loaded, found[first], adapter_name=first, check_base=check_base).steering
    for name in others:
        steering.load(found[name], name, check_base=check_base)
    return Chat(loaded, tokenizer, first, **options)


def talk(chat: Chat, lines: Iterator[str], console: Console) -> None:
    """Answer lines until they end or one is /quit. Ctrl-C ends an answer."""
    console.print(chat.state(), markup=False, highlight=False, soft_wrap=True)
    for line in lines:
        if line.strip() in ("/quit", "/exit"):
            return
        if not line.strip():
            continue
        try:
            if line.startswith("/"):
                console.print(chat.command(line), markup=False, highlight=False, soft_wrap=True)
            else:
                _show(chat, line, console)
        except KeyboardInterrupt:
            console.print("(stopped)", markup=False)
        except (
            ValueError,
            RuntimeError,
        ) as error:  # RuntimeError of PyTorch: no memory, or infinite logits to sample of
            console.print(" ".join(str(error).split()), markup=False, highlight=False, soft_wrap=True)


def _show(chat: Chat, line: str, console: Console) -> None:
    """Print the answers of a line as they grow: one as it is, two in columns."""
    if not console.is_terminal:
        *_, said = chat.answer(line)
        for name, text in zip(chat.columns, said, strict=True):
            console.print(f"{name}: {text}", markup=False, highlight=False, soft_wrap=True)
        return
    width = max(20, console.width // len(chat.columns) - 2)
    with Live(console=console, refresh_per_second=8, vertical_overflow="visible") as live:
        for said in chat.answer(line):
            panels = [
                Panel(escape(text), title=name, width=width) for name, text in zip(chat.columns, said, strict=True)
            ]
            live.update(Columns(panels))


def ask() -> Iterator[str]:
    """Yield what is typed: with history and completion in a terminal, else the lines of stdin.

    Raises:
        ImportError: a terminal without prompt_toolkit.
    """
    if not sys.stdin.isatty():
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # Chat refuses such a line alone
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter

    words = [line.split()[0] for line in HELP.splitlines()] + ["/on", "/one", "/quit"]
    session: Any = PromptSession(completer=WordCompleter(words, sentence=True))
    while True:
        try:
            yield session.prompt("> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def check_terminal() -> None:
    """Raise ImportError if stdin is a terminal and prompt_toolkit is missing."""
    if sys.stdin.isatty() and find_spec("prompt_toolkit") is None:
        raise ImportError("chat in a terminal needs prompt_toolkit; `pip install 'fused-steer[chat]'`")


def run(start: Callable[[], Chat], console: Console) -> None:
    """Chat until the end of the input."""
    check_terminal()
    talk(start(), ask(), console)
