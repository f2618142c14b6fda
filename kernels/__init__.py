"""Triton kernels of the decode path. They import neither vLLM nor patches."""
