"""Whether the model continues training rows word for word."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from aifactory_train import metrics
from aifactory_train.evaluation.answers import continuations
from aifactory_train.evaluation.likelihood import choose_rows
from aifactory_train.metrics.bootstrap import packed, ratio

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.data import PreparedData, TokenDataset


#: Tokens that must be reproduced, and the fewest that make a probe worthwhile.
MEMORY_TOKENS, MEMORY_LEAST = 32, 8


def memory_probe(dataset: TokenDataset, index: int) -> tuple[list[int], list[int]] | None:
    """(prompt, continuation) of a document, cut in the middle of what carries loss; None where that is too short."""
    tokens, mask = dataset.tokens(index), dataset.mask(index)
    places = np.flatnonzero(mask)
    if len(places) < 2 * MEMORY_LEAST:
        return None
    cut = int(places[len(places) // 2])
    return tokens[:cut].tolist(), tokens[cut : cut + MEMORY_TOKENS].tolist()


def probe_memory(
    module: nn.Module, prepared: PreparedData, recipe: Recipe, figures: dict[str, Any], how: dict[str, Any]
) -> dict[str, Any]:
    """Share of training documents whose continuation the model gives word for word, and the same of held-out ones.

    Carlini et al. 2023 (arXiv 2202.07646): a text is extractable if its beginning makes the model continue it exactly.
    The held-out share is what can be guessed without having seen the text.
    """
    out: dict[str, Any] = {}
    for name, sets in (("memorisation", [prepared.train]), ("memorisation_held_out", list(prepared.evals.values()))):
        probes: list[tuple[list[int], list[int]]] = []
        for dataset in sets:
            for index in choose_rows(len(dataset), recipe.eval.generate_rows).tolist():
                probe = memory_probe(dataset, index)
                if probe is not None:
                    probes.append(probe)
        given = (
            continuations(module, [p for p, _ in probes], max_new_tokens=MEMORY_TOKENS, stop_ids=[], **how)
            if probes
            else []
        )
        hits = [[float(ids[: len(wanted)] == wanted), 1.0] for ids, (_, wanted) in zip(given, probes, strict=True)]
        found = metrics.figure(np.asarray(hits).reshape(-1, 2), ratio)
        out[name], out[f"{name}_rows"] = found.value, len(hits)
        figures["ci"][name] = found.ci
        if found.replicates is not None:
            figures["replicates"][name] = packed(found.replicates)
    return out
