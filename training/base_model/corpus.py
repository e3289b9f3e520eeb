"""Text for the base model: schemas, prose about their rows, SQL scripts with comments, lists of questions. No answers.

Questions stand in lists of their own, so the base knows how people ask and that a question follows a question; it never
sees one answered, nor the chat form.

Tables and columns are named from word lists and from invented words, values are invented names, so the only way to
predict a query is to read the schema and the comment above it. No table name is one of the text-to-SQL task's own, nor
any column name but the few that the task shares on purpose; `tests/training/test_corpus.py` holds that.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from burnish.data.text_to_sql import domains
from burnish.data.text_to_sql.generate import question_of
from burnish.data.text_to_sql.queries import draw_draft
from burnish.data.text_to_sql.schema import Column, Database, Table, TableKind, draw_code, draw_database, parse_worlds
from words import ADJECTIVES, ENDS, FIRST_NAMES, LABELS, MEASURES, NOUNS, ONSETS, PLACES, ROLES, VOWELS

_TASK_WORLDS = [
    world
    for text in (domains.TRAIN_WORLDS, domains.VALIDATION_WORLDS, domains.TEST_WORLDS)
    for world in parse_worlds(text)
]
TASK_TABLES = frozenset(kind.name for world in _TASK_WORLDS for kind in world)
TASK_COLUMNS = (
    frozenset(column.name for world in _TASK_WORLDS for kind in world for column in kind.columns)
    - domains.SHARED_COLUMNS
)
RESERVED = TASK_TABLES | TASK_COLUMNS
_SQL_WORDS = frozenset(
    """
    and as by case cross from group in index is join key left limit not on or order right select set
    table to union values where
    """.split()
)


# Pieces of English words, of which wide vocabularies make names: they cover the spellings that real names have.
_PIECES = sorted(
    {
        word[start : start + length]
        for word in (*NOUNS, *ADJECTIVES, *MEASURES, *ROLES, *PLACES, *LABELS, *(name.lower() for name in FIRST_NAMES))
        for length in (2, 3, 4, 5)
        for start in range(len(word) - length + 1)
    }
)


class Vocabulary:
    """Where the corpus's names and values come from: word lists, and words that mean nothing.

    Args:
        wide: make a good part of the invented words of pieces of English words instead of simple syllables, so that
            hardly any spelling is new to the model.
    """

    def __init__(self, *, wide: bool) -> None:
        self.wide = wide

    def invented(self, rng: random.Random, *, syllables: int | None = None) -> str:
        """A word that means nothing."""
        if self.wide and rng.random() < 0.65:
            return "".join(rng.choice(_PIECES) for _ in range(rng.choice((1, 2, 2, 2, 3))))
        count = syllables or rng.choice((1, 2, 2, 2, 3))
        return "".join(
            rng.choice(ONSETS) + rng.choice(VOWELS) + (rng.choice(ENDS) if rng.random() < 0.6 else "")
            for _ in range(count)
        )

    def word(self, words: list[str], rng: random.Random, *, invented: float = 0.25) -> str:
        """One of the words, or with some probability an invented one."""
        return self.invented(rng) if rng.random() < (0.5 if self.wide else invented) else rng.choice(words)

    def draw(self, kind: str, rng: random.Random) -> str:
        """A value: mostly invented, some English; see `schema.Words`."""
        if kind == "person":
            first = rng.choice(FIRST_NAMES) if rng.random() < 0.4 else self.invented(rng).capitalize()
            return f"{first} {self.invented(rng, syllables=2).capitalize()}"
        if kind == "title":
            first = rng.choice(ADJECTIVES) if rng.random() < 0.5 else self.invented(rng)
            second = rng.choice(NOUNS) if rng.random() < 0.5 else self.invented(rng)
            return f"{first.capitalize()} {second.capitalize()}"
        if kind == "code":
            return draw_code(rng)
        word = rng.choice(NOUNS) if rng.random() < 0.15 else self.invented(rng)
        return f"{word.capitalize()} {rng.choice(NOUNS).capitalize()}" if rng.random() < 0.15 else word.capitalize()


def _identifier(draw, rng: random.Random, taken: set[str]) -> str:
    while True:
        name = draw()
        if name not in taken and name not in RESERVED and name not in _SQL_WORDS and len(name) > 2:
            taken.add(name)
            return name


def draw_column(rng: random.Random, taken: set[str], vocabulary: Vocabulary) -> Column:
    """A column with an English-looking or invented name."""
    kind = rng.choice(
        (
            "person",
            "place",
            "org",
            "title",
            "code",
            "choice",
            "choice",
            "int",
            "int",
            "int",
            "int",
            "real",
            "year",
            "date",
        )
    )
    tails = {
        "person": lambda: rng.choice(ROLES),
        "place": lambda: rng.choice(PLACES),
        "org": lambda: rng.choice(("firm", "company", "sponsor", "agency", "vendor", "maker")),
        "title": lambda: rng.choice(("name", "title", "label", "caption", "heading")),
        "code": lambda: rng.choice(("code", "number", "key", "serial", "tag")),
        "choice": lambda: rng.choice(LABELS),
        "int": lambda: rng.choice(MEASURES),
        "real": lambda: rng.choice(MEASURES),
        "year": lambda: rng.choice(("year", "season", "start", "end")),
        "date": lambda: rng.choice(("date", "day", "deadline", "start")),
    }

    def draw() -> str:
        roll = rng.random()
        if kind == "int" and roll < 0.25:
            return vocabulary.word(NOUNS, rng) + "s"
        if roll < 0.5:
            tail = tails[kind]()
            return f"{vocabulary.word(NOUNS if rng.random() < 0.6 else ADJECTIVES, rng)}_{tail}"
        if roll < 0.7:
            return tails[kind]()
        return vocabulary.word(NOUNS, rng, invented=0.4)

    name = _identifier(draw, rng, taken)
    if kind == "choice":
        return Column(
            name=name,
            kind=kind,
            choices=tuple(
                dict.fromkeys(vocabulary.word(NOUNS + ADJECTIVES, rng, invented=0.4) for _ in range(rng.randint(3, 5)))
            ),
        )
    if kind == "year":
        return Column(name=name, kind=kind, low=rng.choice((1000, 1700, 1900, 1950)), high=2024)
    if kind == "date":
        return Column(name=name, kind=kind, low=1990, high=2024)
    low = rng.choice((0, 1, 2, 5, 10, 40, 100))
    return Column(name=name, kind=kind, low=low, high=low + rng.choice((30, 60, 90, 400, 900, 5000, 90000)))


def draw_world(rng: random.Random, vocabulary: Vocabulary) -> list[TableKind]:
    """A parent table and a child."""
    names: set[str] = set()
    kinds = []
    for _ in range(2):

        def draw() -> str:
            if rng.random() < 0.85:
                return vocabulary.word(NOUNS, rng)
            return f"{vocabulary.word(ADJECTIVES, rng)}_{rng.choice(NOUNS)}"

        name = _identifier(draw, rng, names)
        taken: set[str] = set()
        columns = tuple(draw_column(rng, taken, vocabulary) for _ in range(rng.randint(3, 5)))
        kinds.append(TableKind(name=name, parent=kinds[0].name if kinds else None, columns=columns))
    return kinds


def _comment(phrase: str, rng: random.Random) -> str:
    bare = phrase.removeprefix("the ") if rng.random() < 0.4 else phrase
    text = rng.choice(("{}", "{}", "{}", "select {}", "get {}", "returns {}", "query for {}", "this gives {}")).format(
        bare
    )
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.3:
        text += "."
    return text


def script(database: Database, rng: random.Random) -> str:
    """A schema followed by queries, each under a comment or followed by an explanation."""
    blocks = [database.schema]
    explained = rng.random() < 0.15
    opening, closing = rng.choice((("-- ", ""), ("-- ", ""), ("/* ", " */"), ("# ", "")))
    for _ in range(rng.randint(3, 6)):
        draft = draw_draft(database, rng)
        comment = opening + _comment(draft.phrase, rng) + closing
        end = ";" if rng.random() < 0.8 else ""
        blocks.append(f"{draft.sql}{end}\n{comment}" if explained else f"{comment}\n{draft.sql}{end}")
    return rng.choice(("\n", "\n\n")).join(blocks)


def prose(database: Database, rng: random.Random) -> str:
    """A schema, some of its rows as statements, and sentences that say the same."""
    table: Table = rng.choice(database.tables)
    rows = rng.sample(list(table.rows), min(len(table.rows), rng.randint(2, 4)))
    inserts = [statement for statement, row in zip(table.insert_statements(), table.rows) if row in rows]
    sentences = []
    for row in rows:
        facts = [f"{column.phrase} {row[1 + index]}" for index, column in enumerate(table.columns)]
        name = table.name.replace("_", " ")
        form = rng.choice(
            ("The {t} {i} has {f}.", "There is a {t} with {f}.", "{t} {i}: {f}.", "One of the {p} has {f}.")
        )
        sentences.append(form.format(t=name, i=row[0], p=table.plural, f=", ".join(facts)))
    known = (
        f"Every {table.name.replace('_', ' ')} has {', '.join(column.phrase_with_article for column in table.columns)}."
    )
    parts = [table.create_statement(), known, *inserts, " ".join(sentences)]
    if rng.random() < 0.3:
        parts = [known, table.create_statement(), " ".join(sentences)]
    return "\n".join(parts)


def questions(database: Database, rng: random.Random) -> str:
    """A schema and a list of questions about it."""
    name = database.tables[0].plural
    heads = (
        "Questions",
        "Questions:",
        "What people ask:",
        f"Some questions about {name}",
        f"Questions about the {name}:",
        "",
    )
    mark = rng.choice(("- ", "* ", "", "", "", "{}. ", "{}) "))
    asked = [question_of(draw_draft(database, rng), rng) for _ in range(rng.randint(4, 8))]
    lines = [mark.format(number) + question for number, question in enumerate(asked, start=1)]
    head = rng.choice(heads)
    gap = rng.choice(("\n", "\n\n"))
    return gap.join([database.schema, *([head] if head else []), rng.choice(("\n", "\n", "\n\n")).join(lines)])


def documents(seed: int, *, question_share: float = 0.0, wide: bool = False, two_tables: float = 0.35) -> Iterator[str]:
    """Documents without end; this share of them are lists of questions, `wide` is the vocabulary's."""
    name = f"burnish-base/{seed}/{question_share}" if question_share else f"burnish-base/{seed}"
    rng = random.Random(f"{name}/wide" if wide else name)
    vocabulary = Vocabulary(wide=wide)
    while True:
        database = draw_database(
            draw_world(rng, vocabulary), num_tables=2 if rng.random() < 0.35 else 1, words=vocabulary, rng=rng
        )
        if rng.random() < question_share:
            yield questions(database, rng)
        else:
            yield script(database, rng) if rng.random() < 0.85 else prose(database, rng)
