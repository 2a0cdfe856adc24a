"""What a run found, for reading: a table for the terminal and report.html, one file that needs nothing beside it.

    print(table(results))
    write_report("runs/caneft")      # reads config.json, metrics.jsonl, results.json, neurons.safetensors, analyses/

A part whose artefact is missing is left out of the page; results.json must be there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from ...common.files import write_text
from ...data import languages
from ...slices.neurons import NeuronSet
from . import page, sections
from .page import aligned
from .sections import (
    Artefacts,
    comet_line,
    cut_line,
    domain_name,
    duration,
    metrics,
    score_rows,
    signed,
    system_name,
)


def table(results: Mapping[str, Any]) -> str:
    """Scores of every domain and system with averages, trainable parameters, time and memory by stage, the report.

    The last system is compared with the first where there are several.
    """
    systems = results["systems"]
    names = list(systems)
    shown = metrics(results)
    head = ["", "n", *(f"{system_name(name)} {label}" for _, label in shown for name in names)]
    if len(names) > 1:
        head += [f"{label} change" for _, label in shown]
    rows: list[list[str]] = [head, []]
    for kind, name, n, scores in score_rows(results):
        if kind in ("mean", "all"):
            rows.append([])
        values = [f"{score[metric]:.2f}" if score else "-" for metric, _ in shown for score in scores]
        cells = [name, f"{n:,}" if n else "", *values]
        if len(names) > 1:
            cells += [f"{scores[-1][m] - scores[0][m]:+.2f}" if scores[0] and scores[-1] else "-" for m, _ in shown]
        rows.append(cells)
    lines = aligned(rows)
    lines += ["", *(f"signature             {line}" for line in signed(results))]
    lines += [f"cut at the limit      {line}" for line in [cut_line(results)] if line]
    lines += [f"measured on           {measured_on(results)}"] if "measured_on" in results else []
    lines += [f"trainable parameters  {results['trainable_parameters']:,}"]
    if results.get("seconds"):
        stages = " · ".join(f"{stage} {duration(seconds)}" for stage, seconds in results["seconds"].items())
        lines.append(f"time                  {stages} · all {duration(sum(results['seconds'].values()))}")
    if peaks := results.get("peak_memory"):
        stages = " · ".join(f"{stage} {size / 1e9:.2f}" for stage, size in peaks.items())
        lines.append(f"peak memory, GB       {stages}")
    if line := comet_line(results):
        lines.append(f"COMET                 {line}")
    if results.get("report"):
        lines.append(f"report                {results['report']}")
    return "\n".join(lines)


def write_report(out_dir: str | os.PathLike[str]) -> Path:
    """Write `out_dir`/report.html from the run's artefacts; returns its path. Raises UserError without results."""
    run = Artefacts.read(Path(out_dir))
    data = run.config.get("data", {})
    pair = " → ".join(languages.name_of(code) for code in data.get("pair", "").split("-") if code)
    if data.get("pairs"):
        pair = " ".join(data["pairs"])
    title = ": ".join(part for part in (run.method, pair) if part) or "Report"
    when = datetime.fromtimestamp((run.folder / "results.json").stat().st_mtime)
    model = run.config.get("model", {}).get("path", "")
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{f"Model {escape(model)}, r" if model else "R"}esults of {when:%-d %B %Y, %H:%M}</p>',
        f"<p>{escape(describe(run))}</p>",
        page.facts(sections.facts(run)),
        page.section("Translation quality", sections.quality(run)),
        page.section("Loss", sections.loss(run)),
        page.section("Chosen neurons", sections.neurons(run)),
        page.section("Time and memory", sections.time(run)),
        page.section("Translations", *sections.translations(run)),
        page.section("Analyses", *sections.analyses(run)),
        page.section("How it was made", sections.signatures(run), *sections.settings(run)),
    ]
    path = run.folder / "report.html"
    write_text(path, page.page(title, body))
    return path


def describe(run: Artefacts) -> str:
    """The run in words."""
    results, data, train = run.results, run.config.get("data", {}), run.config.get("train", {})
    seen = list(dict.fromkeys(domain_name(name.rpartition("/")[2]) for name in results["seen"]))
    text = f"{run.method} on {len(seen)} domain{'s' * (len(seen) != 1)} ({', '.join(seen)})"
    if "pairs" in results:
        text += f" of {len(results['pairs'])} direction{'s' * (len(results['pairs']) != 1)}"
    if run.neurons is not None and data.get("score_sentences"):
        text += f", up to {data['score_sentences']:,} sentences each scored"
    if results.get("train_sentences"):
        text += f", up to {results['train_sentences']:,} sentences each trained"
    text += ". "
    if not results["trainable_parameters"]:
        return f"{text}No weight was trained.{_gain(run)}"
    if run.neurons is not None:
        text += f"{_chosen(run.neurons)} were chosen; their "
    text += f"{results['trainable_parameters']:,} weights were trained"
    steps = max((row["step"] for row in run.metrics), default=0)
    if steps:
        text += f" for {steps:,} steps of {train.get('global_batch_size', '?')} sentences"
    text += f" at learning rate {results.get('learning_rate', train.get('learning_rate', '?'))}"
    text += "; every other weight is the base model's." if run.neurons is not None else "."
    if "measured_on" in results:
        text += f" Measured on {measured_on(results)}."
    return text + _gain(run)


def measured_on(results: Mapping[str, Any]) -> str:
    """Of a run on a quantised base, the weights that decoded."""
    kind, on = results["quantize"], results["measured_on"]
    if on == "full":
        return f"models in full precision; the training was on the base in {kind}"
    return f"the base in {kind}; what was trained is in full precision. --evaluate.on full measures the export"


def _chosen(neurons: NeuronSet) -> str:
    if any(axis == "column" for _, axis in neurons.counts()):
        return f"{neurons.count:,} slices of FFN units"
    return f"{neurons.count:,} of {neurons.total:,} neurons ({neurons.count / neurons.total:.2%})"


def _gain(run: Artefacts) -> str:
    systems = list(run.results["systems"].values())
    if len(systems) < 2:
        return ""
    parts = []
    for part in ("seen", "unseen"):
        old, new = (system["averages"].get(part) for system in (systems[0], systems[-1]))
        if old and new:
            gain = f"{new['bleu'] - old['bleu']:+.2f}".replace("-", "−")
            parts.append(f"{old['bleu']:.2f} to {new['bleu']:.2f} on {part} domains ({gain})")
    return f" BLEU went from {' and from '.join(parts)}." if parts else ""
