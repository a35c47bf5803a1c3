"""The training loop, to be read from top to bottom.

A step is defined by its documents, not by who computes them: the sampler names the documents, every rank knows the number of
supervised tokens among all of them, and each micro-batch adds the gradient of ``sum of losses / that number``. The curve is
therefore the same for any number of ranks, any accumulation, packed or padded, under every engine.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from aifactory_train import __version__
from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, RunFailed, UserError
from aifactory_train.core.files import write_json
from aifactory_train.core.output import note
from aifactory_train.data import Cursor, PreparedData, Sampler, load_tokenizer, prepare, split_step
from aifactory_train.evaluation.evaluate import evaluate, results_file
from aifactory_train.methods.chosen import Methods
from aifactory_train.model import position_check
from aifactory_train.model.base import base_folder
from aifactory_train.model.generation_config import read_base
from aifactory_train.model.loading import build_model
from aifactory_train.model.operators import apply_operators
from aifactory_train.model.precision import choose_precision
from aifactory_train.model.report import ModelReport
from aifactory_train.parallel.batches import micro_limit
from aifactory_train.parallel.build import build_engine, choose_engine
from aifactory_train.parallel.engine import DeviceBatch
from aifactory_train.parallel.memory_advice import explain_memory
from aifactory_train.parallel.torch_engine import split_scale
from aifactory_train.parallel.world import World, from_main, join_world, leave_alone, leave_world, leaves_alone
from aifactory_train.private.profile import enforce
from aifactory_train.record.recorder import Recorder
from aifactory_train.run.folder import RunFolder, default_run_dir
from aifactory_train.run.opening import open_for_training
from aifactory_train.run.outcome import Attempt, new_attempt
from aifactory_train.run.ownership import Owner, process_age
from aifactory_train.run.saved import note_saved
from aifactory_train.sources import resolve_model
from aifactory_train.training import identity
from aifactory_train.training.checkpoint import Checkpointer
from aifactory_train.training.guard import Guard, leave_out
from aifactory_train.training.metrics_log import MetricsLog, Progress, compare_with_plan, print_comparison, print_start
from aifactory_train.training.probe import probe_largest_batch
from aifactory_train.training.schedule import learning_rate
from aifactory_train.training.state import restore, trainer_values
from aifactory_train.training.stopping import Best, StopChannels


def train(
    recipe: Recipe,
    folder: Path | None,
    *,
    resume: str | None = None,
    quiet: bool = False,
    attempt: int | None = None,
    stop_at: float | None = None,
) -> int:
    """Train ``recipe`` in ``folder`` as one of the ranks that the launcher started; returns the exit code.

    ``attempt`` is the launcher's number of this attempt (default: the next one), ``stop_at`` the end of the allocation in
    seconds since the epoch.
    """
    protected = enforce(recipe, folder)  # before anything is read or written
    stop = StopChannels(stop_at)  # first: a signal that comes while things are loaded must not be lost
    world = join_world(recipe.parallel.timeout_s, recipe.parallel.threads)
    try:
        return _train_as(world, recipe, folder, stop, protected, resume, quiet, attempt)
    except BaseException as error:
        if leaves_alone(world):  # the outcome is written
            _end_alone(world, error)
        raise
    finally:
        leave_world()


def _end_alone(world: World, error: BaseException) -> NoReturn:
    """End this failed rank without the others, saying what the command line would have said."""
    from aifactory_train.cli import told

    if isinstance(error, UserError) and not isinstance(error, RunFailed) and not world.is_main:
        leave_alone(error.exit_code)  # every rank meets the same refusal, and rank 0 prints it
    if isinstance(error, SystemExit):
        leave_alone(error.code if isinstance(error.code, int) else EXIT_FAILED)
    code = EXIT_FAILED
    try:
        code = told("train", error)
    except BaseException:  # what only a traceback explains
        sys.excepthook(type(error), error, error.__traceback__)
    leave_alone(code)


def _train_as(
    world: World,
    recipe: Recipe,
    folder: Path | None,
    stop: StopChannels,
    protected: Any,
    resume: str | None,
    quiet: bool,
    attempt: int | None,
) -> int:
    """One rank's attempt. A function of its own: on return nothing holds the process groups any more (`leave_world`)."""
    # The default name holds the time: one rank decides.
    run = RunFolder(from_main(world, lambda: folder or default_run_dir(recipe, None)))
    device = world.device if world.size > 1 else "cpu"  # a lone rank's GPU waits for nobody
    timeout_s = recipe.parallel.timeout_s
    owner = Owner(run.path, attempt)
    with owner, Attempt(run, world.rank, world.local_rank, attempt, timeout_s=timeout_s, device=device) as record:
        resume_from = from_main(world, lambda: open_for_training(run, resume, recipe, owner))
        record.training = True
        if attempt is None:
            record.begin(from_main(world, lambda: new_attempt(run)))
        if world.is_main:
            # The launcher has dealt with earlier requests before it began this attempt. By hand, a later start is the newer word.
            age = process_age(os.getpid())
            started = record.started if age is None else time.time() - age
            stop.watch_file(run.stop_file, since=None if record.closed_by_launcher else started)
        try:
            trainer = Trainer(recipe, run, world, stop, record, resume, resume_from, quiet, owner)
            with trainer.recorder.under(protected) as story:
                record.code = story.ended(trainer.fit(), record.reason)
        finally:
            if world.is_main and not record.closed_by_launcher:
                _take_stop(run, record)
    return record.code


def _take_stop(run: RunFolder, record: Attempt) -> None:
    """Where no launcher closes the attempt: the request to stop is answered, and kept with the attempt. Under a launcher the file stays
    for what judges the attempt, or a stop would look like the end of the time and the run would go on."""
    try:
        if record.folder is not None and run.stop_file.exists():
            os.replace(run.stop_file, record.folder / "stop-request.txt")
    except OSError as error:
        note(f"{run.stop_file}: {error.strerror}")


class Trainer:
    """Everything that a run consists of, built in the order in which it depends on each other."""

    def __init__(
        self,
        recipe: Recipe,
        run: RunFolder,
        world: World,
        stop: StopChannels,
        attempt: Attempt,
        resume: str | None,
        resume_from: int | None,
        quiet: bool,
        owner: Owner,
    ):
        recipe = recipe.model_copy(deep=True)  # what is settled below is this run's, not the caller's
        self.owner = owner
        self.recipe, self.run, self.world, self.quiet = recipe, run, world, quiet or not world.is_main
        self.stop, self.attempt = stop, attempt
        torch.manual_seed(recipe.train.seed)  # the same adapters on every rank

        generation = read_base(base_folder(recipe))  # first: what an export cannot do without must not fail at the end
        self.tokenizer = load_tokenizer(recipe)
        self.report = ModelReport()
        # before the data is prepared, which may take long
        verdict = from_main(world, lambda: position_check.check(recipe, base_folder(recipe), device=world.device))
        settled = position_check.settle(recipe, verdict)
        self.methods = Methods(recipe)
        prepared = self._prepare()
        self.data = self.methods.view(prepared)
        self.inputs = from_main(world, lambda: identity.of_run(recipe, prepared, self.data.train))
        self.precision, why = choose_precision(recipe, world.device)
        self.report.add("precision", self.precision.describe(), why)
        if generation.mended:
            why = "the base's generation_config.json contradicts itself, and transformers would not save it"
            self.report.add("generation settings of the export", generation.describe(), why)
        name, why = choose_engine(recipe, world)
        core = build_model(
            recipe,
            resolve_model(recipe.model),
            self.tokenizer,
            device=world.device,
            precision=self.precision,
            report=self.report,
            sharded=name in ("fsdp2", "hsdp", "zero3"),
        )
        if settled is not None:
            self.report.add(*settled)
        apply_operators(core, recipe, device=world.device, engine=name, report=self.report)
        self.engine = build_engine(name, core, recipe, self.precision, world)
        for line in self.engine.describe():
            self.report.add(*line)

        settings = recipe.train
        train_set = self.data.train
        self.sampler = Sampler(
            train_set.lengths, train_set.weights, settings.seed, settings.batch_rows, settings.batch_tokens
        )
        self.total_steps = self.sampler.steps(settings.epochs, settings.max_steps)
        if (settings.warmup_steps or 0) > self.total_steps:
            why = f"train.warmup_steps {settings.warmup_steps} are more than the run's {self.total_steps} steps"
            self.report.add("learning rate", f"stays below {settings.learning_rate:g}", why)
        self.cursor = Cursor(0, 0)
        self.step = 0  # optimizer steps done
        self.pad_id = self.data.tokenizer_info["pad_id"]
        self.best = Best(recipe)
        self.results: dict[str, Any] = {}
        self.log = MetricsLog(run, enabled=world.is_main, tensorboard=recipe.logging.tensorboard)
        self.recorder = Recorder(run, world, recipe, attempt=int(attempt.folder.name) if attempt.folder else None)
        self.guard = Guard(recipe.guard)
        self.checkpoints = Checkpointer(run.checkpoints, recipe, self.engine, world, lambda s: note_saved(run, s))
        self.checkpoints.prepare()
        torch.manual_seed(settings.seed * 1_000_003 + world.rank)  # from here on: dropout, different on every rank
        probe_largest_batch(self)
        if resume_from is not None:
            restore(self, self.checkpoints.choose(None if resume == "auto" else resume_from))
        self.methods.begin(self, resumed=self.step > 0)

    # ---- before the first step

    def _prepare(self) -> PreparedData:
        """Open the token cache; rank 0 reads it through, and builds it if need be, while the others wait."""
        from_main(self.world, lambda: prepare(self.recipe, self.tokenizer) and None)
        return prepare(self.recipe, self.tokenizer, trusted=True)

    def fit(self) -> int:
        """Evaluate, train, evaluate, export. Returns the exit code."""
        recipe, world = self.recipe, self.world
        if not self.quiet:
            print_start(recipe, self.run, world, self.report, self.data, self.total_steps)
        if world.is_main:
            self.run.save_config(recipe)
            identity.keep(self.run, self.inputs, fresh=self.step == 0)
            for name, tree in self.engine.files.items():
                write_json(self.run.path / name, tree)
            self.run.set_state("running", step=self.step, version=__version__)
        self.recorder.start(self)
        if recipe.eval.before and "before" not in self.results:
            self.results["before"] = self._evaluate(generate=True)
            self.recorder.evaluated("before", self.results["before"], self.step)
        self.log.open(self.step)
        every = recipe.checkpoint.every_steps
        with Progress(self.total_steps, self.step, enabled=not self.quiet) as progress:
            while self.step < self.total_steps:
                record = self.train_step()
                self.owner.check()
                self.log.write(record, every=recipe.logging.every_steps, last=self.step == self.total_steps)
                if record["kind"] == "train":
                    progress.update(record)
                if world.is_main:
                    self.run.set_state("running", step=self.step, version=__version__)
                if recipe.eval.every_steps and self.step % recipe.eval.every_steps == 0 and self._should_stop_early():
                    break
                save_now = every and self.step % every == 0 and self.step < self.total_steps
                if save_now:
                    self.attempt.beat(self.step, "save")
                    self.checkpoints.drain()  # before the clock is read: an earlier save may have taken long
                self.stop.look(self.checkpoints.save_estimate())
                agreed = self.stop.agree(self.checkpoints.failed())
                if agreed.save_failed:
                    self.checkpoints.wait()  # raises on the rank that knows why
                    raise RunFailed("another rank could not write its part of a checkpoint", where=str(self.run.path))
                if agreed.reason and self.step < self.total_steps:
                    return self._stop_here(agreed.reason)
                if save_now:
                    self._save(wait=False)
        return self._finish()

    # ---- one optimizer step

    def train_step(self) -> dict[str, Any]:
        """Fetch all micro-batches, count, forward/backward each, clip, step; returns the metrics of the step."""
        started = time.perf_counter()
        settings, train_set = self.recipe.train, self.data.train
        documents, next_cursor = self.sampler.step(self.cursor)
        shares = split_step(
            documents,
            train_set.lengths,
            self.world.size,
            settings.grad_accum,
            micro_limit(settings.micro_batch_tokens, train_set.lengths[documents], self.world.device),
            self.recipe.data.batching,
        )
        self.methods.before_step(self, documents)
        batches = [self.micro_batch(share) for share in shares[self.world.rank]]
        supervised = int(train_set.supervised[documents].sum())  # over all ranks: the split is known to every rank
        units = self.methods.units(supervised)  # what the loss is a mean over
        scale, rest = split_scale(1.0 / units)
        rate = learning_rate(self.step, self.total_steps, settings)

        loss = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for number, batch in enumerate(batches):
            self.attempt.beat(self.step, "forward")
            self.stop.look(self.checkpoints.save_estimate())
            with explain_memory(self.engine, self.recipe, self.world):
                loss += self.engine.forward_backward(batch, scale, last=number == len(batches) - 1)
        self.attempt.beat(self.step, "reduce")
        norm = self.engine.clip(settings.max_grad_norm, rest)
        dist.all_reduce(loss)
        mean_loss = loss.item() / units  # the step's one synchronisation with the device
        verdict = self.guard.judge(mean_loss, float(norm))
        if verdict.action != "go":
            return leave_out(self, verdict, next_cursor, documents)
        self.attempt.beat(self.step, "update")
        with explain_memory(self.engine, self.recipe, self.world):
            self.engine.step(rate)
        self.cursor, self.step = next_cursor, self.step + 1

        seconds = time.perf_counter() - started
        self.stop.step_took(seconds)
        tokens = int(train_set.lengths[documents].sum())
        record = {
            "kind": "train",
            "step": self.step,
            "epoch": round(self.cursor.epoch + self.cursor.position / len(self.sampler.order(self.cursor.epoch)), 4),
            "loss": mean_loss,
            "grad_norm": float(norm),
            "learning_rate": rate,
            "rows": len(documents),
            "tokens": tokens,  # real tokens: padding is not counted
            "supervised_tokens": supervised,
            "micro_batches": len(batches),
            "seconds": round(seconds, 4),
            "tokens_per_s": round(tokens / seconds, 1),
            **self.methods.figures(),
        }
        if self.recipe.logging.row_ids:
            record["row_ids"] = [train_set.row_id(int(i)) for i in documents]
        self.recorder.step(record, documents, shares)
        return record

    def micro_batch(self, share) -> DeviceBatch:
        """The documents of one micro-batch as tensors on this rank's device."""
        return self.methods.micro_batch(self, share)

    # ---- checkpoints

    def _save(self, *, wait: bool) -> None:
        """Everything that is needed to go on from this step boundary."""
        self.attempt.beat(self.step, "save")
        self.owner.check(look=True)
        self.checkpoints.save(self.step, trainer_values(self), wait=wait, best=self.best.step)

    def _stop_here(self, reason: str) -> int:
        """Asked to stop: a complete checkpoint of this step, then the exit code "stopped, resumable"."""
        self._save(wait=True)
        self.attempt.signal = reason if reason.startswith("SIG") else None
        self.attempt.step, self.attempt.reason = self.step, f"stopped after step {self.step}: {reason}"
        self.attempt.stop_request = self.stop.request
        if self.world.is_main:
            self.run.set_state("stopped", step=self.step, version=__version__, reason=reason)
            self.log.close()
            note(f"stopped after step {self.step} ({reason}); go on with --resume auto")
        return EXIT_STOPPED

    # ---- evaluation and the end

    def _evaluate(self, *, generate: bool) -> dict[str, Any]:
        """Held-out figures of every evaluation set; all ranks take part."""
        self.attempt.beat(self.step, "evaluate")
        return evaluate(
            self.engine.module,
            self.tokenizer,
            self.data,
            self.recipe,
            device=self.world.device,
            rank=self.world.rank,
            world_size=self.world.size,
            generate=generate,
        )

    def _should_stop_early(self) -> bool:
        """Evaluate, remember the best step by ``eval.best_by``, and say whether patience has run out."""
        figures = self._evaluate(generate=False)
        self.log.write({"kind": "eval", "step": self.step, **figures})
        self.recorder.evaluated("during", figures, self.step)
        kept = self.recipe.checkpoint.every_steps or self.recipe.eval.early_stopping
        if self.best.improves(figures, self.step) and kept:
            self._save(wait=False)  # kept as the best
        return self.best.exhausted

    def _finish(self) -> int:
        from aifactory_train.exporting.writer import export_run

        recipe, world = self.recipe, self.world
        if recipe.checkpoint.at_end:
            self._save(wait=True)
        self.checkpoints.wait()
        if recipe.eval.early_stopping and self.best.step not in (None, self.step):
            if not self.quiet:
                note(f"evaluating and exporting the best checkpoint by held-out {self.best.by}, step {self.best.step}")
            self.checkpoints.load(self.best.step)
        if recipe.eval.after:
            self.results["after"] = self._evaluate(generate=True)
            self.recorder.evaluated("after", self.results["after"], self.step)
        if world.is_main:
            write_json(self.run.eval_file, results_file(self.results, recipe))
            compare_with_plan(self.run, world)
        self.attempt.beat(self.step, "export")
        exported = (
            export_run(
                self.run,
                merge=recipe.export.merge,
                engine=self.engine,
                tokenizer=self.tokenizer,
                data=self.data,
                recipe=recipe,
            )
            if recipe.export.automatic
            else None
        )
        self.recorder.exported(exported)
        if world.is_main:
            self.run.set_state("finished", step=self.step, version=__version__)
            self.log.close()
        if not self.quiet:
            print_comparison(results_file(self.results, recipe), self.run, exported)
        return EXIT_DONE
