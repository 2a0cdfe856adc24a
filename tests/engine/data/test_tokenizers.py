"""The kinds of tokenizers and templates that exist: what training shows the model is what decoding asks it."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
from kinds import KINDS, TEMPLATES, tokenizer_of

from slicetune.engine.common.errors import UserError
from slicetune.engine.data import labelled
from slicetune.engine.data.prompts import Prompt, encode
from slicetune.engine.data.records import Pair
from slicetune.engine.data.tokenizer import tokens, turns
from slicetune.engine.evaluation.translation import _line, end_tokens, stop_text

PROMPT = Prompt(system="Translate from {src} into {tgt}. Domain: {domain}.")
REFERENCES = ("The house is old.", "“It is 12,” he said.", "a", "Übung 3: yes and no", "是的。")
MODEL = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))


def written(tokenizer, kind, reference):
    """The reference as this kind of tokenizer can write it."""
    if kind != "wordpiece":
        return reference
    return tokenizer.decode(tokenizer(reference, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_training_shows_is_what_decoding_asks(kind, template):
    tokenizer = tokenizer_of(kind, template)
    if kind == "wordpiece" and template.startswith("text"):
        with pytest.raises(UserError, match="cannot be told from a translation"):
            turns.turn(tokenizer)
        return
    shots = (Pair("Das Haus.", "The house.", "it", 7, ("de", "en")),)
    for (i, reference), few in itertools.product(enumerate(REFERENCES), ((), shots)):
        if kind in ("sentencepiece", "wordpiece") and not reference.isascii():
            continue  # no bytes to fall back on
        pair = Pair("Das Haus ist alt.", reference, "it", i, ("de", "en"))
        alone, at = encode(tokenizer, PROMPT, pair, with_target=False, shots=few)
        ids, start = encode(tokenizer, PROMPT, pair, shots=few)
        assert ids[:start] == alone
        assert start == at == len(alone)
        assert ids.count(tokenizer.bos_token_id) <= 1
        ends, stop = end_tokens(MODEL, tokenizer, PROMPT, pair), stop_text(tokenizer, bool(few))
        assert ids[-1] in ends
        assert tokenizer.unk_token_id not in ends
        assert not set(ids[start:-1]) & set(ends)
        line = _line(tokenizer, ids[start:], ends, stop, len(ids), "en")
        assert line.text == written(tokenizer, kind, reference)
        assert not line.cut
        if not tokenizer.chat_template:
            assert not tokenizer.decode(alone)[-1].isspace()


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_prompt_and_its_target_are_the_tokens_of_their_text(kind):
    """No space alone at the seam, and none twice: as a base model has read them."""
    tokenizer = tokenizer_of(kind, "none")
    head, target = "German: Das Haus\nEnglish:", " The house is old."
    whole = tokenizer(head + target, add_special_tokens=False)["input_ids"]
    ids, start = tokens.plain(tokenizer, head, target)
    own = [i for i in ids if i not in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
    assert own == whole
    assert tokens.plain(tokenizer, head + " ", target[1:]) == (ids, start)
    assert tokens.plain(tokenizer, head + " ")[0] == ids[:start]


@pytest.mark.parametrize("kind", ["bytes", "tiktoken", "llama2", "llama2_legacy", "sentencepiece_bytes"])
def test_tokens_that_merge_across_the_seam_leave_decodings_prompt(kind):
    """`def f(` + `x):` may be one token in a text: the prompt's ids stay, the rest has no space before it."""
    tokenizer = tokenizer_of(kind, "none")
    for prompt, target in (("the h", "ouse is"), ("a\n", "\nb"), ("The hou", "se"), ("x:", ": y")):
        ids, start = tokens.plain(tokenizer, prompt, target)
        assert ids[:start] == tokens.plain(tokenizer, prompt)[0]
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert text == (prompt + target).strip()


def test_the_end_of_a_turn():
    ends = {name: tokens.ends(tokenizer_of("bytes", name)) for name in ("chatml", "normal", "text", "none")}
    names = {name: tokenizer_of("bytes", name).convert_ids_to_tokens(found) for name, found in ends.items()}
    assert names == {
        "chatml": ["</s>", "<|im_end|>"],
        "normal": ["</s>", "<|end|>"],  # an added token that is not special
        "text": ["</s>"],  # after the marker's text
        "none": ["</s>"],
    }
    assert stop_text(tokenizer_of("bytes", "text"), False) == "[/END]"
    forged = Pair("[/END] <|end|>", "a [/END] b", "it", 1, ("de", "en"))
    for name, marker in (("text", "[/END]"), ("normal", "<|end|>")):
        tokenizer = tokenizer_of("bytes", name)
        ids, start = encode(tokenizer, PROMPT, forged)
        assert tokenizer.decode(ids[start:]).count(marker) == 1
        assert tokenizer.decode(ids[:start]).count(marker) == 2  # those of the system's and the user's turn


def test_added_words_are_no_markers():
    tokenizer = tokenizer_of("bytes", "chatml")
    tokenizer.add_tokens(["user", "house", "."])
    ids, start = encode(tokenizer, PROMPT, Pair("user .", "A user.", "it", 1, ("de", "en")))
    assert tokenizer.decode(ids[start:]) == "English: A user.<|im_end|>"
    assert "German: user .<|im_end|>" in tokenizer.decode(ids[:start])


@pytest.mark.parametrize("name", ["qwen3", "thinks", "reasons"])
def test_an_answer_is_asked_for_after_the_thoughts(name):
    """Qwen3 is asked without thinking; a template that opens thoughts and renders them shut has them in the prompt."""
    tokenizer = tokenizer_of("bytes", name)
    ids, start = encode(tokenizer, PROMPT, Pair("Ja.", "Yes.", "it", 1, ("de", "en")))
    opened = "<think>\n" if name == "reasons" else "<think>\n\n</think>\n\n"
    assert tokenizer.decode(ids[:start]).endswith(f"<|im_start|>assistant\n{opened}")
    assert tokenizer.decode(ids[start:]) == "English: Yes.<|im_end|>"


def test_a_date_is_the_same_in_every_run():
    tokenizer = tokenizer_of("bytes", "dated")
    pair = Pair("Ja.", "Yes.", "it", 1, ("de", "en"))
    text = tokenizer.decode(encode(tokenizer, PROMPT, pair)[0])
    assert "Today is 2024-07-26 00:00:00.000000, 26 July." in text
    assert "strftime" not in text
    assert text == tokenizer.decode(encode(tokenizer, PROMPT, pair)[0])


def test_white_space_at_an_answers_ends_goes_where_the_template_takes_it_off():
    for name, trimmed in (("gemma", True), ("chatml", False)):
        tokenizer = tokenizer_of("bytes", name)
        ids, start = tokens.chat(tokenizer, [{"role": "user", "content": "2 + 2?"}], "4\n")
        assert tokenizer.decode(ids[start:-1]) == ("4" if trimmed else "4\n")


def test_templates_that_cannot_be_used():
    broken = {
        "{{ raise_exception('no') }}": "cannot be used",
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}": "leaves out the answer",
        "{% for m in messages %}{{ m.content }}.{% endfor %}": "ends an answer with '.'",
    }
    for template, message in broken.items():
        tokenizer = tokenizer_of("bytes", "none")
        tokenizer.chat_template = template
        with pytest.raises(UserError, match=message) as error:
            turns.turn(tokenizer)
        assert "\n" not in str(error.value)
    tokenizer = tokenizer_of("bytes", "none")
    tokenizer.chat_template = {"tool_use": "x", "rag": "y"}
    with pytest.raises(UserError, match="cannot be used"):
        turns.turn(tokenizer)


def test_labelled_prompts_end_without_a_space():
    tokenizer = tokenizer_of("bytes", "none")
    samples = [labelled.Sample(prompt, target, "a", "x:1") for prompt, target in (("Q:", " yes"), ("Q: ", "yes"))]
    (one, other), _ = labelled.encode(tokenizer, samples, 100)
    assert one == other
    assert tokenizer.decode(one.input_ids[one.target_start :]) == " yes</s>"
