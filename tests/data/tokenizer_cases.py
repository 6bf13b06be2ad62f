"""Tokenizers that tests make for themselves: none is downloaded."""

import json
from pathlib import Path

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "what color is the shape?: blue",
    "is there a circle in the image?: yes",
    "does the image not contain a teal shape?: no",
    "how many triangles are there?: 12",
    "A blue circle stands above a 37 pixel wide line.",
] * 20


def write_llama_like(folder: Path, *, legacy: bool) -> PreTrainedTokenizerFast:
    """A BPE with sentencepiece's spaces as LLaMA's tokenizers have them.

    A space is put before the text; where `legacy`, also before what follows a special token.
    There is no pad token.
    """
    bpe = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if legacy:
        bpe.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    reserved = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=[*reserved, *bytes_], show_progress=False
    )
    bpe.train_from_iterator(TEXTS, trainer)
    trained = json.loads(bpe.to_str())  # the bytes are ordinary pieces, not special ones
    trained["added_tokens"] = trained["added_tokens"][: len(reserved)]
    bpe = Tokenizer.from_str(json.dumps(trained))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.save_pretrained(folder)
    return wrapped
