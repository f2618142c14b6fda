"""``vllm-ext bench``: engines and kernels, stock against patched, with the evidence."""
