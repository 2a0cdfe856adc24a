"""How a run can end: the table of exit codes, and what is said about an error. Printed by command.py, stored by
run/status.py.

    0   complete      every stage is done
    1   failed        a fault of the engine or the machine, or another rank has ended; --debug shows the traceback
    2   wrong         a setting, a file or the data: one line names it and the remedy
    75  interrupted   SIGTERM or SIGINT: stopped at a boundary, saved; the same command goes on from there

torchrun reports any code but 0 as its own 1: `status.json` in `--out` has the run's.
"""

from __future__ import annotations

import errno
import os
import traceback
from enum import IntEnum

from ...kernels.common.errors import UserError


class Exit(IntEnum):
    """Exit codes of every command; 75 is sysexits' EX_TEMPFAIL, "try again"."""

    COMPLETE = 0
    FAILED = 1
    WRONG = 2
    INTERRUPTED = 75


class Interrupted(Exception):
    """A signal ended the run at a boundary that all ranks agreed on; nothing is lost."""

    agreed = True


LOST_PEER = (
    "closed by peer",
    "reset by peer",
    "broken pipe",
    "timed out waiting",
    "remote process exited",
    "ncclremote",
)
"""What gloo and NCCL say when another rank has gone."""
REPORT = "--debug shows where; report it with what `slicetune doctor` prints"


ENGINE = ("transformers", "deepspeed", "peft", "datasets", "sacrebleu", "tyro", "tqdm")
ENGINE += ("scipy", "numpy", "tensorboard", "sentencepiece", "google")
"""Packages that the extra `engine` brings."""
EXTRAS = dict.fromkeys(ENGINE, "engine") | {"flash_attn": "flash", "liger_kernel": "liger", "wandb": "wandb"}
EXTRAS |= {"bitsandbytes": "quantize"}
"""Package → the extra that brings it."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


CHECKPOINTING, NF4 = "--model.activation-checkpointing on", "--model.quantize nf4"
PARTITION, RECOMPUTE = "--model.partition on (several GPUs)", "--model.recompute-ffn"
TOKENS, COUNTS = "a smaller --score.tokens-per-batch", "--score.counts host"
MICRO, BATCH = "a smaller --train.micro-batch-size", "a smaller --evaluate.batch-size"
ON_QUANTISED = "--evaluate.on quantised"
SMALLER = {
    "score": (TOKENS, COUNTS, CHECKPOINTING, NF4, PARTITION),
    "train": (CHECKPOINTING, MICRO, RECOMPUTE, NF4, PARTITION),
    "translate": (BATCH, ON_QUANTISED, PARTITION),
}
"""What a stage, by the first word of its name, takes less memory with; the best first."""


def _smaller(error: BaseException) -> str:
    """What helps against an error of memory in its stage.

    `error.useless`, which a run sets, has for each stage the remedies that are in force or refused.
    """
    notes = getattr(error, "__notes__", [])
    stage = next((name for name in SMALLER for note in notes if note.startswith(f"in the {name}")), "")
    useless = getattr(error, "useless", {}).get(stage, ())
    every = dict.fromkeys(flag for flags in SMALLER.values() for flag in flags)
    flags = [flag for flag in SMALLER.get(stage, every) if flag not in useless]
    tried = f"take {', '.join(flags)}; " if flags else ""
    return f"{tried}the run's command with --dry-run --gpu-memory N says what fits N GB"


def describe(error: BaseException) -> tuple[Exit, str]:
    """The exit code of an error and one line that says what is wrong and what to do."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return Exit.WRONG, text
    if isinstance(error, ModuleNotFoundError) and (name := (error.name or "").partition(".")[0]) in EXTRAS:
        return Exit.WRONG, f"{name} is not installed: pip install 'slicetune[{EXTRAS[name]}]'"
    if isinstance(error, Interrupted):
        return Exit.INTERRUPTED, text
    if isinstance(error, KeyboardInterrupt):
        return Exit.INTERRUPTED, "interrupted by SIGINT"
    full = [said for code in NO_ROOM if (said := os.strerror(code)) in text or getattr(error, "errno", None) == code]
    if full:  # safetensors' error has words alone
        where = ", ".join((getattr(error, "filename", None) or "--out", *getattr(error, "__notes__", [])))
        return Exit.WRONG, f"{where}: {full[0]}: make room; the same command goes on"
    if "out of memory" in text or isinstance(error, MemoryError):
        return Exit.FAILED, f"out of memory ({text[:160]}): {_smaller(error)}"
    if isinstance(error, RuntimeError) and any(words in text.lower() for words in LOST_PEER):
        return Exit.FAILED, f"another rank has ended; its own error comes first ({text[-100:]})"
    frame = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" at {os.path.basename(frame[0].filename)}:{frame[0].lineno}" if frame else ""
    return Exit.FAILED, f"{type(error).__name__}{where}: {text[:300] or 'no message'} ({REPORT})"
