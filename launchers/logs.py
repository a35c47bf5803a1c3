"""Where the logs of a run lie."""

from __future__ import annotations

import re
from pathlib import Path

from aifactory_train.core.errors import UserError
from aifactory_train.launchers.programs import attempt as book


def log_files(folder: Path, attempt: int | None, ranks: list[int] | None) -> list[Path]:
    """Logs of an attempt (the newest unless told): those of the ranks, else the launcher's, else the batch shell's."""
    numbers = book.attempt_numbers(str(folder))
    if attempt is not None and attempt not in numbers:
        raise UserError(
            f"there is no attempt {attempt}",
            where=str(folder),
            fix=f"attempts: {', '.join(map(str, numbers)) or 'none yet'}",
        )
    if numbers:
        where = Path(book.attempt_dir(str(folder), attempt if attempt is not None else numbers[-1]))
        found = {
            int(m.group(1)): p for p in where.glob("rank-*.log") if (m := re.fullmatch(r"rank-(\d+)\.log", p.name))
        }
        if ranks is not None:
            gone = [r for r in ranks if r not in found]
            if gone and found:
                raise UserError(f"rank {gone[0]} has no log", where=str(where), fix=f"ranks: 0 to {max(found)}")
            return [found[r] for r in ranks if r in found]
        if found:
            return [found[min(found)]]
        other = [p for p in (where / "launcher.log", where / "preflight.log") if p.is_file() and p.stat().st_size]
        if other:
            return other
    return sorted((folder / "logs").glob("*.out"), key=lambda p: p.stat().st_mtime)[-1:]


def last_line(base: Path, job: str) -> str:
    """The last line of a job's own log."""
    for path in sorted((base / "logs").glob(f"job*{re.sub(r'[^0-9_]', '', job) or '*'}*.out")):
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
        if lines:
            return lines[-1][:300]
    return "no log was written"
