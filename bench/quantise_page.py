"""What quantise.py has measured, as a page: a table for each model, and what it says.

All dev losses of a kind stand beside their difference to the unquantised base's, seed by seed: both have read the same
sentences. What a seed changes in either is the noise that a difference must be seen in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Found = dict[str, Any]
KINDS = ("none", "nf4", "int8", "fp8")
TRAININGS = {
    "own": "its own set",
    "base's": "the unquantised base's set",
    "lora": "LoRA, as many parameters",
}
STAGES = {
    "load": "peak while loading in bfloat16",
    "score": "peak while scoring",
    "train": "peak while training",
}


def page(models: dict[str, Found]) -> str:
    """The measurements by model as Markdown."""
    lines = [
        "# What a quantised base costs",
        "",
        "The linear layers of the blocks are held in 4 or 8 bits while neurons are scored and trained "
        "(`--model.quantize`). What is trained, and the export, have full precision. Equal trainings: the same "
        "sentences, order, rate and number of updates. They are short, and show what quantisation changes, not how "
        "good a method can be.",
        "",
        "Written by `python bench/quantise.py MODEL DATA`.",
    ]
    for found in models.values():
        lines += ["", *_section(found)]
    return "\n".join(lines) + "\n"


def _section(found: Found) -> list[str]:
    sentences, about, seeds = found["sentences"], found["provenance"], len(found["seeds"])
    draws = f"{seeds} draws of the sentences" if seeds > 1 else "one draw of the sentences"
    note = [found["note"], ""] if found["note"] else []
    return [
        f"## {found['model']}",
        "",
        *note,
        f"{found['parameters']:,} parameters, 1 % of {found['neurons']:,} neurons, domains {', '.join(found['seen'])}. "
        f"{sentences['score']} sentences a domain are scored, {sentences['dev']} measure the dev loss (nats a token), "
        f"of both those of at most {found['max_length']} tokens; "
        f"{found['updates']} updates of {found['batch']} sentences at rate {found['rate']:g}; {draws}. Computed in "
        f"{found['dtype']}. LoRA has rank {found['rank']}.",
        "",
        f"{about['cpu']}, {about['cores']} cores, torch {about['versions']['torch']}, transformers "
        f"{about['versions']['transformers']}, bitsandbytes {about['versions'].get('bitsandbytes')}, commit "
        f"{about['commit']}, {about['date']}.",
        "",
        f"| | {' | '.join(KINDS)} |",
        f"|---|{'---:|' * len(KINDS)}",
        *_alike_rows(found),
        *_loss_rows(found),
        *_memory_rows(found),
        "",
        "A dev loss is the mean over the draws; in brackets stands the difference to `none` by the same draw, from the "
        "least to the most. Memory is in MB, resident, above a process that has run a small model.",
        "",
        *_said(found),
    ]


def _row(name: str, cell: Callable[[str], str]) -> str:
    return f"| {name} | {' | '.join(cell(kind) for kind in KINDS)} |"


def _alike_rows(found: Found) -> list[str]:
    names = {"overlap": "chosen set that is `none`'s", "importance": "rank correlation of importance (Eq. 8)"}
    names |= {"consensus": "rank correlation of consensus (Eq. 10)"}

    def cell(kind: str, what: str) -> str:
        return "" if kind == "none" else span([each[what] for each in found["alike"][kind].values()], what)

    return [_row(name, lambda kind, what=what: cell(kind, what)) for what, name in names.items()]


def span(values: list[float], what: str = "") -> str:
    """The mean, and the least and the most where there are several."""
    text = (lambda value: f"{value:.0%}") if what == "overlap" else (lambda value: f"{value:.3f}")
    mean = text(sum(values) / len(values))
    ends = f" ({text(min(values))} to {text(max(values))})"
    return mean if len(values) < 2 or text(min(values)) == text(max(values)) else mean + ends


def losses(found: Found, kind: str, what: str, where: str) -> list[float]:
    """By seed, the dev loss of what was trained; empty for what was not."""
    runs = found["kinds"][kind]["runs"].values()
    what = "own" if kind == "none" and what == "base's" else what
    return [run[what][where] for run in runs if what in run]


def differences(ours: list[float], others: list[float]) -> list[float]:
    """By seed."""
    return [a - b for a, b in zip(ours, others, strict=True)]


def _loss_rows(found: Found) -> list[str]:
    kinds = found["kinds"]

    def cell(kind: str, values: list[float], base: list[float]) -> str:
        if not values:
            return ""
        mean = f"{sum(values) / len(values):.4f}"
        return mean if kind == "none" else f"{mean} ({signed(differences(values, base))})"

    rows = [_row("dev loss, untrained", lambda k: cell(k, [kinds[k]["base"]], [kinds["none"]["base"]]))]
    for what, name in TRAININGS.items():
        for where, which in (("trained", "on this base"), ("export", "its export, in full precision")):
            base = losses(found, "none", what, where)
            title = f"{name}: trained {which}" if where == "trained" else which
            rows.append(_row(title, lambda k, w=what, at=where, b=base: cell(k, losses(found, k, w, at), b)))
    return rows


def signed(values: list[float]) -> str:
    """+0.0012 to +0.0031."""
    low, high = (f"{round(value, 4) + 0.0:+.4f}" for value in (min(values), max(values)))  # no -0.0000
    return low if low == high else f"{low} to {high}"


def _memory_rows(found: Found) -> list[str]:
    kinds = found["kinds"]
    held = {kind: sum(kinds[kind]["weights"].values()) for kind in KINDS}
    rows = [
        _row("weights as held in bfloat16, MB", lambda k: f"{held[k] / 1e6:,.1f}"),
        _row("by arithmetic, MB", lambda k: f"{kinds[k]['expected'] / 1e6:,.1f}"),
    ]
    for stage, name in STAGES.items():
        rows.append(_row(f"{name}, MB", lambda k, stage=stage: f"{kinds[k]['peaks'][stage] / 1e6:,.0f}"))
        if stage in kinds["none"]["counted"]:
            rows.append(_row("the dry run's count", lambda k, s=stage: f"{kinds[k]['counted'][s] / 1e6:,.0f}"))
    return rows


def _said(found: Found) -> list[str]:
    """What the table says, in sentences."""
    alike = found["alike"]
    shares = {kind: span([each["overlap"] for each in alike[kind].values()], "overlap") for kind in KINDS[1:]}
    chosen = "Of the neurons that are chosen on the unquantised base, " + ", ".join(
        f"{kind} chooses {each}" for kind, each in shares.items()
    )
    drawn = [each["overlap"] for each in alike["draws"].values()]
    other = f"; other sentences, on the unquantised base, {span(drawn, 'overlap')}" if drawn else ""
    lines = [f"{chosen}. Chance would give 1 %{other}.", ""]
    first = differences(losses(found, "none", "own", "trained"), [found["kinds"]["none"]["base"]] * len(found["seeds"]))
    lines += [f"On the unquantised base training itself changes the dev loss by {signed(first)}.", ""]
    exports = {what: {kind: losses(found, kind, what, "export") for kind in KINDS} for what in TRAININGS}
    scoring = {k: differences(exports["own"][k], exports["base's"][k]) for k in KINDS[1:]}
    training = {k: differences(exports["base's"][k], exports["base's"]["none"]) for k in KINDS[1:]}
    lines += [f"Scoring on the quantised base changes the export's dev loss by {_each(scoring)}.", ""]
    lines += [f"Training on it, of the same neurons, changes that loss by {_each(training)}.", ""]
    qlora = differences(exports["lora"]["nf4"], exports["lora"]["none"])
    lines += [f"LoRA's export changes by {signed(qlora)} with nf4 (QLoRA).", ""]
    return [*lines, _noise(found, [*scoring.values(), *training.values()])]


def _each(of: dict[str, list[float]]) -> str:
    return ", ".join(f"{signed(values)} ({kind})" for kind, values in of.items())


def _noise(found: Found, pairs: list[list[float]]) -> str:
    """What the differences are worth."""
    own = losses(found, "none", "own", "export")
    if len(own) < 2:
        return "This is one draw: nothing says how far such differences are chance."
    spread, largest = max(own) - min(own), max(abs(each) for values in pairs for each in values)
    mixed = sum(min(values) < 0 < max(values) for values in pairs)
    return (
        f"Other sentences alone move the unquantised export by {spread:.4f}; the largest of these differences is "
        f"{largest:.4f}. {mixed} of the {len(pairs)} change their sign from draw to draw: they are noise. With "
        f"{len(own)} draws one that keeps its sign can be chance too."
    )
