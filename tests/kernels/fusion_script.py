"""Run in a process of the lane that compiles: float operations by source line.

See test_sample_fusion.py.
"""

import re
from collections import defaultdict
from pathlib import Path

import torch

from vllm_ext_cpulane import discard
from vllm_ext_cpulane.engine import report

discard.install()

from triton.runtime.jit import JITFunction  # noqa: E402
from vllm.v1.worker.gpu.sample import gumbel, penalties  # noqa: E402

from vllm_ext.kernels import sample  # noqa: E402

VOCABULARY = 1024
FLOAT = re.compile(r"^\s*((?:fma|mul|add|sub|div)\.[a-z.]*f32)\b(.*);")
IMMEDIATE = re.compile(r"0f[0-9A-F]{8}")


def operations(ptx: str) -> dict[str, list[str]]:
    """By source text: each kind of float operation, with its constants."""
    files = dict(re.findall(r'\.file\s+(\d+) "([^"]+)"', ptx))
    texts = {
        number: Path(path).read_text().split("\n") for number, path in files.items()
    }
    found = defaultdict(set)
    source = ""
    for line in ptx.split("\n"):
        if place := re.match(r"\s*\.loc\s+(\d+) (\d+)", line):
            text = texts[place[1]]
            number = int(place[2])
            source = text[number - 1].strip() if number else source
        elif operation := FLOAT.match(line):
            constants = " ".join(sorted(IMMEDIATE.findall(operation[2])))
            found[source].add(f"{operation[1]} {constants}".strip())
    return {source: sorted(kinds) for source, kinds in found.items()}


def main() -> None:
    compiled = {}
    stock = JITFunction.run

    def run(kernel, *args, **options):
        compiled[kernel.fn.__name__] = stock(kernel, *args, **options)
        return compiled[kernel.fn.__name__]

    JITFunction.run = run
    floats = torch.zeros(1)
    seats, longs = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    sample.warm(1, VOCABULARY, torch.device("cpu"))
    logits = torch.zeros(1, VOCABULARY)
    penalties.apply_penalties(
        *(logits, seats, seats, seats, floats, floats, floats),
        torch.zeros(1, VOCABULARY // 32, dtype=torch.int32),
        torch.zeros(1, VOCABULARY, dtype=torch.int32),
    )
    gumbel.apply_temperature(logits, seats, floats)
    gumbel.gumbel_sample(logits, seats, floats, longs, longs, False, False)
    report({name: operations(each.asm["ptx"]) for name, each in compiled.items()})


main()
