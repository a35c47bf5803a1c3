"""Which rows are held out, and what may not stand on both sides: groups, moments, labels that nobody named.

A row's *group* is the value of ``data.split_by.group``, else its own ``group``, else its question (or text). With
``data.split_by.time`` rows of one moment are a group, and the newest groups are held out, as a model meets them in use.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from aifactory_train.core.errors import UserError, did_you_mean
from aifactory_train.data.cells import RowError
from aifactory_train.data.sampler import splitmix64

if TYPE_CHECKING:
    from aifactory_train.config.data_blocks import DataConfig
    from aifactory_train.data.store import Store

#: Added to the number of a moment, so that dates and plain numbers are told apart and both keep their order as uint64.
_DATE, _NUMBER = 1 << 62, 1 << 60
_FIRST = datetime.datetime(1, 1, 1, tzinfo=datetime.timezone.utc)


@dataclass(frozen=True)
class RowRules:
    """What each row must have besides its form; checked where rows are read, so that messages name file and line."""

    group: str | None = None
    time: str | None = None
    labels: frozenset[str] | None = None
    separator: str | None = None  # between several labels of one answer

    @classmethod
    def of(cls, data: DataConfig, separator: str | None = None) -> RowRules | None:
        """The rules of ``data``; ``separator`` is ``eval.label_separator``. None where every row is taken."""
        by = data.split_by
        divided = separator is not None and has_labels(data)
        if by is None and data.labels is None and not divided:
            return None
        labels = frozenset(data.labels) if data.labels is not None else None
        return cls(by.group if by else None, by.time if by else None, labels, separator)

    def apply(self, raw: dict[str, Any], row: dict[str, Any]) -> int | None:
        """Check one row; sets ``row["group"]``, or returns the number of its moment. Raises :class:`RowError`."""
        if "labels" in row:
            self._divide(row)
        if self.labels is not None:
            _check_label(row, self.labels, self.separator)
        if self.group is not None:
            value = _value(raw, self.group, "data.split_by.group")
            if isinstance(value, (dict, list, bool)):
                raise RowError(f"'{self.group}' (data.split_by.group) is neither text nor a number")
            row["group"] = str(value)
        return moment(_value(raw, self.time, "data.split_by.time"), self.time) if self.time is not None else None

    def _divide(self, row: dict[str, Any]) -> None:
        """Several labels that stand in one text; a list of them is taken as it is."""
        given = row["labels"]
        if self.separator is not None and len(given) == 1 and given[0] not in (self.labels or ()):
            row["labels"] = list(dict.fromkeys(part for p in given[0].split(self.separator) if (part := p.strip())))


def has_labels(data: DataConfig) -> bool:
    """Whether rows have any number of labels each (a head of kind multi_label)."""
    return any(source.format == "labels" for source in [*data.train, *(data.eval or [])])


def _value(raw: dict[str, Any], column: str, key: str) -> Any:
    if column not in raw:
        found = ", ".join(map(str, list(raw)[:12]))
        raise RowError(
            f"there is no column '{column}'{did_you_mean(column, map(str, raw))} (found: {found})",
            f"{key} names a column that every row has",
        )
    value = raw[column]
    if value is None or (isinstance(value, str) and not value.strip()):
        raise RowError(f"the column '{column}' is empty", f"{key} needs a value in every row")
    return value


def _check_label(row: dict[str, Any], labels: frozenset[str], separator: str | None) -> None:
    if "messages" not in row and "labels" not in row:
        raise RowError("data.labels is given, but rows of plain text have no answer", "take data.labels out")
    answers = [row["labels"]] if "labels" in row else []
    for message in row.get("messages", ()):
        if message["role"] != "assistant" or message.get("weight", 1) == 0:
            continue
        answer = message["content"].strip()
        answers.append([part.strip() for part in answer.split(separator)] if separator else [answer])
    for given in answers:
        for label in (label for label in given if label not in labels):
            shown = sorted(labels)
            more = f" and {len(shown) - 12} more" if len(shown) > 12 else ""
            raise RowError(
                f"the label '{label[:60]}' is not in data.labels{did_you_mean(label, shown)}",
                f"labels are {', '.join(shown[:12])}{more}; correct the row, or name your own with --set "
                f"data.labels=[A,B]",
            )


def moment(value: Any, column: str) -> int:
    """A date, time or number as an integer that keeps its order. Raises :class:`RowError` for what cannot be
    ordered.
    """
    if isinstance(value, datetime.datetime):
        return _date(value)
    if isinstance(value, datetime.date):
        return _date(datetime.datetime(value.year, value.month, value.day))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return _number(float(value), column)
        except OverflowError:  # an integer of hundreds of digits
            raise RowError(f"{str(value)[:20]}... in column '{column}' cannot be ordered") from None
    text = str(value).strip()
    if re.fullmatch(r"-?\d+(\.\d+)?", text):
        return _number(float(text), column)
    text = re.sub(r"[zZ]$", "+00:00", text)
    if re.fullmatch(r"\d{4}-\d{2}", text):
        text += "-01"
    german = re.fullmatch(r"(\d{1,2})\.(\d{1,2})\.(\d{4})", text)  # DD.MM.YYYY is written nowhere in the order MM.DD
    if german:
        text = f"{german[3]}-{int(german[2]):02d}-{int(german[1]):02d}"
    try:
        return _date(datetime.datetime.fromisoformat(text))
    except ValueError:
        raise RowError(
            f"'{str(value)[:40]}' in column '{column}' is no date",
            "write dates as YYYY-MM-DD (or with a time, or numbers)",
        ) from None


def _date(value: datetime.datetime) -> int:
    aware = value if value.tzinfo is not None else value.replace(tzinfo=datetime.timezone.utc)
    return _DATE + int((aware - _FIRST) / datetime.timedelta(microseconds=1))


def _number(value: float, column: str) -> int:
    if not math.isfinite(value) or abs(value) >= 1e14:
        raise RowError(f"{value} in column '{column}' cannot be ordered")
    return _NUMBER + round(value * 1000)


def shown(key: int) -> str:
    """The moment behind a number of :func:`moment`."""
    if key >= _DATE:
        return (_FIRST + datetime.timedelta(microseconds=int(key) - _DATE)).isoformat().removesuffix("+00:00")
    return f"{(int(key) - _NUMBER) / 1000:g}"


def choose(
    keys: np.ndarray, sizes: np.ndarray, *, fraction: float, most: int, seed: int, by_time: bool
) -> tuple[np.ndarray, dict[str, Any]]:
    """Which groups are held out: bool [groups].

    Args:
        keys: uint64 [groups], what the groups are known by (moments with ``by_time``, else digests).
        sizes: int64 [groups], rows of each.
        fraction: share of the groups (by time: of the rows) that is wanted.
        most: rows that are enough.

    By digest, groups are tried in an order that depends on ``seed`` alone, and one that would exceed ``most`` is passed
    over (when all would, the smallest is taken). By time the newest groups are taken, at least one.
    """
    chosen = np.zeros(len(keys), dtype=bool)
    if by_time:
        if len(keys) and (int(keys.max()) >= _DATE) != (int(keys.min()) >= _DATE):
            raise UserError(
                "some rows have a date and others a number", where="data.split_by.time", fix="write all of them alike"
            )
        order = np.argsort(keys, kind="stable")[::-1]
        wanted = min(most, max(1, round(fraction * int(sizes.sum()))))
        reach = np.cumsum(sizes[order[:-1]])  # at least the oldest moment is left for training
        count = max(1, int(np.searchsorted(reach, wanted, side="right")))
        chosen[order[:count]] = True
        return chosen, {
            "by": "time",
            "from": shown(int(keys[order[count - 1]])),
            "before": shown(int(keys[order[count]])),
        }
    mixed = splitmix64(keys ^ splitmix64(np.asarray([seed], dtype=np.uint64))[0])
    order = np.argsort(mixed, kind="stable")
    wanted = max(1, min(round(fraction * len(keys)), len(keys) - 1))
    candidates = order[:wanted]
    fit = np.cumsum(sizes[candidates]) <= most
    if not fit.any():
        # The first group alone is more than is scored: smaller ones instead, so that no group is divided or lost.
        order = (
            order[sizes[order] <= most] if (sizes <= most).any() else order[np.argsort(sizes[order], kind="stable")][:1]
        )
        candidates = order[:wanted]
        fit = np.cumsum(sizes[candidates]) <= most
        fit[0] = True
    chosen[candidates[fit]] = True
    return chosen, {"by": "group"}


def refuse_leaks(store: Store, train: np.ndarray, held: np.ndarray, key: str) -> None:
    """Refuse a group (named by a column, not merely the same question) that stands in training and held-out rows alike.

    ``train`` and ``held`` are row numbers; ``key`` is what the message points to when held-out rows were given by the
    user.
    """
    groups = np.asarray(store.column("rowgroup"))
    for group in np.intersect1d(groups[train], groups[held]):
        first = int(train[np.flatnonzero(groups[train] == group)[0]])
        name = json.loads(store.row_line(first)).get("group")
        if name is None:
            continue  # the same question: data.overlap looks at those
        other = int(held[np.flatnonzero(groups[held] == group)[0]])
        raise UserError(
            f"the group '{name}' is in the training rows and in the held-out rows ({store.place(other)})",
            where=store.place(first),
            fix=f"keep its rows on one side, or let the program split: take {key} out",
        )
