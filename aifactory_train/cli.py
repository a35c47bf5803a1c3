"""The command line. Every command lives in its own module and is imported only when it is called, so that ``--help``
and the login-node commands answer at once and without torch."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import os
import sys
from pathlib import Path

from aifactory_train import __version__
from aifactory_train.core import output
from aifactory_train.core.errors import EXIT_FAILED, UserError, did_you_mean
from aifactory_train.private import redact

#: command -> one line of help; the code is in aifactory_train/commands/<command>.py
COMMANDS = {
    "sites": "the 32 AI Factories and Antennas, or one system's facts with sources",
    "recipes": "recipes by sector, or one resolved",
    "models": "will my model train here, with what: families, ids, model folders",
    "fetch": "model and data into the cache, with digests and licences (the only command that uses the network)",
    "prepare": "validate, tokenise and mask the data; --inspect shows what is supervised",
    "plan": "memory, strategy, speed and cost of a recipe at a site, with reasons",
    "where": "all sites ranked for a recipe: what it takes there, and which routes of access are open to you",
    "access": "the technical part of an application for access, drafted from the plan",
    "scale": "measure strong and weak scaling at a site, under a hard cap of GPU-hours",
    "usage": "what a project used: by run, by how jobs ended, against its award; drafts of reports",
    "teach": "one pass of a larger model over the rows, whose likeliest tokens methods.distill learns from",
    "train": "the training process itself (what torchrun, srun or mpirun start)",
    "launch": "run a recipe here, or write, check and submit the batch script of a site",
    "status": "state, attempts and cause of a run",
    "logs": "show or follow the logs of a run",
    "stop": "ask a run to save and stop, or cancel it",
    "eval": "score rows with a trained run",
    "predict": "labels of texts, from a run that trained a head",
    "chat": "answer prompts with a trained run",
    "export": "adapter or merged weights for the ecosystem, behind a logits gate",
    "remote": "sites that this machine reaches by OpenSSH, for --on of the other commands",
    "get": "bring a run home from a remote: record, report, logs, export",
    "report": "what a run did, as a table or JSON",
    "record": "the record of a run: show it, fill in what only people know, sign it",
    "verify": "is a run's record whole and unedited, and are its files still the same",
    "private": "sensitive data: keys, encryption, who can read what, was a text trained on",
    "studio": "a local page from rows to a trained model, which shows the command for all that it does",
    "runs": "list and compare runs, as a table or a page",
    "kernels": "list, check, tune and measure the Triton kernels",
    "env": "the software environment of a site",
    "accept": "does this machine train as it should: every check with its figures, in ten minutes",
    "doctor": "what is here: versions, devices, launchers, what would be chosen",
    "config": "JSON Schema of recipes for editors; the resolved tree of a recipe",
    "completion": "a script that completes commands, options and files in bash, zsh or fish",
}

#: Commands that run at a remote with ``--on NAME``.
ON = ("launch", "status", "logs", "stop", "report", "runs", "fetch", "env", "accept")


def build_whole_parser() -> argparse.ArgumentParser:
    """The parser with the arguments of every command, for completion."""
    return build_parser(None, whole=True)


def build_parser(command: str | None, *, whole: bool = False) -> argparse.ArgumentParser:
    """The parser; only ``command`` gets its own arguments (``whole``: every one), the others keep their help line."""
    parser = argparse.ArgumentParser(
        prog="aifactory",
        description="Fine-tune language models on Europe's AI Factories, from a laptop to a thousand GPUs.",
        epilog="Exit codes: 0 done, 1 failed, 2 refused (the message names the fix), 75 stopped and resumable.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"aifactory-train {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, text in COMMANDS.items():
        sub = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        if whole or name == command:
            module = importlib.import_module(f"aifactory_train.commands.{name}")
            module.add_arguments(sub)
            if name in ON:
                sub.add_argument("--on", metavar="NAME", help="run it at this remote (aifactory remote list)")
            sub.set_defaults(run=module.run, parser=sub)
    return parser


#: Commands of two words, each a module of its own.
TWO_WORDS = {("recipes", "new"): "recipes_new"}


def two_words(argv: list[str]) -> argparse.Namespace | None:
    """The parsed arguments of a command of two words, or None."""
    name = TWO_WORDS.get((argv[0], argv[1])) if len(argv) > 1 else None
    if name is None:
        return None
    module = importlib.import_module(f"aifactory_train.commands.{name}")
    parser = argparse.ArgumentParser(prog=f"aifactory {' '.join(argv[:2])}", allow_abbrev=False)
    module.add_arguments(parser)
    parser.set_defaults(run=module.run, command=argv[0], parser=parser)
    return _all_known(*parser.parse_known_args(argv[2:]))


def _all_known(args: argparse.Namespace, unknown: list[str]) -> argparse.Namespace:
    """``args``, or the end of the program with the usage of the command (argparse would show that of the program) and
    the option that was perhaps meant."""
    if unknown and "parser" in args:
        options = [text for action in args.parser._actions for text in action.option_strings]
        word = unknown[0].partition("=")[0]
        meant = did_you_mean(word, options) if word.startswith("-") else ""
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
    return args


#: Faults of the machine that a person can repair and that no traceback explains better.
_OF_THE_SYSTEM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
#: Something of another kind lies where a file or folder is wanted: a link that leads to itself, a pipe, a file for a
#: folder.
_IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    output.show_any_character()
    command = next((a for a in argv if not a.startswith("-")), None)
    if command is not None and command not in COMMANDS:
        print(f"aifactory: unknown command '{command}'{did_you_mean(command, COMMANDS)}", file=sys.stderr)
        print("  fix: 'aifactory --help' lists the commands", file=sys.stderr)
        return 2
    try:
        args = two_words(argv) or _all_known(*build_parser(command).parse_known_args(argv))
        if args.command is None:
            importlib.import_module("aifactory_train.commands.next_steps").show(Path.cwd())
            return 0
        # What a remote prints is its own: JSON alone there is JSON alone here.
        with output.json_only() if getattr(args, "json", False) and not _on(args) else contextlib.nullcontext():
            code = int((_at_a_remote(args, argv) if _on(args) else args.run(args)) or 0)
        sys.stdout.flush()  # here, where a full disk can still be reported
        return code
    except (Exception, KeyboardInterrupt) as error:
        return report_fault(command, error)


def _on(args: argparse.Namespace) -> bool:
    return args.command in ON and getattr(args, "on", None) is not None


def _at_a_remote(args: argparse.Namespace, argv: list[str]) -> int:
    from aifactory_train.remote.calling import call

    return call(args, argv)


def report_fault(command: str | None, fault: BaseException) -> int:
    """Say on standard error what ended ``command``, and return its exit code. Raises ``fault`` again where only a
    traceback explains it."""
    try:
        raise fault
    except UserError as error:
        print(f"aifactory {command}: {redact.message(error)}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        if os.environ.get("AIFACTORY_DEBUG") or (error.name or "").startswith("aifactory_train"):
            raise
        print(f"aifactory {command}: the Python package '{error.name}' is not installed here", file=sys.stderr)
        print(
            "  fix: pip install -c constraints.txt 'aifactory-train[train]' (extras: train, deepspeed, mpi, triton, "
            "qlora, evidence, private, tracking, plot, documents, office, access, completion, "
            "studio, harness, vllm, test)",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:
        # The reader (head, less) went away; close quietly as other tools do.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        in_the_way = error.errno in _IN_THE_WAY and error.filename
        if not (error.errno in _OF_THE_SYSTEM or in_the_way) or os.environ.get("AIFACTORY_DEBUG"):
            raise
        name = str(error.filename or "")
        where = f"{name if len(name) <= 300 else name[:300] + '…'}: " if name else ""
        print(f"aifactory {command}: {where}{error.strerror}", file=sys.stderr)
        if in_the_way:
            print("  fix: move what lies there away, if nothing needs it", file=sys.stderr)
        if error.filename is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # standard output, most likely
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
