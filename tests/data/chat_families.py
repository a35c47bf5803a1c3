"""Chat-template families with hand-derived expectations, and a byte-level tokenizer built in code.

An expectation is the rendered conversation with marks put in by hand: ``«...»`` around what carries loss, ``‹...›``
around the text that bits per byte scores. The templates beside this file were written from the published formats.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent / "templates"

USER, ANSWER, AGAIN, LAST = "Hæ, who?", "Ég er líkan. 👋", "And now?", "  Bless.\n"


def chat(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


PLAIN = chat(("user", USER), ("assistant", ANSWER), ("user", AGAIN), ("assistant", LAST))
WITH_SYSTEM = chat(("system", "Be kind."), *[(m["role"], m["content"]) for m in PLAIN])
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
TOOL_CHAT = [
    {"role": "user", "content": "1+2?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}],
    },
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "Three."},
]
REASONING = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "<think>\nfirst thought\n</think>\n\nUno."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "<think>\nsecond thought\n</think>\n\nDos."},
]


@dataclass
class Case:
    family: str
    name: str
    messages: list[dict[str, Any]]
    expected: str
    tools: list[Any] | None = None


@dataclass
class Family:
    """A template, the special tokens of its family, and which one ends a turn."""

    name: str
    template: str
    special: list[str]
    stop: str
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    added: list[str] = field(default_factory=list)


FAMILIES = {
    f.name: f
    for f in [
        Family(
            "chatml",
            "chatml.jinja",
            ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
            "<|im_end|>",
            eos="<|im_end|>",
            pad="<|endoftext|>",
        ),
        Family(
            "llama3",
            "llama3.jinja",
            [
                "<|begin_of_text|>",
                "<|start_header_id|>",
                "<|end_header_id|>",
                "<|eot_id|>",
                "<|eom_id|>",
                "<|end_of_text|>",
            ],
            "<|eot_id|>",
            bos="<|begin_of_text|>",
            eos="<|eot_id|>",
        ),
        Family("mistral", "mistral.jinja", ["<s>", "</s>", "[INST]", "[/INST]"], "</s>", bos="<s>", eos="</s>"),
        Family(
            "gemma",
            "gemma.jinja",
            ["<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"],
            "<end_of_turn>",
            bos="<bos>",
            eos="<eos>",
            pad="<pad>",
        ),
        Family("zephyr", "zephyr.jinja", ["<s>", "</s>", "<unk>"], "</s>", bos="<s>", eos="</s>", pad="</s>"),
        Family(
            "phi3",
            "phi3.jinja",
            ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"],
            "<|end|>",
            eos="<|endoftext|>",
            pad="<|endoftext|>",
        ),
        Family(
            "qwen3",
            "qwen3.jinja",
            ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
            "<|im_end|>",
            eos="<|im_end|>",
            pad="<|endoftext|>",
            added=["<tool_call>", "</tool_call>", "<think>", "</think>"],
        ),
        Family(
            "mistral_tools",
            "mistral_tools.jinja",
            [
                "<s>",
                "</s>",
                "[INST]",
                "[/INST]",
                "[AVAILABLE_TOOLS]",
                "[/AVAILABLE_TOOLS]",
                "[TOOL_CALLS]",
                "[TOOL_RESULTS]",
                "[/TOOL_RESULTS]",
            ],
            "</s>",
            bos="<s>",
            eos="</s>",
        ),
    ]
}

TOOL_JSON = '{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}'

CASES = [
    Case(
        "chatml",
        "two turns",
        PLAIN,
        "<|im_start|>user\nHæ, who?<|im_end|>\n<|im_start|>assistant\n«‹Ég er líkan. 👋›<|im_end|>»\n"
        "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n«‹  Bless.\n›<|im_end|>»\n",
    ),
    Case(
        "chatml",
        "system",
        WITH_SYSTEM,
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHæ, who?<|im_end|>\n"
        "<|im_start|>assistant\n«‹Ég er líkan. 👋›<|im_end|>»\n"
        "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n«‹  Bless.\n›<|im_end|>»\n",
    ),
    Case(
        "llama3",
        "date in the system turn, text trimmed",
        WITH_SYSTEM,
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHæ, who?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«‹Ég er líkan. 👋›<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd now?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«‹Bless.›<|eot_id|>»",
    ),
    Case(
        "mistral",
        "two turns",
        PLAIN,
        "<s>[INST] Hæ, who?[/INST]« ‹Ég er líkan. 👋›</s>»[INST] And now?[/INST]« ‹Bless.›</s>»",
    ),
    Case(
        "mistral",
        "system moves to the last user turn",
        WITH_SYSTEM,
        "<s>[INST] Hæ, who?[/INST]« ‹Ég er líkan. 👋›</s>»[INST] Be kind.\n\nAnd now?[/INST]« ‹Bless.›</s>»",
    ),
    Case(
        "gemma",
        "assistant is called model",
        PLAIN,
        "<bos><start_of_turn>user\nHæ, who?<end_of_turn>\n<start_of_turn>model\n«‹Ég er líkan. 👋›<end_of_turn>»\n"
        "<start_of_turn>user\nAnd now?<end_of_turn>\n<start_of_turn>model\n«‹Bless.›<end_of_turn>»\n",
    ),
    Case(
        "zephyr",
        "headers are plain text, pad is eos",
        WITH_SYSTEM,
        "<|system|>\nBe kind.</s>\n<|user|>\nHæ, who?</s>\n<|assistant|>\n«‹Ég er líkan. 👋›</s>»\n"
        "<|user|>\nAnd now?</s>\n<|assistant|>\n«‹  Bless.\n›</s>»\n",
    ),
    Case(
        "phi3",
        "end of text behind the last turn is not the end of turn",
        PLAIN,
        "<|user|>\nHæ, who?<|end|>\n<|assistant|>\n«‹Ég er líkan. 👋›<|end|>»\n"
        "<|user|>\nAnd now?<|end|>\n<|assistant|>\n«‹  Bless.\n›<|end|>»\n<|endoftext|>",
    ),
    Case(
        "qwen3",
        "earlier reasoning is dropped",
        REASONING,
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n«‹Uno.›<|im_end|>»\n"
        "<|im_start|>user\nTwo?<|im_end|>\n"
        "<|im_start|>assistant\n«‹<think>\nsecond thought\n</think>\n\nDos.›<|im_end|>»\n",
    ),
    Case(
        "qwen3",
        "tool call and answer",
        TOOL_CHAT,
        f"<|im_start|>system\n# Tools\n<tools>\n{TOOL_JSON}\n</tools><|im_end|>\n"
        "<|im_start|>user\n1+2?<|im_end|>\n<|im_start|>assistant\n"
        '«‹<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>›<|im_end|>»\n'
        "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n«<think>\n\n</think>\n\n‹Three.›<|im_end|>»\n",
        TOOLS,
    ),
    Case(
        "mistral_tools",
        "tool call and answer",
        TOOL_CHAT,
        f"<s>[AVAILABLE_TOOLS] [{TOOL_JSON}][/AVAILABLE_TOOLS][INST] 1+2?[/INST]"
        '«[TOOL_CALLS]‹ [{"name": "add", "arguments": {"a": 1, "b": 2}}]›</s>»'
        "[TOOL_RESULTS] 3[/TOOL_RESULTS]« ‹Three.›</s>»",
        TOOLS,
    ),
]


def byte_tokenizer(family: str = "chatml", *, merges: list[tuple[str, str]] | None = None, template: str | None = None):
    """A fast tokenizer whose tokens are bytes (plus ``merges`` and the family's special tokens), with its chat
    template.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    facts = FAMILIES[family]
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for a, b in merges or []:
        vocabulary[a + b] = len(vocabulary)
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges or []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in facts.special])
    core.add_tokens([AddedToken(t, special=False, normalized=False) for t in facts.added])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=facts.bos, eos_token=facts.eos, pad_token=facts.pad
    )
    tokenizer.chat_template = (
        template if template is not None else (TEMPLATES / facts.template).read_text(encoding="utf-8")
    )
    return tokenizer


def unmark(marked: str) -> tuple[str, list[str], list[str]]:
    """``(text, supervised parts, scored parts)`` of an expectation with marks."""
    text, supervised, scored = [], [], []
    inside: list[str] = []
    scoring: list[str] | None = None
    depth = 0
    for c in marked:
        if c == "«":
            depth, inside = 1, []
        elif c == "»":
            depth = 0
            supervised.append("".join(inside))
        elif c == "‹":
            scoring = []
        elif c == "›":
            scored.append("".join(scoring or []))
            scoring = None
        else:
            text.append(c)
            if depth:
                inside.append(c)
            if scoring is not None:
                scoring.append(c)
    return "".join(text), supervised, scored
