"""What a study has found, as a page: one section a model, with tables, contrasts in words, and what was not run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from study_bootstrap import DRAWS
from study_plan import FOLDER, Plan

from slicetune.engine.evaluation.comparison import LEVEL, mean_deviation

Found = Mapping[str, Any]


def page(plan: Plan, models: Mapping[str, Found], plots: Mapping[str, Sequence[Path]]) -> str:
    """The measurements by model as Markdown."""
    lines = [f"# {plan.title}", "", plan.about, "", _where(plan), ""]
    lines += [
        "BLEU is sacreBLEU's, a mean over the domains of a column. A difference has a 95 % interval of a paired "
        f"bootstrap over test sentences and seeds ({DRAWS:,} draws). \\* marks p < {LEVEL:g} after Holm's adjustment "
        "over the rows of the table, for each column. An interval of one seed says nothing about other seeds, and one "
        "of two or three is rather too narrow. The dev loss is in nats a target token. Peak memory and tokens/s were "
        "measured on machines that did other work too: they do not say which method is faster.",
    ]
    for name, found in models.items():
        lines += ["", *_section(name, found, plots.get(name, ()))]
    return "\n".join(lines) + "\n"


def _where(plan: Plan) -> str:
    if plan.path.parent.resolve() == FOLDER:
        return f"The plan is [bench/studies/{plan.path.name}](../studies/{plan.path.name})."
    return f"The plan is the file `{plan.path.name}`."


def _section(name: str, found: Found, plots: Sequence[Path]) -> list[str]:
    about = found["provenance"]
    device = about["device"] if about["device"] != "cpu" else f"{about['cpu']}, {about['cores']} cores"
    some = f"**{found['done']} of {found['planned']} runs are done.** " if found["done"] < found["planned"] else ""
    parts = "; ".join(f"*{part}*: {', '.join(domains)}" for part, domains in found["parts"].items())
    sizes = next(iter(next(iter(found["rows"].values()))["seeds"].values()))["n"].values()
    return [
        f"## {name}",
        "",
        f"{some}`{found['command']}`",
        "",
        f"{device}, torch {about['versions']['torch']}, transformers {about['versions']['transformers']}; "
        f"these numbers were collected at commit {about['commit']}, {about['date']}. Columns: {parts}. "
        f"{_span(sizes)} test sentences a domain.",
        "",
        *_table(found),
        *_rates(found),
        *_contrasts(found),
        *(f"![{plot.stem}]({plot.name})" for plot in plots),
    ]


def _span(values: Any) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def part_bleu(row: Found, domains: Sequence[str]) -> list[float]:
    """The mean over the domains, a number a seed."""
    return [fmean([of["bleu"][domain] for domain in domains]) for of in row["seeds"].values()]


def _table(found: Found) -> list[str]:
    """A line a row: what it trains, what it reaches, what it costs."""
    parts = found["parts"]
    base = {each["row"]: each["bleu"] for each in found["against_base"]}
    lines = _head(["seeds", "trained", "rate", "dev loss", *parts, "peak memory", "tokens/s"])
    for label, row in found["rows"].items():
        runs, differences = list(row["seeds"].values()), base.get(label, {})
        cells = [str(len(runs)), f"{fmean([run['trainable_parameters'] for run in runs]):,.0f}", *_training(runs)]
        cells += [_cell(part_bleu(row, domains), differences.get(part)) for part, domains in parts.items()]
        lines.append(_line(label, [*cells, *_cost(runs)]))
    return [*lines, "", *(["In brackets: the difference to the base.", ""] if base else [])]


def _head(names: Sequence[str]) -> list[str]:
    return [f"| | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]


def _line(label: str, cells: Sequence[str]) -> str:
    return f"| {label if '`' in label else f'`{label}`'} | {' | '.join(cells)} |"


def _training(runs: Sequence[Found]) -> list[str]:
    """The rate and the dev loss: empty where nothing is trained, or without dev sentences."""
    if "learning_rate" not in runs[0]:
        return ["", ""]
    losses = [run["dev_loss"] for run in runs if "dev_loss" in run]
    return [f"{runs[0]['learning_rate']:g}", _plus_minus(losses, 4) if len(losses) == len(runs) else ""]


def _cost(runs: Sequence[Found]) -> list[str]:
    if "tokens_per_second" not in runs[0]:
        return ["", ""]
    memory, speed = max(run["peak_memory_bytes"] for run in runs), fmean([run["tokens_per_second"] for run in runs])
    return [f"{memory / 1e9:.2f} GB", f"{speed:,.0f}"]


def _plus_minus(values: Sequence[float], digits: int) -> str:
    mean, deviation = mean_deviation(values)
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(values) > 1 else "")


def _cell(values: Sequence[float], difference: Found | None) -> str:
    text = _plus_minus(values, 2)
    return text if difference is None else f"{text} ({difference['mean']:+.2f}{_star(difference)})"


def _star(difference: Found) -> str:
    return "\\*" if difference.get("holm", 1.0) < LEVEL else ""


def _rates(found: Found) -> list[str]:
    if not found["rates"]:
        return []
    rows = [f"- `{label}`: {_tried(sweep)}{_edge(sweep)}" for label, sweep in found["rates"].items()]
    return ["The sweep of the first seed, dev loss by learning rate; rows take the rate of the lowest:", "", *rows, ""]


def _tried(sweep: Mapping[str, float | None]) -> str:
    losses = {rate: "no number" if loss is None else f"{loss:.4f}" for rate, loss in sweep.items()}
    return ", ".join(f"{float(rate):g} → {loss}" for rate, loss in losses.items())


def _edge(sweep: Mapping[str, float | None]) -> str:
    """A lowest loss at the end of what was tried says that the best rate may lie beyond."""
    rates, known = sorted(sweep, key=float), {rate: loss for rate, loss in sweep.items() if loss is not None}
    if len(rates) < 2 or not known or (best := min(known, key=known.__getitem__)) not in (rates[0], rates[-1]):
        return ""
    end = "lower" if best == rates[0] else "higher"
    return f" (no {end} rate was tried: one may be better)"


def _contrasts(found: Found) -> list[str]:
    if not found["contrasts"]:
        return []
    parts = list(found["parts"])
    lines = _head(["seeds", "dev loss", *parts])
    for each in found["contrasts"]:
        cells = [str(len(each["seeds"])), _loss(each.get("dev_loss"))]
        cells += [_interval(each["bleu"][part]) for part in parts]
        lines.append(_line(f"`{each['row']}` − `{each['against']}`", cells))
    return ["### Differences", "", *lines, "", *said(found), ""]


def _interval(d: Found) -> str:
    return f"{d['mean']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}]{_star(d)}"


def _loss(difference: Found | None) -> str:
    if difference is None:
        return ""
    interval = f" [{difference['low']:+.4f}, {difference['high']:+.4f}]" if difference["count"] > 1 else ""
    return f"{difference['difference']:+.4f}{interval}{_star(difference)}"


def said(found: Found) -> list[str]:
    """Of each contrast one sentence on BLEU, and one on the dev loss where that differs."""
    return [
        _sentence(f"`{each['row']}`", f"`{each['against']}`", each["bleu"]) + _lower(each.get("dev_loss"))
        for each in found["contrasts"]
    ]


def _lower(loss: Found | None) -> str:
    if not loss or not _star(loss):
        return ""
    return f" Its dev loss is {'lower' if loss['difference'] < 0 else 'higher'}."


def _sentence(one: str, other: str, bleu: Found) -> str:
    above, below = (
        [part for part, d in bleu.items() if d["holm"] < LEVEL and (d["mean"] > 0) == up] for up in (True, False)
    )
    if not above and not below:
        return f"- {one} against {other}: no difference of BLEU is shown."
    where = [f"{word} {other} on {', '.join(of)}" for word, of in (("better than", above), ("worse than", below)) if of]
    rest = [part for part in bleu if part not in above + below]
    return f"- {one} is {' and '.join(where)}" + (f"; no difference is shown on {', '.join(rest)}." if rest else ".")
