"""Results that nobody measured, to judge the code that judges."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_ext.bench import results

BATCHES = (1, 8)
BLOCKS = 20
CASE = "tiny, S0, batch {}"


def engine_result(seed: int = 0, **effects: float) -> dict[str, Any]:
    """An engine benchmark whose arms cost ``effects`` times what stock costs.

    Samples vary by 1 %, and a block's two sides share a slow or a quick moment.
    """
    random = np.random.default_rng(seed)
    effects = {"control": 1.0, "all": 1.0, **effects}
    entries, comparisons = [], []
    for batch in BATCHES:
        moment = 5e-3 * batch * random.lognormal(0, 0.1, BLOCKS)

        def side(effect: float, moment: Any = moment) -> list[float]:
            noise = random.lognormal(0, 0.01, BLOCKS)
            return [float(value) for value in moment * effect * noise]

        stock = side(1.0)
        case = CASE.format(batch)
        entries.append(
            results.entry(f"{case}, TPOT, stock", "TPOT", {"batch": batch}, stock)
        )
        for arm, effect in effects.items():
            samples = side(effect)
            entries.append(
                results.entry(f"{case}, TPOT, {arm}", "TPOT", {"batch": batch}, samples)
            )
            comparisons.append(
                results.comparison(
                    case=case,
                    metric="TPOT",
                    unit="s",
                    arm=arm,
                    against="stock",
                    arm_samples=samples,
                    against_samples=stock,
                    tolerance=0.03,
                )
            )
    return results.document(
        "engine",
        entries,
        comparisons,
        patches=[{"name": "p", "state": "in use", "reason": ""}],
        watch={"valid": True, "reason": ""},
        command=["vllm-ext", "bench", "engine"],
        label="CPU engine",
    )
