"""Hugging Face's tokenizer.json, run by the `tokenizers` library."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from sphinx_pl.data.tokenizers.base import ControlToken, Span, Tokenizer
from sphinx_pl.utils.errors import UserError

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
BESIDE = (TOKENIZER_CONFIG, SPECIAL_TOKENS, GENERATION_CONFIG, CHAT_TEMPLATE)
"""Files that may lie beside tokenizer.json and are part of the tokenizer."""
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer whose text has the ids that the `tokenizers` library gives.

    Special added tokens are control tokens. Added tokens that are not special are vocabulary, unless
    `controls` has their names.

    Raises:
        UserError: a file is damaged, or none names the end of a text.
    """

    def __init__(self, path: Path, files: Mapping[str, bytes], controls: Iterable[str] = ()) -> None:
        super().__init__(path, files, controls)
        content = self._json(TOKENIZER_JSON)
        with self._readable(TOKENIZER_JSON):
            # Only the ids of text are wanted, of all of it.
            content |= {"post_processor": None, "truncation": None, "padding": None}
            self._content = content
            for token in content.get("added_tokens") or ():
                token["special"] = bool(token["special"] or token["content"] in self._wanted)
            self._first = self._built(content)
            self._extend()
            vocabulary = self._first.get_vocab(with_added_tokens=True)
            self._names = {id: name for name, id in vocabulary.items()}
            self.vocab_size = max(self._names) + 1
            added = self._first.get_added_tokens_decoder()
            self.longest_piece = max(map(len, vocabulary))
            self._first.encode("a\n\u65e5 ", add_special_tokens=False)
        self._added = {id: token.content for id, token in added.items()}
        self._read_names(vocabulary)
        self.controls = {
            token.content: ControlToken(id, token.lstrip, token.rstrip)
            for id, token in added.items()
            if token.special and token.content and token.content != self.named_tokens.get("unk_token")
        }
        self.added_tokens = [token.content for token in added.values() if not token.special]
        # A text of one character cannot be written in another way.
        self._forbidden = {token.id for name, token in self.controls.items() if len(name) > 1}
        self._special = {id for id, token in added.items() if token.special}

    def _json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads(self.files.get(name, b"{}"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"'{self.path.with_name(name)}' cannot be read ({error}): fetch it again") from None
        if not isinstance(content, dict):
            raise UserError(f"'{self.path.with_name(name)}' does not hold a JSON object: fetch it again")
        return content

    @contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library's panics are no Exception
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"'{self.path.with_name(name)}' is not a tokenizer ({why}): fetch it again") from None

    @staticmethod
    def _built(content: Mapping[str, Any]) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        tokenizer.encode_special_tokens = True
        return tokenizer

    def _extend(self) -> None:
        """Add the wanted control tokens that the vocabulary lacks, to the file too."""
        special = {token["content"] for token in self._content.get("added_tokens") or ()}
        missing = [name for name in self._wanted if name not in special]
        if not missing:
            return
        self.new_tokens = [name for name in missing if self._first.token_to_id(name) is None]
        tokens = [AddedToken(name, special=True, normalized=False) for name in missing]
        self._first.add_special_tokens(tokens)
        self._content = json.loads(self._first.to_str())
        whole = tokenizers.Tokenizer.from_str(self.files[TOKENIZER_JSON].decode())
        whole.add_special_tokens(tokens)
        self.files[TOKENIZER_JSON] = whole.to_str(pretty=True).encode()

    def _read_names(self, vocabulary: Mapping[str, int]) -> None:
        """Read which tokens begin and end a text, and the chat template."""
        config, generation = self._json(TOKENIZER_CONFIG), self._json(GENERATION_CONFIG)
        self.named_tokens = {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in {**self._json(SPECIAL_TOKENS), **config}.items()
            if key.endswith("_token") and isinstance(value.get("content") if isinstance(value, dict) else value, str)
        }
        with self._readable(GENERATION_CONFIG):
            ends = generation.get("eos_token_id")
            listed = [int(id) for id in (ends if isinstance(ends, list) else [ends]) if id is not None]
            start = generation.get("bos_token_id")
            start = None if start is None else int(start)
        listed.insert(0, vocabulary.get(self.named_tokens.get("eos_token", ""), -1))
        self.eos_ids = tuple(dict.fromkeys(id for id in listed if id in self._names))
        if not self.eos_ids:
            raise UserError(
                f"'{self.path}' does not say which token ends a text: put the {TOKENIZER_CONFIG} of the same model, "
                "with an eos_token, beside it"
            )
        self.eos_id = self.eos_ids[0]
        # A configuration without a bos_token says that there is none.
        bos = self.named_tokens.get("bos_token") if config else self._names.get(-1 if start is None else start)
        self.bos_id = vocabulary.get(bos) if bos is not None else None
        self.named_tokens = {"eos_token": self._names[self.eos_id], **self.named_tokens}
        template = config.get("chat_template")
        if isinstance(template, list):
            templates = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = templates.get("default")
        if CHAT_TEMPLATE in self.files:
            template = self.files[CHAT_TEMPLATE].decode(errors="replace")
        self.chat_template = template if isinstance(template, str) else None

    @cached_property
    def _later(self) -> tokenizers.Tokenizer:
        """The tokenizer of a text behind another one: without the space that only a beginning
        gets."""
        text = json.dumps(self._content)
        later = text.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
        return self._first if later == text else self._built(json.loads(later))

    def _encode_text(self, text: str, begins: bool) -> tuple[list[int], list[Span]]:
        encoding = (self._first if begins else self._later).encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        # A token without characters, such as a space that the tokenizer adds, gets the next one.
        spans = [(a, b) if a < b else (min(a, len(text) - 1), min(a, len(text) - 1) + 1) for a, b in encoding.offsets]
        if self._forbidden.isdisjoint(ids):
            return ids, spans
        # A model may have the name of a control token in its vocabulary: it is cut in two.
        begin, end = next(span for id, span in zip(ids, spans, strict=True) if id in self._forbidden)
        middle = min(begin + 1, end - 1) if end - begin > 1 else end
        if not 0 < middle < len(text):
            middle = len(text) // 2
        first, second = self._encode_text(text[:middle], begins), self._encode_text(text[middle:], False)
        return first[0] + second[0], first[1] + [(a + middle, b + middle) for a, b in second[1]]

    def decode(self, ids: Sequence[int]) -> str:
        own = [id for id in ids if id in self._names and id not in self._special]
        text: str = self._first.decode(own, skip_special_tokens=False)
        return text

    def piece(self, id: int) -> str | bytes:
        name = self._names.get(id, "")
        if id in self._added:
            return self._added[id]
        if self._bytes_of is not None:
            content = bytes(self._bytes_of.get(character, 32) for character in name)
            try:
                return content.decode()
            except UnicodeDecodeError:
                return content
        byte = _BYTE.fullmatch(name)
        return bytes([int(byte[1], 16)]) if byte else name.replace("\u2581", " ")

    @cached_property
    def _bytes_of(self) -> Mapping[str, int] | None:
        """The byte of each character of a token's name, if the tokenizer is of GPT-2's kind."""
        return byte_alphabet() if '"ByteLevel"' in json.dumps(self._content.get("decoder")) else None

    def is_special(self, id: int) -> bool:
        return id in self._special or self._names.get(id) == self.named_tokens.get("unk_token", "")


def byte_alphabet() -> dict[str, int]:
    """The byte of each character of GPT-2's alphabet: printable bytes are themselves, the others
    follow from U+0100 on (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(256 + number): byte for number, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted
