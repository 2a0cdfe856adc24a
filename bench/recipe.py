"""One recipe end to end on a GPU: scores, neurons, training under DeepSpeed's ZeRO and NCCL, export, BLEU.

    WHEELS=DIR python bench/run.py gpu-run --out OUT        # make gpu-run

One rank, from a checkout without installation. What the machine's Python lacks comes from WHEELS (see launch.py); what
is still missing then is named. The log and the report go to --out, the run's other files do not. The first run
pretrains the embedded model.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import launch
from launch import ROOT
from screen import tail

NEEDED = ("tyro", "sacrebleu", "tqdm", "numpy", "safetensors", "torch", "transformers", "deepspeed")
"""Modules that the recipe imports. The others of pyproject.toml are for other recipes."""
KEPT = ("report.html", "results.json", "status.json")
RECIPE = "recipes/caneft_tiny.py"
# The message names the module that is missing, which may be one that these want.
IMPORT = f"""
import importlib, sys
for name in {NEEDED!r}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        sys.exit(f"{{name}}: {{error}}")
"""


def run(env: dict[str, str], out: Path, end: float) -> int:
    """The exit code: 0 if the recipe ran to its end by the time `end`."""
    if missing := lacking(env):
        print(f"[gpu-run] missing: {missing} (WHEELS={os.environ.get('WHEELS') or 'DIR'}: a folder of *.whl)")
        return 1
    log, folder = out / "gpu-run.log", launch.links_of(env) / "run"
    log.write_text("")
    command = [sys.executable, "-P", RECIPE, "--out", str(folder), "--train.report-to"]
    started = time.monotonic()
    failure = launch.watched(command, env, end - time.monotonic(), log)
    for name in KEPT:
        if (folder / name).is_file():
            shutil.copy(folder / name, out / name)
    print(tail(log, 0, 60))
    print(f"[gpu-run] {RECIPE}: {failure or 'done'}, {time.monotonic() - started:.0f} s; {log}")
    return int(bool(failure))


def lacking(env: dict[str, str]) -> str:
    """The first module that cannot be imported, and why; empty where all can."""
    done = subprocess.run([sys.executable, "-P", "-c", IMPORT], cwd=ROOT, env=env, capture_output=True, text=True)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["?"])[-1][:200]
