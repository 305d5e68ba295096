"""Text of answers: one spelling, numbers, whole words.

REWRITES are steps before SQuAD's normalisation, which deletes ASCII punctuation:
    unicode    one spelling of what looks alike: NFKC, and typographic apostrophes, quotation marks
               and dashes as ASCII; characters that are not seen are left out
    numbers    the same, and marks inside numbers stay: "3.5" is not "35", "-5" is not "5"
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal

# Characters that serve as apostrophes or quotation marks, beside the categories Pi and Pf.
QUOTES = ("\u00b4\u02b9\u02bb\u02bc\u02bd\u02c8\u02ca\u02cb\u055a"
          "\u201a\u201e\u2032\u2033\u2035\u2036")
# Minus signs and the like, beside the category Pd.
DASHES = "\u02d7\u2043\u207b\u208b\u2212\u2796"
SLASHES = str.maketrans("\u2044\u2215", "//")  # NFKC writes the first one in "1/2" of one character
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# A mark between digits; a sign or a point at the begin of a number.
IN_NUMBER = re.compile(
    r"(?<=\d)[.,:/-](?=\d)|(?<![\w.)])-(?=[$\u00a3\u20ac]?\.?\d)|(?<![\w.)])\.(?=\d)")
KEPT = str.maketrans(".,:/-", "\u2024\u201a\u2236\u2215\u2212")  # they look alike: not ASCII
PUNCTUATION = (r"!-/:-@\[-`{-~\u00a1-\u00a9\u00ab-\u00b1\u00b4\u00b6-\u00b8\u00bb\u00bf"
               r"\u2010-\u206f\u2212\u3001-\u303f\uff01-\uff0f\uff1a-\uff20")
BETWEEN_WORDS = re.compile(
    rf"((?<=\d)[.,](?=\d)|(?<![\w)])[-\u2212](?=\d))|[{PUNCTUATION}]")


def ascii_dashes(text: str) -> str:
    """Every dash and minus sign as "-"."""
    return "".join("-" if c in DASHES or unicodedata.category(c) == "Pd" else c for c in text)


def one_spelling(text: str) -> str:
    """The rewrite `unicode`."""
    seen = []
    for character in text:  # before NFKC, which makes a blank and an accent of some
        category = unicodedata.category(character)
        if character in QUOTES or category in ("Pi", "Pf"):
            seen.append("'")
        elif category != "Cf":
            seen.append(character)
    text = unicodedata.normalize("NFKC", ascii_dashes("".join(seen)))
    return ascii_dashes(text).translate(SLASHES)


def numbers_apart(text: str) -> str:
    """The rewrite `numbers`."""
    text = THOUSANDS.sub("", one_spelling(text))
    return IN_NUMBER.sub(lambda mark: mark[0].translate(KEPT), text)


# Digits in groups of three: by commas, apostrophes, or blanks that do not end a line.
GROUPS = "[0-9]{1,3}(?:[,'\u2019\u00a0\u2009\u202f][0-9]{3})+(?![0-9])"
FULL_WIDTH = {"\uff0c": ",", "\uff0e": ".", "\uff0b": "+"}
REWRITES: dict[str, Callable[[str], str]] = {"unicode": one_spelling, "numbers": numbers_apart}


def contains(texts: Iterable[str], golds: Sequence[str], normalize: Callable[[str], str], *,
             whole_words: bool = True) -> bool:
    """Whether one of the texts has a gold answer in it, both normalised.

    Words are whole if they are so with the punctuation deleted, as in scores, or with a blank in
    its place: "Twain" is a word of "Twain's", "1914" one of "1914-1918". Without whole_words a gold
    answer may also begin or end inside a word ("no" in "know").
    """
    parts, joined, spaced = [], [], []  # what is looked for: inside words, or as words
    for gold in golds:
        form, blanks = normalize(gold), normalize(_spaced(gold))
        # "The" and "?" are kept where they stand alone, but no longer text has them.
        vanishes = normalize(f"{gold} x") == "x"
        if form and not whole_words and not vanishes:
            parts.append(form)
        elif form:
            joined.append(f" {form} ")
            # Blanks make an article of the first letter of "A-1"; what is left is another answer.
            if blanks.replace(" ", "") == form.replace(" ", ""):
                spaced.append(f" {blanks} ")
    for text in texts:
        form = f" {normalize(text)} "
        if any(part in form for part in (*parts, *joined)):
            return True
        if spaced:
            form = f" {normalize(_spaced(text))} "
            if any(words in form for words in spaced):
                return True
    return False


def _spaced(text: str) -> str:
    """Blanks for punctuation, but for a sign and for points and commas within numbers."""
    return BETWEEN_WORDS.sub(lambda mark: mark[1] or " ", text)


def find_numbers(text: str) -> set[Decimal]:
    """The numbers in a text, in any spelling: "-5", a typographic minus, "1,000", "5.0", "05"."""
    shown = []
    for character in text.replace("{,}", ",").replace("\\,", "\u202f"):  # LaTeX's
        category = unicodedata.category(character)
        if category == "Nd":  # digits of any script
            shown.append(str(unicodedata.decimal(character)))
        elif category == "No":  # an exponent or a fraction is a number of its own
            shown.append(f" {unicodedata.normalize('NFKC', character)} ")
        else:
            shown.append(FULL_WIDTH.get(character, character))
    text = ascii_dashes(re.sub(r"\u2212\s+(?=\d)", "\u2212", "".join(shown)))
    numbers = re.findall(rf"((?<![\w)])-)?({GROUPS}|[0-9]+)(\.[0-9]+)?", text)
    return {Decimal(sign + re.sub("[^0-9]", "", whole) + rest) for sign, whole, rest in numbers}
