"""Tiny tokenizers, made by the libraries that people make theirs with."""

import io
from pathlib import Path

from tiny_text import WORDS

TEXT = [
    *WORDS,
    *(word.upper() for word in WORDS),
    "the cat sat on a mat",
    "naïve café 日本語 😀",
    "0 1 2 3 4 plus = 5 6 7 8 9",
]


def write_json_tokenizer(folder: Path, size: int = 290) -> Path:
    """Write tokenizer.json, a byte-level BPE as Llama 3's and Qwen's; returns its path."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"], show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXT * 5, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def write_sentencepieces(folder: Path, size: int = 330) -> Path:
    """Write tokenizer.model, a BPE with bytes for unknown characters as Llama 2's; returns its path."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 5), model_writer=model, vocab_size=size, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, minloglevel=3,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder / "tokenizer.model"
