"""`make faults`: every fault of the table in full; writes FAULTS.md beside it. The tests make the same faults, fewer.

python tests/faults/campaign.py                # all pieces that have no result for this commit; broken off, it goes on
python tests/faults/campaign.py --keep         # results of other commits count too; the table says which
python tests/faults/campaign.py --only 1 4     # pieces of some faults
python tests/faults/campaign.py --table        # runs nothing, writes the table of what there is

A piece takes minutes; its result goes to .faults/<piece>.json at once.
"""

from __future__ import annotations

import argparse
import errno
import importlib.metadata
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path.append(str(TESTS / "support"))  # as a program, it is not in pytest's path
RESULTS = TESTS.parent / ".faults"
FUZZED = 1000
"""Random inputs of each kind."""
JOB_KILLS = 10
TRAININGS = 200
"""Points at which a whole small training is killed."""


@dataclass(frozen=True)
class Piece:
    """A part of a fault's row. `run` gives how often the fault was made, and what went wrong."""

    name: str
    made: str
    run: Callable[[], tuple[int, list[str]]]


# ---------------------------------------------------------------- pieces


def saves(part: int, of: int) -> tuple[int, list[str]]:
    """Kills at every `of`-th point of a save, from `part` on."""
    return _with_killer(lambda killer, root: _kill_saves(killer, root, part, of))


def _kill_saves(killer: Any, root: Path, part: int, of: int) -> list[str | None]:
    import faults

    points = faults.points(killer, root)
    print(f"{len(points)} points: {dict(Counter(name for *_, name in points))}", flush=True)
    return [faults.kill_a_save(killer, root, number, when) for number, when, _ in points[part::of]]


def disks(code: int) -> tuple[int, list[str]]:
    """A disk that fails with `code` from each operation of a save on."""
    return _with_killer(lambda killer, root: _fail_saves(killer, root, code))


def _fail_saves(killer: Any, root: Path, code: int) -> list[str | None]:
    import faults

    numbers = [number for number, when, _ in faults.points(killer, root) if when == "before"]
    return [faults.fail_a_save(killer, root, number, code) for number in numbers]


def trainings(part: int, of: int) -> tuple[int, list[str]]:
    """Kills of a training with three saves at seeded points, then started again; final weights compared."""
    return _with_killer(lambda killer, root: _kill_trainings(killer, root, part, of))


def _kill_trainings(killer: Any, root: Path, part: int, of: int) -> list[str | None]:
    import faults

    unbroken = killer.run("train_toys", str(root / "unbroken"), {})
    assert unbroken.code == 0, unbroken.error
    spots = [(number, when) for number in range(1, len(unbroken.operations) + 1) for when in faults.MOMENTS]
    spots = random.Random(1).sample(spots, min(TRAININGS, len(spots)))
    return [faults.kill_training(killer, root / "out", spot, unbroken.value) for spot in spots[part::of]]


def _with_killer(trials: Callable[[Any, Path], list[str | None]]) -> tuple[int, list[str]]:
    from fault_pool import Killer

    killer = Killer()
    with tempfile.TemporaryDirectory() as folder:
        found = trials(killer, Path(folder))
    killer.close()
    return len(found), [problem for problem in found if problem]


def passed(*files: str, choose: str, **variables: str) -> Callable[[], tuple[int, list[str]]]:
    """Tests of `files`, wherever in tests/ they lie, whose names `choose` (pytest's -k) takes; each is one time."""

    def run() -> tuple[int, list[str]]:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
            command += ["-k", choose] if choose else []
            command += [str(place) for file in files for place in TESTS.rglob(file)]
            done = subprocess.run(
                command, cwd=TESTS.parent, env=os.environ | variables, capture_output=True, text=True, check=False
            )
            if not report.is_file():
                return 0, [(done.stdout + done.stderr)[-300:]]
            cases = list(xml.parse(report).iter("testcase"))
        bad = [
            f"{c.get('name')}: {w.get('message', '')[:200]}"
            for c in cases
            for w in (*c.iter("failure"), *c.iter("error"))
        ]
        ran = sum(c.find("skipped") is None for c in cases)
        return ran, bad or ([] if ran else ["no test ran"])

    return run


def fuzzed(name: str) -> Callable[[], tuple[int, list[str]]]:
    """Random inputs of one test of test_fuzz.py, drawn anew; hypothesis itself says how many they were."""

    def run() -> tuple[int, list[str]]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "0"]
        command += ["--hypothesis-show-statistics", f"{TESTS}/faults/test_fuzz.py::test_{name}"]
        variables = os.environ | {"SLICETUNE_FUZZ": str(FUZZED)}
        done = subprocess.run(command, cwd=TESTS.parent, env=variables, capture_output=True, text=True, check=False)
        times = drawn(done.stdout)
        return times, [] if done.returncode == 0 and times else [done.stdout[-300:]]

    return run


def drawn(statistics: str) -> int:
    """How many inputs hypothesis says that it drew."""
    counts = re.findall(r"(\d+) passing(?: examples)?, (\d+) failing", statistics)
    return sum(int(passed) + int(failed) for passed, failed in counts)


def fuzz(*names: str) -> list[Piece]:
    return [Piece(f"fuzz-{name}", f"random {name.replace('_', ' ')}", fuzzed(name)) for name in names]


def suite(name: str, made: str, *files: str, choose: str = "", **variables: str) -> Piece:
    return Piece(name, f"{made} ({', '.join(files)})", passed(*files, choose=choose, **variables))


KILLED = {"SLICETUNE_JOB_KILLS": str(JOB_KILLS), "SLICETUNE_UNBROKEN": str(RESULTS / "unbroken")}
ROWS: dict[str, list[Piece]] = {
    "1 killed at any moment": [
        *(
            Piece(
                f"saves-{part}",
                "SIGKILL before, halfway and after every write, fsync, rename, mkdir, unlink and rmdir of a save",
                lambda part=part: saves(part, 4),
            )
            for part in range(4)
        ),
        *(
            Piece(
                f"trainings-{part}",
                "SIGKILL at seeded operations of a training with three saves, started again, final weights compared",
                lambda part=part: trainings(part, 8),
            )
            for part in range(8)
        ),
        *(
            suite(
                f"jobs-{trial}",
                "two-rank torchrun jobs, half of them with the model in parts: SIGKILL of a rank, or of agent and "
                "ranks, at seeded times of scoring, training, decoding; started again, statistics, neurons, weights "
                "and translations compared with those of whole replicas",
                "test_signals.py",
                choose=f"killed_job and {trial}",
                **KILLED,
            )
            for trial in range(JOB_KILLS)
        ),
        suite(
            "scoring",
            "SIGKILL of one rank in a scoring pass and in its saves, model whole and in parts, gone on with by 1 or 2",
            "test_kills.py",
            choose="scoring",
            SLICETUNE_KILLS="60",
        ),
    ],
    "2 damaged checkpoint": [
        suite("damage", "cut, zeroed, flipped, missing files; named and not named", "test_checkpoint.py"),
        suite("damage-resumed", "resumed by two ranks", "test_resumes.py", choose="damaged"),
        *fuzz("damaged_checkpoints", "manifests_and_states_of_any_json", "damaged_statistics", "damaged_neuron_sets"),
    ],
    "3 disk full or quota": [
        *(
            Piece(
                f"disk-{errno.errorcode[code]}",
                "ENOSPC, EDQUOT and EIO injected at every operation of a save",
                lambda code=code: disks(code),
            )
            for code in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
        ),
        suite("quota", "the kernel's own limit of a file's size", "test_kills.py", choose="limit", **KILLED),
    ],
    "4 SIGTERM, SIGINT": [
        suite("signals", "twice to one of two ranks, scoring and training", "test_interrupts.py", choose="signal"),
        suite(
            "signals-jobs",
            "two-rank torchrun jobs, the model in parts: to a rank twice and to the agent, scoring, training, "
            "decoding; then finished, and compared with whole replicas",
            "test_signals.py",
            choose="every_stage",
            **KILLED,
        ),
    ],
    "5 one rank raises or hangs": [
        suite("first-error", "torchrun, --max-restarts 1; a time-out", "test_first_error.py", **KILLED),
        suite("restarts", "what an earlier start left in torchrun's store", "test_distributed.py"),
    ],
    "6 NaN or Inf on one rank": [
        suite(
            "nan-stop", "loss or gradient, every stage and dtype: stop", "test_interrupts.py", choose="finite or bf16"
        ),
        suite("nan-skip", "the same: skip, go on, resume", "test_skipping.py"),
    ],
    "7 loss spike": [suite("spikes", "warn, stop, noise", "test_interrupts.py", choose="spike")],
    "8 other ranks or micro-batch": [
        suite("world", "1 → 2 ranks, other micro-batches", "test_resumes.py", choose="rank or micro_batch"),
        suite("world-down", "2 → 1 ranks, other stages", "test_training.py", choose="resume_as_one or another_stage"),
        suite("world-scoring", "1 → 2, 2 → 1 and 2 → 3 ranks in scoring", "test_share.py", choose="go_to or goes_on"),
    ],
    "9 another model, tokenizer, neuron set or setting": [
        suite("identity", "differences shown; state by name", "test_resumes.py", choose="refused or name or another"),
        suite("identity-run", "a setting of a finished stage", "test_run.py", choose="changed_setting"),
    ],
    "10 epoch's end, last step": [
        suite("ends", "resumed there", "test_resumes.py", choose="epochs_end or last_step"),
        suite("ends-run", "a finished run started again", "test_run.py", choose="finished_run"),
    ],
    "11 data": [
        suite("data", "files with each fault", "test_corpus.py"),
        *fuzz("json_lines", "aligned_files", "damaged_gzip"),
    ],
    "12 prompts": [suite("prompts", "templates, lengths, special tokens", "test_prompts.py"), *fuzz("prompts")],
    "13 selections": [
        suite("information", "bins and information by the definition", "test_information.py"),
        suite("selection", "ratios, ties, NaN, constants, empty layers", "test_selection.py"),
        *fuzz("forged_statistics"),
    ],
    "14 model folders": [
        suite("folders", "as a stranger could make them; the source itself", "test_hostile.py"),
        suite(
            "folders-in-parts",
            "a fault in one rank's part: all ranks say it",
            "test_large.py",
            choose="said or differs",
        ),
    ],
    "15 environment": [
        suite("doctor", "wrong kernels, old libraries, little room", "test_doctor.py"),
        suite("locks", "two runs in one --out; ports; endings", "test_endings.py"),
    ],
    "any: settings and records": fuzz("settings", "stage_records_of_any_json"),
    "determinism": [suite("deterministic", "two runs compared; what they write", "test_deterministic.py")],
}

# ---------------------------------------------------------------- results and the table


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=TESTS, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "-"


def read(name: str) -> dict[str, Any]:
    """A piece's result; empty if there is none."""
    try:
        return json.loads((RESULTS / f"{name}.json").read_text())
    except (OSError, ValueError):
        return {}


def make(piece: Piece, at: str) -> None:
    """Run a piece and keep its result."""
    print(f"{piece.name}: {piece.made}", flush=True)
    start = time.monotonic()
    times, wrong = piece.run()
    result = {"times": times, "wrong": wrong, "commit": at, "seconds": round(time.monotonic() - start)}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{piece.name}.json").write_text(json.dumps(result, indent=1))
    print(f"{piece.name}: {times} times in {result['seconds']} s, {wrong[0] if wrong else 'as promised'}", flush=True)


def line(fault: str, made: str, found: list[dict[str, Any]]) -> str:
    """One row: pieces that made the same fault in the same way, together."""
    wrong = [problem for result in found for problem in result.get("wrong", [])]
    missing = sum(not result for result in found)
    outcome = f"{len(wrong)} WRONG, the first: {wrong[0][:200]}" if wrong else "as promised"
    outcome = f"NOT RUN: {missing} of {len(found)} pieces" if missing else outcome
    at = ", ".join(sorted({result["commit"] for result in found if result})) or "-"
    times = sum(result.get("times", 0) for result in found)
    return f"| {fault} | {made} | {times} | {' '.join(outcome.split()).replace('|', '/')} | {at} |"


def table(rows: dict[str, list[Piece]]) -> str:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "deepspeed")]
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}"
    about = "Generated by `make faults` (tests/faults/campaign.py). "
    about += "Every fault is made for real, with real processes, signals"
    lines = ["# Faults that were made, and what happened", "", f"{about} and files. {machine}, {', '.join(versions)}."]
    lines += ["", "| fault | how it was made | times | what happened | at commit |", "|---|---|---|---|---|"]
    for fault, pieces in rows.items():
        for made in dict.fromkeys(piece.made for piece in pieces):
            lines.append(line(fault, made, [read(piece.name) for piece in pieces if piece.made == made]))
    every = [piece.name for pieces in rows.values() for piece in pieces if piece.name.startswith("fuzz-")]
    lines += ["", f"Random inputs in all: {sum(read(name).get('times', 0) for name in every):,}."]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Make every fault; write tests/faults/FAULTS.md.")
    parser.add_argument("--only", nargs="+", default=[], metavar="N", help="numbers of faults, or names of pieces")
    parser.add_argument("--keep", action="store_true", help="do not run again what another commit ran")
    parser.add_argument("--table", action="store_true", help="write the table of the results that there are")
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    at = commit()
    for fault, pieces in ROWS.items():
        for piece in pieces:
            wanted = not given.only or fault.split()[0] in given.only or piece.name in given.only
            done = read(piece.name)
            if wanted and not given.table and not (done and not done["wrong"] and (given.keep or done["commit"] == at)):
                make(piece, at)
    text = table(ROWS)
    (TESTS / "faults/FAULTS.md").write_text(text)
    print(text)
    return int("WRONG" in text)


if __name__ == "__main__":
    sys.exit(main())
