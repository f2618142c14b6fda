"""The entry point through which the lane reaches every vLLM process.

vLLM calls platform plugins while it works out ``current_platform``: in the API
server, the engine core and each worker, and always before it looks for Triton.
"""

import logging
import os

logger = logging.getLogger("vllm.vllm_ext_cpulane")

VARIABLE = "VEXT_CPULANE"


def platform_hook() -> None:
    """Install what ``VEXT_CPULANE`` names; without it, do and import nothing.

    Always answers ``None``, "this is no platform of mine", so that vLLM goes on to
    choose its own CPU platform. Never raises: vLLM would hide that as "no platform".
    """
    mode = os.environ.get(VARIABLE)
    if not mode:
        return
    try:
        if mode == "interpret":
            from vllm_ext_cpulane import interpret

            interpret.install()
        elif mode == "discard":
            from vllm_ext_cpulane import discard

            discard.install()
        else:
            logger.warning(
                "%s=%s is unknown and does nothing; it can be interpret or discard",
                VARIABLE,
                mode,
            )
    except Exception as error:
        logger.warning("%s=%s could not be installed: %s", VARIABLE, mode, error)
