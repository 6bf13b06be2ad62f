"""What tests read out of compiled programs."""

import re

COLLECTIVE = re.compile(
    r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\("
)


def collectives(text):
    """Of each collective in a program's text, the name of the operation that it comes from."""
    lines = [line for line in text.splitlines() if COLLECTIVE.search(line)]
    return [(re.findall(r'op_name="([^"]*)"', line) or [line])[0] for line in lines]
