"""CSV tables as people have them: `.csv` or `.csv.gz`, any order of columns, a few bad rows."""

from __future__ import annotations

import csv
import difflib
import gzip
import os
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path, PurePosixPath

from ...errors import DataError
from ..shards import LeftOut


def find_table(folders: Sequence[Path], *names: str) -> Path | None:
    """The first file of these names (with wildcards; .gz after them is tried too) in these folders."""
    for folder in folders:
        for name in names:
            for found in sorted([*folder.glob(name), *folder.glob(name + ".gz")]):
                if found.is_file():
                    return found
    return None


def need_table(folders: Sequence[Path], *names: str) -> Path:
    """As `find_table`. Raises DataError if there is none."""
    found = find_table(folders, *names)
    if found is None:
        where = " or ".join(str(folder) for folder in folders)
        raise DataError(f"{where} holds no {' or '.join(names)} (or .gz): pass the folder that the data set came in.")
    return found


def read_rows(
    path: Path,
    left_out: list[LeftOut],
    required: Sequence[str],
    one_of: Sequence[str] = (),
    *,
    what: str = "study",
    numbers: Iterator[int] | None = None,
) -> Iterator[tuple[int, dict[str, str]]]:
    """(number, cells) of each row, from 1; cells are stripped. Rows that are none join `left_out`.

    A lost quote makes one cell of many rows: then its first line alone is set aside, and the next is tried.

    Args:
        required: columns that must be there; one_of: at least one of these too.
        what: a row tells of ("study", "image"), for `left_out`.
        numbers: what rows are numbered by, where several tables are one source.

    Raises:
        DataError: if the table is missing, damaged, empty, has no rows or lacks a column.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    numbers = count(1) if numbers is None else numbers
    any_row = False
    try:
        # A byte that is no UTF-8 costs its row, not the table.
        with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            lines = _Lines(file)
            reader = csv.reader(lines, strict=True)
            names = [name.strip() for name in next(reader, [])]
            _check_columns(path, names, required, one_of)
            while True:
                lines.read.clear()
                try:
                    cells = next(reader)
                except StopIteration:
                    break
                except csv.Error:
                    lines.again.extendleft(reversed(lines.read[1:]))
                    cells = None
                if cells == []:  # an empty line
                    continue
                any_row, number = True, next(numbers)
                if cells is None:
                    left_out.append(LeftOut(number, what, "broken quotes"))
                elif len(cells) != len(names):
                    left_out.append(LeftOut(number, what, "wrong number of columns"))
                elif not all(map(_is_text, cells)):
                    left_out.append(LeftOut(number, what, "not UTF-8 text"))
                else:
                    yield number, {name: cell.strip() for name, cell in zip(names, cells, strict=True)}
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"{path}: no such table, expected a .csv or .csv.gz file.") from None
    except csv.Error as error:
        raise DataError(f"{path} has no header that is CSV ({error}).") from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise DataError(f"{path} is not a whole gzip file.") from None
    if not any_row:
        raise DataError(f"{path} has a header but no rows.")


class _Lines:
    """The lines of a file. `read` are those handed out, `again` those to be handed out next."""

    def __init__(self, file: Iterable[str]):
        self._file, self.read, self.again = iter(file), [], deque()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        self.read.append(self.again.popleft() if self.again else next(self._file))
        return self.read[-1]


def _is_text(cell: str) -> bool:
    if "\0" in cell:
        return False
    try:
        cell.isascii() or cell.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_columns(path: Path, found: list[str], required: Sequence[str], one_of: Sequence[str]) -> None:
    wanted = ", ".join(required) + (f", {' or '.join(one_of)}" if one_of else "")
    if not found:
        raise DataError(f"{path} is empty, expected a header with {wanted}.")
    if not set(found) & {*required, *one_of}:  # it may be a row: nothing of it is repeated
        raise DataError(f"{path} begins with no header: expected columns {wanted}, with commas between them.")
    missing = [name for name in required if name not in found]
    if one_of and not any(name in found for name in one_of):
        missing.append(one_of[0])
    if missing:
        shown = [name.encode("ascii", "replace").decode() for name in found[:30]]
        near = [(name, difflib.get_close_matches(name, shown, n=1)) for name in missing]
        hints = "".join(f" Is {match[0]!r} meant to be {name!r}?" for name, match in near if match)
        raise DataError(f"{path} lacks the column {', '.join(missing)}; found {', '.join(shown)}.{hints}")
    twice = [name for name, times in Counter(found).items() if name and times > 1]
    if twice:
        raise DataError(f"{path} has the column {twice[0]!r} twice.")


def below(root: Path, name: str) -> Path | None:
    """`name`, a path in a data set's own table, below its root; None where it leads out of there."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or ".." in parts or parts[0] == "/" or "\0" in name:
        return None
    return root.joinpath(*parts)


def there(*candidates: Path | None) -> Path | None:
    """The first of these that is a file; else the first, whose absence is found where it is read."""
    known = [path for path in candidates if path is not None]
    return next((path for path in known if os.path.isfile(path)), known[0] if known else None)


def positives(cells: dict[str, str], names: Sequence[str]) -> tuple[str, ...]:
    """The names, in lower case, whose cell is 1."""
    return tuple(name.lower() for name in names if _number(cells.get(name, "")) == 1.0)


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None
