"""The project's targets as functions of the measured rows: what was asked, what was measured, met or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Row = dict[str, Any]
Measure = Callable[[list[dict[str, Any]]], float]
FLOOR, OURS, LORA = "floor: forward + dX, frozen", "slices 1 %", "LoRA r=8 all-linear"
SHORT, LONG = 480, 8192
"""Tokens of a whole step."""


class Missing(Exception):
    """What a target needs was not measured."""


@dataclass(frozen=True)
class Target:
    text: str
    mode: Literal["cpu", "gpu", "gpu-peers"]
    measure: Measure
    limit: float
    least: bool = True
    """The value must be at least the limit; else at most."""
    unit: str = "×"
    ceiling: Measure | None = None
    """What the value would be if our step took no longer than the floor: where that misses the limit, no step can."""

    def verdict(self, rows: list[Row]) -> tuple[str, str]:
        """(what was measured, yes or no)."""
        try:
            value = self.measure(rows)
        except Missing as missing:
            return f"not measured: {missing}", "no"
        if value >= self.limit if self.least else value <= self.limit:
            return f"{value:.3g} {self.unit}", "yes"
        most = f"; {self.ceiling(rows):.3g} if our step took no longer than the floor" if self.ceiling else ""
        return f"{value:.3g} {self.unit}{most}", "**no**"


def pick(rows: list[Row], suite: str, name: str) -> Row:
    """The first row of a suite whose name starts with `name`. Raises Missing."""
    for row in rows:
        if row["suite"] == suite and row["name"].startswith(name):
            if "error" in row:
                raise Missing(f"{row['name']}: {row['error']}")
            return row
    raise Missing(f"no row {name} in {suite}")


def ratio(suite: str, above: str, below: str) -> Measure:
    """Time of one contender over another's, in the suite's first table."""

    def measure(rows: list[Row]) -> float:
        return pick(rows, suite, above)["seconds"] / pick(rows, suite, below)["seconds"]

    return measure


def least_lora(rows: list[Row], field: str) -> float:
    """The best of LoRA's forms (targets, with or without PEFT's fp32 cast) in the first table of steps."""
    first = pick(rows, "step", OURS)["setting"]
    table = [row for row in rows if row["suite"] == "step" and row["setting"] == first and "error" not in row]
    found = [row[field] for row in table if row["name"].startswith("LoRA") and row["kind"] == "rival"]
    if not found:
        raise Missing("no LoRA was measured")
    return min(found)


def lora_time(rows: list[Row]) -> float:
    return least_lora(rows, "seconds") / pick(rows, "step", OURS)["seconds"]


def lora_over_floor(rows: list[Row]) -> float:
    return least_lora(rows, "seconds") / pick(rows, "step", FLOOR)["seconds"]


def lora_peak(rows: list[Row]) -> float:
    return pick(rows, "step", OURS)["peak_bytes"] / least_lora(rows, "peak_bytes")


def worst(above: str, below: str, tokens: int, most: bool = True) -> Measure:
    """Time of one contender over another's in a whole step of so many tokens: the worst of the forms of batches.

    most: a large ratio is a bad one.
    """

    def measure(rows: list[Row]) -> float:
        mine = [row for row in rows if row["suite"] == "whole step" and row.get("tokens") == tokens]
        found = []
        for form in dict.fromkeys(row["form"] for row in mine):
            table = {row["name"]: row for row in mine if row["form"] == form}
            found.append(_time(table, above, form) / _time(table, below, form))
        if not found:
            raise Missing(f"no whole step of {tokens:,} tokens")
        return max(found) if most else min(found)

    return measure


def _time(table: dict[str, Row], name: str, form: str) -> float:
    row = table.get(name, {"error": "no row"})
    if "error" in row:
        raise Missing(f"{name}, {form}: {row['error']}")
    return row["seconds"]


def scoring_speed(rows: list[Row]) -> float:
    ours, hooks = (pick(rows, "scoring", name) for name in ("ours", "hooks at batch 1, full"))
    return ours["sentences_per_second"] / hooks["sentences_per_second"]


def memory_growth(rows: list[Row]) -> float:
    """Bytes above the start at the most sentences over those at the fewest."""
    growth = list(pick(rows, "scoring", "ours")["growth"].values())
    if not growth:
        raise Missing("memory at several numbers of sentences")
    return growth[-1] / growth[0]


def of_copy(suite: str, name: str = "ours") -> Measure:
    def measure(rows: list[Row]) -> float:
        ours, copy = pick(rows, suite, name), pick(rows, suite, "copy")
        return 100 * ours["bytes"] / ours["seconds"] / (copy["bytes"] / copy["seconds"])

    return measure


def ffn_over_floor(rows: list[Row]) -> float:
    """Our FFN over its six matrix products alone plus the bytes between them at the speed of a copy."""
    suite = "frozen FFN, forward + dX"
    ours, products, copy = (pick(rows, suite, name) for name in ("ours", "six matrix", "copy"))
    return ours["seconds"] / (products["seconds"] + ours["between"] * copy["seconds"] / copy["bytes"])


def saved_per_layer(rows: list[Row]) -> float:
    """Megabytes that autograd saves in the FFN of a layer at 8192 tokens: x, gate and up."""
    return pick(rows, "frozen FFN, forward + dX", "ours")["saved_bytes"] / 1e6


def peak_gigabytes(name: str) -> Measure:
    def measure(rows: list[Row]) -> float:
        return pick(rows, "24 GB", name)["reserved_bytes"] / 1e9

    return measure


def seconds(suite: str, name: str, scale: float = 1.0) -> Measure:
    return lambda rows: scale * pick(rows, suite, name)["seconds"]


def both(text: str, measure: Measure, limit: float, least: bool = True, ceiling: Measure | None = None) -> list[Target]:
    return [Target(text, mode, measure, limit, least, ceiling=ceiling) for mode in ("cpu", "gpu")]


def whole_steps(tokens: int) -> list[Target]:
    """The goals of a step of the whole model on a GPU."""
    compiled, size = f"{OURS}, compiled", f"of {tokens:,} tokens"
    floor, lora = (f"{name}, compiled" for name in (FLOOR, LORA))
    return [
        Target(f"slices ≤ 1.05 × the floor, both compiled, {size}", "gpu", worst(compiled, floor, tokens), 1.05, False),
        Target(f"LoRA ≥ 1.15 × slices, both compiled, {size}", "gpu", worst(lora, compiled, tokens, False), 1.15),
        Target(f"Hugging Face's frozen step ≥ 1.2 × slices, {size}", "gpu", worst(FLOOR, compiled, tokens, False), 1.2),
    ]


FULL, MASKED, LIGER = "full, fused AdamW", "masked Adam over", f"{LORA}, Liger"
BARE = "SwiGLU backward"
TARGETS = [
    *whole_steps(LONG),
    *whole_steps(SHORT),
    Target("slices ≤ 1.10 × the floor of the same model", "cpu", ratio("step", OURS, FLOOR), 1.10, least=False),
    *both("never slower than the faster LoRA (LoRA ÷ slices ≥ 1)", lora_time, 1.0, ceiling=lora_over_floor),
    Target("full fine-tuning ≥ 1.3 × slices", "cpu", ratio("step", FULL, OURS), 1.3),
    Target("masked Adam ≥ 2.5 × slices", "cpu", ratio("step", MASKED, OURS), 2.5, ceiling=ratio("step", MASKED, FLOOR)),
    Target("full fine-tuning ≥ 1.4 × slices", "gpu", ratio("step", FULL, OURS), 1.4),
    Target("masked Adam ≥ 2 × slices", "gpu", ratio("step", MASKED, OURS), 2.0, ceiling=ratio("step", MASKED, FLOOR)),
    Target("never slower than LoRA with Liger's kernels", "gpu-peers", ratio("step", LIGER, OURS), 1.0),
    *both("peak memory ≤ the least LoRA's", lora_peak, 1.0, least=False),
    Target("scoring ≥ 8 × hooks at batch 1 (sentences a second)", "cpu", scoring_speed, 8.0),
    *both("scoring memory flat in the number of samples (most ÷ fewest)", memory_growth, 1.05, least=False),
    Target("selection for 1,048,576 neurons ≤ 10 s", "cpu", seconds("selection", "ours"), 10, False, "s"),
    Target("SwiGLU forward ≥ 88 % of the copy", "gpu", of_copy("SwiGLU forward"), 88, unit="%"),
    Target("SwiGLU backward ≥ 88 % of the copy", "gpu", of_copy(BARE), 88, unit="%"),
    Target("scores add ≤ 2 % to the SwiGLU backward", "gpu", ratio(BARE, "ours with scores", "ours"), 1.02, False),
    Target("FFN ≤ 1.05 × (six products + bytes ÷ copy)", "gpu", ffn_over_floor, 1.05, least=False),
    Target("FFN saves ≤ 537 MB a layer", "gpu", saved_per_layer, 537, False, "MB"),
    Target("optimizer step of 1 % slices ≥ 88 % of the copy", "gpu", of_copy("AdamW over slices"), 88, unit="%"),
    Target("the 8B with 1 % slices trains within 24 GB", "gpu", peak_gigabytes("slices 1 %, train"), 24, False, "GB"),
    Target("the 8B is scored within 24 GB", "gpu", peak_gigabytes("score"), 24, False, "GB"),
]
