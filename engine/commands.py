"""Every command of slicetune, by its name: words in, an exit code out.

    slicetune COMMAND …                                   # the console script
    python -m slicetune.engine COMMAND …                  # the same
    torchrun --nproc_per_node 8 -m slicetune.engine score …      # score, compare and ask: the ranks share the work

A command's own modules are imported when it is called: `doctor` needs neither tyro nor transformers. Signals are noted
(signals.py) by commands that stop at a boundary and go on; any other is ended by them at once.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .common import command, distributed, signals
from .common.errors import UserError

Words = list[str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments` (default: the command line) name; returns its exit code.

    An error ends the process with one line and its code, as errors.py has them; --debug shows the traceback.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with command.one_line("--debug" in words):
        words = [word for word in words if word != "--debug"]
        if not words or words[0] in ("-h", "--help"):
            print(overview())
            return 0
        name = words.pop(0)
        if name not in COMMANDS:
            raise UserError(f"{name}: no command: there are {' '.join(COMMANDS)}; slicetune --help says what each does")
        return COMMANDS[name](words) or 0


def overview() -> str:
    """What there is, a line a command."""
    rows = [f"  {name:9} {(run.__doc__ or '').splitlines()[0].rstrip('.')}" for name, run in COMMANDS.items()]
    about = "slicetune COMMAND: fine-tune a few chosen neurons of a large language model.\n"
    more = "\nslicetune COMMAND --help has a command's words and flags. --debug shows the traceback of an error.\n"
    more += "A run is a recipe: torchrun --nproc_per_node 8 -m slicetune.recipes.caneft_llama31 --data.dir DATA"
    return "\n".join([about, *rows, more])


def _given(kind: type, words: Words, name: str, about: str | None, **options: Any) -> Any:
    return command.parse(kind, words, about or "", prog=f"slicetune {name}", **options)


# ---------------------------------------------------------------- scores, neurons, comparisons


def score(words: Words) -> None:
    """Score neurons on labelled text: statistics.safetensors."""
    from .run.forecast.settle import for_scoring
    from .run.stages import named
    from .scoring import score as scoring
    from .scoring.statistics import Statistics

    signals.install()
    given = _given(scoring.Arguments, words, "score", scoring.__doc__)
    if not any(word.partition("=")[0] == "--model.path" for word in words):
        raise UserError("--model.path is missing: name a Hugging Face folder or a hub id, or tiny, the embedded model")
    distributed.start()
    with named("score"):
        scoring.write(given.model, given.files, given.score, Path(given.out), given.max_length, for_scoring)
    distributed.stop()
    if distributed.rank():
        return
    stats = Statistics.sums(given.out)
    counts = ", ".join(f"{name} {n:,}" for name, n in zip(stats.groups, stats.samples.tolist(), strict=True))
    distributed.print0(f"{int(stats.samples.sum()):,} samples ({counts}), {stats.neurons:,} neurons → {given.out}")


def select(words: Words) -> None:
    """Choose neurons from statistics, with any method that chooses: neurons.safetensors."""
    import tyro

    from .methods import select as selecting
    from .models.shapes import resolve
    from .scoring.statistics import Statistics

    name = _take(words, "--method", "caneft", tuple(selecting.CHOOSING))
    default = selecting.Arguments(statistics=tyro.MISSING, method=selecting.CHOOSING[name]())
    given = _given(selecting.Arguments, words, f"select --method {name}", selecting.__doc__, default=default)
    if len(given.statistics) > 1:
        raise UserError(f"select {' '.join(given.statistics)}: name one statistics.safetensors")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        shape = resolve(given.model) if given.model else None
        statistics = Statistics.load(given.statistics[0]) if given.statistics else None
        neurons = selecting.select(statistics, given.method, shape, given.seed)
        neurons.save(given.out)
    print(neurons.describe())
    for warning in said:
        print(f"warning: {warning.message}")
    print(f"→ {given.out}")


def _take(words: Words, flag: str, default: str, known: Sequence[str]) -> str:
    """The value of a flag that decides which others there are, taken out of the words."""
    if flag not in words:
        return default
    place = words.index(flag)
    if place + 1 == len(words):
        raise UserError(f"{flag}: name one of {' '.join(known)}")
    if (value := words[place + 1]) not in known:
        raise UserError(f"{flag} {value}: chooses no neurons; there are {' '.join(known)}")
    del words[place : place + 2]
    return value


def compare(words: Words) -> None:
    """Run several recipes as one job and put them into one table."""
    from .run import compare as comparing

    signals.install()
    given, rest = _given(comparing.CompareConfig, words, "compare", comparing.__doc__, return_unknown_args=True)
    comparing.run(given, rest)


def ask(words: Words) -> None:
    """Ask a finished run a question: a page, CSV files, figures in its report."""
    from .analyses import change, chosen, control, overlap, ratios, readings, silence
    from .analyses.landermt import awareness, projections, ranges, transfer, variants

    questions = (chosen, overlap, change, ratios, readings, control, silence)
    questions += (awareness, ranges, projections, transfer, variants)
    named = {question.__name__.rpartition(".")[2]: question for question in questions}
    if not words or words[0] in ("-h", "--help"):
        rows = [f"  {name:12} {question.__doc__.splitlines()[0]}" for name, question in named.items()]
        print("\n".join(["slicetune ask QUESTION RUN …, as in: slicetune ask chosen runs/caneft-tiny\n", *rows]))
        return
    name = words.pop(0)
    if name not in named:
        raise UserError(f"ask {name}: no question: there are {' '.join(named)}")
    named[name].answer(_given(named[name].Arguments, words, f"ask {name}", named[name].__doc__))


# ---------------------------------------------------------------- models, and what of them was trained


def audit(words: Words) -> int:
    """Prove that a run changed only what its method may change; exit code 0 or 1."""
    from .export import audit as auditing
    from .models.load import snapshot
    from .slices.neurons import NeuronSet

    @dataclass
    class Audit:
        folders: tuple[str, ...]
        """RUN, or BASE RUN: a base of your own choice."""
        neurons: str = ""
        """The set that was trained, of a folder that a loop of your own has saved."""

    given = _given(Audit, words, "audit", auditing.__doc__)
    folders, neurons = given.folders, NeuronSet.load(given.neurons) if given.neurons else None
    if len(folders) not in (1, 2):
        raise UserError(f"audit {' '.join(folders)}: name RUN, or BASE RUN")
    base = folders[0] if len(folders) == 2 else auditing.base_of(Path(folders[0]))
    report = auditing.audit(snapshot(base), folders[-1], neurons)
    print(report)
    return 0 if report.ok else 1


def delta(words: Words) -> None:
    """Put a run's trained rows into its base, or take them off again."""
    from .export import delta as deltas
    from .models.load import snapshot

    @dataclass
    class Delta:
        what: Literal["apply", "subtract"]
        """`apply` to the base, `subtract` from the trained model."""
        model: str
        """The model's folder or hub id."""
        delta: str
        """A run's delta/."""
        out: str
        """The folder that is written."""

    given = _given(Delta, words, "delta", deltas.__doc__)
    (deltas.apply if given.what == "apply" else deltas.subtract)(snapshot(given.model), given.delta, given.out)
    print(f"→ {given.out}")


def fold(words: Words) -> None:
    """Make an ordinary model of a routed one, for one language pair."""
    from .export import routed

    @dataclass
    class Fold:
        model: str
        """The model/ folder of a LANDeRMT run."""
        out: str
        """The folder that is written."""
        pair: str = ""
        """Source-target, as in de-en."""
        dtype: Literal["auto", "float32", "bfloat16"] = "auto"
        """`auto`: the model's."""

    given = _given(Fold, words, "fold", routed.__doc__)
    if not given.pair:
        raise UserError("--pair: say which, as in --pair de-en")
    made = routed.fold(given.model, given.pair, given.out, given.dtype)
    print(f"→ {given.out}: the model for {given.pair}, {made['changed']:,} weights folded, {made['dtype']}")


def baichuan(words: Words) -> None:
    """Convert Baichuan2-7B into a plain Llama, from pickled weights too."""
    from .models import load
    from .models.baichuan import conversion as converting

    @dataclass
    class Baichuan:
        folder: Path
        """Baichuan2-7B-Base or -Chat, as it is downloaded."""
        new: Path
        """The folder that is written: name it as --model.path."""

    given = _given(Baichuan, words, "baichuan", converting.__doc__)
    load.convert(given.folder, given.new)
    print(f"→ {given.new}, a Llama")


# ---------------------------------------------------------------- this machine


def doctor(words: Words) -> int:
    """Say what this machine can do, and test the kernels against their formulas."""
    from . import doctor as doctors

    return doctors.main(words)


def tiny(words: Words) -> None:
    """Make the embedded corpus and models; print sample translations and BLEU."""
    from .data import tiny as embedded
    from .evaluation import sample

    @dataclass
    class Tiny:
        pass

    _given(Tiny, words, "tiny", embedded.__doc__)
    sample.show()


COMMANDS: dict[str, Callable[[Words], int | None]] = {
    "score": score,
    "select": select,
    "compare": compare,
    "ask": ask,
    "audit": audit,
    "delta": delta,
    "fold": fold,
    "baichuan": baichuan,
    "doctor": doctor,
    "tiny": tiny,
}
"""Each by its name; the first line of its documentation is its line in the overview."""
