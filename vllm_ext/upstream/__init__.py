"""From a patch that runs here to a pull request that a person can send to vLLM."""
