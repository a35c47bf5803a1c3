"""``aifactory chat``: answers of a trained run, one prompt or a conversation."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_name", metavar="RUN", help="name of a run below runs/, or its folder")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and end; without it a conversation begins")
    parser.add_argument("--system", metavar="TEXT", help="system turn of the conversation")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default 256)")
    parser.add_argument("--json", action="store_true", help="one line of JSON (with --prompt)")


def run(args: argparse.Namespace) -> int:
    from aifactory_train.core import output
    from aifactory_train.core.errors import UserError
    from aifactory_train.run.folder import open_run

    if args.json and args.prompt is None:
        raise UserError("a conversation is not JSON", where="--json", fix="add --prompt TEXT")
    if args.max_new_tokens < 1:
        raise UserError("an answer has at least one token", where="--max-new-tokens")
    folder = open_run(args.run_name)
    talker = Talker(folder, system=args.system, max_new_tokens=args.max_new_tokens)
    if args.prompt is not None:
        answer = talker.ask(args.prompt)
        if args.json:
            output.print_json({"run": str(folder.path), "prompt": args.prompt, "answer": answer})
        else:
            print(answer)
        return 0
    interactive = sys.stdin.isatty()
    if interactive:
        output.note(f"{folder.path}: greedy answers of at most {args.max_new_tokens} tokens. An empty line ends.")
    while True:
        if interactive:
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line.strip():
            return 0
        print(talker.ask(line.strip()), flush=True)


class Talker:
    """A conversation with the model of a run; a model without chat template continues the text instead."""

    def __init__(self, folder, *, system: str | None, max_new_tokens: int):
        from aifactory_train.core import compat
        from aifactory_train.core.errors import UserError
        from aifactory_train.data.tokenizer import encoder_spec, tokenizer_info
        from aifactory_train.evaluation.answers import chat_template
        from aifactory_train.model.trained import load_trained

        self.device = compat.device_type()
        self.model, self.tokenizer, recipe = load_trained(folder, self.device)
        self.info = tokenizer_info(self.tokenizer, encoder_spec(self.tokenizer, recipe))
        self.template = chat_template(self.tokenizer, recipe)
        self.max_new_tokens = max_new_tokens
        self.most = getattr(self.model.language_model.config, "max_position_embeddings", None) or 2**30
        if system and self.template is None:
            raise UserError("this model has no chat template, so no system turn", where="--system")
        self.turns: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []

    def ask(self, prompt: str) -> str:
        """The answer to ``prompt`` after all that was said; the oldest turns are dropped when the context is full."""
        from aifactory_train.core import output
        from aifactory_train.core.errors import UserError
        from aifactory_train.evaluation.answers import stop_ids
        from aifactory_train.evaluation.generate import generate

        if self.template is None:
            ids = self.tokenizer(prompt).input_ids
        else:
            self.turns.append({"role": "user", "content": prompt})
            ids = self._ids()
            first = 1 if self.turns[0]["role"] == "system" else 0
            while len(ids) + self.max_new_tokens > self.most and len(self.turns) > first + 1:
                del self.turns[first : first + 2]
                output.note("(the context is full: the oldest turn was dropped)")
                ids = self._ids()
        if len(ids) + self.max_new_tokens > self.most:
            raise UserError(
                f"{len(ids)} tokens and an answer of {self.max_new_tokens} do not fit the model's {self.most} "
                f"positions",
                where="--prompt",
                fix="a shorter prompt or a smaller --max-new-tokens",
            )
        found = generate(
            self.model,
            [ids],
            max_new_tokens=self.max_new_tokens,
            stop_ids=stop_ids(self.info),
            pad_id=self.info["pad_id"],
            device=self.device,
        )[0]
        answer = self.tokenizer.decode(found, skip_special_tokens=True).strip()
        if self.template is not None:
            self.turns.append({"role": "assistant", "content": answer})
        return answer

    def _ids(self) -> list[int]:
        from aifactory_train.data.cells import RowError, to_user_error

        try:
            return self.template.ask(self.turns)[1]
        except RowError as error:
            raise to_user_error(error, "--prompt") from None
