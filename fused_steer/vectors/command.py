"""`fused-steer extract`: reads contrasting texts, writes an adapter, a picture and the figures as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.files import refuse_foreign, write_adapter
from ..adapters.saving import check_output, write_whole
from ..config import checked_choice, checked_number
from ..diagnostics.figures import check_matplotlib
from ..model.decoder import find_decoder, meta_model
from ..tools.loading import load_tokenizer
from ..tools.prompts import encode, read_prompts
from .directions import check_method
from .extraction import Extraction, check_extraction, extract
from .hidden import TOKENS
from .pairs import Contrast, read_pairs, read_sets
from .sweeping import Dose, continuations, sweep

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from torch import Tensor

JSON_NAME, PICTURE_NAME = "extraction.json", "extraction.png"


@dataclass(frozen=True)
class ExtractOptions:
    """What `run` does. The command's options document each and hold the defaults.

    Raises:
        ValueError: a value out of range, or `out` is a file.
    """

    pairs: Path | None
    positive: Path | None
    negative: Path | None
    model: str | None
    out: Path
    method: str
    token: str
    layers: list[int] | None
    normalise: bool
    scale: float
    held_out: float
    doses: list[float]
    each_layer: bool
    texts: Path | None
    say: str | None
    new_tokens: int
    max_length: int
    batch_size: int
    device: str
    as_json: bool

    def __post_init__(self) -> None:
        sets = [self.positive, self.negative]
        if (self.pairs is None) == (sets == [None, None]):
            given = "all are" if self.pairs else "none is"
            raise ValueError(f"PAIRS or --positive and --negative have to be given, and {given}; expected one of them")
        if self.pairs is None and None in sets:
            missing = "--positive" if self.positive is None else "--negative"
            raise ValueError(f"{missing} is not given; expected a file of texts for each side")
        check_method(self.method, paired=self.pairs is not None)
        checked_choice("token", self.token, TOKENS)
        for name in ("new_tokens", "max_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', ' ')} is {getattr(self, name)}; expected at least 1")
        if self.say is not None and not self.say.strip():
            raise ValueError("say is empty; expected the beginning of a text")
        needs = {"--say": self.say is not None, "--texts": self.texts is not None, "--each-layer": self.each_layer}
        if not self.doses and (useless := [name for name, there in needs.items() if there]):
            raise ValueError(f"{useless[0]} is given and --doses is empty; expected strengths to try, such as 0,1,2")
        for dose in self.doses:
            checked_number("a dose", dose)
        check_output(self.out)
        refuse_foreign(self.out)

    def read(self) -> Contrast:
        if self.pairs is not None:
            return read_pairs(self.pairs)
        assert self.positive is not None and self.negative is not None
        return read_sets(self.positive, self.negative)


def layers_table(found: Extraction) -> Table:
    """A row for each layer of the model."""
    from rich.table import Table

    table = Table("layer", "‖v‖", "‖v‖/‖h‖", "d", "AUC", "in the adapter")
    for column in table.columns:
        column.justify = "right"
    for row in found.layers:
        numbers = (f"{row.norm:.4g}", f"{row.share:.3f}", f"{row.d:.2f}", f"{row.auc:.3f}")
        table.add_row(str(row.layer), *numbers, "yes" if row.layer in found.vectors else "")
    measured = "of the texts that made it"
    if any(found.held_out):
        measured = f"of the {' + '.join(map(str, found.held_out))} texts held out"
    table.caption = f"d and AUC: how well the vector tells the sides apart, {measured}"
    return table


def doses_table(doses: Sequence[Dose]) -> Table:
    """A row for each dose, of each group of layers."""
    from rich.table import Table

    table = Table("strength", "layers", "perplexity", "margin")
    for column in table.columns:
        column.justify = "right"
    for row in doses:
        layers = ",".join(map(str, row.layers)) if len(row.layers) <= 8 else f"{len(row.layers)} layers"
        table.add_row(f"{row.dose:g}", layers, f"{row.perplexity:.4g}", f"{row.margin:+.3f}")
    table.caption = "margin: log-probability a token of the positive texts less that of the negative ones"
    return table


def run(options: ExtractOptions, console: Console) -> None:
    """Load, extract, sweep; write adapter, picture and figures to `options.out`, and print a row for each layer.

    Raises:
        ValueError, FileNotFoundError: an input is missing or does not fit. Nothing has been written then.
        ImportError: matplotlib is missing.
    """
    from ..tools.demo import SMOLLM2, choose_device, load_model
    from .figures import draw

    check_matplotlib()
    device = choose_device(options.device)
    contrast = options.read()
    others = None if options.texts is None else read_prompts(options.texts)
    size = (options.max_length, options.batch_size)

    def encoded(tokenizer: Any) -> list[list[dict[str, Tensor]]]:
        both = [encode(tokenizer, texts, *size, whole=True) for texts in (contrast.positive, contrast.negative)]
        return [*both, [*both[0], *both[1]] if others is None else encode(tokenizer, others, *size)]

    if options.model is not None:  # whatever can be refused before weights are loaded
        layout = find_decoder(meta_model(options.model)).layout
        check_extraction(layout, options.method, options.layers, options.scale, options.held_out, contrast.paired)
        encoded(load_tokenizer(options.model))
    model, tokenizer = load_model(options.model, device)
    positive, negative, texts = encoded(tokenizer)
    found = extract(
        model,
        positive,
        negative,
        method=options.method,
        token=options.token,
        layers=options.layers,
        normalise=options.normalise,
        scale=options.scale,
        held_out=options.held_out,
        paired=contrast.paired,
    )
    doses = sweep(model, found.vectors, positive, negative, texts, options.doses, each_layer=options.each_layer)
    said: list[str] = []
    if options.say is not None:
        said = continuations(model, tokenizer, found.vectors, options.say, options.doses, options.new_tokens)
    write_adapter(options.out, found.adapter)
    draw(found, doses, options.out / PICTURE_NAME)
    figures = {
        "model": options.model or SMOLLM2,
        "method": options.method,
        "token": options.token,
        "normalise": options.normalise,
        **found.as_dict(),
        "doses": [asdict(dose) for dose in doses],
        **({"prompt": options.say, "continuations": said} if options.say is not None else {}),
    }
    written = json.dumps(figures, indent=2)
    write_whole(options.out / JSON_NAME, written + "\n")

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    if options.as_json:
        say(written)
        return
    kind = "pairs" if contrast.paired else "sets"
    say(f"model     {options.model or SMOLLM2}, {model.dtype} on {device}")
    say(
        f"{kind:<9} {found.texts[0]} positive and {found.texts[1]} negative texts, {options.token} token, "
        f"{options.method}"
    )
    console.print(layers_table(found))
    if doses:
        console.print(doses_table(doses))
    for dose, more in zip(options.doses, said, strict=bool(said)):
        say(f"at {dose:<6g} {options.say}{more}".replace("\n", " "))
    config = found.adapter.config
    say(f"adapter   {options.out}, strength {config.scale:g}, {found.adapter.layout.count(config):,} parameters")
    say(f"picture   {options.out / PICTURE_NAME}")
