"""The package's metadata: its folders, dependencies and entry points."""

import re
from pathlib import Path
from runpy import run_path

from setuptools import setup

ROOT = Path(__file__).parent

#: The subpackages of fused_steer.
ROOMS = [
    "adapters",
    "cli",
    "diagnostics",
    "evaluation",
    "importers",
    "lora",
    "merging",
    "model",
    "paper",
    "peft",
    "playground",
    "recipes",
    "serving",
    "theory",
    "tools",
    "vectors",
    "vllm",
]

DEMO = ["accelerate", "gguf>=0.19", "matplotlib"]  # transformers reads GGUF files through accelerate
# The ranges are those of bench/matrix.py; fused_steer/_requirements.py lists the versions that were tried.
PEFT = ["peft>=0.21,<0.22"]
TRL = ["datasets", *PEFT, 'trl>=1.14,<1.17; python_version >= "3.11"']  # TRL for Python 3.10 needs another transformers
CHAT = ["prompt_toolkit"]
EVAL = ["lm-eval>=0.4.9"]
RL = [*TRL, "reasoning-gym"]
QUANT = ["bitsandbytes", "torchao"]
PLAYGROUND = ["gradio>=6,<7"]
NOTEBOOKS = ["ipykernel", "nbclient", "nbformat"]
TEST = [
    *CHAT,
    *DEMO,
    *NOTEBOOKS,
    *QUANT,
    *TRL,
    "build",
    "packaging",
    "pytest>=8",
    "pytest-benchmark",
    "pytest-xdist",
    "setuptools>=77",
]
# pyreft pins another transformers, so install it afterwards: `pip install --no-deps pyreft==0.1.0`.
BENCH = ["evaluate", "liger-kernel", "matplotlib", "peft", "pytest>=8", "pytest-benchmark", "pyvene", "scikit-learn"]
# ruff formats the signatures in the API reference.
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material", "mkdocstrings[python]", "ruff"]
DEV = [*TEST, "mypy", "pre-commit", "ruff"]

REPOSITORY = "https://github.com/fused-steer/fused-steer"
# README's links are relative to the repository; PyPI shows it elsewhere. Pictures need their raw files.
README = re.sub(
    r"\]\(((?!https?:|#)[^)\s]+)\)",
    lambda link: f"]({REPOSITORY}/{'raw' if link[1].endswith(('.png', '.svg')) else 'blob'}/main/{link[1]})",
    (ROOT / "README.md").read_text(encoding="utf-8"),
)

setup(
    name="fused-steer",
    # Read by running the file alone: importing the package would need torch at build time.
    version=run_path(str(ROOT / "fused_steer" / "_version.py"))["__version__"],
    description="Post-block activation steering of language models, fused into the residual add by Triton kernels",
    long_description=README,
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    author="The fused-steer contributors",
    url=REPOSITORY,
    project_urls={
        "Changelog": f"{REPOSITORY}/blob/main/CHANGELOG.md",
        "Issues": f"{REPOSITORY}/issues",
        "Paper": "https://arxiv.org/abs/2603.00425",
    },
    keywords=["activation steering", "PEFT", "Triton", "language models", "vLLM"],
    python_requires=">=3.10",
    # Listed explicitly: find_packages would also install bench/ and tests/, and kernels/ under its bare name, which
    # transformers takes for the Hub's package `kernels`.
    packages=[
        "fused_steer",
        *(f"fused_steer.{room}" for room in ROOMS),
        "fused_steer.kernels",
    ],
    package_dir={"fused_steer.kernels": "kernels"},
    package_data={"fused_steer": ["py.typed", "recipes/shipped/*.yaml"]},
    install_requires=[
        "torch>=2.11,<2.16",
        "triton>=3.6,<3.10; sys_platform == 'linux'",
        "transformers>=5.17,<5.25",
        "pyyaml",
        "safetensors",
        "huggingface_hub",
        "packaging",
        "typer",
        "rich",
        "tqdm",
    ],
    extras_require={
        "demo": DEMO,
        "chat": CHAT,
        "eval": EVAL,
        "notebooks": NOTEBOOKS,
        "peft": PEFT,
        "playground": PLAYGROUND,
        "quant": QUANT,
        "rl": RL,
        "trl": TRL,
        "test": TEST,
        "bench": BENCH,
        "docs": DOCS,
        "dev": DEV,
    },
    entry_points={
        "console_scripts": ["fused-steer = fused_steer.cli:app"],
        "vllm.general_plugins": ["fused_steer = fused_steer.vllm:register"],
        "vllm.endpoint_plugins": ["fused_steer = fused_steer.vllm.endpoint:SteeringEndpoint"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
