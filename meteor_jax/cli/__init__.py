"""The `meteor` command: one file for each of its commands."""
