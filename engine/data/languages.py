"""Names of languages and domains, as prompts and reports write them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..common.errors import UserError

# fmt: off
LANGUAGES = {
    "af": "Afrikaans", "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "ca": "Catalan", "cs": "Czech",
    "cy": "Welsh", "da": "Danish", "de": "German", "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian",
    "eu": "Basque", "fa": "Persian", "fi": "Finnish", "fr": "French", "ga": "Irish", "gl": "Galician",
    "gu": "Gujarati", "ha": "Hausa", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian",
    "hy": "Armenian", "id": "Indonesian", "ig": "Igbo", "is": "Icelandic", "it": "Italian", "ja": "Japanese",
    "ka": "Georgian", "kk": "Kazakh", "km": "Khmer", "kn": "Kannada", "ko": "Korean", "lo": "Lao", "lt": "Lithuanian",
    "lv": "Latvian", "mk": "Macedonian", "ml": "Malayalam", "mn": "Mongolian", "mr": "Marathi", "ms": "Malay",
    "mt": "Maltese", "my": "Burmese", "ne": "Nepali", "nl": "Dutch", "no": "Norwegian", "pa": "Punjabi",
    "pl": "Polish", "ps": "Pashto", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "si": "Sinhala",
    "sk": "Slovak", "sl": "Slovenian", "so": "Somali", "sq": "Albanian", "sr": "Serbian", "sv": "Swedish",
    "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "th": "Thai", "tl": "Tagalog", "tr": "Turkish", "uk": "Ukrainian",
    "ur": "Urdu", "uz": "Uzbek", "vi": "Vietnamese", "xh": "Xhosa", "yo": "Yoruba", "zh": "Chinese", "zu": "Zulu",
}
# fmt: on
"""Language code → the name that prompts use."""

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


def language(code: str) -> str:
    """The name of a language code. Raises UserError if it is not in LANGUAGES."""
    if code not in LANGUAGES:
        raise UserError(f"--data.pair or --data.pairs: language {code!r} is unknown; known are {' '.join(LANGUAGES)}")
    return LANGUAGES[code]


def strip_prefix(text: str, target_language: str) -> str:
    """A hypothesis without the "English:" before it; `target_language` is a code or a name."""
    name = LANGUAGES.get(target_language, target_language)
    return re.sub(rf"^\s*{re.escape(name)}\s*[:：]", "", text, count=1, flags=re.IGNORECASE).strip()


def languages_of(pairs: Sequence[str]) -> tuple[str, ...]:
    """Both languages of every pair, each once, in alphabetical order. Raises UserError for what is no pair."""
    for pair in pairs:
        source, _, target = pair.partition("-")
        if not source or not target or "-" in target or source == target:
            raise UserError(f"pair {pair!r}: write source-target, as in de-en")
    return tuple(sorted({name for pair in pairs for name in pair.split("-")}))
