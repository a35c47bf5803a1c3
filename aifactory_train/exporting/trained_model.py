"""The trained model in fp32, as our own code computes it: what an export is compared with."""

from __future__ import annotations

from pathlib import Path

import torch

from aifactory_train.config.head_block import pooling_of
from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import RunFailed
from aifactory_train.exporting.gate import (
    reference_logits,
)
from aifactory_train.exporting.streaming import Streamed, adapter_names, all_to_meta
from aifactory_train.model.causal_lm import CausalLM
from aifactory_train.model.head import IN_ADAPTER, PARAMETER, attach_head
from aifactory_train.model.loading import build_model
from aifactory_train.model.precision import Precision
from aifactory_train.model.report import ModelReport
from aifactory_train.model.trained import adapter_tensors, load_adapter, load_tensors
from aifactory_train.model.weight_files import Source, TensorFiles
from aifactory_train.run.folder import RunFolder

#: Largest part of a model that is held at once where its weights pass one tensor at a time.
MAX_BLOCK_BYTES = 5_000_000_000
_FP32 = Precision(torch.float32, torch.float32, torch.float32, torch.float32)


class TrainedModel:
    """The trained model and its logits on the rows of the gate.

    ``core``: the model in memory; given where a training has just ended, dropped as soon as nothing needs it.
    ``why_whole``: why its weights cannot pass one tensor at a time; None: they can.
    """

    def __init__(
        self,
        run: RunFolder,
        recipe: Recipe,
        base: Path,
        trained: Source | None,
        core: CausalLM | None,
        rows: list[list[int]],
    ):
        self.run, self.recipe, self.base, self.trained, self.core, self.rows = run, recipe, base, trained, core, rows
        self.why_whole = self._why_whole()
        self._expected: list[torch.Tensor] | None = None

    def _why_whole(self) -> str | None:
        """Why the weights cannot pass one tensor at a time; None: they can."""
        from aifactory_train.model.loading import load_config
        from aifactory_train.model.weight_files import why_not

        if self.recipe.model.trust_remote_code:
            return "the model's own code decides how it is loaded"
        return why_not(load_config(self.base, self.recipe), self.base, None, torch.float32)

    def model(self) -> CausalLM:
        """The trained model: the one in memory if it is unsharded fp32 on the CPU, else rebuilt from base and
        tensors.
        """
        if self.core is not None:
            return self.core
        plain = self.recipe.model_copy(deep=True)
        plain.adapter.quantise_base = "none"
        if plain.model.attention != "own":
            plain.model.attention = "per_document"
        plain.kernels.enabled = "off"
        plain.model.start_from = None
        if self.why_whole is None:
            self.core = self._streamed(plain)
            return self.core
        core = build_model(plain, self.base, None, device="cpu", precision=_FP32, report=ModelReport())
        if self.trained is None:
            load_adapter(core, self.run.export / "adapter")
        else:
            load_tensors(core, self.trained)
        self.core = core
        return core

    def _streamed(self, plain: Recipe) -> CausalLM:
        """The same model without weights: it reads them when they are needed."""
        from aifactory_train.model.adapters import apply_adapter
        from aifactory_train.model.loading import empty_language_model
        from aifactory_train.model.weight_files import file_name_of

        bare = empty_language_model(self.base, plain, device="cpu", dtype=torch.float32, report=ModelReport())
        all_to_meta(bare)
        with torch.device("meta"):
            model = apply_adapter(bare, plain, ModelReport())
        all_to_meta(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        core = CausalLM(model, own=plain.model.attention == "own")
        attach_head(core, plain, dtype=torch.float32, report=ModelReport())
        base, trained = TensorFiles.of(self.base), self.trained
        adapter = adapter_tensors(self.run.export / "adapter") if trained is None else {}
        keys = {f"model.{p}": key for key, p in adapter_names(model).items()} if trained is None else {}
        if keys and core.head is not None:
            keys[PARAMETER] = IN_ADAPTER

        def read(name: str) -> torch.Tensor:
            if trained is not None and name in trained:
                return trained[name]
            if name in keys:
                return adapter[keys[name]]
            stored = file_name_of(name)
            if stored is None:
                raise RunFailed(f"{name} is neither trained nor in the base model", where=str(self.base))
            return base[stored]

        Streamed(core, core.language_model, read, MAX_BLOCK_BYTES)
        return core

    def expected(self) -> list[torch.Tensor]:
        """fp32 ``[places, V]`` for each gate row, from our own attention and the weights in memory."""
        if self._expected is None:
            expected = reference_logits(self.model(), self.rows, pooling_of(self.recipe))
            if expected:  # there are no rows where nothing is to be compared
                _refuse_ruined(expected, self.run)
            self._expected = expected
        return self._expected


def _refuse_ruined(expected: list[torch.Tensor], run: RunFolder) -> None:
    """Nothing can be compared with a model whose logits are not numbers, or all zero: that is what a diverged training
    leaves.
    """
    logits = torch.cat([e.flatten() for e in expected])
    if not logits.isfinite().all():
        what = "not finite (NaN or infinity)"
    elif not logits.any():
        what = "all zero"
    else:
        return
    raise RunFailed(
        f"the trained model is ruined, its logits on held-out rows are {what}: the training diverged. Nothing was "
        f"exported",
        where=str(run.path),
        fix="train again with a lower train.learning_rate (or a longer warm-up, or train.max_grad_norm), or export an "
        "earlier checkpoint: "
        f"aifactory export {run.path} --step N",
    )
