"""The pages say what is so: commands parse, options exist, keys are keys of the configuration, links lead somewhere."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

import helpers
import pytest
from pydantic import BaseModel

from aifactory_train import cli
from aifactory_train.config.schema import Recipe

PAGES = [
    *sorted(helpers.ROOT.glob("*.md")),
    *sorted((helpers.ROOT / "docs").glob("*.md")),
    helpers.ROOT / "benchmarks" / "README.md",
]
#: Words after a dot that end names of files, not of keys.
_ENDINGS = {"md", "py", "json", "jsonl", "yaml", "yml", "html", "csv", "txt", "pem", "aft"}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(helpers.ROOT)))


def commands(text: str) -> list[str]:
    """Every ``aifactory ...`` in fenced blocks (a line each) and in inline code."""
    found = []
    for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            start = re.match(r"\s*(?:\$ )?(?:\.venv/bin/)?(aifactory .*)", line)
            if start:
                found.append(re.split(r"  +|\s+#", start[1])[0])
    prose = re.sub(r"```\w*\n.*?```", "", text, flags=re.DOTALL)
    found += [" ".join(inline.split()) for inline in re.findall(r"`(aifactory [^`]+)`", prose)]
    return found


def parser_of(words: list[str]) -> argparse.ArgumentParser | None:
    """The parser of a command and, where it has actions of its own, of the action."""
    if tuple(words[1:3]) in cli.TWO_WORDS:
        return None
    top = next(a for a in cli.build_parser(words[1])._actions if isinstance(a, argparse._SubParsersAction))
    parser = top.choices[words[1]]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and len(words) > 2 and words[2] in action.choices:
            return action.choices[words[2]]
    return parser


@pages
def test_commands_and_their_options_exist(page: Path) -> None:
    for text in commands(page.read_text(encoding="utf-8")):
        words = text.split()
        if words[1] in ("--help", "--version"):
            continue
        assert words[1] in cli.COMMANDS, text
        parser = parser_of(words)
        known = {option for action in parser._actions for option in action.option_strings} if parser else set()
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text):
            assert parser is None or option in known, f"{page.name}: {text}: {option}"


def test_commands_of_the_readme_parse_as_they_stand() -> None:
    text = (helpers.ROOT / "README.md").read_text(encoding="utf-8")
    found = commands(text)
    assert len(found) > 20
    for line in found:
        argv = shlex.split(line)[1:]
        try:
            assert cli.two_words(argv) or cli.build_parser(argv[0]).parse_args(argv)
        except SystemExit:
            pytest.fail(f"README.md: {line}")


@pages
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pages
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(
        r"`((?:aifactory_train|sites|launchers|kernels|tests|benchmarks|docs)/[\w./-]+\.\w+)`", text
    ):
        if name.split("/")[-1].split(".")[0].isupper():  # NAME.yaml stands for any
            continue
        assert (helpers.ROOT / name).exists(), f"{page.name}: {name}"


def _block_of(annotation: Any) -> type[BaseModel] | None:
    """The block (pydantic model) inside an annotation such as ``list[DataSource] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_block_of, getattr(annotation, "__args__", ()))), None)


@pages
def test_keys_that_are_named_exist(page: Path) -> None:
    blocks = "|".join(name for name, field in Recipe.model_fields.items() if _block_of(field.annotation))
    for key in re.findall(rf"(?<![\w./-])((?:{blocks})(?:\.[a-zA-Z_0-9]+)+)", page.read_text(encoding="utf-8")):
        parts = [p for p in key.split(".") if not p.isdigit() and p != "N"]
        if parts[-1] in _ENDINGS:
            continue
        block: type[BaseModel] | None = Recipe
        for part in parts:
            assert block is not None and part in block.model_fields, f"{page.name}: {key}"
            block = _block_of(block.model_fields[part].annotation)
            if block is None:
                break
