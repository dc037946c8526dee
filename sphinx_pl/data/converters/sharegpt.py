"""ShareGPT has conversations of people with ChatGPT, as text only.

The file (https://huggingface.co/datasets/anon8231489123/ShareGPT_Vicuna_unfiltered) is
`ShareGPT_V3_unfiltered_cleaned_split.json`, a list of {"id", "conversations": [{"from", "value"}]}.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sphinx_pl.data.converters import Converter
from sphinx_pl.data.converters.common import keyed
from sphinx_pl.data.readers.instruction_json import to_record
from sphinx_pl.data.schema import Record
from sphinx_pl.data.skip import SkipSample

_ROLES = {"human": "human", "user": "human"} | dict.fromkeys(("gpt", "chatgpt", "assistant", "bing", "bard"), "gpt")


class ShareGPTConverter(Converter):
    """A conversation that begins with an answer is dropped.

    The file splits long conversations, so that some parts begin in this way. A question at the end
    without an answer is removed.
    """

    name = "sharegpt"
    title = "ShareGPT"
    url = "https://huggingface.co/datasets/anon8231489123/ShareGPT_Vicuna_unfiltered"
    licence = "Apache-2.0, as the page says"
    tasks = ("chat",)
    splits = ("train",)

    def entries(self) -> Iterator[tuple[str, Any]]:
        yield from keyed(self.json("ShareGPT_V3_unfiltered_cleaned_split.json"), "id", unique=False)

    def records(self, key: str, entry: Any) -> Iterator[Record]:
        messages = [{"from": message["from"].lower(), "value": message["value"]} for message in entry["conversations"]]
        for message in messages:
            if message["from"] not in _ROLES:
                raise SkipSample(f"role_{message['from']}" if message["from"] == "system" else "role_unknown", key)
            message["from"] = _ROLES[message["from"]]
        if messages and messages[0]["from"] != "human":
            raise SkipSample("begins_with_an_answer", key)
        if len(messages) % 2:  # if a turn is missing inside instead, a check below raises
            messages.pop()
        if not messages:
            raise SkipSample("conversation_empty", key)
        if not all(message["value"].strip() for message in messages):
            raise SkipSample("message_empty", key)
        yield to_record({"conversations": messages}, key, Path(), "chat")
