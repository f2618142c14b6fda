"""The patches, in order of application."""

from pathlib import Path

from vllm_ext.patches.clean_sampler_writes import PATCH as CLEAN_SAMPLER_WRITES
from vllm_ext.patches.decode_counts import PATCH as DECODE_COUNTS
from vllm_ext.patches.fused_sampler import PATCH as FUSED_SAMPLER
from vllm_ext.patches.identity_gathers import PATCH as IDENTITY_GATHERS
from vllm_ext.patches.late_metadata import PATCH as LATE_METADATA
from vllm_ext.patches.min_tokens_restore import PATCH as MIN_TOKENS_RESTORE
from vllm_ext.patches.repeated_batch import PATCH as REPEATED_BATCH
from vllm_ext.patches.scheduler_fast_path import PATCH as SCHEDULER_FAST_PATH
from vllm_ext.patches.step_graph import PATCH as STEP_GRAPH
from vllm_ext.patches.v1_copy_back import PATCH as V1_COPY_BACK
from vllm_ext.patches.v1_last_token import PATCH as V1_LAST_TOKEN
from vllm_ext.patches.v1_pinned_mask import PATCH as V1_PINNED_MASK
from vllm_ext.patching.declare import Patch

FINGERPRINTS = Path(__file__).with_name("fingerprints.json")

SERIES: tuple[Patch, ...] = (
    FUSED_SAMPLER,  # below those that wrap the same functions
    CLEAN_SAMPLER_WRITES,
    REPEATED_BATCH,
    LATE_METADATA,
    IDENTITY_GATHERS,
    DECODE_COUNTS,
    MIN_TOKENS_RESTORE,
    SCHEDULER_FAST_PATH,
    V1_LAST_TOKEN,
    V1_COPY_BACK,
    V1_PINNED_MASK,
    STEP_GRAPH,  # puts a class over one whose methods others wrap
)
