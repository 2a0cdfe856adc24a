"""A FAKE of COMET's environment, for tests of what goes between the two processes: it knows nothing of translation.

    python tests/support/fake_comet.py -I engine/evaluation/comet_program.py < job.json  # as comet.py calls it

A sentence's score is the share of its characters that its source (if the model's name says so: its reference) has too.
A model called `gated`, `crash` or `slow` fails as the real program does, dies, or takes too long.
"""

import json
import os
import sys
import time


def lines(file: str) -> list[str]:
    with open(file, encoding="utf-8") as opened:
        return opened.read().split("\n")[:-1]


job = json.load(sys.stdin)
name = os.path.basename(job["model"])
if name == "gated":
    sys.exit(print("a warning\nerror: gated is gated: accept its licence", file=sys.stderr) or 2)
if name == "crash":
    sys.exit(print("Traceback\nSomeError: nobody knows", file=sys.stderr) or 1)
if name == "slow":
    time.sleep(60)
ranks = sorted(v for v in os.environ if v in ("RANK", "WORLD_SIZE", "MASTER_PORT", "PYTHONPATH", "SLURM_PROCID"))
assert not ranks, f"{ranks}: Lightning would look for other ranks"
found = {"model": job["model"], "references": "reference" in name, "version": "fake", "systems": {}}
for system, files in job["systems"].items():
    for domain, file in files.items():
        beside = lines(job["reference" if found["references"] else "source"][domain])
        pairs = list(zip(lines(file), beside, strict=True))
        segments = [len(set(a) & set(b)) / (len(set(a)) or 1) for a, b in pairs]
        score = {"score": sum(segments) / len(segments), "segments": segments}
        found["systems"].setdefault(system, {})[domain] = score
with open(job["out"], "w") as out:
    json.dump(found, out)
