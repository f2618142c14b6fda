"""Patch another package's code: declare, check, apply, verify, report, revert.

Knows nothing of vLLM, torch or the kernels; standard library only.
"""
