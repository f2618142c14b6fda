"""The decode path of a GPU, on vLLM's CPU platform.

That platform turns off what is the default on CUDA: asynchronous scheduling, CUDA
graphs for decode steps, Triton's attention. `enable` turns it on again before an
engine is built. What then happens in a graph's place is up to the caller, which gives
the engine a `capture` of its own: `graphs_that_replay` runs the captured forward pass
again, over the buffers that capture saw, as a graph would.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

BLOCK_SIZE = 16
"""Tokens per block of the KV cache: what vLLM's CUDA backends take by default."""


def enable(graph_sizes: Sequence[int]) -> None:
    """Let engines built in this process decode as they would on CUDA.

    Args:
        graph_sizes: Batch sizes with a graph, in ascending order.
    """
    import torch
    from vllm.config.compilation import CUDAGraphMode
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    stock = CpuPlatform.check_and_update_config

    def check_and_update_config(cls: type, config: Any) -> None:
        stock(config)
        config.scheduler_config.async_scheduling = True
        compilation = config.compilation_config
        compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        compilation.cudagraph_capture_sizes = list(graph_sizes)
        compilation.max_cudagraph_capture_size = graph_sizes[-1]

    def get_attn_backend_cls(cls: type, *args: Any, **kwargs: Any) -> str:
        path: str = AttentionBackendEnum.TRITON_ATTN.get_path()
        return path

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    CpuPlatform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
    CpuPlatform.get_global_graph_pool = classmethod(lambda cls: (0, 0))
    torch.cuda.get_device_capability = lambda device=None: (9, 0)


class Graph:
    """Stands for a ``torch.cuda.CUDAGraph`` whose replay is a call.

    Args:
        replay: The call.
    """

    def __init__(self, replay: Callable[[], None]) -> None:
        self.replay = replay


def graphs_that_replay(runner: Any) -> dict[str, int]:
    """Capture the graphs of a model ``runner`` as forward passes to be run again.

    vLLM's own capture prepares what a graph would see: input buffers, and attention
    metadata made of buffers that outlive the step.

    Returns:
        ``{"replays": number}``, which goes on counting.
    """
    import torch
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
    from vllm.v1.worker.workspace import init_workspace_manager

    count = {"replays": 0}

    def capture(
        self: Any, create_forward_fn: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> None:
        for described in self._capture_descs[CUDAGraphMode.FULL]:  # largest first
            forward = create_forward_fn(described, warmup=False)

            def replay(forward: Callable[..., None] = forward) -> None:
                count["replays"] += 1
                forward(CUDAGraphMode.NONE)

            if not self.graphs:
                forward(CUDAGraphMode.NONE)  # makes the buffer of hidden states
            self.graphs[described] = Graph(replay)
        self._graphs_captured = True

    stock, CudaGraphManager.capture = CudaGraphManager.capture, capture
    try:
        init_workspace_manager(torch.device("cpu"))
        with _recorded(runner, lambda work: work):
            runner.capture_model()
    finally:
        CudaGraphManager.capture = stock
    return count


def step_graphs(
    runner: Any, replay: Callable[[Callable[[], None]], Callable[[], None]]
) -> None:
    """Let a ``runner`` of the patch step_graph capture its own graphs.

    Args:
        runner: Its other graphs have been captured.
        replay: Given what a graph holds, returns what its replay is to call.
    """
    with _recorded(runner, replay):
        runner.capture_step_graph()


@contextmanager
def _recorded(
    runner: Any, replay: Callable[[Callable[[], None]], Callable[[], None]]
) -> Iterator[None]:
    if not hasattr(runner, "capture_step_graph"):  # the patch is not applied
        yield
        return
    from vllm_ext.patches.step_graph import graphs

    def record(work: Callable[[], None], pool: Any, vllm_config: Any) -> Any:
        return Graph(replay(work))

    stock, graphs.record = graphs.record, record
    try:
        yield
    finally:
        graphs.record = stock
