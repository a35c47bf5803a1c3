"""The scanner for personal data: speed on one core, what it finds, what it takes for personal data that is none.

    python benchmarks/personal_data.py --json

All text is generated from the seed; every number in it is invented. Reported are

* ``mb_per_s``: on paragraphs with harmless numbers and some personal data (``mixed``), and on rows of nothing but long
  numbers (``numbers``);
* ``recall``: share of samples found as what they are, ``with_words`` (a word such as "BSN" nearby) and ``alone``;
* ``false_positives``: kinds counted in paragraphs without personal data, and per 1,000 random numbers of 9, 10, 11 and
  13 digits: what a check digit lets through by chance.

Exit code 1 if mixed text is scanned slower than --floor (default 5) MB/s.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "data")]

import personal_samples as samples  # noqa: E402

from aifactory_train.core.output import print_json  # noqa: E402
from aifactory_train.data.personal import kinds, scan  # noqa: E402


def speed(rows: list[str], repeats: int = 3) -> float:
    """MB/s of processor time, the best of ``repeats``."""
    best = 0.0
    for _ in range(repeats):
        started = time.process_time()
        report = scan(rows)
        best = max(best, report.bytes / 1e6 / (time.process_time() - started))
    return best


def mixed(r: random.Random, rows: int) -> list[str]:
    """Paragraphs, every fifth with one piece of personal data."""
    out = []
    for i in range(rows):
        text = samples.prose(r)
        out.append(f"{text} {samples.sample(r.choice(samples.KINDS), r)}" if i % 5 == 0 else text)
    return out


def recall(r: random.Random, each: int, *, words: bool) -> dict[str, float]:
    found = {}
    for kind in samples.KINDS:
        entry = samples.BY_KIND.get(kind)
        before = f"{entry.context[0]}: " if words and entry is not None else ""
        texts = [
            f"{samples.prose(r, 12, 0)} {before}{samples.sample(kind, r)}, {samples.prose(r, 6, 0)}"
            for _ in range(each)
        ]
        # one row at a time: nothing is known from the rest of a column
        found[kind] = round(sum(scan([t]).counts.get(kind, 0) > 0 for t in texts) / each, 3)
    return found


def by_chance(r: random.Random, each: int) -> dict[str, dict[str, float]]:
    """Per number of digits: how many of 1,000 random numbers are counted, and how many are merely possible."""
    out = {}
    for digits in (9, 10, 11, 13):
        counted = possible = 0
        for _ in range(each):
            report = scan(
                [f"{samples.prose(r, 6, 0)} {r.choice('123456789')}{''.join(r.choices('0123456789', k=digits - 1))} x"]
            )
            counted += bool(report.counts)
            possible += bool(report.possible) and not report.counts
        out[str(digits)] = {"counted": round(1000 * counted / each, 1), "possible": round(1000 * possible / each, 1)}
    return out


def measure(seed: int, rows: int, each: int) -> dict[str, Any]:
    r = random.Random(seed)
    text = mixed(r, rows)
    clean = [samples.prose(r) for _ in range(rows)]
    dense = [" ".join(str(r.randrange(10**8, 10**13)) for _ in range(20)) for _ in range(max(20, rows // 40))]
    taken = scan(clean)
    return {
        "kinds": len(kinds()),
        "mb_per_s": {"mixed": round(speed(text), 1), "clean": round(speed(clean), 1), "numbers": round(speed(dense, 1), 2)},  # noqa: E501
        "bytes": {"mixed": scan(text).bytes, "clean": taken.bytes},
        "recall": {"with_words": recall(r, each, words=True), "alone": recall(r, each, words=False)},
        "false_positives": {
            "clean_paragraphs": rows,
            "counted": taken.counts,
            "possible": taken.possible,
            "random_numbers_per_1000": by_chance(r, 5 * each),
        },
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=int, default=8000, help="paragraphs of mixed text (about 400 bytes each)")
    parser.add_argument("--each", type=int, default=200, help="samples per kind")
    parser.add_argument("--floor", type=float, default=5.0, metavar="MB/S")
    parser.add_argument("--json", action="store_true", help="one line of JSON on standard output")
    args = parser.parse_args(argv)
    found = measure(args.seed, args.rows, args.each)
    if args.json:
        print_json(found)
    else:
        print(f"{found['kinds']} kinds; MB/s on one core: {found['mb_per_s']}")
        print(f"{'kind':<18}{'with words':>12}{'alone':>8}")
        for kind, share in found["recall"]["with_words"].items():
            print(f"{kind:<18}{share:>12.1%}{found['recall']['alone'][kind]:>8.1%}")
        print(
            f"in {args.rows} paragraphs without personal data: "
            f"{found['false_positives']['counted'] or 'nothing counted'}"
        )
        print(f"random numbers, per 1,000: {found['false_positives']['random_numbers_per_1000']}")
    return 0 if found["mb_per_s"]["mixed"] >= args.floor else 1


if __name__ == "__main__":
    sys.exit(main())
