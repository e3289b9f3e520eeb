"""The bundled text-to-SQL task: schemas, rows, questions and their SQL, made from a seed; and how an answer is scored.

`generate` makes examples, `run_query` and `same_result` score them by executing both queries. No torch here.
"""

from burnish.data.text_to_sql.execute import QueryResult, run_query, same_result
from burnish.data.text_to_sql.generate import SPLITS, generate

__all__ = ["SPLITS", "QueryResult", "generate", "run_query", "same_result"]
