"""What compiled kernels ask of sm_80, sm_90 and sm_100, with no such GPU at hand.

Which variants of a kernel exist is not written down here but taken from launches.
Stock's: Model Runner V2 decodes `BATCH` requests over a vocabulary of `VOCABULARY` in
each of hostloop's sampling modes and in those of `MORE_MODES`, on the CPU lane, where
a launch goes as far as the CUDA driver and is dropped there. Ours: every module of
`vllm_ext.kernels` has a function

    warm(max_rows, vocab_size, device)

that launches (or only compiles, by ``kernel.warmup``) each variant that serving can
launch, on memory of its own; the patch that uses the kernel calls the same function
before vLLM captures graphs. Each variant is then compiled for each target with the
options of its launch, ``enable_fp_fusion`` always among them because its default
depends on Triton's version, and its machine code is read (see ``sass.figures`` for
every figure and its unit).

`EXPECTED` holds the figures on record, by version of Triton, origin, kernel and
variant. Registers, spills, stack, shared memory and the sequence of rounding float
instructions must be those on record, and 16-byte loads and stores as many or more.
A kernel of ours may not spill at all; stock's may spill as it does on record.

Limits:

- Facts of the compiler: nothing is run, and nothing is said about speed.
- Blocks and warps per SM are bounds; a grid may be too small to reach them.
- A variant is what Triton made of one launch: types, constants, which arguments are
  divisible by 16. Batches 1 and 16 launch the same ones (seen with vLLM 0.32.0), but
  for top-k and top-p, which have constants that depend on the batch.
- Other vocabularies, drafts, structured outputs, prefill and attention are not looked
  at. Top-k or top-p alone launches other variants of the kernels that are listed for
  both, and, without a seed, FlashInfer where it is installed.
- Into how many parts stock splits a row for top-p depends on the GPU: here on
  `MULTIPROCESSORS`, an H100's or H200's.
- The same sequence of float operations is neither needed nor enough for equal bits:
  parity tests prove those. A change of it says that the compiler fused or ordered
  otherwise than when they were last looked at.
"""

import importlib
import json
import os
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm_ext import jsonfile
from vllm_ext.children import Child, serve
from vllm_ext.hostbench import environment
from vllm_ext.prove import sass
from vllm_ext.prove.verdict import Verdict

EXPECTED = Path(__file__).with_name("resources.json")

ARCHES = tuple(sass.LIMITS)
BATCH = 8
VOCABULARY = 151936  # Qwen2.5 and Qwen3
MULTIPROCESSORS = 132
MORE_MODES: dict[str, dict[str, Any]] = {
    "min-p": {"temperature": 0.8, "min_p": 0.05, "seed": 7},
    "bias": {
        **{"temperature": 0.0, "logit_bias": {5: 1.0}},
        **{"min_tokens": 4000, "stop_token_ids": [9]},
    },
    "bad words": {"temperature": 0.0, "_bad_words_token_ids": [[5, 6]]},
}
WORKERS = 2
TIMEOUT = 900  # seconds, for a cold cache on a busy machine; else it takes one minute
OURS = "vllm_ext"

# Compared with what is on record: the first must be equal, the second no fewer.
EXACT = {
    "registers": "registers",
    "spill_stores": "bytes of spill stores",
    "spill_loads": "bytes of spill loads",
    "stack": "bytes of stack",
    "shared": "bytes of shared memory",
}
AT_LEAST = {"wide_loads": "16-byte loads", "wide_stores": "16-byte stores"}

# Of the caller's environment, only where Triton keeps its cache may matter.
KEPT = ("TRITON_CACHE_DIR", "TRITON_HOME")
DROPPED = ("PTXAS_OPTIONS", "DISABLE_PTXAS_OPT")

HOW_TO_RECORD = "`vllm-ext prove kernels --update` records them"

Say = Callable[[str], None]
Found = dict[str, Any]
Attempt = sass.Compiled | dict[str, str]  # or the ``error``, in one line


# -- what is asked -------------------------------------------------------------------


def verdicts(say: Say, update: bool = False) -> list[Verdict]:
    """One verdict for each variant of each kernel, over all targets.

    Args:
        say: Told what goes on, and with ``update`` what changes on record.
        update: Record what is found, and judge by that.

    Raises:
        CannotRunError: The CPU lane is not installed.
        ChildError: The process that compiles failed.
        CannotWriteError: The record cannot be written.
    """
    if update:
        jsonfile.check(EXPECTED)
    try:
        expected = read()
    except ValueError as error:
        return [_refused(EXPECTED.name, str(error))]
    found = report(say)
    if update:
        for verdict in judge(found, expected):
            if verdict.outcome == "not proven":
                say(f"{verdict.subject}: {verdict.detail}")
        expected = updated(expected, found)
        jsonfile.write(EXPECTED, expected)
    return judge(found, expected)


def report(say: Say, modules: Sequence[str] | None = None, stock: bool = True) -> Found:
    """Every figure of every kernel.

    Args:
        say: Told what goes on.
        modules: Of kernels, to be imported in a new process; each has ``warm``.
            Default: those of `vllm_ext.kernels`.
        stock: Whether to look at stock's kernels.

    Returns:
        ``triton``, its version; ``origins``: `OURS` and "vllm" with its version;
        ``kernels``, one entry per variant: ``kernel``, ``origin``, ``variant`` (its
        arguments and options as text), ``modes`` (where it was launched) and, by
        target, ``figures`` as of ``sass.figures``, or ``error``, one line;
        ``problems``: by module, why nothing is known of its kernels.

    Raises:
        CannotRunError: The CPU lane is not installed.
        ChildError: The process that compiles failed.
    """
    if modules is None:
        modules = own_modules()
    child = Child("vllm_ext.prove.kernels", _environment(), "kernel compiler")
    try:
        say(
            f"launching stock's kernels at batch {BATCH}, vocabulary {VOCABULARY}"
            if stock
            else f"launching kernels of {', '.join(modules)}"
        )
        number = child.ask("launch", TIMEOUT, modules=list(modules), stock=stock)
        say(f"compiling {number} variants for sm_{'/'.join(map(str, ARCHES))}")
        found: Found = child.ask("report", TIMEOUT)
    finally:
        child.close()
    return found


def own_modules() -> list[str]:
    """The modules of `vllm_ext.kernels`, in alphabetical order."""
    from vllm_ext import kernels

    found = pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}.")
    return sorted(module.name for module in found)


def _environment() -> dict[str, str | None]:
    foreign = [
        name
        for name in os.environ
        if name in DROPPED or (name.startswith("TRITON_") and name not in KEPT)
    ]
    return {**dict.fromkeys(foreign), **environment("discard"), "VEXT": "0"}


# -- what is on record ---------------------------------------------------------------


def read() -> dict[str, Any]:
    """The figures on record: Triton's version, origin, kernel, variant, target.

    Raises:
        ValueError: One line: there are none, or they are not what `updated` makes.
    """
    remedy = "restore it, or empty it to `{}` and record anew with --update"
    try:
        expected = json.loads(EXPECTED.read_text())
        for origins in expected.values():
            for kernels in origins.values():
                for variants in kernels.values():
                    for by_arch in variants.values():
                        for figures in by_arch.values():
                            _check(figures)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}; {remedy}") from None
    except (ValueError, AttributeError, LookupError, TypeError):
        raise ValueError(f"does not hold figures of kernels; {remedy}") from None
    return dict(expected)


def recorded() -> str:
    """The figures on record as Markdown, newest Triton, our kernels first.

    Raises:
        ValueError: As of `read`.
    """
    by_version = read()
    version = max(by_version, key=lambda text: [int(n) for n in text.split(".")])
    lines = []
    for origin, kernels in by_version[version].items():
        entries = [
            {"kernel": kernel, "variant": variant, "figures": figures}
            for kernel, variants in kernels.items()
            for variant, figures in variants.items()
        ]
        whose = "Ours" if origin == OURS else f"Stock, {origin}"
        lines += [f"### {whose}, Triton {version}\n", *HEADS]
        for entry, label in zip(entries, _labels(entries), strict=True):
            each = entry["figures"].values()
            cells = [
                _joined(each, lambda one, name=name: one[name])  # type: ignore[misc]
                for name in ("registers", "spill_stores", "shared")
            ]
            wide = _joined(each, lambda one: one["wide_loads"])
            lines.append(f"| `{label}` | {' | '.join(cells)} | {wide} |")
        lines.append("")
    return "\n".join(lines)


HEADS = (
    "| kernel | registers | spilled, bytes | shared memory, bytes | 16-byte loads |",
    "| --- | --- | --- | --- | --- |",
)


def _check(figures: dict[str, Any]) -> None:
    """Raise an error unless these are what `_recorded` returns."""
    numbers = [figures[name] for name in EXACT | AT_LEAST]
    numbers += figures["floats"].values()
    if any(type(each) is not int for each in numbers):
        raise TypeError
    if not isinstance(figures["float_order"], str):
        raise TypeError


def updated(expected: dict[str, Any], found: Found) -> dict[str, Any]:
    """``expected`` with what was found in place of what it holds of these origins."""
    origins = dict(expected.get(found["triton"], {}))
    for origin in found["origins"]:
        kernels: dict[str, Any] = {}
        for entry in found["kernels"]:
            if entry["origin"] == origin:
                kernels.setdefault(entry["kernel"], {})[entry["variant"]] = {
                    arch: _recorded(figures)
                    for arch, figures in entry["figures"].items()
                    if "error" not in figures
                }
        origins[origin] = kernels
    return {**expected, found["triton"]: origins}


def _recorded(figures: dict[str, Any]) -> dict[str, Any]:
    return {
        **{name: figures[name] for name in EXACT},
        "wide_loads": sass.wide(figures["loads"]),
        "wide_stores": sass.wide(figures["stores"]),
        "floats": figures["floats"],
        "float_order": figures["float_order"],
    }


# -- judging -------------------------------------------------------------------------


def judge(found: Found, expected: dict[str, Any]) -> list[Verdict]:
    """What a report says, held against the record.

    Args:
        found: As of `report`.
        expected: As of `read`.
    """
    result = [_refused(module, why) for module, why in found["problems"].items()]
    for origin in found["origins"]:
        entries = [entry for entry in found["kernels"] if entry["origin"] == origin]
        recorded = expected.get(found["triton"], {}).get(origin)
        if recorded is None and entries:
            why = f"no expected values with Triton {found['triton']}; {HOW_TO_RECORD}"
            result.append(Verdict("kernels", origin, "not proven", why))
        whose = "" if origin == OURS else "stock "
        for entry, label in zip(entries, _labels(entries), strict=True):
            subject = f"{whose}{label}"
            problems = list(_broken(entry))
            if recorded is not None:
                problems += _changed(entry, recorded.get(entry["kernel"], {}))
            if problems:
                result.append(_refused(subject, "; ".join(problems)))
            elif recorded is not None:
                summary = _summary(entry["figures"])
                result.append(Verdict("kernels", subject, "proven on CPU", summary))
        launched = {(entry["kernel"], entry["variant"]) for entry in entries}
        result += [
            _refused(f"{whose}{_name(kernel)}", f"no longer launched: {variant}")
            for kernel, variants in (recorded or {}).items()
            for variant in variants
            if (kernel, variant) not in launched
        ]
    return result


def _refused(subject: str, why: str) -> Verdict:
    return Verdict("kernels", subject, "not proven", why, fault=True)


def _broken(entry: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a kernel whatever the record says."""
    compiled = {}
    for arch, figures in entry["figures"].items():
        if "error" in figures:
            yield f"does not compile for sm_{arch}: {figures['error']}"
            continue
        compiled[arch] = figures
        if not figures["blocks_per_sm"]:
            yield f"does not fit on sm_{arch}: too much of {figures['limited_by']}"
    if entry["origin"] == OURS and any(f["spill_stores"] for f in compiled.values()):
        spills = _joined(compiled.values(), lambda one: one["spill_stores"])
        yield f"spills {spills} bytes per thread on sm_{'/'.join(compiled)}"


def _changed(entry: dict[str, Any], variants: dict[str, Any]) -> Iterator[str]:
    """How a kernel differs from what is on record, ``old -> new``."""
    recorded = variants.get(entry["variant"])
    if recorded is None:
        known = (_difference(old, entry["variant"]) for old in variants)
        nearest = min(known, key=lambda changes: len(changes), default=())
        what = (
            f"launched with {', '.join(nearest)}" if nearest else "no expected values"
        )
        yield f"{what}; {HOW_TO_RECORD}"
        return
    for arch, figures in entry["figures"].items():
        if "error" in figures:
            continue
        if arch not in recorded:
            yield f"no expected values for sm_{arch}; {HOW_TO_RECORD}"
            continue
        changed = _differences(recorded[arch], _recorded(figures))
        if changed:
            yield f"sm_{arch}: {', '.join(changed)}"


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    changes = [
        f"{name} {old[key]} -> {new[key]}"
        for key, name in (EXACT | AT_LEAST).items()
        if new[key] < old[key] or (key in EXACT and new[key] != old[key])
    ]
    floats = [
        f"{opcode} {old['floats'].get(opcode, 0)} -> {new['floats'].get(opcode, 0)}"
        for opcode in sorted({*old["floats"], *new["floats"]})
        if old["floats"].get(opcode) != new["floats"].get(opcode)
    ]
    if not floats and old["float_order"] != new["float_order"]:
        floats = ["another order of float operations"]
    return changes + floats


def _difference(old: str, new: str) -> tuple[str, ...]:
    """What of a variant is another: ``argument old -> new``."""
    before, after = _arguments(old), _arguments(new)
    return tuple(
        f"{name} {before.get(name, '(not given)')} -> {after.get(name, '(not given)')}"
        for name in dict.fromkeys((*before, *after))
        if before.get(name) != after.get(name)
    )


def _arguments(variant: str) -> dict[str, str]:
    pairs = (part.partition(" ") for part in variant.split("; "))
    return {name: value for name, _, value in pairs}


def _labels(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Names of kernels; of several variants, with the arguments that differ."""
    result = []
    for entry in entries:
        others = [
            each["variant"] for each in entries if each["kernel"] == entry["kernel"]
        ]
        mine = _arguments(entry["variant"])
        differing = [
            f"{name} {value}"
            for name, value in mine.items()
            if any(_arguments(other).get(name) != value for other in others)
        ]
        name = _name(entry["kernel"])
        result.append(f"{name} ({', '.join(differing)})" if differing else name)
    return result


def _name(kernel: str) -> str:
    return kernel.rpartition(":")[2]


def _summary(figures: dict[str, dict[str, Any]]) -> str:
    """All targets in one line, numbers that differ as ``38/39/38``."""
    each = figures.values()
    spills = _joined(each, lambda one: one["spill_stores"])
    loads = _joined(each, lambda one: sass.wide(one["loads"]))
    stores = _joined(each, lambda one: sass.wide(one["stores"]))
    return ", ".join(
        (
            f"sm_{'/'.join(figures)}: {_joined(each, lambda one: one['registers'])} "
            "registers",
            "no spills" if spills == "0" else f"spills {spills} B",
            f"{_joined(each, lambda one: one['shared'])} B shared",
            f"16-byte loads {loads} of {_joined(each, lambda one: _all(one['loads']))}",
            f"stores {stores} of {_joined(each, lambda one: _all(one['stores']))}",
            f"{_joined(each, lambda one: one['warps_per_sm'])} of 64 warps",
        )
    )


def _all(by_width: dict[str, int]) -> int:
    return sum(by_width.values())


def _joined(
    figures: Iterable[dict[str, Any]], value: Callable[[dict[str, Any]], Any]
) -> str:
    values = [str(value(each)) for each in figures]
    return values[0] if len({*values}) == 1 else "/".join(values)


HEAD = (
    f"{'':<42}{'sm':>4}{'regs':>6}{'spill':>6}{'shared':>8}{'loads':>9}{'stores':>9}"
    f"{'bar':>5}{'code':>8}{'warps':>6}"
)
LEGEND = (
    "spill, shared, code: bytes, the first per thread; loads, stores: of global",
    "memory, those of 16 bytes per thread / all; bar: barriers; warps: that one SM of",
    "64 could hold. Facts of the compiler, not of a run.",
)


def table(found: Found) -> str:
    """A report for a terminal, our kernels first."""
    lines = [f"Triton {found['triton']}", *LEGEND]
    for origin in found["origins"]:
        entries = [entry for entry in found["kernels"] if entry["origin"] == origin]
        head = f"{origin}{HEAD[len(origin) :]}" if entries else f"{origin}: no kernels"
        lines += ["", head]
        for entry, label in zip(entries, _labels(entries), strict=True):
            name, _, variant = label.partition(" ")
            titles = [name, f"  {variant}"] if variant else [name]
            for arch, figures in entry["figures"].items():
                title = titles.pop(0) if titles else ""
                if len(title) > 41:
                    lines.append(title)
                    title = ""
                lines.append(f"{title:<42}{arch:>4}{_cells(figures)}")
    lines += [f"{module}: {why}" for module, why in found["problems"].items()]
    return "\n".join(lines)


def _cells(figures: dict[str, Any]) -> str:
    if "error" in figures:
        return f"  does not compile: {figures['error']}"
    loads, stores = figures["loads"], figures["stores"]
    return (
        f"{figures['registers']:>6}{figures['spill_stores']:>6}{figures['shared']:>8}"
        f"{f'{sass.wide(loads)}/{_all(loads)}':>9}"
        f"{f'{sass.wide(stores)}/{_all(stores)}':>9}"
        f"{figures['barriers']:>5}{figures['code']:>8}{figures['warps_per_sm']:>6}"
    )


# -- the process that compiles -------------------------------------------------------


def main() -> None:
    """Serve: ``launch`` what `report` names, then ``report`` what became of it."""
    launches = _Launches()

    def launch(modules: list[str], stock: bool) -> int:
        from vllm_ext_cpulane import discard

        discard.install()
        with launches.watched():
            if stock:
                _launch_stock(launches)
            for module in modules:
                _launch_own(launches, module)
        return len(launches.seen)

    serve({"launch": launch, "report": launches.report})


@dataclass
class _Variant:
    kernel: str
    origin: str
    variant: str
    modes: list[str]
    compiled: dict[int, "Future[Attempt]"]  # by target


class _Launches:
    """Variants that were launched; each is compiled from when it is first seen."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, str, str], _Variant] = {}
        self.origins = [OURS]
        self.problems: dict[str, str] = {}
        self._noting: tuple[str, str] | None = None
        self._pool = ThreadPoolExecutor(WORKERS)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """See every launch of a Triton kernel from here on."""
        from triton.runtime.jit import JITFunction

        stock = JITFunction.run

        def run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            compiled = stock(kernel, *args, **kwargs)
            if self._noting:
                known = {*kernel.arg_names, "grid", "warmup"}
                options = {k: v for k, v in kwargs.items() if k not in known}
                self._note(*self._noting, compiled, options)
            return compiled

        JITFunction.run = run
        try:
            yield
        finally:
            JITFunction.run = stock

    @contextmanager
    def noted(self, origin: str, mode: str) -> Iterator[None]:
        """Take what is launched meanwhile for a variant of serving's."""
        self._noting = (origin, mode)
        try:
            yield
        finally:
            self._noting = None

    def _note(
        self, origin: str, mode: str, compiled: Any, options: dict[str, Any]
    ) -> None:
        source = compiled.src
        options["enable_fp_fusion"] = compiled.metadata.enable_fp_fusion
        kernel = f"{source.fn.module}:{source.fn.__name__}"
        name = (origin, kernel, _described(source, options))
        if name not in self.seen:
            jobs = {
                arch: self._pool.submit(_compiled, source, options, arch)
                for arch in ARCHES
            }
            self.seen[name] = _Variant(kernel, origin, name[2], [], jobs)
        modes = self.seen[name].modes
        if mode not in modes:
            modes.append(mode)

    def report(self) -> Found:
        """What `report` returns; waits for what is still being compiled."""
        import triton

        seen = [self.seen[name] for name in sorted(self.seen)]
        outcomes = [[each.compiled[arch].result() for each in seen] for arch in ARCHES]
        figures = list(self._pool.map(_figures, outcomes, ARCHES))
        return {
            "triton": triton.__version__,
            "origins": self.origins,
            "kernels": [
                {
                    **{"kernel": each.kernel, "origin": each.origin},
                    **{"variant": each.variant, "modes": each.modes},
                    "figures": dict(zip(map(str, ARCHES), of_arches, strict=True)),
                }
                for each, *of_arches in zip(seen, *figures, strict=True)
            ],
            "problems": self.problems,
        }


def _described(source: Any, options: dict[str, Any]) -> str:
    """Name and type of each argument, ``:16`` if divisible; or its constant value."""
    parts = [[name, str(kind)] for name, kind in source.signature.items()]
    for (index, *within), value in source.constants.items():
        text = str(getattr(value, "__name__", value))
        if within:  # of a tuple
            parts[index].append(f"{within} {text}")
        else:
            parts[index][1] = text
    for (index, *within), attributes in source.attrs.items():
        if ["tt.divisibility", 16] in attributes:
            parts[index].append(f"{within}:16" if within else ":16")
    arguments = [f"{name} {''.join(rest)}" for name, *rest in parts]
    return "; ".join(arguments + [f"{k} {v}" for k, v in sorted(options.items())])


def _compiled(source: Any, options: dict[str, Any], arch: int) -> Attempt:
    """For one target."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", arch, sass.WARP)
    try:
        compiled = triton.compile(source, target=target, options=options)
    except Exception as error:
        return {"error": _reason(error)}
    metadata = compiled.metadata
    return sass.Compiled(compiled.asm["cubin"], metadata.num_warps, metadata.shared)


def _figures(outcomes: Sequence[Attempt], arch: int) -> list[dict[str, Any]]:
    """Of each kernel that was compiled; in place of the others, the error."""
    compiled = [each for each in outcomes if isinstance(each, sass.Compiled)]
    figures = iter(sass.figures(compiled, arch))
    return [
        next(figures) if isinstance(each, sass.Compiled) else each for each in outcomes
    ]


def _reason(error: BaseException) -> str:
    """The first line of the error that began it; Triton's own quote source first."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = getattr(error, "error_message", None) or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _launch_own(launches: _Launches, name: str) -> None:
    import torch

    try:
        module = importlib.import_module(name)
        if not hasattr(module, "warm"):
            raise AttributeError(
                "has no warm(max_rows, vocab_size, device) that launches its variants"
            )
        with launches.noted(OURS, name):
            module.warm(BATCH, VOCABULARY, torch.device("cpu"))
    except Exception as error:
        launches.problems[name] = _reason(error)


def _launch_stock(launches: _Launches) -> None:
    import vllm

    from vllm_ext import gpupath, hostloop

    origin = f"vllm {vllm.__version__.partition('+')[0]}"
    launches.origins.append(origin)
    # The engine of `bench host`, with the one size that its kernels depend on.
    hostloop.VOCABULARY = VOCABULARY
    hostloop.MODES.update(MORE_MODES)
    cores = os.sched_getaffinity(0)
    loop = hostloop.HostLoop()
    os.sched_setaffinity(0, cores)  # vLLM binds this thread, and so the pool's, to one
    _filter_as_on_cuda()
    for mode in hostloop.MODES:
        loop.start(BATCH, mode)
        with launches.noted(origin, mode):
            loop.count(gpupath.BLOCK_SIZE)  # each request is given a block once


def _filter_as_on_cuda() -> None:
    """Undo what vLLM's top-k and top-p do otherwise for tensors of a CPU.

    It is the only place on the way whose launches depend on the device.
    """
    import torch
    from vllm.v1.sample.ops import topk_topp_sampler, topk_topp_triton

    class OnCuda(torch.Tensor):  # type: ignore[misc]
        device = property(lambda tensor: torch.device("cuda", 0))

    stock = topk_topp_sampler.apply_top_k_top_p_triton

    def apply(logits: torch.Tensor, *args: Any) -> torch.Tensor:
        return stock(logits.as_subclass(OnCuda), *args).as_subclass(torch.Tensor)

    topk_topp_sampler.apply_top_k_top_p_triton = apply
    topk_topp_triton.current_platform = SimpleNamespace(is_cuda_alike=lambda: True)
    topk_topp_triton.num_compute_units = lambda device=None: MULTIPROCESSORS


if __name__ == "__main__":
    main()
