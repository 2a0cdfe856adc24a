"""Sentences of the embedded corpus: frames of each domain, filled by the grammar, written as a folder of splits.

The text is the project's own. Everything is drawn from seeded random sources, so the files are the same bytes on every
run. Words and wordings change with the domain; `general` text, which the tiny model is pretrained on, uses the frames
of all domains with default senses.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from .grammar import GENERAL, Clause, NounPhrase, Text, Voice, Word, english_verb, german_verb
from .lexicon import DOMAINS

PAIR = "de-en"
SIZES = {"train": 1500, "dev": 150, "test": 150}
WORDS = range(5, 26)

_HAVE = {"3s": "hat", "3p": "haben", "1s": "habe", "2s": "hast", "1p": "haben", "2p": "habt"}
_PRONOUNS = {
    "subtitles": (
        ("ich", "I", "1s"),
        ("du", "you", "2s"),
        ("wir", "we", "1p"),
        ("er", "he", "3s"),
        ("sie", "they", "3p"),
    ),
    "koran": (("Wir", "We", "1p"), ("ihr", "you", "2p"), ("sie", "they", "3p"), ("Er", "He", "3s")),
}
_SHORT = {f"{verb} not": f"{verb}n't" for verb in ("is", "are", "was", "were", "has", "have", "does", "do", "did")}


def _be(person: str, past: bool = False) -> str:
    if person == "1s":
        return "was" if past else "am"
    return ("was" if past else "is") if person == "3s" else ("were" if past else "are")


def _sentence(de: str, en: str, mark: str = ".") -> Text:
    return Text(de[0].upper() + de[1:] + mark, en[0].upper() + en[1:] + mark)


def _subject(v: Voice, classes: str) -> tuple[Text, str]:
    pronouns = _PRONOUNS.get(v.draw)
    if pronouns and "P" in classes and v.chance(0.6):
        de, en, person = v.pick(pronouns)
        return Text(de, en), person
    phrase = v.noun_phrase(classes, "n")
    return Text(phrase.de, phrase.en), phrase.person


def _modal(v: Voice, person: str, negative: bool) -> tuple[str, str]:
    """The modal's German form and its English with a negation."""
    word = v.pick(v.modals)
    single, many = word.forms
    german = {"3s": single, "1s": single, "2s": single + ("t" if single == "muss" else "st"), "2p": many[:-2] + "t"}
    english = word.english(v.sense).split("/")
    return german.get(person, many), english[2 if negative else 0 if person == "3s" else 1]


def clause(v: Voice, subject: tuple[Text, str] | None = None, plain: bool = False) -> Clause:
    """A clause with an active or passive verb in some tense; `plain` leaves out prepositional phrase and negation."""
    verb = v.pick(v.verbs)
    if subject is None and v.chance(0.35):
        return _passive(v, verb, plain)
    who, person = subject or _subject(v, verb.forms[3])
    thing = v.noun_phrase(verb.forms[4], "a")
    negative = not plain and thing.definite and v.chance(0.15)
    extra = v.prepositional() if not plain and v.chance(0.35) else Text("", "")
    middle = " ".join(part for part in (thing.de, "nicht" if negative else "", extra.de) if part)
    german, english = german_verb(verb), verb.english(v.sense)
    form = v.pick(("perfect", "modal") if person in ("1s", "2s", "2p") else ("present", "perfect", "modal"))
    if form == "present":
        finite = german["fin"] if person == "3s" else german["many"]
        end, last = german["particle"], german["joined"] if person == "3s" else german["inf"]
        does = "does not" if person == "3s" else "do not"
        predicate = f"{does} {english}" if negative else english_verb(english, "s") if person == "3s" else english
    elif form == "perfect":
        finite, end = _HAVE[person], german["part"]
        last, predicate = f"{end} {finite}", _perfect(v, english, person, negative)
    else:
        finite, modal = _modal(v, person, negative)
        end = german["inf"]
        last, predicate = f"{end} {finite}", f"{modal} {english}"
    return Clause(who, finite, middle, end, last, _shorten(v, f"{predicate} {thing.en} {extra.en}".strip()))


def _perfect(v: Voice, english: str, person: str, negative: bool) -> str:
    if v.sense in ("subtitles", "koran"):  # narration tells in the simple past what general text has in the perfect
        return f"did not {english}" if negative else english_verb(english, "past")
    have = "has" if person == "3s" else "have"
    return f"{have} not {english_verb(english, 'part')}" if negative else f"{have} {english_verb(english, 'part')}"


def _shorten(v: Voice, english: str) -> str:
    if v.sense == "subtitles":
        for full, short in _SHORT.items():
            english = english.replace(full + " ", short + " ")
    return english


def _passive(v: Voice, verb: Word, plain: bool) -> Clause:
    phrase = v.noun_phrase(verb.forms[4], "n")
    plural = phrase.person == "3p"
    negative = not plain and phrase.definite and v.chance(0.15)
    extra = v.prepositional() if not plain and v.chance(0.5) else Text("", "")
    done = german_verb(verb)["part"]
    english = english_verb(verb.english(v.sense), "part")
    form = v.pick(("present", "past", "modal"))
    no = " not" if negative else ""
    if form == "present":
        finite, end = "werden" if plural else "wird", done
        predicate = f"{_be(phrase.person)}{no} {english}"
    elif form == "past":
        finite, end = "wurden" if plural else "wurde", done
        be = (
            f"{'have' if plural else 'has'}{no} been"
            if v.sense in ("law", "medical")
            else _be(phrase.person, True) + no
        )
        predicate = f"{be} {english}"
    else:
        finite, modal = _modal(v, phrase.person, negative)
        end, predicate = f"{done} werden", f"{modal} be {english}"
    middle = " ".join(part for part in (extra.de, "nicht" if negative else "") if part)
    who = Text(phrase.de, phrase.en)
    return Clause(who, finite, middle, end, f"{end} {finite}", _shorten(v, f"{predicate} {extra.en}".strip()))


def _plain_main(v: Voice) -> Text:
    return _sentence(*clause(v).main())


def _adverb_first(v: Voice) -> Text:
    word, rest = v.pick(v.adverbs), clause(v).inverted()
    return _sentence(f"{word.forms[0]} {rest.de}", f"{word.english(v.sense)}, {rest.en}")


def _phrase_first(v: Voice) -> Text:
    front, rest = v.prepositional(simple=False), clause(v, plain=True).inverted()
    return _sentence(f"{front.de} {rest.de}", f"{front.en}, {rest.en}")


def _condition_first(v: Voice) -> Text:
    word = v.pick(v.conjunctions)
    first, second = clause(v, plain=True).subordinate(), clause(v, plain=True).inverted()
    return _sentence(f"{word.forms[0]} {first.de}, {second.de}", f"{word.english(v.sense)} {first.en}, {second.en}")


def _condition_last(v: Voice) -> Text:
    word = v.pick(v.conjunctions)
    first, second = clause(v, plain=True).main(), clause(v, plain=True).subordinate()
    return _sentence(f"{first.de}, {word.forms[0]} {second.de}", f"{first.en} {word.english(v.sense)} {second.en}")


def _relative(v: Voice) -> Text:
    """The subject with a relative clause; its pronoun is the subject's article in the nominative."""
    head = v.noun_phrase("POT", "n", simple=True, definite=True)
    pronoun = {"m": "der", "f": "die", "n": "das", "p": "die"}[head.gender]
    inner = clause(
        v, (Text(pronoun, v.say("that", law="which", medical="which", koran="who")), head.person), plain=True
    )
    outer = clause(v, (Text("", ""), head.person), plain=True).main()
    side = inner.subordinate()
    return _sentence(f"{head.de}, {side.de}, {outer.de.strip()}", f"{head.en} {side.en} {outer.en.strip()}")


def _property(v: Voice) -> Text:
    phrase: NounPhrase = v.noun_phrase("TXPO", "n", simple=True)
    fitting = [word for word in v.adjectives if set(word.forms[1]) & set("TXPO")]
    word, extra = v.pick(fitting), v.prepositional(simple=False)
    be = "sind" if phrase.person == "3p" else "ist"
    return _sentence(
        f"{phrase.de} {be} {extra.de} {word.forms[0]}",
        f"{phrase.en} {_be(phrase.person)} {word.english(v.sense)} {extra.en}",
    )


def _purpose(v: Voice) -> Text:
    """it: Um … zu …, klicken Sie auf …"""
    verb, button = v.pick(v.verbs), v.noun_phrase("T", "a", simple=True, definite=True)
    thing = v.noun_phrase(verb.forms[4], "a")
    front = v.say("in order to", it="to")
    touch = v.say("press on", it="click")
    return _sentence(
        f"um {thing.de} {german_verb(verb)['zu']}, klicken Sie auf {button.de}",
        f"{front} {verb.english(v.sense)} {thing.en}, {touch} {button.en}",
    )


def _wish(v: Voice) -> Text:
    verb = v.pick(v.verbs)
    thing = v.noun_phrase(verb.forms[4], "a")
    en = f"{v.say('would you really like to', it='are you sure you want to')} {verb.english(v.sense)} {thing.en}"
    return _sentence(f"möchten Sie {thing.de} wirklich {german_verb(verb)['inf']}", en, "?")


def _article(v: Voice) -> Text:
    number, part = 1 + int(v.rng.random() * 30), 1 + int(v.rng.random() * 5)
    rest = clause(v, plain=True).inverted()
    front = v.say(f"according to item {number}, section {part}", law=f"pursuant to Article {number}({part})")
    return _sentence(f"gemäß Artikel {number} Absatz {part} {rest.de}", f"{front}, {rest.en}")


def _force(v: Voice) -> Text:
    act, rest = v.noun_phrase("T", "n"), clause(v, plain=True).subordinate()
    word = v.pick(v.conjunctions)
    comes = v.say("come" if act.person == "3p" else "comes", law="shall enter")
    tail = v.say("into effect", law="into force")
    german = "treten" if act.person == "3p" else "tritt"
    return _sentence(
        f"{act.de} {german} in Kraft, {word.forms[0]} {rest.de}",
        f"{act.en} {comes} {tail} {word.english(v.sense)} {rest.en}",
    )


def _observed(v: Voice) -> Text:
    number = 2 + int(v.rng.random() * 40)
    effect = v.noun_phrase("X", "n")
    verb = "wurden" if effect.person == "3p" else "wurde"
    seen = v.say(
        f"{_be(effect.person, True)} seen", medical=f"{'have' if effect.person == '3p' else 'has'} been reported"
    )
    front = v.say(f"with {number} percent of the patients", medical=f"in {number}% of patients")
    return _sentence(f"bei {number} % der Patienten {verb} {effect.de} beobachtet", f"{front}, {effect.en} {seen}")


def _advice(v: Voice) -> Text:
    rest = clause(v, plain=True).subordinate()
    front = v.say("ask your doctor if", medical="consult your physician when")
    return _sentence(f"fragen Sie Ihren Arzt, wenn {rest.de}", f"{front} {rest.en}")


def _know(v: Voice) -> Text:
    rest = clause(v, plain=True).subordinate()
    de, general, film = v.pick(
        (
            ("ich weiß nicht, warum", "I do not know why", "I don't know why"),
            ("weißt du, warum", "do you know why", "you know why"),
            ("ich glaube, dass", "I believe that", "I guess"),
            ("sag ihm, dass", "say to him that", "tell him"),
        )
    )
    return _sentence(
        f"{de} {rest.de}", f"{v.say(general, subtitles=film)} {rest.en}", "?" if de.startswith("weißt") else "."
    )


def _come_on(v: Voice) -> Text:
    rest = clause(v).main()
    de, general, film = v.pick(
        (("komm schon", "come now", "come on"), ("hör mal", "listen", "look"), ("na gut", "well", "okay"))
    )
    return _sentence(f"{de}, {rest.de}", f"{v.say(general, subtitles=film)}, {rest.en}")


def _where(v: Voice) -> Text:
    thing, extra = v.noun_phrase("PTL", "n"), v.prepositional()
    be = "sind" if thing.person == "3p" else "ist"
    where = v.say(f"where {_be(thing.person)}", subtitles="where're" if thing.person == "3p" else "where's")
    return _sentence(f"wo {be} denn {thing.de} {extra.de}", f"{where} {thing.en} {extra.en}", "?")


def _verily(v: Voice) -> Text:
    rest = clause(v).main()
    return _sentence(f"und siehe, {rest.de}", f"{v.say('and see', koran='and behold')}, {rest.en}")


def _address(v: Voice) -> Text:
    rest = clause(v, (Text("ihr", "you"), "2p")).main()
    return _sentence(
        f"o ihr Gläubigen, {rest.de}", f"{v.say('oh you believers', koran='O you who believe')}, {rest.en}"
    )


Frame = Callable[[Voice], Text]
_COMMON: tuple[Frame, ...] = (
    _plain_main, _plain_main, _adverb_first, _phrase_first, _condition_first, _condition_last, _relative, _property,
)  # fmt: skip
_OWN: dict[str, tuple[Frame, ...]] = {
    "it": (_purpose, _purpose, _wish),
    "law": (_article, _article, _force),
    "medical": (_observed, _observed, _advice),
    "subtitles": (_know, _come_on, _where),
    "koran": (_verily, _verily, _address),
}


def sentences(domain: str, seed: int, sense: str = "") -> Iterator[Text]:
    """Endless sentences of a domain, 5–25 words in both languages; `sense`: put in the words of another domain."""
    rng = random.Random(f"slicetune {domain} {seed}")
    while True:
        if domain == GENERAL:
            # Half of the general text stays within one domain's words, so that frames meet the words they go with.
            kind = DOMAINS[int(rng.random() * len(DOMAINS))]
            voice = Voice(rng, kind if rng.random() < 0.5 else GENERAL, GENERAL)
        else:
            kind, voice = domain, Voice(rng, domain, sense or domain)
        for _ in range(16):
            pair = voice.pick((*_COMMON, *_OWN[kind]))(voice)
            if len(pair.de.split()) in WORDS and len(pair.en.split()) in WORDS:
                yield pair


def phrases(count: int, seed: int) -> list[Text]:
    """Noun phrases in general words: too short for the corpus, but easy lessons to begin a pretraining with."""
    voice = Voice(random.Random(f"slicetune phrases {seed}"), GENERAL, GENERAL)
    drawn = (voice.noun_phrase("PTXLO", voice.pick("nnna"), simple=voice.chance(0.6)) for _ in range(count))
    return [Text(phrase.de, phrase.en) for phrase in drawn]


def _take(source: Iterator[Text], count: int, taken: set[str]) -> list[Text]:
    """The next `count` sentences whose source is not in `taken`, which grows by them."""
    out = []
    while len(out) < count:
        pair = next(source)
        if pair.de not in taken:
            taken.add(pair.de)
            out.append(pair)
    return out


def corpus() -> dict[str, dict[str, list[Text]]]:
    """domain → split → sentences. No source twice in a domain; no dev or test source in any domain's train split."""
    domains = (*DOMAINS, GENERAL)
    sources = {domain: sentences(domain, 0) for domain in domains}
    held_out: set[str] = set()
    out: dict[str, dict[str, list[Text]]] = {domain: {} for domain in domains}
    for domain in domains:
        for split in ("test", "dev"):
            out[domain][split] = _take(sources[domain], SIZES[split], held_out)
    for domain in domains:
        out[domain]["train"] = _take(sources[domain], SIZES["train"], set(held_out))
    return out


def write(folder: Path) -> None:
    """Write `<folder>/de-en/<domain>/<split>.jsonl.gz`; the same bytes on every run (no time in the gzip header)."""
    for domain, parts in corpus().items():
        target = folder / PAIR / domain
        target.mkdir(parents=True)
        for split, pairs in parts.items():
            lines = [json.dumps({"translation": {"de": de, "en": en}}, ensure_ascii=False) for de, en in pairs]
            with open(target / f"{split}.jsonl.gz", "wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
                packed.write(("\n".join(lines) + "\n").encode())
