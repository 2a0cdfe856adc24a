"""The package as it is installed: what a wheel holds, and what works of it with how little beside it."""

import os
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import files, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import slicetune

ROOT = Path(__file__).parents[1]
PARTS = ("engine", "kernels", "recipes")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def run(*command: str, cwd: Path, **variables: str) -> str:
    environment = os.environ | variables
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def modules(kind: str = "py") -> list[Path]:
    """Every module of the package, as paths within the checkout; or every file that ends otherwise."""
    return [file.relative_to(ROOT) for part in PARTS for file in (ROOT / part).rglob(f"*.{kind}")]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """A wheel of a copy of the sources (building leaves folders behind)."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for file in (*modules(), *modules("md"), *map(Path, ("pyproject.toml", "setup.py", "README.md", "LICENSE"))):
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        (source / file).write_bytes((ROOT / file).read_bytes())
    run(*PIP, "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out), ".", cwd=source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder that the wheel alone is installed in."""
    site = tmp_path_factory.mktemp("site")
    run(*PIP, "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(wheel), cwd=site)
    return site


def test_wheel_holds_every_module_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    expected = {str("slicetune" / file) for file in modules()}
    expected = expected - {"slicetune/engine/package/__init__.py"} | {"slicetune/__init__.py"}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in metadata


def test_installed_package_imports_from_anywhere(installed, tmp_path):
    """It comes first on the path; no module of the checkout is seen, and no heavy library is imported."""
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r})\n"
        "import slicetune.engine.slices.optim, slicetune.engine.slices.linear, slicetune.kernels.gated.op\n"
        "import slicetune.recipes.caneft_llama31\n"
        "print(slicetune.engine.slices.optim.__file__, slicetune.__version__)\n"
        "print(slicetune.recipes.caneft_llama31.__file__)\n"
        "print(sorted({'transformers', 'deepspeed', 'datasets', 'matplotlib', 'tyro'} & set(sys.modules)))\n"
    )
    *places, heavy = run(sys.executable, "-c", code, cwd=tmp_path).splitlines()
    assert all(file.startswith(str(installed)) for file in places)
    assert places[0].split()[1] == version("slicetune") == slicetune.__version__
    assert heavy == "[]"


def test_an_installed_recipe_runs_by_its_name(installed, tmp_path):
    """There is no folder recipes/ where a package is installed."""
    command = (sys.executable, "-m", "slicetune.recipes.caneft_llama31", "--dry-run", "--gpus", "4")
    said = run(*command, cwd=tmp_path, PYTHONPATH=str(installed))
    assert "1,048,576" in said
    assert "on 4 GPU(s)" in said


def test_this_environment_sees_the_package_by_its_full_names_only(tmp_path):
    """Outside the checkout slicetune.* is there, and our folders are not top-level `engine`, `kernels`, `recipes`."""
    code = (
        "import importlib.util, slicetune.engine, slicetune.kernels, slicetune.recipes\n"
        f"for name in {PARTS}:\n"
        "    spec = importlib.util.find_spec(name)\n"
        "    print(spec and spec.origin)\n"
    )
    found = run(sys.executable, "-c", code, cwd=tmp_path).split()
    assert len(found) == len(PARTS)
    assert not {str(ROOT / name / "__init__.py") for name in PARTS} & set(found)


# ---------------------------------------------------------------- with torch and little else


def needed(names: list[str]) -> set[str]:
    """These distributions and, without extras, what they need."""
    found: set[str] = set()
    while names:
        found.add(name := names.pop())
        wanted = map(Requirement, requires(name) or ())
        names += [r.name for r in wanted if not r.marker or r.marker.evaluate({"extra": ""}) if r.name not in found]
    return found


def folder_of(folder: Path, *names: str, without: str = "") -> Path:
    """A folder on whose path these distributions can be imported, what they need, and nothing else."""
    for name in needed(list(names)) - {without}:
        for file in files(name) or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(Path(file.locate()).parents[len(file.parts) - 1] / top)
    return folder


@pytest.fixture(scope="session")
def bare(tmp_path_factory) -> Path:
    """Where torch can be imported, and nothing that it does not need itself; Triton is left out."""
    return folder_of(tmp_path_factory.mktemp("bare"), "torch", without="triton")


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> Path:
    """What `pip install slicetune` brings."""
    wanted = map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    names = [requirement.name for requirement in wanted if not requirement.marker or requirement.marker.evaluate()]
    return folder_of(tmp_path_factory.mktemp("plain"), *names)


OPTIMIZER_AND_KERNELS = """
import sys, torch
from slicetune.engine.optim import SparseColumnAdamW
from slicetune.engine.slices import slice_linears
from slicetune.kernels.gated import gated_forward
layer = torch.nn.Sequential(torch.nn.Linear(8, 4))
before = layer[0].weight.detach().clone()
optimizer = SparseColumnAdamW(slice_linears(layer, rows={"0": [2]}), lr=0.1)
layer(torch.randn(3, 8)).square().sum().backward()
optimizer.step()
changed = (layer[0].weight != before).any(1).tolist()
assert changed == [False, False, True, False], changed
gate, up = torch.randn(2, 3, 8)
assert torch.allclose(gated_forward(gate, up, "silu"), torch.nn.functional.silu(gate) * up)
assert not {"transformers", "deepspeed", "tyro"} & set(sys.modules)
"""
TORCH_ALONE = """
import importlib.util
assert not [name for name in ("numpy", "safetensors", "triton", "transformers") if importlib.util.find_spec(name)]
"""
WITH_THE_REST = """
import importlib.util
import slicetune.kernels.common.dispatch as dispatch
from slicetune.engine.slices.neurons import NeuronSet
assert dispatch.INTERPRET or importlib.util.find_spec("triton") is None  # the kernel above went through Triton
neurons = NeuronSet({(0, "gate", "row"): torch.tensor([1, 3])}, 1, {"gate": 8}, {"gate": 4})
neurons.save("neurons.safetensors")
assert NeuronSet.load("neurons.safetensors") == neurons
assert importlib.util.find_spec("transformers") is None
"""


def alone(*words: str, site: Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    """Python that sees its standard library and the folders of `site` alone (-S: nothing that is installed)."""
    variables = {"PYTHONPATH": site, "PYTHONDONTWRITEBYTECODE": "1", **variables}
    command = (sys.executable, "-S", "-P", "-W", "ignore", *words)
    return subprocess.run(command, cwd=cwd, env=os.environ | variables, capture_output=True, text=True, timeout=300)


def test_slices_optimizer_and_kernels_need_torch_alone(installed, bare, tmp_path):
    path = os.pathsep.join(map(str, (installed, bare)))
    done = alone("-c", OPTIMIZER_AND_KERNELS + TORCH_ALONE, site=path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_what_a_plain_installation_brings_is_enough_for_neurons_and_triton(installed, plain, tmp_path):
    """Triton's interpreter stands in for a GPU; it wants numpy, and files of neurons want safetensors."""
    path = os.pathsep.join(map(str, (installed, plain)))
    program = OPTIMIZER_AND_KERNELS + WITH_THE_REST
    done = alone("-c", program, site=path, cwd=tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


def test_the_installed_command_lists_what_there_is_without_the_engines_libraries(installed, plain, tmp_path):
    path = os.pathsep.join(map(str, (installed, plain)))
    done = alone(str(installed / "bin" / "slicetune"), "--help", site=path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {command} " in done.stdout for command in ("score", "select", "compare", "doctor"))


@pytest.mark.parametrize(
    "words",
    [
        [str(ROOT / "recipes" / "caneft_tiny.py"), "--dry-run"],
        ["-m", "slicetune.recipes.lora_llama31", "--dry-run"],
    ],
    ids=["file", "name"],
)
def test_a_recipe_without_the_engines_libraries_says_what_to_install(words, installed, plain, tmp_path):
    done = alone(*words, site=os.pathsep.join(map(str, (installed, plain))), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith(" is not installed: pip install 'slicetune[engine]'\n")
    assert done.stderr.count("\n") == 1


# ---------------------------------------------------------------- versions


def test_constraints_pin_what_is_installed_within_the_bounds():
    """Every requirement that `make test` installs has one pinned version that pyproject.toml's bound admits."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = (ROOT / ".ci" / "install").read_text().split("-e '.[")[1].split("]")[0].split(",")
    bounds = [Requirement(line) for line in (*project["dependencies"], *(r for name in names for r in extras[name]))]
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pins = {pin.name: list(pin.specifier) for pin in map(Requirement, filter(None, lines))}
    for bound in bounds:
        (pin,) = pins[bound.name]
        assert pin.operator == "=="
        assert bound.specifier.contains(pin.version), bound.name
