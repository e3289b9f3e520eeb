"""SQL as text: the statement in a model's answer, and one spelling for queries that differ only in how they are typed.

Torch-free. What a query means is decided by running it (`burnish.data.text_to_sql.execute`), not here.
"""

from __future__ import annotations

import re

_FENCE = re.compile(r"```(?:sql|sqlite)?\s*\n?(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_TOKEN = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|[\w.$]+|<>|!=|<=|>=|==|\|\||\S")


def statement_in(answer: str) -> str:
    """The first SQL statement of an answer: out of its code fence if there is one, without what follows `;`."""
    fence = _FENCE.search(answer)
    text = (fence.group(1) if fence else answer).strip()
    for match in _TOKEN.finditer(text):
        if match.group() == ";":
            return text[: match.start()].strip()
    return text


def normalise_sql(sql: str) -> str:
    """Lower case outside literals, one space between tokens, one spelling of quotes and of not-equal.

    Double-quoted text counts as a literal, as it does in SQLite where no column has that name.
    """
    words: list[str] = []
    for match in _TOKEN.finditer(statement_in(sql)):
        token = match.group()
        if token[0] in "'\"" and len(token) > 1:
            quote = token[0]
            inner = token[1:-1].replace(quote * 2, quote)
            words.append("'" + inner.replace("'", "''") + "'")
        elif token[0] == "`" and len(token) > 1:
            words.append(token[1:-1].lower())
        else:
            words.append({"!=": "<>", "==": "="}.get(token, token.lower()))
    return " ".join(words)
