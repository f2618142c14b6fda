"""Computes the package list; every other setting lives in pyproject.toml.

Four folders are top-level in the repository and install under one import name, so
that nothing but ``vllm_ext`` reaches site-packages.
"""

from setuptools import find_packages, setup

FOLDERS = {
    "vllm_ext": "vllm_ext",
    "vllm_ext.kernels": "kernels",
    "vllm_ext.patches": "patches",
    "vllm_ext.microbench": "microbench",
}

setup(
    package_dir=FOLDERS,
    packages=[
        name
        for root, folder in FOLDERS.items()
        for name in (root, *(f"{root}.{sub}" for sub in find_packages(folder)))
    ],
)
