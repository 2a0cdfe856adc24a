"""The sections of report.html, each from a run's artefacts; one whose artefact is missing is empty.

run.py puts them on a page; the figures are drawn by figures.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import torch

from ...common.files import read_lines
from ...data import languages
from ...slices.neurons import NeuronSet
from . import page
from .artefacts import Artefacts, system_name
from .figures import heat_map, loss_chart

BINS = 15
"""Index bins of a projection in the map of neurons (CANEFT, Fig. 3)."""
SAMPLES = 5
"""Sentences of each domain whose translations are shown."""
METRICS = (("bleu", "BLEU"), ("chrf", "chrF"))
COMET = ("comet", "COMET")


def score_rows(results: Mapping[str, Any]) -> Iterator[tuple[str, str, int, list[dict[str, Any]]]]:
    """Rows of a table of scores: (kind, name, sentences, each system's scores or {}).

    Kinds: `domain`, `beside` (BLEU of the row above with tokenizer 13a, where it has another), `mean`, `all`. Of
    several directions the domains stand by direction, each with its mean.
    """
    systems = list(results["systems"].values())
    for part, names in score_parts(results).items():
        for name in names:
            scores = [system["domains"].get(name, {}) for system in systems]
            n = next((score["n"] for score in scores if score), 0)
            yield from _beside("domain", domain_name(name), n, scores)
        if "pairs" not in results or len(names) > 1:
            kept = "pairs" if "pairs" in results else "averages"
            yield from _beside("mean", f"{part}, mean", 0, [system[kept].get(part, {}) for system in systems])
    rest = ("seen", "unseen") if results["unseen"] and "pairs" in results else ()
    for part in (*rest, *["all"] * bool(results["seen"] and (results["unseen"] or "pairs" in results))):
        yield from _beside("all", f"{part}, mean", 0, [system["averages"].get(part, {}) for system in systems])


def score_parts(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """Domains as a table of scores has them: by direction where there are several, else seen and unseen."""
    return results.get("pairs") or {part: results[part] for part in ("seen", "unseen")}


def _beside(
    kind: str, name: str, n: int, scores: list[dict[str, Any]]
) -> Iterator[tuple[str, str, int, list[dict[str, Any]]]]:
    """A row if any system has scores for it, and one below it where BLEU has a tokenizer of the language's own."""
    if kind == "domain" or any(scores):
        yield kind, name, n, scores
    if any("bleu_13a" in score for score in scores):
        yield (
            "beside",
            f"{name}, tok 13a",
            0,
            [score | {"bleu": score["bleu_13a"]} if score else {} for score in scores],
        )


def domain_name(name: str) -> str:
    """A domain's name in the run as it is written: `de-en/tatoeba` → `de-en everyday`."""
    pair, _, domain = name.rpartition("/")
    return f"{pair} {languages.DOMAINS.get(domain, domain)}".strip()


def metrics(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(key, label) of the metrics that these results have."""
    scores = [score for system in results["systems"].values() for score in system["domains"].values()]
    return [*METRICS, *([COMET] if scores and all("comet" in score for score in scores) else [])]


def comet_line(results: Mapping[str, Any]) -> str:
    """Which model COMET's scores are of, or why there are none; empty where nobody asked."""
    said = results.get("comet")
    if not said:
        return ""
    if "missing" in said:
        return f"{said['model']} is not computed: {said['missing']}"
    kind = "with references" if said["references"] else "without references"
    return f"{said['model']}, {kind}, × 100 (unbabel-comet {said['version']})"


def duration(seconds: float) -> str:
    """8.1 s, 3 min 12 s, 1 h 02 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def facts(run: Artefacts) -> list[tuple[str, str]]:
    results = run.results
    rows = [("trainable parameters", f"{results['trainable_parameters']:,}")]
    rows.append(("added parameters", f"{results.get('added_parameters', 0):,}"))
    if results.get("neurons"):
        rows.append(("neurons", f"{results['neurons']:,}"))
    if results.get("peak_memory_bytes"):
        rows.append(("peak memory, training", f"{results['peak_memory_bytes'] / 1e9:.2f} GB"))
    if results.get("tokens_per_second"):
        rows.append(("training speed", f"{results['tokens_per_second']:,.0f} tokens/s"))
    if results.get("seconds"):
        rows.append(("time", duration(sum(results["seconds"].values()))))
    return rows


def quality(run: Artefacts) -> str:
    """The table of scores: every system, the difference to the first one beside each other."""
    names = [system_name(name) for name in run.results["systems"]]
    span, shown = 2 * len(names) - 1, metrics(run.results)
    first = "<tr><th></th><th></th>" + "".join(f'<th colspan="{span}">{label}</th>' for _, label in shown) + "</tr>"
    one = f"<th>{escape(names[0])}</th>" + "".join(f"<th>{escape(name)}</th><th>change</th>" for name in names[1:])
    head = f"{first}<tr><th>domain</th><th>sentences</th>{one * len(shown)}</tr>"
    rows = []
    for kind, name, n, scores in score_rows(run.results):
        cells = [escape(name), f"{n:,}" if n else ""]
        for metric, _ in shown:
            for i, score in enumerate(scores):
                cells.append(f"{score[metric]:.2f}" if score else "–")
                if i:
                    cells.append(page.change(score[metric] - scores[0][metric]) if score and scores[0] else "")
        rows.append(({"mean": "mean", "all": "mean all"}.get(kind, ""), cells))
    cut = cut_line(run.results)
    note = f'<p class="soft">Translations cut at --evaluate.max-new-tokens: {escape(cut)}</p>' if cut else ""
    return page.table(head, rows) + note


def loss(run: Artefacts) -> str:
    train = [(row["step"], row["loss"]) for row in run.metrics if isinstance(row.get("loss"), float)]
    dev = [(row["step"], row["dev_loss"]) for row in run.metrics if isinstance(row.get("dev_loss"), float)]
    chart = loss_chart(train, dev)
    return f"<figure>{chart}</figure>" if chart else ""


def bin_counts(neurons: NeuronSet, projection: str, axis: str, bins: int = BINS) -> list[list[int]]:
    """Chosen slices by layer and index bin: `bins` equal parts of the projection (Fig. 3)."""
    width = (neurons.widths if axis == "row" else neurons.fan_in)[projection]
    bins = min(bins, width)
    empty = torch.empty(0, dtype=torch.int64)
    parts = (neurons.slices.get((layer, projection, axis), empty) for layer in range(neurons.layers))
    return [torch.bincount(index * bins // width, minlength=bins).tolist() for index in parts]


def neurons(run: Artefacts) -> str:
    chosen = run.neurons
    if chosen is None or not chosen.count:
        return ""
    rows = dict.fromkeys((projection, "row") for projection in chosen.widths)
    panels = {key: bin_counts(chosen, *key) for key in rows | chosen.counts()}
    names = [projection if axis == "row" else f"{projection} columns" for projection, axis in panels]
    by_layer = [[sum(counts[layer]) for counts in panels.values()] for layer in range(chosen.layers)]
    maps = [f"<figure><h3>per layer</h3>{heat_map(by_layer, names, numbers=True)}</figure>"]
    most = max(n for counts in panels.values() for row in counts for n in row)
    for (projection, axis), counts, name in zip(panels, panels.values(), names, strict=True):
        width = (chosen.widths if axis == "row" else chosen.fan_in)[projection]
        total = sum(map(sum, counts))
        caption = f"{total:,} of {width * chosen.layers:,} ({total / (width * chosen.layers):.2%})"
        picture = heat_map(counts, [""] * len(counts[0]), most)
        maps.append(f"<figure><h3>{escape(name)}</h3>{picture}<figcaption>{caption}</figcaption></figure>")
    note = (
        f"Layers run from 0 (top) down. On the right each projection's neurons by index, in {BINS} equal parts; one "
        f"scale for all, the strongest colour is {most:,} neurons. A cell's number shows when the pointer rests on it."
    )
    text = f"<pre>{escape(chosen.describe())}</pre>"
    table = page.details("Counts by third of the depth, and where the set comes from", text)
    return f'<p class="soft">{note}</p><div class="maps">{"".join(maps)}</div>{table}'


def time(run: Artefacts) -> str:
    """Every stage's wall time, and its peak memory where the run measured it."""
    seconds, peaks = run.results.get("seconds") or {}, run.results.get("peak_memory") or {}
    most, rows = max(seconds.values(), default=0.0) or 1.0, []
    for stage, spent in seconds.items():
        memory = [f"{peaks[stage] / 1e9:.2f} GB" if stage in peaks else ""] * bool(peaks)
        bar = f'<span class="bar" style="width:{100 * spent / most:.1f}%"></span>'
        rows.append(("", [escape(stage), duration(spent), *memory, bar]))
    return page.table("", rows, "bars") + _peaks_note(run) if rows else ""


def _peaks_note(run: Artefacts) -> str:
    if not run.results.get("peak_memory"):
        return ""
    ranks = run.results.get("ranks", 1)
    rank = f"the rank that held most, of {ranks}" if ranks > 1 else "the one rank"
    return f'<p class="soft">Memory: the peak of {rank}; allocated on its GPU, or resident on a CPU.</p>'


def translations(run: Artefacts) -> list[str]:
    """The first test sentences that the systems translate differently, collapsed by domain.

    Source and reference stand above them where the run keeps these beside its translations.
    """
    pair, parts = run.config.get("data", {}).get("pair", ""), []
    for domain in dict.fromkeys(name for names in score_parts(run.results).values() for name in names):
        source, _, target = (domain.rpartition("/")[0] or pair).partition("-")
        folders = {"source": source, "reference": target, **dict.fromkeys(run.results["systems"], target)}
        paths = {name: run.folder / "translations" / name / f"{domain}.{code}" for name, code in folders.items()}
        lines = {name: read_lines(path) for name, path in paths.items() if path.is_file()}
        systems = [lines[name] for name in run.results["systems"] if name in lines]
        if not systems:
            continue
        differ = [i for i, each in enumerate(zip(*systems, strict=False)) if len(each) == 1 or len(set(each)) > 1]
        title = f"{domain_name(domain)}: {len(differ):,} of {len(systems[0]):,} sentences differ"
        inside = page.table("", (row for i in differ[:SAMPLES] for row in _sentence(i, lines)), "text")
        parts.append(page.details(title if len(systems) > 1 else domain_name(domain), inside))
    return parts


def _sentence(i: int, lines: Mapping[str, list[str]]) -> Iterator[tuple[str, list[str]]]:
    """A sentence's rows: its number beside the first, one row a system."""
    for place, (name, texts) in enumerate(lines.items()):
        label = f"{i + 1} {system_name(name)}" if place == 0 else system_name(name)
        yield "more" if place else "", [escape(label), escape(texts[i])]


def analyses(run: Artefacts) -> Iterator[str]:
    """What the run was asked: of each page in its `analyses/` the title, the figures and a link, in order of names."""
    for path in sorted((run.folder / "analyses").glob("*.html")):
        about = _figures(path.with_suffix(".json"))
        link = f'<a href="analyses/{escape(path.name)}">analyses/{escape(path.name)}</a>'
        yield f'<h3>{escape(about.get("title", path.stem))}</h3>\n<p class="soft">Tables: {link}</p>'
        yield from (f'<p class="soft">{escape(name)}</p>\n{figure}' for name, figure in about.get("figures", ()))


def _figures(path: Path) -> dict[str, Any]:
    """What an analysis left beside its page: its title, and title and HTML of each figure; nothing if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def signed(results: Mapping[str, Any]) -> list[str]:
    """Each metric with sacreBLEU's signature: which tokenizer BLEU had."""
    scores = [score["signatures"] for system in results["systems"].values() for score in system["domains"].values()]
    kinds = (*METRICS, ("bleu_13a", "BLEU"))
    return list(dict.fromkeys(f"{label} {each[key]}" for each in scores for key, label in kinds if key in each))


def cut_line(results: Mapping[str, Any]) -> str:
    """How many translations of each domain had not ended at --evaluate.max-new-tokens; empty where all had."""
    parts = []
    for name, system in results["systems"].items():
        counts = {domain: score.get("cut", 0) for domain, score in system["domains"].items()}
        found = [f"{domain_name(d)} {n:,} of {system['domains'][d]['n']:,}" for d, n in counts.items() if n]
        parts += [f"{system_name(name)}: {', '.join(found)}"] * bool(found)
    return "; ".join(parts)


def signatures(run: Artefacts) -> str:
    found = [*signed(run.results), *(f"COMET {line}" for line in [comet_line(run.results)] if line)]
    return "".join(f"<p><code>{escape(text)}</code></p>" for text in found)


def settings(run: Artefacts) -> Iterator[str]:
    """One collapsed table a part of the config."""
    single = {key: value for key, value in run.config.items() if not isinstance(value, dict)}
    parts = {key: value for key, value in run.config.items() if isinstance(value, dict)} | {"run": single}
    for part, values in parts.items():
        rows = [("", [escape(key), f"<code>{escape(_setting(value))}</code>"]) for key, value in values.items()]
        yield page.details(f"Settings: {part}", page.table("", rows, "text")) if rows else ""


def _setting(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
