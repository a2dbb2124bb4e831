"""Writes the tables and pictures of all results, beside the paper's own figures where we have them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fused_steer.paper.tasks import TASKS

from .methods import METHODS, SITE_TITLES, SITED, at_site
from .runs import best, read

PUBLISHED = Path(__file__).with_name("published.json")
PAGE = "report.md"
#: Each section's title, methods, and the matching table of the paper. A section is left out if earlier ones have
#: all of its results.
SECTIONS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        "Methods",
        ("untrained", "full", "lora", "reft", "reft-post-block", "lofit", "jola", "lowrank"),
        "the paper's Table 1",
    ),
    ("Forms of steering", ("lowrank", "rank1", "vector"), "the paper has such a table; we do not have it"),
    (
        "Joint adaptation",
        ("lora", "lowrank", "joint", "joint-orth", "joint-released"),
        "the paper has such a table; we do not have it",
    ),
    (
        "Sites",
        tuple(at_site(name, site) for name in SITED for site in (*SITE_TITLES, "post_block")),
        "the paper compares sites; we do not have its figures",
    ),
)
#: Pictures of a diagnosis, and the number of the paper's figure that each one follows.
PICTURES = {"mlp_share.png": 2, "alignment.png": 3, "cosine.png": 5, "spectral_norm.png": 6}

LIMITS = (
    "Training rows are cut at a number of tokens, and answers end at a number of generated tokens. *Test answers that "
    "fit*: per cent of the data's own answers that fit into the generated tokens. *Reachable*: the accuracy of a model "
    "that writes these answers word for word, in per cent."
)

Results = dict[str, dict[tuple[str, str], list[dict[str, Any]]]]


def collect(out: Path) -> Results:
    """Read all results, by model, then by task and method.

    Raises:
        ValueError: a file is no results file, or there is no file.
    """
    found: Results = {}
    for file in sorted(out.glob("*/*/*/rate-*-seed-*.json")):
        result = read(file) | {"file": file}
        key = result["key"]
        found.setdefault(file.parents[2].name, {}).setdefault((key["task"], key["method"]), []).append(result)
    if not found:
        raise ValueError(f"{out} has no results; expected those of `python -m bench.paper run`")
    return found


def chosen(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the runs at the rate that validated best with seed 0, ordered by seed."""
    rate = best([result for result in results if result["key"]["seed"] == 0] or results)
    return sorted((r for r in results if r["key"]["rate"] == rate), key=lambda r: r["key"]["seed"])


def percent(results: Sequence[Mapping[str, Any]], name: str = "accuracy", split: str = "test") -> str:
    """Format the mean and standard deviation over the seeds, in per cent."""
    values = [100 * result[split][name] for result in results]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def published() -> dict[str, Any]:
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))


def of_paper(paper: Mapping[str, Any], model: str | None, task: str, method: str) -> str:
    """Return the paper's figure, with a † if it is second-hand; "" if we do not have it."""
    for entry in paper["accuracy"]:
        if (entry["model"], entry["task"]) == (model, task) and method in entry:
            return f"{entry[method]:.1f}" + ("†" if entry["source"] == "note" else "")
    return ""


def published_name(paper: Mapping[str, Any], model: str) -> str | None:
    """Return the name that the paper's figures have for a folder of results, None if it is no model of the paper."""
    return next((name for name, folders in paper["names"].items() if model in folders), None)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(results: Sequence[Mapping[str, Any]] | None) -> str:
    if not results:
        return "–"
    runs = chosen(results)
    ours, released = percent(runs), percent(runs, "accuracy_as_released")
    return ours if ours == released else f"{ours} (as released: {released})"


def notes(model: str, results: Mapping[tuple[str, str], Any], paper: Any) -> list[str]:
    """Return what must be known before our figures are compared with the paper's."""
    name, lines = published_name(paper, model), []
    if name is None:
        known = ", ".join(folder for folders in paper["names"].values() for folder in folders)
        lines.append(f"We have no figures of the paper for {model} (only for {known}): the columns *paper* are empty.")
    elif name != model:
        lines.append(f"The columns *paper* have the paper's figures for {name}.")
    if name and any(
        result["generated"] for (task, _), every in results.items() if task == "listops" for result in every
    ):
        lines.append(
            "The rows of ListOps are generated (docs/paper.md). The paper's figures are for other rows, "
            f"probably those of the released code, {TASKS['listops'].hub[0]}."
        )
    return lines


def section(model: str | None, results: Mapping[tuple[str, str], Any], methods: Sequence[str], paper: Any) -> str:
    """Return a table with a row per method: our figure and the paper's for each task with results."""
    tasks = [task for task in TASKS if any((task, method) in results for method in methods)]
    header = ["method", "trained", *(name for task in tasks for name in (TASKS[task].title, "paper"))]
    rows = []
    for method in methods:
        every = [result for task in tasks for result in results.get((task, method), [])]
        if not every:
            continue
        share = f"{every[0]['trained'] / every[0]['parameters']:.3%}"
        cells = (
            text for task in tasks for text in (cell(results.get((task, method))), of_paper(paper, model, task, method))
        )
        rows.append([METHODS[method].title, share, *cells])
    return table(header, rows)


def details(results: Mapping[tuple[str, str], Any]) -> str:
    """Return a table with a row per task and method: chosen rate, validation, test by seed, unreadable answers."""
    rows = []
    for (task, method), every in sorted(results.items()):
        runs = chosen(every)
        rates = sorted({result["key"]["rate"] for result in every})
        rows.append(
            [
                TASKS[task].title,
                METHODS[method].title,
                f"{runs[0]['key']['rate']:g} of {', '.join(f'{rate:g}' for rate in rates)}",
                percent(runs[:1], split="validation"),
                ", ".join(f"{100 * run['test']['accuracy']:.1f}" for run in runs),
                f"{sum(run['test']['unreadable'] for run in runs)} of {sum(len(run['test']['exact']) for run in runs)}",
            ]
        )
    return table(["task", "method", "rate", "validation", "test by seed", "unreadable"], rows)


def limits(results: Mapping[tuple[str, str], Any]) -> str:
    """Return a table with a row per task: training rows that are cut, and the test answers that can be reached."""
    rows: dict[tuple[str, ...], None] = {}
    for task in TASKS:
        every = [result for (name, _), found in results.items() if name == task for result in found]
        for result in [result for result in every if result["training_rows"]] or every:
            of = result["training_rows"] + result["too_long"]
            fit, reached = (f"{100 * result['test'][name]:.1f}" for name in ("completions_fit", "reachable"))
            cut = (f"{result[name]:,} of {of:,}" if of else "–" for name in ("too_long", "cut"))
            rows[(TASKS[task].title, *cut, fit, reached)] = None
    header = [
        "task",
        "training rows without any answer left",
        "with its end cut off",
        "test answers that fit",
        "reachable",
    ]
    return table(header, list(rows))


def unread(results: Mapping[tuple[str, str], Any]) -> str:
    """Return examples of answers that could not be read. They count as wrong."""
    shown = [
        f"- {TASKS[task].title}, {METHODS[method].title}: {json.dumps(said, ensure_ascii=False)}"
        for (task, method), every in sorted(results.items())
        for said in chosen(every)[0]["test"]["unreadable_shown"][:1]
    ]
    return "\n".join(shown) or "None."


def pictures(results: Mapping[tuple[str, str], Any], out: Path) -> str:
    """Return Markdown for the pictures of the joint runs at the chosen rate."""
    lines = []
    for (task, method), every in sorted(results.items()):
        first = chosen(every)[0]
        for name, figure in PICTURES.items():
            if name in first["pictures"]:
                path = first["file"].with_suffix("").relative_to(out).as_posix()
                lines.append(
                    f"After Figure {figure}, {TASKS[task].title}, {METHODS[method].title}:\n\n![]({path}/{name})"
                )
    return "\n\n".join([*lines, "We do not have the paper's Figure 4."])


def write(out: Path) -> Path:
    """Write the report to the folder of the results; return its path.

    Raises:
        ValueError: there are no results.
    """
    found, paper = collect(out), published()
    parts = [
        "<!-- Written by `python -m bench.paper report`. Do not edit. -->",
        "# The paper's experiments, reproduced",
        "Exact match on the test split in per cent: mean ± standard deviation over the seeds, at the learning rate "
        "that validated best. Columns headed *paper* have the paper's own figures; an empty cell means that we do not "
        "have the figure. †: second-hand. *As released*: with the released code's reader of answers, which misreads "
        "some correct answers.",
        "\n".join(f"- The paper: {line['text']} ({paper['sources'][line['source']]})." for line in paper["headline"]),
        "We do not have: " + "; ".join(paper["not_at_hand"]) + ".",
        "† " + paper["sources"]["note"] + ".",
    ]
    for model, results in found.items():
        parts += [f"## {model}", *notes(model, results, paper)]
        name = published_name(paper, model)
        seen: set[str] = set()
        for title, methods, beside in SECTIONS:
            there = {method for _, method in results} & set(methods)
            if not there <= seen:
                seen |= there
                parts += [f"### {title} ({beside})", section(name, results, methods, paper)]
        parts += ["### Rates, seeds, answers", details(results), "### Limits of length", LIMITS, limits(results)]
        parts += ["### Answers that could not be read", unread(results)]
        parts += ["### Pictures", pictures(results, out)]
        machines = [r["machine"] for every in results.values() for r in every]
        lines = {f"- {m['device']}, torch {m['versions']['torch']}, commit {str(m['commit'])[:12]}" for m in machines}
        parts.append("\n".join(sorted(lines)))
    page = out / PAGE
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page
