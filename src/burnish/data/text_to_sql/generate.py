"""Making the task's examples: a question, the schema it is about, the SQL that answers it, rows to check it on."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass

from burnish.data.text_to_sql import domains
from burnish.data.text_to_sql.execute import run_query, same_result
from burnish.data.text_to_sql.queries import Draft, draw_draft
from burnish.data.text_to_sql.schema import Database, WordLists, draw_database, parse_worlds
from burnish.errors import DataError

SPLITS = {
    "train": (domains.TRAIN_WORLDS, domains.TRAIN_WORDS),
    "validation": (domains.VALIDATION_WORLDS, domains.VALIDATION_WORDS),
    "test": (domains.TEST_WORLDS, domains.TEST_WORDS),
}
INSTRUCTION = "Write the SQL query that answers the question."
TWO_TABLE_SHARE = 0.3
_MAX_RESULT_ROWS = 60


@dataclass(frozen=True, kw_only=True)
class SqlExample:
    """One example.

    `context` is the schema as CREATE TABLE statements, `database` the script that also fills the tables, `ordered` says
    whether the question asks for an order, `kind` names the shape of the query.
    """

    question: str
    context: str
    answer: str
    database: str
    ordered: bool
    kind: str


def question_of(draft: Draft, rng: random.Random) -> str:
    """Put a draft's phrase, or one of its own questions, the way people ask."""
    if draft.questions and rng.random() < 0.5:
        return rng.choice(draft.questions)
    wordings = (
        "Show {}.",
        "List {}.",
        "Give me {}.",
        "Find {}.",
        "What is {}?",
        "Tell me {}.",
        "I would like to see {}.",
        "Can you show me {}?",
        "Please return {}.",
        "What are {}?",
    )
    return rng.choice(wordings).format(draft.phrase)


def _usable(draft: Draft, database: Database) -> bool:
    """Whether the query has an answer that tells right from wrong."""
    result = run_query(database.script, draft.sql)
    if not result.rows or len(result.rows) > _MAX_RESULT_ROWS or result.rows == [(None,)] or result.rows == [(0,)]:
        return False
    return draft.loose_sql is None or not same_result(
        result, run_query(database.script, draft.loose_sql), ordered=draft.ordered
    )


def generate(split: str, count: int, *, seed: int = 0) -> list[dict[str, object]]:
    """Make examples of one split.

    Args:
        split: "train", "validation" or "test"; their tables, columns and values are disjoint.
        count: how many examples; no question about the same schema twice.
        seed: the same seed gives the same examples, and a longer list begins with a shorter one.

    Returns:
        dicts with the fields of `SqlExample`.

    Raises:
        DataError: an unknown split or a count below 1.
    """
    if split not in SPLITS:
        raise DataError("unknown split of text-to-sql", got=repr(split), expected=" or ".join(SPLITS))
    if count < 1:
        raise DataError("the number of text-to-sql examples is too small", got=count, expected="at least 1")
    worlds_text, word_lists = SPLITS[split]
    worlds, words = parse_worlds(worlds_text), WordLists(word_lists)
    rng = random.Random(f"burnish-text-to-sql/{split}/{seed}")
    seen: set[tuple[str, str]] = set()
    examples: list[dict[str, object]] = []
    while len(examples) < count:
        num_tables = 2 if rng.random() < TWO_TABLE_SHARE else 1
        database = draw_database(rng.choice(worlds), num_tables=num_tables, words=words, rng=rng)
        draft = draw_draft(database, rng)
        question = question_of(draft, rng)
        if (question, database.schema) in seen or not _usable(draft, database):
            continue
        seen.add((question, database.schema))
        example = SqlExample(
            question=question,
            context=database.schema,
            answer=draft.sql,
            database=database.script,
            ordered=draft.ordered,
            kind=draft.kind,
        )
        examples.append(asdict(example))
    return examples
