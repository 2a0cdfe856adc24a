"""What every client's program is given and what it says. Needs no package.

with_NAME.py WORK reads WORK/truth.json and prints its rows; the driver reads the last line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORK = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else Path()
MARK = "RESULT "
ROWS: list[dict[str, Any]] = []


def truth() -> dict[str, Any]:
    """What transformers gives in slicetune's own Python: material.py has the fields."""
    return json.loads((WORK / "truth.json").read_text())


def row(what: str, found: str, good: bool) -> None:
    """A line of the table: what is done, what was found, whether it is as it should be."""
    ROWS.append({"what": what, "found": found, "good": bool(good)})
    print(f"[{'ok' if good else 'WRONG'}] {what}: {found}", flush=True)


def tokens_row(what: str, got: Sequence[Sequence[int]], system: str) -> None:
    """Greedy tokens of every prompt, against those of transformers; what follows the end token is cut off."""
    known = truth()
    pairs = list(zip(got, known["tokens"][system], strict=True))
    same = sum(cut(a, known["end"]) == b for a, b in pairs)
    count = sum(len(b) for _, b in pairs)
    row(what, f"{same} of {len(pairs)} translations equal ({count} tokens)", same == len(pairs))


def zero_row(what: str, difference: float, moved: float, allowed: float = 0.0, note: str = "") -> None:
    """A largest difference of logits, beside how far training has moved them."""
    good = difference <= allowed and moved > 0
    row(what, f"largest difference of logits {difference:.3g} (training moved them by {moved:.3g}){note}", good)


def cut(ids: Sequence[int], end: Sequence[int]) -> list[int]:
    """The ids before the first end token."""
    stop = next((i for i, token in enumerate(ids) if token in end), len(ids))
    return [int(token) for token in ids[:stop]]


def finish(*packages: str) -> None:
    """The line that the driver reads: versions and rows."""
    from importlib.metadata import version

    print(MARK + json.dumps({"versions": {name: version(name) for name in packages}, "rows": ROWS}), flush=True)
