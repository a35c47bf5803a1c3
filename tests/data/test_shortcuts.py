"""The fast ways of the encoder give what the general way gives: frames of templates, offsets from ids, text by its
parts.
"""

from __future__ import annotations

import itertools
import random
from pydoc_data.topics import topics

import pytest
from chat_families import FAMILIES, TEMPLATES, byte_tokenizer

from aifactory_train.config.schema import Recipe
from aifactory_train.data import pieces
from aifactory_train.data.cells import RowError
from aifactory_train.data.encoder import Encoder
from aifactory_train.data.frames import Frames
from aifactory_train.data.offsets import Offsets, widths
from aifactory_train.data.pieces import Pieces
from aifactory_train.data.rows import canonical
from aifactory_train.data.template import ChatTemplate, TemplateRefused
from aifactory_train.data.tokenizer import encoder_spec

# What is awkward somewhere: white space of all kinds, letters of several bytes, special tokens inside texts, what
# templates look for.
PIECES = [
    *(
        " ",
        "  ",
        "\n",
        " \n",
        "\n ",
        "\t",
        "\r\n",
        "\x0b",
        "\x1c",
        "\x85",
        "\u00a0",
        "\u2003",
        "\u3000",
        "\0",
        "\u200b",
    ),
    *(
        "a",
        "The",
        "don't",
        "'s",
        "I'LL",
        "1",
        "123",
        "12,5",
        ".",
        "...",
        "!?",
        "-",
        "_",
        "/\n",
        "²",
        "½",
        "٣",
        "{{ x }}",
        "%s",
    ),
    *("é", "e\u0301", "\u0301", "ß", "Ω", "привет", "你好", "世", "👋🏽", "ﷺ", "ǅ", "ʰ", "Ég er líkan", "assistant\n"),
    *("<|im_start|>", "<|im_end|>", "<|im", "<s>", "</s>", "[/INST]", "<think>", "</think>", "x<", "<end_of_turn>"),
]


def awkward(draw: random.Random, most: int = 20) -> str:
    return "".join(draw.choice([" ", ""]) + draw.choice(PIECES) for _ in range(draw.randrange(most)))


def conversation(draw: random.Random) -> list[dict]:
    out = [{"role": "system", "content": awkward(draw)}] if draw.random() < 0.2 else []
    for _ in range(draw.choice([1, 1, 2, 3])):
        answer = {"role": "assistant", "content": awkward(draw) or "yes"}
        if draw.random() < 0.1:
            answer["weight"] = draw.choice([0, 1])
        out += [{"role": "user", "content": awkward(draw)}, answer]
    return out


def rows(count: int, seed: int) -> list[dict]:
    draw, out = random.Random(seed), []
    while len(out) < count:
        raw, form = ({"messages": conversation(draw)}, "messages")
        if draw.random() < 0.2:
            raw, form = {"text": "x" + 3 * awkward(draw)}, "text"
        try:
            out.append(canonical(raw, form, {}))
        except RowError:
            continue  # an answer of blanks alone
    return out


def flat(result) -> tuple:
    if isinstance(result, RowError):
        return (result.what, result.fix)
    return result.dropped, result.flags, [
        (d.tokens.tolist(), d.mask.tolist(), d.text_mask.tolist(), d.text_bytes, d.cut) for d in result.documents
    ]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "data",
    [
        {"sequence_length": 4096},
        {"sequence_length": 40, "long_documents": "split"},
        {"sequence_length": 60, "long_documents": "paragraphs", "supervise": "all"},
    ],
    ids=["whole", "split", "paragraphs"],
)
def test_every_shortcut_gives_the_same_documents(family, data):
    tokenizer = byte_tokenizer(family, merges=[("Ċ", "Ċ"), ("h", "e"), ("Ġ", "a"), (">", "Ċ")])
    recipe = Recipe.model_validate({"model": {"base": "x/y"}, "data": {"train": "rows.jsonl", **data}})
    fast, plain = (Encoder(encoder_spec(tokenizer, recipe)) for _ in range(2))
    assert fast.tokens.widths is not None
    plain.renderer.frames = plain.tokens.widths = plain.tokens.added = plain.tokens.pieces = None
    sample = rows(150, seed=len(family))
    assert list(map(flat, fast.encode(sample))) == list(map(flat, plain.encode(sample)))
    said = [row.get("text", "a b") for row in sample]
    assert (
        fast.count(said)
        == plain.count(said)
        == sum(map(len, fast.tokenizer.encode_batch(said, add_special_tokens=False)))
    )


# ---- frames


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frame_is_what_the_template_renders(family):
    source = (TEMPLATES / FAMILIES[family].template).read_text(encoding="utf-8")
    specials = {"bos_token": "<s>", "eos_token": "</s>"}
    frames, template = Frames(source, specials), ChatTemplate(source, specials)
    draw, filled = random.Random(3), 0
    for _ in range(300):
        messages = conversation(draw)
        frame = frames.of(messages)
        found = frame.fill(messages) if frame is not None else None
        if found is None:
            continue
        text, turns = found
        assert text == template.render(messages)
        answered = [k for k, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1)]
        assert [content for _, _, content in turns] == [messages[k]["content"] for k in answered]
        for k, (start, end, _) in zip(answered, turns, strict=True):
            assert text[:start] == template.render(messages[:k], prompt=True)
            assert k == len(messages) - 1 or text[:end] == template.render(messages[: k + 1])
        filled += 1
    assert filled > 50


LOOK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set c = m.content %}BODY<|im_end|>\n{% endfor %}{% if "
    "add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    "body",
    [
        "{{ c if c == 'yes' else 'no' }}",
        "{{ c.split('x')[0] }}",
        "{{ c | length }}",
        "{{ c | upper }}",
        "{{ c[:3] }}",
        "{% for letter in c %}{{ letter }}{% endfor %}",
        "{{ 'a' if 'yes' > c else c }}",
        "{{ c | tojson }}",
        "{{ '%5s' % c }}",
        "{{ c ~ '!' }}",
        "{% set b %}{{ c }}{% endset %}{{ b | length }}",
        "{% macro f(x) %}{{ x }}{% endmacro %}{{ 'long' if f(c) | length > 3 else c }}",
        "{{ messages | map(attribute='content') | join(' ') }}",
        "{{ c if c is lower else '' }}",
        "{{ c | int }}",
        "{{ {c: 1} }}",
        "{{ 'known' if c in ['yes', 'no'] else c }}",
        "{{ c.removeprefix('y') }}",
        "{{ c is sameas 'yes' or c }}",
        "{{ ['a', 'b'] | random }}",
    ],
)
def test_a_template_that_looks_at_a_text_has_no_frame(body):
    frames = Frames(LOOK.replace("BODY", body), {})
    assert frames.of([{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]) is None


@pytest.mark.parametrize(
    "body",
    [
        "{{ c | trim }}",
        "{{ c.strip() + '.' }}",
        "{{ c.lstrip('\\n').rstrip() }}",
        "{% set b %}>{{ c }}{% endset %}{{ b }}",
        "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(c) }}",
        "{% generation %}{{ c }}{% endgeneration %}",
        "{{ c if c is string else '' }}",
        "{{ 'none' if not c else c }}",
        "{{ c.upper() if c.startswith('<tool') or '</think>' in c else c }}",
    ],
)
def test_a_template_that_writes_texts_out_has_one_and_its_conditions_hold(body):
    source = LOOK.replace("BODY", body)
    frames, template = Frames(source, {}), ChatTemplate(source, {})
    filled = 0
    for said in ("yes", " yes\n", "", "\n\n", "<tool>x", "a</think>b", "é 👋"):
        messages = [{"role": "user", "content": said}, {"role": "assistant", "content": said or "no"}]
        frame = frames.of(messages)
        assert frame is not None
        found = frame.fill(messages)
        if found is not None:
            assert found[0] == template.render(messages)
            filled += 1
    assert filled >= 4


def test_a_template_that_refuses_has_no_frame():
    source = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + LOOK
    messages = [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]
    assert Frames(source, {}).of(messages) is None
    with pytest.raises(TemplateRefused, match="user first"):
        ChatTemplate(source, {}).render(messages)


# ---- offsets and parts


def trained(pattern: str):
    """A small BPE tokenizer that cuts by ``pattern`` (or by GPT-2's, with or without single digits)."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers

    built_in = pre_tokenizers.ByteLevel(add_prefix_space=False)
    steps = {
        "gpt2": [built_in],
        "digits": [pre_tokenizers.Digits(individual_digits=True), built_in],
    }.get(pattern) or [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    text = [
        topics["lambda"],
        topics["floating"],
        topics["strings"],
        "Ég er líkan og þú ert fífl. привет мир, 你好世界! " * 9,
    ]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(text, trainers.BpeTrainer(vocab_size=900, show_progress=False, initial_alphabet=alphabet))
    core.add_special_tokens([AddedToken(t, normalized=False) for t in ("<|im_start|>", "<|im_end|>", "<|im", "<s>")])
    core.add_tokens(["<think>", "x<"])
    return core


def parts_of(core) -> Pieces | None:
    width = widths(core)
    assert width is not None
    return Pieces.of(core, width)


def served(core) -> Pieces:
    parts = parts_of(core)
    assert parts is not None
    return parts


def lists(ids, edges) -> list[list[int]]:
    return [ids[a:b].tolist() for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("composed", [False, True], ids=["", "NFC"])
@pytest.mark.parametrize("pattern", ["gpt2", "digits", *sorted(pieces._PATTERNS)], ids=range(2 + len(pieces._PATTERNS)))
def test_parts_of_a_text_have_the_ids_that_they_have_in_it(pattern, composed):
    from tokenizers import normalizers

    core = trained(pattern)
    if composed:
        core.normalizer = normalizers.NFC()
    parts = served(core)
    draw = random.Random(1)
    for _ in range(4):
        texts = ["", *(awkward(draw, 40) for _ in range(120))]
        texts += [text.replace("\0", " ") for text in texts]
        for some in (texts, [text for text in texts if "\0" not in text]):
            assert lists(*parts.ids(some)) == [e.ids for e in core.encode_batch(some, add_special_tokens=False)]
    assert len(parts._known) > 50


def test_many_parts_are_tokenised_as_one_text():
    core, batches = trained("gpt2"), []

    class Watched:
        def encode_batch_fast(self, texts, **how):
            batches.append(len(texts))
            return core.encode_batch_fast(texts, **how)

    parts = served(core)
    parts._tokenizer = Watched()
    words = [f"w{i}" for i in range(1000)]
    ids, edges = parts._tokenise(words)
    assert lists(ids, edges) == [core.encode(word).ids for word in words] and batches == [1 + 1000 // 64]
    # Where an added token swallows what stands before the mark, or a part holds the mark, they are tokenised one by
    # one.
    mark = next(iter(parts._added_ids))
    for odd in (mark, mark[: len(mark) // 2], "e\u0301"):
        if odd == "e\u0301":
            from tokenizers import normalizers

            core.normalizer = normalizers.NFC()
        some = ["a", odd, "b", mark + "c", odd]
        ids, edges = parts._tokenise(some)
        assert lists(ids, edges) == [core.encode(part, add_special_tokens=False).ids for part in some]


def test_parts_are_forgotten_when_they_are_many(monkeypatch):
    monkeypatch.setattr(pieces, "_MOST", 50)
    core = trained("gpt2")
    parts = served(core)
    most = 0
    for start in range(0, 400, 20):
        texts = [" ".join(f"word{start + i}" for i in range(20)), "a " * 60 + "x" * 60]
        assert lists(*parts.ids(texts)) == [core.encode(text).ids for text in texts]
        most = max(most, len(parts._known))
    assert 50 < most <= 50 + 23  # they are counted before a block
    monkeypatch.setattr(pieces, "_MOST_IDS", 60)
    for start in range(0, 400, 20):
        text = " ".join(f"other{start + i}" for i in range(20)) + " a" * 60
        assert lists(*parts.ids([text])) == [core.encode(text).ids]
        assert len(parts._known) < 50


def test_words_that_do_not_repeat_are_not_taken_apart():
    core = trained("gpt2")
    parts = served(core)
    text = " ".join(f"word{i}" for i in range(200))
    before = dict(parts._known)
    ids, edges = parts.ids([text])
    assert ids.tolist() == core.encode(text).ids and edges.tolist() == [0, len(ids)] and parts._known == before


def test_tokenizers_that_cut_otherwise_are_not_served():
    from tokenizers import AddedToken

    assert parts_of(trained(r"\w+ \w+|\s+|.")) is None  # a match that holds a blank
    core = trained("gpt2")
    core.add_special_tokens([AddedToken("<wide>", lstrip=True)])
    assert parts_of(core) is None


def test_widths_of_tokens_give_the_offsets_of_the_tokenizer():
    core = trained("gpt2")
    width = widths(core)
    assert width is not None
    draw = random.Random(5)
    for _ in range(300):
        text = awkward(draw)
        encoding = core.encode(text, add_special_tokens=False)
        ours, theirs = Offsets.of_widths(encoding.ids, text, width[encoding.ids]), Offsets(encoding, len(text))
        assert [ours.span(j) for j in range(len(encoding.ids))] == encoding.offsets
        for char in range(len(text) + 1):
            assert ours.first_from(char) == theirs.first_from(char)
            assert ours.straddles(char) == theirs.straddles(char)
            assert ours.overlapping(char // 2, char) == theirs.overlapping(char // 2, char)


def test_tokenizers_that_change_the_text_have_no_widths():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    core = trained("gpt2")
    core.normalizer = normalizers.Lowercase()
    assert widths(core) is None
    core = trained("gpt2")
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    assert widths(core) is None
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert widths(core) is None
    assert widths(Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))) is None
