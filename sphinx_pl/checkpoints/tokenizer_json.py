"""A SentencePiece model as the tokenizer.json that transformers reads, which gives the same ids for
every text.

transformers builds its own LLaMA tokenizer from a tokenizer.model. That one drops a leading space,
reads `<s>` in a text as the start token and knows no user-defined symbols. The tokenizer.json
written here states every step instead.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphinx_pl.data.tokenizers import load_tokenizer
from sphinx_pl.utils.errors import UserError

if TYPE_CHECKING:
    import tokenizers

SPACE = "\u2581"
TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)  # kinds of pieces in SentencePiece's files
_UNIGRAM, _BPE = 1, 2
# Letters of several cases and scripts, accents in two ways, ligatures, digits, contractions, code,
# spaces, emoji. None begins with a space, where Llama's two forms of one tokenizer differ.
PROBES = (
    "The quick brown fox's 1,234.56 jumps — WE'LL see don't they'VE",
    "ABC abc Abc aB ba AB ab  two   three    spaces\ttab\nline\n\nlines\r\n  trailing ",
    "naïve café cafe\u0301 Å Å İstanbul ﬁne Ⅳ ½ ² ﬀ ß ẞ Ω \u00a0\u200b\u3000.",
    "def f(x):\n    return x[0] + 12345678 # http://a.b/c?d=e_f&g=h-i <b>|</b> {'a': 1e-5}",
    "日本語の文章、全角ＡＢＣ１２３。한국어 문장 русский Текст العربية हिन्दी ไทย 中文，测试",
    "😀👩\u200d👩\u200d👧🇩🇪 ''\"\"``´´ ...…?!¿¡ -–—_ @user #tag $5 5€ 50% a/b\\c",
)


def tokenizer_json(file: Path, probes: Sequence[str] = ()) -> tuple[str, dict[str, Any]]:
    """The texts of tokenizer.json and tokenizer_config.json for a SentencePiece model.

    Args:
        probes: more texts that have to give the same ids.

    Raises:
        UserError: the file is no SentencePiece model, or a test text gives other ids.
    """
    own = load_tokenizer(file)
    pieces, tokenizer = _convert(file)
    tokenizer.encode_special_tokens = True
    for text in (*PROBES, *_probes(pieces), *probes):
        if tokenizer.encode(text, add_special_tokens=False).ids != own.encode(text):
            raise UserError(
                f"'{file}' cannot be written as {TOKENIZER_JSON}: transformers would give other ids for {text[:40]!r}"
            )
    unknown = next(piece.piece for piece in pieces if piece.type == _UNKNOWN)
    named = {"bos_token": pieces[own.bos_id].piece, "eos_token": pieces[own.eos_id].piece, "unk_token": unknown}
    # With `split_special_tokens` a mark such as <s> in a text is text, as it was in training.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named, "add_bos_token": True}
    return tokenizer.to_str(), config | {"split_special_tokens": True, "clean_up_tokenization_spaces": False}


def _convert(file: Path) -> tuple[Any, tokenizers.Tokenizer]:
    """The pieces, and a tokenizer that follows SentencePiece's steps."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    proto = ModelProto()
    proto.ParseFromString(file.read_bytes())
    pieces, trainer, rules = proto.pieces, proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE) or trainer.treat_whitespace_as_suffix or not rules.escape_whitespaces:
        raise UserError(f"'{file}' is neither a BPE nor a unigram model with ▁ before words: it cannot be exported")
    unknown = next(number for number, piece in enumerate(pieces) if piece.type == _UNKNOWN)
    users = [piece.piece for piece in pieces if piece.type == _USER]
    if trainer.model_type == _UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in pieces]
        model: Any = models.Unigram(scores, unk_id=unknown, byte_fallback=trainer.byte_fallback)
    else:
        model = models.BPE(
            {piece.piece: number for number, piece in enumerate(pieces)},
            _merges(pieces),
            unk_token=pieces[unknown].piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
            ignore_merges=bool(users),  # user-defined symbols are no results of merges
        )
    tokenizer = Tokenizer(model)
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""), normalizers.Replace(Regex(" +"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    if users:
        longest_first = sorted(users, key=len, reverse=True)
        apart = [Regex("|".join(map(re.escape, longest_first))), *_inside_marks(pieces)]
        behaviours = ["isolated", *["merged_with_previous"] * (len(apart) - 1)]
        splits = [pre_tokenizers.Split(p, b) for p, b in zip(apart, behaviours, strict=True)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    ends: list[Any] = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    start = trainer.bos_id
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{trainer.bos_piece} $A",
        pair=f"{trainer.bos_piece} $A {trainer.bos_piece} $B",
        special_tokens=[(trainer.bos_piece, start)],
    )
    marks = [piece.piece for piece in pieces if piece.type in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return pieces, tokenizer


def _merges(pieces: Sequence[Any]) -> list[tuple[str, str]]:
    """Every two pieces that make up a third, as SentencePiece joins them: best score first."""
    ids = {piece.piece: number for number, piece in enumerate(pieces) if piece.type == _NORMAL}
    merges = []
    for piece in pieces:
        if piece.type == _NORMAL:
            cuts = ((piece.piece[:place], piece.piece[place:]) for place in range(1, len(piece.piece)))
            pairs = [(left, right) for left, right in cuts if left in ids and right in ids]
            merges += [(-piece.score, ids[left], ids[right], left, right) for left, right in pairs]
    return [(left, right) for *_, left, right in sorted(merges)]


def _inside_marks(pieces: Sequence[Any]) -> list[Any]:
    """Patterns that cut the names of control and byte pieces in two, between characters that no
    piece has together.

    A text that holds such a name is then no single word, which the model would look up.
    """
    from tokenizers import Regex

    ordinary = [piece.piece for piece in pieces if piece.type in (_NORMAL, _USER)]
    together = {text[place : place + 2] for text in ordinary for place in range(len(text) - 1)}
    cuts = set()
    for piece in pieces:
        if piece.type in (_UNKNOWN, _CONTROL, _BYTE):
            name = piece.piece
            place = next((p for p in range(1, len(name)) if name[p - 1 : p + 1] not in together), None)
            if place is not None:
                cuts.add((name[place - 1], name[place]))
    return [Regex(f"{re.escape(left)}(?={re.escape(right)})") for left, right in sorted(cuts)]


def _probes(pieces: Sequence[Any]) -> list[str]:
    """Pieces alone, behind words and symbols; runs of characters; random rows of pieces."""
    texts = [piece.piece.replace(SPACE, " ") for piece in pieces]
    symbols = [piece.piece for piece in pieces if piece.type == _USER][:1]
    rng = random.Random(0)
    rows = ["".join(rng.choices(texts, k=rng.randint(2, 12))) for _ in range(2000)]
    runs = [character * count for character in " \n0a=-." for count in range(1, 20)]
    characters = [text for text in texts if len(text) == 1] or ["a"]
    letters = ["".join(rng.choices(characters, k=rng.randint(2, 20))) for _ in range(1000)]
    behind = [f"{before}{text}{after}" for text in texts for before in (*symbols, " x") for after in ("", *symbols)]
    return ["", *texts, *behind, *rows, *runs, *letters, *(f" {row}  " for row in rows[:200])]
