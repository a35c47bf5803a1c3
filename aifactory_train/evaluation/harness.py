"""EleutherAI's lm-evaluation-harness on what a run trained, without network (extra ``harness``).

Two kinds of tasks: ``own``, made from the recipe's held-out rows (a task folder in ``RUN/harness`` that ``lm-eval``
itself can run again), and any task of the harness whose data lies in the local cache. The model is the exported one,
loaded by plain transformers and peft; answers are greedy.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError, did_you_mean
from aifactory_train.core.files import write_json
from aifactory_train.core.output import note
from aifactory_train.run.folder import RunFolder

OWN = "own"
#: Names of the tasks made here.
GENERATE, CHOICE = "aifactory_own", "aifactory_own_choice"
#: More different answers than this are no labels to choose from.
MOST_LABELS = 50


def offline() -> None:
    """Nothing is downloaded from here on. To be called before datasets and huggingface_hub are imported."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")


def run_harness(run: RunFolder, recipe: Recipe, names: list[str], *, rows: int | None, device: str) -> dict[str, Any]:
    """Score the tasks ``names``; ``{"versions", "tasks": {task: {metric: value}}, "rows": {task: n}}``, also in
    ``RUN/harness/results.json``. ``rows``: at most so many of each task. Raises :class:`UserError` for what cannot be
    run."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "lm-evaluation-harness is not installed here",
            where="--harness",
            fix="pip install -c constraints.txt 'aifactory-train[harness]'",
        )
    from aifactory_train.private import profile

    profile.enforce(recipe, run.path)
    if OWN in names and recipe.privacy.profile != "open":
        raise UserError(
            f"the task '{OWN}' would write held-out rows into the run folder, and privacy.profile is "
            f"{recipe.privacy.profile}",
            where="--harness",
            fix="aifactory eval RUN --data FILE scores rows in memory",
        )
    import lm_eval
    from lm_eval.tasks import TaskManager

    others = [n for n in names if n != OWN]
    manager = TaskManager(include_defaults=bool(others))
    for name in others:
        if name not in manager.task_index:
            raise UserError(
                f"lm-evaluation-harness {lm_eval.__version__} has no task "
                f"'{name}'{did_you_mean(name, manager.task_index)}",
                where="--harness",
                fix=f"'{OWN}' is the recipe's held-out rows; lm-eval --tasks list shows the others",
            )
    ready = {name: _loaded(manager, name) for name in others}  # all of them before the model is loaded
    model, tokenizer = _plain_model(run, recipe, device)
    folder = run.path / "harness"
    found: dict[str, Any] = {"versions": _versions(), "tasks": {}, "rows": {}}
    with tempfile.TemporaryDirectory(prefix="aifactory-harness-") as cache:
        if OWN in names:
            tasks = own_tasks(run, recipe, tokenizer, folder, rows)
            for task in tasks:  # the rows are not copied into the user's cache of data sets
                task["dataset_kwargs"] = {**task["dataset_kwargs"], "cache_dir": cache}
            _score(found, folder, manager, tasks, _served(model, tokenizer, add_bos=False), None)
        if ready:
            _score(found, folder, manager, others, _served(model, tokenizer, add_bos=None), rows)
    write_json(folder / "results.json", found)
    return found


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("lm_eval", "transformers", "torch", "datasets")}


def _loaded(manager: Any, name: str) -> Any:
    """The task with its data, or a refusal that says how to get them."""
    try:
        return manager.load(name)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        # datasets has no error of its own for "not in the cache"; whatever it is, the task cannot be run here
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the data of the task '{name}' are not in the local cache: {reason[:200]}",
            where="--harness",
            fix=f"where there is a network (login node): lm-eval --model dummy --tasks {name} --limit 1",
        ) from None


def _plain_model(run: RunFolder, recipe: Recipe, device: str) -> tuple[Any, Any]:
    """The exported model as anybody would load it: ``(transformers or peft model, tokenizer)``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from aifactory_train.core import compat
    from aifactory_train.model.base import base_folder
    from aifactory_train.model.generation_config import loading
    from aifactory_train.model.precision import choose_precision
    from aifactory_train.model.trained import nothing_exported, with_adapter
    from aifactory_train.private import vault

    precision, _ = choose_precision(recipe, device)
    adapter, whole = run.export / "adapter", run.export / "model"
    is_adapter = vault.holds(adapter / "adapter_model.safetensors")
    if not is_adapter and not (whole / "config.json").is_file():
        raise nothing_exported(run)
    model: Any = AutoModelForCausalLM.from_pretrained(
        base_folder(recipe) if is_adapter else whole,
        dtype=precision.compute,
        local_files_only=True,
        trust_remote_code=recipe.model.trust_remote_code,
        **(loading(base_folder(recipe)) if is_adapter else {}),
    )
    if is_adapter:
        with compat.quiet_peft():
            model = with_adapter(model, adapter)
    folder = adapter if is_adapter else whole
    tokenizer = AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=recipe.model.trust_remote_code
    )
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():  # answers end where the training taught it
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.to(device).eval(), tokenizer


def _served(model: Any, tokenizer: Any, *, add_bos: bool | None) -> Any:
    from lm_eval.models.huggingface import HFLM

    # one row at a time: padding would move figures by rounding
    return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1, add_bos_token=add_bos)


def _score(found: dict[str, Any], folder: Path, manager: Any, tasks: list[Any], served: Any, rows: int | None) -> None:
    from lm_eval import simple_evaluate

    results: Any = simple_evaluate(
        model=served, tasks=tasks, task_manager=manager, limit=rows, bootstrap_iters=0, log_samples=True
    )
    for task, figures in results["results"].items():
        found["tasks"][task] = {
            k.removesuffix(",none"): v for k, v in figures.items() if isinstance(v, (int, float)) and "stderr" not in k
        }
        if task in results.get("n-samples", {}):
            found["rows"][task] = results["n-samples"][task]["effective"]
    folder.mkdir(parents=True, exist_ok=True)
    for task, samples in results["samples"].items():
        lines = [
            json.dumps(
                {"id": s["doc"].get("id", s["doc_id"]), "target": s["target"], "answers": s["filtered_resps"]},
                ensure_ascii=False,
                default=str,
            )
            for s in sorted(samples, key=lambda s: s["doc_id"])
        ]
        (folder / f"{task}.samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


# ---- the recipe's own rows as a task


def own_tasks(run: RunFolder, recipe: Recipe, tokenizer: Any, folder: Path, rows: int | None) -> list[dict[str, Any]]:
    """Task configurations from the held-out rows, written into ``folder`` with their data.

    Questions with their rendered template as prompt and the last answer as target; where the recipe judges by labels
    also the choice among all answers that occur. Raises :class:`UserError` where no row is a question.
    """
    import yaml

    from aifactory_train.data import prepare
    from aifactory_train.evaluation.answers import chat_template, question, stop_ids
    from aifactory_train.evaluation.likelihood import choose_rows

    prepared = prepare(recipe, tokenizer)
    template, lines, left_out = chat_template(tokenizer, recipe), [], 0
    for name, dataset in prepared.evals.items():
        for index in choose_rows(len(dataset), min(rows or recipe.data.eval_rows, recipe.data.eval_rows)).tolist():
            asked = question(dataset, index, tokenizer, template) if "text" not in dataset.row(index) else None
            if asked is None:
                continue
            prompt = tokenizer.decode(asked.prompt_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if tokenizer(prompt, add_special_tokens=False).input_ids != asked.prompt_ids:
                if template.special(dataset.row(index)):
                    left_out += 1
                    continue
                raise UserError(
                    "the harness passes prompts as text, and this tokenizer does not give the same tokens for the "
                    "text of its tokens",
                    where=f"{name}: {dataset.row_id(index)}",
                    fix="aifactory eval RUN --data FILE works on tokens",
                )
            lines.append({"id": str(dataset.row_id(index)), "prompt": prompt, "answer": asked.expected})
    if left_out:
        note(f"{left_out} held-out row(s) hold special tokens as text, which the harness has no way to pass: left out")
    if not lines:
        raise UserError(
            "no held-out row is a question with an answer",
            where="data.eval",
            fix="the harness has tasks of its own for text",
        )
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "own.jsonl"
    data.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    ends = [tokenizer.decode([i], skip_special_tokens=False) for i in stop_ids(prepared.tokenizer_info)]
    tasks = [_task(GENERATE, data) | _generation(recipe, ends)]
    labels = sorted({line["answer"] for line in lines})
    judged = {"accuracy", "micro_f1", "macro_f1"} & set(recipe.eval.metrics)
    if judged and recipe.eval.label_separator is None and 2 <= len(labels) <= MOST_LABELS:
        tasks.append(_task(CHOICE, data) | _choice(labels))
    for task in tasks:
        text = (
            f"# Held-out rows of {recipe.id}. Again: lm-eval --include_path {folder.name} --tasks {task['task']} ...\n"
        )
        (folder / f"{task['task']}.yaml").write_text(
            text + yaml.safe_dump(task, sort_keys=False, allow_unicode=True), encoding="utf-8"
        )
    return tasks


def _task(name: str, data: Path) -> dict[str, Any]:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
        "doc_to_text": "prompt",
        "target_delimiter": "",
        "metadata": {"version": 1.0},
    }


def _generation(recipe: Recipe, ends: list[str]) -> dict[str, Any]:
    # as normalise() in metrics/answers.py, as far as the harness has switches for it
    exact = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    return {
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ends, "max_gen_toks": recipe.eval.max_new_tokens, "do_sample": False},
        "filter_list": [{"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
        "metric_list": [
            {**exact, "ignore_case": True, "ignore_punctuation": True},
            {"metric": "chrf", "aggregation": "chrf", "higher_is_better": True},
        ],
    }


def _choice(labels: list[str]) -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_target": "answer",
        "doc_to_choice": labels,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
