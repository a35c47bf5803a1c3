"""What answers a question of a form: a function of the plan, the recipe, the site's profile and what was measured.

Nothing is filled in to complete a form. An answer without a value names who has to give it, or the command that would.
"""

from __future__ import annotations

from collections.abc import Callable

from aifactory_train.advice import answers_compute as compute
from aifactory_train.advice import answers_data as data
from aifactory_train.advice.said import Case, Said

__all__ = ["ANSWERS", "Case", "Said"]

_ALL: tuple[Callable[[Case], Said], ...] = (
    compute.title,
    compute.abstract,
    compute.route,
    compute.system,
    compute.hardware,
    compute.derivation,
    compute.gpu_hours,
    compute.billed,
    compute.job_size,
    compute.wall_time,
    compute.energy,
    compute.code,
    compute.libraries,
    compute.on_site,
    compute.method,
    compute.parallelisation,
    compute.memory,
    compute.precision,
    compute.performance,
    compute.restart,
    compute.scaling_measured,
    compute.scaling_modelled,
    data.inputs,
    data.base_files,
    data.checkpoints,
    data.results,
    data.filesystem,
    data.transfer,
    data.internet,
    data.steps,
    data.monitoring,
    data.sources,
    data.personal_data,
    data.measures,
    data.site_rule,
    data.ai_act,
    data.result_licence,
    data.record,
    data.technical_risks,
    data.use_risks,
)
#: key of a form's question -> what answers it
ANSWERS: dict[str, Callable[[Case], Said]] = {
    {"inputs": "input"}.get(answer.__name__, answer.__name__): answer for answer in _ALL
}
