"""LANDeRMT's first two stages on a folder of several directions: whose prompts, whose sentences, what is left."""

from __future__ import annotations

import json

import pytest
import torch
from toys import bytes_tokenizer, model_of_bytes

from slicetune.engine.data import monolingual
from slicetune.engine.data.batching import Example
from slicetune.engine.data.config import DataConfig
from slicetune.engine.data.tokenizer import tokens
from slicetune.engine.methods.landermt.detect import detect, prompt_only
from slicetune.engine.methods.landermt.detection import Detection
from slicetune.engine.methods.landermt.routes import Routes
from slicetune.engine.methods.landermt.settings import Landermt
from slicetune.engine.models.config import ModelConfig
from slicetune.engine.run.config import RunConfig
from slicetune.engine.run.job import Job
from slicetune.engine.run.run import Run
from slicetune.engine.scoring.config import ScoreConfig

PAIRS = ("de-en", "en-de", "fr-en")


@pytest.fixture
def run(tmp_path):
    model_of_bytes("bloom").save_pretrained(tmp_path / "model")
    bytes_tokenizer(chat=False).save_pretrained(tmp_path / "model")
    for code in ("de", "fr"):
        for split in ("train", "test"):
            rows = [{c: f"{c} {split} {i}" for c in (code, "en")} for i in range(5)]
            path = tmp_path / "data" / f"{code}-en" / "it" / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps({"translation": row}) + "\n" for row in rows))
    data = {"dir": str(tmp_path / "data"), "pairs": PAIRS, "seen": ("it",), "unseen": (), "dev_sentences": 0}
    return Job(
        RunConfig(
            out=str(tmp_path / "out"),
            model=ModelConfig(path=str(tmp_path / "model")),
            data=DataConfig(**data, score_sentences=4),
            score=ScoreConfig(tokens_per_batch=700),
            method=Landermt(k=1),
        )
    )


def test_prompts_of_every_direction_and_sentences_of_every_language(run, capsys):
    Run(run)._score()
    found = Detection.load(run.out / "awareness.safetensors")
    assert (found.pairs, found.languages) == (PAIRS, ("de", "en", "fr"))
    assert found.prompts.tolist() == [4, 4, 4]
    assert found.sentences.tolist() == [4, 4, 4]
    assert "awareness on 4 sentences that all 3 languages have" in capsys.readouterr().out
    assert found.provenance["aligned"]
    assert not (run.out / "scoring").exists()

    asked = [prompt_only(example) for example in run.examples("train", 4)]
    assert run.tokenizer.decode(asked[0].input_ids).endswith("English:")
    texts = monolingual.texts_of(run.directions, 4, 0).sentences
    assert [text.removeprefix("de") for text in texts["de"]] == [text.removeprefix("fr") for text in texts["fr"]]
    own = [
        Example([*run.tokenizer(text, add_special_tokens=False)["input_ids"], run.tokenizer.eos_token_id], 1, i, text)
        for i, language in enumerate(found.languages)
        for text in texts[language]
    ]
    again = Detection(PAIRS, found.size["layers"], found.size["intermediate"], found.size["hidden"])
    detect(run.model(), asked, own, again, ScoreConfig(tokens_per_batch=10))
    for name in Detection.SUMS:
        torch.testing.assert_close(getattr(again, name), getattr(found, name), rtol=1e-5, atol=1e-7)


def test_routes_are_written_and_printed(run, capsys):
    Run(run)._score()
    Run(run)._select()
    routes = Routes.load(run.out / "routes.safetensors")
    assert (routes.pairs, len(routes.layers)) == (PAIRS, 1)
    assert routes.describe() in capsys.readouterr().out
    assert routes.provenance["options"]["k"] == 1


def test_one_direction_of_several_domains(run, tmp_path):
    """Groups are domains there; the direction is one."""
    run.config.data.pairs, run.config.data.pair = (), "fr-en"
    one = Job(run.config)
    Run(one)._score()
    assert Detection.load(one.out / "awareness.safetensors").prompts.tolist() == [4]


def test_examples_of_some_directions(run):
    assert {example.group for example in run.examples("train", 4)} == {0, 1, 2}
    assert {example.group for example in run.examples("train", 4, ("fr-en",))} == {2}


def test_a_bare_sentence_ends_with_the_end_token_and_cannot_forge_one():
    tokenizer = bytes_tokenizer(chat=False)
    ids = tokens.bare(tokenizer, f"a{tokenizer.eos_token}b")
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
