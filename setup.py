"""Import names are slicetune.engine, slicetune.kernels and slicetune.recipes: a top-level module called `kernels` would
shadow Hugging Face's package of that name, which transformers probes. pyproject.toml has everything else."""

from setuptools import find_packages, setup

PARTS = ("engine", "kernels", "recipes")

setup(
    package_dir={f"slicetune.{part}": part for part in PARTS},
    packages=[f"slicetune.{folder}" for folder in find_packages(include=[f"{part}*" for part in PARTS])],
)
