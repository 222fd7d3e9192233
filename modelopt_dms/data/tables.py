# SPDX-License-Identifier: Apache-2.0
"""A .parquet file as rows. Knows no records."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from modelopt_dms.data import DataError


class Table:
    """An open file of which some columns are read."""

    def __init__(self, path: Path, choose: Callable[[Sequence[str]], list[str]]) -> None:
        """Open a file.

        Args:
            path: of the file.
            choose: of its columns, those to read.

        Raises:
            DataError: it is damaged.
        """
        self._path = path
        try:
            self._file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        self._columns = choose(self._file.schema_arrow.names)

    def rows(self) -> list[dict[str, Any]]:
        """All rows, by column.

        Raises:
            DataError: the file is damaged, or holds text that is not UTF-8.
        """
        try:
            table = self._file.read(self._columns)
            return table.to_pylist(maps_as_pydicts="strict")
        except (OSError, pa.ArrowException, KeyError, UnicodeDecodeError) as error:
            raise DataError(f"{self._path} cannot be read: {error}") from error
