"""``vllm-ext soak``: long runs that look for what a short test cannot see."""
