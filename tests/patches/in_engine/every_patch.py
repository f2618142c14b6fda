"""Every patch on the real modules: fits, steps aside, applies, reverts.

For each patch of the series, reports what happened when it was offered under a record
in which one watched target at a time differs, and what applying and reverting it did.
"""

import importlib
import logging

from vllm_ext.patches import FINGERPRINTS, SERIES
from vllm_ext.patching.engine import Engine, resolve
from vllm_ext.patching.fingerprint import Source, read_known
from vllm_ext.plugin import PACKAGE, package_folder
from vllm_ext.testing import applied
from vllm_ext_cpulane.engine import report

logging.getLogger("vllm.vllm_ext").setLevel(logging.CRITICAL)


def targets(patch):
    return [
        resolve(importlib.import_module(edit.module), edit.target)[2]
        for edit in patch.edits
    ]


def under(patch, known):
    """State and reason of ``patch`` offered under ``known``, then withheld."""
    engine = Engine(Source(package_folder(), PACKAGE), known)
    outcome = engine.offer(patch)
    found = [outcome.state, outcome.reason]
    engine.withhold(patch, "seen")
    return found


def examine(patch):
    for module in patch.modules:
        importlib.import_module(module)
    known = read_known(FINGERPRINTS)
    stock = targets(patch)
    changed = {}
    for target in patch.watched:
        other = {**known, target: dict.fromkeys(known[target], "0" * 12)}
        changed[target] = under(patch, other)
    left_alone = [a is b for a, b in zip(stock, targets(patch), strict=True)]
    with applied(patch) as outcome:
        state = outcome.state
        replaced = [a is not b for a, b in zip(stock, targets(patch), strict=True)]
    reverted = [a is b for a, b in zip(stock, targets(patch), strict=True)]
    return {
        "changed": changed,
        "left_alone": left_alone,
        "state": state,
        "replaced": replaced,
        "reverted": reverted,
    }


report(
    {"vllm": Source(package_folder(), PACKAGE).version}
    | {patch.name: examine(patch) for patch in SERIES}
)
