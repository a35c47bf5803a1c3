"""From canonical rows to tokens, with the mask of what carries loss. Imports tokenizers, jinja2 and numpy, never torch.

**How the mask is found.** No template ships marks that say which part the assistant wrote, so it is found by rendering.
For the assistant turn ``k`` of a conversation ``m``:

* ``full = render(m)`` is what is trained on; ``ask = render(m[:k], prompt=True)`` is what the model sees when it has to
  answer. Where ``full`` starts with ``ask``, the answer begins right there: training and generation agree by construction.
* Templates that rewrite earlier turns (system text moved into the last user turn, old reasoning dropped) break that prefix.
  Then the turn's text is replaced by a marker, and what lies before and after the marker is found again in ``full``.
* The turn ends with its end-of-turn token, which is supervised; whatever the template writes behind it is not.

Spans of characters become spans of tokens through the offsets of *one* tokenisation of ``full``. Where a token straddles the
border between question and answer, the two sides are tokenised apart, as they are at generation.

**How it is fast.** Where the template provably does not look at texts (:mod:`frames`), ``full`` and the turns come from joining strings.
Where token ids tell their offsets (:mod:`offsets`), a block of rows is tokenised without them and its masks are built at once, as arrays.
A row for which either does not hold goes the way above, and both ways give the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aifactory_train.data.frames import Frame, Frames
from aifactory_train.data.offsets import Offsets, widths
from aifactory_train.data.pieces import Pieces, end_to_end
from aifactory_train.data.rows import RowError, supervised_turns
from aifactory_train.data.template import ChatTemplate, TemplateRefused
from aifactory_train.data.traces import Controls, lost

_MARKER = "QZ7VXK"  # plain letters and digits: no template trims, splits or escapes it
_STOP_NAMES = (
    "<|eom_id|>",
    "<|return|>",
    "<|call|>",
    "<|end|>",
    "<|eot_id|>",
    "<|im_end|>",
    "<end_of_turn>",
    "<turn|>",
)


@dataclass(frozen=True)
class EncoderSpec:
    """Everything that decides how a row becomes tokens; small, picklable, hashed into the cache key.

    ``tokenizer_json`` is the fast tokenizer serialised; ``special_ids`` all its special and added tokens; ``stop_ids`` those
    that end an assistant's turn (found by :func:`probe`); ``eos_id`` ends a plain text.
    """

    tokenizer_json: str
    template: str | None
    specials: dict[str, str]
    special_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    eos_id: int | None
    sequence_length: int
    long_documents: str
    supervise: str

    def digest(self) -> str:
        rest = [getattr(self, name) for name in self.__dataclass_fields__ if name != "tokenizer_json"]
        digest = hashlib.sha256(self.tokenizer_json.encode())
        digest.update(json.dumps(rest, sort_keys=True).encode())
        return digest.hexdigest()


@dataclass
class Document:
    """One token sequence. ``tokens`` int64 [n]; ``mask``, ``text_mask`` bool [n]; ``text_bytes`` UTF-8 bytes of the text
    whose tokens carry loss; ``cut``: it was shortened or is a part of a longer one."""

    tokens: np.ndarray
    mask: np.ndarray
    text_mask: np.ndarray
    text_bytes: int
    cut: bool = False


@dataclass
class Encoded:
    """The documents of one row (none when it was dropped), and what is worth counting.

    ``lost``: parts that the template leaves out (:func:`~aifactory_train.data.traces.lost`); ``controls``: special tokens in what people
    wrote. Each as often as it was found."""

    documents: list[Document]
    dropped: str | None = None  # "long" | "masked" | "empty" | "pair"
    flags: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()


@dataclass
class _Turn:
    """Character spans in the rendered text: the answer begins at ``start``, its region ends at ``end``; ``text`` is where
    the turn's content stands, or None when the template rewrote it."""

    start: int
    end: int
    text: tuple[int, int] | None


@dataclass
class _Rendered:
    full: str
    turns: list[_Turn]
    flags: set[str] = field(default_factory=set)
    lost: tuple[str, ...] = ()
    empty: bool = False  # nothing is left of any answer


@dataclass
class _Block:
    """Some texts tokenised without offsets. ``ids`` int64 [all], of text ``i`` those in ``[edges[i], edges[i + 1])``; ``begins`` int64 [all + 1]: bytes before each token, texts end to end; ``whole`` bool [texts]: the
    widths of its tokens add up to the text, so ``begins`` is right for it; ``plain``: it is ASCII (a byte is a character)."""

    ids: np.ndarray
    edges: np.ndarray
    begins: np.ndarray
    whole: np.ndarray
    plain: list[bool]

    def offsets(self, i: int, text: str) -> Offsets:
        a, b = int(self.edges[i]), int(self.edges[i + 1])
        return Offsets.of_widths(self.ids[a:b].tolist(), text, np.diff(self.begins[a : b + 1]))


#: The tokenizer that :func:`probe` has loaded, by its serialised form: the next :class:`Encoder` takes it.
_spare: dict[str, Any] = {}


def _tokenizer(serialised: str) -> Any:
    """The tokenizer without truncation and padding."""
    from tokenizers import Tokenizer

    tokenizer = _spare.pop(serialised, None)
    if tokenizer is None:
        tokenizer = Tokenizer.from_str(serialised)
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer


def forget_spare() -> None:
    """Free the tokenizer that was loaded and that no encoder took."""
    _spare.clear()


class Encoder:
    """Turns canonical rows into :class:`Encoded`, many at a time."""

    def __init__(self, spec: EncoderSpec):
        self.spec = spec
        self.tokenizer = _tokenizer(spec.tokenizer_json)
        self.template = ChatTemplate(spec.template, spec.specials) if spec.template else None
        self.specials = frozenset(spec.special_ids)
        self._controls = Controls(filter(None, map(self.tokenizer.id_to_token, spec.special_ids)))
        size = max(self.tokenizer.get_vocab_size(with_added_tokens=True), max(spec.special_ids, default=0) + 1)
        self._is_special = np.zeros(size, dtype=bool)
        self._is_special[list(spec.special_ids)] = True
        self.stops = frozenset(spec.stop_ids)
        self._is_stop = np.zeros(size, dtype=bool)
        self._is_stop[list(spec.stop_ids)] = True
        self._frames = Frames(spec.template, spec.specials) if spec.template else None
        self._widths = widths(self.tokenizer)
        if self._widths is not None and len(self._widths) < size:
            self._widths = np.append(self._widths, np.zeros(size - len(self._widths), dtype=np.int64))
        self._added = self._added_around() if self._widths is not None else None
        self._pieces = Pieces.of(self.tokenizer, self._widths) if self._widths is not None else None
        self._to_check = 256

    def _added_around(self) -> tuple[list[int], list[int]] | None:
        """Ids that the post-processor writes before and behind every text."""
        alone, whole = (self.tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
        for at in range(len(whole) - len(alone) + 1):
            if whole[at : at + len(alone)] == alone:
                return whole[:at], whole[at + len(alone) :]
        return None

    # -- many rows

    def encode(self, rows: list[dict[str, Any]]) -> list[Encoded | RowError]:
        """Encode rows; a faulty one gives its :class:`RowError` in its place."""
        if any("rejected" in row for row in rows):
            return self._encode_pairs(rows)
        results: list[Encoded | RowError | None] = [None] * len(rows)
        chats: list[tuple[int, _Rendered]] = []
        texts: list[int] = []
        for i, row in enumerate(rows):
            if "text" in row:
                texts.append(i)
                continue
            try:
                rendered = self.render(row)
            except RowError as error:
                results[i] = error
                continue
            if rendered.empty:
                results[i] = Encoded([], "empty", tuple(sorted(rendered.flags)), rendered.lost)
            else:
                chats.append((i, rendered))
        for (i, one), found in zip(chats, self._chats([r for _, r in chats]), strict=True):
            if one.lost and isinstance(found, Encoded):
                found.lost = one.lost
            results[i] = found
        for i, found in zip(texts, self._texts([rows[i]["text"] for i in texts]), strict=True):
            results[i] = found
        for row, result in zip(rows, results, strict=True):
            controls = self._controls.of(row)
            if controls and isinstance(result, Encoded):
                result.controls = controls
        return results  # type: ignore[return-value]

    def _encode_pairs(self, rows: list[dict[str, Any]]) -> list[Encoded | RowError]:
        """Two documents of each row, the chosen answer's first; a row of which one is dropped or split is dropped."""
        sides = [{**row, "messages": row[key]} for row in rows for key in ("messages", "rejected")]
        found = self.encode([{k: v for k, v in side.items() if k != "rejected"} for side in sides])
        results: list[Encoded | RowError] = []
        for one, other in zip(found[0::2], found[1::2], strict=True):
            if isinstance(one, RowError) or isinstance(other, RowError):
                results.append(one if isinstance(one, RowError) else other)
                continue
            documents, flags = one.documents + other.documents, tuple(sorted({*one.flags, *other.flags}))
            counted = flags, one.lost + other.lost, one.controls + other.controls
            if len(one.documents) == len(other.documents) == 1:
                results.append(Encoded(documents, None, *counted))
            else:
                results.append(Encoded([], "empty" if "empty" in (one.dropped, other.dropped) else "pair", *counted))
        return results

    # -- rendering

    def render(self, row: dict[str, Any]) -> _Rendered:
        """Render a chat row, find the assistant's turns in the text, and note what the template leaves out of it."""
        if self.template is None:
            raise RowError(
                "the tokenizer has no chat template",
                "name one with model.chat_template=FILE.jinja, use an instruct model, or train on rows with 'text'",
            )
        messages, tools = row["messages"], row.get("tools")
        frame = self._frames.of(messages) if self._frames is not None and not tools else None
        rendered = self._framed(frame, messages) if frame is not None else None
        if rendered is None:
            return self._traced(self._render(messages, tools), messages, tools)
        assert frame is not None
        # Every text has its place in a complete frame.
        return rendered if frame.complete else self._traced(rendered, messages, tools)

    def _framed(self, frame: Frame, messages: list) -> _Rendered | None:
        """The frame with these texts in it; None where it does not fit them."""
        filled = frame.fill(messages)
        if filled is None:
            return None
        full, turns = filled
        rendered = _Rendered(full, [_Turn(a, b, _find_text(full, a, b, content)) for a, b, content in turns])
        if frame.to_check:  # the first rows of each shape go both ways
            frame.to_check -= 1
            proof = self._render(messages, None)
            if proof != rendered:
                assert self._frames is not None
                self._frames.drop(frame)
                return None
        return rendered

    def _traced(self, rendered: _Rendered, messages: list, tools: Any) -> _Rendered:
        """``rendered`` with what the template left out of it. A turn of which nothing is left is not learnt: its end-of-turn token alone
        would teach the model to say nothing."""
        full, turns = rendered.full, rendered.turns
        regions = [
            (k, turn.start, turn.end, turn.text is not None)
            for k, turn in zip(supervised_turns(messages), turns, strict=True)
        ]
        rendered.lost = lost(messages, tools, full, regions)
        if rendered.lost and self.spec.supervise != "all":
            left = [turn for turn in turns if turn.text is not None or self._says(full, turn)]
            rendered.lost += ("answer left empty",) * (len(turns) - len(left))
            rendered.turns, rendered.empty = left, not left
        return rendered

    def _says(self, full: str, turn: _Turn) -> bool:
        """Whether the template wrote anything between the beginning of the turn and its end-of-turn token."""
        text = full[turn.start : turn.end]
        ends = [at for stop in self.stops if (at := text.find(self.tokenizer.id_to_token(stop) or "\0")) >= 0]
        return bool(self._controls.without(text[: min(ends, default=len(text))]).strip())

    def _render(self, messages: list, tools: Any) -> _Rendered:
        assert self.template is not None
        full = self.template.render(messages, tools)
        rendered = _Rendered(full, [])
        for k in supervised_turns(messages):
            rendered.turns.append(self._locate(full, messages, tools, k, rendered.flags))
        return rendered

    def _locate(self, full: str, messages: list, tools: Any, k: int, flags: set[str]) -> _Turn:
        content = messages[k]["content"]
        ask = self._render_or_none(messages[:k], tools, prompt=True)  # None: a template that needs at least one turn
        later: str | None = None
        start = len(ask) if ask is not None and full.startswith(ask) else None
        if start is not None and k == len(messages) - 1:
            return _Turn(start, len(full), _find_text(full, start, len(full), content))
        later = self._render_or_none(messages[: k + 1], tools)
        if start is not None and later is not None and full.startswith(later):
            return _Turn(start, len(later), _find_text(full, start, len(later), content))
        marked, end = self._around(full, messages, tools, k)
        if start is None:
            flags.add("context rewritten")
            start = marked - _lead(ask, later, content, full, marked)
        return _Turn(start, end, _find_text(full, start, end, content))

    def _render_or_none(self, messages: list, tools: Any, *, prompt: bool = False) -> str | None:
        assert self.template is not None
        try:
            return self.template.render(messages, tools, prompt=prompt)
        except TemplateRefused:
            return None

    def _around(self, full: str, messages: list, tools: Any, k: int) -> tuple[int, int]:
        """Where turn ``k`` begins and ends in ``full``, found by putting a marker in its place.

        The end is that of the text up to the next turn; when the template treats the marker differently from the text
        (it parses reasoning out of it, say), common beginning and end of both renderings bound the turn.
        """
        assert self.template is not None
        marker = _MARKER
        while marker in full:
            marker += "Q"
        replaced = [dict(m) for m in messages]
        replaced[k] = {"role": "assistant", "content": marker}
        probe = self._render_or_none(replaced, tools)
        if probe is None and messages[k].get("tool_calls"):
            # Some templates want every tool answer to follow a call: keep the call beside the marker.
            replaced[k]["tool_calls"] = messages[k]["tool_calls"]
            probe = self._render_or_none(replaced, tools)
        if probe is None or marker not in probe:
            raise RowError("the chat template leaves this assistant turn out of the text")
        before, after = probe.split(marker, 1)
        start = _common(before, full) if not full.startswith(before) else len(before)
        if full.endswith(after):
            tail = len(full) - len(after)
        else:
            tail = len(full) - _common(after[::-1], full[::-1])
        # `tail` is where the content ends; the end-of-turn token that follows belongs to the turn as well.
        end = min(len(full), tail + _stop_reach(full[tail:], self))
        return min(start, tail), max(end, tail)

    # -- tokens

    def _tokenise(self, texts: list[str], *, added: bool = False) -> _Block:
        """Tokenise without offsets (only where :func:`widths` has an answer). ``added``: with the post-processor's tokens."""
        assert self._widths is not None
        ids, edges = self._ids(texts, added)
        width = self._widths[ids]
        before, behind = self._added if added and self._added is not None else ([], [])
        for place in (edges[:-1, None] + np.arange(len(before)), edges[1:, None] - 1 - np.arange(len(behind))):
            width[place.ravel()] = 0
        begins = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum(width, out=begins[1:])
        plain = [t.isascii() for t in texts]
        sizes = [len(t) if ascii_ else len(t.encode()) for t, ascii_ in zip(texts, plain, strict=True)]
        whole = begins[edges[1:]] - begins[edges[:-1]] == np.asarray(sizes, dtype=np.int64)
        normalizer = self.tokenizer.normalizer
        for i, (text, ascii_) in enumerate(zip(texts, plain, strict=True)):
            if normalizer is not None and not ascii_ and normalizer.normalize_str(text) != text:
                whole[i] = False
        return _Block(ids, edges, begins, whole, plain)

    def _ids(self, texts: list[str], added: bool) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts, int64, and where those of each begin and end, int64 [texts + 1]."""
        if self._pieces is None or (added and self._added is None):
            return end_to_end([e.ids for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=added)])
        ids, edges = self._pieces.ids(texts)
        if self._to_check > 0:  # the first texts go both ways
            some = texts[: self._to_check]
            self._to_check -= len(some)
            proof, _ = end_to_end([e.ids for e in self.tokenizer.encode_batch_fast(some, add_special_tokens=False)])
            if not np.array_equal(proof, ids[: edges[len(some)]]):
                self._pieces = None
                return self._ids(texts, added)
        before, behind = self._added if added and self._added is not None else ([], [])
        if before or behind:
            rows = [ids[a:b].tolist() for a, b in itertools.pairwise(edges.tolist())]
            return end_to_end([[*before, *row, *behind] for row in rows])
        return ids, edges

    def count(self, texts: list[str]) -> int:
        """Tokens of all ``texts`` together, without those that the post-processor would add."""
        if self._widths is None:
            return sum(len(e) for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        return len(self._ids(texts, False)[0])

    def _chats(self, rendered: list[_Rendered]) -> list[Encoded | RowError]:
        texts = [r.full for r in rendered]
        results: list[Encoded | RowError | None] = [None] * len(texts)
        offsets: list[Offsets | None] = [None] * len(texts)
        if self._widths is not None and texts:
            block = self._tokenise(texts)
            results = self._at_once(rendered, block)
            for i in range(len(texts)):
                if results[i] is None and block.whole[i]:
                    offsets[i] = block.offsets(i, texts[i])
        left = [i for i in range(len(texts)) if results[i] is None and offsets[i] is None]
        if left:
            encodings = self.tokenizer.encode_batch([texts[i] for i in left], add_special_tokens=False)
            for i, encoding in zip(left, encodings, strict=True):
                offsets[i] = Offsets(encoding, len(texts[i]))
        for i, (one, tokens) in enumerate(zip(rendered, offsets, strict=True)):
            if tokens is not None:
                try:
                    results[i] = self._chat(one, tokens)
                except RowError as error:
                    results[i] = error
        return results  # type: ignore[return-value]

    def _at_once(self, rendered: list[_Rendered], block: _Block) -> list[Encoded | RowError | None]:
        """The rows of a block in which every border of a turn is one of tokens too; None for the others, and for those
        to be cut, dropped or refused."""
        ids, edges, begins = block.ids, block.edges, block.begins
        counts = np.diff(edges)
        ready = block.whole & (counts > 0) & (counts <= self.spec.sequence_length)
        owners: list[int] = []
        borders: list[
            int
        ] = []  # of each turn: answer begins, region ends, text begins, text ends; in bytes of the block
        bases = begins[edges[:-1]].tolist()
        for i in np.flatnonzero(ready).tolist():
            full, base, plain = rendered[i].full, bases[i], block.plain[i]
            for turn in rendered[i].turns:
                if turn.text is None:
                    ready[i] = False
                    break
                owners.append(i)
                for char in (turn.start, turn.end, *turn.text):
                    borders.append(base + (char if plain else len(full[:char].encode())))
        wanted, owner = np.asarray(borders, dtype=np.int64).reshape(-1, 4), np.asarray(owners, dtype=np.int64)
        found = np.searchsorted(begins, wanted)
        fits = (begins[found] == wanted).all(axis=1)
        first, limit, a, b = found.T
        stops = np.append(np.flatnonzero(self._is_stop[ids]), len(ids))
        stop = stops[np.searchsorted(stops, b)]
        fits &= stop < limit
        ready[owner[~fits]] = False
        keep = ready[owner]
        mask = _covered(first[keep], stop[keep] + 1, len(ids))
        text_mask = _covered(a[keep], b[keep], len(ids)) & ~self._is_special[ids] & mask
        if self.spec.supervise == "all":
            mask[:] = True
        heads = edges[:-1][counts > 0]
        mask[heads] = text_mask[heads] = False  # nothing predicts a first token
        before = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum(mask, out=before[1:])
        ready &= before[edges[1:]] > before[edges[:-1]]
        sizes = np.bincount(owner, weights=wanted[:, 3] - wanted[:, 2], minlength=len(counts)).astype(np.int64).tolist()
        results: list[Encoded | RowError | None] = [None] * len(rendered)
        places = edges.tolist()
        for i in np.flatnonzero(ready).tolist():
            x, y = places[i], places[i + 1]
            document = Document(ids[x:y], mask[x:y], text_mask[x:y], sizes[i])
            results[i] = Encoded([document], None, tuple(sorted(rendered[i].flags)))
        return results

    def _chat(self, rendered: _Rendered, tokens: Offsets) -> Encoded:
        full, flags = rendered.full, set(rendered.flags)
        straddling = [t.start for t in rendered.turns if 0 < t.start < len(full) and tokens.straddles(t.start)]
        if straddling:
            pieces = self._apart(full, straddling, tokens.ids)
            if pieces is None:
                flags.add("answer shares a token with the question")
            else:
                flags.add("tokenised apart")
                tokens = pieces
        return self._build(rendered, tokens, flags)

    def _apart(self, full: str, cuts: list[int], ids: list[int]) -> Offsets | None:
        """Tokenise the sides of each cut apart; None when that would change the text (a tokenizer that adds a space)."""
        edges = [0, *cuts, len(full)]
        parts = [full[a:b] for a, b in itertools.pairwise(edges)]
        encodings = self.tokenizer.encode_batch(parts, add_special_tokens=False)
        joined = [i for e in encodings for i in e.ids]
        if self.tokenizer.decode(joined, skip_special_tokens=False) != self.tokenizer.decode(
            ids, skip_special_tokens=False
        ):
            return None
        return Offsets.joined(encodings, edges)

    def _build(self, rendered: _Rendered, tokens: Offsets, flags: set[str]) -> Encoded:
        full = rendered.full
        ids = np.asarray(tokens.ids, dtype=np.int64)
        n = len(ids)
        mask = np.zeros(n, dtype=bool)
        text_mask = np.zeros(n, dtype=bool)
        spans: list[tuple[int, int]] = []
        for number, turn in enumerate(rendered.turns):
            first = tokens.first_from(turn.start)
            limit = tokens.first_from(turn.end)
            after = tokens.first_from(turn.text[1]) if turn.text else first
            stop = next((j for j in range(after, limit) if tokens.ids[j] in self.stops), None)
            if stop is None:
                raise RowError(
                    f"no end-of-turn token follows assistant turn {number + 1} in the rendered text: "
                    "the model would never learn to stop",
                    "use a chat template that ends the assistant's turns with a special token (model.chat_template)",
                )
            mask[first : stop + 1] = True
            if turn.text:
                a, b = tokens.overlapping(*turn.text)
                text_mask[a:b] = True
                spans.append(turn.text)
            else:
                for j in range(first, stop):
                    if tokens.ids[j] not in self.specials:
                        text_mask[j] = True
                spans += _without(
                    (turn.start, tokens.span(stop)[0]),
                    [tokens.span(j) for j in range(first, stop) if tokens.ids[j] in self.specials],
                )
        text_mask &= ~self._is_special[ids]
        text_mask &= mask
        if self.spec.supervise == "all":
            mask[:] = True
        return self._fit(full, ids, mask, text_mask, spans, tokens, flags)

    def _texts(self, texts: list[str]) -> list[Encoded]:
        offsets: list[Offsets | None] = [None] * len(texts)
        if self._added is not None and texts:
            block = self._tokenise(texts, added=True)
            offsets = [block.offsets(i, text) if block.whole[i] else None for i, text in enumerate(texts)]
        left = [i for i in range(len(texts)) if offsets[i] is None]
        encodings = self.tokenizer.encode_batch([texts[i] for i in left], add_special_tokens=True) if left else []
        for i, encoding in zip(left, encodings, strict=True):
            offsets[i] = Offsets(encoding, len(texts[i]))
        return [self._text(text, tokens) for text, tokens in zip(texts, offsets, strict=True) if tokens is not None]

    def _text(self, text: str, tokens: Offsets) -> Encoded:
        ids = np.asarray(tokens.ids, dtype=np.int64)
        special = self._is_special[ids]
        begin = int(special[0]) if len(ids) else 0
        if self.spec.eos_id is not None and (len(ids) == 0 or ids[-1] != self.spec.eos_id):
            ids = np.append(ids, self.spec.eos_id)
            special = np.append(special, True)
        mask = np.ones(len(ids), dtype=bool)
        text_mask = ~special
        # Without a BOS token nothing predicts the first token: its bytes are not scored either.
        scored_from = 0 if begin or len(tokens.ids) == 0 else tokens.span(0)[1]
        return self._fit(text, ids, mask, text_mask, [(scored_from, len(text))], tokens, set())

    def _fit(
        self,
        full: str,
        ids: np.ndarray,
        mask: np.ndarray,
        text_mask: np.ndarray,
        spans: list[tuple[int, int]],
        tokens: Offsets,
        flags: set[str],
    ) -> Encoded:
        """Apply ``long_documents``; a part without a supervised token is left out."""
        if len(ids):
            mask[0] = text_mask[0] = False
        length = self.spec.sequence_length
        found = tuple(sorted(flags))
        if len(ids) <= length:
            if not mask.any():
                return Encoded([], "masked", found)
            return Encoded([Document(ids, mask, text_mask, _bytes(full, spans, 0, len(full)))], None, found)
        if self.spec.long_documents == "drop":
            return Encoded([], "long", found)
        pieces: list[Document] = []
        start = 0
        while True:
            stop = min(start + length, len(ids))
            if self.spec.long_documents == "paragraphs" and stop < len(ids):
                stop, inside = _break_before(full, tokens, start, stop)
                if inside:
                    flags.add("cut inside a sentence")
            # Characters of the tokens that this piece predicts: from its second token to the next piece's second token.
            c0 = tokens.begin(start + 1) if start else 0
            c1 = tokens.begin(stop) if stop < len(ids) else len(full)
            part = slice(start, stop)
            m, t = mask[part].copy(), text_mask[part].copy()
            m[0] = t[0] = False
            if m.any():
                pieces.append(Document(ids[part], m, t, _bytes(full, spans, c0, c1), True))
            if stop == len(ids) or self.spec.long_documents == "truncate":
                break
            start = stop - 1  # the last token again, as context: each token is predicted exactly once
        return Encoded(pieces, None if pieces else "masked", tuple(sorted(flags)))


#: Where a long document may be cut, best first: between paragraphs, between lines, behind a sentence.
_BREAKS = (re.compile(r"\n[ \t]*\n\s*"), re.compile(r"\n\s*"), re.compile(r"[.!?…。！？][\"'»”)]*\s+|[。！？]"))


def _break_before(full: str, tokens: Offsets, start: int, stop: int) -> tuple[int, bool]:
    """The last good place to cut ``[start, stop)``, at least half of it kept; ``(stop, True)`` when there is none."""
    c0, c1 = tokens.begin(start + (stop - start) // 2), tokens.begin(stop)
    for pattern in _BREAKS:
        for end in reversed([m.end() for m in pattern.finditer(full, c0, c1)]):
            at = tokens.first_from(end)
            if start + 1 < at <= stop:
                return at, False
    return stop, True


def _covered(begins: np.ndarray, ends: np.ndarray, n: int) -> np.ndarray:
    """bool [n]: inside some of the ranges ``[begins, ends)``."""
    change = np.bincount(begins, minlength=n + 1) - np.bincount(ends, minlength=n + 1)
    return np.cumsum(change[:n]) > 0


def _find_text(full: str, start: int, end: int, content: str) -> tuple[int, int] | None:
    """Where the turn's content stands between ``start`` and ``end``: as written, or trimmed by the template."""
    for text in (content, content.strip()):
        if text:
            at = full.find(text, start, end)
            if at >= 0:
                return at, at + len(text)
    return None


def _lead(ask: str | None, later: str | None, content: str, full: str, marked: int) -> int:
    """Characters (a space, say) that the template writes between its question and the text: the model has to write them too."""
    if ask is None or later is None or not later.startswith(ask):
        return 0
    found = _find_text(later, len(ask), len(later), content)
    lead = later[len(ask) : found[0]] if found else ""
    return len(lead) if full[:marked].endswith(lead) else 0


def _common(a: str, b: str) -> int:
    """Length of the common beginning."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _stop_reach(tail: str, encoder: Encoder) -> int:
    """Characters from the beginning of ``tail`` to the end of the turn-ending token that follows at once (0: none does)."""
    lead = len(tail) - len(tail.lstrip())
    for token in encoder.stops:
        text = encoder.tokenizer.id_to_token(token)
        if text and tail.startswith(text, lead):
            return lead + len(text)
    return 0


def _without(span: tuple[int, int], holes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    out, at = [], span[0]
    for a, b in holes:
        if a > at:
            out.append((at, a))
        at = max(at, b)
    if at < span[1]:
        out.append((at, span[1]))
    return out


def _bytes(full: str, spans: list[tuple[int, int]], c0: int, c1: int) -> int:
    """UTF-8 bytes of the parts of ``spans`` that lie in ``[c0, c1)``."""
    return sum(len(full[max(a, c0) : min(b, c1)].encode()) for a, b in spans if max(a, c0) < min(b, c1))


def probe(
    tokenizer_json: str, template: str, specials: dict[str, str], special_ids: tuple[int, ...]
) -> tuple[int, ...]:
    """Token ids that end an assistant's turn, found by rendering two small conversations.

    The first special token behind the assistant's text is the end-of-turn, at the end of a conversation and in its middle
    (some templates use two). Raises :class:`RowError` when there is none.
    """
    tokenizer = _tokenizer(tokenizer_json)
    chat = ChatTemplate(template, specials)
    ended: list[int] = []
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": _MARKER},
        {"role": "user", "content": "two"},
    ]
    last = ""
    for messages in (turns[:2], turns):
        text = chat.render(messages)
        if _MARKER not in text:
            raise RowError(
                "the chat template leaves the assistant's text out", "use another template (model.chat_template)"
            )
        last = text[text.index(_MARKER) + len(_MARKER) :]
        encoding = tokenizer.encode(last, add_special_tokens=False)
        stop = next((i for i in encoding.ids if i in special_ids), None)
        # In the middle of a conversation the next special token may be one that opens the user's turn: that ends nothing.
        known = stop is not None and (
            not ended or stop in ended or tokenizer.id_to_token(stop) in (*_STOP_NAMES, specials.get("eos_token"))
        )
        if known and stop is not None:
            ended.append(stop)
    if not ended:
        raise RowError(
            f"no special token follows the assistant's text in the chat template (it writes {last[:40]!r}): "
            "the model would never learn to stop",
            "use a template that ends the assistant's turns with the end-of-turn or EOS token (model.chat_template)",
        )
    for name in _STOP_NAMES:
        token = tokenizer.token_to_id(name)
        if token is not None and name in template:
            ended.append(token)
    _spare.clear()
    _spare[tokenizer_json] = tokenizer
    return tuple(dict.fromkeys(ended))
