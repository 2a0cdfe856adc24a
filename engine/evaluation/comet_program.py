"""COMET's scores of translations: a program for COMET's own environment, which has nothing of slicetune in it.

    .venv-comet/bin/python -I engine/evaluation/comet_program.py < job.json

COMET wants transformers < 5 and this package a newer one, so comet.py starts this file with the other Python. The job:

    {"model": "Unbabel/wmt22-cometkiwi-da", "batch_size": 32, "out": "comet.json",
     "source": {"it": FILE}, "reference": {"it": FILE}, "systems": {"base": {"it": FILE}}}

Files have a sentence a line. `out` gets the model's name, whether it read the references, the version of COMET, and
of every system and domain `score` (COMET's system score) and `segments` (one score a sentence). What goes wrong is the
last line on stderr and exit code 2.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import sys
import warnings
from pathlib import Path


class Unusable(Exception):
    """Something that its message explains."""


def main(job: dict) -> None:
    """Score what the job names and write it; a line on stdout for every system and domain."""
    warnings.filterwarnings("ignore")
    model = load(job["model"])
    gpus = available()
    with_reference = "ref" in (model.hparams.get("input_segments") or ()) or model.requires_references()
    found = {
        "model": job["model"],
        "references": with_reference,
        "version": importlib.metadata.version("unbabel-comet"),
    }
    found["systems"] = {}
    for system, files in job["systems"].items():
        found["systems"][system] = scores = {}
        for domain, file in files.items():
            columns = {"src": lines(job["source"][domain]), "mt": lines(file)}
            if with_reference:
                columns["ref"] = lines(job["reference"][domain])
            samples = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
            said = model.predict(samples, batch_size=job["batch_size"], gpus=gpus, progress_bar=False, num_workers=0)
            if bad := [i for i, score in enumerate(said.scores, 1) if not math.isfinite(score)]:
                raise Unusable(f"{job['model']}: the score of line {bad[0]} of {file} is not a number")
            scores[domain] = {"score": float(said.system_score), "segments": [float(score) for score in said.scores]}
            print(f"comet: {system}: {domain}: {100 * said.system_score:.2f}", flush=True)
    partial = Path(job["out"] + ".partial")
    partial.write_text(json.dumps(found))
    partial.replace(job["out"])


def load(name: str):
    """The model of a hub id, a folder (hparams.yaml, checkpoints/model.ckpt) or a checkpoint file."""
    from comet import load_from_checkpoint
    from huggingface_hub import snapshot_download

    path = Path(name).expanduser()
    if not path.exists():
        path = Path(snapshot_download(name))
    if path.is_dir():
        path = path / "checkpoints" / "model.ckpt"
    if not path.is_file():
        raise Unusable(f"{path}: no such file: name a COMET model of the hub, or a folder that holds one")
    logging.disable(logging.WARNING)
    return load_from_checkpoint(str(path))


def available() -> int:
    """GPUs to use: one, or none, which is said."""
    import torch

    if torch.cuda.is_available():
        return 1
    print("comet: no GPU here: on the CPU, where a model of the usual size takes hours", flush=True)
    return 0


def lines(file: str) -> list[str]:
    return Path(file).read_bytes().decode("utf-8").split("\n")[:-1]


def explain(model: str, error: BaseException) -> str:
    """One line: what failed and what to do."""
    if isinstance(error, Unusable):
        return str(error)
    kinds, text, cause = set(), " ".join(str(error).split()), error
    while cause is not None:
        kinds |= {kind.__name__ for kind in type(cause).__mro__}
        cause = cause.__cause__ or cause.__context__
    if "GatedRepoError" in kinds:
        page = f"https://huggingface.co/{model}"
        return f"{model} is gated: accept its licence on {page}, then `{sys.prefix}/bin/hf auth login` or set HF_TOKEN"
    if "RepositoryNotFoundError" in kinds or "HFValidationError" in kinds:
        return f"{model}: the hub has no such model, or keeps it from you: look at its name, or `hf auth login`"
    unreachable = ("LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectTimeout")
    if kinds & {*unreachable} or "couldn't connect to" in text or "is not a local folder" in text:
        return (
            f"{model} or its encoder is not in the hub's cache, and the hub cannot be reached: run the same command "
            "once where there is a network, or name a checkpoint's folder"
        )
    if "ModuleNotFoundError" in kinds or "ImportError" in kinds:
        return f"COMET cannot be imported in {sys.prefix} ({text[:200]}): set that environment up again"
    if "out of memory" in text:
        return f"out of memory with {model}: lower --evaluate.batch-size"
    return f"COMET with {model}: {type(error).__name__}: {text[:300]}"


if __name__ == "__main__":
    job = json.load(sys.stdin)
    try:
        main(job)
    except Exception as error:
        print(f"error: {explain(job['model'], error)}", file=sys.stderr, flush=True)
        sys.exit(2)
