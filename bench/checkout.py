"""Run from a checkout that is not installed: `python -m bench.checkout -m gpu` runs its tests.

`kernels/` is `fused_steer.kernels` only once installed. On a machine where nothing can be installed it is imported from
where it lies, under its proper name.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def make_importable() -> None:
    """Make `fused_steer.kernels` importable, be it installed or not."""
    if importlib.util.find_spec("fused_steer.kernels") is not None:
        return
    import fused_steer

    name, folder = "fused_steer.kernels", ROOT / "kernels"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    fused_steer.kernels = module


if __name__ == "__main__":
    make_importable()
    import pytest

    # As a plug-in this module, and with it the package, is imported in each process that runs tests.
    raise SystemExit(pytest.main(["-p", "bench.checkout", *sys.argv[1:]]))
