"""Structure: https://huggingface.co/datasets/anon8231489123/ShareGPT_Vicuna_unfiltered, whose files are in FastChat's
format (data/dummy_conversation.json of lm-sys/FastChat)."""

from __future__ import annotations

from .conftest import Run


def conversation(*messages: tuple[str, str]) -> dict[str, object]:
    return {
        "id": "QWJhYvA_0",
        "conversations": [{"from": role, "value": value, "markdown": None} for role, value in messages],
        "unknown_field": 1,
    }


def test_turns_are_kept_and_broken_ones_counted(run: Run) -> None:
    records, report = run(
        "sharegpt",
        {
            "ShareGPT_V3_unfiltered_cleaned_split.json": [
                conversation(("human", "Hi"), ("gpt", "Hello."), ("user", "Bye"), ("ChatGPT", "Goodbye.")),
                conversation(("human", "Hi"), ("bing", "Hello."), ("human", "no answer to this")),
                conversation(("gpt", "the end of something"), ("human", "Go on"), ("gpt", "No.")),
                conversation(("human", "a"), ("human", "b"), ("gpt", "c"), ("gpt", "d")),
                conversation(("human", "a"), ("human", "b"), ("gpt", "c")),
                conversation(("system", "Be terse."), ("human", "a"), ("gpt", "b")),
                conversation(("human", "a"), ("tool", "b")),
                conversation(("human", "alone")),
                conversation(),
                conversation(("human", " "), ("gpt", "b")),
                conversation(("human", "What is <image> in HTML?"), ("gpt", "Nothing.")),
                conversation(("human", "a"), ("gpt", 5)),  # type: ignore[arg-type]
                "broken",
            ]
        },
    )
    assert [[(turn.question, turn.answer) for turn in record.turns] for record in records] == [
        [("Hi", "Hello."), ("Bye", "Goodbye.")],
        [("Hi", "Hello.")],
    ]
    assert {(record.task, record.images) for record in records} == {("chat", ())}
    assert report.dropped == {
        "begins_with_an_answer": 1,
        "conversation_malformed": 2,
        "role_system": 1,
        "role_unknown": 1,
        "conversation_empty": 2,
        "message_empty": 1,
        "image_absent": 1,
        "entry_malformed": 2,
    }
