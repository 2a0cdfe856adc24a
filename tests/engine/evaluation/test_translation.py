"""Decoding: batched, padded and dealt out over ranks, it gives what plain greedy search gives sentence by sentence."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from toys import bytes_tokenizer, model_of_bytes

from slicetune.engine.common.errors import UserError
from slicetune.engine.common.files import read_lines, write_lines
from slicetune.engine.data import prompts
from slicetune.engine.data.records import Pair
from slicetune.engine.evaluation.translation import Line, as_line, end_tokens, gather, translate

PROMPT = prompts.Prompt(system="{src} to {tgt}. {domain}.")
PAIRS = [
    Pair("Die Anlage ist defekt.", "The unit is broken.", "it", 1, ("de", "en")),
    Pair("Ja.", "Yes.", "it", 2, ("de", "en")),
    Pair("Der Ausschlag verschwindet nach zwei Tagen von selbst.", "The rash fades.", "medical", 3, ("de", "en")),
    Pair("Nein, danke.", "No, thanks.", "it", 4, ("de", "en")),
    Pair("Absatz eins.", "Paragraph one.", "law", 5, ("de", "en")),
]


@torch.no_grad()
def one_by_one(model, tokenizer, pair: Pair, count: int, ends: list[int]) -> list[int]:
    """Greedy search as its definition has it: whole forwards, no cache, no padding."""
    tokens, start = prompts.encode(tokenizer, PROMPT, pair, with_target=False)
    tokens = list(tokens)
    for _ in range(count):
        token = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
        if token in ends:
            break
        tokens.append(token)
    return tokens[start:]


def by_hand(text: str) -> str:
    """A model's answer on one line, without what it was asked to start with."""
    text = text.strip().removeprefix("English:")
    return " ".join(part for part in text.splitlines() if part).strip()


@pytest.mark.parametrize(("kind", "chat"), [("llama", True), ("llama", False), ("bloom", False)])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_batches_give_what_single_sentences_give(kind, chat, batch_size):
    model, tokenizer = model_of_bytes(kind), bytes_tokenizer(chat)
    ends = end_tokens(model, tokenizer, PROMPT, PAIRS[0])
    expected = []
    for pair in PAIRS:
        tokens = one_by_one(model, tokenizer, pair, 12, ends)
        expected.append(by_hand(tokenizer.decode(tokens, skip_special_tokens=True)))
    made = [line.text for line in translate(model, tokenizer, PROMPT, PAIRS, batch_size, 12)]
    assert made == expected
    assert len(set(made)) > 1


def test_ranks_share_the_sentences_and_their_parts_make_the_whole():
    model, tokenizer = model_of_bytes("llama"), bytes_tokenizer(True)
    whole = translate(model, tokenizer, PROMPT, PAIRS, 2, 6)
    calls = []
    parts = [
        translate(model, tokenizer, PROMPT, PAIRS, 2, 6, rank, 3, lambda *at: calls.append(at)) for rank in range(3)
    ]
    assert [sum(line is not None for line in part) for part in parts] == [2, 2, 1]
    for lines in zip(*parts, whole, strict=True):
        assert [line for line in lines[:3] if line is not None] == [lines[3]]
    assert calls == [(1, 1)] * 3
    idle = translate(model, tokenizer, PROMPT, PAIRS[:1], 1, 6, 1, 2, lambda *at: calls.append(at))
    assert idle == [None]
    assert calls[-1] == (1, 1)  # a rank without a sentence takes part in what the others agree on
    assert translate(model, tokenizer, PROMPT, [], 2, 6) == []


def test_decoding_stops_at_the_end_of_turn_and_leaves_it_out():
    model, tokenizer = model_of_bytes("llama"), bytes_tokenizer(True)
    assert end_tokens(model, tokenizer, PROMPT, PAIRS[0]) == [
        2,
        3,
    ]  # </s> of the config, <|end|> of the chat template
    free = [one_by_one(model, tokenizer, pair, 10, []) for pair in PAIRS]
    stop = free[2][4]
    model.generation_config.eos_token_id = [stop, 2]
    assert end_tokens(model, tokenizer, PROMPT, PAIRS[0]) == sorted({2, 3, stop})
    made = translate(model, tokenizer, PROMPT, PAIRS, 5, 10)
    cut = free[2][: free[2].index(stop)]
    assert made[2] == Line(by_hand(tokenizer.decode(cut, skip_special_tokens=True)), cut=False)
    assert [line.cut for line in made] == [stop not in tokens for tokens in free]
    assert any(len(tokens) > len(cut) for tokens in free)


def test_a_prompt_with_a_token_that_the_model_has_not_is_refused():
    model, tokenizer = model_of_bytes("llama"), bytes_tokenizer(True)
    tokenizer.add_tokens(["Anlage"])
    with pytest.raises(UserError, match=r"^it/test/1: 'Anlage' is token 263, but the model's embedding has 263 rows"):
        translate(model, tokenizer, PROMPT, PAIRS, 2, 6)


def test_the_unknown_token_ends_nothing():
    model, tokenizer = model_of_bytes("llama"), bytes_tokenizer(True)
    tokenizer.unk_token = "<pad>"
    model.generation_config.eos_token_id = [0, 2]
    assert end_tokens(model, tokenizer, PROMPT, PAIRS[0]) == [2, 3]


def test_the_models_own_sampling_settings_are_not_used_and_come_back():
    model, tokenizer = model_of_bytes("llama"), bytes_tokenizer(True)
    plain = translate(model, tokenizer, PROMPT, PAIRS, 3, 12)
    theirs = model.generation_config
    theirs.update(do_sample=True, temperature=5.0, repetition_penalty=9.0, num_beams=3, max_length=1)
    model.train()
    assert translate(model, tokenizer, PROMPT, PAIRS, 3, 12) == plain
    assert model.generation_config is theirs
    assert model.training


def test_a_hypothesis_is_one_line_without_its_prefix():
    assert as_line(" English: The rash\nfades.\r\n\u2028 It\x85goes. ", "en") == "The rash fades.  It goes."
    assert as_line("The English: language", "en") == "The English: language"
    assert as_line("a\u00a0b", "en") == "a\u00a0b"


def test_files_keep_lines_and_replace_only_when_complete(tmp_path, monkeypatch):
    path = tmp_path / "translations" / "caneft" / "it.en"
    write_lines(path, ["ä", "", "c d"])
    assert path.read_bytes() == "ä\n\nc d\n".encode()
    assert read_lines(path) == ["ä", "", "c d"]
    with pytest.raises(AssertionError, match="line break"):
        write_lines(path, ["a\u2028b"])

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_lines(path, ["new"])
    assert read_lines(path) == ["ä", "", "c d"]


def test_gather_names_a_sentence_that_nobody_decoded():
    assert gather(["a", "b"]) == ["a", "b"]
    with pytest.raises(AssertionError, match="sentence 1 was decoded by no rank"):
        gather(["a", None, "c"])


def _rank(rank: int, meeting: Path, answers) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    part = ["zero", None, "two"] if rank == 0 else [None, "one", None]
    answers.put((rank, gather(part)))
    torch.distributed.destroy_process_group()


def test_two_ranks_gather_the_same_list(tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, tmp_path / "meeting", answers)) for rank in range(2)]
    for process in ranks:
        process.start()
    got = dict(answers.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(timeout=60)
    assert got == {0: ["zero", "one", "two"], 1: ["zero", "one", "two"]}
