"""vLLM's GPU code path on a machine without a GPU: test support, not for serving."""
