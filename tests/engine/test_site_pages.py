"""The pages as a site: no dangling link, every command and key has its place, nothing is loaded from elsewhere."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import helpers
import pytest

from aifactory_train import cli
from aifactory_train.config.schema import Recipe

spec = importlib.util.spec_from_file_location("site_hooks", helpers.ROOT / "docs" / "site_hooks.py")
assert spec and spec.loader
site_hooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site_hooks)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pages") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=helpers.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_command_and_every_key_has_its_place(site: Path) -> None:
    commands = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in commands for name in cli.COMMANDS)
    keys = (site / "reference" / "recipe-keys.html").read_text(encoding="utf-8")
    for name, block in {"recipe": Recipe.model_json_schema(), **Recipe.model_json_schema()["$defs"]}.items():
        assert "properties" not in block or f'id="{name.lower()}"' in keys, name
        assert all(f"<code>{key}</code>" in keys for key in block.get("properties", {}))


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        for tag in re.findall(r"<(?:script|img|iframe|link)\b[^>]*>", page.read_text(encoding="utf-8")):
            if 'rel="canonical"' not in tag:
                assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", tag), f"{page.name}: {tag}"


def test_a_link_to_nowhere_stays_one_for_the_build_to_refuse() -> None:
    pages = {"data.md", "reference/commands.md", "index.md"}
    relink = site_hooks.relink
    assert relink("[d](docs/data.md#rows)", "README.md", "index.md", pages) == "[d](data.md#rows)"
    assert relink("[r](../README.md)", "docs/data.md", "data.md", pages) == "[r](index.md)"
    assert relink("[i](data.md)", "docs/reference/x.md", "reference/x.md", {"reference/data.md"}) == "[i](data.md)"
    assert relink("[x](nowhere.md)", "docs/data.md", "data.md", pages) == "[x](nowhere.md)"
    assert relink("[Makefile](../Makefile)", "docs/data.md", "data.md", pages) == "Makefile"
