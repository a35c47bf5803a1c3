"""What a model's layers do with several documents in one row, found out before training rather than believed.

Attention is ours and stays inside each document (:mod:`aifactory_train.model.attention`). Layers that carry a state
from token to token (gated delta nets, Mamba, lightning attention, convolutions) do not ask it, and some models bring an
attention of their own that never sees a mask from us. Both train a wrong model without an error. So at start a small
copy of the model (the same classes, every kind of layer, random weights, fp32, CPU) computes two documents as training
would compute them, and each of them alone with transformers' own eager attention. Packs that differ are not used: one
document a row then. A model that differs even alone computes as transformers has it, one document a row. Where that is
no help either, or earlier logits move when a later token changes, it is refused by name.

The verdict is kept in the cache, by the configuration and the versions of what computed it.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from aifactory_train import __version__
from aifactory_train.config.loading import cache_dir
from aifactory_train.core.errors import UserError
from aifactory_train.core.files import write_atomic
from aifactory_train.model.attention import Documents, register
from aifactory_train.model.causal_lm import Forward
from aifactory_train.model.small_copy import (
    FIRST_TOKEN,
    VOCABULARY,
    WINDOWS,
    NotSmallError,
    as_trained,
    is_count,
    one_line,
    plain_and_logits,
    quietly,
    small_plain,
    text_part,
)

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.model.causal_lm import CausalLM

#: Largest difference between equal logits, as a part of the largest logit.
TOLERANCE = 1e-5
#: A window that the small model is given to see whether it is kept to.
SMALL_WINDOW = 8

PACKED, PADDED, REFUSED = "packed", "padded", "refused"
OURS: Literal["ours"] = "ours"
OWN: Literal["own"] = "own"

#: Of the whole configuration, what does not decide how positions are mixed.
_UNIMPORTANT = re.compile(
    r"(_name_or_path|transformers_version|d?type|torch_dtype|architectures|vocab_size|id2label|label2id|use_cache|output_.*"
    r"|.*_token_id|.*dropout.*|initializer_range|auto_map|_.*|quantization_config)$"
)


@dataclass(frozen=True)
class PositionVerdict:
    """How a model may be trained: ``batching`` is ``packed``, ``padded`` (one document a row) or ``refused``, ``why``
    the finding.

    ``limits``: keys of the configuration whose window our attention does not keep to, with the most tokens that a
    document may have. ``error``: what is raised where ``batching`` is ``refused``. ``attention``: ``own`` where the
    model has to compute as transformers has it.
    """

    batching: str
    why: str
    limits: dict[str, int]
    error: dict[str, str | None] | None = None
    attention: str = OURS

    def raise_refusal(self, sequence_length: int) -> None:
        """Raise the :class:`UserError` of a model, or of a length of documents, that would be trained wrongly."""
        if self.error is not None:
            raise UserError(str(self.error["error"]), where=self.error["where"], fix=self.error["fix"])
        for name, most in self.limits.items():
            if sequence_length > most:
                raise UserError(
                    f"this model attends over {most} tokens in some layers ({name}), and our attention does not "
                    f"compute that limit",
                    where="data.sequence_length",
                    fix=f"--set data.sequence_length={most}",
                )


def check(recipe: Recipe, folder: Path, *, device: str) -> PositionVerdict:
    """The verdict on the model in ``folder``: from the cache, or found on a small copy (seconds). Raises where it must
    be refused.
    """
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports DeepSpeed where it is installed
    from aifactory_train.model.loading import load_config

    config, own = load_config(folder, recipe), recipe.model.attention == OWN
    file = cache_dir() / "position-checks" / f"{config.model_type}-{_key(config)}{'-own' if own else ''}.json"
    verdict = _known(file)
    if verdict is None:
        verdict = examine(config, trust_remote_code=recipe.model.trust_remote_code, own=own)
        with contextlib.suppress(OSError, UserError):  # a cache that cannot be written costs the same seconds next time
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, json.dumps(asdict(verdict), indent=1) + "\n")
    verdict.raise_refusal(recipe.data.sequence_length)
    return verdict


def settle(recipe: Recipe, verdict: PositionVerdict) -> tuple[str, str, str]:
    """Put ``verdict`` into ``recipe``: packs that the model cannot keep apart become one document a row, which is the
    same curve.

    Returns the line of the start-up report. Raises :class:`UserError` where the recipe asks for a kernel of ours and
    the model computes by its own attention alone.
    """
    if verdict.attention == OWN and recipe.model.attention != OWN:
        if recipe.model.attention != "auto":
            raise UserError(
                f"this model cannot use our attention: {verdict.why}",
                where=f"model.attention: {recipe.model.attention}",
                fix="--set model.attention=auto (then it computes as transformers has it, one document a row)",
            )
        recipe.model.attention = OWN
    if verdict.batching != PADDED or recipe.data.batching != PACKED:
        return "documents", f"{recipe.data.batching}; compared with each alone on a small copy", verdict.why
    recipe.data.batching = "padded"
    return "documents", "one document a row (data.batching padded)", verdict.why


def _known(file: Path) -> PositionVerdict | None:
    """The verdict kept in ``file``; None if there is none that can be read."""
    try:
        return PositionVerdict(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _key(config: Any) -> str:
    """Digest of the configuration's structure, the versions, and the code that was examined."""
    import transformers

    from aifactory_train.kernels.attention import blocks, op
    from aifactory_train.model import attention, recurrent, small_copy
    from aifactory_train.model import causal_lm as model

    tree = _structure(config.to_dict())
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode())
    digest.update(f"{type(config).__qualname__} {transformers.__version__} {torch.__version__} {__version__}".encode())
    if type(config).__module__.startswith("transformers_modules"):
        digest.update(type(config).__module__.encode())  # the model's own code: its folder and revision are in the name
    for module in (attention, model, recurrent, small_copy, blocks, op):
        digest.update(Path(str(module.__file__)).read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()[:24]


def _structure(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {str(k): _structure(v) for k, v in tree.items() if not _UNIMPORTANT.fullmatch(str(k))}
    return [_structure(v) for v in tree] if isinstance(tree, (list, tuple)) else tree


# ---- the comparison


def examine(config: Any, *, trust_remote_code: bool = False, own: bool = False) -> PositionVerdict:
    """Build a small copy of ``config``'s model and compare (nothing is cached, nothing raised but by faults of this
    module). ``own``: the recipe asks for the model's own attention.
    """
    register()
    name = config.model_type
    with quietly(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        try:
            small, plain, tokens, expected = small_plain(config, trust_remote_code)
        except NotSmallError as error:
            why = f"{name} could not be checked on a small copy ({error}), so it computes as transformers has it"
            return PositionVerdict(PADDED, why, {}, attention=OWN)
        verdict = None
        if not own:
            verdict = _tried(
                name, lambda: _compare(name, as_trained(small, plain, trust_remote_code), tokens, expected)
            )
            if verdict.batching != REFUSED:
                return replace(verdict, limits=_limits(config, small, trust_remote_code))
        as_it_is = _tried(name, lambda: _compare_own(name, small, plain, tokens, expected, trust_remote_code))
        if as_it_is.batching != REFUSED and verdict is not None:
            return replace(as_it_is, why=f"with our attention {verdict.why}")
        return as_it_is


def _tried(name: str, compare: Callable[[], PositionVerdict]) -> PositionVerdict:
    try:
        return compare()
    except UserError as error:
        return PositionVerdict(REFUSED, error.what, {}, error.as_dict())
    except Exception as error:  # whatever the model's code raises: the same would end the training
        return _refused(name, f"its forward pass does not run as training calls it ({one_line(error)})")


def _compare_own(
    name: str, small: Any, plain: nn.Module, tokens: list[torch.Tensor], expected: list[torch.Tensor], trust: bool
) -> PositionVerdict:
    """The same with the model's own attention, which knows nothing of packs."""
    model = as_trained(small, plain, trust, own=True)
    _learns(model, tokens)
    verdict = _alone(name, model, tokens, expected) or _in_rows(name, model, tokens, expected, "")
    return replace(verdict, attention=OWN) if verdict.batching == PADDED else verdict


def _refused(name: str, why: str) -> PositionVerdict:
    error = UserError(
        f"models of type '{name}' cannot be trained here: {why}",
        where="model.base",
        fix="use a base model of another type (docs/data.md, 'Which models')",
    )
    return PositionVerdict(REFUSED, why, {}, error.as_dict())


def _far(found: torch.Tensor, wanted: torch.Tensor, scale: float) -> float:
    """The largest difference, as a part of ``scale``; infinite where it is no number."""
    difference = float((found - wanted).abs().max()) / scale
    return difference if difference == difference else float("inf")


def _scale(expected: list[torch.Tensor]) -> float:
    return max(float(e.abs().max()) for e in expected) or 1.0


def _alone(
    name: str, model: CausalLM, tokens: list[torch.Tensor], expected: list[torch.Tensor]
) -> PositionVerdict | None:
    """The refusal of a model that is wrong on a document alone; ``expected``: the logits ``[n, V]`` of each document
    alone, by transformers.
    """
    scale = _scale(expected)
    alone = [_logits(model, t[None], [len(t)]) for t in tokens]
    changed = tokens[1].clone()
    cut = len(changed) // 2
    changed[cut:] = (changed[cut:] - FIRST_TOKEN + 17) % (VOCABULARY - FIRST_TOKEN) + FIRST_TOKEN
    ahead = _far(_logits(model, changed[None], [len(changed)])[:cut], alone[1][:cut], scale)
    if ahead > TOLERANCE:
        return _refused(
            name, f"it sees the future: logits change by {ahead:.1g} of the largest when later tokens change"
        )
    worst = max(_far(a, e, scale) for a, e in zip(alone, expected, strict=True))
    if worst > TOLERANCE:
        return _refused(
            name, f"its logits differ by {worst:.1g} of the largest from those of transformers' own attention"
        )
    return None


def _learns(model: CausalLM, tokens: list[torch.Tensor]) -> None:
    """Run a document forward and backward as a step does; whatever the model's code raises is passed on. Some models
    compute otherwise in training than in evaluation, or reach their weights by no gradient.
    """
    was = [parameter.requires_grad for parameter in model.parameters()]
    model.train()
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            model.requires_grad_(True)
            length = len(tokens[1])
            place, bounds = torch.arange(length)[None], torch.tensor([0, length], dtype=torch.int32)
            hidden = model(tokens[1][None], place, Documents.of(bounds, "cpu"), task=Forward.HIDDEN)
            hidden.float().square().sum().backward()
    finally:
        model.eval()
        for parameter, wanted in zip(model.parameters(), was, strict=True):
            parameter.requires_grad_(wanted)
            parameter.grad = None


def _compare(name: str, ours: CausalLM, tokens: list[torch.Tensor], expected: list[torch.Tensor]) -> PositionVerdict:
    """Each document alone, then both in one pack, then in rows."""
    _learns(ours, tokens)
    refused = _alone(name, ours, tokens, expected)
    if refused is not None:
        return refused
    try:
        packed = _logits(ours, torch.cat(tokens)[None], [len(t) for t in tokens])
        leak = _far(packed, torch.cat(expected), _scale(expected))
    except Exception as error:  # rows may do what a pack cannot
        return _in_rows(name, ours, tokens, expected, f"{name} cannot compute a pack ({one_line(error)})")
    if leak > TOLERANCE:
        why = f"{name} does not keep the documents of a pack apart (logits off by {leak:.1g} of the largest)"
        return _in_rows(name, ours, tokens, expected, why)
    kept = sorted({type(ours.backbone.get_submodule(n)).__name__ for n in ours.stateful})
    apart = f", {', '.join(kept)} are run on each document" if kept else ""
    return PositionVerdict(PACKED, f"documents of a pack do not see each other{apart}", {})


def _in_rows(
    name: str, model: CausalLM, tokens: list[torch.Tensor], expected: list[torch.Tensor], why: str
) -> PositionVerdict:
    """One document a row, padded behind: the verdict with the reason ``why``, or the refusal."""
    width = max(len(t) for t in tokens)
    rows = torch.full((len(tokens), width), FIRST_TOKEN)
    for row, t in zip(rows, tokens, strict=True):
        row[: len(t)] = t
    padded = _logits(model, rows, [width] * len(tokens)).view(len(tokens), width, -1)
    worst = max(_far(p[: len(e)], e, _scale(expected)) for p, e in zip(padded, expected, strict=True))
    if worst > TOLERANCE:
        return _refused(
            name, f"its documents see each other, packed and in rows of their own (by {worst:.1g} of the largest logit)"
        )
    return PositionVerdict(PADDED, why, {})


def _logits(ours: CausalLM, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """``[B * T, V]`` by the way that training takes: ids ``[B, T]`` whose documents have ``lengths``."""
    positions = torch.cat([torch.arange(n) for n in lengths]).view(ids.shape)
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0)
    return ours(ids, positions, Documents.of(bounds, "cpu"), torch.arange(ids.numel()), task=Forward.LOGITS)


def _limits(config: Any, small: Any, trust_remote_code: bool) -> dict[str, int]:
    """Windows of ``config`` that our attention would leave out in silence, and their lengths; tried on the ``small``
    copy.
    """
    found: dict[str, int] = {}
    for name, real in sorted(
        (n, v) for n, v in vars(text_part(config)).items() if WINDOWS.fullmatch(n) and is_count(v)
    ):
        narrow = copy.deepcopy(small)
        try:
            setattr(text_part(narrow), name, SMALL_WINDOW)
            plain, tokens, expected = plain_and_logits(narrow, trust_remote_code)
        except Exception:  # not a window that a model can be built with: then it is none of attention
            continue
        wide = [e for e, t in zip(expected, tokens, strict=True) if len(t) > SMALL_WINDOW]
        try:
            model = as_trained(narrow, plain, trust_remote_code)
            alone = [_logits(model, t[None], [len(t)]) for t in tokens if len(t) > SMALL_WINDOW]
        except UserError:
            continue  # attention refuses longer documents itself
        except Exception:  # plain transformers computes it, this way of calling does not
            found[name] = real
            continue
        if any(float((a - e).abs().max()) > TOLERANCE * float(e.abs().max()) for a, e in zip(alone, wide, strict=True)):
            found[name] = real
    return found
