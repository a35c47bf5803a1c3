"""The training loop, to be read from top to bottom.

A step is defined by its documents, not by who computes them: the sampler names the documents, every rank knows the
number of supervised tokens among all of them, and each micro-batch adds the gradient of ``sum of losses / that
number``. The curve is therefore the same for any number of ranks, any accumulation, packed or padded, under every
engine.

What happens is said in events (:mod:`aifactory_train.record.events`); nobody else is given the trainer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from aifactory_train import __version__
from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import EXIT_DONE, EXIT_STOPPED, RunFailed, UserError
from aifactory_train.core.files import write_json
from aifactory_train.core.output import note
from aifactory_train.data import Cursor, PreparedData, Sampler, load_tokenizer, prepare
from aifactory_train.data.digest import data_digest
from aifactory_train.evaluation.evaluate import evaluate, results_file
from aifactory_train.methods.base import RunContext, StepContext
from aifactory_train.methods.build import method_of
from aifactory_train.model import position_check
from aifactory_train.model.base import base_folder
from aifactory_train.model.generation_config import read_base
from aifactory_train.model.loading import build_model
from aifactory_train.model.operators import apply_operators
from aifactory_train.model.precision import choose_precision
from aifactory_train.model.report import ModelReport
from aifactory_train.parallel.build import build_engine, choose_engine
from aifactory_train.parallel.frozen import FrozenBase
from aifactory_train.parallel.memory_advice import explain_memory
from aifactory_train.parallel.torch_engine import split_scale
from aifactory_train.parallel.traits import traits_of
from aifactory_train.parallel.world import World, from_main
from aifactory_train.record import events as ev
from aifactory_train.record.devices import gather_devices, peak_memory
from aifactory_train.run.folder import RunFolder
from aifactory_train.run.outcome import Attempt, in_one_line
from aifactory_train.run.ownership import Owner
from aifactory_train.run.saved import note_saved
from aifactory_train.sources import resolve_model
from aifactory_train.training import identity, routed
from aifactory_train.training.ahead import StepsAhead
from aifactory_train.training.checkpoint import Checkpointer
from aifactory_train.training.guard import Guard, StepVerdict, stopped_by_guard
from aifactory_train.training.listeners import listen
from aifactory_train.training.metrics_log import MetricsLog, Progress, compare_with_plan, print_comparison, print_start
from aifactory_train.training.probe import largest_micro_batch, try_step
from aifactory_train.training.schedule import learning_rate, remarks
from aifactory_train.training.state import LoopState, refuse_length, refuse_other_rows, same_rates
from aifactory_train.training.stopping import Best, StopChannels


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
        owner: Owner | None = None,
        protection: dict[str, Any] | None = None,
        listeners: Sequence[ev.Listener] = (),
    ):
        recipe = recipe.model_copy(deep=True)  # what is settled below is this run's, not the caller's
        self.recipe, self.run, self.world, self.quiet = recipe, run, world, quiet or not world.is_main
        self.stop, self.attempt, self.owner, self.protection = stop, attempt, owner or Owner(run.path), protection or {}
        self.report = ModelReport()
        self.state = LoopState(Best(recipe), Guard(recipe.guard))
        torch.manual_seed(recipe.train.seed)  # the same adapters on every rank
        self._build_data()
        self._build_model()
        self._build_steps()
        self.checkpoints = Checkpointer(run.checkpoints, recipe, self.engine, world, lambda s: note_saved(run, s))
        self.checkpoints.prepare()
        torch.manual_seed(recipe.train.seed * 1_000_003 + world.rank)  # from here on: dropout, different on every rank
        self._try_largest_batch()
        self.method.begin(self.context)
        if resume_from is not None:
            self._restore(self.checkpoints.choose(None if resume == "auto" else resume_from))
        every, board = recipe.logging.every_steps, recipe.logging.tensorboard
        self.log = MetricsLog(run, enabled=world.is_main, tensorboard=board, every=every)
        self.progress = Progress(self.total_steps, self.step, enabled=not self.quiet)
        self.events = listen(recipe, run, world, attempt, [self.log, self.progress, *listeners], self.owner)
        for line in self.method.prepare(self.context, resumed=self.step > 0):
            self.report.add(*line)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state.step

    # ---- before the first step

    def _build_data(self) -> None:
        """Tokenizer, what the model can take, the method's view of the rows. Rank 0 reads the token cache through, and
        builds it if need be, while the others wait."""
        recipe, world = self.recipe, self.world
        generation = read_base(base_folder(recipe))  # first: what an export cannot do without must not fail at the end
        if generation.repaired:
            why = "the base's generation_config.json contradicts itself, and transformers would not save it"
            self.report.add("generation settings of the export", generation.describe(), why)
        self.tokenizer = load_tokenizer(recipe)
        # before the data is prepared, which may take long
        verdict = from_main(world, lambda: position_check.check(recipe, base_folder(recipe), device=world.device))
        self.report.add(*position_check.settle(recipe, verdict))
        self.method = method_of(recipe)
        from_main(world, lambda: prepare(recipe, self.tokenizer) and None)
        prepared = prepare(recipe, self.tokenizer, trusted=True)
        self.data: PreparedData = self.method.view(prepared)
        self.inputs = from_main(world, lambda: identity.of_run(recipe, prepared, self.data.train))

    def _build_model(self) -> None:
        """Precision, weights, adapters, operators, engine; what was chosen and why goes into the report."""
        recipe, world = self.recipe, self.world
        self.precision, why = choose_precision(recipe, world.device)
        self.report.add("precision", self.precision.describe(), why)
        name, why = choose_engine(recipe, world)
        core = build_model(
            recipe,
            resolve_model(recipe.model),
            self.tokenizer,
            device=world.device,
            precision=self.precision,
            report=self.report,
            sharded=traits_of(name).shards_parameters,
        )
        weights = traits_of(name).weights
        apply_operators(core, recipe, device=world.device, engine=name, weights=weights, report=self.report)
        self.engine = build_engine(name, core, recipe, self.precision, world)
        for line in self.engine.describe():
            self.report.add(*line)
        self.frozen = FrozenBase.of(self.engine, recipe, world, self.report)

    def _build_steps(self) -> None:
        """Which documents each step has, how many steps there are, and what a method may know of both."""
        settings, train_set = self.recipe.train, self.data.train
        sizes = settings.batch_rows, settings.batch_tokens
        self.sampler = Sampler(train_set.lengths, train_set.weights, settings.seed, *sizes)
        self.total_steps = self.sampler.steps(settings.epochs, settings.max_steps)
        for line in remarks(self.total_steps, settings):
            self.report.add(*line)
        self.context = RunContext(
            recipe=self.recipe,
            folder=self.run,
            world=self.world,
            data=self.data,
            sampler=self.sampler,
            engine=self.engine,
            precision=self.precision,
            total_steps=self.total_steps,
            pad_id=self.data.tokenizer_info["pad_id"],
            beat=self._phase,
        )
        self.ahead = StepsAhead(self.context, self.method)

    def _phase(self, name: str) -> None:
        self.events.emit(ev.PhaseBegan(self.step, name))

    def _try_largest_batch(self) -> None:
        """On a GPU, run the largest micro-batch once before the first step, so that a lack of memory shows at once."""
        if self.world.device == "cpu":
            return
        documents = largest_micro_batch(self.data.train.lengths, self.recipe.train.micro_batch_tokens)
        micros = len(self.ahead.shares(Cursor())[2][0])
        with explain_memory(self.engine, self.recipe, self.world):
            batch = self.method.batch(StepContext(self.context, 0, documents), documents)
            try_step(self.engine, batch, accumulates=micros > 1)

    def _restore(self, step: int | None) -> None:
        """Go on from the checkpoint of ``step``. Raises :class:`UserError` if there is none (any more), if base model,
        tokenizer or rows are others than the run was begun with, if the steps already made would have other learning
        rates now, or if a finished run is not to be prolonged."""
        if step is None:
            why, fix = "the checkpoint to go on from is gone", "is another process at work here?"
            raise UserError(why, where=str(self.run.checkpoints), fix=fix)
        refuse_length(step, self.total_steps, finished=self.run.state()["state"] == "finished")
        saved = self.checkpoints.values(step)
        rows_as_before = identity.as_before(self.run, self.recipe, {"data.train", "model.base"})
        refuse_other_rows(saved, data_digest(self.data.train), rows_as_before)
        self.checkpoints.load(step, same_rates=same_rates(step, saved, self.recipe.train, self.total_steps))
        remarks = from_main(self.world, lambda: identity.check(self.run, self.recipe, self.inputs))
        self.checkpoints.leave_behind(step)
        self.state.load(step, saved)
        self.method.load(saved.get("method", {}))
        self.frozen.compare(saved)
        if self.world.is_main:
            for line in remarks:
                note(line)
            note(f"going on after step {step} of {self.total_steps}")

    # ---- the run

    def run_to_end(self) -> int:
        """:meth:`fit`, and the last event however it ends. Returns the exit code."""
        try:
            code = self.fit()
        except BaseException as error:
            private = self.recipe.privacy.profile != "open"
            self.events.emit(ev.RunEnded("failed", in_one_line(error, type_only=private)))
            raise
        finally:
            self.ahead.close()
        state = {EXIT_DONE: "finished", EXIT_STOPPED: "stopped"}.get(code, "failed")
        self.events.emit(ev.RunEnded(state, self.attempt.reason))
        return code

    def fit(self) -> int:
        """Evaluate, train, evaluate, export. Returns the exit code."""
        recipe = self.recipe
        self._begin()
        if recipe.eval.before and "before" not in self.state.results:
            self._evaluate("before", generate=True)
        self.log.open(self.step)
        every = recipe.checkpoint.every_steps
        with self.progress:
            while self.step < self.total_steps:
                self.train_step()
                self.owner.check()
                if recipe.eval.every_steps and self.step % recipe.eval.every_steps == 0 and self._should_stop_early():
                    break
                save_now = every and self.step % every == 0 and self.step < self.total_steps
                if save_now:
                    self._phase("save")
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

    def _begin(self) -> None:
        """What was chosen is printed and stored, and the listeners hear that the run begins."""
        if not self.quiet:
            print_start(self.recipe, self.run, self.world, self.report, self.data, self.total_steps)
        devices = gather_devices(self.world)
        if self.world.is_main:
            self.run.save_config(self.recipe)
            identity.keep(self.run, self.inputs, fresh=self.step == 0)
            for name, tree in self.engine.files.items():
                write_json(self.run.path / name, tree)
            self.run.set_state(
                "running", step=self.step, version=__version__
            )  # a folder that cannot be written ends it here
        self.events.emit(
            ev.RunStarted(
                step=self.step,
                total_steps=self.total_steps,
                data=self.data,
                report=self.report,
                model_config=self.engine.core.language_model.config.to_dict(),
                engine=self.engine.name,
                precision=self.precision.describe(),
                devices=devices,
                protection=self.protection,
            )
        )

    # ---- one optimizer step

    def train_step(self) -> dict[str, Any]:
        """Forward and backward of each micro-batch, clip, step; returns the metrics of the step. The host waits for the
        device once.
        """
        started = time.perf_counter()
        self._phase("fetch")
        settings, state = self.recipe.train, self.state
        ready = self.ahead.take(self.step, state.cursor)
        step, documents = ready.context, ready.context.documents
        ready = self.ahead.begun(ready)
        mine = ready.shares[self.engine.dims.data_rank(self.world.rank)]
        batches = ready.batches or [self.method.batch(step, share) for share in mine]
        units = self.method.units(ready.supervised)  # what the loss is a mean over; all ranks know it
        scale, rest = split_scale(1.0 / units)
        rate = learning_rate(self.step, self.total_steps, settings)

        loss = torch.zeros((), dtype=torch.float64, device=self.world.device)
        routed.begin(self.engine, batches, ready.tokens, units)
        for number, batch in enumerate(batches):
            self._phase("forward")
            self.stop.look(self.checkpoints.save_estimate())
            with explain_memory(self.engine, self.recipe, self.world):
                loss += self.engine.forward_backward(batch, scale, last=number == len(batches) - 1)
        self._phase("reduce")
        norm = self.engine.clip(settings.max_grad_norm, rest)
        dist.all_reduce(loss)
        both = torch.stack([loss, norm.to(loss)])
        summed, grad_norm = both.tolist()  # the step's one synchronisation with the device
        mean_loss = summed / units
        verdict = state.guard.judge(mean_loss, grad_norm)
        if verdict.action != "go":
            return self._skip_step(verdict, ready.following, documents)
        figures = self.method.figures() | routed.figures(self.engine)  # before the update: the device was waited for
        self._phase("update")
        with explain_memory(self.engine, self.recipe, self.world):
            self.engine.step(rate)
        state.cursor, state.step = ready.following, state.step + 1

        seconds = time.perf_counter() - started
        self.stop.step_took(seconds)
        metrics = {
            "kind": "train",
            "step": self.step,
            "epoch": round(ready.epochs, 4),
            "loss": mean_loss,
            "grad_norm": grad_norm,
            "learning_rate": rate,
            "rows": len(documents),
            "tokens": ready.tokens,  # real tokens: padding is not counted
            "supervised_tokens": ready.supervised,
            "micro_batches": len(batches),
            "seconds": round(seconds, 4),
            "tokens_per_s": round(ready.tokens / seconds, 1),
            **figures,
            **self._row_ids(documents),
            "memory_bytes": peak_memory(self.world.device)["bytes"],
        }
        last = self.step == self.total_steps
        self.events.emit(ev.StepDone(metrics, documents, ready.shares, last, ready.lengths, ready.made))
        return metrics

    def _row_ids(self, documents: np.ndarray) -> dict[str, Any]:
        """Which rows a step used, where ``logging.row_ids`` asks for it."""
        wanted = self.recipe.logging.row_ids
        return {"row_ids": [self.data.train.row_id(int(i)) for i in documents]} if wanted else {}

    def _skip_step(self, verdict: StepVerdict, next_cursor: Cursor, documents: np.ndarray) -> dict[str, Any]:
        """The guard objected: leave this step's batch out, after going back to the last good checkpoint if it says so.
        Returns the step's row for the metrics. Raises :class:`RunFailed` where the policy is to stop."""
        self.engine.discard()
        number, why = self.step + 1, verdict.why
        action, at = verdict.action, f"step {number}: {why}"
        if action == "rollback":
            self.checkpoints.wait()
            good = self.checkpoints.choose()
            if good is None:
                action, why = "stop", f"{why}; there is no checkpoint to roll back to"
            else:
                at += f"; weights of step {good}"
                self.checkpoints.load(good)
        if action == "stop":
            raise stopped_by_guard(number, why, self.run.path)
        if self.world.is_main:
            note(f"{action}: {at}")
        self.state.cursor, self.state.step = next_cursor, number
        metrics = {"kind": action, "step": number, "why": at, "rows": len(documents), **self._row_ids(documents)}
        self.events.emit(ev.Incident(action, number, why, documents, metrics))
        return metrics

    # ---- checkpoints

    def _save(self, *, wait: bool) -> None:
        """Everything that is needed to go on from this step boundary."""
        self._phase("save")
        self.owner.check(look=True)
        values = self.state.values(data_digest(self.data.train), self.total_steps, self.method.state())
        self.checkpoints.save(self.step, values | self.frozen.check(self.step), wait=wait, best=self.state.best.step)
        self.events.emit(ev.Saved(self.step, whole=wait))

    def _stop_here(self, reason: str) -> int:
        """Asked to stop: a complete checkpoint of this step, then the exit code "stopped, resumable"."""
        self._save(wait=True)
        self.attempt.signal = reason if reason.startswith("SIG") else None
        self.attempt.step, self.attempt.reason = self.step, f"stopped after step {self.step}: {reason}"
        self.attempt.stop_request = self.stop.request
        if self.world.is_main:
            self.attempt.set_state("stopped", step=self.step, version=__version__, reason=reason)
            note(f"stopped after step {self.step} ({reason}); go on with --resume auto")
        return EXIT_STOPPED

    # ---- evaluation and the end

    def _evaluate(self, when: str, *, generate: bool) -> dict[str, Any]:
        """Held-out figures of every evaluation set; all ranks take part."""
        self._phase("evaluate")
        here: dict[str, Any] = {"device": self.world.device, "rank": self.world.rank, "world_size": self.world.size}
        tell = None if self.quiet or when == "during" else note
        if tell is not None:
            tell(f"evaluating {when} the training:")
        with self.engine.averaged():
            figures = evaluate(
                self.engine.module, self.tokenizer, self.data, self.recipe, **here, generate=generate, tell=tell
            )
        if when != "during":
            self.state.results[when] = figures
        self.events.emit(ev.Evaluated(when, figures, self.step))
        return figures

    def _should_stop_early(self) -> bool:
        """Evaluate, remember the best step by ``eval.best_by``, and say whether patience has run out."""
        figures = self._evaluate("during", generate=False)
        best = self.state.best
        kept = self.recipe.checkpoint.every_steps or self.recipe.eval.early_stopping
        if best.improves(figures, self.step) and kept:
            self._save(wait=False)  # kept as the best
        return best.exhausted

    def _finish(self) -> int:
        from aifactory_train.exporting.writer import export_run

        recipe, world, best = self.recipe, self.world, self.state.best
        self.owner.check(look=True)
        if recipe.checkpoint.at_end:
            self._save(wait=True)
        self.checkpoints.wait()
        if recipe.eval.early_stopping and best.step not in (None, self.step):
            if not self.quiet:
                note(f"evaluating and exporting the best checkpoint by held-out {best.by}, step {best.step}")
            self.checkpoints.load(best.step)
        if recipe.eval.after:
            self._evaluate("after", generate=True)
        results = results_file(self.state.results, recipe, self.run.path, self.step)
        self.events.emit(ev.VerdictReached(results["verdict"]))
        if world.is_main:
            write_json(self.run.eval_file, results)
            compare_with_plan(self.run, world)
        self._phase("export")
        self.owner.check(look=True)
        exported = None
        if recipe.export.automatic:
            what: dict[str, Any] = {"tokenizer": self.tokenizer, "data": self.data, "recipe": recipe}
            with self.engine.averaged():
                exported = export_run(self.run, merge=recipe.export.merge, engine=self.engine, **what)
        if exported is not None:
            self.events.emit(ev.Exported(exported))
        if world.is_main:
            self.attempt.set_state("finished", step=self.step, version=__version__)
        if not self.quiet:
            print_comparison(results, self.run, exported)
        return EXIT_DONE
