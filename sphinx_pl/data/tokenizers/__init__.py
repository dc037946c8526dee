"""Tokenizers: text to ids, with the characters that each id stands for."""

from sphinx_pl.data.tokenizers.base import Tokenizer
from sphinx_pl.data.tokenizers.huggingface import HuggingFaceTokenizer
from sphinx_pl.data.tokenizers.load import copy_tokenizer, find_tokenizer, load_tokenizer, tokenizer_files
from sphinx_pl.data.tokenizers.sentencepiece import SentencePieceTokenizer

__all__ = [
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "copy_tokenizer",
    "find_tokenizer",
    "load_tokenizer",
    "tokenizer_files",
]
