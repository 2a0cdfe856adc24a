"""Names of languages and domains, as prompts and reports write them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..common.errors import UserError

# fmt: off
LANGUAGES = {
    "af": "Afrikaans", "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "bo": "Tibetan", "ca": "Catalan",
    "cs": "Czech", "cy": "Welsh", "da": "Danish", "de": "German", "dz": "Dzongkha", "el": "Greek", "en": "English",
    "es": "Spanish", "et": "Estonian", "eu": "Basque", "fa": "Persian", "fi": "Finnish", "fr": "French", "ga": "Irish",
    "gl": "Galician", "gu": "Gujarati", "ha": "Hausa", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian",
    "hu": "Hungarian", "hy": "Armenian", "id": "Indonesian", "ig": "Igbo", "is": "Icelandic", "it": "Italian",
    "ja": "Japanese", "ka": "Georgian", "kk": "Kazakh", "km": "Khmer", "kn": "Kannada", "ko": "Korean", "lo": "Lao",
    "lt": "Lithuanian", "lv": "Latvian", "mk": "Macedonian", "ml": "Malayalam", "mn": "Mongolian", "mr": "Marathi",
    "ms": "Malay", "mt": "Maltese", "my": "Burmese", "ne": "Nepali", "nl": "Dutch", "no": "Norwegian", "pa": "Punjabi",
    "pl": "Polish", "ps": "Pashto", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "si": "Sinhala",
    "sk": "Slovak", "sl": "Slovenian", "so": "Somali", "sq": "Albanian", "sr": "Serbian", "sv": "Swedish",
    "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "th": "Thai", "tl": "Tagalog", "tr": "Turkish", "uk": "Ukrainian",
    "ur": "Urdu", "uz": "Uzbek", "vi": "Vietnamese", "xh": "Xhosa", "yo": "Yoruba", "yue": "Cantonese",
    "zh": "Chinese", "zu": "Zulu",
}
# fmt: on
"""Language code → the name that prompts use."""

# fmt: off
OTHER_CODES = {
    "afr": "af", "alb": "sq", "als": "sq", "ara": "ar", "arb": "ar", "arm": "hy", "baq": "eu", "ben": "bn",
    "bod": "bo", "bul": "bg", "bur": "my", "cat": "ca", "ces": "cs", "chi": "zh", "cmn": "zh", "cym": "cy",
    "cze": "cs", "dan": "da", "deu": "de", "dut": "nl", "dzo": "dz", "ekk": "et", "ell": "el", "eng": "en",
    "est": "et", "eus": "eu", "fas": "fa", "fil": "tl", "fin": "fi", "fra": "fr", "fre": "fr", "geo": "ka",
    "ger": "de", "gle": "ga", "glg": "gl", "gre": "el", "guj": "gu", "hau": "ha", "heb": "he", "hin": "hi",
    "hrv": "hr", "hun": "hu", "hye": "hy", "ibo": "ig", "ice": "is", "ind": "id", "isl": "is", "ita": "it",
    "jpn": "ja", "kan": "kn", "kat": "ka", "kaz": "kk", "khk": "mn", "khm": "km", "kor": "ko", "lao": "lo",
    "lav": "lv", "lit": "lt", "lvs": "lv", "mac": "mk", "mal": "ml", "mar": "mr", "may": "ms", "mkd": "mk",
    "mlt": "mt", "mon": "mn", "msa": "ms", "mya": "my", "nb": "no", "nep": "ne", "nld": "nl", "nob": "no", "nor": "no",
    "npi": "ne", "pan": "pa", "pbt": "ps", "per": "fa", "pes": "fa", "pol": "pl", "por": "pt", "pus": "ps",
    "ron": "ro", "rum": "ro", "rus": "ru", "sin": "si", "slk": "sk", "slo": "sk", "slv": "sl", "som": "so",
    "spa": "es", "sqi": "sq", "srp": "sr", "swa": "sw", "swe": "sv", "swh": "sw", "tam": "ta", "tel": "te",
    "tgl": "tl", "tha": "th", "tib": "bo", "tur": "tr", "ukr": "uk", "urd": "ur", "uzb": "uz", "uzn": "uz",
    "vie": "vi", "wel": "cy", "xho": "xh", "yor": "yo", "zho": "zh", "zsm": "ms", "zul": "zu",
}
# fmt: on
"""Codes of three letters, and of the bigger variety that goes by a language's name → the code of LANGUAGES."""

DOMAINS = {
    "it": "IT",
    "koran": "Koran",
    "bible": "Bible",
    "tatoeba": "everyday",
    "med": "medical",
    "sub": "subtitles",
    "edu": "education",
    "spok": "spoken",
    "thes": "thesis",
    "sci": "science",
    "blog": "microblog",
}
"""Domain → the name that prompts use, where it is not the domain's own (the short ones are CANEFT's file names)."""


def short_code(code: str) -> str:
    """The code of LANGUAGES for one of three letters or with a script or country: zho_Hant, zh_TW, tha, en_US."""
    first = code.lower().replace("_", "-").partition("-")[0]
    return OTHER_CODES.get(first, first)


def name_of(code: str) -> str:
    """The name of a language code, or the code itself where there is none."""
    name = LANGUAGES.get(short_code(code), code)
    traditional = name == "Chinese" and re.search(r"[-_](hant|tw|hk|mo)\b", code.lower())
    return f"Traditional {name}" if traditional else name


def language(code: str) -> str:
    """The name of a language code. Raises UserError if it is not in LANGUAGES."""
    if short_code(code) not in LANGUAGES:
        raise UserError(f"--data.pair or --data.pairs: language {code!r} is unknown; known are {' '.join(LANGUAGES)}")
    return name_of(code)


def strip_prefix(text: str, target_language: str) -> str:
    """A hypothesis without the "English:" before it; `target_language` is a code or a name."""
    name = name_of(target_language)
    return re.sub(rf"^\s*{re.escape(name)}\s*[:：]", "", text, count=1, flags=re.IGNORECASE).strip()


def languages_of(pairs: Sequence[str]) -> tuple[str, ...]:
    """Both languages of every pair, each once, in alphabetical order. Raises UserError for what is no pair."""
    for pair in pairs:
        source, _, target = pair.partition("-")
        if not source or not target or "-" in target or source == target:
            raise UserError(f"pair {pair!r}: write source-target, as in de-en")
    return tuple(sorted({name for pair in pairs for name in pair.split("-")}))
