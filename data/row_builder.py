"""Builder of `datasets` for text files of rows."""

import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

import datasets
import pyarrow as pa

from .text_files import Columns
from .text_rows import is_table, read_batches


class RowFiles(datasets.ArrowBasedBuilder):
    """Builder that reads text files of rows, keeps them in the cache of `datasets`, and streams them.

    The cells of a table are strings. A column of JSON rows keeps its type if all rows agree. Otherwise its values
    become strings, and lists and dicts among them become JSON. A stream has the columns of the first 10,000 rows of
    each file.
    """

    VERSION = datasets.Version("1.1.0")  # increase it when the same file gives other rows: the cache depends on it

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo()

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        files = list(map(str, self.config.data_files["train"]))
        types: dict[str, pa.DataType] = {}
        for file in files:
            has_same_columns = dl_manager.is_streaming or is_table(file)
            for columns in islice(read_batches(file), 1 if has_same_columns else None):
                for name, values in columns.items():
                    types[name] = common_type(types.get(name, pa.null()), type_of(values))
        schema = pa.schema([(name, pa.string() if pa.types.is_null(kind) else kind) for name, kind in types.items()])
        self.info.features = datasets.Features.from_arrow_schema(schema)
        return [datasets.SplitGenerator(name="train", gen_kwargs={"files": files})]

    def _generate_tables(self, files: list[str]) -> Iterator[tuple[str, pa.Table]]:
        schema = self.info.features.arrow_schema
        for file_number, file in enumerate(files):
            for number, columns in enumerate(read_batches(file)):
                yield f"{file_number} {number}", arrow_table(columns, schema)


def arrow_table(columns: Columns, schema: pa.Schema | None = None) -> pa.Table:
    """Return columns as a table.

    Args:
        columns: the values of each column.
        schema: names and types of the columns of the table. By default all columns, with the types of their values.
    """
    if schema is None:
        schema = pa.schema([(name, type_of(values)) for name, values in columns.items()])
    length = len(next(iter(columns.values()), []))
    missing = [None] * length
    return pa.table([arrow_array(columns.get(field.name, missing), field.type) for field in schema], schema=schema)


def arrow_array(values: list, kind: pa.DataType) -> pa.Array:
    """Return values as an array. In an array of strings, other values become JSON."""
    if not pa.types.is_string(kind):
        return pa.array(values, kind)
    return pa.array(values if are_strings(values) else list(map(as_text, values)), kind)


def type_of(values: list) -> pa.DataType:
    """Return the type that all values have, or string if they do not agree."""
    if are_strings(values):
        return pa.string()
    if len({type(value) for value in values if value is not None}) > 1:  # Arrow would turn 4 into 4.0 beside 3.5
        return pa.string()
    try:
        return pa.array(values).type
    except (pa.ArrowException, OverflowError, UnicodeError):  # values disagree inside lists, or are not storable
        return pa.string()


def common_type(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    """Return the type of a column whose parts have these types."""
    try:
        return pa.unify_schemas([pa.schema([("", first)]), pa.schema([("", second)])]).field(0).type
    except pa.ArrowException:
        pass
    if pa.types.is_nested(first) and pa.types.is_nested(second):  # other fields of dicts, or empty lists
        try:
            schemas = [pa.schema([("", first)]), pa.schema([("", second)])]
            return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
        except pa.ArrowException:
            pass
    return pa.string()


def are_strings(values: list) -> bool:
    """Return whether all values are strings that Arrow can store, or `None`. There must be a string among them."""
    try:
        "".join(value for value in values if value is not None).encode()
    except (TypeError, UnicodeEncodeError):  # another type, or half a character
        return False
    return any(value is not None for value in values)


def as_text(value: Any) -> str | None:
    """Return a value as text: a string without halves of characters, `None` as `None`, and other values as JSON."""
    if isinstance(value, str):
        return re.sub(r"[\ud800-\udfff]", " ", value)
    return None if value is None else json.dumps(value)
