"""What is compiled while decoding, after everything has been seen once.

Triton compiles a kernel again for every new type, constant, and class of integer
(one, a multiple of 16, neither): in the middle of serving that is a pause of up to
seconds. `Compiles` lists each compilation inside it:

    with Compiles() as compiled:
        step()
    assert not compiled.names

`verdicts` runs vLLM's engine core on the CPU lane, where kernels go through Triton's
whole launch path, compiler included, and are discarded at the driver (see
`vllm_ext.hostloop`). Every batch size meets every way of sampling; then all of it
comes again, and nothing may be compiled.

Limits: torch compiles nothing on the lane, so a recompilation of ``torch.compile`` is
not seen, nor are FlashInfer's and other compilers; batch sizes are a sample. On a GPU
vLLM sees them all: serve with ``--jit-monitor-mode=error``.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from unittest import mock

from vllm_ext import hostbench
from vllm_ext.children import Child, ChildError, serve
from vllm_ext.patches import SERIES
from vllm_ext.prove.verdict import Verdict, failed

if TYPE_CHECKING:
    from vllm_ext.hostloop import HostLoop

# On either side of what changes a kernel's constants, and sizes without a graph.
BATCHES = (1, 3, 16, 40)
STEPS = 20  # more than a block of the KV cache holds, so that blocks are appended


class Compiles:
    """Lists what Triton compiles; in use inside ``with``.

    Attributes:
        names: Kernels, in the order in which they were compiled. One that Triton's
            disk cache held counts too: another machine would have to compile it.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._undo = ExitStack()

    def __enter__(self) -> "Compiles":
        from triton import knobs

        stock = knobs.runtime.jit_post_compile_hook

        def compiled(**details: Any) -> Any:
            self.names.append(details["fn"].name)
            return stock(**details) if stock is not None else None

        self._undo.enter_context(
            mock.patch.object(knobs.runtime, "jit_post_compile_hook", compiled)
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()


def verdicts(say: Callable[[str], None]) -> list[Verdict]:
    """Decode with a stock and a patched engine, and look for compilations.

    Args:
        say: Told what is going on.

    Returns:
        One for stock, and one for each patch; or one for all of them, if the engine
        that has them failed.

    Raises:
        hostbench.CannotRunError: There is no CPU lane here.
        ChildError: The stock engine failed.
    """
    names = ",".join(patch.name for patch in SERIES)
    with ExitStack() as stack:
        stock = _start(stack, 0, "stock", {"VEXT": "0"})
        patched = _start(stack, 1, "patched", _patched(names))
        say("compiles: two engines meet every batch size and way of sampling, twice")
        found, _ = _answers(stock)
        answers = [judge("stock", found)]
        try:
            found, listed = _answers(patched)
        except ChildError as error:
            return [*answers, failed("compiles", "all patches", error)]
    states = {each["name"]: each for each in listed}
    for patch in SERIES:
        state = states[patch.name]
        if state["state"] != "in use":
            detail = state["reason"] or "these steps do not call it"
            detail = f"{state['state']}: {detail}"
            answers.append(Verdict("compiles", patch.name, "not proven", detail))
        else:
            answers.append(judge(patch.name, found))
    return answers


def judge(subject: str, found: dict[str, Any]) -> Verdict:
    """The verdict on a `sweep`'s answer."""
    if found["again"]:
        names = ", ".join(dict.fromkeys(found["again"]))
        detail = f"compiled while decoding, after warm-up: {names}"
        return Verdict("compiles", subject, "not proven", detail, fault=True)
    detail = (
        f"nothing compiled in {found['steps']} steady steps; "
        f"{len(found['first'])} kernels in the warm-up before"
    )
    return Verdict("compiles", subject, "proven on CPU", detail)


def _patched(names: str) -> dict[str, str | None]:
    return {"VEXT": "1", "VEXT_PATCHES": names, "VEXT_STRICT": "0"}


def _start(
    stack: ExitStack, number: int, name: str, settings: dict[str, str | None]
) -> Child:
    """An engine on a core of its own that decodes; closed with ``stack``."""
    environment = {**hostbench.environment("discard"), **settings}
    cores = sorted(os.sched_getaffinity(0))
    child = Child("vllm_ext.prove.compiles", environment, f"{name} engine")
    stack.callback(child.close)
    child.tell("boot", cpu=cores[number % len(cores)])
    child.tell("sweep")
    child.tell("patches")
    return child


def _answers(engine: Child) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What its `sweep` found, and its patches."""
    engine.hear()  # it has booted
    return engine.hear(), engine.hear()


# -- in the child ------------------------------------------------------------------


def main() -> None:
    """Serve ``boot(cpu)``, ``sweep()`` and ``patches()``."""
    from vllm_ext import hostloop

    loops: list[HostLoop] = []

    def boot(cpu: int) -> None:
        loops.append(hostloop.HostLoop())
        os.sched_setaffinity(0, {cpu})

    serve(
        {
            "boot": boot,
            "sweep": lambda: sweep(loops[0]),
            "patches": hostloop.patches,
        }
    )


def sweep(loop: "HostLoop", batches: Sequence[int] = BATCHES) -> dict[str, Any]:
    """Decode in every way, twice.

    Returns:
        ``first``: kernels compiled in the first round; ``again``: in the second;
        ``steps``: of the second round.
    """
    from vllm_ext.hostloop import MODES

    rounds: list[list[str]] = []
    for _ in range(2):
        with Compiles() as compiled:
            for batch in batches:
                for mode in MODES:
                    loop.start(batch, mode)
                    loop.decode(STEPS)
        rounds.append(compiled.names)
    steps = STEPS * len(batches) * len(MODES)
    return {"first": rounds[0], "again": rounds[1], "steps": steps}


if __name__ == "__main__":
    main()
