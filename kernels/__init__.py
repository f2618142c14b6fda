"""Triton kernels of the decode path; none yet. They import neither vLLM nor patches."""
