"""Compare a model's adapters in the browser: base and steered answers side by side, from one batch."""

from .answers import Answer, Token, Variant, answers
from .exporting import adapter_of, request_body

__all__ = ["Answer", "Token", "Variant", "adapter_of", "answers", "request_body"]
