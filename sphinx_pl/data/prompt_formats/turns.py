"""The formats that a table describes: what stands around system texts, questions and answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

from sphinx_pl.data.prompt_formats.base import Markers, PromptFormat, Writing, plain_markers
from sphinx_pl.data.schema import Turn
from sphinx_pl.data.tokenizers.base import Tokenizer
from sphinx_pl.utils.registry import Registry

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
EOS = "{eos}"
"""It stands for the name of the tokenizer's end of a text."""


@dataclass(frozen=True)
class TurnFormat(PromptFormat):
    """A format whose turns are all written alike.

    Attributes:
        system: the system text, unless the configuration or a record has one.
        around_system: what stands before and behind a system text.
        without_system: what stands at the beginning where there is none.
        around_question: what stands before and behind a question.
        reply: what stands before an answer. A prompt ends with it.
        lead: what the model writes before the answer.
        after: what stands between an answer's end and the next turn.
        controls: the control tokens among all this, which new models may lack.
    """

    name: str
    around_question: tuple[str, str]
    reply: str
    end: str
    around_system: tuple[str, str]
    without_system: str = ""
    lead: str = ""
    after: str = ""
    system: str = ""
    bos: bool = False
    controls: tuple[str, ...] = ()

    def bound(self, tokenizer: Tokenizer) -> TurnFormat:
        """This format with the tokenizer's end of a text."""
        eos = tokenizer.named_tokens["eos_token"]

        def named(value: object) -> object:
            if isinstance(value, tuple):
                return tuple(map(named, value))
            return value.replace(EOS, eos) if isinstance(value, str) else value

        return replace(self, **{each.name: named(getattr(self, each.name)) for each in fields(self)})  # type: ignore[arg-type]

    @cached_property
    def markers(self) -> Markers:  # type: ignore[override]
        literals = (*self.around_system, *self.around_question, self.reply, self.lead, self.end, self.after)
        return plain_markers(literals, self.controls)

    def _write(self, turns: Sequence[Turn], system: str, open_ended: bool) -> Writing:
        writing = Writing()
        if system:
            writing.mark(self.around_system[0])
            writing.text += system
            writing.mark(self.around_system[1])
        else:
            writing.mark(self.without_system)
        for i, turn in enumerate(turns):
            writing.mark(self.around_question[0])
            writing.text += turn.question
            writing.mark(self.around_question[1])
            writing.mark(self.reply)
            if open_ended and i == len(turns) - 1:
                break
            writing.answer(self.lead, turn.answer, self.end)
            writing.mark(self.after)
        return writing


class SphinxFormat(TurnFormat):
    """The original's format (LLaMA2-Accessory, `accessory/data/conversation`): the system text,
    then `\\n\\n###` + ` Human: question\\n###` + ` Assistant:` + ` answer\\n###`, and further turns
    in the same way.

    An answer is supervised together with its ending `\\n###`. Without a system text, a conversation
    starts with `###` alone.
    """

    # Some tokenizers take full-width signs for a number sign, and sentencepiece takes U+2581 for a
    # space.
    _LINE = "[#\uff03\ufe5f]{3}"
    _STRUCTURE = re.compile(f"\n(?={_LINE})|(?<=###)[ \u2581](?=(?:Human|Assistant):)")
    _ESCAPED = re.compile(f"\n (?={_LINE})")

    def escape(self, text: str) -> str:
        """The text with added spaces, so that it cannot end or begin a turn.

        A space is added before a `###` that begins a line, which Markdown still reads as a heading.
        Another is added between `###` and ` Human:` or ` Assistant:` anywhere in a line.
        """
        return self._STRUCTURE.sub(r"\g<0> ", text)

    def unescape(self, text: str) -> str:
        """The model's text without the space that `escape` adds before a `###` at the beginning of
        a line."""
        return self._ESCAPED.sub("\n", text)


SPHINX = SphinxFormat(
    "sphinx",
    around_system=("", "\n\n###"),
    without_system="###",
    around_question=(" Human: ", "\n###"),
    reply=" Assistant:",
    lead=" ",
    end="\n###",
    system=SYSTEM,
    bos=True,
)
_CHATML = TurnFormat(
    "chatml",
    around_system=("<|im_start|>system\n", "<|im_end|>\n"),
    around_question=("<|im_start|>user\n", "<|im_end|>\n"),
    reply="<|im_start|>assistant\n",
    end="<|im_end|>",
    after="\n",
    controls=("<|im_start|>", "<|im_end|>"),
)
_LLAMA3 = TurnFormat(
    "llama3",
    around_system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
    around_question=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    reply="<|start_header_id|>assistant<|end_header_id|>\n\n",
    end="<|eot_id|>",
    bos=True,
    controls=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
_VICUNA = TurnFormat(  # FastChat's vicuna_v1.1
    "vicuna",
    around_system=("", " "),
    around_question=("USER: ", " "),
    reply="ASSISTANT:",
    lead=" ",
    end=EOS,
    system="A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    bos=True,
    controls=(EOS,),
)
_ZEPHYR = TurnFormat(  # TinyLlama's too
    "zephyr",
    around_system=("<|system|>\n", f"{EOS}\n"),
    around_question=("<|user|>\n", f"{EOS}\n"),
    reply="<|assistant|>\n",
    end=EOS,
    after="\n",
    controls=(EOS,),
)
_ALPACA = TurnFormat(  # Stanford's, which has one turn; further ones follow after an empty line
    "alpaca",
    around_system=("", "\n\n"),
    around_question=("### Instruction:\n", "\n\n"),
    reply="### Response:",
    end=EOS,
    after="\n\n",
    system="Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    bos=True,
    controls=(EOS,),
)

FORMATS: Registry[TurnFormat] = Registry("prompt format")
for _format in (SPHINX, _CHATML, _LLAMA3, _VICUNA, _ZEPHYR, replace(_CHATML, name="internlm2", bos=True), _ALPACA):
    FORMATS.register(_format.name, _format)
