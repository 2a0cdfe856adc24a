"""German and English inflection side by side: noun phrases and clauses of the embedded corpus as pairs of strings.

A `Voice` draws words of one domain and speaks with the senses of another (`general` text draws from all domains and
speaks with default senses). Its random source is its only state, so a seed fixes every sentence.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from . import lexicon

T = TypeVar("T")
GENERAL = "general"


class Text(NamedTuple):
    """The same words in both languages."""

    de: str
    en: str


@dataclass(frozen=True)
class Word:
    """A line of the lexicon: its forms, its English by domain (`general` is the default), the domains that use it."""

    forms: tuple[str, ...]
    senses: dict[str, str]
    domains: frozenset[str]

    def english(self, sense: str) -> str:
        return self.senses.get(sense, self.senses[GENERAL])


class NounPhrase(NamedTuple):
    """A phrase in one case, with what the rest of the sentence must agree with."""

    de: str
    en: str
    person: str  # "3s" or "3p"
    gender: str  # m f n, or p for a plural
    definite: bool


class Clause(NamedTuple):
    """A clause in pieces, since German orders them by where the clause stands."""

    subject: Text
    finite: str
    middle: str
    end: str  # what closes a main clause: particle, participle or infinitive
    last: str  # what closes a subordinate clause: the same and the finite verb
    predicate: str  # English after the subject

    def main(self) -> Text:
        return Text(_join(self.subject.de, self.finite, self.middle, self.end), f"{self.subject.en} {self.predicate}")

    def inverted(self) -> Text:
        """For a main clause that something else opens: the verb comes first."""
        return Text(_join(self.finite, self.subject.de, self.middle, self.end), f"{self.subject.en} {self.predicate}")

    def subordinate(self) -> Text:
        return Text(_join(self.subject.de, self.middle, self.last), f"{self.subject.en} {self.predicate}")


def _parse(lines: str) -> tuple[Word, ...]:
    words = []
    for line in lines.strip().replace("\n    |", " |").splitlines():
        head, *rest = [part.split() for part in line.split(" | ")]
        senses = {GENERAL: head[-1]} | {part[0]: part[1] for part in rest if len(part) > 1}
        spaced = {domain: english.replace("_", " ") for domain, english in senses.items()}
        words.append(Word(tuple(head[:-1]), spaced, frozenset(part[0] for part in rest)))
    return tuple(words)


def _table(text: str) -> dict[str, list[str]]:
    entries = [entry.split() for entry in text.replace("\n", " ").split(",")]
    return {entry[0]: entry[1:] for entry in entries if entry}


NOUNS, VERBS, ADJECTIVES = _parse(lexicon.NOUNS), _parse(lexicon.VERBS), _parse(lexicon.ADJECTIVES)
ADVERBS, PREPOSITIONS = _parse(lexicon.ADVERBS), _parse(lexicon.PREPOSITIONS)
CONJUNCTIONS, MODALS = _parse(lexicon.CONJUNCTIONS), _parse(lexicon.MODALS)
_IRREGULAR, _PLURALS = _table(lexicon.IRREGULAR), _table(lexicon.IRREGULAR_PLURALS)

# Endings by case (n a d g) of gender m f n and plural p.
_DER = {"n": "der die das die", "a": "den die das die", "d": "dem der dem den", "g": "des der des der"}
_DIESER = {"n": "er e es e", "a": "en e es e", "d": "em er em en", "g": "es er es er"}
_EIN = {"n": " e  e", "a": "en e  e", "d": "em er em en", "g": "es er es er"}
_WEAK = {"n": "e e e en", "a": "en e e en", "d": "en en en en", "g": "en en en en"}
_MIXED = {"n": "er e es en", "a": "en e es en", "d": "en en en en", "g": "en en en en"}
_BARE = {"n": "er e es e", "a": "en e es e", "d": "em er em en", "g": "en er en er"}  # only plurals stand bare here
_FUSED = {"in dem": "im", "in das": "ins", "bei dem": "beim", "zu dem": "zum", "zu der": "zur", "an dem": "am"}


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _ending(table: dict[str, str], case: str, gender: str) -> str:
    return table[case].split(" ")["mfnp".index(gender)]


def english_plural(noun: str) -> str:
    """`casting vote` → `casting votes`."""
    *rest, head = noun.split()
    if head in _PLURALS:
        head = _PLURALS[head][0]
    elif head.endswith("y") and head[-2] not in "aeiou":
        head = head[:-1] + "ies"
    else:
        head += "es" if head.endswith(("s", "x", "ch", "sh")) else "s"
    return " ".join([*rest, head])


def english_verb(verb: str, form: str) -> str:
    """`turn down` as `s` → turns down, `past` or `part` → turned down."""
    head, *rest = verb.split()
    soft = head.endswith("y") and head[-2] not in "aeiou"
    if form == "s":
        head = head[:-1] + "ies" if soft else head + ("es" if head.endswith(("s", "x", "ch", "sh")) else "s")
    elif head in _IRREGULAR:
        head = _IRREGULAR[head][form == "part"]
    elif soft:
        head = head[:-1] + "ied"
    elif head in ("stop", "submit", "admit", "transfer", "transmit"):
        head += head[-1] + "ed"
    else:
        head += "d" if head.endswith("e") else "ed"
    return " ".join([head, *rest])


def german_noun(word: Word, case: str, plural: bool) -> str:
    singular, gender, many = word.forms[:3]
    if plural:
        return many + "n" if case == "d" and not many.endswith(("n", "s")) else many
    if gender == "w" and case != "n":
        return many
    if gender in "mn" and case == "g":
        if singular == "Herr":
            return "Herrn"
        return singular + ("es" if singular.endswith(("s", "ß", "tz", "x", "t", "d", "ld")) else "s")
    return "Herrn" if singular == "Herr" and case != "n" else singular


def german_verb(word: Word) -> dict[str, str]:
    """Forms: fin (3rd singular), many (plural), particle, joined (fin at the end of a clause), inf, zu, part."""
    prefix, _, stem = word.forms[0].rpartition("|")
    return {
        "fin": word.forms[1],
        "many": stem,
        "particle": prefix,
        "joined": prefix + word.forms[1],
        "inf": prefix + stem,
        "zu": f"{prefix}zu{stem}" if prefix else f"zu {stem}",
        "part": prefix + word.forms[2],
    }


def article(english: str) -> str:
    vowel = english[0] in "aeioEIO" or (english[0] in "u" and not english.startswith(("us", "uni")))
    return f"{'an' if vowel else 'a'} {english}"


class Voice:
    """Draws the words of `draw` (a domain, or `general` for all of them), speaks with the senses of `sense`."""

    def __init__(self, rng: random.Random, draw: str, sense: str) -> None:
        self.rng, self.draw, self.sense = rng, draw, sense
        self.nouns, self.verbs, self.adjectives, self.adverbs, self.prepositions, self.conjunctions, self.modals = (
            self._of(words) for words in (NOUNS, VERBS, ADJECTIVES, ADVERBS, PREPOSITIONS, CONJUNCTIONS, MODALS)
        )

    def _of(self, words: tuple[Word, ...]) -> list[Word]:
        chosen = [word for word in words if self.draw == GENERAL or self.draw in word.domains]
        return chosen or list(words)

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.rng.random() * len(options))]  # random() alone is the same in every Python version

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def say(self, default: str, **by_domain: str) -> str:
        """English wording of this sense."""
        return by_domain.get(self.sense, default)

    def noun(self, classes: str) -> Word:
        """A noun of one of the classes, or of any class where the domain has none."""
        return self.pick([word for word in self.nouns if word.forms[3] in classes] or self.nouns)

    def noun_phrase(self, classes: str, case: str, *, simple: bool = False, definite: bool = False) -> NounPhrase:
        word = self.noun(classes)
        plural = self.chance(0.25)
        kind = "der" if definite else self.pick(("der", "der", "der", "der", "ein", "ein", "dieser", "kein", "jeder"))
        if plural and kind in ("ein", "jeder"):
            kind = "bare" if case != "g" else "der"
        gender = "p" if plural else word.forms[1].replace("w", "m")
        adjective = self._adjective(word) if not simple and self.chance(0.3) else None
        de = _join(self._determiner(kind, case, gender), self._adjective_de(adjective, kind, case, gender))
        de = _join(de, german_noun(word, case, plural))
        english = english_plural(word.english(self.sense)) if plural else word.english(self.sense)
        en = self._determiner_en(kind, plural, _join(adjective.english(self.sense) if adjective else "", english))
        if not simple and word.forms[3] in "TX" and self.chance(0.2):
            owner = self.noun_phrase("TXPO", "g", simple=True, definite=True)
            de, en = f"{de} {owner.de}", f"{en} of {owner.en}"
        return NounPhrase(de, en, "3p" if plural else "3s", gender, kind in ("der", "dieser"))

    def _adjective(self, noun: Word) -> Word | None:
        fitting = [word for word in self.adjectives if noun.forms[3] in word.forms[1]]
        return self.pick(fitting) if fitting else None

    def _determiner(self, kind: str, case: str, gender: str) -> str:
        if kind == "bare":
            return ""
        if kind == "der":
            return _ending(_DER, case, gender)
        return (
            kind + _ending(_EIN, case, gender)
            if kind in ("ein", "kein")
            else kind[:-2] + _ending(_DIESER, case, gender)
        )

    def _adjective_de(self, adjective: Word | None, kind: str, case: str, gender: str) -> str:
        if adjective is None:
            return ""
        table = _BARE if kind == "bare" else _MIXED if kind in ("ein", "kein") else _WEAK
        return adjective.forms[0] + _ending(table, case, gender)

    def _determiner_en(self, kind: str, plural: bool, english: str) -> str:
        if kind == "ein":
            return article(english)
        this = (
            self.say("these", law="the said", koran="those")
            if plural
            else self.say("this", law="the said", koran="that")
        )
        words = {
            "bare": "",
            "der": "the",
            "kein": self.say("no", law="none of the" if plural else "no"),
            "dieser": this,
        }
        return _join(words.get(kind, self.say("every", law="any", koran="each")), english)

    def prepositional(self, simple: bool = True) -> Text:
        word = self.pick(self.prepositions)
        phrase = self.noun_phrase(word.forms[2], word.forms[1], simple=simple, definite=self.chance(0.7))
        de = f"{word.forms[0]} {phrase.de}"
        for apart, fused in _FUSED.items():
            if de.startswith(apart + " "):
                de = fused + de[len(apart) :]
        return Text(de, f"{word.english(self.sense)} {phrase.en}")
