"""Import names are slicetune.engine and slicetune.kernels: a top-level module called `kernels` would shadow
Hugging Face's package of that name, which transformers probes. pyproject.toml has everything else."""

from setuptools import setup

setup(
    package_dir={"slicetune.engine": "engine", "slicetune.kernels": "kernels"},
    packages=[
        "slicetune.engine",
        "slicetune.engine.analyses",
        "slicetune.engine.landermt",
        "slicetune.engine.methods",
        "slicetune.engine.tiny",
        "slicetune.kernels",
    ],
)
