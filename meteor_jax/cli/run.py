"""How a command runs: its flags, its help, and one line for whatever is wrong.

A command is a module of this folder with

- a docstring: what it does, and an example;
- `define_flags()`: absl flags, those that several commands share from `cli.flags`;
- `main(options)`: the work; returns the exit code, None for 0;
- `POSITIONAL`, where it takes arguments that are no flags: what the help calls them. They follow
  `options` in the call of `main`.
"""

from __future__ import annotations

import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Iterable, Sequence
from types import ModuleType

from absl import flags, logging

from meteor_jax.config import one_line

WIDTH = 100  # columns of the help
NO_VALUE = "must have a value other than None"  # what absl says of a required flag


def run(command: ModuleType, arguments: Sequence[str], *, name: str) -> int:
    """Runs one command on its command line and returns the exit code.

    2, after one line on stderr, is for what the user can put right: a wrong flag, a ValueError
    (ConfigError among them) or an OSError. `--verbosity=1` shows the traceback too. The flags are
    defined for the time of the call only, and the handler of SIGTERM is put back after it, so that
    one process can run several commands.
    """
    previous, verbosity = sys.argv, logging.get_verbosity()
    handler = signal.getsignal(signal.SIGTERM)
    sys.argv = [name, *arguments]  # config_flags reads overrides from there
    before = set(flags.FLAGS)
    command.define_flags()
    defined = [flag for flag in flags.FLAGS if flag not in before]
    try:
        if {"--help", "-h"} & set(arguments):
            print(help_text(command, defined, name=name))
            return 0
        rest = parse_flags(sys.argv)
        if rest and not hasattr(command, "POSITIONAL"):
            raise ValueError(f"unexpected argument '{rest[0]}'; flags start with --.")
        return command.main(flags.FLAGS, *rest) or 0
    except (ValueError, OSError) as error:
        if logging.get_verbosity() > logging.INFO:
            traceback.print_exc()
        return fail(error)
    finally:
        sys.argv = previous
        logging.set_verbosity(verbosity)
        if signal.getsignal(signal.SIGTERM) is not handler:
            signal.signal(signal.SIGTERM, handler)
        # A field of the config that was set stands among the flags as `config.FIELD`.
        for flag in [flag for flag in flags.FLAGS if flag.partition(".")[0] in defined]:
            delattr(flags.FLAGS, flag)


def fail(error: Exception, *, code: int = 2) -> int:
    """Prints `error: …` in one line (several only where an error lists its problems)."""
    listed = hasattr(error, "problems")
    print(f"error: {error if listed else one_line(error)}", file=sys.stderr)
    return code


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the flags and reads the file of --config; returns the arguments that are no flags.

    Raises:
        ValueError: one line for a flag, config file or config field that does not exist, and for a
            value of the wrong type.
    """
    try:
        rest = flags.FLAGS(argv)[1:]
        if "config" in flags.FLAGS and flags.FLAGS["config"].present:
            flags.FLAGS.config.to_dict()  # a missing file is only reported on access
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(_explain(error)) from error
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax alone writes a page a checkpoint
    return rest


def _explain(error: Exception) -> str:
    message = " ".join(str(error).replace("\\n", " ").split())
    missing = re.findall(rf"Flag (--\w+) {NO_VALUE}", message)
    if missing:
        return f"expected {' and '.join(missing)}; --help shows an example."
    if isinstance(error, flags.UnrecognizedFlagError):
        near = re.search(r"Did you mean: (\w+)", message)
        hint = f"Did you mean --{near[1]}?" if near else "--help lists the flags."
        return f"no flag --{error.flagname}. {hint}"
    unknown = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', message)
    if unknown:
        return f"config: no such field '{unknown[2]}'. Did you mean '{unknown[1]}'?"
    absent = re.search(r"No such file or directory: '(.+?)'", message)
    if absent:
        return f"config file {absent[1]} does not exist."
    if isinstance(error, (AttributeError, KeyError)):
        field = message.strip("'\" ")
        return f"config: no such field '{field}'; the config file has them all."
    return message.removesuffix(".") + "."


def help_text(command: ModuleType, defined: Iterable[str], *, name: str) -> str:
    """The command's docstring and its flags."""
    positional = f" {command.POSITIONAL}" if hasattr(command, "POSITIONAL") else ""
    lines = [
        f"usage: {name}{positional} --FLAG=VALUE …",
        "",
        (command.__doc__ or "").strip(),
        "",
        "flags:",
    ]
    for flag in defined:
        lines += _describe(flags.FLAGS[flag])
        if flag == "config":
            lines += ["  --config.FIELD=VALUE", "        Any field of the config, by dotted name."]
    return "\n".join(lines)


def _describe(flag: flags.Flag) -> list[str]:
    value = "" if flag.boolean else "=VALUE"
    shown = ",".join(flag.default) if isinstance(flag.default, list) else flag.default
    default = f" Default: {shown}." if shown else ""
    required = any(NO_VALUE in validator.message for validator in flag.validators)
    text = " ".join(flag.help.split()) + (" Required." if required else default)
    indent = " " * 8
    wrapped = textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)
    return [f"  --{'[no]' if flag.boolean else ''}{flag.name}{value}", *wrapped]
