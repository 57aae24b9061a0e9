"""Computes the package list; everything else is in pyproject.toml.

``passes/`` and ``kernels/`` stand at the top of the tree and install inside ``lowmem_compile``.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["lowmem_compile", "lowmem_compile.*"]),
        *(f"lowmem_compile.{name}" for name in find_packages(include=["passes", "passes.*", "kernels", "kernels.*"])),
    ]
)
