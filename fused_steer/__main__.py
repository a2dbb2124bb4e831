"""The command as `python -m fused_steer`, for launchers that start modules, such as `accelerate launch -m`."""

from .cli import app

if __name__ == "__main__":
    app(prog_name="fused-steer")
