"""``vllm-ext bench``: the kinds of measurement, and what is done with their files."""

import argparse
from importlib import import_module

KINDS = {
    "host": (
        "vllm_ext.hostbench",
        "host cost of a decode step, stock against patched; needs no GPU",
    ),
    "kernels": (
        "vllm_ext.bench.kernels",
        "our kernels beside their competitors; without a GPU answers only",
    ),
    "engine": (
        "vllm_ext.bench.engine",
        "whole engines, stock against each patch: TPOT, TTFT, tokens/s",
    ),
    "linkedin": (
        "vllm_ext.bench.linkedin",
        "LinkedIn's two headlines, on this machine",
    ),
    "compare": ("vllm_ext.bench.compare", "what changed between two result files"),
    "gate": ("vllm_ext.bench.gate", "for CI: fail if a gain became less"),
    "report": ("vllm_ext.bench.report", "result files as one page, with plots"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The kinds, with the options of each."""
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    for name, (module, text) in KINDS.items():
        added = kinds.add_parser(name, help=text, description=text)
        loaded = import_module(module)
        loaded.add_arguments(added)
        added.set_defaults(run=loaded.run)
