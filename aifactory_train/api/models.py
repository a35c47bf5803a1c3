"""A run's model in use, and its exports."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

from aifactory_train.api.results import AnyRun, TrainedRun
from aifactory_train.core.errors import UserError
from aifactory_train.run.folder import RunFolder

if TYPE_CHECKING:
    from aifactory_train.commands.chat import Talker


@dataclass(frozen=True)
class LoadedModel:
    """A trained model that answers. ``model`` is transformers' (with peft's adapter where one was trained), in
    evaluation mode; ``tokenizer`` is the run's.

    >>> import aifactory_train as af
    >>> model = af.load("first")
    >>> type(model.model).__name__
    'PeftModelForCausalLM'
    """

    folder: RunFolder
    _talker: Talker = field(repr=False)

    @property
    def model(self) -> Any:
        return self._talker.model.model

    @property
    def tokenizer(self) -> Any:
        return self._talker.tokenizer

    @overload  # a text is a sequence of texts, too: the first that fits counts
    def generate(  # type: ignore[overload-overlap]
        self, prompts: str, *, max_new_tokens: int = ..., system: str | None = ...
    ) -> str: ...
    @overload
    def generate(self, prompts: Sequence[str], *, max_new_tokens: int = ..., system: str | None = ...) -> list[str]: ...

    def generate(
        self, prompts: str | Sequence[str], *, max_new_tokens: int = 256, system: str | None = None
    ) -> str | list[str]:
        """The greedy answer to each prompt, asked for by itself: of at most ``max_new_tokens`` tokens.

        Raises :class:`UserError` for a prompt that does not fit the model, or a ``system`` turn without a chat
        template.

        >>> import aifactory_train as af
        >>> answers = af.load("first").generate(["What colour is the door?", "And the boat?"], max_new_tokens=4)
        >>> len(answers)
        2
        """
        if max_new_tokens < 1:
            raise UserError("an answer has at least one token", where="max_new_tokens")
        talker = self._talker
        if system and talker.template is None:
            raise UserError("this model has no chat template, so no system turn", where="system")
        kept = talker.max_new_tokens, talker.turns
        found = []
        try:
            talker.max_new_tokens = max_new_tokens
            for prompt in [prompts] if isinstance(prompts, str) else prompts:
                talker.turns = [{"role": "system", "content": system}] if system else []
                found.append(talker.ask(prompt))
        finally:
            talker.max_new_tokens, talker.turns = kept
        return found[0] if isinstance(prompts, str) else found

    def chat(self, prompt: str) -> str:
        """The answer in a conversation that goes on with every call; its oldest turns are dropped when the context is
        full.

        >>> import aifactory_train as af
        >>> isinstance(af.load("first", max_new_tokens=4).chat("What colour is the door?"), str)
        True
        """
        return self._talker.ask(prompt)


def load(run: AnyRun, *, system: str | None = None, max_new_tokens: int = 256) -> LoadedModel:
    """The trained model of a run. ``system`` and ``max_new_tokens`` are those of :meth:`LoadedModel.chat`.

    Raises :class:`UserError` for an unknown run, and for one that has exported nothing.

    >>> import aifactory_train as af
    >>> af.load("first").tokenizer.eos_token
    '<|im_end|>'
    """
    from aifactory_train.commands.chat import Talker

    folder = TrainedRun.open(run).folder
    return LoadedModel(folder, Talker(folder, system=system, max_new_tokens=max_new_tokens))


def export(
    run: AnyRun,
    *,
    format: str = "safetensors",
    merge: bool = False,
    dtype: str | None = None,
    type: str | None = None,
    step: int | None = None,
    verify: bool = True,
) -> dict[str, str]:
    """Write the model of a run for other programs; returns ``{kind: path}``.

    Args:
        format: ``safetensors`` (adapter or weights for transformers, peft, vLLM) or ``gguf`` (llama.cpp, Ollama).
        merge: safetensors with the adapter merged in.
        dtype: ``fp32`` or ``bf16`` of safetensors.
        type: of a GGUF file: ``f16`` (default), ``q8_0`` and others.
        step: of the checkpoint; default: what the run ended with.
        verify: compare with the trained model, and refuse what differs.

    Raises:
        UserError: options that do not go together, nothing to export.
        RunFailed: what was written differs from the trained model.

    >>> import aifactory_train as af
    >>> sorted(af.export("first", merge=True))
    ['merged']
    """
    from aifactory_train.api.machines import json_of
    from aifactory_train.commands import export as command

    words = [os.fspath(TrainedRun.open(run).path), f"--format={format}", "--json"]
    words += ["--merge"] if merge else []
    words += [] if verify else ["--no-verify"]
    for name, value in {"dtype": dtype, "type": type, "step": step}.items():
        words += [] if value is None else [f"--{name}={value}"]
    return dict(json_of(command, words)["paths"])
