"""COMET beside BLEU: a program in an environment of its own, since COMET wants transformers < 5.

    python recipes/caneft_llama31.py … --evaluate.comet default      # wmt22-cometkiwi-da: source and translation
    make comet-env                                                   # that environment: .venv-comet, beside .venv

What it does is comet_program.py; here it is found, started on the run's translations and waited for. Where it cannot
run, one line says why and what to do, and BLEU stands alone.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..common import distributed, signals
from ..common.errors import UserError
from ..common.files import contents
from . import results
from .bleu import average, mean

DEFAULT = "Unbabel/wmt22-cometkiwi-da"
"""Reference-free: it reads the source and the translation."""
REQUIREMENTS = ("unbabel-comet==2.2.7", "setuptools<81")
"""COMET's torchmetrics imports pkg_resources, which setuptools 81 no longer has."""
VARIABLE = "SLICETUNE_COMET_PYTHON"
PROGRAM = Path(__file__).with_name("comet_program.py")
LAUNCHERS = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC", "SLURM_", "PYTHON")
"""What COMET's Lightning would take for a job of its own with many ranks, and what could change its imports."""
WAIT = 2.0
"""Seconds between two looks at the program, and at what signals the ranks have had."""


class Unavailable(UserError):
    """COMET cannot be had; the message says why and what to do."""


def model_name(setting: str) -> str:
    """What --evaluate.comet means."""
    return DEFAULT if setting == "default" else setting


def environment() -> Path:
    """Where COMET's environment belongs: beside the virtual environment that this is, else in the working directory."""
    inside = sys.prefix != sys.base_prefix
    return (Path(sys.prefix).parent if inside else Path.cwd()) / ".venv-comet"


def python(named: str = "") -> Path:
    """The Python of COMET's environment: `named`, else $SLICETUNE_COMET_PYTHON, else the one in `environment()`.

    Raises Unavailable with the commands that make one.
    """
    for what, value in (("--evaluate.comet-python", named), (VARIABLE, os.environ.get(VARIABLE, ""))):
        if value and not (found := shutil.which(Path(value).expanduser())):
            raise Unavailable(f"{what} {value}: no program there: name the python of COMET's environment")
        if value:
            return Path(found)
    usual = environment() / "bin" / "python"
    if not usual.is_file():
        raise Unavailable(f"no environment for it: set one up and give the same command again: {setup()}")
    return usual


def setup() -> str:
    """The commands that make the environment (COMET's numpy < 2 has no wheels for a Python after 3.12)."""
    there = environment()
    make = [f"python3.{min(sys.version_info.minor, 12)}", "-m", "venv", str(there)]
    return f"{shlex.join(make)} && {shlex.join([str(there / 'bin' / 'pip'), 'install', *REQUIREMENTS])}"


def job(
    out: Path, model: str, languages: Mapping[str, tuple[str, str]], systems: Sequence[str], batch_size: int
) -> dict[str, Any]:
    """What the program is to do with the translations of a run's folder; `languages` are each domain's two."""

    def files(kind: str, side: int) -> dict[str, str]:
        return {n: str(results.translations(out, kind, n, pair[side]).resolve()) for n, pair in languages.items()}

    there = Path(model).expanduser()
    return {
        "model": str(there.resolve()) if there.exists() else model,
        "batch_size": batch_size,
        "out": str((out / "comet.json").resolve()),
        "source": files("source", 0),
        "reference": files("reference", 1),
        "systems": {system: files(system, 1) for system in systems},
    }


def identity(job: Mapping[str, Any]) -> dict[str, Any]:
    """What the scores depend on: the model and every text."""
    parts = {"source": job["source"], "reference": job["reference"], **job["systems"]}
    texts = {kind: dict(zip(files, contents(files.values()).values(), strict=True)) for kind, files in parts.items()}
    return {"comet": {"model": job["model"], "texts": texts}}


def run(job: Mapping[str, Any], interpreter: Path | None) -> None:
    """Run the program on the first rank (`interpreter` is None on others) while all wait; `job["out"]` is written.

    No rank waits in a collective for longer than WAIT, so a program of hours meets no timeout. Raises Unavailable, on
    every rank, if it fails, and Interrupted if a rank had a signal.
    """
    log = Path(job["out"]).with_suffix(".log")
    process = _start(job, interpreter, log) if interpreter else None
    try:
        code = None
        while True:
            if process is not None:
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(WAIT)
            ended, stopping = distributed.sums(float(code is not None), float(signals.requested()))
            if ended:
                break
            if stopping:
                raise signals.interrupted("COMET scores the translations")
    finally:
        if process is not None and process.poll() is None:
            _end(process)
    failure = distributed.share_object(_failure(log) if code else None)
    if failure:
        raise Unavailable(failure, agreed=True)


def _start(job: Mapping[str, Any], interpreter: Path, log: Path) -> subprocess.Popen[str]:
    """-I: the folder of the program, with modules named as the standard library's, stays off its import path.

    -X utf8: its output is no terminal's, and names of domains may have any letter.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    with log.open("w") as errors:
        process = subprocess.Popen(
            [interpreter, "-I", "-X", "utf8", PROGRAM], stdin=subprocess.PIPE, stderr=errors, env=environment, text=True
        )
    with suppress(BrokenPipeError):  # it ended at once: its exit code says so
        process.stdin.write(json.dumps(job))
        process.stdin.close()
    return process


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _failure(log: Path) -> str:
    """The program's last line, or where to look."""
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = said[-1] if said else "it ended without a word"
    return last.removeprefix("error: ") if last.startswith("error: ") else f"{last[:200]} ({log} has all of it)"


def add(found: dict[str, Any], said: Mapping[str, Any], out: Path) -> None:
    """Put what the stage said into results.json's content: scores times 100 with averages, or why there are none."""
    if not said or "missing" in said["comet"]:
        found.update(said)
        return
    scores = json.loads((out / "comet.json").read_text())
    for system, domains in scores["systems"].items():
        entry = found["systems"][system]
        for domain, score in domains.items():
            entry["domains"][domain]["comet"] = 100 * score["score"]
        entry["averages"] = average(entry["domains"], found["seen"], found["unseen"])
        if "pairs" in entry:
            entry["pairs"] = {p: mean([entry["domains"][n] for n in names]) for p, names in found["pairs"].items()}
    found["comet"] = {name: scores[name] for name in ("model", "references", "version")}
