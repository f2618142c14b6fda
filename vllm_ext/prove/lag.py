"""The same tokens on a device that is as far behind the host as code lets it be.

With asynchronous scheduling the host prepares a step while the device still works on
the one before. Memory that both use, a staging buffer written again too early, a
result read before its event, goes wrong on a GPU when it lags enough, which is rare
in a test and not in production. A `PretendDevice` that lags runs nothing until the
host waits for it; what then differs from a device that keeps up is such a bug.

`decode` runs the requests of `vllm_ext.tokenrun` through a real engine on the pretend
device, CUDA graphs included, which are captured and replayed by the emulator.

Limits: those of `vllm_ext.prove.pretend`; Model Runner V2 only; one order of lagging,
the longest; a wait that is longer than needed is no fault here.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from vllm_ext import demo, hostbench, hostloop, tokenrun
from vllm_ext.children import Child, ChildError, serve
from vllm_ext.patches import SERIES
from vllm_ext.prove.verdict import Verdict, failed


def verdicts(say: Callable[[str], None]) -> list[Verdict]:
    """Stock on a device that keeps up against all patches on one that lags.

    Args:
        say: Told what is going on.

    Returns:
        One for each patch that these steps use, or one for all of them, if their
        engine failed; one for stock, if tokens differ.

    Raises:
        hostbench.CannotRunError: There is no CPU lane here.
        ChildError: The engine on a device that keeps up failed.
    """
    say("lag: stock on a device that keeps up, patched on one that lags")
    names = ",".join(patch.name for patch in SERIES)
    with ExitStack() as stack:
        stock = _start(stack, {"VEXT": "0"}, lags=False)
        patched = _start(stack, {"VEXT": "1", "VEXT_PATCHES": names}, lags=True)
        expected = stock.hear()
        try:
            found = patched.hear()
            states = {each["name"]: each for each in patched.ask("patches")}
        except ChildError as error:
            return [failed("lag", "all patches", error)]
        difference = demo.difference(expected, found)
        answers = []
        if difference["different"]:
            say("lag: tokens differ; looking whether stock's do, too")
            try:
                lagging = _start(stack, {"VEXT": "0"}, lags=True).hear()
                answers.append(judge("stock", demo.difference(expected, lagging)))
            except ChildError as error:
                answers.append(failed("lag", "stock", error))
    used = [patch.name for patch in SERIES if states[patch.name]["state"] == "in use"]
    return [*answers, *(judge(name, difference) for name in used)]


def judge(subject: str, difference: dict[str, Any]) -> Verdict:
    """The verdict on a `demo.difference`."""
    if difference["different"]:
        first = difference["first"]
        detail = (
            f"{difference['different']} of {difference['compared']} tokens differ on a "
            f"device that lags; first: request `{first['request']}`, position "
            f"{first['position']}, {first['what']}: {first['stock']}, on the one that "
            f"lags {first['patched']}"
        )
        return Verdict("lag", subject, "not proven", detail, fault=True)
    detail = f"{difference['compared']} tokens are stock's, on a device that lags"
    return Verdict("lag", subject, "proven on CPU", detail)


def _start(stack: ExitStack, settings: dict[str, str | None], lags: bool) -> Child:
    environment = {**hostbench.environment("interpret"), **settings}
    environment["VLLM_CPU_KVCACHE_SPACE"] = None  # the engine's own setting decides
    how = "lagging" if lags else "prompt"
    child = Child("vllm_ext.prove.lag", environment, f"engine on a {how} device")
    stack.callback(child.close)
    child.tell("decode", lags=lags)
    return child


# -- in the child ------------------------------------------------------------------


def main() -> None:
    """Serve ``decode(lags)`` and ``patches()``."""
    serve({"decode": decode, "patches": hostloop.patches})


def decode(lags: bool) -> dict[str, Any]:
    """What `tokenrun.REQUESTS` are given by an engine on the pretend device.

    Returns:
        By request: tokens, logprobs, reason; see `tokenrun.decode`.
    """
    from vllm_ext.prove.engine import booted
    from vllm_ext.prove.pretend import PretendDevice

    with PretendDevice(lags=lags) as device, booted(device) as llm:
        answers, _ = tokenrun.run(llm.llm_engine)
        return answers


if __name__ == "__main__":
    main()
