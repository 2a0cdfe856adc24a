"""sacreBLEU's command on the files of translations/: scores and signatures of results.json."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from shared import WORK, finish, row

RUN = WORK / "run"


def command(reference: Path, translation: Path, metric: str, smooth: str) -> dict[str, Any]:
    """What `sacrebleu REFERENCE -i TRANSLATION -m METRIC` says; the width of 17 digits is all that a float has."""
    words = [reference, "-i", translation, "-m", metric, "-f", "json", "-w", "17"]
    words += ["--smooth-method", smooth] if metric == "bleu" else []
    program = Path(sys.executable).with_name("sacrebleu")
    said = subprocess.run([program, *map(str, words)], check=True, capture_output=True, text=True).stdout
    return json.loads(said)


def main() -> None:
    found = json.loads((RUN / "results.json").read_text())
    config = json.loads((RUN / "config.json").read_text())
    target = config["data"]["pair"].split("-")[1]
    smooth = config["evaluate"]["smooth"]
    for metric in ("bleu", "chrf"):
        scores, signatures, files = 0, 0, 0
        for system, parts in found["systems"].items():
            for domain, kept in parts["domains"].items():
                reference = RUN / "translations" / "reference" / f"{domain}.{target}"
                said = command(reference, RUN / "translations" / system / f"{domain}.{target}", metric, smooth)
                files += 1
                scores += float(said["score"]) == kept[metric]
                signatures += said["signature"] == kept["signatures"][metric]
        what = f"{metric} of every system and domain, by the command line"
        good = scores == signatures == files > 0
        row(what, f"{scores} of {files} scores equal to the last digit, {signatures} signatures equal", good)
    finish("sacrebleu")


if __name__ == "__main__":
    main()
