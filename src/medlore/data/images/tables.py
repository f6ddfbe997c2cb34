"""CSV tables of images: a column of files, a column of labels (or one column a class), and, where known, split and patient."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medlore.data.images.imageset import ImageItem, ImageSet, Task
from medlore.data.images.imagetree import SPLIT_NAMES
from medlore.data.images.missing_labels import ADVICE, MissingLabels, says_nothing, settled
from medlore.data.images.trees import Tree
from medlore.errors import DataError, UnknownNameError

# Column names that are understood, in lower case; the first that is there counts.
FILE_COLUMNS = ("file", "filename", "file_name", "image", "image_path", "image index", "path", "img", "name")
SPLIT_COLUMNS = ("split", "subset", "set", "partition")
GROUP_COLUMNS = ("patient", "patient_id", "patientid", "patient id", "study", "study_id", "subject", "subject_id", "group", "slide", "case")
LABEL_COLUMNS = ("label", "class", "target", "category", "diagnosis", "wnid")
MANY_LABELS_COLUMNS = ("labels", "classes", "findings", "finding labels", "finding_labels")
NOT_A_CLASS = ("id", "index", "age", "sex", "width", "height", "fold", "patient age", "follow-up #")
NO_LABEL = ("", "no finding", "none", "normal finding")


@dataclass(frozen=True)
class _Columns:
    """Which column means what; all as written in the header."""

    file: str
    split: str | None
    group: str | None
    label: str | None
    many: str | None
    classes: tuple[str, ...]
    passed_over: tuple[str, ...] = ()

    def in_words(self) -> str:
        named = {"image": self.file, "part": self.split, "group": self.group, "label": self.label or self.many}
        named_columns = [f"{column!r} ({meaning})" for meaning, column in named.items() if column is not None]
        return ", ".join([*named_columns, *(f"{name!r} (class)" for name in self.classes)])


@dataclass(frozen=True)
class _Row:
    number: int
    cells: Mapping[str, str]


def read_table(
    tree: Tree,
    name: str,
    *,
    images: Tree | None = None,
    split: str | None = None,
    task: Task | None = None,
    classes: Sequence[str] | None = None,
    missing_labels: MissingLabels = "fault",
) -> ImageSet:
    """Read a CSV (comma, semicolon or tab; UTF-8; a header line).

    A `label` column gives one class an image. A `labels` column gives several, split at `|` or `;`. Without either, every
    remaining column of numbers is a class: a value above 0 means present, so counts may stand there. A column counts as one of numbers
    when at least half of its filled cells are numbers; the others are faults then, so that no class vanishes over one cell. A table with
    none of these is unlabelled. The class list comes from the whole table, whatever split is read.

    Args:
        tree: where the table lies.
        name: its relative name.
        images: where the files lie; default beside the table, or in `images/` there.
        split: `train`, `val` or `test`, when the table has a column of splits.
        task: `single` reads one-hot columns as one class.
        classes: class names in label order; for tables with one column a class, the columns to read.
        missing_labels: what an empty cell, -1 or NaN of a multi-label table means: a `fault`, the class is absent (`negative`), or it
            is not known (`ignore`).

    Raises:
        DataError: all faults of the table, with line numbers.
        UnknownNameError: a split or class column that is not there.
    """
    where = f"{tree.root}/{name}"
    header, rows, faults = _read_rows(tree.read_text(name), where)
    columns = _columns(header, rows, classes, where)
    read = _Reader(columns, rows, task, classes, missing_labels)
    place, prefix = _place(tree, name, images, rows, columns)
    items: list[ImageItem] = []
    first: dict[str, int] = {}
    for row in _of_split(rows, columns, split, where):
        file = row.cells[columns.file].strip()
        try:
            if not file or file in first:
                raise ValueError(f"{file} stands already on line {first[file]}" if file else "no file name")
            first[file] = row.number
            labels = read.labels(row)
            if not place.has(prefix + file):
                raise ValueError(f"no file {prefix + file!r} in {place.root}")
            group = row.cells[columns.group].strip() or None if columns.group else None
            items.append(ImageItem(file, place.source(prefix + file), labels, group))
        except ValueError as error:
            faults.append((row.number, str(error)))
    if faults or not items:
        raise DataError(
            where,
            f"{len(faults)} faults" if faults else "no rows",
            f"one row per image; columns read: {columns.in_words()}",
            ADVICE if read.gaps else "correct the table, or name the image folder (images=...)",
            faults=[f"line {number}: {text}" for number, text in sorted(faults)],
        )
    short = tree.root.stem if name == "labels.csv" else name.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    return ImageSet(short, read.classes, read.task, tuple(items), where, (*_about_columns(columns), *read.notes()))


def table_of(tree: Tree, *, sure: bool = False) -> str | None:
    """The table at the top of a tree: `labels.csv`, or the only CSV; None when there is none.

    Args:
        tree: a folder or archive.
        sure: take it even if its first file is not there; otherwise a CSV that lists no image beside it is passed over.
    """
    tables = [name for name in tree.names if "/" not in name and name.lower().endswith((".csv", ".tsv"))]
    name = "labels.csv" if "labels.csv" in tables else tables[0] if len(tables) == 1 else None
    return name if name and (sure or _lists_images(tree, name)) else None


def _lists_images(tree: Tree, name: str) -> bool:
    try:
        header, rows, _ = _read_rows("\n".join(tree.read_text(name).split("\n", 2)[:2]), name)
    except DataError:
        return False
    column = _first(header, FILE_COLUMNS)
    if column is None or not rows:
        return False
    place, prefix = _place(tree, name, None, rows, _Columns(column, None, None, None, None, ()))
    return place.has(prefix + rows[0].cells[column].strip())


class _Reader:
    """Labels of a row, as the task and the class list want them."""

    def __init__(
        self, columns: _Columns, rows: Sequence[_Row], task: Task | None, classes: Sequence[str] | None, missing: MissingLabels
    ) -> None:
        self.columns, self.missing, self.gaps = columns, missing, 0
        self.by_column = not (columns.label or columns.many)
        self.task: Task = "single" if columns.label or (self.by_column and (task == "single" or not columns.classes)) else "multi"
        self.classes = tuple(classes) if classes is not None else self._found(rows)
        self.index = {name: i for i, name in enumerate(self.classes)}
        if classes is not None and columns.label and not set(self.index) & {row.cells[columns.label].strip() for row in rows}:
            # names were given for a column of class numbers
            self.index = {str(i): i for i in range(len(self.classes))}

    def _found(self, rows: Sequence[_Row]) -> tuple[str, ...]:
        if self.by_column:
            return self.columns.classes
        if self.columns.label:
            names = {row.cells[self.columns.label].strip() for row in rows} - {""}
            if names and all(name.isdigit() for name in names):  # class numbers: none may be missing in between
                return tuple(str(i) for i in range(max(map(int, names)) + 1))
            return tuple(sorted(names))
        return tuple(sorted({name for row in rows for name in self._several(row)}))

    def _several(self, row: _Row) -> list[str]:
        assert self.columns.many  # noqa: S101  # nosec B101 # for the type checker: called only with such a column
        names = (part.strip() for part in row.cells[self.columns.many].replace(";", "|").split("|"))
        return [name for name in names if name.lower() not in NO_LABEL]

    def labels(self, row: _Row) -> tuple[int, ...]:
        if self.columns.label:
            name = row.cells[self.columns.label].strip()
            if name not in self.index:
                raise ValueError(f"class {name!r} is not in the class list" if name else "no label")
            return (self.index[name],)
        if self.columns.many:
            if not row.cells[self.columns.many].strip():
                return self._gap(f"column {self.columns.many!r} is empty (without any finding it says 'No Finding')", len(self.classes))
            present = self._several(row)
            unknown = [name for name in present if name not in self.index]
            if unknown:
                raise ValueError(f"classes {unknown} are not in the class list")
            return tuple(int(name in present) for name in self.classes)
        flags = self._flags(row)
        if self.task == "multi" or not flags:
            return flags
        if flags.count(1) != 1:
            raise ValueError(f"{flags.count(1)} classes are marked; a single-label table marks one")
        return (flags.index(1),)

    def _flags(self, row: _Row) -> tuple[int, ...]:
        """1, 0 or missing for each column of a class; all faults of the row in one."""
        flags: list[int] = []
        faults: list[str] = []
        for name in self.columns.classes:
            try:
                flags += self._gap(_gap_in_words(row, name), 1) if says_nothing(row.cells[name]) else [int(_count(row, name) > 0)]
            except ValueError as error:
                faults.append(str(error))
        if faults:
            raise ValueError("; ".join(faults))
        return tuple(flags)

    def _gap(self, what: str, count: int) -> tuple[int, ...]:
        self.gaps += count
        if self.missing == "fault":
            raise ValueError(what)
        return (settled(self.missing),) * count

    def notes(self) -> list[str]:
        """How many labels are missing, and what they were taken for."""
        meaning = "the class is absent" if self.missing == "negative" else "not known, and left out of losses and metrics"
        return [f"{self.gaps} labels are missing (empty, -1 or NaN): {meaning}"] if self.gaps else []


def _gap_in_words(row: _Row, column: str) -> str:
    cell = row.cells[column].strip()
    return f"column {column!r} holds {cell}" if cell else f"column {column!r} is empty"


def _count(row: _Row, column: str) -> float:
    try:
        value = float(row.cells[column])
    except ValueError:
        raise ValueError(f"column {column!r} holds {row.cells[column]!r}, not a number") from None
    if not 0 <= value < float("inf"):
        raise ValueError(f"column {column!r} holds {row.cells[column]}: a count or 0 / 1 is accepted")
    return value


def _read_rows(text: str, where: str) -> tuple[list[str], list[_Row], list[tuple[int, str]]]:
    head = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    header = [cell.strip() for cell in next(reader, [])]
    rows, faults = [], []
    try:
        lines = [(reader.line_num, cells) for cells in reader]
    except csv.Error as error:
        raise DataError(where, f"not a table from line {reader.line_num} on ({error})", "comma-separated text", "save it again") from error
    for number, cells in lines:
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            faults.append((number, f"{len(cells)} cells instead of {len(header)}"))
        else:
            rows.append(_Row(number, dict(zip(header, cells, strict=True))))
    return header, rows, faults


def _first(header: Sequence[str], names: Sequence[str]) -> str | None:
    lowered = {column.lower(): column for column in reversed(header)}
    return next((lowered[name] for name in names if name in lowered), None)


def _columns(header: Sequence[str], rows: Sequence[_Row], classes: Sequence[str] | None, where: str) -> _Columns:
    file = _first(header, FILE_COLUMNS)
    if file is None or len(set(header)) != len(header):
        raise DataError(
            where,
            f"the columns {list(header)}",
            f"different names, one of them for the files ({', '.join(FILE_COLUMNS)})",
            "name the columns",
        )
    split, group = _first(header, SPLIT_COLUMNS), _first(header, GROUP_COLUMNS)
    label, many = _first(header, LABEL_COLUMNS), _first(header, MANY_LABELS_COLUMNS)
    if classes is not None and set(classes) <= set(header):
        return _Columns(file, split, group, None, None, tuple(classes))
    if label or many:
        return _Columns(file, split, group, label, None if label else many, ())
    rest = [column for column in header if column not in (file, split, group) and column.lower() not in NOT_A_CLASS]
    numeric = tuple(column for column in rest if _is_class(column, rows))
    if classes is not None:
        unknown = next(name for name in classes if name not in header)
        raise UnknownNameError(f"{where}, classes", unknown, numeric or rest)
    return _Columns(file, split, group, None, None, numeric, tuple(column for column in rest if column not in numeric))


def _is_class(column: str, rows: Sequence[_Row]) -> bool:
    """Whether at least half of the cells that say something are numbers."""
    filled = [row.cells[column] for row in rows if not says_nothing(row.cells[column])]
    return bool(filled) and 2 * sum(map(_is_number, filled)) >= len(filled)


def _about_columns(columns: _Columns) -> list[str]:
    """Which columns were not taken for classes, where other columns were."""
    named = ", ".join(repr(column) for column in columns.passed_over)
    return [f"columns without numbers, taken for no class: {named}"] if columns.classes and named else []


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _of_split(rows: Sequence[_Row], columns: _Columns, split: str | None, where: str) -> list[_Row]:
    if split is None:
        return list(rows)
    there = sorted({row.cells[columns.split] for row in rows}) if columns.split else []
    wanted = SPLIT_NAMES.get(split.lower(), split)
    chosen = [
        row for row in rows if columns.split and SPLIT_NAMES.get(row.cells[columns.split].lower(), row.cells[columns.split]) == wanted
    ]
    if not chosen:
        raise UnknownNameError(f"split of {where}", split, there or ["(the table has no column of splits: leave it out)"])
    return chosen


def _place(tree: Tree, name: str, images: Tree | None, rows: Sequence[_Row], columns: _Columns) -> tuple[Tree, str]:
    beside = name.rsplit("/", 1)[0] + "/" if "/" in name else ""
    options = [(images, "")] if images is not None else [(tree, beside), (tree, f"{beside}images/")]
    sample = [row.cells[columns.file].strip() for row in rows[:50]]
    return max(options, key=lambda option: sum(option[0].has(option[1] + file) for file in sample))
