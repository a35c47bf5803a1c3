"""Rules that tie several keys of a recipe together, each with the message and the way out."""

from __future__ import annotations

from aifactory_train.config.distill_block import check_distill
from aifactory_train.config.grpo_block import check_grpo
from aifactory_train.config.head_block import check_head
from aifactory_train.config.preference_block import OF_PAIRS, check_preference
from aifactory_train.config.schema import RULES, Recipe


@RULES.append
def cross_checks(recipe: Recipe) -> Recipe:
    """Every rule that ties several keys together. The text before ':' is the key that the message points to."""
    train, data = recipe.train, recipe.data
    if train.batch_rows is not None and train.batch_tokens is not None:
        raise ValueError("train.batch_tokens: give batch_rows or batch_tokens, not both")
    if train.batch_rows is None and train.batch_tokens is None:
        # Object-level write: validate_assignment would run this validator again.
        train.__dict__["batch_rows"] = 16
    if train.batch_tokens is not None and train.batch_tokens < data.sequence_length:
        raise ValueError(
            f"train.batch_tokens: {train.batch_tokens} is less than data.sequence_length {data.sequence_length}; a "
            f"document would not fit"
        )
    if train.grad_accum != "auto" and train.grad_accum < 1:
        raise ValueError("train.grad_accum: must be 'auto' or at least 1")
    if train.grad_accum == "auto" and train.micro_batch_tokens < data.sequence_length:
        raise ValueError(
            f"train.micro_batch_tokens: {train.micro_batch_tokens} is less than data.sequence_length "
            f"{data.sequence_length}; "
            "a document would not fit"
        )
    if recipe.adapter.quantise_base != "none" and recipe.adapter.kind == "none":
        raise ValueError("adapter.quantise_base: a 4-bit base cannot be trained itself; choose adapter.kind lora")
    _check_methods(recipe)
    if recipe.methods.grpo is not None:
        check_grpo(recipe)
    if recipe.eval.early_stopping and not recipe.eval.every_steps:
        raise ValueError("eval.early_stopping: needs eval.every_steps")
    if recipe.parallel.shard_size and recipe.parallel.engine not in ("hsdp", "auto"):
        raise ValueError(f"parallel.shard_size: has no meaning for engine {recipe.parallel.engine}")
    size, shard = recipe.parallel.shard_size, recipe.parallel.dims.shard
    if size and shard and size != shard:
        raise ValueError(
            f"parallel.dims.dp_shard: {shard}, and parallel.shard_size is {size}: they are one setting, give one"
        )
    _check_optimizer(recipe)
    _check_positions(recipe)
    return recipe


def _check_positions(recipe: Recipe) -> None:
    """What goes with positions that are not the base's own."""
    if recipe.model.rope_scaling is not None:
        if recipe.adapter.kind != "none" and not recipe.export.merge:
            raise ValueError(
                "model.rope_scaling: an adapter does not fit the original base, which has other positions: set "
                "export.merge, or adapter.kind none"
            )
        if recipe.model.start_from:
            raise ValueError("model.rope_scaling: the earlier run of model.start_from has its own positions")


def _check_optimizer(recipe: Recipe) -> None:
    """What goes with the optimizer, and what only another one has."""
    train = recipe.train
    if train.momentum and train.optimizer != "sgd":
        raise ValueError("train.momentum: belongs to optimizer sgd")
    if train.optimizer == "muon" and recipe.adapter.kind != "none":
        raise ValueError(
            "train.optimizer: muon is for the matrices of the model, and with an adapter none of them is trained: set "
            "adapter.kind none, or train.optimizer adamw"
        )
    if train.optimizer == "schedule_free_adamw":
        if train.schedule != "constant":
            raise ValueError(
                f"train.schedule: schedule_free_adamw takes a mean of the weights in place of a falling rate, and "
                f"{train.schedule} falls: set train.schedule constant (a warm-up is fine)"
            )
        if not train.betas[0]:
            raise ValueError("train.betas: schedule_free_adamw needs a first beta above 0")
        if train.average is not None:
            raise ValueError("train.average: schedule_free_adamw evaluates and exports a mean already")
    if train.lora_plus_ratio is not None and recipe.adapter.kind == "none":
        raise ValueError("train.lora_plus_ratio: adapter.kind none has no adapters")


def _check_methods(recipe: Recipe) -> None:
    """Rules of ``methods`` and replay; sources of a preference method get its form of rows."""
    methods, data = recipe.methods, recipe.data
    if recipe.model.vocabulary is not None:
        if recipe.adapter.kind != "none" and not (recipe.adapter.train_embeddings and recipe.export.merge):
            raise ValueError(
                "model.vocabulary: new tokens need trained embeddings, and an adapter does not fit the original base: "
                "set "
                "adapter.kind none, or adapter.train_embeddings and export.merge"
            )
        if recipe.model.start_from:
            raise ValueError("model.vocabulary: the earlier run of model.start_from has its own vocabulary")
        if recipe.model.vocabulary.train == "new" and recipe.train.weight_decay:
            raise ValueError(
                "train.weight_decay: shrinks every row of an output layer; model.vocabulary.train new needs 0"
            )
    if all(source.share is not None for source in data.train):
        raise ValueError("data.train: every source has a share; the rows that are to be learnt need none")
    if sum(source.share or 0 for source in data.train) >= 1:
        raise ValueError("data.train: the shares of replayed sources add up to 1 or more")
    chosen = [name for name, block in methods if block is not None and name not in methods.ADDITIONS]
    if len(chosen) > 1:
        raise ValueError(f"methods: {' and '.join(chosen)} are each a training method of their own; keep one block")
    if methods.head is not None:
        check_head(recipe)
        return
    if methods.distill is not None:
        check_distill(recipe)
    if any(source.format in ("label", "labels", "retrieval") for source in [*data.train, *(data.eval or [])]):
        raise ValueError("data.train: rows of format label, labels or retrieval are what methods.head learns from")
    preference = methods.preference
    wanted = None if preference is None else ("feedback" if preference.kind == "kto" else "preference")
    for source in [*data.train, *(data.eval or [])]:
        if wanted and source.share is not None and source.format not in ("preference", "feedback"):
            continue  # replayed rows are imitated
        if wanted and source.share is not None:
            raise ValueError("data.train: a replayed source (share) has rows to imitate: messages, prompt or text")
        if wanted and source.format == "auto":
            source.__dict__["format"] = wanted  # object-level write, as above
        if source.format in ("preference", "feedback") and source.format != wanted:
            needed = " or ".join(OF_PAIRS) if source.format == "preference" else "kto"
            raise ValueError(f"methods.preference: rows of format {source.format} need kind {needed}")
        if preference is not None and source.format != wanted:
            raise ValueError(
                f"methods.preference: {preference.kind} needs rows of format {wanted}, not {source.format}; "
                "a source of data.train that is to be imitated beside them is replayed: give it a share"
            )
    _check_best_by(recipe)
    if preference is None:
        return
    if methods.goldfish is not None:
        raise ValueError("methods.goldfish: withholds tokens from next-token loss and has no meaning for preferences")
    check_preference(preference)
    if preference.replay_weight != 1.0 and all(source.share is None for source in data.train):
        raise ValueError("methods.preference.replay_weight: no source of data.train has a share, nothing is replayed")


def _check_best_by(recipe: Recipe) -> None:
    """``eval.best_by`` names a figure that the recipe's method has."""
    by, preference = recipe.eval.best_by, recipe.methods.preference
    if by in ("preference_loss", "reward_accuracy") and preference is None:
        raise ValueError(f"eval.best_by: {by} needs methods.preference")
    if by == "ndcg_at_10":
        raise ValueError("eval.best_by: ndcg_at_10 needs methods.head of kind embedding")
    if by == "reward_accuracy" and preference is not None and preference.kind == "kto":
        raise ValueError("eval.best_by: reward_accuracy is of pairs; kto judges answers one by one")
