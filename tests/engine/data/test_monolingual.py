"""Languages' own sentences out of pairs: aligned where all pairs have a sentence, said so where not."""

from slicetune.engine.data.monolingual import monolingual


def translated(source: str, target: str, numbers) -> list[tuple[str, str]]:
    return [(f"{source} {n}", f"{target} {n}") for n in numbers]


def test_sentences_that_all_pairs_have_come_first():
    parallel = {
        "de-en": translated("de", "en", [1, 2, 3, 4, 5, 6]),
        "en-fr": translated("en", "fr", [6, 4, 2, 8]),
        "it-en": translated("it", "en", [0, 2, 4, 5, 6]),
    }
    found = monolingual(parallel, 3)
    assert found.aligned
    assert found.sentences == {name: [f"{name} {n}" for n in (2, 4, 6)] for name in ("de", "en", "fr", "it")}
    assert monolingual(parallel, 2).sentences["fr"] == ["fr 2", "fr 4"]


def test_too_few_of_them_is_said():
    parallel = {"de-en": translated("de", "en", [1, 2, 3]), "fr-en": translated("fr", "en", [3, 5, 7, 9])}
    found = monolingual(parallel, 2)
    assert not found.aligned
    assert "not aligned over languages (only 1 sentences of 'en' are in all pairs, of 2 wanted)" in found.note
    assert found.sentences == {"de": ["de 1", "de 2"], "en": ["en 1", "en 3"], "fr": ["fr 3", "fr 5"]}


def test_both_directions_of_one_text_are_one_text():
    parallel = {"de-en": translated("de", "en", [1, 2, 1]), "en-de": translated("en", "de", [1, 2, 3])}
    found = monolingual(parallel, 3)
    assert found.aligned
    assert found.sentences == {"de": ["de 1", "de 2", "de 3"], "en": ["en 1", "en 2", "en 3"]}


def test_no_language_in_all_pairs():
    parallel = {"de-en": translated("de", "en", [1]), "it-fr": translated("it", "fr", [1])}
    found = monolingual(parallel, 1)
    assert "(no sentence is in all pairs)" in found.note
    assert found.sentences == {name: [f"{name} 1"] for name in ("de", "en", "fr", "it")}
