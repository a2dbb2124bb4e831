"""A chat with a steered model: messages in, answers out, and commands that change the steering.

`Chat` holds the conversation; it knows no terminal. tools/chat_terminal.py is one.
"""

from __future__ import annotations

import contextvars
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import Queue
from threading import Thread
from typing import Any

import torch

from ..config import checked_number
from ..positions import read_positions
from .prompts import room_of, templated

HELP = """\
/adapter NAME      steer by an adapter
/scale NUMBER      set the strength; /scale own is the adapter's own
/positions WHERE   steer all, prompt, generated, last_prompt, first_7 … tokens; /positions own
/off               answer by the base model; /on steers again
/both              answer by the base and the steered model, side by side, from one batch; /one ends it
/reset             forget the conversation
/state             show adapters and settings
/help, /quit"""


@dataclass
class Chat:
    """A conversation with a patched model.

    Attributes:
        model, tokenizer: a patched model and its tokenizer.
        name: the adapter that steers, of `model.steering.names`.
        scale, positions: in place of the adapter's own, or None.
        on: whether the answers are steered.
        both: whether the base model answers too. The conversation goes on from the steered answer.
        new_tokens: the most tokens of an answer.
        temperature: 0 for the likeliest token each time.
        messages: the conversation.
    """

    model: Any
    tokenizer: Any
    name: str
    scale: float | None = None
    positions: str | None = None
    on: bool = True
    both: bool = False
    new_tokens: int = 200
    temperature: float = 0.0
    messages: list[dict[str, str]] = field(default_factory=list)
    _thread: Thread | None = field(default=None, init=False, repr=False)  # that generates the latest answer

    def command(self, line: str) -> str:
        """Carry out a line that begins with a slash. Return what to print.

        Raises:
            ValueError: an unknown command, adapter or value. Nothing has changed then.
        """
        try:
            name, *rest = shlex.split(line[1:]) or [""]
        except ValueError as error:
            raise ValueError(f"{line!r} cannot be read ({error}); expected a command, such as /help") from None
        arguments = {"adapter": 1, "scale": 1, "positions": 1, "off": 0, "on": 0, "both": 0, "one": 0}
        arguments |= {"reset": 0, "state": 0, "help": 0}
        if name not in arguments:
            raise ValueError(f"there is no /{name}; expected one of {', '.join('/' + known for known in arguments)}")
        if len(rest) != arguments[name]:
            raise ValueError(f"/{name} has {len(rest)} arguments; expected {arguments[name]}, as /help shows")
        if name == "help":
            return HELP
        if name == "adapter":
            if rest[0] not in self.model.steering.names:
                raise ValueError(f"no adapter {rest[0]!r}; expected one of {', '.join(self.model.steering.names)}")
            self.name, self.on = rest[0], True
        elif name == "scale":
            self.scale = None if rest[0] == "own" else _number(rest[0])
        elif name == "positions":
            self.positions = None if rest[0] == "own" else read_positions(rest[0]).name
        elif name in ("off", "on"):
            self.on = name == "on"
        elif name in ("both", "one"):
            self.both = name == "both"
        elif name == "reset":
            self.messages.clear()
        return self.state()

    def state(self) -> str:
        """Return the settings in a line."""
        config = self.model.steering.config(self.name)
        scale = config.scale if self.scale is None else self.scale
        where = config.positions if self.positions is None else self.positions
        steered = f"{self.name}, strength {scale:g}, at {where} tokens" if self.on else "off"
        side = ", beside the base" if self.both and self.on else ""
        return f"steering: {steered}{side}; adapters: {', '.join(self.model.steering.names)}"

    @property
    def columns(self) -> list[str]:
        """The names of the answers that `answer` gives, in order."""
        return (["base"] if self.both or not self.on else []) + ([self.name] if self.on else [])

    def answer(self, text: str) -> Iterator[list[str]]:
        """Answer a message, by each of `columns`, all in one batch. The conversation goes on from the last of them.

        Yields:
            the answers so far, one for each of `columns`, as they grow.

        Raises:
            ValueError: the message is empty or no text, the chat template refuses it, or the conversation leaves no
                room in the model for an answer.
        """
        if not text.strip():
            raise ValueError("the message is empty; expected a text")
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # bytes that `ask` could not decode
            raise ValueError(f"the message has bytes that are no text, {text!a:.80}; expected the input's encoding")
        columns = self.columns
        names = [None if column == "base" else column for column in columns]
        asked, most = self._ids(text), room_of(self.model)
        room = self.new_tokens if most is None else most - len(asked)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(asked)} tokens; expected fewer than {most}, the positions of the model "
                "(/reset forgets it)"
            )
        ids = torch.tensor([asked] * len(columns), device=self.model.get_input_embeddings().weight.device)
        steering = self.model.steering
        streamer = _Rows(len(columns), ids.shape[1])
        options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if self.temperature > 0:
            options = {"do_sample": True, "temperature": self.temperature}
        failed: list[BaseException] = []
        if self._thread is not None:  # a second Ctrl-C left it in its last pass
            self._thread.join()

        def generate() -> None:
            try:
                self.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=min(self.new_tokens, room),
                    pad_token_id=self.tokenizer.eos_token_id,
                    stopping_criteria=[streamer],
                    **options,
                )
            except BaseException as error:
                failed.append(error)
            finally:
                streamer.put(None)

        with torch.no_grad(), steering.batch(names, scale=self._each(self.scale, names), positions=self._where(names)):
            thread = self._thread = Thread(target=contextvars.copy_context().run, args=(generate,))
            thread.start()
            try:
                said = [""] * len(columns)
                while (found := streamer.get()) is not None:
                    said = [self._decoded(row) for row in found]
                    yield said
            finally:
                streamer.stopped = True
                thread.join()
        if failed:
            raise failed[0]
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": said[-1]}]

    def _each(self, value: float | None, names: list[str | None]) -> Any:
        return None if value is None else [None if name is None else value for name in names]

    def _where(self, names: list[str | None]) -> Any:
        return None if self.positions is None else [None if name is None else self.positions for name in names]

    def _ids(self, text: str) -> list[int]:
        if getattr(self.tokenizer, "chat_template", None):
            messages = [*self.messages, {"role": "user", "content": text}]
            return templated(self.tokenizer, messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        earlier = "".join(message["content"] for message in self.messages)  # a base model goes on with the text
        return self.tokenizer(earlier + text)["input_ids"]

    def _decoded(self, row: list[int]) -> str:
        end = self.tokenizer.eos_token_id
        kept = row[: row.index(end)] if end in row else row
        return self.tokenizer.decode(kept, skip_special_tokens=True)


def _number(text: str) -> float:
    try:
        return checked_number("scale", float(text))
    except ValueError as error:
        raise ValueError(f"/scale is {text!r}; expected a number, or own") from error


class _Rows:
    """Passes the rows' new tokens from `generate` to another thread, after each step, and can end it.

    transformers' streamers take batches of one row only; a stopping criterion sees all rows.
    """

    def __init__(self, rows: int, prompt: int) -> None:
        self._rows, self._prompt = rows, prompt
        self._queue: Queue[list[list[int]] | None] = Queue()
        self.stopped = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.put(input_ids[:, self._prompt :].tolist())
        return torch.full((self._rows,), self.stopped, device=input_ids.device, dtype=torch.bool)

    def put(self, found: list[list[int]] | None) -> None:
        self._queue.put(found)

    def get(self) -> list[list[int]] | None:
        """Return the rows' tokens so far, or None at the end. Earlier steps that were not taken are passed over."""
        found = self._queue.get()
        while found is not None and not self._queue.empty():
            more = self._queue.get()
            if more is None:
                self._queue.put(None)
                break
            found = more
        return found
