"""What a recipe minimises, in words for the record."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aifactory_train.config.distill_block import DistillConfig
    from aifactory_train.config.grpo_block import GrpoConfig
    from aifactory_train.config.head_block import HeadConfig
    from aifactory_train.config.schema import Recipe


def objective(recipe: Recipe) -> str:
    """What the training minimises, in words for the record: method, its settings, replay, noise."""
    how, methods = recipe.methods.preference, recipe.methods
    over = "assistant turns" if recipe.data.supervise == "assistant" else "all tokens"
    likelihood = f"next-token cross-entropy over {over}"
    replayed = [source.share for source in recipe.data.train if source.share is not None]
    if methods.head is not None:
        parts = [_of_head(methods.head)]
    elif methods.grpo is not None:
        parts = [_of_grpo(methods.grpo)]
    elif how is None:
        parts = [likelihood if methods.distill is None else _of_distill(methods.distill, likelihood)]
        if methods.goldfish is not None:
            parts.append(f"one token in {methods.goldfish.k} withheld (goldfish loss, arXiv 2406.10209)")
        if replayed:
            parts.append(f"{sum(replayed):.3g} of the tokens replayed")
    else:
        reference = "relative to the model before its first step"
        ipo = how.kind == "dpo" and how.loss == "ipo"
        scale = f"beta {how.beta:g}" + (f", label smoothing {how.label_smoothing:g}" if how.label_smoothing else "")
        nll = f" and {how.nll_weight:g} x likelihood of chosen answers" if how.nll_weight else ""
        names = {
            "dpo": f"{'identity' if ipo else 'direct'} preference optimisation of pairs ({'IPO' if ipo else 'DPO'}, "
            f"{scale}{', a mean over tokens' if how.loss == 'sigmoid_norm' else ''}) {reference}",
            "simpo": f"margin of pairs by mean log-probability of a token (SimPO, {scale}, gamma {how.gamma:g}){nll}",
            "cpo": f"margin of pairs by log-probability (CPO, {scale}){nll}",
            "orpo": f"likelihood of chosen answers and {how.beta:g} x their log odds ratio to rejected ones (ORPO)",
            "kto": f"prospect-theoretic value of rated answers (KTO, beta {how.beta:g}, weights "
            f"{how.desirable_weight:g} and "
            f"{how.undesirable_weight:g}) {reference}",
        }
        parts = [names[how.kind]]
        if replayed:
            parts.append(f"{how.replay_weight:g} x {likelihood} of replayed rows ({sum(replayed):.3g} of the tokens)")
    if methods.neftune is not None:
        parts.append(f"noise on the embeddings (NEFTune, alpha {methods.neftune.alpha:g})")
    # A block without words of its own is named with its settings: the record never calls another loss plain
    # cross-entropy.
    for name, block in methods:
        if block is not None and name not in ("preference", "head", "distill", "grpo", "goldfish", "neftune"):
            settings = ", ".join(f"{key} {value}" for key, value in block.model_dump().items())
            parts.append(f"changed by methods.{name} ({settings})")
    return "; ".join(parts)


def _of_head(head: HeadConfig) -> str:
    """The loss of a head, in words."""
    weighted = {True: "", False: ", labels weighted"}[head.class_weights is None]
    if head.kind == "reward":
        return (
            "likelihood of the order of pairs (Bradley-Terry) by the rewards of a linear head on the last token, "
            "a mean over pairs"
        )
    if head.kind == "embedding":
        sizes = (
            "" if head.matryoshka is None else f" of the first {', '.join(map(str, head.matryoshka))} dimensions, too"
        )
        likeness = "cosine" if head.normalise else "dot product"
        return (
            f"cross-entropy of a query's positive among all positives and negatives of the step ({likeness} / "
            f"{head.temperature:g}, {head.pooling.replace('_', ' ')} pooling){sizes}, a mean over queries"
        )
    names = {
        "classification": f"cross-entropy of one label a document{weighted}",
        "multi_label": f"binary cross-entropy of each label, a mean over labels{weighted}",
    }
    return f"{names[head.kind]}, by a linear head on the last token, a mean over documents"


def _of_distill(how: DistillConfig, likelihood: str) -> str:
    """A mix with the divergence from a teacher, in words."""
    names = {
        "forward_kl": "Kullback-Leibler divergence of the student from the teacher",
        "reverse_kl": "Kullback-Leibler divergence of the teacher from the student",
        "js": f"generalised Jensen-Shannon divergence, beta {how.beta:g},",
    }
    return (
        f"{1 - how.weight:g} x {likelihood} and {how.weight:g} x {names[how.loss]} to the stored log-probabilities of "
        f"{how.teacher} (the {how.top_k} likeliest tokens and the rest together, temperature {how.temperature:g})"
    )


def _of_grpo(grpo: GrpoConfig) -> str:
    """The loss of GRPO, in words."""
    rewards = " + ".join(f"{reward.weight:g} x {reward.name}" for reward in grpo.reward)
    mean = {"grpo": "answers", "dapo": "tokens", "dr_grpo": "answers of a fixed length"}[grpo.loss]
    scaled = "over the standard deviation of its group" if grpo.scale == "group" else "not scaled"
    kl = f", {grpo.kl:g} x KL divergence from the model before its first step" if grpo.kl else ""
    return (
        f"clipped policy gradient of rewards ({rewards}) of {grpo.group} sampled answers to each prompt, advantage "
        f"{scaled}, ratio of the {grpo.ratio} cut at {1 - grpo.clip:g} and {1 + grpo.high:g}, a mean over {mean} "
        f"(GRPO){kl}"
    )
