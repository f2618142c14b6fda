"""A patch that no graph can hold, in a real engine; one behind it."""

from contextlib import contextmanager
from unittest import mock

from vllm_ext.prove import steprun
from vllm_ext_cpulane.engine import report


@contextmanager
def all_applied(names):
    """Sampling waits for the device, whatever the patches are called."""
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    stock = Sampler.__call__

    def waits(self, logits, *args, **kwargs):
        logits[0, 0].item()  # marked
        return stock(self, logits, *args, **kwargs)

    with mock.patch.object(Sampler, "__call__", waits):
        yield []


steprun.all_applied = all_applied
report(steprun.look({"waits": ["waits"], "behind": ["behind"]}, stock=False))
