"""One engine under churn: the child of ``vllm-ext soak engine``.

Real vLLM on the CPU with a tiny model, whose forward pass costs less than the engine
around it. Requests of random lengths keep all seats taken until the last have come,
some are aborted; then the engine is empty, and has to be as it was before.

``boot(seats)``           build it
``block(seed, requests)``  let requests come and go; what that took and left behind
``patches()``             what became of each patch in this process
"""

import gc
import hashlib
import random
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from vllm_ext.children import serve
from vllm_ext.hostloop import patches

LENGTH = 256
PREFIXES = 8  # that a third of the requests share
SHARED = 64  # tokens of one: two blocks


def main() -> None:
    """Serve questions about one engine, built with the first of them."""
    engine: Any = None

    def boot(seats: int) -> dict[str, Any]:
        nonlocal engine
        engine = Engine(seats)
        return {"scheduler": type(engine.scheduler).__name__}

    serve(
        {
            "boot": boot,
            "block": lambda **details: engine.block(**details),
            "patches": patches,
        }
    )


class Engine:
    """An ``LLMEngine`` in this process, with all that it may leak within reach."""

    def __init__(self, seats: int) -> None:
        from vllm import LLM

        from vllm_ext_cpulane.tinymodel import write_model

        self.seats = seats
        with tempfile.TemporaryDirectory(prefix="vllm-ext-soak-") as folder:
            self.engine: Any = LLM(
                model=str(
                    write_model(folder, 256, layers=1, max_length=LENGTH, weights=True)
                ),
                skip_tokenizer_init=True,
                max_model_len=LENGTH,
                max_num_seqs=seats,
                max_num_batched_tokens=2048,
                block_size=32,
                # Less than all seats may come to need, so that some are preempted.
                num_gpu_blocks_override=5 * seats,
                kv_cache_memory_bytes=64 * 2**20,
                dtype="float32",
                enforce_eager=True,
                disable_log_stats=False,
                seed=0,
            ).llm_engine
        self.core = self.engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self._blocks = 0

    def block(self, seed: int, requests: int) -> dict[str, Any]:
        """``requests`` that come and go.

        Returns:
            ``tokens`` made in ``seconds`` of this thread's processor time, ``wall``
            seconds and ``steps``; ``answers``, a digest of names, tokens and reasons;
            ``left``: what an empty engine holds, by name; ``objects`` that Python
            tracks; ``rss``: bytes resident.
        """
        from vllm import SamplingParams

        self._blocks += 1
        choose = random.Random(seed)
        shared = [_prompt(choose, SHARED) for _ in range(PREFIXES)]
        digest = hashlib.sha256()
        tokens = steps = added = 0
        running: set[str] = set()
        before, wall = time.thread_time(), time.monotonic()
        while added < requests or running:
            while added < requests and len(running) < self.seats:
                name = f"{self._blocks}-{added}"
                prompt = [
                    choose.randrange(4, 250) for _ in range(choose.randint(1, 40))
                ]
                if choose.random() < 1 / 3:
                    prompt = choose.choice(shared) + prompt
                params = SamplingParams(
                    max_tokens=choose.choice((8, 64, 64, 120, 150)),
                    stop_token_ids=choose.sample(range(4, 250), 1),
                    temperature=0.0,
                    ignore_eos=True,
                    detokenize=False,
                )
                self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
                running.add(name)
                added += 1
            if choose.random() < 0.02 and running:
                name = choose.choice(sorted(running))
                self.engine.abort_request([name])
                running.discard(name)
            for answer in self.engine.step():
                if answer.finished:
                    [made] = answer.outputs
                    said = f"{answer.request_id} {made.token_ids} {made.finish_reason}"
                    digest.update(said.encode())
                    tokens += len(made.token_ids)
                    running.discard(answer.request_id)
            steps += 1
        while self.scheduler.has_requests():
            self.engine.step()
        taken = time.thread_time() - before
        return {
            "tokens": tokens,
            "seconds": taken,
            "wall": time.monotonic() - wall,
            "steps": steps,
            "answers": digest.hexdigest(),
            "left": self._left(),
            "objects": _objects(),
            "rss": _resident(),
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }

    def _left(self) -> dict[str, int]:
        """Sizes of everything that an empty engine should have emptied."""
        manager = self.scheduler.kv_cache_manager
        pool = manager.block_pool
        [group] = manager.coordinator.single_type_managers
        left = {
            "blocks in use": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
            "blocks referenced": sum(
                block.ref_cnt > 0 for block in pool.blocks if not block.is_null
            ),
            "requests with blocks": len(group.req_to_blocks),
            "requests with cached blocks": len(group.num_cached_block),
            "requests": len(self.scheduler.requests),
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "requests of the frontend": len(
                self.engine.output_processor.request_states
            ),
        }
        kept = vars(self.scheduler).get("_vext_roster")
        left["requests kept by the patch"] = len(kept.requests) if kept else 0
        return left


def _prompt(choose: random.Random, length: int) -> list[int]:
    return [choose.randrange(4, 250) for _ in range(length)]


def _objects() -> int:
    gc.collect()
    return len(gc.get_objects())


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
