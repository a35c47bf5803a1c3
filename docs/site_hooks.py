"""What mkdocs adds to the pages of docs/: every command and every key, from the code, and pages that stand outside.

mkdocs calls ``on_files`` before it reads pages and ``on_page_markdown`` for each of them. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: Pages outside docs/, and what they are called inside.
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "measurements.md",
}
#: Widths of what argparse prints, so that pages do not depend on the terminal of who builds them.
WIDTH = "100"


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to mkdocs' list."""
    from mkdocs.structure.files import File

    generated = {inside: (ROOT / outside).read_text(encoding="utf-8") for outside, inside in OUTSIDE.items()}
    generated["reference/commands.md"] = commands_page()
    generated["reference/recipe-keys.md"] = keys_page()
    for name, text in generated.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links between pages lead to where these are in the site; those to other files become their names."""
    source = next((o for o, inside in OUTSIDE.items() if inside == page.file.src_uri), f"docs/{page.file.src_uri}")
    return relink(markdown, source, page.file.src_uri, {f.src_uri for f in files})


def relink(markdown: str, source: str, inside: str, pages: set[str]) -> str:
    """Links of ``source`` (a path in the repository) as they have to be in ``inside`` (a path in the site)."""

    def target_of(match: re.Match[str]) -> str:
        words, target, anchor = match[1], match[2], match[3] or ""
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = os.path.normpath(os.path.join(os.path.dirname(source), target))
        page = OUTSIDE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else "")
        if page in pages:
            return f"[{words}]({os.path.relpath(page, os.path.dirname(inside) or '.')}{anchor})"
        # A file or folder that is no page: named, since the site stands alone.
        if (ROOT / path).exists():
            return words if path in words or words.startswith("`") else f"{words} (`{path}`)"
        return match[0]  # mkdocs refuses it

    return re.sub(r"\[([^\]\n]+)\]\(([^)#\s]+)(#[^)\s]*)?\)", target_of, markdown)


# ---- commands


def commands_page() -> str:
    """Every command with what ``--help`` prints, actions of a command below it."""
    os.environ["COLUMNS"] = WIDTH
    from aifactory_train import cli

    out = [
        "# Commands",
        "",
        "What `aifactory COMMAND --help` prints. `--json` makes one line of JSON of every answer.",
        "",
    ]
    for name in cli.COMMANDS:
        top = next(a for a in cli.build_parser(name)._actions if isinstance(a, argparse._SubParsersAction))
        out += [f"## {name}", ""]
        summary = next((c.help for c in top._choices_actions if c.dest == name), None)
        if summary:
            out += [f"{summary[0].upper()}{summary[1:]}.".replace("..", "."), ""]
        out += ["```text", top.choices[name].format_help().strip(), "```", ""]
        for action in top.choices[name]._actions:
            if isinstance(action, argparse._SubParsersAction):
                for word, parser in action.choices.items():
                    out += [f"### {name} {word}", "", "```text", parser.format_help().strip(), "```", ""]
    return "\n".join(out)


# ---- keys of a recipe


def keys_page() -> str:
    """Every key of a recipe with type, default and meaning, a section a block, from the schema that editors read."""
    from aifactory_train.config.schema import Recipe

    schema = Recipe.model_json_schema()
    blocks: dict[str, Any] = schema.get("$defs", {})
    out = ["# Keys of a recipe", "", "Written from the schema that `aifactory config schema` prints for editors.", ""]
    out += _section("recipe", schema, blocks)
    seen: set[str] = set()
    queue = _blocks_of(schema)
    while queue:
        name = queue.pop(0)
        if name not in seen:
            seen.add(name)
            out += _section(name, blocks[name], blocks)
            queue += _blocks_of(blocks[name])
    return "\n".join(out)


def _blocks_of(schema: dict[str, Any]) -> list[str]:
    return [ref.rpartition("/")[2] for ref in re.findall(r"'\$ref': '([^']+)'", repr(schema.get("properties", {})))]


def _section(name: str, schema: dict[str, Any], blocks: dict[str, Any]) -> list[str]:
    if "properties" not in schema:
        return []
    out = [f"## {name}", ""]
    if schema.get("description"):
        out += [" ".join(schema["description"].split()), ""]
    out += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, value in schema["properties"].items():
        default = f"`{value['default']!r}`" if "default" in value and not isinstance(value["default"], dict) else ""
        meaning = " ".join(value.get("description", "").split())
        cells = (f"`{key}`", _type(value, blocks), default, meaning)
        out.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*out, ""]


def _type(value: dict[str, Any], blocks: dict[str, Any]) -> str:
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})" if "properties" in blocks.get(name, {}) else _type(blocks[name], blocks)
    if "enum" in value:
        return ", ".join(f"`{choice}`" for choice in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    for union in ("anyOf", "oneOf", "allOf"):
        if union in value:
            return " or ".join(dict.fromkeys(_type(each, blocks) for each in value[union]))
    if value.get("type") == "array":
        return f"list of {_type(value.get('items', {}), blocks)}"
    if value.get("type") == "object":
        inside = value.get("additionalProperties")
        return f"mapping to {_type(inside, blocks)}" if isinstance(inside, dict) else "mapping"
    return {"null": "none", "string": "text", "boolean": "true or false"}.get(
        value.get("type", ""), value.get("type", "any")
    )
