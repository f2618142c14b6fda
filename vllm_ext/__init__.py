"""Faster decoding of small models on stock vLLM, as a plugin."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout the sibling folders lie beside this one; installed, they lie inside
# it. Python puts the current folder first, so a checkout also shadows an install.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "kernels").is_dir():
    __path__.append(str(_checkout))
