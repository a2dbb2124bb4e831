"""`python -m bench.matrix`: run the core tests with named sets of library versions, each in its own environment.

A set is `constraints.txt` with some versions changed. For each set the command makes a virtual environment, installs
the package with its test extra, and runs the core tests. The outcome is saved in `bench/results/matrix/<set>.json`.
`docs/versions.md` and `fused_steer/_tried.py` are written from these files; the page lists the other sets as not run.
`--requirements` asks pip what the releases of all sets require of each other, without downloading them.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from .results import FOLDER, commit

ROOT = Path(__file__).resolve().parents[1]
RESULTS = FOLDER / "matrix"
REQUIREMENTS = FOLDER / "releases" / "requirements.json"
PAGE = ROOT / "docs" / "versions.md"
TRIED = ROOT / "fused_steer" / "_tried.py"

#: The versions of each set that differ from `constraints.txt`. Another torch downloads its CUDA build, gigabytes.
#: transformers 5.17 needs a huggingface_hub below 2, torch 2.11 and 2.12 a setuptools below 82, and Triton 3.6 a
#: NumPy below 2.4, which its interpreter needs. A CUDA build of torch requires the triton named
#: here.
SETS: dict[str, dict[str, str]] = {
    "pinned": {},
    "transformers-5.17": {"transformers": "5.17.*", "huggingface_hub": "1.*"},
    "transformers-5.18": {"transformers": "5.18.*"},
    "transformers-5.19": {"transformers": "5.19.*"},
    "transformers-5.20": {"transformers": "5.20.*"},
    "transformers-5.21": {"transformers": "5.21.*"},
    "transformers-5.22": {"transformers": "5.22.*"},
    "transformers-5.24": {"transformers": "5.24.*"},
    "triton-3.6": {"triton": "3.6.*", "numpy": "2.3.*"},
    "triton-3.8": {"triton": "3.8.*"},
    "triton-3.9": {"triton": "3.9.*"},
    "trl-1.14": {"trl": "1.14.*"},
    "trl-1.15": {"trl": "1.15.*"},
    "torch-2.11": {"torch": "2.11.*", "triton": "3.6.*", "numpy": "2.3.*", "setuptools": "81.*"},
    "torch-2.12": {"torch": "2.12.*", "triton": "3.7.*", "setuptools": "81.*"},
    "torch-2.14": {"torch": "2.14.*", "triton": "3.8.*"},
    "torch-2.15": {"torch": "2.15.*", "triton": "3.9.*"},
}
SHOWN = ("torch", "triton", "transformers", "peft", "trl")

#: The tests of the kernels, which import neither transformers nor TRL, and the other core tests: the layer, the
#: adapter, batches, training.
KERNELS = (
    "tests/kernels/test_post_block.py",
    "tests/kernels/test_grouped.py",
    "tests/kernels/test_grouped_norm.py",
    "tests/kernels/test_numerics.py",
)
CORE = (
    "tests/model",
    "tests/adapters/test_files.py",
    "tests/serving",
    "tests/test_config.py",
    "tests/test_patch.py",
    "tests/test_steering.py",
    "tests/test_modes.py",
    "tests/test_training.py",
)
#: Additional tests, by the library that a set changes.
OF_LIBRARY = {
    "peft": ("tests/peft/test_peft.py", "tests/test_joint.py"),
    "trl": ("tests/test_trl.py", "tests/recipes/test_train.py"),
    "transformers": (
        "tests/test_trainer.py",
        "tests/test_whole.py",
        "tests/peft/test_peft.py",
        "tests/peft/test_loading.py",
        "tests/peft/test_heads.py",
    ),
    "triton": ("tests/kernels/test_plan.py", "tests/kernels/test_predict.py"),
}
#: What only files of these names import, in fused_steer/ and tests/: a set that changes it alone runs their tests.
ALONE = ("trl",)


def files_of(changed: dict[str, str]) -> list[str]:
    """The files of tests that a set runs."""
    own = [file for library in changed for file in OF_LIBRARY.get(library, ())]
    if changed and all(library in ALONE for library in changed):
        return own
    kernels = KERNELS if not changed or {"torch", "triton"} & changed.keys() else ()
    return list(dict.fromkeys([*kernels, *CORE, *own]))


@dataclass
class Outcome:
    """The outcome of one set.

    Attributes:
        wanted: the versions that the set changes.
        counts: the numbers of tests passed, failed and skipped.
        one_in: N, if only one test in N was run.
        failed: the names of the failed tests.
        note: why the tests did not run, or "".
    """

    name: str
    wanted: dict[str, str]
    versions: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    one_in: int = 1
    note: str = ""
    commit: str = ""
    machine: str = ""


def constraints(text: str, changed: dict[str, str]) -> str:
    """Return a constraints file's text with the versions of some libraries changed.

    With another torch the lines of CUDA's libraries are left out, because each torch requires its own.

    Raises:
        ValueError: a library is not in the file.
    """
    lines = []
    missing = dict(changed)
    for line in text.splitlines():
        if "torch" in changed and re.match(r"(nvidia|cuda)-", line):
            continue
        name = re.match(r"[A-Za-z0-9._-]+", line)
        wanted = changed.get(name[0]) if name else None
        if wanted is None:
            lines.append(line)
        elif missing.pop(name[0], None):  # type: ignore[index]
            lines.append(f"{name[0]}=={wanted}")  # type: ignore[index]
    if missing:
        raise ValueError(f"constraints.txt does not name {', '.join(missing)}; expected a library of it")
    return "\n".join(lines) + "\n"


def conflict(text: str) -> str:
    """Return why pip installs nothing: the requirements that exclude each other, or its first error."""
    _, _, causes = text.partition("The conflict is caused by:")
    found = [line.strip() for line in causes.strip("\n").partition("\n\n")[0].splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in text.splitlines() if line.startswith("ERROR")]
    return "; ".join(dict.fromkeys(found)) or next(iter(errors), "pip failed")


def run_set(name: str, folder: Path, timeout: float, workers: int, one_in: int = 1) -> Outcome:
    """Make the set's environment in `folder` and run the tests, or one in `one_in`, with `workers` processes."""
    changed = SETS[name]
    found = Outcome(
        name, changed, one_in=one_in, commit=commit(), machine=f"{platform.machine()}, {os.cpu_count()} cores, no GPU"
    )
    place = folder / name
    python = place / "bin" / "python"
    limits = place / "constraints.txt"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
    limits.write_text(constraints((ROOT / "constraints.txt").read_text(encoding="utf-8"), changed), encoding="utf-8")
    install = [python, "-m", "pip", "install", "-q", "-c", limits, "-e", f"{ROOT}[test]"]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        found.note = f"cannot be installed together: {conflict(done.stdout + done.stderr)}"
        return found
    code = (
        f"import json\nfrom importlib import metadata\nprint(json.dumps({{n: metadata.version(n) for n in {SHOWN!r}}}))"
    )
    found.versions = json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout)
    options = ["-q", "-n", str(workers), "--dist", "loadfile", "-p", "no:cacheprovider", "--one-in", str(one_in)]
    # By the environment's own Python: bin/pytest names the Python of the environment that a copy was made of. Not by
    # `python -m pytest`, which makes the checkout's folder `kernels` importable.
    code = "import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main())"
    command = [python, "-c", code, *options, *files_of(changed)]
    start = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        found.note = f"stopped after {timeout:.0f} s"
        return found
    found.seconds = round(time.monotonic() - start, 1)
    summary = done.stdout.splitlines()[-1] if done.stdout else ""
    found.counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", summary)}
    found.failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if not found.counts:
        found.note = f"pytest gave no counts: {' '.join((done.stdout + done.stderr).split())[-200:]}"
    return found


def load(folder: Path = RESULTS) -> dict[str, Outcome]:
    """Read the saved outcomes, by set."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        fields: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found[file.stem] = Outcome(**fields)
    return found


def passed(outcome: Outcome) -> bool:
    """Return whether a set's tests ran and all passed."""
    return outcome.counts.get("passed", 0) > 0 and outcome.counts.keys() <= {"passed", "skipped"}


def tried(outcomes: dict[str, Outcome], pins: str) -> dict[str, list[str]]:
    """Return the series of each library that passed: those of `constraints.txt`, which every change is tested with, and
    those that a set changed.

    Args:
        pins: the text of `constraints.txt`.
    """
    found = {library: re.findall(rf"^{library}==(\d+\.\d+)", pins, re.MULTILINE) for library in SHOWN}
    for outcome in filter(passed, outcomes.values()):
        for library in outcome.wanted.keys() & set(SHOWN):
            found[library].append(".".join(outcome.versions[library].split(".")[:2]))
    return {library: sorted(set(series), key=_number) for library, series in found.items()}


def _number(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def tried_module(series: dict[str, list[str]]) -> str:
    """Return the text of `fused_steer/_tried.py`."""
    lines = [
        f'    "{library}": ({", ".join(map(_quoted, found))}{"," * (len(found) == 1)}),'
        for library, found in series.items()
    ]
    return f'''"""The series of other libraries that passed the core tests. Written by `python -m bench.matrix`."""

MATRIX: dict[str, tuple[str, ...]] = {{
{chr(10).join(lines)}
}}
'''


def _quoted(text: str) -> str:
    return f'"{text}"'


def wanted_releases() -> dict[str, list[str]]:
    """Return the series of each library in all sets, as pip's specifiers."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    found = {library: [f"{pin}.*" for pin in series] for library, series in tried({}, pins).items()}
    for changed in SETS.values():
        for library in changed.keys() & set(SHOWN):
            found[library].append(changed[library])
    return {library: sorted(set(series), key=_number) for library, series in found.items()}


def ask_requirements() -> dict[str, dict[str, list[str]]]:
    """Ask pip what each release requires of Python and of the others, by library and version."""
    found: dict[str, dict[str, list[str]]] = {}
    for library, series in wanted_releases().items():
        for specifier in series:
            options = ["--dry-run", "--ignore-installed", "--no-deps", "--report", "-", "-q"]
            command = [sys.executable, "-m", "pip", "install", *options, f"{library}=={specifier}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                typer.echo(f"{library} {specifier}: {conflict(done.stdout + done.stderr)}")
                continue
            metadata = json.loads(done.stdout)["install"][0]["metadata"]
            own = [f"Python {metadata['requires_python']}"] if "requires_python" in metadata else []
            own += [line.partition(";")[0].strip() for line in metadata.get("requires_dist", []) if _is_of_set(line)]
            found.setdefault(library, {})[metadata["version"]] = own
    return found


def _is_of_set(line: str) -> bool:
    name = re.match(r"[A-Za-z0-9._-]+", line)
    return name is not None and name[0] in (*SHOWN, "huggingface-hub", "huggingface_hub") and "extra ==" not in line


def page(outcomes: dict[str, Outcome], requirements: dict[str, dict[str, list[str]]]) -> str:
    """Return the text of `docs/versions.md`, with a row for each set.

    Args:
        requirements: see `ask_requirements`.
    """
    rows = []
    for name, changed in SETS.items():
        done = outcomes.get(name)
        wanted = ", ".join(f"{library} {version}" for library, version in changed.items()) or "`constraints.txt`"
        if done is None or not done.counts:
            rows.append([name, wanted, *["–"] * len(SHOWN), done.note if done else _not_run(changed)])
            continue
        passed, failed = done.counts.get("passed", 0), len(done.failed)
        sample = "" if done.one_in == 1 else f" of one test in {done.one_in}"
        result = f"{passed} passed{sample}" + (
            f", **{failed} failed**: {', '.join(map(_short, done.failed))}" if failed else ""
        )
        rows.append([name, wanted, *(done.versions[library] for library in SHOWN), f"{result} ({done.commit[:7]})"])
    heads = ["set", "changed versions", *SHOWN, "core tests"]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])
    return f"""# Versions

This page lists the library versions that the core tests were run with. Each *set* is `constraints.txt` with some
versions changed, in its own environment. `python -m bench.matrix` runs the tests and writes this page. The kernels'
tests run if torch or triton changes, because kernels import neither transformers nor TRL. If only TRL changes, the
tests of TRL's trainers run. On a machine without a GPU the kernels run in Triton's interpreter. A set with another
torch downloads the CUDA build, several gigabytes, and runs only if you name it. Where the table says so, `--one-in`
ran a sample of the tests, the same in each set.

{table}

A release that is in no set that passed counts as untried. With an untried version, `patch_model` warns once and
continues. `fused-steer doctor` shows the installed versions, and whether they were tried.

## What cannot be installed together

pip refuses a release together with others than it requires. `python -m bench.matrix --requirements` asked for them. A
CPU build of torch requires no triton, so the other pairs of torch and triton were run with CPU builds.

{_table_of(requirements)}
"""


def _table_of(requirements: dict[str, dict[str, list[str]]]) -> str:
    rows = []
    for library, releases in requirements.items():
        by_text: dict[str, list[str]] = {}
        for version, lines in releases.items():
            by_text.setdefault(", ".join(lines) or "–", []).append(version)
        rows += [f"| {library} {', '.join(versions)} | {text} |" for text, versions in by_text.items()]
    return "\n".join(["| release | requires |", "| --- | --- |", *rows])


def write(outcomes: dict[str, Outcome]) -> None:
    """Write the files made of the saved results."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    PAGE.write_text(page(outcomes, json.loads(REQUIREMENTS.read_text(encoding="utf-8"))), encoding="utf-8")
    TRIED.write_text(tried_module(tried(outcomes, pins)), encoding="utf-8")


def _not_run(changed: dict[str, str]) -> str:
    return "not run: this torch is a CUDA build, several gigabytes" if "torch" in changed else "not run"


def _short(test: str) -> str:
    return f"`{test.rpartition('/')[2]}`"


def main(
    sets: Annotated[
        list[str] | None, typer.Argument(help="Names of sets. Default: all sets with constraints.txt's torch.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Folder of the environments, which are kept.")] = Path(".matrix"),
    timeout: Annotated[float, typer.Option(help="Time limit for the tests of a set, in seconds.")] = 3600.0,
    workers: Annotated[int, typer.Option("-n", min=1, help="Number of processes that run the tests of a set.")] = 2,
    one_in: Annotated[int, typer.Option(min=1, help="Run a sample, one test in this number.")] = 1,
    page_only: Annotated[bool, typer.Option("--page", help="Only write the files made of saved results.")] = False,
    ask: Annotated[bool, typer.Option("--requirements", help="Only ask pip for the releases' requirements.")] = False,
) -> None:
    """Run the core tests with sets of library versions; write docs/versions.md and fused_steer/_tried.py."""
    for name in sets or ():
        if name not in SETS:
            raise typer.BadParameter(f"set is {name!r}; expected one of {', '.join(SETS)}")
    chosen = list(sets or (name for name, changed in SETS.items() if "torch" not in changed))
    if ask:
        REQUIREMENTS.parent.mkdir(parents=True, exist_ok=True)
        REQUIREMENTS.write_text(json.dumps(ask_requirements(), indent=2) + "\n", encoding="utf-8")
    for name in () if page_only or ask else chosen:
        typer.echo(f"{name}: {', '.join(f'{k} {v}' for k, v in SETS[name].items()) or 'as pinned'}")
        done = run_set(name, folder.resolve(), timeout, workers, one_in)
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(asdict(done), indent=2) + "\n", encoding="utf-8")
        typer.echo(f"  {done.note or done.counts} in {done.seconds:.0f} s")
        for test in done.failed:
            typer.echo(f"  FAILED {test}")
    write(load())


if __name__ == "__main__":
    typer.run(main)
