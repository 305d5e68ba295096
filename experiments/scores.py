"""What each rule of scoring changes on real questions, answers and passages.

    python -m experiments.scores --questions FILE ... [--corpus FILE]

A line for each file:
    emptied      gold answers of which SQuAD's published rule leaves nothing ("A", "---")
    pairs        of different gold answers of the file that are equal by the paper's rule
    apart        of these, not equal by --answer-rule numbers ("3.5" and "35")
    rewritten    gold answers whose normalised form --answer-rule unicode changes
    joined       pairs that are equal by unicode alone
    hits         passages with a gold answer of the question in them, by the published rule
    lost         of these, none when answers must be whole words
    asked hit, asked lost    the same, counted in questions with such a passage
The passages are the row's own paragraphs (`context`), else those of --corpus that the row names
(`metadata.wiki18_ids`, numbers of lines). With --every-passage they are all of the corpus.
"""

import argparse
import itertools
import re
import string
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from data import Passage, Question, load_questions, normalize_answer
from eval import align
from formats.answers import contains
from retriever import Corpus

COLUMNS = ("file", "questions", "golds", "emptied", "pairs", "apart", "rewritten", "joined",
           "passages", "hits", "lost", "asked hit", "asked lost")  # fmt: skip


def squad_as_published(text: str) -> str:
    """SQuAD's rule as it is published: it may leave nothing."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def equal_pairs(questions: Sequence[Question], rule: str) -> set[tuple[str, str]]:
    """Pairs of different texts, gold answers of the file, that are equal by a rule."""
    alike: dict[str, set[str]] = defaultdict(set)
    for question in questions:
        for gold in question.golden_answers:
            alike[normalize_answer(gold, rule)].add(gold)
    return {
        pair for golds in alike.values() for pair in itertools.combinations(sorted(golds), 2)
    }


def passages_of(question: Question, corpus: Corpus | None, every: list[Passage]) -> list[Passage]:
    if every:
        return every
    if question.context:
        return [Passage("", p["title"], p["text"], 0.0) for p in question.context]
    if corpus is None:
        return []
    return [corpus.passage(row, 0.0) for row in question.metadata.get("wiki18_ids", [])]


def is_hit(passage: Passage, question: Question, *, whole_words: bool) -> bool:
    """data.hit of one passage, with the texts normalised once for all questions."""
    text = f"{passage.title} {passage.text}"
    return contains([text], question.golden_answers, normalized, whole_words=whole_words)


normalized = cache(normalize_answer)


def measured(
    path: Path, corpus: Corpus | None, every: list[Passage], examples: list[str]
) -> list[str]:
    """One line of the table; what changed is added to `examples`."""
    questions = load_questions(path)
    golds = [gold for question in questions for gold in question.golden_answers]
    emptied = [gold for gold in golds if not squad_as_published(gold)]
    by_squad, by_numbers = equal_pairs(questions, "squad"), equal_pairs(questions, "numbers")
    by_unicode = equal_pairs(questions, "unicode")
    rewritten = [g for g in golds if normalize_answer(g) != normalize_answer(g, "unicode")]
    counts = {"passages": 0, "hits": 0, "lost": 0, "questions hit": 0, "questions lost": 0}
    lost_golds: dict[str, str] = {}
    for question in questions:
        passages = passages_of(question, corpus, every)
        published = [p for p in passages if is_hit(p, question, whole_words=False)]
        whole = [p for p in published if is_hit(p, question, whole_words=True)]
        counts["passages"] += len(passages)
        counts["hits"] += len(published)
        counts["lost"] += len(published) - len(whole)
        counts["questions hit"] += bool(published)
        counts["questions lost"] += bool(published) and not whole
        for passage in published:
            if passage not in whole:
                lost_golds.setdefault(" / ".join(question.golden_answers)[:60], passage.name)
    examples += [f"{path.stem}: emptied: {gold!r}" for gold in emptied[:5]]
    examples += [f"{path.stem}: apart by numbers: {a!r} {b!r}"
                 for a, b in sorted(by_squad - by_numbers)[:5]]
    examples += [f"{path.stem}: joined by unicode: {a!r} {b!r}"
                 for a, b in sorted(by_unicode - by_squad)[:5]]
    examples += [f"{path.stem}: hit inside a word: {gold!r} in {title!r}"
                 for gold, title in [*lost_golds.items()][:5]]
    numbers = (len(questions), len(golds), len(emptied), len(by_squad), len(by_squad - by_numbers),
               len(rewritten), len(by_unicode - by_squad), *counts.values())  # fmt: skip
    return [path.stem, *map(str, numbers)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m experiments.scores", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", nargs="+", required=True, type=Path, metavar="FILE")
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="passages, JSON lines")
    parser.add_argument("--every-passage", action="store_true",
                        help="look at all passages of the corpus for each question")
    options = parser.parse_args(argv)
    try:
        corpus = Corpus(options.corpus) if options.corpus else None
        every = []
        if options.every_passage:
            if corpus is None:
                parser.error("--every-passage: got no --corpus, expected one")
            every = [corpus.passage(row, 0.0) for row in range(len(corpus))]
        lines, examples = [list(COLUMNS)], list[str]()
        for path in options.questions:
            lines.append(measured(path, corpus, every, examples))
    except (ValueError, OSError) as error:
        sys.exit(f"scores: {error}")
    print("\n".join([align(lines), "", *examples]))


if __name__ == "__main__":
    main()
