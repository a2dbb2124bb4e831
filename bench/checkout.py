"""Runs pytest from a checkout that is not installed: `python -m bench.checkout -m gpu`.

Installing maps the folder `kernels/` to `fused_steer.kernels`. Where nothing can be installed, this module imports the
folder under that name.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def make_importable() -> None:
    """Make `fused_steer.kernels` importable, whether or not the package is installed."""
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

    # As a pytest plug-in this module is imported in every test process, and with it the package.
    raise SystemExit(pytest.main(["-p", "bench.checkout", *sys.argv[1:]]))
