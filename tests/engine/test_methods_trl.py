"""DPO, IPO, KTO, ORPO, SimPO, CPO and distillation of one batch are what TRL's trainers compute of it. TRL is the peer:
its own models, masks and losses run.
"""

from __future__ import annotations

import math
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from test_distill import V as VOCABULARY
from test_distill import problem, stored, taught
from test_methods import prepared, write_preferences

from aifactory_train.data import collate
from aifactory_train.methods.pairs import LabelledTokens, Mismatched, PairedTokens
from aifactory_train.methods.preference import Preference
from aifactory_train.model.attention import PER_DOCUMENT, register
from aifactory_train.model.causal_lm import CausalLM
from aifactory_train.model.loss import linear_cross_entropy
from aifactory_train.model.objective import TokenNLL
from aifactory_train.model.top_logps import DistillObjective
from aifactory_train.parallel.batches import device_batch

pytestmark = pytest.mark.filterwarnings("ignore")
BETA, ROWS = 0.3, np.arange(6)


@pytest.fixture(scope="module", autouse=True)
def offline() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        pytest.importorskip("trl", reason="pip install trl")
        yield


def model_of(seed: int) -> Any:
    """A model with opinions: larger (tied) embeddings spread its logits, so that two seeds differ by many nats an
    answer.
    """
    model = helpers.tiny_model("llama", seed=seed)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(8)
    return model


def trainer(kind: str, folder: Path, model_dir: Path, **settings: Any) -> Any:
    """TRL's trainer of a policy with a reference that is another model, so that log-ratios are large."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    configs = {"dpo": trl.DPOConfig, "kto": trl.KTOConfig, "orpo": ORPOConfig, "cpo": CPOConfig}
    trainers = {"dpo": trl.DPOTrainer, "kto": trl.KTOTrainer, "orpo": ORPOTrainer, "cpo": CPOTrainer}
    rows = [{"prompt": f"Q{i}", "chosen": " yes", "rejected": " no"} for i in range(4)]
    if kind == "kto":
        rows = [{"prompt": f"Q{i}", "completion": " yes", "label": i % 2 == 0} for i in range(4)]
    options = {"use_cpu": True, "bf16": False, "report_to": [], "gradient_checkpointing": False, "disable_tqdm": True}
    if kind == "kto":
        options["per_device_train_batch_size"] = 4
    args = configs[kind](output_dir=str(folder / "trl"), beta=BETA, **options, **settings)
    models = {"model": model_of(0)}
    if kind in ("dpo", "kto"):
        models["ref_model"] = model_of(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        return trainers[kind](**models, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def padded(dataset: Any, documents: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, attention mask, mask of the supervised tokens) of documents, as TRL collates them."""
    parts = [(torch.from_numpy(dataset.tokens(int(i))), torch.from_numpy(dataset.mask(int(i)))) for i in documents]
    ids = torch.nn.utils.rnn.pad_sequence([t for t, _ in parts], batch_first=True, padding_value=3)
    attention = torch.nn.utils.rnn.pad_sequence([torch.ones_like(t) for t, _ in parts], batch_first=True)
    carries = torch.nn.utils.rnn.pad_sequence([m.long() for _, m in parts], batch_first=True)
    return ids, attention, carries


def wrapped(seed: int) -> CausalLM:
    register()
    model = model_of(seed)
    model.set_attn_implementation(PER_DOCUMENT)
    return CausalLM(model, 16)


def log_probabilities(core: CausalLM, dataset: Any, documents: Any) -> np.ndarray:
    found = []
    for document in documents:
        batch = device_batch(collate(dataset, [int(document)], "packed", 3), "cpu")
        found.append(-float(core(**{**batch.kwargs(), "objective": TokenNLL()}).double().sum()))
    return np.asarray(found)


def ours(folder: Path, model_dir: Path, kind: str, **settings: Any) -> tuple[float, Any, Any]:
    """(mean loss of the units ``ROWS``, view, documents): one packed batch through our forward."""
    recipe, _, data = prepared(write_preferences(folder, model_dir, kind))
    for key, value in {"beta": BETA, **settings}.items():
        setattr(recipe.methods.preference, key, value)
    view = LabelledTokens(data.train) if kind == "kto" else PairedTokens(data.train, whole=True)
    method, reference, policy = Preference(recipe), wrapped(1), wrapped(0)
    documents = view.documents(ROWS)
    if kind in ("dpo", "kto"):
        method.reference.train = np.full(len(view.base), np.nan)
        method.reference.train[documents] = log_probabilities(reference, view.base, documents)
    if kind == "kto":
        mixed = Mismatched(view.base, ROWS, 256)
        both = [log_probabilities(core, mixed, range(len(ROWS))) for core in (policy, reference)]
        method.baseline = max(0.0, float((both[0] - both[1]).mean()))
        assert method.baseline > 0.1  # it matters

    class Run:
        world = type("W", (), {"device": "cpu"})
        data = type("D", (), {"train": view})
        pad_id = 3

    Run.recipe = recipe  # type: ignore[attr-defined]
    batch, used, _ = method.micro_batch(Run, ROWS)  # type: ignore[arg-type]
    assert used.tolist() == documents.tolist()
    return policy(**batch.kwargs()).item() / len(ROWS), view, documents


@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm", "ipo"])
def test_dpo(tmp_path, tiny_model_dir, loss):
    mine, view, documents = ours(tmp_path, tiny_model_dir, "dpo", loss=loss)
    peer = trainer("dpo", tmp_path, tiny_model_dir, loss_type=[loss], max_length=None)
    ids, attention, carries = padded(view.base, [*documents[0::2], *documents[1::2]])
    with torch.no_grad():
        theirs = peer.compute_loss(
            peer.model, {"input_ids": ids, "attention_mask": attention, "completion_mask": carries}
        )
    equal = 1 / (2 * BETA) ** 2 if loss == "ipo" else math.log(2)
    assert abs(mine - equal) > (0.005 if loss == "sigmoid_norm" else 0.05) * equal  # the two models do not agree
    assert mine == pytest.approx(theirs.item(), rel=1e-5)


def test_kto(tmp_path, tiny_model_dir):
    mine, view, _ = ours(tmp_path, tiny_model_dir, "kto", desirable_weight=1.5, undesirable_weight=0.5)
    peer = trainer("kto", tmp_path, tiny_model_dir, desirable_weight=1.5, undesirable_weight=0.5, max_length=None)
    names = ("input_ids", "attention_mask", "completion_mask")
    batch = dict(zip(names, padded(view.base, ROWS), strict=True))
    mixed = Mismatched(view.base, ROWS, 256)
    batch.update({f"KL_{n}": v for n, v in zip(names, padded(mixed, range(len(ROWS))), strict=True)})
    batch["label"] = torch.from_numpy(view.desirable[ROWS])
    with torch.no_grad():
        theirs = peer.compute_loss(peer.model, batch)
    assert mine == pytest.approx(theirs.item(), rel=1e-5)


def test_orpo(tmp_path, tiny_model_dir):
    """TRL's likelihood term reads the question too and weighs tokens, not answers alike; ours is the paper's equation 6
    on the answer. Everything else is compared: log-probabilities, odds ratio, and the loss that the answer's likelihood
    gives."""
    mine, view, documents = ours(tmp_path, tiny_model_dir, "orpo")
    peer = trainer("orpo", tmp_path, tiny_model_dir)
    batch: dict[str, Any] = {}
    for side, of in (("chosen", documents[0::2]), ("rejected", documents[1::2])):
        ids, attention, carries = padded(view.base, of)
        labels = ids.masked_fill(carries == 0, -100)
        batch.update({f"{side}_input_ids": ids, f"{side}_attention_mask": attention, f"{side}_labels": labels})
    batch.update(prompt_input_ids=batch["chosen_input_ids"], prompt_attention_mask=batch["chosen_attention_mask"])
    with torch.no_grad():
        _, found = peer.get_batch_loss_metrics(peer.model, batch)
    assert mine == pytest.approx(-found["logps/chosen"] - BETA * found["log_odds_ratio"], rel=1e-5)


@pytest.mark.parametrize(
    "kind, own, theirs",
    [
        ("simpo", {"gamma": 0.4}, {"loss_type": "simpo", "simpo_gamma": 0.4, "cpo_alpha": 0.0}),
        (
            "simpo",
            {"gamma": 0.0, "nll_weight": 0.7, "label_smoothing": 0.1},
            {"loss_type": "simpo", "simpo_gamma": 0.0, "cpo_alpha": 0.7, "label_smoothing": 0.1},
        ),
        ("cpo", {"nll_weight": 0.0, "label_smoothing": 0.2}, {"cpo_alpha": 0.0, "label_smoothing": 0.2}),
        ("cpo", {"nll_weight": 1.0}, {"cpo_alpha": 1.0}),
    ],
)
def test_simpo_and_cpo(tmp_path, tiny_model_dir, kind, own, theirs):
    """TRL's likelihood term is a mean over a batch's tokens, ours one over each answer's: batches of one pair are the
    same."""
    mine, view, documents = ours(tmp_path, tiny_model_dir, kind, **own)
    peer = trainer("cpo", tmp_path, tiny_model_dir, **theirs)
    losses = []
    for chosen, rejected in documents.reshape(-1, 2):
        batch: dict[str, Any] = {}
        for side, of in (("chosen", chosen), ("rejected", rejected)):
            ids, attention, carries = padded(view.base, [of])
            labels = ids.masked_fill(carries == 0, -100)
            batch.update({f"{side}_input_ids": ids, f"{side}_attention_mask": attention, f"{side}_labels": labels})
        with torch.no_grad():
            losses.append(float(peer.get_batch_loss_metrics(peer.model, batch)[0]))
    assert mine == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_every_token_kept_but_one_is_trls_generalised_jsd():
    """With a rest of one token nothing is grouped: TRL's loss of the whole distributions is the same number."""
    from trl.experimental.gkd import GKDTrainer

    hidden, weight, targets = problem(0.4)
    student = problem(0.4, seed=2)[1]
    for beta, temperature in ((0.5, 1.0), (0.2, 2.0)):
        ids, teacher = stored(taught(hidden, weight, targets, VOCABULARY - 1, temperature))
        sums = torch.zeros(2, dtype=torch.float64)
        objective = DistillObjective("js", beta, temperature, 1.0, ids, teacher, sums)
        mine = objective.loss(partial(linear_cross_entropy, hidden, student, targets)) / temperature**2
        theirs = GKDTrainer.generalized_jsd_loss(
            (hidden @ student.T)[None], (hidden @ weight.T)[None], beta=beta, temperature=temperature, reduction="sum"
        )
        assert mine.item() == pytest.approx(theirs.item(), rel=1e-5)
