"""results.json: what every system scores on every domain, and what training it took, from a run's artefacts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..common.files import read_lines, write_lines
from ..data.config import DataConfig
from ..data.records import Pair
from ..slices.neurons import NeuronSet
from .bleu import mean, score_system
from .translation import cut_lines


def translations(out: Path, system: str, name: str, language: str) -> Path:
    """The line-aligned file of a system's translations; `name` is the domain's in the run."""
    return out / "translations" / system / f"{name}.{language}"


def write_sides(out: Path, tests: Mapping[str, Sequence[Pair]]) -> None:
    """Sources and references beside the systems' translations, for the report and for sacrebleu's command line."""
    for name, of in tests.items():
        for side, kind in enumerate(("source", "reference")):
            texts = (getattr(pair, "target" if side else "source") for pair in of)
            path = translations(out, kind, name, of[0].languages[side])
            write_lines(path, [" ".join(t.splitlines()) for t in texts])


def scores(
    out: Path,
    directions: Sequence[DataConfig],
    systems: Sequence[str],
    tests: Mapping[str, Sequence[Pair]],
    smooth: str = "exp",
) -> dict[str, Any]:
    """Every system's translations in `out` against the references; domains go by their names in the run.

    A domain's `cut` is how many translations the model had not ended at --evaluate.max-new-tokens.
    With several directions `pairs` names the domains of each, and a system's `pairs` are the means over them.
    """
    seen, unseen = ([d.name(domain) for d in directions for domain in getattr(d, part)] for part in ("seen", "unseen"))
    references = {name: [pair.target for pair in pairs] for name, pairs in tests.items()}
    languages = {name: pairs[0].languages[1] for name, pairs in tests.items()}
    found = {}
    for system in systems:
        lines = {name: read_lines(translations(out, system, name, code)) for name, code in languages.items()}
        found[system] = score_system(lines, references, languages, seen, unseen, smooth)
        cut = cut_lines(out / "translations" / system)
        for name, code in languages.items():
            count = cut.get(f"{name}.{code}")
            found[system]["domains"][name] |= {} if count is None else {"cut": count}
    whole: dict[str, Any] = {"systems": found, "seen": seen, "unseen": unseen}
    if directions[0].pairs:
        whole["pairs"] = {d.pair: [d.name(domain) for domain in d.domains] for d in directions}
        for scored in found.values():
            scored["pairs"] = {p: mean([scored["domains"][n] for n in names]) for p, names in whole["pairs"].items()}
    return whole


def training(out: Path) -> dict[str, Any]:
    """Parameters, rate, speed and memory of a finished training; zeros where nothing was trained."""
    if not (out / "chosen.json").is_file():
        return {"trainable_parameters": 0, "added_parameters": 0}
    chosen = json.loads((out / "chosen.json").read_text())
    try:
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        rows = []
    if not any("tokens_per_second" in row for row in rows):
        raise UserError(f"{out / 'metrics.jsonl'}: not what training leaves: train again in a new --out")
    rates = sorted(row["tokens_per_second"] for row in rows if "tokens_per_second" in row)
    kept = ("trainable_parameters", "added_parameters", "learning_rate", "peak_memory_bytes")
    facts = {name: chosen[name] for name in kept}
    facts |= {"tokens_per_second": rates[len(rates) // 2], "sweep": chosen["dev_loss"]}
    facts["skipped_steps"] = max(row.get("skipped_steps", 0) for row in rows)
    if (out / "neurons.safetensors").is_file():
        neurons = NeuronSet.load(out / "neurons.safetensors")
        facts |= {"neurons": neurons.count, "total_neurons": neurons.total}
    return facts


def dev_loss(results: Mapping[str, Any]) -> float:
    """The lowest that was reached at the rate that was taken, nats a target token; infinite without dev sentences."""
    return results["sweep"][f"{results['learning_rate']}"]
