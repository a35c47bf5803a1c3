"""What carries loss, for each family of chat templates, against expectations derived by hand."""

from __future__ import annotations

import numpy as np
import pytest
from chat_families import CASES, FAMILIES, PLAIN, TEMPLATES, TOOLS, byte_tokenizer, chat, unmark

from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.data.cells import RowError
from aifactory_train.data.encoder import Encoder
from aifactory_train.data.rows import canonical
from aifactory_train.data.template import TEMPLATE_DATE, ChatTemplate
from aifactory_train.data.tokenizer import encoder_spec, tokenizer_info


def recipe(**data) -> Recipe:
    return Recipe.model_validate({"model": {"base": "x/y"}, "data": {"train": "rows.jsonl", **data}})


def encode(tokenizer, messages, tools=None, **data):
    row = canonical({"messages": messages, **({"tools": tools} if tools else {})}, "messages", {})
    result = Encoder(encoder_spec(tokenizer, recipe(sequence_length=4096, **data))).encode([row])[0]
    if isinstance(result, RowError):
        raise result
    return result


def runs(tokenizer, tokens, mask) -> list[str]:
    """The text of each run of marked tokens."""
    out, held = [], []
    for token, marked in zip([*tokens.tolist(), 0], [*mask.tolist(), False], strict=True):
        if marked:
            held.append(token)
        elif held:
            out.append(tokenizer.decode(held, skip_special_tokens=False, clean_up_tokenization_spaces=False))
            held = []
    return out


def check(tokenizer, case, *, leading_space_is_text: bool = False) -> None:
    text, supervised, scored = unmark(case.expected)
    (document,) = encode(tokenizer, case.messages, case.tools).documents
    assert tokenizer.decode(document.tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text
    assert runs(tokenizer, document.tokens, document.mask) == supervised
    found = runs(tokenizer, document.tokens, document.text_mask)
    if leading_space_is_text:
        found, scored_text = [f.strip(" ") for f in found], [s.strip(" ") for s in scored]
    else:
        scored_text = scored
    assert found == scored_text
    assert document.text_bytes == sum(len(s.encode()) for s in scored)
    assert not (document.text_mask & ~document.mask).any()


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.family}: {c.name}")
def test_mask_equals_the_hand_derived_expectation(case):
    check(byte_tokenizer(case.family), case)


def test_at_least_six_families():
    assert len({c.family for c in CASES}) >= 6


@pytest.mark.parametrize("family", FAMILIES)
def test_end_of_turn_token_is_found_and_supervised_once_per_turn(family):
    tokenizer = byte_tokenizer(family)
    spec = encoder_spec(tokenizer, recipe())
    stop = tokenizer.convert_tokens_to_ids(FAMILIES[family].stop)
    assert spec.stop_ids[0] == stop
    assert tokenizer_info(tokenizer, spec)["end_of_turn"] == FAMILIES[family].stop
    (document,) = encode(tokenizer, PLAIN).documents
    assert int((document.mask & (document.tokens == stop)).sum()) == 2


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.family}: {c.name}")
def test_rendering_equals_transformers(case, monkeypatch):
    """Our compiled template gives what ``apply_chat_template`` gives (on the day that the template date names)."""
    import transformers.utils.chat_template_utils as theirs

    class Frozen(theirs.datetime):  # type: ignore[misc, name-defined]
        @classmethod
        def now(cls, tz=None):
            return TEMPLATE_DATE

    monkeypatch.setattr(theirs, "datetime", Frozen)
    if hasattr(theirs._compile_jinja_template, "cache_clear"):
        theirs._compile_jinja_template.cache_clear()
    tokenizer = byte_tokenizer(case.family)
    ours = ChatTemplate(tokenizer.chat_template, encoder_spec(tokenizer, recipe()).specials)
    for n in range(1, len(case.messages) + 1):
        for prompt in (False, True):
            part = case.messages[:n]
            want = tokenizer.apply_chat_template(part, tools=case.tools, tokenize=False, add_generation_prompt=prompt)
            assert ours.render(part, case.tools, prompt=prompt) == want


def test_answer_that_would_merge_with_the_header_is_tokenised_apart():
    """The header ends in a newline and the answer begins with one; the tokenizer has a token for two newlines."""
    tokenizer = byte_tokenizer(merges=[("Ċ", "Ċ")])
    messages = chat(("user", "q"), ("assistant", "\nA"))
    result = encode(tokenizer, messages)
    (document,) = result.documents
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert document.tokens[: len(prompt)].tolist() == prompt  # what the model sees when it generates
    assert not document.mask[: len(prompt)].any() and document.mask[len(prompt)]
    assert "tokenised apart" in result.flags
    assert runs(tokenizer, document.tokens, document.mask) == ["\nA<|im_end|>"]


def test_no_token_before_the_answer_carries_loss_and_prompt_tokens_are_those_of_generation():
    for family in FAMILIES:
        tokenizer = byte_tokenizer(family)
        (document,) = encode(tokenizer, PLAIN[:2]).documents
        spec = encoder_spec(tokenizer, recipe())
        ask = ChatTemplate(spec.template or "", spec.specials).render(PLAIN[:1], prompt=True)
        prompt = tokenizer.encode(ask, add_special_tokens=False)
        assert document.tokens[: len(prompt)].tolist() == prompt, family
        assert not document.mask[: len(prompt)].any(), family
        assert document.mask[len(prompt)], family


def test_pad_that_is_also_the_end_of_turn_does_not_hide_it():
    """The trap: a collator that ignores labels equal to the pad id never teaches the model to stop."""
    from aifactory_train.data import shifted_labels

    tokenizer = byte_tokenizer("zephyr")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (document,) = encode(tokenizer, PLAIN).documents
    labels = shifted_labels(document.tokens, document.mask)
    assert int((labels == tokenizer.eos_token_id).sum()) == 2


def test_template_without_an_end_of_turn_token_is_refused():
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(UserError, match="never learn to stop"):
        encoder_spec(byte_tokenizer(template=template), recipe())


def test_template_that_ends_only_the_last_turn_is_refused_for_longer_conversations():
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
        "{% if loop.last and m['role'] == 'assistant' %}<|im_end|>{% else %}{{ '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = byte_tokenizer(template=template)
    assert encode(tokenizer, PLAIN[:2]).documents
    with pytest.raises(RowError, match="no end-of-turn token follows assistant turn 1"):
        encode(tokenizer, PLAIN)


def test_end_of_turn_written_inside_an_answer_does_not_end_the_supervision():
    tokenizer = byte_tokenizer()
    (document,) = encode(tokenizer, chat(("user", "q"), ("assistant", "a<|im_end|>b"))).documents
    assert runs(tokenizer, document.tokens, document.mask) == ["a<|im_end|>b<|im_end|>"]


def test_weight_zero_takes_a_turn_out():
    messages = [dict(m) for m in PLAIN]
    messages[1]["weight"] = 0
    tokenizer = byte_tokenizer()
    (document,) = encode(tokenizer, messages).documents
    assert runs(tokenizer, document.tokens, document.mask) == ["  Bless.\n<|im_end|>"]


def test_supervise_all_takes_every_token_but_the_first():
    (document,) = encode(byte_tokenizer(), PLAIN, supervise="all").documents
    assert not document.mask[0] and document.mask[1:].all()


def test_repeated_answers_are_each_found_in_their_own_turn():
    messages = chat(("user", "ok"), ("assistant", "ok"), ("user", "ok"), ("assistant", "ok"))
    for family in FAMILIES:
        tokenizer = byte_tokenizer(family)
        (document,) = encode(tokenizer, messages).documents
        found = [
            r.removeprefix("<think>\n\n</think>\n\n").strip() for r in runs(tokenizer, document.tokens, document.mask)
        ]
        assert found == ["ok" + FAMILIES[family].stop] * 2, family
        assert document.text_bytes == 4


def test_bad_template_is_named():
    with pytest.raises((UserError, RowError), match="not valid Jinja"):
        encoder_spec(byte_tokenizer(template="{% for %}"), recipe())


def test_row_that_the_template_refuses_is_named():
    with pytest.raises(RowError, match="System role not supported"):
        encode(byte_tokenizer("gemma"), chat(("system", "s"), ("user", "u"), ("assistant", "a")))


def test_plain_text_scores_every_token_but_an_unpredicted_first_one():
    tokenizer = byte_tokenizer("chatml")
    spec = encoder_spec(tokenizer, recipe())
    (result,) = Encoder(spec).encode([{"text": "abc þ"}])
    (document,) = result.documents
    assert document.tokens[-1] == tokenizer.eos_token_id and document.mask[-1] and not document.text_mask[-1]
    assert not document.mask[0] and document.mask[1:].all()
    assert document.text_bytes == len("abc þ".encode()) - 1
    assert int(document.text_mask.sum()) == document.text_bytes  # one token a byte in this tokenizer


def test_tools_reach_the_template():
    text = ChatTemplate((TEMPLATES / "qwen3.jinja").read_text(), {}).render(PLAIN, TOOLS)
    assert '"name": "add"' in text
    assert np.all(["<tools>" in text])


# ---- what a template may cost


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 9 ** 999999999 }}",
        "{% set ns = namespace(n=9) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{{ [1] * 10**10 }}",
        "{{ 'a'.ljust(10**10 if messages else 1) }}",
        "{{ 'a'|center(10000000000) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ '{:>{w}}'.format('x', w=10**9) }}",
        "{{ '{:>{}}'.format('x', '1000000000') }}",
        "{{ '{:{s}}'.format('x', s='>' ~ 10**9) }}",
        "{{ '{0[w]:>{0[w]}}'.format({'w': 10**9}) }}",
        "{{ '{a:.{w}f}'.format_map({'a': 1.5, 'w': 10**9}) }}",
        "{% set f = '{:>{w}}'.format %}{{ f('x', w=10**9) }}",
        "{{ ('{:>{w}}'|safe).format('x', w=10**9) }}",
        "{{ ('{0:>1000000}' * 99).format('x') }}",
        "{{ '%*d' % (10**9, 1) }}",
        "{{ '%.*f'|format(10**9, 1.0) }}",
        "{{ {'a': 1}|tojson(indent=10**9) }}",
        "{{ (5).to_bytes(10**9, 'big') }}",
        "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% "
        "endfor %}",
        "{{ range(99999)|join('a' * 99999) }}",
        "{{ ('a' * 99999).join(['b'] * 99999) }}",
        "{{ ('a' * 99999)|replace('a', 'b' * 99999) }}",
        "{% for a in range(10**7) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ 2.0 ** 99999 }}",
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        "{% for a in [1] %}" * 60 + "{% endfor %}" * 60,
    ],
)
def test_a_template_without_end_is_one_message(source, monkeypatch):
    from aifactory_train.data import template_limits

    monkeypatch.setattr(template_limits, "MOST_PASSES", 20_000)
    monkeypatch.setattr(template_limits, "MOST_SIZE", 1 << 20)
    with pytest.raises(RowError, match="chat template"):
        ChatTemplate(source, {}).render(PLAIN)


@pytest.mark.parametrize(
    ("source", "written"),
    [
        ("{{ '{:>{w}}'.format('x', w=5) }}", "    x"),
        ("{{ '{a:.{w}f}'.format_map({'a': 1.5, 'w': 2}) }}", "1.50"),
        ("{{ '%*d' % (5, 1) }}", "    1"),
        ("{{ '%d * %d' % (1732980000, 10**10) }}", "1732980000 * 10000000000"),
        ("{{ '%d'|format(1732980000) }} {{ '{}'.format(1732980000) }}", "1732980000 1732980000"),
        ("{{ ('<{}>'|safe).format('<') }}", "<&lt;>"),
        ("{{ {'a': 10**10}|tojson(indent=1) }}", '{\n "a": 10000000000\n}'),
    ],
)
def test_widths_and_large_numbers_that_are_meant(source, written):
    assert ChatTemplate(source, {}).render(PLAIN) == written
