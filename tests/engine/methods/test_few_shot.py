"""Examples in the prompt: whose they are, how they are drawn, what becomes of the answer; a run of two directions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest
import torch
from toys import bytes_tokenizer, model_of_bytes

from slicetune.engine.common.errors import UserError
from slicetune.engine.common.files import read_lines
from slicetune.engine.data import corpus, prompts
from slicetune.engine.data.config import DataConfig
from slicetune.engine.data.draws import order
from slicetune.engine.data.records import Pair
from slicetune.engine.evaluation.translation import translate
from slicetune.engine.methods.few_shot import FewShot, fit
from slicetune.engine.scoring.statistics import Statistics

DE_EN = ("de", "en")
RECIPES = Path(__file__).parents[3] / "recipes"
PROMPT = prompts.Prompt(system="{src} to {tgt}.")


def write(path: Path, *rows: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"translation": row}) + "\n" for row in rows))


def rows(code: str, domain: str, split: str, count: int) -> list[dict[str, str]]:
    return [{c: f"{c} {domain} {split} {i}" for c in (code, "en")} for i in range(count)]


@pytest.fixture
def root(tmp_path):
    for domain in ("it", "law", "koran"):
        for split in ("train", "dev", "test"):
            write(tmp_path / "de-en" / domain / f"{split}.jsonl", *rows("de", domain, split, 12))
    return tmp_path


def data_of(root, **kwargs) -> DataConfig:
    settings = {"pairs": ("de-en", "en-de"), "seen": ("it", "law"), "unseen": ("koran",), "score_sentences": 2}
    return DataConfig(dir=str(root), **{**settings, **kwargs})


def test_order_is_every_number_once_and_any_order_as_likely_as_another():
    assert sorted(order(50, "a")) == list(range(50))
    assert list(order(50, "a")) == list(order(50, "a")) != list(order(50, "b"))
    found = [tuple(order(3, key)) for key in range(3000)]
    assert all(abs(found.count(p) - 500) < 100 for p in permutations(range(3)))  # standard deviation 20


def test_examples_come_from_the_same_domain_and_direction(root):
    forth, back = corpus.directions(data_of(root))
    tests = corpus.load_domain(back, "law", "test")
    drawn = FewShot(shots=3).examples(back, "law", tests, seed=4)
    assert [len(few) for few in drawn] == [3] * 12
    for few in drawn:
        assert len({p.index for p in few}) == 3
        assert all(p.source.startswith("en law train") and p.languages == ("en", "de") for p in few)
    assert len({tuple(p.index for p in few) for few in drawn}) > 6  # each sentence its own
    assert drawn == FewShot(shots=3).examples(back, "law", tests, seed=4)
    assert drawn != FewShot(shots=3).examples(back, "law", tests, seed=5)
    unseen = FewShot(shots=5).examples(forth, "koran", corpus.load_domain(forth, "koran", "test"), seed=4)
    assert {p.domain for few in unseen for p in few} == {"it", "law"}


def test_no_example_is_the_sentence_itself_or_gives_its_translation_away(root):
    train = rows("de", "it", "train", 6)
    test = [{"de": train[0]["de"], "en": "new"}, {"de": "neu", "en": train[1]["en"]}, {"de": "x", "en": "y"}]
    write(root / "de-en/it/train.jsonl", *train, train[2] | {"en": "said twice"})
    write(root / "de-en/it/test.jsonl", *test)
    data = corpus.directions(data_of(root))[0]
    tests = corpus.load_domain(data, "it", "test")
    for seed in range(40):
        for sentence, few in zip(tests, FewShot(shots=5).examples(data, "it", tests, seed), strict=True):
            assert sentence.source not in {p.source for p in few}
            assert sentence.target not in {p.target for p in few}
            assert len({p.source for p in few}) == 5
    with pytest.raises(UserError, match=r"--method\.shots 6: de-en/it has only 7 training sentences"):
        FewShot(shots=6).examples(data, "it", tests, 0)
    with pytest.raises(UserError, match=r"--method\.shots 0: must be at least 1"):
        FewShot(shots=0)


def test_a_prompt_that_is_too_long_loses_its_last_examples():
    tokenizer = bytes_tokenizer(False)
    tests = [Pair("Ja.", "Yes.", "it", 1, DE_EN), Pair("Nein, " * 20, "No", "it", 2, DE_EN)]
    few = [Pair("a" * 10, "b" * 10, "it", i, DE_EN) for i in range(4)]

    def length(test, shots):
        return len(prompts.encode(tokenizer, PROMPT, test, with_target=False, shots=shots)[0])

    limit = length(tests[0], few)
    kept, short = fit(tokenizer, PROMPT, tests, [few, few], limit)
    assert (kept[0], short) == (few, 1)
    assert kept[1] == few[: len(kept[1])]
    assert length(tests[1], kept[1]) <= limit < length(tests[1], few[: len(kept[1]) + 1])
    assert fit(tokenizer, PROMPT, tests, [few, few], 20) == ([[], []], 2)  # zero-shot whatever it takes


def test_a_base_models_answer_is_the_line_that_it_writes():
    """Without a chat template generation ends at a line's end: what would follow is the next example."""
    model, tokenizer = model_of_bytes("llama"), bytes_tokenizer(False)
    pairs = [Pair(text, "b", "it", i, DE_EN) for i, text in enumerate(("Ja.", "Nein, danke.", "Die Anlage."))]
    few = [Pair("Oh.", "Oh.", "it", 9, DE_EN)]
    prompted = [prompts.encode(tokenizer, PROMPT, p, with_target=False, shots=few)[0] for p in pairs]
    free = _greedy(model, prompted[0], 24)
    place = next(i for i in range(4, 24) if free[i] not in free[:i])
    head = model.get_output_embeddings().weight.data
    head[tokenizer.convert_tokens_to_ids("Ċ")] = 1.01 * head[free[place]]  # a newline where that token would come
    written = [tokenizer.decode(_greedy(model, ids, 24), skip_special_tokens=True) for ids in prompted]
    assert "\n" in written[0].strip()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    made = translate(model, tokenizer, PROMPT, pairs[:1], 1, 24, shots=[few])
    assert len(calls) == place + 1  # it does not write on to the limit
    made += translate(model, tokenizer, PROMPT, pairs[1:], 3, 24, shots=[few] * 2)
    assert [line.text for line in made] == [text.partition("\n")[0].strip() for text in written]
    assert [line.cut for line in made] == ["\n" not in text for text in written]  # at the line's end it has ended
    whole = translate(model, tokenizer, PROMPT, pairs, 3, 24, shots=[[]] * 3)
    assert whole == translate(model, tokenizer, PROMPT, pairs, 3, 24)  # without examples nothing is cut


@torch.no_grad()
def _greedy(model, tokens: list[int], count: int) -> list[int]:
    ids = list(tokens)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(tokens) :]


def test_a_run_of_two_directions(root, tmp_path):
    """CANEFT on a BLOOM of bytes, from text to results: groups are directions, and so are files and scores."""
    base = tmp_path / "base"
    model_of_bytes("bloom").save_pretrained(base)
    bytes_tokenizer(False).save_pretrained(base)
    flags = "--data.prompt templates --data.pairs de-en en-de --data.seen it law --data.unseen koran"
    flags += " --data.score-sentences 8 --data.train-sentences 4 --data.dev-sentences 2 --data.test-sentences 2"
    flags += " --data.max-length 900 --evaluate.max-new-tokens 4 --evaluate.smooth none"
    places = ["--model.path", str(base), "--data.dir", str(root)]
    train = "--method.neuron-ratio 0.05 --train.epochs 1 --train.global-batch-size 4 --train.report-to"
    for recipe, more in (("caneft", train), ("few_shot_pairs", "--evaluate.no-base --method.shots 2")):
        system, out = recipe.removesuffix("_pairs"), tmp_path / recipe
        command = [sys.executable, str(RECIPES / f"{recipe}_tiny.py"), *places, "--out", str(out)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command += [*flags.split(), *more.split()]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        results = json.loads((out / "results.json").read_text())
        names = [f"{pair}/{domain}" for pair in ("de-en", "en-de") for domain in ("it", "law", "koran")]
        assert results["pairs"] == {"de-en": names[:3], "en-de": names[3:]}
        assert list(results["systems"]) == (["base", "caneft"] if system == "caneft" else ["few_shot"])
        for name in names:
            file = out / "translations" / system / f"{name}.{name[3:5]}"
            assert len(read_lines(file)) == 2
            assert results["systems"][system]["domains"][name]["n"] == 2
        assert "en-de, mean" in done.stdout
        assert "en-de Koran" in (out / "report.html").read_text()
    assert Statistics.load(tmp_path / "caneft" / "statistics.safetensors").groups == ["de-en", "en-de"]
    assert Statistics.load(tmp_path / "caneft" / "statistics.safetensors").samples.tolist() == [16, 16]
