"""``aifactory completion``: a script that completes commands, options and files in a shell."""

from __future__ import annotations

import argparse

from aifactory_train.core.errors import UserError

SHELLS = ("bash", "zsh", "fish")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "bash: aifactory completion bash > ~/.local/share/bash-completion/completions/aifactory; zsh: aifactory "
        "completion zsh > a file _aifactory in a folder of $fpath; fish: aifactory completion fish > "
        "~/.config/fish/completions/aifactory.fish"
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell that will read it")


def run(args: argparse.Namespace) -> int:
    from aifactory_train.cli import build_whole_parser

    try:
        import shtab
    except ImportError:
        fix = "pip install 'aifactory-train[completion]'"
        raise UserError("completion needs the package 'shtab'", where="completion", fix=fix) from None
    parser = build_whole_parser()
    _complete_files(parser, shtab)
    print(shtab.complete(parser, args.shell))
    return 0


def _complete_files(parser: argparse.ArgumentParser, shtab: object) -> None:
    """Arguments that name files or folders are completed as such, also in the commands' own actions."""
    kinds = {"FILE": "FILE", "PATH": "FILE", "RECIPE": "FILE", "DIR": "DIRECTORY", "RUN": "DIRECTORY"}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _complete_files(inner, shtab)
        elif isinstance(action.metavar, str) and action.metavar.split("|")[0] in kinds:
            action.complete = getattr(shtab, kinds[action.metavar.split("|")[0]])  # type: ignore[attr-defined]
