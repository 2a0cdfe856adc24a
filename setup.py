"""Import names are slicetune.engine, slicetune.kernels and slicetune.recipes: a top-level module called `kernels` would
shadow Hugging Face's package of that name, which transformers probes. engine/package is `slicetune` itself, with
`slicetune.__version__`. pyproject.toml has everything else."""

from setuptools import find_packages, setup

PARTS = ("engine", "kernels", "recipes")
ITSELF = "engine/package"
FOLDERS = find_packages(include=[f"{part}*" for part in PARTS])

setup(
    package_dir={"slicetune": ITSELF} | {f"slicetune.{part}": part for part in PARTS},
    packages=["slicetune", *(f"slicetune.{folder}" for folder in FOLDERS if folder.replace(".", "/") != ITSELF)],
)
