"""``vllm-ext soak``: what only a long run shows of the scheduler's fast path."""
