"""The command line of a config file: absl's flags, with every error in one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from absl import flags, logging


def parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's flag parser with --config read, for `app.run(main, flags_parser=parse_flags)`.

    A flag, config file or config field that does not exist, or a value of the wrong type, ends
    the program with one line and exit code 2 instead of a traceback.
    """
    try:
        rest = flags.FLAGS(argv)
        if flags.FLAGS["config"].present:
            flags.FLAGS.config.to_dict()  # a missing file is only reported on access
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax alone writes a page a checkpoint
    return rest


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).replace("\\n", " ").split())
    unknown = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', message)
    if unknown:
        return f"config: no such field '{unknown[2]}'. Did you mean '{unknown[1]}'?"
    missing = re.search(r"No such file or directory: '(.+?)'", message)
    if missing:
        return f"config file {missing[1]} does not exist."
    if isinstance(error, (AttributeError, KeyError)):
        field = message.strip("'\" ")
        return f"config: no such field '{field}'; the config file has them all."
    return message.removesuffix(".") + "."
