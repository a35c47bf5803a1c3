"""Which tokens end an assistant's turn, found by rendering."""

from __future__ import annotations

from typing import Any

from aifactory_train.data.cells import RowError
from aifactory_train.data.rendering import MARKER
from aifactory_train.data.template import ChatTemplate

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


#: The tokenizer that :func:`probe` has loaded, by its serialised form: the next :class:`Encoder` takes it.
_spare: dict[str, Any] = {}


def fast_tokenizer(serialised: str) -> Any:
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


def probe(
    tokenizer_json: str, template: str, specials: dict[str, str], special_ids: tuple[int, ...]
) -> tuple[int, ...]:
    """Token ids that end an assistant's turn, found by rendering two small conversations.

    The first special token behind the assistant's text is the end-of-turn, at the end of a conversation and in its
    middle (some templates use two). Raises :class:`RowError` when there is none.
    """
    tokenizer = fast_tokenizer(tokenizer_json)
    chat = ChatTemplate(template, specials)
    ended: list[int] = []
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": MARKER},
        {"role": "user", "content": "two"},
    ]
    last = ""
    for messages in (turns[:2], turns):
        text = chat.render(messages)
        if MARKER not in text:
            raise RowError(
                "the chat template leaves the assistant's text out", "use another template (model.chat_template)"
            )
        last = text[text.index(MARKER) + len(MARKER) :]
        encoding = tokenizer.encode(last, add_special_tokens=False)
        stop = next((i for i in encoding.ids if i in special_ids), None)
        # In the middle of a conversation the next special token may be one that opens the user's turn: that ends
        # nothing.
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
