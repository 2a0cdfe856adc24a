"""Run the benchmarks, a suite a process, and write results/*.json, RESULTS.md and a log.

    python bench/run.py cpu --plots                 # make bench
    python bench/run.py gpu --out DIR               # make gpu: kernel tests, kernels, optimizer, whole step; 240 s
    python bench/run.py gpu-record                  # make gpu-record: the figures to keep, the 24 GB rows; 280 s
    python bench/run.py gpu-peers                   # make gpu-peers: torch.compile of a kernel, Liger, DoRA, SHiRA
    python bench/run.py cpu methods --seconds 200   # one suite of plan.py, or one file; the others' results stay
    python bench/run.py tune                        # make tune: tune.py, the tiles in doubt
    python bench/run.py gpu-run                     # make gpu-run: recipe.py, one recipe end to end

Works from a plain checkout with nothing installed: slicetune.engine and slicetune.kernels are made importable for
this run by links in a temporary folder. WHEELS=DIR names a folder of *.whl for what this Python lacks (for gpu-run
tyro, deepspeed, sacrebleu and what they want; for gpu-peers liger-kernel), which are unpacked there too. Suites run
until --seconds are over; those that no longer fit are named. What fails is reported and does not stop the rest.
SLICETUNE_COMMIT names the commit where there is no git.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import launch
import plan
from launch import BENCH, Result

MODES = tuple(plan.SECONDS)
SMOKE = os.environ.get("SLICETUNE_BENCH") == "smoke"


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("suites", nargs="*", help="suites or files; all of the mode by default")
    parser.add_argument("--out", type=Path, default=BENCH, help="folder of all that is written")
    parser.add_argument("--seconds", type=float, help="be done in this time")
    parser.add_argument("--plots", action="store_true", help="draw them into RESULTS.md")
    parser.add_argument("--target", help="of tune: list what fits on this part")
    options = parser.parse_intermixed_args(given)
    options.seconds = options.seconds or plan.SECONDS[options.mode]
    options.out = options.out.resolve()
    try:
        if options.mode in plan.SUITES:
            options.suites = plan.named(options.mode, [Path(name).name for name in options.suites])
    except ValueError as error:
        parser.error(str(error))
    return options


class Run:
    """The suites of one command, one after another within its seconds."""

    def __init__(self, options: argparse.Namespace, env: dict[str, str], end: float) -> None:
        from screen import Screen

        self.options, self.env, self.end, self.screen = options, env, end, Screen()
        self.mode, self.path = options.mode, options.out / "results"
        self.log = options.out / f"{self.mode}.log"
        self.log.write_text("")
        self.found: dict[str, Result] = {}
        self.tests: dict[str, str] = {}
        self.left_out: list[str] = []

    def all(self) -> bool:
        """Run what fits; whether all of that went well."""
        suites = self.options.suites
        if SMOKE and all(suite.name != "tests" for suite in suites):
            share = max(1.0, self.end - time.monotonic() - plan.RESERVE)
            self.suite("+".join(suite.name for suite in suites), [p for s in suites for p in s.paths], share)
            suites = ()
        for i, suite in enumerate(suites):
            share = plan.shares(suites[i:], self.end - time.monotonic())[0]
            if share:
                self.suite(suite.name, suite.paths, share)
            else:
                self.left_out.append(suite.name)
        return not any(each["failure"] for each in self.found.values()) and set(self.tests.values()) <= {"passed"}

    def suite(self, name: str, paths: Sequence[str], seconds: float) -> None:
        begin, started = self.log.stat().st_size, time.monotonic()
        if name == "tests":
            failure = launch.kernel_tests(self.env, seconds, self.log)
            self.tests = {"kernels compiled for this GPU": failure or "passed"}
        else:
            self.found[name] = launch.measure(paths, self.env, seconds, self.log, lambda r: self.keep(name, r))
            failure = self.found[name]["failure"]
        self.keep()
        self.report(name, failure, time.monotonic() - started, begin)

    def keep(self, name: str = "", result: Result | None = None) -> None:
        found = self.found | ({name: result} if result else {})
        self.path = launch.save(self.options.out / "results", self.mode, found, self.tests)

    def report(self, name: str, failure: str, took: float, begin: int) -> None:
        from screen import tables, tail

        self.screen.say(f"[{self.mode}] {name}: {failure or 'done'}, {took:.0f} s")
        for table in tables(self.found.get(name, {}).get("rows", [])).split("\n["):
            self.screen.say(table if table.startswith("[") else f"[{table}")
        if failure or name == "tests":
            self.screen.say(tail(self.log, begin, 25 if failure else 1))


def benchmarks(options: argparse.Namespace, env: dict[str, str], end: float) -> int:
    from screen import targets

    run = Run(options, env, end)
    good = run.all()
    more = ["--plots"] if options.plots else []
    subprocess.run([sys.executable, str(BENCH / "report.py"), str(options.out), *more], env=env, check=False)
    rows = [row for each in run.found.values() for row in each["rows"]]
    print(targets(rows, "gpu" if options.mode == "gpu-record" else options.mode))
    left = f"; left out for want of time: {' '.join(run.left_out)}" if run.left_out else ""
    print(f"[{options.mode}] {run.path}, RESULTS.md and {run.log.name}{left}")
    return int(not good)


def main() -> int:
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a suite that runs is ended too
    options = arguments()
    lists = options.mode == "tune" and options.target
    if options.mode != "cpu" and not SMOKE and not lists and not shutil.which("nvidia-smi"):
        print(f"[{options.mode}] no NVIDIA GPU here (no nvidia-smi)")
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as links:
        env, end = launch.environment(options.mode, Path(links)), started + options.seconds
        wheels = os.environ.get("WHEELS")
        if wheels and (failure := launch.unpack(Path(wheels), env)):
            print(f"[{options.mode}] WHEELS={wheels}: {failure}")
            return 1
        if options.mode == "gpu-run":
            import recipe

            return recipe.run(env, options.out, end)
        if options.mode == "tune":
            command = [sys.executable, str(BENCH / "tune.py"), "--seconds", str(end - time.monotonic())]
            command += ["--out", str(options.out), *(["--target", options.target] if options.target else [])]
            return subprocess.run(command, env=env).returncode
        return benchmarks(options, env, end)


if __name__ == "__main__":
    raise SystemExit(main())
