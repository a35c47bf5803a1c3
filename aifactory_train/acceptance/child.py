"""One check in its own process: ``python -m aifactory_train.acceptance.child NAME RESULT.json SETTINGS.json``.

Whatever the check does to its process (a crash, a hang, exhausted memory), the parent reads what was written so far.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

from aifactory_train.acceptance.report import NotHere, Report, in_words


def main(argv: list[str]) -> int:
    """Run the check and write its result; 0 also where it fails, because the result says so."""
    name, result, settings = argv
    given = json.loads(Path(settings).read_text(encoding="utf-8"))
    stacks_after_s, where = given.pop("stacks_after_s"), given.pop("run")
    # Where it hangs, the log shows at what.
    faulthandler.enable()
    faulthandler.dump_traceback_later(stacks_after_s, exit=False)
    report = Report(name, work=Path(given.pop("work")), file=Path(result), **given)
    report.work.mkdir(parents=True, exist_ok=True)
    report.keep()
    module, _, function = where.partition(":")
    try:
        # One with a dot is of another package: a check of a site's own.
        found = importlib.import_module(module if "." in module else f"aifactory_train.acceptance.{module}")
        getattr(found, function)(report)
    except NotHere as reason:
        report.skipped = str(reason)
    except Exception as error:
        traceback.print_exc()
        report.problems.append(f"{report.stage}: {in_words(error)}")
    report.done = True
    report.keep()
    sys.stdout.flush()
    sys.stderr.flush()
    # A process group that is broken, or a driver that hangs while it is unloaded, must not keep a check that is done.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
