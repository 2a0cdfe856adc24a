"""Import names are slicetune.engine and slicetune.kernels: a top-level module called `kernels` would shadow
Hugging Face's package of that name, which transformers probes. pyproject.toml has everything else."""

from setuptools import find_packages, setup

FOLDERS = find_packages(include=["engine", "engine.*", "kernels", "kernels.*"])

setup(
    package_dir={"slicetune.engine": "engine", "slicetune.kernels": "kernels"},
    packages=["slicetune." + folder for folder in FOLDERS],
)
