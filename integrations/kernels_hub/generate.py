"""Lay `kernels/` out as a repository for Hugging Face's Kernels hub.

    python integrations/kernels_hub/generate.py OUT

writes OUT with build.toml, flake.nix, CARD.md, tests/ and torch-ext/fused_steer_kernels/. There,
`nix run .#build-and-copy -L` (or `kernel-builder build`) makes the variants, and `kernel-builder upload` uploads them.

The modules are those of `kernels/`, byte for byte but for one word: the hub loads several versions of a kernel in one
process, so each needs its own namespace of ops. `fused_steer` becomes `fused_steer_<digest of the sources>` there.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "kernels"
PACKAGE = "fused_steer_kernels"
#: Where a source names the ops' namespace.
_NAMESPACE = re.compile(r"(?<=torch\.ops\.)fused_steer\b|(?<=Library\(\")fused_steer(?=\")|(?<=\")fused_steer(?=::)")
#: They compile ahead of time and read machine code, for `fused-steer kernels`. The op does not import them.
_TOOLS = {"aot.py", "predict.py", "sass.py"}


def namespace(sources: dict[str, str]) -> str:
    """Return the ops' namespace, which no other version of the sources has."""
    digest = hashlib.sha256()
    for name, text in sorted(sources.items()):
        digest.update(f"{name}\0{text}\0".encode())
    return f"fused_steer_{digest.hexdigest()[:12]}"


def generate(out: Path) -> Path:
    """Write the repository to a new folder. Return the folder of the Python package in it.

    Raises:
        FileExistsError: the folder is there and is not empty.
        ValueError: no source names the namespace, so that versions would clash.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; expected a new folder")
    sources = {path.name: path.read_text(encoding="utf-8") for path in KERNELS.glob("*.py") if path.name not in _TOOLS}
    own = namespace(sources)
    renamed = {name: _NAMESPACE.subn(own, text) for name, text in sources.items()}
    if not sum(count for _, count in renamed.values()):
        raise ValueError(f"no file in {KERNELS} names the namespace fused_steer; expected some")
    package = out / "torch-ext" / PACKAGE
    package.mkdir(parents=True)
    for name, (text, _) in renamed.items():
        (package / name).write_text(text, encoding="utf-8")
    for name in ("build.toml", "flake.nix", "CARD.md"):
        shutil.copy(HERE / name, out)
    shutil.copytree(HERE / "tests", out / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HERE.parents[1] / "LICENSE", out)
    return package


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python integrations/kernels_hub/generate.py OUT")
    try:
        print(f"written to {generate(Path(sys.argv[1])).parents[1]}")
    except (OSError, ValueError) as error:
        sys.exit(f"generate.py: {error}")
