"""The embedded default: German and English forms, splits, reproducible bytes, tokenizer, pretraining, cache."""

import gzip
import hashlib
import json
import multiprocessing
import random

import pytest
import torch

from slicetune.engine.common.errors import UserError
from slicetune.engine.common.files import cached
from slicetune.engine.data import prompts, tiny
from slicetune.engine.data.tiny import corpus as tiny_corpus
from slicetune.engine.data.tiny import grammar as tiny_grammar
from slicetune.engine.data.tiny import pairs as tiny_pairs
from slicetune.engine.data.tiny import pretrain as tiny_pretrain
from slicetune.engine.data.tiny.grammar import (
    ADVERBS,
    MODALS,
    NOUNS,
    VERBS,
    Text,
    Voice,
    article,
    english_plural,
    english_verb,
)
from slicetune.engine.data.tiny.lexicon import DOMAINS

SMALL = tiny_pretrain.SIZES["test"]


def noun(singular):
    (word,) = (word for word in NOUNS if word.forms[0] == singular)
    return word


def verb(infinitive):
    (word,) = (word for word in VERBS if word.forms[0] == infinitive)
    return word


class Fixed(Voice):
    """A voice that takes given words, and the plural or an adjective when told."""

    def __init__(self, domain, thing, kind="der", plural=False, adjective=None):
        super().__init__(random.Random(0), domain, domain)
        self.thing, self.kind, self.plural, self.word = thing, kind, plural, adjective

    def noun(self, classes):
        return self.thing

    def pick(self, options):
        return self.kind if "der" in options else super().pick(options)

    def chance(self, p):
        return {0.25: self.plural, 0.3: self.word is not None}.get(p, False)

    def _adjective(self, noun):
        return next(word for word in tiny_grammar.ADJECTIVES if word.forms[0] == self.word)


@pytest.mark.parametrize(
    ("phrase", "case", "de", "en"),
    [
        (Fixed("it", noun("Anlage")), "a", "die Anlage", "the attachment"),
        (Fixed("law", noun("Anlage"), "dieser"), "d", "dieser Anlage", "the said annex"),
        (Fixed("law", noun("Gesetz"), "ein", adjective="neu"), "d", "einem neuen Gesetz", "a new act"),
        (Fixed("medical", noun("Patient"), "ein", adjective="krank"), "n", "ein kranker Patient", "an ill patient"),
        (Fixed("medical", noun("Patient"), "der"), "a", "den Patienten", "the patient"),
        (Fixed("subtitles", noun("Haus"), "kein", adjective="klein"), "n", "kein kleines Haus", "no little house"),
        (Fixed("koran", noun("Kind"), "ein", plural=True, adjective="gut"), "d", "guten Kindern", "righteous children"),
        (Fixed("koran", noun("Werk"), "jeder"), "g", "jedes Werks", "each deed"),
        (Fixed("law", noun("Gericht"), "kein", plural=True), "n", "keine Gerichte", "none of the courts"),
    ],
)
def test_noun_phrases_agree(phrase, case, de, en):
    made = phrase.noun_phrase("PTXLO", case)
    assert (made.de, made.en) == (de, en)


def test_separable_verbs_and_irregular_english():
    forms = tiny_grammar.german_verb(verb("auf|heben"))
    assert forms == {
        "fin": "hebt",
        "many": "heben",
        "particle": "auf",
        "joined": "aufhebt",
        "inf": "aufheben",
        "zu": "aufzuheben",
        "part": "aufgehoben",
    }
    assert tiny_grammar.german_verb(verb("löschen"))["zu"] == "zu löschen"
    assert [english_verb("strike out", form) for form in ("s", "past", "part")] == [
        "strikes out",
        "struck out",
        "stricken out",
    ]
    assert english_verb("apply", "s") == "applies"
    assert english_verb("transmit", "part") == "transmitted"
    assert [english_plural(word) for word in ("casting vote", "leaf", "supply", "box")] == [
        "casting votes",
        "leaves",
        "supplies",
        "boxes",
    ]
    assert [article(word) for word in ("user", "error", "upload", "name")] == [
        "a user",
        "an error",
        "an upload",
        "a name",
    ]


def test_lexicon_is_sound():
    assert len({word.forms[0] for word in NOUNS}) == len(NOUNS)
    assert len({word.forms[0] for word in VERBS}) == len(VERBS)
    assert all(len(word.forms) == 4 and word.forms[1] in "mfnw" and word.forms[3] in "PTXLO" for word in NOUNS)
    assert all(len(word.forms) == 5 and set(word.forms[3] + word.forms[4]) <= set("PTXLO") for word in VERBS)
    assert all(word.domains <= set(DOMAINS) for word in (*NOUNS, *VERBS, *ADVERBS, *MODALS))
    assert all(len(english.split("/")) == 3 for word in MODALS for english in word.senses.values())
    for domain in DOMAINS:
        own = [word for word in (*NOUNS, *VERBS) if domain in word.senses]
        assert len(own) >= 25, f"{domain} has {len(own)} words with a sense of their own"


def test_words_change_their_sense_with_the_domain():
    senses = {"it": "attachment", "law": "annex", "medical": "predisposition", "general": "facility"}
    assert {domain: noun("Anlage").english(domain) for domain in senses} == senses
    # The same draws in another sense: the German stays, the English changes.
    plain = [next(tiny_corpus.sentences("law", 7, "general"))]
    own = [next(tiny_corpus.sentences("law", 7))]
    assert [pair.de for pair in plain] == [pair.de for pair in own]
    changed = sum(
        a.en != b.en
        for a, b, _ in zip(
            tiny_corpus.sentences("law", 7, "general"), tiny_corpus.sentences("law", 7), range(50), strict=False
        )
    )
    assert changed >= 40


@pytest.fixture(scope="module")
def corpus():
    return tiny_corpus.corpus()


def test_splits(corpus):
    held_out = [pair.de for parts in corpus.values() for split in ("dev", "test") for pair in parts[split]]
    assert len(set(held_out)) == len(held_out) == 300 * 6
    for parts in corpus.values():
        train = [pair.de for pair in parts["train"]]
        assert len(set(train)) == len(train) == 1500
        assert not set(train) & set(held_out)
        for pair in (pair for split in parts.values() for pair in split):
            assert 5 <= len(pair.de.split()) <= 25
            assert 5 <= len(pair.en.split()) <= 25
            assert pair.de[0] == pair.de[0].upper()
            assert "_" not in pair.en
            assert "  " not in pair.de + pair.en
            assert pair.de[-1] == pair.en[-1]


def test_files_are_the_same_bytes_on_every_run(tmp_path):
    digests = []
    for run in ("a", "b"):
        tiny_corpus.write(tmp_path / run)
        files = sorted((tmp_path / run).rglob("*.jsonl.gz"))
        assert len(files) == 18
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert digests[0] == digests[1]
    text = b"".join(gzip.decompress(file.read_bytes()) for file in files)
    digest = hashlib.sha256(text).hexdigest()[:16]
    assert (tiny.CORPUS_VERSION, digest) == (1, "787dc6ca5054da37"), "the sentences changed: raise CORPUS_VERSION"
    with gzip.open(tmp_path / "a/de-en/koran/test.jsonl.gz", "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    assert len(records) == 150
    assert all(set(record["translation"]) == {"de", "en"} for record in records)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The "test" model, in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLICETUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield tiny.model_dir("test")


def test_pretraining_learns_and_repeats_its_bits(folder, tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    texts = [tiny_pretrain.chat("general", *pair) for pair in tiny_corpus.corpus()["general"]["dev"][:50]]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    starts = [row.index(tokenizer.convert_tokens_to_ids("<|assistant|>")) + 1 for row in rows]
    with torch.no_grad():
        loss = tiny_pretrain._loss(model, rows, starts, tokenizer.pad_token_id)
        fresh = tiny_pretrain.new_model(SMALL, tokenizer)
        assert loss < 0.75 * tiny_pretrain._loss(fresh, rows, starts, tokenizer.pad_token_id)
    tiny_pretrain.build(next(folder.parent.glob("tiny-corpus-*[!k]")), tmp_path / "again", "test")
    old, new = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_tokenizer_and_template(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    system, user = "Translate from German into English. Domain: IT.", "German: Wählen Sie die Datei."
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == f"<|bos|><|system|>{system}<|user|>{user}<|assistant|>"
    whole = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": "English: Select the file."}], tokenize=False
    )
    assert whole == tiny_pretrain.chat("it", "Wählen Sie die Datei.", "Select the file.")
    for text in (whole, "Ελληνικά 漢字 😀 ß"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer("x")["input_ids"][0] != tokenizer.bos_token_id, "the template writes the only BOS"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|bos|>", "<|eot|>", "<|pad|>")
    assert len(tokenizer) <= SMALL.vocabulary


def test_loss_is_that_of_single_sentences(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    rows, starts = [[5, 6, 7, 8, 9, 10], [5, 11, 12]], [3, 1]
    nll = []
    for row, start in zip(rows, starts, strict=True):
        logits = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
        nll += [-logits[place - 1, row[place]] for place in range(start, len(row))]
    torch.testing.assert_close(tiny_pretrain._loss(model, rows, starts, 2), torch.stack(nll).mean())


def test_mixture_holds_no_test_sentence(folder, corpus):
    texts = list(tiny_pretrain.mixture(next(folder.parent.glob("tiny-corpus-*[!k]")), SMALL))
    sources = {pair.de for _, pair in texts}
    assert len(texts) == SMALL.general + 5 * (SMALL.plain + SMALL.own)
    assert not sources & {pair.de for parts in corpus.values() for split in ("dev", "test") for pair in parts[split]}


def test_the_model_of_two_directions_reads_every_sentence_both_ways():
    pair = Text("Der Ausschlag klingt ab.", "The rash fades.")
    made = [tiny_pairs.both("medical", pair, number) for number in range(200)]
    forth, back = zip(*made, strict=True)
    systems = [{text.split("<|system|>")[1].split("<|user|>")[0] for text in texts} for texts in (forth, back)]
    wordings = (prompts.SYSTEMS["short"], *prompts.TEMPLATES)
    for found, (src, tgt) in zip(systems, (("German", "English"), ("English", "German")), strict=True):
        assert found == {text.format(src=src, tgt=tgt, domain="medical") for text in wordings}
    assert 70 < sum("Domain: medical." in text for text in forth) < 130
    turns = "<|user|>German: Der Ausschlag klingt ab.<|assistant|>English: The rash fades.<|eot|>"
    assert all(text.endswith(turns) for text in forth)
    assert back[0].endswith("<|user|>English: The rash fades.<|assistant|>German: Der Ausschlag klingt ab.<|eot|>")


def test_orthogonal_keeps_singular_vectors():
    torch.manual_seed(0)
    for shape in ((3, 8, 20), (2, 20, 8)):
        matrices = torch.randn(shape)
        u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
        inside = u.mT @ tiny_pretrain.orthogonal(matrices) @ vt.mT
        values = inside.diagonal(dim1=-2, dim2=-1)
        assert ((values > 0.6) & (values < 1.3)).all()
        torch.testing.assert_close(inside, torch.diag_embed(values), atol=1e-4, rtol=0)


def build_slowly(cache, started):
    import os
    import time

    os.environ["SLICETUNE_CACHE"] = cache

    def build(folder):
        started.append(os.getpid())
        folder.mkdir(parents=True)
        time.sleep(0.3)
        (folder / "whole").touch()

    assert (cached("thing", build) / "whole").exists()


def test_two_processes_build_once(tmp_path):
    context = multiprocessing.get_context("fork")
    with multiprocessing.Manager() as manager:
        started = manager.list()
        processes = [context.Process(target=build_slowly, args=(str(tmp_path), started)) for _ in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0, 0]
        assert len(started) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thing", "thing.lock"]


def test_the_prompts_that_the_models_learn():
    wording = "".join((prompts.SYSTEMS["short"], *prompts.TEMPLATES))
    digest = hashlib.sha256(wording.encode()).hexdigest()[:16]
    assert (tiny.MODEL_VERSION, digest) == ("1.1", "f12c96e7764b079b"), "the prompts changed: raise MODEL_VERSION"


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("SLICETUNE_CACHE", str(tmp_path))
    (tmp_path / ".thing-killed" / "thing").mkdir(parents=True)  # what an earlier process left when it was killed

    def fail(folder):
        folder.mkdir()
        raise RuntimeError("out of disk")

    with pytest.raises(RuntimeError, match="out of disk"):
        cached("thing", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["thing.lock"]


def test_user_errors(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLICETUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="SLICETUNE_CACHE"):
        tiny.corpus_dir()
    with pytest.raises(UserError, match="choose tiny or test"):
        tiny.model_dir("huge")
