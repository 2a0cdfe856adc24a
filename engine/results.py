"""results.json: what every system scores on every domain, and what training it took, from a run's artefacts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .config import DataConfig
from .corpus import Pair
from .evaluation import score_system
from .neurons import NeuronSet
from .translation import write_lines


def write_sides(out: Path, data: DataConfig, pairs: Mapping[str, Sequence[Pair]]) -> None:
    """Sources and references beside the systems' translations, for the report and for sacrebleu's command line."""
    for domain, of in pairs.items():
        for kind, code in (("source", data.source), ("reference", data.target)):
            texts = (pair.source if kind == "source" else pair.target for pair in of)
            write_lines(out / "translations" / kind / f"{domain}.{code}", [" ".join(t.splitlines()) for t in texts])


def scores(out: Path, data: DataConfig, systems: Sequence[str], pairs: Mapping[str, Sequence[Pair]]) -> dict[str, Any]:
    """Every system's translations in `out` against the references."""
    references = {domain: [pair.target for pair in of] for domain, of in pairs.items()}
    found = {}
    for system in systems:
        folder = out / "translations" / system
        files = {d: folder / f"{d}.{data.target}" for d in data.domains}
        lines = {d: file.read_text(encoding="utf-8").split("\n")[:-1] for d, file in files.items()}
        found[system] = score_system(lines, references, data.target, data.seen, data.unseen)
    return {"systems": found, "seen": list(data.seen), "unseen": list(data.unseen)}


def training(out: Path) -> dict[str, Any]:
    """Parameters, rate, speed and memory of a finished training; zeros where nothing was trained."""
    if not (out / "chosen.json").is_file():
        return {"trainable_parameters": 0, "added_parameters": 0}
    chosen = json.loads((out / "chosen.json").read_text())
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rates = sorted(row["tokens_per_second"] for row in rows if "tokens_per_second" in row)
    kept = ("trainable_parameters", "added_parameters", "learning_rate", "peak_memory_bytes")
    facts = {name: chosen[name] for name in kept}
    facts |= {"tokens_per_second": rates[len(rates) // 2], "sweep": chosen["dev_loss"]}
    if (out / "neurons.safetensors").is_file():
        neurons = NeuronSet.load(out / "neurons.safetensors")
        facts |= {"neurons": neurons.count, "total_neurons": neurons.total}
    return facts
