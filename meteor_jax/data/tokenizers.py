"""Text to ids and back: a byte tokenizer, any Hugging Face folder, and a small BPE of our own."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from meteor_jax.config import one_line, suggest

After = Literal["start", "text", "special"]
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
_SMALLEST_BPE = 256 + len(SPECIAL_TOKENS)
_REQUESTED_SIZE = "requested_vocab_size"  # kept in tokenizer_config.json beside the pieces


class Tokenizer(Protocol):
    """What templates, the pipeline and generation need of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def pad_id(self) -> int: ...

    def encode(self, text: str, *, bos: bool = False, after: After = "start") -> list[int]:
        """Ids of `text`; the names of special tokens in it are plain text.

        Args:
            bos: begin with the BOS id, if this tokenizer's own rule adds one.
            after: what stands before the text. Sentencepiece puts a space before a text that
                stands at the "start", none before one that continues a "text"; behind a
                "special" token it depends on the tokenizer.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text, not stripped; special tokens and ids outside the vocabulary are left out."""

    def special_id(self, name: str) -> int | None:
        """The id of a special token such as `<|eot_id|>`, None where there is none."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0–255, then pad, BOS and EOS. Needs no file."""

    vocab_size = 259
    pad_id = 256
    bos_id = 257
    eos_id = 258

    def encode(self, text: str, *, bos: bool = False, after: After = "start") -> list[int]:
        del after  # a byte does not depend on its neighbours
        return [self.bos_id] * bos + list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def special_id(self, name: str) -> int | None:
        return {"<pad>": self.pad_id, "<s>": self.bos_id, "</s>": self.eos_id}.get(name)


class HuggingFaceTokenizer:
    """A `transformers` tokenizer from a folder.

    Padding uses the tokenizer's own pad token, else its unknown token; where it has neither a
    `<pad>` token is added, and `vocab_size` counts it.
    """

    def __init__(self, folder: str | Path):
        """Raises: ValueError where the folder holds no tokenizer, or one without an EOS."""
        self._hf = _auto_tokenizer(Path(folder))
        if self._hf.eos_token_id is None:
            raise ValueError(f"tokenizer {folder}: it names no eos_token; set one in its config.")
        if self._hf.pad_token_id is None:
            if self._hf.unk_token is not None:
                self._hf.pad_token = self._hf.unk_token
            else:
                self._hf.add_special_tokens({"pad_token": "<pad>"})
        self.vocab_size = len(self._hf)
        self.bos_id = self._hf.bos_token_id
        self.eos_id = self._hf.eos_token_id
        self.pad_id = self._hf.pad_token_id
        self._special = self._hf.get_added_vocab()
        with_special = self._hf.encode("a", add_special_tokens=True)
        self._adds_bos = self.bos_id is not None and with_special[0] == self.bos_id
        fresh = self._hf.encode("a", add_special_tokens=False)
        behind_eos = self._hf.encode(self._hf.eos_token + "a", add_special_tokens=False)
        self._marks_start = self._continuation("a") != fresh
        self._marks_after_special = behind_eos[1:] == fresh

    def encode(self, text: str, *, bos: bool = False, after: After = "start") -> list[int]:
        begin = [self.bos_id] if bos and self._adds_bos else []
        continues = after == "text" or (after == "special" and not self._marks_after_special)
        return begin + list(_encode_once(self, text, continues and self._marks_start))

    def decode(self, ids: Sequence[int]) -> str:
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return self._hf.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def special_id(self, name: str) -> int | None:
        return self._special.get(name)

    @property
    def requested_vocab_size(self) -> int | None:
        """The size that `train_bpe` was asked for; None for other tokenizers."""
        return self._hf.init_kwargs.get(_REQUESTED_SIZE)

    def _ids(self, text: str) -> list[int]:
        if not self._hf.is_fast:
            return self._hf.encode(text, add_special_tokens=False, split_special_tokens=True)
        # The wrapper around the Rust object costs three times what tokenizing a question does.
        backend = self._hf.backend_tokenizer
        backend.encode_special_tokens = True
        return backend.encode(text, add_special_tokens=False).ids

    def _continuation(self, text: str) -> list[int]:
        """Ids of `text` where other text stands before it: with a line break in front, cut off."""
        anchor = self._ids("\n")
        ids = self._ids("\n" + text)
        if ids[: len(anchor)] != anchor:  # the line break merged with the text
            return self._ids(text)
        return ids[len(anchor) :]


@functools.lru_cache(maxsize=1 << 16)  # a data set asks the same questions again and again
def _encode_once(tokenizer: HuggingFaceTokenizer, text: str, continues: bool) -> tuple[int, ...]:
    return tuple(tokenizer._continuation(text) if continues else tokenizer._ids(text))


def load_tokenizer(
    spec: str,
    *,
    folder: str | Path | None = None,
    texts: Callable[[], Iterable[str]] | None = None,
    inherit: Sequence[Path] = (),
) -> Tokenizer:
    """The tokenizer that a config names.

    Args:
        spec: "byte"; "bpe:512", a byte-level BPE of 512 pieces kept in `folder`; or the path of
            a Hugging Face tokenizer folder.
        folder: where a "bpe:…" tokenizer is, or will be written once.
        texts: gives the texts to train it on; called only when `folder` does not exist yet.
        inherit: folders where the decoder's own may lie; the first that does is copied instead,
            for another one's pieces would mean other things to it.

    Raises:
        ValueError: in one line, for a spec that is none of these, a folder without a tokenizer,
            and a "bpe:…" folder made for another size or missing with no texts to train on.
    """
    if spec == "byte":
        return ByteTokenizer()
    if spec.startswith("bpe:"):
        return _load_bpe(spec, folder, texts, inherit)
    if Path(spec).is_dir():
        return HuggingFaceTokenizer(spec)
    raise ValueError(
        f"tokenizer: expected 'byte', 'bpe:SIZE' or a tokenizer folder, got '{spec}'."
        + suggest(spec, ["byte", "bpe:512"])
    )


def train_bpe(texts: Iterable[str], *, vocab_size: int, folder: str | Path) -> HuggingFaceTokenizer:
    """Trains a byte-level BPE and writes it as a Hugging Face tokenizer folder.

    Digits never merge, so a number is read digit by digit. The same texts give the same folder.
    `vocab_size` counts the 256 bytes and the four special tokens; few texts give fewer pieces.
    The folder appears complete or not at all.

    Raises:
        ValueError: `vocab_size` below 260.
        FileExistsError: `folder` exists already.
    """
    if vocab_size < _SMALLEST_BPE:
        raise ValueError(
            f"tokenizer: a byte-level BPE needs at least {_SMALLEST_BPE} pieces, got {vocab_size}."
        )
    _import_transformers()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        **{_REQUESTED_SIZE: vocab_size},
    )
    _write_folder(wrapped.save_pretrained, Path(folder))
    return HuggingFaceTokenizer(folder)


def _import_transformers() -> Any:
    """`transformers`, without its notice that PyTorch is absent: only tokenizers are used."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    return transformers


def _load_bpe(
    spec: str,
    folder: str | Path | None,
    texts: Callable[[], Iterable[str]] | None,
    inherit: Sequence[Path],
) -> HuggingFaceTokenizer:
    size = spec.removeprefix("bpe:")
    if not size.isdecimal():
        raise ValueError(f"tokenizer: expected 'bpe:SIZE' such as 'bpe:512', got '{spec}'.")
    if folder is None:
        raise ValueError(f"tokenizer: '{spec}' needs a folder to be kept in.")
    folder = Path(folder)
    source = next((source for source in inherit if source.is_dir()), None)
    if source is not None and not folder.exists():
        _check_size(HuggingFaceTokenizer(source), source, size=int(size))
        with contextlib.suppress(FileExistsError):  # another process of the run was faster
            _write_folder(lambda to: shutil.copytree(source, to, dirs_exist_ok=True), folder)
    if not folder.exists():
        if texts is None:
            raise ValueError(
                f"tokenizer: '{spec}' is not at {folder}; train first, or give the path of a "
                "tokenizer folder."
            )
        try:
            return train_bpe(texts(), vocab_size=int(size), folder=folder)
        except FileExistsError:
            pass  # another process of the same run was faster, with the same pieces
    tokenizer = HuggingFaceTokenizer(folder)
    _check_size(tokenizer, folder, size=int(size))
    return tokenizer


def _check_size(tokenizer: HuggingFaceTokenizer, folder: Path, *, size: int) -> None:
    if tokenizer.requested_vocab_size is None:
        raise ValueError(
            f"tokenizer: {folder} is none of our own, but the config asks for 'bpe:{size}'; set "
            "data.tokenizer to that folder."
        )
    if tokenizer.requested_vocab_size != size:
        raise ValueError(
            f"tokenizer: {folder} was made for {tokenizer.requested_vocab_size} pieces, the config "
            f"asks for 'bpe:{size}'; use another workdir or the same size."
        )


def _auto_tokenizer(folder: Path) -> Any:
    transformers = _import_transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever a foreign folder makes the library raise
        reason = one_line(error)[:200]
        raise ValueError(
            f"tokenizer: {folder} is not a Hugging Face tokenizer folder (it should hold "
            f"tokenizer.json or tokenizer.model, and tokenizer_config.json): {reason}"
        ) from error


def _write_folder(save: Callable[[str], Any], folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)
    try:
        save(unfinished)
        os.chmod(unfinished, 0o755)
        os.rename(unfinished, folder)
    except OSError as error:
        if folder.exists():
            raise FileExistsError(
                f"tokenizer: {folder} exists already; remove it first."
            ) from error
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
