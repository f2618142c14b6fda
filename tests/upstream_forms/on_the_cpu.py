"""A pytest plugin: what vLLM's own CPU worker puts in place of CUDA's functions.

The tests that the upstream forms bring are written for vLLM's suite, on a GPU.
"""

import pytest
import vllm.v1.worker.cpu.shm  # noqa: F401


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu_test: vLLM's own, runs without a GPU")
