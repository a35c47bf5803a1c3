"""What a model's layers do with several documents in one row, found out before training rather than believed.

Attention is ours and stays inside each document (:mod:`aifactory_train.model.attention`). Layers that carry a state
from token to token (gated delta nets, Mamba, lightning attention, convolutions) do not ask it, and some models bring an
attention of their own that never sees a mask from us. Both train a wrong model without an error. So at start a small
copy of the model (the same classes, every kind of layer, random weights, fp32, CPU) computes two documents as training
would compute them, and each of them alone with transformers' own eager attention. Packs that differ are not used: one
document a row then. A model that differs even alone, or whose earlier logits move when a later token changes, is
refused by name.

The verdict is kept in the cache, by the configuration and the versions of what computed it.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from aifactory_train import __version__
from aifactory_train.config.loading import cache_dir
from aifactory_train.core.errors import UserError
from aifactory_train.core.files import write_atomic
from aifactory_train.model.attention import PER_DOCUMENT, Documents, register
from aifactory_train.model.causal_lm import Forward

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.model.causal_lm import CausalLM

#: Largest difference between equal logits, as a part of the largest logit.
TOLERANCE = 1e-5
#: Tokens of the two documents; a window that the small model is given to see whether it is kept to.
LENGTHS, SMALL_WINDOW = (13, 24), 8
VOCABULARY, FIRST_TOKEN = 128, 8
#: A copy with more parameters than this is not small.
MOST_PARAMETERS = 100_000_000

PACKED, PADDED, REFUSED = "packed", "padded", "refused"

_LAYERS = re.compile(r"(num_(hidden_|decoder_|encoder_)?layers|n_layers?|(decoder|encoder)_layers|depth|num_blocks)$")
_HEADS = re.compile(r"(.*_)?(n_heads?|num_heads|num_attention_heads|attention_heads)$")
_MORE_HEADS = re.compile(
    r"(.*_)?(num_key_value_heads|num_kv_heads|n_head_kv|n_heads_kv|kv_heads|num_key_heads|num_value_heads|n_groups|ngroups)$"
)
_WIDTHS = re.compile(
    r"(hidden_size|n_embd|d_model|dim|embed_dim|embedding_size|hidden_dim|word_embed_proj_dim|lru_width|attention_hidden_size"
    r"|dim_model|d_embed|emb_dim|embedding_dim|mamba_d_ssm|mamba_intermediate_size|hidden_size_per_layer_input)$"
)
_INNER = re.compile(r".*(intermediate|ffn_dim|n_inner|d_ff|dim_ff|feed_forward|ffn_hidden|d_inner|mlp_hidden|dff).*")
_EXPERTS = re.compile(r"(moe_)?(num_experts|num_local_experts|n_routed_experts|num_routed_experts|n_experts)$")
_CHOSEN = re.compile(r"(moe_)?(num_experts_per_tok|top_?k|topk|num_experts_per_token|k)$")
_WINDOWS = re.compile(r".*(window|chunk_size|local_attention|attention_span).*")
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
    document may have. ``error``: what is raised where ``batching`` is ``refused``.
    """

    batching: str
    why: str
    limits: dict[str, int]
    error: dict[str, str | None] | None = None

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

    config = load_config(folder, recipe)
    file = cache_dir() / "position-checks" / f"{config.model_type}-{_key(config)}.json"
    verdict = _known(file)
    if verdict is None:
        verdict = examine(config, trust_remote_code=recipe.model.trust_remote_code)
        with contextlib.suppress(OSError, UserError):  # a cache that cannot be written costs the same seconds next time
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, json.dumps(asdict(verdict), indent=1) + "\n")
    verdict.raise_refusal(recipe.data.sequence_length)
    return verdict


def settle(recipe: Recipe, verdict: PositionVerdict) -> tuple[str, str, str] | None:
    """Put ``verdict`` into ``recipe``: packs that the model cannot keep apart become one document a row, which is the
    same curve.

    Returns the line of the start-up report, None where nothing changes.
    """
    if verdict.batching != PADDED or recipe.data.batching != PACKED:
        return None
    recipe.data.batching = "padded"
    return "batching", "one document a row (data.batching padded)", verdict.why


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
    from aifactory_train.model import attention
    from aifactory_train.model import causal_lm as model

    tree = _structure(config.to_dict())
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode())
    digest.update(f"{type(config).__qualname__} {transformers.__version__} {torch.__version__} {__version__}".encode())
    if type(config).__module__.startswith("transformers_modules"):
        digest.update(type(config).__module__.encode())  # the model's own code: its folder and revision are in the name
    for module in (attention, model, blocks, op):
        digest.update(Path(str(module.__file__)).read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()[:24]


def _structure(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {str(k): _structure(v) for k, v in tree.items() if not _UNIMPORTANT.fullmatch(str(k))}
    return [_structure(v) for v in tree] if isinstance(tree, (list, tuple)) else tree


# ---- the comparison


def examine(config: Any, *, trust_remote_code: bool = False) -> PositionVerdict:
    """Build a small copy of ``config``'s model and compare (nothing is cached, nothing raised but by faults of this
    module).
    """
    register()
    name = config.model_type
    with _quietly(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        try:
            small, plain, tokens, expected = _small_plain(config, trust_remote_code)
        except _NotSmallError as error:
            return PositionVerdict(
                PADDED, f"{name} could not be checked on a small copy ({error}), so its documents are kept apart", {}
            )
        try:
            ours = _ours(small, plain, trust_remote_code)
            verdict = _compare(name, ours, tokens, expected)
            if verdict.batching == REFUSED:
                return verdict
            limits = _limits(config, small, trust_remote_code)
        except UserError as error:
            return PositionVerdict(REFUSED, error.what, {}, error.as_dict())
        except Exception as error:  # whatever the model's code raises: the same would end the training
            return _refused(name, f"its forward pass does not run as training calls it ({_one_line(error)})")
    return PositionVerdict(verdict.batching, verdict.why, limits)


def _refused(name: str, why: str) -> PositionVerdict:
    error = UserError(
        f"models of type '{name}' cannot be trained here: {why}",
        where="model.base",
        fix="use a base model of another type (docs/data.md, 'Which models')",
    )
    return PositionVerdict(REFUSED, why, {}, error.as_dict())


def _compare(name: str, ours: CausalLM, tokens: list[torch.Tensor], expected: list[torch.Tensor]) -> PositionVerdict:
    """``expected``: the logits ``[n, V]`` of each document alone, by transformers."""
    scale = max(float(e.abs().max()) for e in expected) or 1.0

    def far(found: torch.Tensor, wanted: torch.Tensor) -> float:
        difference = float((found - wanted).abs().max()) / scale
        return difference if difference == difference else float("inf")

    alone = [_logits(ours, t[None], [len(t)]) for t in tokens]
    changed = tokens[1].clone()
    cut = len(changed) // 2
    changed[cut:] = (changed[cut:] - FIRST_TOKEN + 17) % (VOCABULARY - FIRST_TOKEN) + FIRST_TOKEN
    ahead = far(_logits(ours, changed[None], [len(changed)])[:cut], alone[1][:cut])
    if ahead > TOLERANCE:
        return _refused(
            name, f"it sees the future: logits change by {ahead:.1g} of the largest when later tokens change"
        )
    worst = max(far(a, e) for a, e in zip(alone, expected, strict=True))
    if worst > TOLERANCE:
        return _refused(
            name, f"its logits differ by {worst:.1g} of the largest from those of transformers' own attention"
        )
    lengths = [len(t) for t in tokens]
    packed = _logits(ours, torch.cat(tokens)[None], lengths)
    leak = far(packed, torch.cat(expected))
    if leak <= TOLERANCE:
        return PositionVerdict(PACKED, "documents of a pack do not see each other", {})
    width = max(lengths)
    rows = torch.full((len(tokens), width), FIRST_TOKEN)
    for row, t in zip(rows, tokens, strict=True):
        row[: len(t)] = t
    padded = _logits(ours, rows, [width] * len(tokens)).view(len(tokens), width, -1)
    worst = max(far(p[: len(e)], e) for p, e in zip(padded, expected, strict=True))
    if worst > TOLERANCE:
        return _refused(
            name, f"its documents see each other, packed and in rows of their own (by {worst:.1g} of the largest logit)"
        )
    why = f"{name} does not keep the documents of a pack apart (logits off by {leak:.1g} of the largest)"
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
    for name, real in sorted((n, v) for n, v in vars(_text(config)).items() if _WINDOWS.fullmatch(n) and _count(v)):
        narrow = copy.deepcopy(small)
        try:
            setattr(_text(narrow), name, SMALL_WINDOW)
            plain, tokens, expected = _plain(narrow, trust_remote_code)
        except Exception:  # not a window that a model can be built with: then it is none of attention
            continue
        wide = [e for e, t in zip(expected, tokens, strict=True) if len(t) > SMALL_WINDOW]
        try:
            ours = _ours(narrow, plain, trust_remote_code)
            alone = [_logits(ours, t[None], [len(t)]) for t in tokens if len(t) > SMALL_WINDOW]
        except UserError:
            continue  # attention refuses longer documents itself
        except Exception:  # plain transformers computes it, this way of calling does not
            found[name] = real
            continue
        if any(float((a - e).abs().max()) > TOLERANCE * float(e.abs().max()) for a, e in zip(alone, wide, strict=True)):
            found[name] = real
    return found


# ---- the small copy


class _NotSmallError(Exception):
    """No small copy of the configuration could be built and run."""


def _small_plain(config: Any, trust: bool) -> tuple[Any, nn.Module, list[torch.Tensor], list[torch.Tensor]]:
    """(small configuration, its model, tokens of each document, their logits) by transformers' own eager attention.

    Few layers if they hold every kind, else all; widths divided by the number of heads, else as they are.
    """
    kinds, _ = _kinds(config, trust)
    layers = len(kinds)
    prefix = next((n for n in range(1, layers) if set(kinds[:n]) == set(kinds)), layers)
    reasons = []
    for count, narrow in dict.fromkeys([(prefix, True), (layers, True), (prefix, False), (layers, False)]):
        try:
            small = shrunken(config, count, narrow=narrow)
            fewer, parameters = _kinds(small, trust)
            if parameters > MOST_PARAMETERS:
                raise _NotSmallError(f"{parameters / 1e6:.0f} M parameters are not few")
            if not {_coarse(k) for k in kinds} <= {_coarse(k) for k in fewer}:
                raise _NotSmallError(f"{count} layers do not hold every kind of layer")
            plain, tokens, expected = _plain(small, trust)
            return small, plain, tokens, expected
        except Exception as error:  # whatever a configuration that does not fit together raises
            reasons.append(_one_line(error))
    raise _NotSmallError(reasons[0])


def _plain(small: Any, trust: bool) -> tuple[nn.Module, list[torch.Tensor], list[torch.Tensor]]:
    plain = _build(small, "eager", trust)
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(FIRST_TOKEN, VOCABULARY, (n,), generator=generator) for n in LENGTHS]
    expected = [plain(input_ids=t[None], use_cache=False).logits[0].float() for t in tokens]
    if not all(bool(e.isfinite().all()) and float(e.std()) > 0 for e in expected):
        raise ValueError("random weights give no usable logits")
    return plain, tokens, expected


def _ours(small: Any, plain: nn.Module, trust: bool) -> CausalLM:
    """The model as training builds it, with the weights of ``plain``."""
    from aifactory_train.model.causal_lm import CausalLM

    model = _build(small, PER_DOCUMENT, trust)
    model.load_state_dict(plain.state_dict())
    return CausalLM(model).eval()


def _build(config: Any, attention: str, trust: bool, *, meta: bool = False) -> Any:
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    with torch.device("meta") if meta else contextlib.nullcontext():
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=trust
        )
    if meta:
        return model
    embeddings = {id(model.get_input_embeddings().weight)}
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.dim() > 1 and id(parameter) not in embeddings:
            parameter.mul_(2.0)  # scores spread enough for mistakes to show
        step = torch.randn(parameter.shape, generator=generator)
        parameter.add_(step, alpha=0.05 if parameter.dim() < 2 else 0.02)  # no zeros that hide a path
    return model.eval()


def _text(config: Any) -> Any:
    """The part of ``config`` that describes the language model."""
    return config.get_text_config(decoder=True)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _kinds(config: Any, trust: bool) -> tuple[list[tuple], int]:
    """(a description of each layer of ``config``'s model: classes and switches of its modules; its parameters), without
    memory.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = _build(config, "eager", trust, meta=True)
        except Exception as error:
            raise _NotSmallError(_one_line(error)) from None
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise _NotSmallError("it has no list of layers")
    wanted = next((v for k, v in vars(_text(config)).items() if _LAYERS.fullmatch(k) and _count(v)), None)
    blocks = next((m for m in lists if len(m) == wanted), max(lists, key=len))
    return [tuple(sorted(set(_describe(block)))) for block in blocks], sum(p.numel() for p in model.parameters())


def _describe(block: nn.Module) -> Iterator[tuple[str, str, tuple]]:
    for name, module in block.named_modules():
        switches = tuple(
            sorted(
                (key, "set" if value is not None and not isinstance(value, (str, bool)) else str(value))
                for key, value in vars(module).items()
                if not key.startswith("_")
                and key != "training"
                and (
                    value is None or isinstance(value, (str, bool)) or "window" in key or key in ("use_rope", "no_rope")
                )
            )
        )
        yield re.sub(r"\d+", "#", name), type(module).__name__, switches


def _coarse(kind: tuple) -> tuple:
    """A layer's kind without the switches that sizes decide."""
    return tuple((name, module) for name, module, _ in kind)


def shrunken(config: Any, layers: int, *, narrow: bool) -> Any:
    """A copy of ``config`` with ``layers`` layers, a small vocabulary, few experts, and with ``narrow`` few and narrow
    heads.
    """
    small = copy.deepcopy(config)
    text = _text(small)
    whole = next((v for k, v in vars(text).items() if _LAYERS.fullmatch(k) and _count(v)), None)
    parts = [small] + [v for v in vars(small).values() if hasattr(v, "to_dict") and hasattr(v, "model_type")]
    width = next(
        (v for k, v in vars(text).items() if k in ("hidden_size", "n_embd", "d_model", "dim") and _count(v)), 0
    )
    for part in dict.fromkeys(map(id, parts)):
        one = next(p for p in parts if id(p) == part)
        _shrink(one, whole if one is text else None, layers if one is text or one is small else 2, narrow)
    new_width = next(
        (v for k, v in vars(text).items() if k in ("hidden_size", "n_embd", "d_model", "dim") and _count(v)), 0
    )
    for one in parts:
        if one is not text:
            for key, value in list(vars(one).items()):
                if value == width and width and key.startswith(("out_", "projection", "output_dim", "text_")):
                    setattr(one, key, new_width)
    return small


def _shrink(part: Any, whole: int | None, layers: int, narrow: bool) -> None:
    values = {k: v for k, v in vars(part).items() if not k.startswith("_")}
    lists = {k: v for k, v in values.items() if isinstance(v, (list, tuple))}
    whole = whole or next((v for k, v in values.items() if _LAYERS.fullmatch(k) and _count(v)), None)
    if whole is None:
        whole = max((len(v) for k, v in lists.items() if "layer" in k), default=None)
    heads = next((v for k, v in values.items() if _HEADS.fullmatch(k) and _count(v)), 1)
    width = next((v for k, v in values.items() if _WIDTHS.fullmatch(k) and _count(v)), heads)
    # a width whose rows are aligned: torch's grouped products (experts) ask for it
    divisors = [h for h in range(2, heads + 1) if heads % h == 0]
    kept = next((h for h in divisors if (width * h // heads) % 8 == 0), divisors[0] if divisors else 1)
    factor = heads // kept if narrow else 1
    new: dict[str, Any] = {}
    for key, value in values.items():
        if key in lists:
            if "heads" in key and factor > 1 and all(map(_count, value)):
                new[key] = value = [max(1, v // factor) for v in value]
            if whole and len(value) == whole and layers < whole:
                new[key] = value[:layers]
        elif key == "quantization_config":
            new[key] = None
        elif key.endswith("token_id") and isinstance(value, int) and value >= VOCABULARY:
            new[key] = 0
        elif not _count(value):
            continue
        elif "vocab_size" in key:
            new[key] = VOCABULARY
        elif _LAYERS.fullmatch(key):
            new[key] = min(value, layers)
        elif _EXPERTS.fullmatch(key):
            new[key] = min(value, 8)
        elif _CHOSEN.fullmatch(key) or key == "n_group":
            new[key] = min(value, 2)
        elif key == "topk_group":
            new[key] = 1
        elif key == "first_k_dense_replace":
            new[key] = min(value, max(1, layers - 1))
        elif _WINDOWS.fullmatch(key):
            new[key] = max(value, 64) if "chunk_size" not in key or "attention" in key else value
        elif narrow and _INNER.fullmatch(key) and not _WIDTHS.fullmatch(key):
            new[key] = max(16, min(value // factor, 256) // 16 * 16)
        elif factor > 1 and (_HEADS.fullmatch(key) or _MORE_HEADS.fullmatch(key) or _WIDTHS.fullmatch(key)):
            new[key] = max(1, value // factor)
    for key, value in new.items():
        with contextlib.suppress(AttributeError):  # computed by the class from the others
            setattr(part, key, value)


def _one_line(error: BaseException) -> str:
    if isinstance(error, _NotSmallError):
        return str(error)
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' warnings: they speak of a configuration that the user does not have."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
