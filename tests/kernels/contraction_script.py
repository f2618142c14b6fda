"""Run in a process of the lane that compiles: float operations by source line.

See test_contraction.py. An argument names a bug to plant, of `BUGS`; then only the
kernel that has it is compiled beside vLLM's, and only for sm_90.
"""

import os
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

# Nothing of this is machine code, so nobody else may find it in the cache.
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()

import torch

from vllm_ext_cpulane import discard
from vllm_ext_cpulane.engine import report

discard.install()

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import CUDABackend  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402
from vllm.v1.worker.gpu.sample import gumbel, min_p, penalties  # noqa: E402

from vllm_ext.kernels import sample, top_k_top_p  # noqa: E402

VOCABULARY = 1024
# GPU, and whether products and sums may be fused. Without that no GPU has a say.
CASES = [(80, True), (90, True), (100, True), (90, False)]
# A pair of numbers at a time is what one at a time is; a sign costs no rounding.
FLOAT = re.compile(r"^\s*((?:fma|mul|add|sub|div)\.[a-z.]*f32)(?:x2)?\s(.*);")
CONSTANT = re.compile(r"^\s*mov\.b32\s+(%r\d+), (0[xf][0-9A-Fa-f]{8});")
PAIR = re.compile(r"^\s*mov\.b64\s+(%rd\d+), {(%r\d+), (%r\d+)};")
OPERAND = re.compile(r"%rd\d+|0f[0-9A-F]{8}")

# Each gives the compiler a chance that stock's kernels do not give it.
BUGS = {
    # One block for both products: the first is fused with the subtraction.
    "no branch": ("    if repetition != 1.0:\n", "    if True:\n"),
    "a product for a quotient": ("x = x / temperature", "x = x * (1 / temperature)"),
}


def operations(ptx: str) -> dict[str, list[str]]:
    """By source text: each kind of float operation, with its constants."""
    files = dict(re.findall(r'\.file\s+(\d+) "([^"]+)"', ptx))
    texts = {
        number: Path(path).read_text().split("\n") for number, path in files.items()
    }
    found = defaultdict(set)
    source = ""
    constants: dict[str, str] = {}  # in registers
    pairs: dict[str, str] = {}  # in registers, the same twice
    for line in ptx.split("\n"):
        if place := re.match(r"\s*\.loc\s+(\d+) (\d+)", line):
            text = texts[place[1]]
            number = int(place[2])
            source = text[number - 1].strip() if number else source
        elif constant := CONSTANT.match(line):
            constants[constant[1]] = "0f" + constant[2][2:].upper()
        elif (pair := PAIR.match(line)) and pair[2] == pair[3] in constants:
            pairs[pair[1]] = constants[pair[2]]
        elif operation := FLOAT.match(line):
            # Only pairs have theirs in registers; a register of one may be a variable.
            given = [pairs.get(name, name) for name in OPERAND.findall(operation[2])]
            fixed = sorted(name for name in given if name.startswith("0f"))
            found[source].add(" ".join([operation[1], *fixed]))
    return {source: sorted(kinds) for source, kinds in found.items()}


@contextmanager
def launches() -> Iterator[dict[str, tuple]]:
    """By name, what is launched inside, as Triton's compiler takes it."""
    seen: dict[str, tuple] = {}
    stock = JITFunction.run

    def run(kernel, *args, **options):
        compiled = stock(kernel, *args, **options)
        known = {*kernel.arg_names, "grid", "warmup"}
        chosen = {name: it for name, it in options.items() if name not in known}
        seen[kernel.fn.__name__] = compiled.src, chosen
        return compiled

    JITFunction.run = run
    try:
        yield seen
    finally:
        JITFunction.run = stock


def plant(bug: str) -> None:
    """Change the source of what `sample` and `top_k_top_p` have in common."""
    old, new = BUGS[bug]
    for name in ("_penalized", "_over", "_noise"):
        function = getattr(sample, name)
        if old in function.src:
            function._unsafe_update_src(function.src.replace(old, new))
            return
    raise ValueError(f"nothing to plant {bug!r} in")


def main() -> None:
    modules, cases = (sample, top_k_top_p), CASES
    if sys.argv[1:]:
        plant(sys.argv[1])
        modules, cases = (sample,), [(90, True)]
    CUDABackend.make_cubin = lambda *_: b""  # PTX is all that is looked at
    seats, longs = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    floats, logits = torch.zeros(1), torch.zeros(1, VOCABULARY)
    with launches() as seen:
        for module in modules:
            module.DTYPES = (torch.bfloat16,)  # what models give
            module.warm(1, VOCABULARY, torch.device("cpu"))
        penalties.apply_penalties(
            *(logits, seats, seats, seats, floats, floats, floats),
            torch.zeros(1, VOCABULARY // 32, dtype=torch.int32),
            torch.zeros(1, VOCABULARY, dtype=torch.int32),
        )
        gumbel.apply_temperature(logits, seats, floats)
        min_p.apply_min_p(logits, seats, floats)
        gumbel.gumbel_sample(logits, seats, floats, longs, longs, False, False)

    def compiled(arch: int, fusion: bool) -> dict[str, dict[str, list[str]]]:
        target = GPUTarget("cuda", arch, 32)
        ptx = {
            name: triton.compile(
                source, target=target, options={**chosen, "enable_fp_fusion": fusion}
            ).asm["ptx"]
            for name, (source, chosen) in seen.items()
        }
        return {name: operations(each) for name, each in ptx.items()}

    with ThreadPoolExecutor(2) as both:
        found = both.map(lambda case: compiled(*case), cases)
        report({f"{a} {int(f)}": it for (a, f), it in zip(cases, found, strict=True)})


main()
