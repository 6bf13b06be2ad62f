"""Prepares a LLaVA JSON file and its image folder once, as array_record files.

    meteor prepare --json=FILE --images=FOLDER --name=NAME --data_dir=DIR

A config then reads it as the source `llava:NAME`. Killed and started again, it goes on after the
last whole shard.
"""

from __future__ import annotations

import sys

from absl import flags, logging

from meteor_jax.data.sources.llava import SHOWN, SKIPPED_FILE, prepare_llava


def define_flags() -> None:
    flags.DEFINE_string("json", None, "The LLaVA file: a list, or .jsonl.", required=True)
    flags.DEFINE_string(
        "images", None, "Folder that the file's image paths start from.", required=True
    )
    flags.DEFINE_string("name", None, "The source becomes llava:NAME.", required=True)
    flags.DEFINE_string("data_dir", "~/tensorflow_datasets", "As in the config.")
    flags.DEFINE_bool("skip_bad", False, "Leave out entries that cannot be used.")
    flags.DEFINE_integer(
        "threads", None, "Threads that read images. Default: one a core.", lower_bound=1
    )


def main(options: flags.FlagValues) -> int:
    """Prepares the set, and says what is in it; 130 if it is interrupted."""
    logging.set_verbosity(logging.ERROR)  # tfds warns of every name that it does not know
    try:
        prepared = prepare_llava(
            options.json,
            images=options.images,
            name=options.name,
            data_dir=options.data_dir,
            skip_bad=options.skip_bad,
            num_threads=options.threads,
        )
    except KeyboardInterrupt:
        print("stopped; the same command goes on after the last whole shard.", file=sys.stderr)
        return 130
    print(
        f"{prepared.num_examples:,} examples ({prepared.num_text_only:,} without image), "
        f"{prepared.num_bytes / 1e6:,.1f} MB in {prepared.num_shards} files: {prepared.folder}"
    )
    if prepared.num_skipped:
        listed = prepared.folder / SKIPPED_FILE
        lines = listed.read_text().splitlines()[:SHOWN]
        print(f"{prepared.num_skipped:,} entries left out, listed in {listed}:", *lines, sep="\n")
    return 0
