"""Rule-based sentence splitting for English-like text: no model, no download, some 20 MB/s on one core.

A sentence can end after `.`, `!`, `?` or an ellipsis (and the quotes and brackets that close with it) where white space
follows and the next word does not start in lower case. A single full stop is then looked at once more: titles,
abbreviations, initials, acronyms and list numbers keep it inside the sentence unless the next word is one that starts
sentences. Ideographic stops (`。！？`) end a sentence without white space.
"""

import re

_WIDE_STOPS = frozenset("。！？")
_BOUNDARY = re.compile(
    r"""(?P<stop>[.!?…。！？]+)["'”’»)\]」』）]*(?P<gap>\s+|(?<=[。！？”’」』）]))(?=["'“‘«(\[]*(?P<next>\S))"""
)
_LAST_WORD = re.compile(r"""[^\s—–(\[“‘«"'/]*$""")
_NEXT_WORD = re.compile(r"\w+")
_ACRONYM = re.compile(r"(?:[A-Za-z]\.)+[A-Za-z]$")
_LONGEST_ABBREVIATION = 24
_OPENING_SYMBOLS = frozenset("$£€¥#@&")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# A name or a further explanation always follows these.
_NEVER_LAST = _words(
    "mr mrs ms messrs mme mlle dr prof rev fr hon sen rep gov pres gen col maj capt cpt cmdr cdr lt sgt cpl pvt "
    "adm brig supt insp e.g i.e cf vs viz"
)
# Before a number these are abbreviations; before anything else they are words that may end a sentence.
_BEFORE_NUMBERS = _words(
    "no nos p pp vol vols fig figs eq eqs ch sec art op c ca circa approx b d r fl jan feb mar apr jun jul aug "
    "sep sept oct nov dec"
)
# These end a sentence only where the next word is one that starts sentences.
_SELDOM_LAST = _words(
    "inc ltd co corp llc bros jr sr esq etc al est st ave blvd rd dept univ assn intl ph.d m.d b.a m.a b.sc "
    "m.sc jan feb mar apr jun jul aug sep sept oct nov dec ed eds trans mt ft"
)
_STARTERS = _words(
    "The A An This That These Those It He She They We I You His Her Its Their Our My Your There Here In On At "
    "By For From To With Without As If When While Where After Before Since Until During Because Although Though "
    "However Moreover Furthermore But And Or So Yet Then Thus Also Not Now Today Once Many Some Most Several "
    "Both Each Every All Other Another One Two Three What Who Whose Why How Which Under Over Between Among "
    "According Despite Unlike Like Only Even Such Later Early Following"
)


def split_sentences(paragraph: str) -> list[str]:
    """The sentences of one paragraph in order, white space inside them reduced to single spaces.

    Nothing but white space is lost: the sentences joined by spaces are the paragraph's own words.
    """
    sentences = []
    start = 0
    for match in _BOUNDARY.finditer(paragraph):
        if _ends_sentence(paragraph, match, start):
            sentences.append(paragraph[start : match.start("gap")])
            start = match.end()
    sentences.append(paragraph[start:])
    return [sentence for sentence in (" ".join(text.split()) for text in sentences) if sentence]


def _ends_sentence(text: str, match: re.Match, start: int) -> bool:
    """Whether the stop in `match` ends the sentence that began at `start`."""
    stop_marks, gap, following = match.groups()
    if stop_marks[-1] in _WIDE_STOPS:
        return True
    if not gap or following.islower() or not (following.isalnum() or following in _OPENING_SYMBOLS):
        return False
    if stop_marks != ".":
        return True
    stop = match.start()
    word = _LAST_WORD.search(text, max(start, stop - _LONGEST_ABBREVIATION), stop)[0]
    if word.isdigit():
        return stop - len(word) > start  # "1. First point" is one sentence
    lowered = word.lower()
    if lowered in _NEVER_LAST:
        return False
    if following.isdigit():
        return lowered not in _BEFORE_NUMBERS
    is_initial = len(word) == 1 and word.isupper()
    if is_initial or lowered in _SELDOM_LAST or _ACRONYM.match(word):
        next_word = _NEXT_WORD.match(text, match.start("next"))
        return next_word is None or next_word[0] in _STARTERS
    return True
