"""Stands in for `vllm_ext.bench.enginerun`: no engine, and timings of our choice.

An arm's ``arguments`` say how it behaves:

``slow``     its time per token, as a multiple
``noise``    standard deviation of its blocks, as a share (0.01)
``draw``     whose noise it has: arms with the same draw the same
``works``    if true, its timings are of real work on the CPU
``wrong_in`` the seed of the block in which its tokens are wrong
``fails_in`` the seed of the block in which its process ends
``boots``    if false, it cannot be built
``patches``  what it says of its patches
``patches_in`` how many seconds it takes to say so
``says``     what it says of itself that is not so
"""

import os
import random
import time

from vllm_ext.children import serve

SECONDS = 2e-3  # per token
REQUESTS = 9  # timings of which a block's is the median, when work is timed


def main():
    asked = {}
    settings = {"slow": 1.0, "noise": 0.01}

    def boot(model, arguments, form, seats, length, cpu):
        os.sched_setaffinity(0, {cpu})
        settings.update(arguments)
        if settings.get("boots") is False:
            raise ValueError("no such attention backend")
        old = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "0"
        return {
            **{"device": "CPU", "graphs": "FULL", "form": form, "boot_s": 0.1},
            "async_scheduling": settings.get("async_scheduling", True),
            "runner": "V1" if old else "V2",
            **settings.get("says", {}),
        }

    def closed(batch, sampling, prompt, output, seed):
        if settings.get("fails_in") == seed:
            raise SystemExit(3)
        tokens = [
            [(7 * at + i + seed) % 97 for at in range(output)] for i in range(batch)
        ]
        if settings.get("wrong_in") == seed:
            tokens[-1][2] += 1
        started = time.monotonic()
        moment = random.Random(f"moment {seed}").lognormvariate(0, 0.1)
        draw = random.Random(f"{settings.get('draw')} {seed}")
        tpot = SECONDS * moment * settings["slow"]
        tpot *= draw.lognormvariate(0, settings["noise"])
        each = [tpot] * batch
        if settings.get("works"):
            each = [worked(settings["slow"]) for _ in range(REQUESTS)]
        return {
            "start": started,
            "end": started + output * tpot,
            "generated": batch * output,
            "ttft": [5 * tpot] * batch,
            "tpot": each,
            "itl": [tpot] * (batch * (output - 1)),
            "host": [tpot / 2] * output,
            "tokens": tokens,
        }

    def arrivals(rate, requests, **details):
        return closed(requests, **details)

    def trace(batch, sampling, prompt, steps):
        kinds = {"triton": 7, "aten": 11, "h2d": 2, "d2h": 2, "graph": 1}
        return {
            **{"steps": steps, "submissions": kinds, "waits": None, "busy_us": None},
            "why": "there is no device",
        }

    def patches():
        time.sleep(settings.get("patches_in", 0))
        return settings.get("patches", [])

    asked |= {"boot": boot, "closed": closed, "arrivals": arrivals}
    serve(asked | {"trace": trace, "patches": patches})


def worked(slow):
    """CPU seconds of a loop, ``slow`` times as long; the least disturbed of a few."""
    seconds = []
    for _ in range(7):
        started = time.thread_time()
        total = 0
        for at in range(int(5_000 * slow)):
            total += at & 3
        seconds.append(time.thread_time() - started)
    return min(seconds)


if __name__ == "__main__":
    main()
