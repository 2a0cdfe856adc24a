"""The embedded default: a corpus and a pretrained small Llama that this project makes itself and keeps in a cache.

    python -m slicetune.engine.tiny        # makes both sizes, prints sample translations and BLEU

Both folders carry a hash of what made them, so a changed generator or trainer makes new ones. Whoever comes first
builds, under a lock; others wait for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from . import tiny_corpus, tiny_grammar, tiny_lexicon, tiny_pretrain
from .errors import UserError


def cache_dir() -> Path:
    """`$SLICETUNE_CACHE`, else `~/.cache/slicetune`."""
    return Path(os.environ.get("SLICETUNE_CACHE") or Path.home() / ".cache" / "slicetune").expanduser()


def corpus_dir() -> Path:
    """Folder of the generated corpus (`<dir>/de-en/<domain>/<split>.jsonl.gz`); made on the first call, in seconds.

    Raises UserError when the cache folder cannot be written.
    """
    return _cached(f"tiny-corpus-{_corpus_hash()}", tiny_corpus.write)


def model_dir(size: str = "tiny") -> Path:
    """Hugging Face folder (model and tokenizer) of the pretrained Llama; the first call trains it on two CPU threads.

    `size`: "tiny" (under two minutes), or "test" (seconds; barely trained, for unit tests). Its prompt is `short`.
    Raises UserError when the size is unknown or the cache folder cannot be written.
    """
    if size not in tiny_pretrain.SIZES:
        raise UserError(f"tiny model size {size!r}: choose {' or '.join(tiny_pretrain.SIZES)}")
    corpus = corpus_dir()
    settings = f"{_corpus_hash()} {tiny_pretrain.VERSION} {tiny_pretrain.SIZES[size]}"
    name = f"tiny-llama-{size}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"
    return _cached(name, lambda folder: tiny_pretrain.build(corpus, folder, size))


def _corpus_hash() -> str:
    """Hash of the generator's source: whatever changes a sentence changes it."""
    digest = hashlib.sha256()
    for module in (tiny_lexicon, tiny_grammar, tiny_corpus):
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()[:12]


def _cached(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, built in a temporary folder and renamed when it is whole.

    The lock is the kernel's, on a file beside the folder: it ends with its process, so a killed build blocks nobody.
    """
    target = cache_dir() / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = open(target.with_name(f"{name}.lock"), "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f"cache folder {target.parent}: {error.strerror}; set SLICETUNE_CACHE to one that can be written"
        )
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():  # another process has built it while this one waited
            return target
        print(f"making {target}", file=sys.stderr, flush=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
        try:
            build(scratch / name)
            os.rename(scratch / name, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target
