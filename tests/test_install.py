"""The package as it is installed: what a wheel holds, and that the installed engine imports without heavy libraries."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def modules() -> list[Path]:
    """Every module of the package, as paths within the checkout."""
    return [file.relative_to(ROOT) for name in ("engine", "kernels") for file in (ROOT / name).rglob("*.py")]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """A wheel of a copy of the sources (building leaves folders behind)."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for file in (*modules(), *map(Path, ("pyproject.toml", "setup.py", "README.md", "LICENSE"))):
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        (source / file).write_bytes((ROOT / file).read_bytes())
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out), ".", cwd=source)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_every_module_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert {name for name in names if ".dist-info/" not in name} == {str("slicetune" / file) for file in modules()}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in metadata


def test_installed_package_imports_from_anywhere(wheel, tmp_path):
    """Installed into a folder that comes first on the path; no module of the checkout is seen."""
    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(wheel), cwd=tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import slicetune.engine.slices.optim, slicetune.engine.slices.linear, slicetune.kernels.gated.op\n"
        "print(slicetune.engine.slices.optim.__file__)\n"
        "print(sorted({'transformers', 'deepspeed', 'datasets', 'matplotlib', 'tyro'} & set(sys.modules)))\n"
    )
    file, heavy = run(sys.executable, "-c", code, cwd=tmp_path).splitlines()
    assert file.startswith(str(site))
    assert heavy == "[]"


def test_this_environment_sees_the_package_by_its_full_names_only(tmp_path):
    """Outside the checkout slicetune.* is there, and our folders are not top-level `engine` and `kernels`."""
    code = (
        "import importlib.util, slicetune.engine, slicetune.kernels\n"
        "for name in ('engine', 'kernels'):\n"
        "    spec = importlib.util.find_spec(name)\n"
        "    print(spec and spec.origin)\n"
    )
    found = run(sys.executable, "-c", code, cwd=tmp_path).split()
    assert len(found) == 2
    assert not {str(ROOT / name / "__init__.py") for name in ("engine", "kernels")} & set(found)


def test_setup_py_names_every_folder():
    text = (ROOT / "setup.py").read_text()
    for folder in {file.parent for file in modules()}:
        assert f'"slicetune.{".".join(folder.parts)}"' in text, folder


def test_constraints_pin_what_is_installed_within_the_bounds():
    """Every requirement that `make test` installs has one pinned version that pyproject.toml's bound admits."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = [Requirement(line) for line in (*project["dependencies"], *project["optional-dependencies"]["test"])]
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pins = {pin.name: list(pin.specifier) for pin in map(Requirement, filter(None, lines))}
    for bound in bounds:
        (pin,) = pins[bound.name]
        assert pin.operator == "=="
        assert bound.specifier.contains(pin.version), bound.name


def test_readme_names_every_module():
    """The tree in README.md is kept: a module that it leaves out, or names though it is gone, is found here."""
    tree = (ROOT / "README.md").read_text().split("## The tree")[1].split("## ")[0]
    named = {word.rstrip(",") for word in tree.split()}
    hidden = ("__init__", "__main__", "_reference", "_kernels")  # beside the module that they belong to
    ours = {file for file in modules() if not file.stem.endswith(hidden)}
    assert not [file for file in ours if not {file.name, file.stem, f"{file.parent.name}/{file.name}"} & named]
    files = {file.name for file in modules()}
    assert not [word for word in named if word.endswith(".py") and "{" not in word and Path(word).name not in files]
