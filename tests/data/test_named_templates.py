"""A tokenizer with several chat templates: the one that ``apply_chat_template`` would choose renders each row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_families import PLAIN, TEMPLATES, TOOL_CHAT, TOOLS, byte_tokenizer

from aifactory_train.config.schema import Recipe
from aifactory_train.data.cells import RowError
from aifactory_train.data.encoder import Encoder
from aifactory_train.data.masks import Encoded
from aifactory_train.data.tokenizer import encoder_spec, prompts_of, tokenizer_info

RECIPE = Recipe.model_validate({"model": {"base": "x/y"}, "data": {"train": "r.jsonl"}})
DEFAULT = (TEMPLATES / "chatml.jinja").read_text(encoding="utf-8")
WITH_TOOLS = (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
RAG = "{{ raise_exception('documents are needed') }}"


def named(*names: str) -> Any:
    made = byte_tokenizer("qwen3")
    made.chat_template = {n: t for n, t in (("default", DEFAULT), ("tool_use", WITH_TOOLS), ("rag", RAG)) if n in names}
    return made


def encoded(tokenizer: Any, messages: list, tools: list | None) -> Encoded:
    row = {"messages": messages, **({"tools": tools} if tools else {})}
    (found,) = Encoder(encoder_spec(tokenizer, RECIPE)).encode([row])
    if isinstance(found, RowError):
        raise found
    return found


@pytest.mark.parametrize("names", [("default", "tool_use", "rag"), ("default", "rag"), ("default",)])
@pytest.mark.parametrize(
    "messages, tools", [(PLAIN, None), (TOOL_CHAT, TOOLS), (PLAIN, TOOLS)], ids=["plain", "calls", "tools"]
)
def test_the_template_is_the_one_that_transformers_chooses(names, messages, tools):
    tokenizer = named(*names)
    found = encoded(tokenizer, messages, tools)
    want = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    assert tokenizer.decode(found.documents[0].tokens) == want
    prompts = prompts_of(tokenizer)
    assert prompts is not None
    asked = tokenizer.apply_chat_template(messages[:1], tools=tools, tokenize=False, add_generation_prompt=True)
    assert prompts.ask(messages[:1], tools)[0] == asked


def test_a_row_for_which_there_is_no_template_is_refused():
    tokenizer = named("tool_use", "rag")
    assert encoded(tokenizer, TOOL_CHAT, TOOLS).documents
    with pytest.raises(RowError, match="for rows with tools alone") as caught:
        encoded(tokenizer, PLAIN, None)
    assert "model.chat_template" in str(caught.value.fix)


def test_both_templates_decide_what_is_in_a_cache():
    one, two, plain = named("default", "tool_use"), named("default", "tool_use"), named("default")
    two.chat_template = {**two.chat_template, "tool_use": WITH_TOOLS + " "}
    specs = [encoder_spec(t, RECIPE) for t in (one, two, plain)]
    assert len({s.digest() for s in specs}) == 3
    assert len({tokenizer_info(t, s)["template_sha256"] for t, s in zip((one, two, plain), specs, strict=True)}) == 3


def test_templates_that_a_saved_tokenizer_lists(tmp_path: Path):
    from transformers import AutoTokenizer

    named("default", "tool_use").save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(str(tmp_path))
    assert encoder_spec(again, RECIPE).tool_template == WITH_TOOLS
    again.chat_template = [{"name": name, "template": text} for name, text in again.chat_template.items()]
    assert encoder_spec(again, RECIPE).template == DEFAULT
