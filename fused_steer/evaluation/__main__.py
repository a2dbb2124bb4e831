"""lm-evaluation-harness's own command with the model `fused-steer`: `python -m fused_steer.evaluation --model …`."""

from lm_eval.__main__ import cli_evaluate

from . import harness  # noqa: F401 (it makes the model's name known)

if __name__ == "__main__":
    cli_evaluate()
