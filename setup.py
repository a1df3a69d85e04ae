"""Two source roots in one distribution: engine/onecard and kernels/onecard_kernels. The rest is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    package_dir={"onecard": "engine/onecard", "onecard_kernels": "kernels/onecard_kernels"},
    packages=[*find_packages("engine"), *find_packages("kernels")],
    package_data={"onecard": ["py.typed", "commands/fit/shapes/*.json"], "onecard_kernels": ["py.typed"]},
)
