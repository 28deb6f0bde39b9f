"""From files to prompts: reading, recognising columns, checking teachers, walking the data with a cursor.

source (rows) -> columns (which column is what) -> prompts (tokenised, teachers checked) -> stream (order and cursor).
"""

from hapo_async.data.columns import ColumnMapping, recognise
from hapo_async.data.model import context_tokens, load_tokenizer, resolve_model
from hapo_async.data.prompts import DataReport, check_data, load_prompts
from hapo_async.data.source import load_rows
from hapo_async.data.stream import PromptStream

__all__ = [
    "ColumnMapping",
    "DataReport",
    "PromptStream",
    "check_data",
    "context_tokens",
    "load_prompts",
    "load_rows",
    "load_tokenizer",
    "recognise",
    "resolve_model",
]
