"""The series of other libraries that passed the core tests. Written by `python -m bench.matrix`."""

MATRIX: dict[str, tuple[str, ...]] = {
    "torch": ("2.11", "2.12", "2.13", "2.14", "2.15"),
    "triton": ("3.6", "3.7", "3.8", "3.9"),
    "transformers": ("5.17", "5.18", "5.19", "5.20", "5.21", "5.22", "5.23", "5.24"),
    "peft": ("0.21",),
    "trl": ("1.14", "1.15", "1.16"),
}
