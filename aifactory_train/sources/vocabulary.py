"""A larger vocabulary for a new language: tokens learnt from its text, with embeddings that begin where the model
already is.

The tokenizer's own byte-pair merges stay in force and new ones follow them, learnt on text that the old ones have cut
(continued BPE training). A text is therefore cut at no more places than before, and each new token is a run of old
ones. Its embedding starts as the mean of theirs (Gee et al. 2022, "Fast Vocabulary Transfer for Language Model
Compression", arXiv 2402.09977), in the output layer as well where that is not the same matrix. Training then moves it,
so embeddings have to be trained: all rows, or with ``model.vocabulary.train: new`` those of the new tokens alone
(:class:`aifactory_train.model.causal_lm.CausalLM` keeps gradients off the others).

The result is a model folder like any other, built once in the cache; everything downstream reads it as the base model.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train.core.errors import UserError
from aifactory_train.core.output import note

if TYPE_CHECKING:
    from aifactory_train.config.schema import VocabularyConfig

#: A pair that occurs less often than this is not worth an embedding.
LEAST_COUNT = 2
FACTS = "vocabulary.json"
_KEY = "model.vocabulary"


def extended(folder: Path, settings: VocabularyConfig) -> Path:
    """The model folder with the larger vocabulary, built in the cache where it is not there yet.

    Raises :class:`UserError` for a tokenizer that is no BPE with a pre-tokenizer, or for a text that holds nothing to
    learn.
    """
    from aifactory_train.config.loading import cache_dir

    text = _text_file(settings)
    digest = hashlib.sha256(f"{settings.size}\0".encode())
    for path in (text, folder / "tokenizer.json", folder / "config.json"):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    for path in sorted(folder.glob("*.safetensors")):
        stat = path.stat()
        digest.update(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
    root = cache_dir() / "vocabulary"
    target = root / f"{folder.name}-{digest.hexdigest()[:16]}"
    if (target / FACTS).is_file():
        return target
    root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=root, prefix=f".{target.name}-"))
    try:
        _build(folder, text, settings.size, scratch)
        try:
            os.replace(scratch, target)
        except OSError:
            if not (target / FACTS).is_file():  # another rank was faster with the same content: use that
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def first_new_row(folder: Path) -> int:
    """Where the rows of the new tokens begin in the embeddings of the model in ``folder`` (:func:`extended`)."""
    return int(json.loads((folder / FACTS).read_text(encoding="utf-8"))["first_id"])


def _text_file(settings: VocabularyConfig) -> Path:
    path = Path(settings.text)
    if not path.is_file():
        raise UserError("no such file", where=f"{_KEY}.text: {settings.text}")
    return path


def texts(path: Path) -> Iterator[str]:
    """Texts of a ``.jsonl`` file (``text``, or the contents of ``messages``; other rows are counted), or the lines of
    any other."""
    others = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if path.suffix != ".jsonl":
                    yield line
                    continue
                found = _texts_of(line, f"{path}:{number}")
                others += bool(line.strip()) and not found
                yield from found
    except UnicodeDecodeError:
        raise UserError("not UTF-8 text", where=str(path), fix="save the file as UTF-8") from None
    if others:
        note(
            f"{path}: {others:,} rows hold neither 'text' nor 'messages' as text: the vocabulary does not learn of them"
        )


def _texts_of(line: str, where: str) -> list[str]:
    try:
        row = json.loads(line) if line.strip() else {}
    except (ValueError, RecursionError):
        raise UserError("not valid JSON", where=where) from None
    held, turns = ([row.get("text")], row.get("messages")) if isinstance(row, dict) else ([], None)
    held += [turn.get("content") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    return [text for text in held if isinstance(text, str)]


def learn_merges(tokenizer: Any, lines: Iterator[str], size: int) -> list[tuple[str, str]]:
    """At most ``size`` merges that shorten the text most, in order, on words as ``tokenizer`` (of ``tokenizers``) cuts
    them.
    """
    words: collections.Counter[str] = collections.Counter()
    for line in lines:
        normal = tokenizer.normalizer.normalize_str(line) if tokenizer.normalizer is not None else line
        words.update(piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal))
    cut = [([t.value for t in tokenizer.model.tokenize(word)], count) for word, count in sorted(words.items())]
    pairs: collections.Counter[tuple[str, str]] = collections.Counter()
    where: dict[tuple[str, str], set[int]] = collections.defaultdict(set)

    def enter(index: int, sign: int) -> None:
        pieces, count = cut[index]
        for pair in itertools.pairwise(pieces):
            pairs[pair] += sign * count
            (where[pair].add if sign > 0 else where[pair].discard)(index)

    for index in range(len(cut)):
        enter(index, 1)
    merges: list[tuple[str, str]] = []
    while len(merges) < size and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[best] < LEAST_COUNT:
            break
        merges.append(best)
        for index in sorted(where[best]):
            enter(index, -1)
            pieces, joined, at = cut[index][0], [], 0
            while at < len(pieces):
                together = tuple(pieces[at : at + 2]) == best
                joined.append("".join(best) if together else pieces[at])
                at += 2 if together else 1
            cut[index] = (joined, cut[index][1])
            enter(index, 1)
        pairs.pop(best, None)
    return merges


def _build(folder: Path, text: Path, size: int, target: Path) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    tree = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if tree["model"].get("type") != "BPE" or not tree.get("pre_tokenizer"):
        raise UserError(
            "only byte-pair tokenizers that first cut a text into words can learn new tokens",
            where=_KEY,
            fix="choose a base with such a tokenizer, or leave model.vocabulary out",
        )
    old = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids: dict[str, int] = dict(tree["model"]["vocab"])
    for token in tree.get("added_tokens") or []:
        ids.setdefault(token["content"], token["id"])  # else new tokens would be given their ids
    pieces = {token: [number] for token, number in ids.items()}
    following, new, rules = max(ids.values()) + 1, [], []
    for one, other in learn_merges(old, texts(text), size):
        token = one + other
        rules.append((one, other))
        if token not in ids:
            ids[token], pieces[token] = following, pieces[one] + pieces[other]
            new.append(token)
            following += 1
    if not new:
        raise UserError("the text repeats nothing that could become a token", where=f"{_KEY}.text: {text}")
    tree["model"]["vocab"] = ids
    as_lists = not tree["model"]["merges"] or not isinstance(tree["model"]["merges"][0], str)
    tree["model"]["merges"] += [list(rule) if as_lists else " ".join(rule) for rule in rules]
    for path in folder.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".md", "") and "index" not in path.name:
            shutil.copy2(path, target / path.name)
    for stale in ("vocab.json", "merges.txt"):  # the slow tokenizer's files, which tokenizer.json replaces
        (target / stale).unlink(missing_ok=True)
    (target / "tokenizer.json").write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
    _refuse_moved_ids(old, Tokenizer.from_file(str(target / "tokenizer.json")), new, ids)

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True, use_safetensors=True)
    if following > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(following, mean_resizing=False)
    matrices = [model.get_input_embeddings().weight]
    if model.get_output_embeddings().weight is not matrices[0]:
        matrices.append(model.get_output_embeddings().weight)
    with torch.no_grad():
        for matrix in matrices:
            for token in new:
                matrix[ids[token]] = matrix[pieces[token]].float().mean(0).to(matrix.dtype)
    model.save_pretrained(str(target))
    facts = {"base": str(folder), "text": str(text), "first_id": ids[new[0]], "tokens": new}
    (target / FACTS).write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")


def _refuse_moved_ids(old: Any, now: Any, new: list[str], ids: dict[str, int]) -> None:
    """Every old token keeps its id and every new one has the id of its embedding."""
    before, after = old.get_vocab(with_added_tokens=True), now.get_vocab(with_added_tokens=True)
    wrong = [t for t, number in before.items() if after.get(t) != number] + [t for t in new if after.get(t) != ids[t]]
    if wrong:
        raise UserError(
            f"the tokenizer gives {len(wrong)} tokens other ids once it is extended (first: {wrong[0]!r})",
            where=_KEY,
            fix="this tokenizer cannot be extended here; leave model.vocabulary out",
        )
