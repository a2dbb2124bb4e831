"""The playground's page: a prompt, the strength of each adapter, and a column for each variant. Built with Gradio."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..adapters.files import write_adapter
from ..adapters.parameters import check_name
from ..joint import steering_of
from ..tools.prompts import Prompt
from .answers import Answer, answers
from .exporting import Variant, adapter_of, request_body

OWN = "each adapter's own"
BASE, TOGETHER = "base", "together"
POSITIONS = (OWN, "all", "prompt", "generated", "last_prompt", "last_prompt+generated")
_MOST = 4.0  # the sliders' largest strength; an adapter may start with more
_GRADIO = "pip install 'fused-steer[playground]'"

CSS = """
.fs-columns {display: grid; grid-auto-flow: column; grid-auto-columns: minmax(11rem, 1fr); gap: 1rem; overflow-x: auto}
.fs-column {border: 1px solid #8886; border-radius: 8px; padding: .6rem .8rem}
.fs-column h4 {margin: 0} .fs-column small {opacity: .7}
.fs-text {white-space: pre-wrap; overflow-wrap: anywhere; margin-top: .5rem; line-height: 1.6}
.fs-prompt {opacity: .55} .fs-text span {border-radius: 3px}
.fs-refused {color: #c0392b}
.fs-key i {display: inline-block; width: 8rem; height: .8em; border-radius: 3px; vertical-align: middle;
  background: linear-gradient(to right, rgba(255, 140, 0, 0), rgba(255, 140, 0, .85))}
"""


def check_gradio() -> None:
    """Raise ImportError, in one line, if Gradio is not installed."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the playground needs Gradio, which is not importable ({error}); `{_GRADIO}`") from error


# ----------------------------------------------------------------------------------------------------------- variants


def variants_of(strengths: Mapping[str, float], positions: str, together: bool) -> list[Variant]:
    """Return the page's columns: the base model, each adapter of a strength that is not 0, and their sum.

    Args:
        strengths: the sliders, by adapter.
        positions: OWN, or the steered tokens as `Steering.batch` takes them.
        together: whether there is a column for the sum of the adapters, if there are several.

    Raises:
        ValueError: there are no such positions.
    """
    where = None if positions == OWN else positions
    steering = {name: float(strength) for name, strength in strengths.items() if strength}
    found = [Variant(BASE), *(Variant(name, {name: strength}, where) for name, strength in steering.items())]
    if together and len(steering) > 1:
        found.append(Variant(TOGETHER, steering, where))
    return found


def render(found: Sequence[Answer], refused: Mapping[str, str] | None = None) -> str:
    """Return the columns as HTML. Tokens are tinted by ‖δ‖/‖h‖, the darkest being the largest on the page.

    Args:
        refused: the reasons of the columns that cannot be answered, by label.
    """
    top = max((token.shift for answer in found for token in answer.tokens if token.shift), default=0.0)
    columns = [_column(answer, top) for answer in found]
    for label, reason in (refused or {}).items():
        columns.append(
            f'<div class="fs-column"><h4>{html.escape(label)}</h4>'
            f'<div class="fs-text fs-refused">{html.escape(reason)}</div></div>'
        )
    key = f'<p class="fs-key">‖δ‖/‖h‖ of a token: 0 <i></i> {top:.2g}</p>' if top else ""
    return f'<div class="fs-columns">{"".join(columns)}</div>{key}'


def _column(answer: Answer, top: float) -> str:
    variant = answer.variant
    steering = " + ".join(f"{strength:g} × {name}" for name, strength in variant.strengths.items()) or "no steering"
    told = [steering, *([variant.positions] if variant.positions and variant.strengths else [])]
    if answer.shift is not None:
        told.append(f"mean ‖δ‖/‖h‖ {answer.shift:.2g}")
    spans = []
    for token in answer.tokens:
        alpha = 0.85 * token.shift / top if token.shift and top else 0.0
        tint = f' style="background: rgba(255, 140, 0, {alpha:.3f})" title="‖δ‖/‖h‖ {token.shift:.3g}"' if alpha else ""
        kind = "fs-answer" if token.generated else "fs-prompt"
        spans.append(f'<span class="{kind}"{tint}>{html.escape(token.text)}</span>')
    waiting = "" if answer.done else "▍"
    return (
        f'<div class="fs-column"><h4>{html.escape(variant.label)}</h4><small>{html.escape(", ".join(told))}</small>'
        f'<div class="fs-text">{"".join(spans)}{waiting}</div></div>'
    )


# ------------------------------------------------------------------------------------------------------------ actions


class Page:
    """What the page's controls do, without Gradio.

    Args:
        model: a model of `patch_model`.
        base: the base model's name, for request bodies.
        out: the directory for exported adapters.
    """

    def __init__(self, model: Any, tokenizer: Any, base: str, out: Path) -> None:
        self.model, self.tokenizer, self.base, self.out = model, tokenizer, base, out
        self.names = list(steering_of(model).names)

    def prompt(self, text: str, chat: bool) -> Prompt:
        return [{"role": "user", "content": text}] if chat else text

    def variants(self, strengths: Sequence[float], positions: str, together: bool) -> list[Variant]:
        return variants_of(dict(zip(self.names, strengths, strict=True)), positions, together)

    def answer(
        self, text: str, chat: bool, positions: str, together: bool, tokens: float, temperature: float, *given: float
    ) -> Iterator[str]:
        """Yield the columns as HTML, token by token. An error is a line in the page."""
        refused = {}
        try:
            found = self.variants(given, positions, together)
            if found[-1].label == TOGETHER:
                try:
                    adapter_of(self.model, found[-1])
                except ValueError as error:
                    refused[found.pop().label] = str(error)
            stream = answers(
                self.model,
                self.tokenizer,
                self.prompt(text, chat),
                found,
                max_new_tokens=int(tokens),
                temperature=temperature,
            )
            for now in stream:
                yield render(now, refused)
        except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
            yield render([], {"error": _line(error)})

    def save(self, label: str, name: str, positions: str, *given: float) -> str:
        """Save a column as an adapter, in a folder of `out`. Return what was done, or why not."""
        try:
            check_name(name)  # no path: whoever sees the page writes in `out` alone
            folder = self.out / name
            if folder.exists():
                raise ValueError(f"{folder} is there already; expected a new name")
            write_adapter(folder, adapter_of(self.model, self._chosen(label, positions, given)))
        except (ValueError, KeyError, TypeError, OSError) as error:
            return f"not saved: {_line(error)}"
        return f"saved; `patch_model(model, {str(folder)!r})` loads it"

    def body(
        self,
        label: str,
        text: str,
        chat: bool,
        positions: str,
        tokens: float,
        temperature: float,
        *given: float,
    ) -> str:
        """Return the body of a request to vLLM that answers as a column does, as JSON."""
        try:
            chosen = self._chosen(label, positions, given)
            sampling = {"max_tokens": int(tokens), "temperature": temperature}
            return json.dumps(
                request_body(chosen, self.base, self.prompt(text, chat), **sampling), indent=2, ensure_ascii=False
            )
        except (ValueError, KeyError, TypeError) as error:
            return _line(error)

    def _chosen(self, label: str, positions: str, given: Sequence[float]) -> Variant:
        found = {variant.label: variant for variant in self.variants(given, positions, True)}
        if label not in found:
            raise ValueError(f"the page has no column {label!r} now; expected one of {', '.join(found)}")
        return found[label]


def _line(error: BaseException) -> str:
    return " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())


# --------------------------------------------------------------------------------------------------------------- page


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError for an adapter's name that cannot be a column's title."""
    for name in names:
        check_name(name)
        if name in (BASE, TOGETHER):
            raise ValueError(f"adapter name is {name!r}, the title of another column; expected another")


def build_page(model: Any, tokenizer: Any, base: str, out: Path) -> Any:
    """Return the page as `gradio.Blocks`. `launch` shows it.

    Args:
        base: the base model's name, for request bodies.
        out: the directory for exported adapters.

    Raises:
        ImportError: Gradio is not installed.
        ValueError: the model is not patched, or an adapter has the name of another column.
    """
    check_gradio()
    import gradio as gr

    page = Page(model, tokenizer, base, out)
    check_names(page.names)
    steering = steering_of(model)
    several = len(page.names) > 1
    with gr.Blocks(title="fused-steer playground", analytics_enabled=False) as blocks:
        gr.Markdown(f"### fused-steer playground · {html.escape(base)}")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                prompt = gr.Textbox("What is a house?", label="Prompt", lines=4, elem_id="prompt")
                chat = gr.Checkbox(
                    bool(getattr(tokenizer, "chat_template", None)),
                    label="as a chat's message",
                    interactive=bool(getattr(tokenizer, "chat_template", None)),
                    elem_id="chat",
                )
                sliders = []
                for adapter in page.names:
                    own = steering.config(adapter).scale
                    most = max(_MOST, 2 * abs(own))
                    sliders.append(
                        gr.Slider(
                            -most, most, own, step=0.05, label=f"strength of {adapter}", elem_id=f"strength-{adapter}"
                        )
                    )
                together = gr.Checkbox(
                    several, label="a column for their sum", visible=several, elem_id="together", container=False
                )
                positions = gr.Dropdown(
                    list(POSITIONS),
                    value=OWN,
                    label="steered tokens",
                    info="or such as first_7+last_7",
                    allow_custom_value=True,
                    elem_id="positions",
                )
                with gr.Accordion("Sampling", open=False):
                    tokens = gr.Slider(1, 512, 48, step=1, label="new tokens at most", elem_id="tokens")
                    temperature = gr.Slider(0, 2, 0, step=0.05, label="temperature; 0 is greedy", elem_id="temperature")
                with gr.Row():
                    go = gr.Button("Answer", variant="primary", elem_id="answer")
                    stop = gr.Button("Stop", elem_id="stop")
            with gr.Column(scale=3):
                columns = gr.HTML(elem_id="columns")
                with gr.Accordion("Export", open=False, elem_id="export"):
                    labels = [BASE, *page.names, *([TOGETHER] if several else [])]
                    which = gr.Dropdown(labels, value=labels[-1], label="column", elem_id="column")
                    with gr.Row():
                        name = gr.Textbox("found", label=f"name of a folder in {out}", elem_id="name")
                        save = gr.Button("Save as an adapter", elem_id="save")
                    said = gr.Markdown(elem_id="said")
                    make = gr.Button("Body of a request to vLLM", elem_id="make")
                    body = gr.Code(
                        language="json", label="POST /v1/chat/completions or /v1/completions", elem_id="body"
                    )
        # One model: one action at a time.
        one = {
            "concurrency_limit": 1,
            "concurrency_id": "model",
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        asked = go.click(
            page.answer, [prompt, chat, positions, together, tokens, temperature, *sliders], columns, **one
        )
        stop.click(None, cancels=[asked], api_visibility="private")
        save.click(page.save, [which, name, positions, *sliders], said, **one)
        make.click(page.body, [which, prompt, chat, positions, tokens, temperature, *sliders], body, **one)
    return blocks


def launch(blocks: Any, host: str, port: int, *, wait: bool = True) -> None:
    """Serve the page. Nothing is fetched from or sent to other machines.

    Args:
        wait: return only when the server is stopped.
    """
    blocks.queue().launch(
        server_name=host,
        server_port=port,
        share=False,
        footer_links=[],
        ssr_mode=False,
        css=CSS,
        quiet=True,
        prevent_thread_lock=not wait,
    )
