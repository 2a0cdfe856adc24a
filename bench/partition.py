"""Memory of a rank, stage by stage, of a whole replica and of a partitioned model; and that both give the same.

    python bench/partition.py --out bench/results              # on a CPU: about 20 minutes, 10 GB of memory, 12 of disk

A random Llama of 1 GB goes through the whole line, from scores to translations: alone, on 2 and on 4 ranks, replicated
and partitioned. What a stage holds is its peak of resident memory above what the process had before any model; of the
rank that held most. The goal is 1/ranks + 25 % of what one rank alone holds in that stage.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from about import ROOT, provenance

SIZE = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 18,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
}
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
"""Goes before, so that imports are not counted; with --small it is all, to try the script."""
FLAGS = """
    --data.score-sentences 4 --data.train-sentences 4 --data.dev-sentences 0 --data.test-sentences 2
    --score.tokens-per-batch 128 --train.epochs 1 --train.max-steps 2 --train.learning-rate 0.001 --train.report-to
    --evaluate.max-new-tokens 8 --evaluate.batch-size 2
""".split()  # noqa: SIM905 — as they are typed
HOW = {
    "replicas": ["--model.partition", "off"],
    "partitioned": ["--model.partition", "on"],
    "replicas at stage 3": ["--model.partition", "off", "--zero.stage", "3"],
}
"""The last is what bits are compared with: the stages add up the gradients of more than two ranks in other orders."""
STAGES = ("load", "score", "train", "translate base", "translate")
GOAL = 0.25


def make(folder: Path, size: dict[str, int]) -> int:
    """A random Llama with the embedded model's tokenizer, in shards of 100 MB; its bytes."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from slicetune.engine.data import tiny

    tokenizer = AutoTokenizer.from_pretrained(tiny.model_dir("test"))
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **size))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder, max_shard_size="100MB")
    tokenizer.save_pretrained(folder)
    return sum(p.nbytes for p in model.parameters())


def measure(model: Path, out: Path, how: str) -> None:
    """One rank's part of one run; the first one writes `measured.json`.

    A small model goes the whole way before: what a process needs without a model is not counted.
    """
    from slicetune.engine.common import distributed
    from slicetune.engine.methods.caneft.settings import Caneft
    from slicetune.engine.models.load import load_model
    from slicetune.engine.run.cli import parse
    from slicetune.engine.run.config import RunConfig
    from slicetune.engine.run.run import run_one
    from slicetune.engine.training.metrics import peak_memory, reset_peak_memory

    defaults = RunConfig(method=Caneft(neuron_ratio=0.01))
    folders = (model.with_name("small"), out.with_name(f"{out.name}-small")), (model, out)
    small, config = (
        parse(defaults, ["--model.path", str(base), "--out", str(to), *HOW[how], *FLAGS]) for base, to in folders
    )
    distributed.start()
    run_one(small)
    reset_peak_memory()
    before = peak_memory()
    held = "partitioned" if config.model.partition == "on" else "whole"
    loaded = load_model(str(model), config.model, distributed.device(), held=held)
    peaks = {"load": int(distributed.agree(peak_memory()))}
    del loaded
    run_one(config)
    peaks |= json.loads((out / "results.json").read_text())["peak_memory"]
    if distributed.rank() == 0:
        (out / "measured.json").write_text(json.dumps({name: peaks[name] - before for name in STAGES}))
    distributed.stop()


def run(ranks: int, *arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, __file__, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} on {ranks} rank(s):\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def digests(out: Path) -> dict[str, str]:
    """sha256 of what a run leaves: statistics, the trained rows, the exported weights, the translations."""
    kinds = {"statistics": ["statistics.safetensors"], "slices": ["delta/delta.safetensors"]}
    kinds |= {"export": sorted(str(f.relative_to(out)) for f in (out / "model").glob("*.safetensors"))}
    kinds |= {"translations": sorted(str(f.relative_to(out)) for f in (out / "translations").glob("*/*.en"))}
    return {
        k: hashlib.sha256(b"".join((out / f).read_bytes() for f in files)).hexdigest() for k, files in kinds.items()
    }


def table(found: dict[str, Any]) -> str:
    """The measurements as a page."""
    alone, rows = found["runs"]["1 replicas"], []
    for name, peaks in found["runs"].items():
        ranks, how = name.split(maxsplit=1)
        if ranks == "1" or how not in ("replicas", "partitioned"):
            continue
        shares = [peaks[s] / alone[s] for s in STAGES]
        cells = [f"{peaks[s] / 1e6:,.0f} MB, {share:.0%}" for s, share in zip(STAGES, shares, strict=True)]
        rows.append(f"| {ranks}, {how} | {' | '.join(cells)} |")
        if how == "partitioned":
            limit = 1 / int(ranks) + GOAL
            verdicts = ["met" if share <= limit else "**missed**" for share in shares]
            rows.append(f"| goal {limit:.0%} | {' | '.join(verdicts)} |")
    about = found["provenance"]
    first = " | ".join(f"{alone[s] / 1e6:,.0f} MB" for s in STAGES)
    same = "; ".join(f"on {ranks} ranks {_which(kinds)}" for ranks, kinds in found["same"].items())
    return "\n".join(
        [
            "# Memory of a rank, replicated and partitioned",
            "",
            f"A random Llama of {found['bytes'] / 1e6:,.0f} MB in float32, CANEFT from scores to translations. "
            "Peak resident memory of the rank that held most, above the process without a model. "
            "Written by `python bench/partition.py`.",
            "",
            f"{about['cpu']}, {about['cores']} cores, torch {about['versions']['torch']}, transformers "
            f"{about['versions']['transformers']}, DeepSpeed {about['versions']['deepspeed']}, commit "
            f"{about['commit']}, {about['date']}.",
            "",
            f"| ranks | {' | '.join(STAGES)} |",
            f"|---|{'---:|' * len(STAGES)}",
            f"| 1, whole | {first} |",
            *rows,
            "",
            f"Bit for bit what replicas on as many ranks leave at ZeRO stage 3: {same}.",
            "",
        ]
    )


def _which(kinds: dict[str, bool]) -> str:
    equal, other = ([kind for kind, same in kinds.items() if same == wanted] for wanted in (True, False))
    return ", ".join(equal) + (f"; not {', '.join(other)}" if other else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rank", nargs=3, metavar=("MODEL", "OUT", "HOW"), help="one rank; torchrun calls it")
    given = parser.parse_args()
    if given.rank:
        measure(Path(given.rank[0]), Path(given.rank[1]), given.rank[2])
        return
    found: dict[str, Any] = {"provenance": provenance(), "runs": {}, "same": {}}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make(Path(folder) / "small", SMALL)
        found["bytes"] = make(model, SMALL if given.small else SIZE)
        jobs = [(1, "replicas"), *((ranks, how) for ranks in given.ranks for how in HOW)]
        kept: dict[str, dict[str, str]] = {}
        for ranks, how in jobs:
            name, out = f"{ranks} {how}", Path(folder) / f"{ranks}-{how}"
            run(ranks, "--rank", str(model), str(out), how)
            found["runs"][name], kept[name] = json.loads((out / "measured.json").read_text()), digests(out)
            print(name, {stage: f"{peak / 1e6:,.0f} MB" for stage, peak in found["runs"][name].items()}, flush=True)
        for ranks in given.ranks:
            one, other = kept[f"{ranks} partitioned"], kept[f"{ranks} replicas at stage 3"]
            found["same"][ranks] = {kind: one[kind] == other[kind] for kind in one}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "partition.json").write_text(json.dumps(found, indent=1) + "\n")
    (given.out / "partition.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
