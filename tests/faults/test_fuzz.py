"""Random and damaged files, prompts, settings and checkpoints: a UserError or a right answer, never a traceback.

`make fuzz` runs many more: SLICETUNE_FUZZ is the number of inputs a test, drawn anew each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import re
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from slicetune.engine.common import checkpoint
from slicetune.engine.common.errors import UserError
from slicetune.engine.common.sealed import DIGEST, UNKNOWN
from slicetune.engine.data import corpus, prompts, tiny
from slicetune.engine.data import records as records_module
from slicetune.engine.data.config import DataConfig
from slicetune.engine.data.tokenizer import turns
from slicetune.engine.evaluation.translation import Translated
from slicetune.engine.models import load as models
from slicetune.engine.models.shapes import from_config
from slicetune.engine.run import cli, status
from slicetune.engine.run.config import RunConfig
from slicetune.engine.run.stages import Stages
from slicetune.engine.scoring.statistics import Statistics
from slicetune.engine.slices.neurons import NeuronSet

CAMPAIGN = "SLICETUNE_FUZZ" in os.environ
fuzz = settings(
    max_examples=int(os.environ.get("SLICETUNE_FUZZ", "80")),
    deadline=None,
    derandomize=not CAMPAIGN,
    database=None,
    suppress_health_check=list(HealthCheck),
)

REFUSED = object()


def attempt(work: Callable[[], Any], naming: object = "") -> Any:
    """What `work` returns, or REFUSED after a UserError of one line that names the file; anything else is a fault."""
    try:
        return work()
    except UserError as error:
        line = str(error)
    assert "\n" not in line
    assert str(naming) in line
    return REFUSED


# ---------------------------------------------------------------- what damage looks like

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
sides = st.text(max_size=12) | st.sampled_from(["", " ", "\0", "a\r\nb", "\ud800", "x" * 1_000_001]) | values
records = st.fixed_dictionaries({"translation": st.dictionaries(st.sampled_from(["de", "en", "fr"]), sides) | values})
lines = st.one_of(
    records.map(lambda r: json.dumps(r).encode()),
    st.fixed_dictionaries({"input": sides, "output": sides}).map(lambda r: json.dumps(r).encode()),
    values.map(lambda v: json.dumps(v).encode()),
    st.binary(max_size=30),
    st.sampled_from([b"[", b"{" * 5000, b"[" * 5000, b"\xef\xbb\xbf{}", b"\r", b""]),
)
SOUND = [json.dumps({"translation": {"de": f"Haus {i}", "en": f"house {i}"}}).encode() for i in range(3)]


@st.composite
def damage(draw, content: bytes) -> bytes:
    """`content` with one to three flips, cuts, insertions or zeroed stretches."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "zero", "huge"]))
        if kind == "flip" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[place : place + draw(st.integers(1, 200))]
        elif kind == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "zero":
            stretch = min(16, len(data) - place)
            data[place : place + stretch] = bytes(stretch)
        else:
            data[place : place + 8] = b"\xff" * 8
    return bytes(data)


# ---------------------------------------------------------------- data files


def read(root: Path) -> list[records_module.Pair]:
    data = DataConfig(dir=str(root), seen=("d",), unseen=(), max_dropped=1.0)
    return corpus.load_domain(data, "d", "train")


def sound(pair: records_module.Pair) -> bool:
    return all(
        side.strip() == side and side and not set(side) & set("\r\n\0") and side.encode()
        for side in (pair.source, pair.target)
    )


@pytest.fixture(scope="module")
def domain(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    (root / "de-en" / "d").mkdir(parents=True)
    return root


@fuzz
@given(st.lists(st.sampled_from(SOUND) | lines, max_size=6), st.sampled_from([b"\n", b"\r\n"]), st.booleans())
@example([b"[", b"]"], b"\n", False)
def test_json_lines(domain, content, end, array):
    text = b"[" + b",".join(content) + b"]" if array else end.join(content)
    (domain / "de-en" / "d" / "train.jsonl").write_bytes(text)
    pairs = attempt(lambda: read(domain))
    if pairs is REFUSED:
        return
    assert pairs
    assert all(map(sound, pairs))


@fuzz
@given(st.lists(st.binary(max_size=20), max_size=5), st.lists(st.binary(max_size=20), max_size=5))
def test_aligned_files(tmp_path_factory, german, english):
    root = tmp_path_factory.mktemp("aligned")
    folder = root / "de-en" / "d"
    folder.mkdir(parents=True)
    (folder / "train.de").write_bytes(b"\n".join(german))
    (folder / "train.en").write_bytes(b"\n".join(english))
    pairs = attempt(lambda: read(root))
    shutil.rmtree(root)
    if pairs is REFUSED:
        return
    assert all(map(sound, pairs))
    for pair in pairs:  # a line is paired with the line of its own number, whatever was dropped before it
        line = b"\n".join(german).split(b"\n")[pair.index - 1].removeprefix(b"\xef\xbb\xbf" * (pair.index == 1))
        assert pair.source == re.sub(r"[\r\n]+", " ", line.decode().strip())


@fuzz
@given(st.data())
def test_damaged_gzip(domain, data):
    import gzip

    path = domain / "de-en" / "d" / "dev.jsonl.gz"
    path.write_bytes(data.draw(damage(gzip.compress(b"\n".join(SOUND)))))
    config = DataConfig(dir=str(domain), seen=("d",), unseen=(), max_dropped=1.0)
    with contextlib.suppress(UserError):
        assert all(map(sound, corpus.load_domain(config, "d", "dev")))


# ---------------------------------------------------------------- prompts


@pytest.fixture(scope="module")
def tokenizer():
    return models.load_tokenizer(str(tiny.model_dir("test")))


@fuzz
@given(
    st.text(string.ascii_letters + "{}!:.[]0 ", max_size=30) | st.just("{tgt} {src} {domain}"),
    st.text(max_size=30) | st.sampled_from(["<s>", "</s>", "<|user|>", "<|end|>", "<unk>", "<pad>"]),
)
@example("{tgt.__class__}", "a")
@example("{tgt!r:>9999999}", "a")
@example("{tgt[0]}", "a")
def test_prompts(tokenizer, text, sentence):
    prompt = attempt(lambda: prompts.resolve(DataConfig(prompt=text)))
    if prompt is REFUSED:
        return
    pair = records_module.Pair(sentence, sentence, "it", 1, ("de", "en"))
    ids, start = prompts.encode(tokenizer, prompt, pair)
    asked, end = prompts.encode(tokenizer, prompt, pair, with_target=False)
    assert 0 < start < len(ids)
    assert ids[:start] == asked
    assert end == len(asked)
    plain = records_module.Pair("a", "b", "it", 1, ("de", "en"))
    special = turns.special_ids(tokenizer) - {tokenizer.unk_token_id}
    count = [sum(i in special for i in prompts.encode(tokenizer, prompt, p)[0]) for p in (pair, plain)]
    assert count[0] == count[1], "a sentence forged a special token"


# ---------------------------------------------------------------- neuron sets, statistics


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("files")
    toys.neurons().save(root / "neurons.safetensors")
    stats = Statistics(["a", "b"], from_config(toys.model().config))
    stats.save(root / "statistics.safetensors")
    return root


@fuzz
@given(st.data())
def test_damaged_neuron_sets(files, data):
    path = files / "damaged.safetensors"
    path.write_bytes(data.draw(damage((files / "neurons.safetensors").read_bytes())))
    neurons = attempt(lambda: NeuronSet.load(path), path)
    if neurons is REFUSED:
        return
    assert neurons == toys.neurons(), "changed neurons were accepted"
    neurons.describe()


@fuzz
@given(st.data())
def test_damaged_statistics(files, data):
    """Anywhere in the file: the digest lets nothing through but what was written."""
    content = (files / "statistics.safetensors").read_bytes()
    path = files / "damaged-statistics.safetensors"
    path.write_bytes(data.draw(damage(content)))
    assert attempt(lambda: Statistics.load(path), path) is REFUSED or path.read_bytes() == content


@fuzz
@given(st.data())
def test_forged_statistics(files, data):
    """A damaged header with a digest that fits, as a stranger might write it."""
    content = (files / "statistics.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    forged = data.draw(damage(DIGEST.sub(b'"digest": "' + UNKNOWN.encode() + b'"', content[:start]))) + content[start:]
    path = files / "forged-statistics.safetensors"
    path.write_bytes(forged.replace(UNKNOWN.encode(), hashlib.sha256(forged).hexdigest().encode(), 1))
    stats = attempt(lambda: Statistics.load(path), path)
    if stats is REFUSED:
        return
    assert all(t.shape[:2] == (len(stats.groups), stats.layers) for t in stats.histogram.values())


# ---------------------------------------------------------------- settings

FLAGS = {
    "--train.learning-rate": lambda c: 0 < c.train.learning_rate < math.inf,
    "--train.epochs": lambda c: c.train.epochs >= 1,
    "--train.max-steps": lambda c: c.train.max_steps >= 0,
    "--train.micro-batch-size": lambda c: c.train.micro_batch_size >= 0,
    "--train.global-batch-size": lambda c: c.train.global_batch_size >= 1,
    "--train.adam-beta1": lambda c: 0 <= c.train.adam_beta1 < 1,
    "--train.adam-beta2": lambda c: 0 <= c.train.adam_beta2 < 1,
    "--train.adam-epsilon": lambda c: c.train.adam_epsilon > 0,
    "--train.weight-decay": lambda c: c.train.weight_decay >= 0,
    "--train.max-grad-norm": lambda c: c.train.max_grad_norm >= 0,
    "--train.sweep": lambda c: all(0 < rate < math.inf for rate in c.train.sweep),
    "--data.max-dropped": lambda c: 0 <= c.data.max_dropped <= 1,
    "--data.dev-sentences": lambda c: c.data.dev_sentences >= 0,
    "--data.max-length": lambda c: c.data.max_length >= 1,
    "--data.pair": lambda c: all(
        "/" not in code and code not in ("", ".", "..") for code in (c.data.source, c.data.target)
    ),
    "--data.seen": lambda c: c.data.seen and all("/" not in d and d not in ("", ".", "..") for d in c.data.seen),
    "--data.unseen": lambda c: not set(c.data.seen) & set(c.data.unseen),
    "--score.tokens-per-batch": lambda c: c.score.tokens_per_batch == "auto" or c.score.tokens_per_batch >= 1,
    "--score.save-minutes": lambda c: c.score.save_minutes >= 0,
    "--evaluate.batch-size": lambda c: c.evaluate.batch_size >= 1,
    "--method.neuron-ratio": lambda c: 0 < c.method.neuron_ratio <= 1,
    "--zero.stage": lambda c: c.zero.stage in (1, 2, 3),
    "--seed": lambda c: isinstance(c.seed, int),
}
words = st.one_of(
    st.integers(-5, 5).map(str),
    st.floats().map(str),
    st.sampled_from(
        ["nan", "inf", "-1e400", "", "de-en", "../../x", "a/b", "de-../x", "..", "it", "koran", "x" * 300, "None"]
    ),
    st.text(max_size=6),
)


@fuzz
@given(st.lists(st.tuples(st.sampled_from(sorted(FLAGS)), words), min_size=1, max_size=3))
def test_settings(chosen):
    args = [word for flag, value in chosen for word in (flag, value)]
    quiet = io.StringIO()
    code = 0
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            config = attempt(lambda: cli.parse(RunConfig(), args))
    except SystemExit as stop:  # tyro's own, for what is no value of the flag's type
        code, config = stop.code, REFUSED
    assert code in (0, 2)
    if config is REFUSED:
        return
    for flag, _ in chosen:
        assert FLAGS[flag](config), f"{args} was accepted"


# ---------------------------------------------------------------- checkpoints, records


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    checkpoint.save(root / "step-3", {"master/a": torch.arange(60.0)}, {"step": 3, "identity": {"toy": 1}})
    return root / "step-3"


@fuzz
@given(st.data())
def test_damaged_checkpoints(whole, data):
    folder = whole.with_name("step-5")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    for name in data.draw(st.sets(st.sampled_from(["state.safetensors", "state.json", "manifest.json"]), min_size=1)):
        (folder / name).write_bytes(data.draw(damage((folder / name).read_bytes())))
    newest, faults = checkpoint.newest(folder.parent)
    assert newest in (whole, folder)
    assert (newest == whole) == any(str(folder) in fault for fault in faults)
    loaded = attempt(lambda: checkpoint.load(folder), folder)
    if loaded is REFUSED:
        return
    tensors, state = loaded
    assert torch.equal(tensors["master/a"], torch.arange(60.0)), "changed weights were accepted"
    assert state == {"step": 3, "identity": {"toy": 1}}


@fuzz
@given(values)
def test_manifests_and_states_of_any_json(whole, content):
    """As a stranger might write them: any JSON, with digests that fit."""
    folder = whole.with_name("step-7")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    (folder / "state.json").write_text(json.dumps(content))
    listed = {p.name: {"bytes": p.stat().st_size, "sha256": checkpoint._sha256(p)} for p in folder.glob("state.*")}
    (folder / "manifest.json").write_text(json.dumps(listed))
    with contextlib.suppress(UserError):
        assert checkpoint.load(folder)[1]["step"] >= 0
    (folder / "manifest.json").write_text(json.dumps(content))
    assert checkpoint.fault(folder)


@fuzz
@given(values | st.dictionaries(st.sampled_from(["score", "train"]), values, min_size=1))
def test_stage_records_of_any_json(tmp_path_factory, content):
    out = tmp_path_factory.mktemp("out")
    (out / "stages.json").write_text(json.dumps(content))
    (out / "status.json").write_text(json.dumps(content))
    status.read(out).get("state")
    with contextlib.suppress(UserError):
        Stages(out).seconds()
    (out / "finished.json").write_text(json.dumps(content))
    assert not Translated(out, {"toy": 1}).has("it.en")
    shutil.rmtree(out)
