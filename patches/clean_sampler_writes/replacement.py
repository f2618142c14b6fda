# SPDX-License-Identifier: Apache-2.0
"""`Sampler.apply_staged_writes`, called only when there is something to write.

Which buffer the device reads: each parameter has a pool of pinned buffers, one per
step that may be in flight, and every copy goes to the next one. A skipped call
leaves the device on the buffer it is on, whose content is what the copy would have
written. The buffer that a later copy overwrites was last read no later than it would
have been in stock, where every step moves on by one: with a pool of d buffers it was
left d - 1 copies ago, and d - 1 copies now span at least as many steps.
"""

from collections.abc import Callable
from typing import Any

from vllm.v1.watermarking.gpu_sampler import GPUWatermarkSampler
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_ext.patching.engine import step_aside

NAME = "clean_sampler_writes"
OWN_SAMPLERS = (Sampler, GPUWatermarkSampler)
OWN_PROCESSORS = (LogitBiasState, PenaltiesState, BadWordsState)

# The applications of the patch; a sampler that was clean under one says nothing to
# the next, since requests may have been added in between.
_clean_mark = object()


def note_the_write(original: Callable[..., None]) -> Callable[..., None]:
    """`Sampler.add_request`, after which there is something to write."""

    def add_request(self: Sampler, *args: Any, **kwargs: Any) -> None:
        # Before the call: one that raises half-way may have staged a part.
        self._vext_clean = None
        return original(self, *args, **kwargs)

    return add_request


def skip_when_clean(original: Callable[..., None]) -> Callable[..., None]:
    """`Sampler.apply_staged_writes`, skipped after a call with no request since."""
    global _clean_mark
    mark = _clean_mark = object()

    def apply_staged_writes(self: Sampler) -> None:
        if type(self) not in OWN_SAMPLERS:
            # One derived from it may write parameters of its own between two steps.
            step_aside(NAME, "sampler of the model's own")
            original(self)
        elif tuple(map(type, self.logits_processors)) != OWN_PROCESSORS:
            # A processor of the user's is promised this call before every step.
            step_aside(NAME, "custom logits processor")
            original(self)
        elif getattr(self, "_vext_clean", None) is not mark:
            original(self)
            self._vext_clean = mark

    return apply_staged_writes
