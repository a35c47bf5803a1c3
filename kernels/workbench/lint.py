"""Lint on Triton IR: a 32-bit product of a stride argument and a program id or loop variable that reaches an address.

Such an offset wraps beyond 2^31 elements. The lint is a heuristic on the IR text: it does not follow functions that
were not inlined, nor offsets that a loop accumulates.
"""

from __future__ import annotations

import re
import sys


def lint(ttir: str) -> list[tuple[str, list[str]]]:
    """[(value, operands)] of every offending multiplication."""
    integers: set[str] = set()
    definitions: dict[str, tuple[str, list[str], str]] = {}
    induction: set[str] = set()
    offsets: set[str] = set()
    signature = re.search(r"tt\.func public @\w+\((.*?)\) attributes", ttir, re.S)
    if signature:
        integers = set(re.findall(r"(%[\w.]+): i32", signature.group(1)))
    for raw in ttir.splitlines():
        line = raw.split(" loc(")[0]
        loop = re.search(r"scf\.for (?:unsigned )?(%[\w.]+)", line)
        if loop:
            induction.add(loop.group(1))
        found = re.match(r'\s*(%[\w.#:]+)\s*=\s*"?([\w.]+)"?\s*(.*)', line)
        if not found or loop:
            continue
        name, op, rest = found.group(1).split(":")[0], found.group(2), found.group(3)
        operands = re.findall(r"%[\w.]+", rest.split(" : ")[0])
        definitions[name] = (op, operands, rest.split(" : ")[-1])
        if op == "tt.addptr" and len(operands) == 2:
            offsets.add(operands[1])

    known: dict[str, frozenset[str]] = {}

    def roots(value: str) -> frozenset[str]:
        """What a value is computed from: an integer argument, something that moves from program to program, both or
        neither.
        """
        if value in known:
            return known[value]
        known[value] = frozenset()  # a cycle through a loop adds nothing
        op, operands, _ = definitions.get(value, ("", [], ""))
        if value in integers:
            result = frozenset(["argument"])
        elif value in induction or op == "tt.get_program_id":
            result = frozenset(["moving"])
        elif op in ("", "arith.constant", "tt.load"):
            result = frozenset()
        else:
            result = frozenset().union(*(roots(o) for o in operands))
        known[value] = result
        return result

    reach: set[str] = set()
    todo = list(offsets)
    while todo:
        value = todo.pop()
        if value not in reach:
            reach.add(value)
            todo += definitions.get(value, ("", [], ""))[1]
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, 10000))
    try:
        out = []
        for value, (op, operands, kind) in definitions.items():
            if op == "arith.muli" and "i32" in kind and value in reach:
                sides = [roots(o) for o in operands]
                stride = any("argument" in s and "moving" not in s for s in sides)
                if stride and any("moving" in s for s in sides):
                    out.append((value, operands))
        return out
    finally:
        sys.setrecursionlimit(limit)
