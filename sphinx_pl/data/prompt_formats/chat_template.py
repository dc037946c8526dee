"""The model's own chat template, in Jinja, as transformers runs it.

The template is a program that somebody else wrote. It runs in Jinja's sandbox, which has no access
to files or attributes of Python. What it writes is taken apart with unique words in the place of all
texts: between them lies structure. Then it is rendered with the texts themselves and has to give the
same. A template whose output depends on the texts in another way is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence, Sized
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sphinx_pl.data.prompt_formats.base import PromptFormat, Writing, plain_markers
from sphinx_pl.data.schema import Turn
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.data.tokenizers.base import Tokenizer
from sphinx_pl.utils.errors import UserError

_LONGEST = 2**24
"""Characters or elements that one multiplication in a template may make."""


class _RefusedError(Exception):
    """Why a template cannot be used, or cannot write certain turns."""


class _GenerationTag(Extension):
    """transformers' `{% generation %}`, which marks what the model writes and changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - the base class has it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Raises: TemplateError: the product would fill the memory."""
        sizes = [len(a) * b for a, b in ((left, right), (right, left)) if isinstance(a, Sized) and isinstance(b, int)]
        if operator == "**" or max(sizes, default=0) > _LONGEST:
            raise TemplateError(f"{operator} makes too much of it")
        return super().call_binop(context, operator, left, right)


def _environment() -> _Sandbox:
    """Jinja with what transformers gives templates, but for `strftime_now`: a model's prompt must
    not depend on the day."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])

    def raise_exception(message: object) -> None:
        raise TemplateError(str(message))

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment


class ChatTemplate(PromptFormat):
    """The format of a tokenizer's `chat_template`.

    Raises:
        UserError: there is no template, or what an answer is cannot be told from its output.
    """

    name = "model"
    system = ""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._where = f"data.processor.prompt_format=model: the chat template of '{tokenizer.path}'"
        if tokenizer.chat_template is None:
            raise UserError(
                f"data.processor.prompt_format=model: '{tokenizer.path}' has no chat template: name another format"
            )
        self._names = dict(tokenizer.named_tokens)
        self._bos = self._names.get("bos_token", "") if tokenizer.bos_id is not None else ""
        self._literals: dict[tuple[int, bool, bool], list[str] | _RefusedError] = {}
        self._tokens = [*tokenizer.controls, *(name for name in tokenizer.added_tokens if name.strip())]
        try:
            self._template = _environment().from_string(tokenizer.chat_template)
            self.bos = bool(self._bos) and self._writes_bos()
            self.begins = not self.bos
            literals = [*self._structure(2, False, False), *self._structure(1, False, True)]
            self.controls = tuple(name for name in self._tokens if any(name in literal for literal in literals))
            self.end = self._end(self._structure(1, False, False)[-1])
            if self._end(literals[2]) != self.end:
                raise _RefusedError("it ends the last answer in another way than the answers before it")
            for turns in (1, 2):
                self._leads(turns, False)
        except (TemplateError, _RefusedError) as error:
            raise UserError(f"{self._where} cannot be used: {error}; name another format") from None
        self.markers = plain_markers(literals, self.controls)

    def check(self, system: str) -> None:
        """Raises: UserError: the template writes no system texts."""
        try:
            self._structure(1, bool(system), False)
        except _RefusedError as error:
            raise UserError(f"{self._where} has no place for data.processor.system: {error}") from None

    def _writes_bos(self) -> bool:
        """Whether the template begins with its variable `bos_token`; its value may also begin a
        turn."""
        names, self._names = self._names, self._names | {"bos_token": "Qk0wZ"}
        try:
            return self._run([_message("user", "a")], True).startswith("Qk0wZ")
        finally:
            self._names = names

    def _run(self, messages: list[dict[str, str]], open_ended: bool) -> str:
        """Raises: _RefusedError: the template fails."""
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=open_ended, **self._names
            )
        except TemplateError as error:
            raise _RefusedError(f"it fails ({error})") from None
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise _RefusedError(f"it fails ({type(error).__name__}: {error})") from None

    def _text(self, turns: Sequence[Turn], system: str, open_ended: bool) -> str:
        """What the template writes, without a BOS in front."""
        messages = [_message("system", system)] if system else []
        for turn in turns:
            messages += [_message("user", turn.question), _message("assistant", turn.answer)]
        text = self._run(messages[:-1] if open_ended else messages, open_ended)
        if self.bos and not text.startswith(self._bos):
            raise _RefusedError(f"it writes {self._bos} in front of some conversations only")
        return text[len(self._bos) :] if self.bos else text

    def _structure(self, turns: int, system: bool, open_ended: bool) -> list[str]:
        """What stands before, between and behind the texts of `turns` turns.

        Raises:
            _RefusedError: a text is missing, or stands there twice or in another order.
        """
        key = turns, system, open_ended
        if key not in self._literals:
            try:
                self._literals[key] = self._split(*key)
            except _RefusedError as error:
                self._literals[key] = error
        literals = self._literals[key]
        if isinstance(literals, _RefusedError):
            raise literals
        return literals

    def _split(self, turns: int, system: bool, open_ended: bool) -> list[str]:
        words = [f"Qk{number}wZ" for number in range(2 * turns + 1)]
        exchanges = [Turn(words[2 * i + 1], words[2 * i + 2]) for i in range(turns)]
        text = self._text(exchanges, words[0] if system else "", open_ended)
        wanted = words[0 if system else 1 : -1 if open_ended else None]
        if (written := re.findall(r"Qk\d+wZ", text)) != wanted:
            missing = [word for word in wanted if word not in written]
            number = words.index(missing[0]) if missing else -1
            what = (
                "a text"
                if number < 0
                else "the system text"
                if number == 0
                else ("an answer", "a question")[number % 2]
            )
            raise _RefusedError(f"it drops {what}" if missing else "it writes a text twice, or texts in another order")
        return re.split(r"Qk\d+wZ", text)

    def _end(self, literal: str) -> str:
        """What ends an answer: up to the first control token in what stands behind it."""
        tokens = re.compile("|".join(re.escape(name) for name in self.controls if name != self._bos) or "(?!)")
        match = tokens.search(literal)
        if match is None:
            raise _RefusedError("no control token ends an answer")
        return literal[: match.end()]

    def _leads(self, turns: int, system: bool) -> list[str]:
        """What the model writes itself before each answer: a prompt stops in front of it."""
        first = int(system)
        literals = self._structure(turns, system, False)
        leads = []
        for turn in range(turns):
            prompt = self._structure(turn + 1, system, True)[-1]
            before = literals[first + 1 + 2 * turn]
            if not before.startswith(prompt):
                raise _RefusedError("what it writes for a prompt is not what it writes before the answer")
            leads.append(before[len(prompt) :])
        return leads

    def _write(self, turns: Sequence[Turn], system: str, open_ended: bool) -> Writing:
        try:
            # Many templates remove white space around texts, or some of it.
            stripped = [Turn(turn.question.strip(), turn.answer.strip()) for turn in turns]
            for texts, before in ((turns, system), (stripped, system.strip())):
                writing = self._written(texts, before, open_ended)
                if self._text(texts, before, open_ended) == writing.text:
                    return writing
            raise _RefusedError("it changes the texts")
        except _RefusedError as error:
            raise SkipSample("chat_template", f"the model's chat template cannot write this: {error}") from None

    def _written(self, turns: Sequence[Turn], system: str, open_ended: bool) -> Writing:
        literals = self._structure(len(turns), bool(system), open_ended)
        complete = len(turns) - open_ended
        leads = self._leads(complete, bool(system)) if complete else []
        writing = Writing()
        rest = iter(literals)
        if system:
            writing.mark(next(rest))
            writing.text += system
        writing.mark(next(rest))
        for number, turn in enumerate(turns):
            writing.text += turn.question
            before = next(rest)
            if number == complete:
                writing.mark(before)
                break
            lead = leads[number] if before.endswith(leads[number]) else ""
            writing.mark(before[: len(before) - len(lead)])
            behind = next(rest)
            if not behind.startswith(self.end):
                raise _RefusedError("it ends an answer in another way than others")
            writing.answer(lead, turn.answer, self.end)
            writing.mark(behind[len(self.end) :])
        return writing


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
