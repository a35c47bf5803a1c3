"""From canonical rows to tokens, with the mask of what carries loss. Imports tokenizers, jinja2 and numpy, never torch.

A row is rendered (:mod:`~aifactory_train.data.rendering`), its text tokenised, and the assistant's turns in the text
become a mask over its tokens (:mod:`~aifactory_train.data.masks`).

**How it is fast.** Where the template provably does not look at texts (:mod:`~aifactory_train.data.frames`), rendering
is joining strings. Where token ids tell their offsets (:mod:`~aifactory_train.data.offsets`), a block of rows is
tokenised without them and its masks are built at once, as arrays. A row for which either does not hold goes the slow
way, and both ways give the same bytes.
"""

from __future__ import annotations

import functools
from typing import Any

from aifactory_train.data.block_tokens import BlockTokenizer
from aifactory_train.data.cells import RowError
from aifactory_train.data.control_text import ControlTokenizer, Disguise, refused
from aifactory_train.data.encoder_spec import EncoderSpec
from aifactory_train.data.end_of_turn import fast_tokenizer
from aifactory_train.data.masks import Encoded, Masks
from aifactory_train.data.matched import texts_in
from aifactory_train.data.offsets import Offsets
from aifactory_train.data.rendering import Rendered, Renderer
from aifactory_train.data.traces import Controls
from aifactory_train.data.turns import supervised_turns


class Encoder:
    """Turns canonical rows into :class:`Encoded`, many at a time."""

    def __init__(self, spec: EncoderSpec):
        self.spec = spec
        self.tokenizer = fast_tokenizer(spec.tokenizer_json)
        size = max(self.tokenizer.get_vocab_size(with_added_tokens=True), max(spec.special_ids, default=0) + 1)
        self._controls = Controls(filter(None, map(self.tokenizer.id_to_token, spec.special_ids)))
        stops = list(filter(None, map(self.tokenizer.id_to_token, frozenset(spec.stop_ids))))
        self._learns_all = spec.supervise == "all"
        self.renderer = Renderer(spec, self._controls, stops)
        self._disguise = Disguise.of(self.tokenizer, spec.special_ids)
        self.tokens = BlockTokenizer(self.tokenizer, size)
        self.masks = Masks(spec, self.tokenizer, size)

    def count(self, texts: list[str]) -> int:
        """Tokens of all ``texts`` together, without those that the post-processor would add."""
        return self.tokens.count(texts)

    def encode(self, rows: list[dict[str, Any]]) -> list[Encoded | RowError]:
        """Encode rows; a faulty one gives its :class:`RowError` in its place."""
        if any("rejected" in row for row in rows):
            return self._encode_pairs(rows)
        if any("positive" in row for row in rows):
            return self._encode_matched(rows)
        results: list[Encoded | RowError | None] = [None] * len(rows)
        chats: list[tuple[int, Rendered]] = []
        texts: list[int] = []
        controls = [self._controls.of(row) for row in rows]
        for i, row in enumerate(rows):
            if "text" in row:
                texts.append(i)
                continue
            try:
                rendered = self._with_controls(row, controls[i]) if controls[i] else self.renderer.render(row)
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
        said = [rows[i]["text"] for i in texts]
        for i, text, tokens in zip(texts, said, self._offsets(said), strict=True):
            results[i] = self._read(text, tokens) if "labels" in rows[i] else self.masks.text(text, tokens)
        for found_here, result in zip(controls, results, strict=True):
            if found_here and isinstance(result, Encoded):
                result.controls = found_here
        return results  # type: ignore[return-value]

    def _with_controls(self, row: dict[str, Any], controls: tuple[str, ...]) -> Rendered:
        """A chat row with special tokens in what it says, rendered. Raises :class:`RowError`."""
        if self.spec.control_tokens == "as_tokens":
            self._refuse_silence(row["messages"])
            return self.renderer.render(row)
        if self._disguise.hidden.keys().isdisjoint(controls):
            return self.renderer.render(row)
        rendered = self.renderer.render(self._disguise.row(row))
        rendered.exchanged = self._disguise.exchanged(rendered.full)
        rendered.full = self._disguise.shown(rendered.full)
        return rendered

    def _refuse_silence(self, messages: list[dict[str, Any]]) -> None:
        """Refuse an answer of nothing but special tokens: the model would learn to end its turn at once."""
        for k in () if self._learns_all else supervised_turns(messages):
            message = messages[k]
            if len(message) == 2 and not self._controls.without(message["content"]).strip():
                raise RowError(
                    f"messages[{k}]: the answer is nothing but special tokens, the model would learn to say nothing",
                    "give it text, or leave the row out; data.control_tokens_in_content=as_text learns them as text",
                )

    @functools.cached_property
    def _control(self) -> ControlTokenizer | None:
        return self._disguise.tokenizer(self.spec.tokenizer_json, self.spec.special_ids)

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

    def _encode_matched(self, rows: list[dict[str, Any]]) -> list[Encoded | RowError]:
        """The documents of query, positive and negatives of each row; a row of which one is dropped is dropped."""
        texts = [texts_in(row) for row in rows]
        found = iter(self.encode([{"text": text, "labels": []} for several in texts for text in several]))
        results: list[Encoded | RowError] = []
        for several in texts:
            parts = [part for _ in several if isinstance(part := next(found), Encoded)]  # a text is no faulty row
            flags = tuple(sorted({flag for part in parts for flag in part.flags}))
            lost = tuple(found_lost for part in parts for found_lost in part.lost)
            counted = flags, lost, tuple(control for part in parts for control in part.controls)
            dropped = [part.dropped for part in parts if part.dropped]
            if dropped:
                results.append(Encoded([], "empty" if "empty" in dropped else "pair", *counted))
            else:
                results.append(Encoded([document for part in parts for document in part.documents], None, *counted))
        return results

    def _chats(self, rendered: list[Rendered]) -> list[Encoded | RowError]:
        results: list[Encoded | RowError | None] = [None] * len(rendered)
        for i, one in enumerate(rendered):
            if one.exchanged is not None:
                results[i] = self._as_text(one)
        plain = [i for i, found in enumerate(results) if found is None]
        for i, found in zip(plain, self._plain_chats([rendered[i] for i in plain]), strict=True):
            results[i] = found
        return results  # type: ignore[return-value]

    def _as_text(self, rendered: Rendered) -> Encoded | RowError:
        """A row in which special tokens that people wrote are text."""
        assert rendered.exchanged is not None
        if self._control is None:
            return refused()
        try:
            (encoding,) = self._control.encode([rendered.exchanged])
            return self.masks.chat(rendered, Offsets(encoding, len(rendered.full)), self._control.tokenizer)
        except RowError as error:
            return error

    def _plain_chats(self, rendered: list[Rendered]) -> list[Encoded | RowError]:
        texts = [r.full for r in rendered]
        results: list[Encoded | RowError | None] = [None] * len(texts)
        offsets: list[Offsets | None] = [None] * len(texts)
        if self.tokens.widths is not None and texts:
            block = self.tokens.block(texts)
            results = self.masks.at_once(rendered, block)
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
                    results[i] = self.masks.chat(one, tokens)
                except RowError as error:
                    results[i] = error
        return results  # type: ignore[return-value]

    def _offsets(self, texts: list[str]) -> list[Offsets]:
        """Plain texts as the tokenizer writes them, with what it adds around them."""
        offsets: list[Offsets | None] = [None] * len(texts)
        if self.tokens.added is not None and texts:
            block = self.tokens.block(texts, added=True)
            offsets = [block.offsets(i, text) if block.whole[i] else None for i, text in enumerate(texts)]
        left = [i for i in range(len(texts)) if offsets[i] is None]
        encodings = self.tokenizer.encode_batch([texts[i] for i in left], add_special_tokens=True) if left else []
        for i, encoding in zip(left, encodings, strict=True):
            offsets[i] = Offsets(encoding, len(texts[i]))
        return offsets  # type: ignore[return-value]

    def _read(self, text: str, tokens: Offsets) -> Encoded:
        """A text that a head reads: the tokens that ``tokenizer(text, truncation=True)`` gives, so that whoever uses
        the export feeds it as it was trained."""
        ids, length = tokens.ids, self.spec.sequence_length
        if len(ids) <= length:
            return self.masks.read(ids, cut=False)
        if self.spec.long_documents == "drop":
            return Encoded([], "long")
        self.tokenizer.enable_truncation(length)
        try:
            return self.masks.read(self.tokenizer.encode(text, add_special_tokens=True).ids, cut=True)
        finally:
            self.tokenizer.no_truncation()
