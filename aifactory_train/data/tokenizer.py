"""Loading a tokenizer and finding out what the data path must know about it, with every trap refused before
training.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.core.files import check_regular, foreign, read_json
from aifactory_train.data.cells import RowError
from aifactory_train.data.control_text import Prompts
from aifactory_train.data.encoder_spec import EncoderSpec
from aifactory_train.data.end_of_turn import probe
from aifactory_train.data.template import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPECIALS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The base model's tokenizer from the fetched folder, offline, with ``model.chat_template`` in place of its own.

    Raises :class:`UserError` when it was not fetched, has no fast form, or the template file is missing.
    """
    from transformers import AutoTokenizer

    from aifactory_train.sources import remote_code, resolve_model

    folder = resolve_model(recipe.model)
    remote_code.warn(recipe, folder)  # the tokenizer is the first that can run any of it
    fix = "the model folder needs a whole tokenizer.json (fetch the whole repository)"
    with foreign(recipe.model.base, "the tokenizer cannot be loaded", fix):
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=recipe.model.trust_remote_code
        )
    if recipe.model.chat_template is not None:
        tokenizer.chat_template = _read_template(Path(recipe.model.chat_template))
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(
            f"{type(tokenizer).__name__} has no fast form (tokenizer.json)",
            where=recipe.model.base,
            fix="save the tokenizer in its fast form beside the model",
        )
    check_vocabulary(tokenizer, _embedding_rows(folder), recipe.model.base)
    return tokenizer


def _read_template(path: Path) -> str:
    check_regular(path, f"model.chat_template: {path}")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no such file: {path}", where="model.chat_template") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}", where="model.chat_template") from None


def _embedding_rows(folder: Path) -> int | None:
    config = read_json(folder / "config.json", {"vocab_size?": int, "text_config?": dict})
    return config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")


def check_vocabulary(tokenizer: Any, embedding_rows: int | None, where: str) -> None:
    """Refuse a tokenizer that knows a token for which the model's embedding has no row (it would index out of
    range).
    """
    if embedding_rows is None:
        return
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= embedding_rows:
        raise UserError(
            f"the tokenizer's largest token id is {largest}, but the model's embedding has {embedding_rows} rows",
            where=where,
            fix="use the tokenizer that belongs to this model, or extend the embedding first",
        )


def chat_templates_of(tokenizer: Any) -> tuple[str | None, str | None]:
    """The template for rows without tools, and the one for rows with them where it is another: of several named ones
    ``default`` and ``tool_use``, as ``apply_chat_template`` chooses them."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, list):  # as tokenizer_config.json has them
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        return template.get("default"), template.get("tool_use")
    return template, None


def _special_ids(tokenizer: Any) -> set[int]:
    special_ids = {int(i) for i in tokenizer.all_special_ids}
    # Control tokens that are listed as added but not as special ("</tool_call>") are text; those marked special are
    # not.
    return special_ids | {int(i) for i, t in tokenizer.added_tokens_decoder.items() if t.special}


def prompts_of(tokenizer: Any, recipe: Recipe | None = None) -> Prompts | None:
    """What a model is asked, in the words of its training; None where the tokenizer has no chat template."""
    template, tool_use = chat_templates_of(tokenizer)
    if not template and not tool_use:
        return None
    specials = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    as_text = recipe is None or recipe.data.control_tokens_in_content == "as_text"
    return Prompts(
        ChatTemplate(template, specials, tool_use),
        tokenizer,
        special_ids=sorted(_special_ids(tokenizer)),
        as_text=as_text,
    )


def encoder_spec(tokenizer: Any, recipe: Recipe) -> EncoderSpec:
    """All that tokenising processes need. Raises :class:`UserError` when the template has no end-of-turn token."""
    serialised = _plain_offsets(tokenizer.backend_tokenizer.to_str())
    specials = {name: str(value) for name in _SPECIALS if (value := getattr(tokenizer, name, None)) is not None}
    special_ids = _special_ids(tokenizer)
    template, tool_template = chat_templates_of(tokenizer)
    stops: tuple[int, ...] = ()
    for one in filter(None, (template, tool_template)):
        try:
            with foreign(recipe.model.base, "the tokenizer fails on a short text", ours=(RowError,)):
                found = probe(serialised, one, specials, tuple(special_ids))
            stops = tuple(dict.fromkeys((*stops, *found)))
        except RowError as error:
            raise UserError(error.what, where=recipe.model.chat_template or recipe.model.base, fix=error.fix) from None
    return EncoderSpec(
        tokenizer_json=serialised,
        template=template,
        specials=specials,
        special_ids=tuple(sorted(special_ids | set(stops))),
        stop_ids=stops,
        eos_id=tokenizer.eos_token_id,
        sequence_length=recipe.data.sequence_length,
        long_documents=recipe.data.long_documents,
        supervise=recipe.data.supervise,
        tool_template=tool_template,
        control_tokens=recipe.data.control_tokens_in_content,
    )


def _plain_offsets(serialised: str) -> str:
    """The tokenizer without ``trim_offsets``: ids stay the same, but spans then cover every character of the text.

    Quotes inside a JSON string are escaped, so this finds the setting alone, and without parsing a vocabulary of
    megabytes.
    """
    return re.sub(r'"trim_offsets"(\s*):(\s*)true', r'"trim_offsets"\1:\2false', serialised)


def tokenizer_info(tokenizer: Any, spec: EncoderSpec) -> dict[str, Any]:
    """What the loop, the export and the report need to know (JSON-able)."""
    stop = spec.stop_ids[0] if spec.stop_ids else spec.eos_id
    taken = {stop, spec.eos_id}
    templates = "\0".join(filter(None, (spec.template, spec.tool_template)))
    pad = tokenizer.pad_token_id
    separate = pad is not None and pad not in taken
    if not separate:
        # Labels are masked by place, never by id, so a shared id could not hide the end-of-turn; a separate one is
        # clearer.
        unk = tokenizer.unk_token_id
        pad = unk if unk is not None and unk not in taken else (pad if pad is not None else 0)
    return {
        "class": type(tokenizer).__name__,
        "vocabulary": len(tokenizer),
        "template_sha256": hashlib.sha256(templates.encode()).hexdigest() if templates else None,
        "tokenizer_sha256": hashlib.sha256(spec.tokenizer_json.encode()).hexdigest(),
        "eos_id": spec.eos_id,
        "end_of_turn_id": stop,
        "end_of_turn": tokenizer.convert_ids_to_tokens(stop) if stop is not None else None,
        "stop_ids": list(spec.stop_ids) or ([spec.eos_id] if spec.eos_id is not None else []),
        "pad_id": int(pad),
        "pad_is_separate": bool(pad not in taken),
    }
