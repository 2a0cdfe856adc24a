"""What a run says of its targets and translations: those that no model can write, those that were cut."""

from __future__ import annotations

import json

import pytest
import toys
from kinds import tokenizer_of

from slicetune.engine.common.errors import UserError
from slicetune.engine.data.config import DataConfig
from slicetune.engine.evaluation.config import EvaluateConfig
from slicetune.engine.methods.base import Base
from slicetune.engine.models import load
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.run.config import RunConfig
from slicetune.engine.run.job import Job
from slicetune.engine.run.run import Run
from slicetune.engine.scoring.score import score


def config(tmp_path, tokenizer, targets) -> RunConfig:
    toys.model_of_bytes("llama").save_pretrained(tmp_path / "model")  # an embedding of 263 rows
    tokenizer.save_pretrained(tmp_path / "model")
    for split in ("train", "test"):
        path = tmp_path / "data" / "de-en" / "it" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"translation": {"de": f"Das Haus {split} {i}", "en": text}} for i, text in enumerate(targets)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunConfig(
        out=str(tmp_path / "out"),
        model=ModelConfig(path=str(tmp_path / "model")),
        data=DataConfig(dir=str(tmp_path / "data"), prompt="short", seen=("it",), unseen=(), dev_sentences=0),
        evaluate=EvaluateConfig(max_new_tokens=3),
        method=Base(),
    )


def test_lost_targets_and_cut_translations_are_in_log_and_results(tmp_path, capsys):
    tokenizer = tokenizer_of("sentencepiece", "chatml")  # it has no bytes to fall back on
    made = config(tmp_path, tokenizer, ["the house", "the “house”", "is it", "“it”"])
    (tmp_path / "out").mkdir()
    results = Run(Job(made)).to_results()
    said = capsys.readouterr().out
    for name in ("it/train", "it/test"):
        lost = results["lost_targets"][name]
        assert (lost["of"], lost["unknown"], lost["altered"]) == (4, 2, 0)
        assert f"warning: {name}: of 4 targets 2 have characters that the tokenizer has no token for" in said
    cut = results["systems"]["base"]["domains"]["it"]["cut"]
    assert cut == json.loads((tmp_path / "out/translations/base/finished.json").read_text())["cut"]["it.en"] == 4
    assert "base: it: 4 of 4 sentences cut at --evaluate.max-new-tokens 3" in said
    assert "cut at the limit      Base: IT 4 of 4" in said
    assert json.loads((tmp_path / "out/results.json").read_text())["lost_targets"] == results["lost_targets"]


def test_tokens_beyond_the_embedding_are_named_before_a_weight_is_loaded(tmp_path, monkeypatch):
    tokenizer = toys.bytes_tokenizer(True)
    tokenizer.add_tokens(["house"])
    job = Job(config(tmp_path, tokenizer, ["it is", "the house"]))
    monkeypatch.setattr(load, "load_model", lambda *given: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=r"^it/train/2: 'house' is token 263, but the model's embedding has 263 rows"):
        job.examples("train", 2)
    (tmp_path / "code.jsonl").write_text(json.dumps({"prompt": "the", "target": " house"}) + "\n")
    with pytest.raises(UserError, match=r"code\.jsonl:1: 'house' is token 263"):
        score(str(tmp_path / "model"), [str(tmp_path / "code.jsonl")], out=tmp_path / "statistics.safetensors")
