"""Scenes and figures become instruction entries in LLaVA's file format.

Where a task writes its own text, an entry has our keys: `id`, `image`, `width`, `height`, `task`,
`meta` and what the task needs of `question`, `answer`, `choices` and `regions` (boxes in pixels).
Other entries have `conversations` alone, as in LLaVA's files.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from sphinx_pl.data.sample_world.drawing import COLORS, SHAPES
from sphinx_pl.data.sample_world.figures import Annotated
from sphinx_pl.data.sample_world.language import RELATIONS, Fact, description, listing, relation
from sphinx_pl.data.sample_world.scenes import DIGITS, MAX_OBJECTS, Scene, ScenePlan, Thing, group_of
from sphinx_pl.data.schema import Region

JsonEntry = dict[str, Any]
DrawScene = Callable[[int, Callable[[ScenePlan], bool] | None], Scene]

COUNT_QUESTION = "How many objects are there?"
CHOICE_QUESTION = "Which of these is in the image?"
MIDDLE = "middle"


def region(thing: Thing, label: str) -> JsonEntry:
    return {"box": list(thing.box), "label": label}


def unique_kinds(scene: Scene) -> list[Thing]:
    kinds = Counter(thing.kind for thing in scene.things)
    return [thing for thing in scene.things if kinds[thing.kind] == 1]


def unique_colors(scene: Scene) -> list[Thing]:
    colors = Counter(thing.color for thing in scene.things)
    return [thing for thing in scene.things if colors[thing.color] == 1]


def color_entry(thing: Thing) -> JsonEntry:
    return _vqa("color", f"What color is the {thing.kind}?", thing.color)


def shape_entry(thing: Thing) -> JsonEntry:
    """Return the question about a thing's shape.

    The answer is circle, square, triangle, star or digit. Which digit it is is another question.
    """
    return _vqa("shape", f"What is the {thing.color} object?", "digit" if thing.kind in DIGITS else thing.kind)


def digit_entry(thing: Thing) -> JsonEntry:
    return _vqa("digit", f"Which digit is {thing.color}?", thing.kind)


def count_entry(scene: Scene) -> JsonEntry:
    return _vqa("count", COUNT_QUESTION, str(len(scene.things)))


def _vqa(topic: str, question: str, answer: str) -> JsonEntry:
    return {"task": "short_vqa", "question": question, "answer": answer, "meta": {"topic": topic}}


def object_choice(scene: Scene, thing: Thing, rng: random.Random) -> JsonEntry:
    """Return the question which phrase is in the image.

    The choices are two colours crossed with two kinds, so that they do not give away the answer.
    """
    present = {other.phrase for other in scene.things}
    while True:
        color = rng.choice([color for color in COLORS if color != thing.color])
        kinds = SHAPES if rng.random() < 0.5 else DIGITS
        kind = rng.choice([kind for kind in kinds if kind != thing.kind])
        others = [f"{thing.color} {kind}", f"{color} {thing.kind}", f"{color} {kind}"]
        if not present.intersection(others):
            break
    return _choice("object", CHOICE_QUESTION, thing.phrase, others, rng)


def color_choice(thing: Thing, rng: random.Random) -> JsonEntry:
    others = rng.sample([color for color in COLORS if color != thing.color], 3)
    return _choice("color", f"What color is the {thing.kind}?", thing.color, others, rng)


def _choice(topic: str, question: str, answer: str, others: list[str], rng: random.Random) -> JsonEntry:
    choices = [answer, *others]
    rng.shuffle(choices)
    return {
        "task": "multiple_choice",
        "question": question,
        "answer": answer,
        "choices": choices,
        "meta": {"topic": topic},
    }


def rec_entry(thing: Thing) -> JsonEntry:
    return {"task": "rec", "question": thing.phrase, "regions": [region(thing, thing.phrase)]}


def reg_entry(thing: Thing) -> JsonEntry:
    return {"task": "reg", "answer": thing.phrase, "regions": [region(thing, thing.phrase)]}


def grounded_entry(scene: Scene) -> JsonEntry:
    return {
        "task": "grounded_caption",
        "answer": listing([f"{{{index}}}" for index in range(len(scene.things))]) + ".",
        "regions": [region(thing, thing.phrase) for thing in scene.things],
    }


def detection_entry(scene: Scene, group: str) -> JsonEntry:
    regions = [region(thing, group) for thing in scene.things if thing.group == group]
    return {"task": "detection", "question": group, "regions": regions}


def description_entry(scene: Scene) -> JsonEntry:
    return {"task": "description", "answer": description(scene)}


def relation_entry(phrase: str, other: str, place: str) -> JsonEntry:
    return {"task": "relation", "question": f"Where is the {phrase} relative to the {other}?", "answer": place}


def relations(scene: Scene) -> list[tuple[str, str, str]]:
    """Return (phrase, other phrase, its place relative to the other) of every clear pair."""
    pairs = [(a, b) for a in scene.things for b in scene.things if a is not b]
    return [(a.phrase, b.phrase, place) for a, b in pairs if (place := relation(a.center, b.center))]


def relations_to_middle(scene: Scene) -> list[tuple[str, str, str]]:
    """Return `relations` to the middle of the picture.

    Only one thing has to be found, not two, which is learned earlier. The test does not ask for
    these.
    """
    middle = scene.width / 2, scene.height / 2
    places = [(thing.phrase, relation(thing.center, middle, least=6)) for thing in scene.things]
    return [(phrase, MIDDLE, place) for phrase, place in places if place]


def scene_entries(scene: Scene, rng: random.Random) -> list[JsonEntry]:
    """Return all kinds of questions about one training scene.

    A question that is ambiguous for the scene is omitted.
    """
    things = list(scene.things)
    rng.shuffle(things)
    kinds, colors, pairs = unique_kinds(scene), unique_colors(scene), relations(scene)
    entries = [count_entry(scene), description_entry(scene), grounded_entry(scene)]
    entries += [color_entry(thing) for thing in rng.sample(kinds, min(2, len(kinds)))]
    entries += [shape_entry(thing) for thing in rng.sample(colors, min(2, len(colors)))]
    entries += [digit_entry(thing) for thing in colors if thing.kind in DIGITS][:2]
    entries += [object_choice(scene, thing, rng) for thing in things[:2]]
    entries += [color_choice(thing, rng) for thing in kinds[:1]]
    entries += [rec_entry(thing) for thing in things]
    entries += [reg_entry(thing) for thing in things]
    groups = sorted({thing.group for thing in things})
    entries += [detection_entry(scene, group) for group in rng.sample(groups, min(2, len(groups)))]
    entries += [relation_entry(*pair) for pair in rng.sample(pairs, min(2, len(pairs)))]
    entries += [relation_entry(*pair) for pair in relations_to_middle(scene)]
    return entries


def conversation_entry(scene: Scene, rng: random.Random) -> JsonEntry:
    """Return two or three questions about one scene in LLaVA's own form.

    The entry has none of our keys but the meta data.
    """
    turns = [(COUNT_QUESTION, str(len(scene.things)))]
    turns += [(entry["question"], entry["answer"]) for entry in map(color_entry, unique_kinds(scene)[:1])]
    turns += [(entry["question"], entry["answer"]) for entry in map(shape_entry, unique_colors(scene)[-1:])]
    rng.shuffle(turns)
    conversations: list[dict[str, str]] = []
    for index, (question, answer) in enumerate(turns):
        value = f"<image>\n{question}" if index == 0 else question
        conversations += [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    return {"conversations": conversations}


def chat_entry(fact: Fact) -> JsonEntry:
    meta = {"domain": "text", "topic": fact.family}
    return {"task": "chat", "question": fact.question, "answer": fact.answer, "meta": meta}


def figure_entries(figure: Annotated, task: str) -> list[JsonEntry]:
    """Return one entry of a page or of numbers. A pose picture gives one entry for each person."""
    annotations = [_annotation(annotated) for annotated in figure.regions]
    return [
        {"task": task, "regions": group}
        for group in ([[one] for one in annotations] if task == "pose" else [annotations])
    ]


def _annotation(annotated: Region) -> JsonEntry:
    entry: JsonEntry = {"box": list(annotated.box), "label": annotated.label}
    if annotated.keypoints:
        entry["keypoints"] = [list(point) for point in annotated.keypoints]
    return entry


def _kinds_differ(plan: ScenePlan) -> bool:
    return len({kind for _, kind in plan}) == len(plan)


def _colors_differ(plan: ScenePlan) -> bool:
    return len({color for color, _ in plan}) == len(plan)


def held_out_entry(task: str, topic: str, index: int, draw: DrawScene, rng: random.Random) -> tuple[Scene, JsonEntry]:
    """Return a fresh scene and one question about it.

    `index` cycles through the object counts, and through the answers where these are few.
    `draw(count, wanted)` draws a scene.
    """
    count = index % MAX_OBJECTS + 1
    if task == "relation":
        place = RELATIONS[index % 4]
        while True:
            scene = draw(rng.randint(2, MAX_OBJECTS), None)
            pairs = [pair for pair in relations(scene) if pair[2] == place]
            if pairs:
                return scene, relation_entry(*rng.choice(pairs))
    if task == "detection":
        groups = [*(f"{shape}s" for shape in SHAPES), "digits"]
        group = groups[index % len(groups)]
        scene = draw(rng.randint(1, MAX_OBJECTS), lambda plan: any(group_of(kind) == group for _, kind in plan))
        return scene, detection_entry(scene, group)
    if topic == "color":
        scene = draw(count, _kinds_differ)
    elif topic == "shape":
        scene = draw(count, _colors_differ)
    else:
        scene = draw(count, None)
    thing = rng.choice(scene.things)
    match task, topic:
        case "short_vqa", "digit":
            while not (digits := [thing for thing in unique_colors(scene) if thing.kind in DIGITS]):
                scene = draw(count, _colors_differ)
            return scene, digit_entry(rng.choice(digits))
        case "short_vqa", "color":
            return scene, color_entry(thing)
        case "short_vqa", "shape":
            return scene, shape_entry(thing)
        case "short_vqa", _:
            return scene, count_entry(scene)
        case "multiple_choice", "color":
            return scene, color_choice(thing, rng)
        case "multiple_choice", _:
            return scene, object_choice(scene, thing, rng)
        case "rec", _:
            return scene, rec_entry(thing)
        case "reg", _:
            return scene, reg_entry(thing)
        case "grounded_caption", _:
            return scene, grounded_entry(scene)
        case "description", _:
            return scene, description_entry(scene)
    raise ValueError(f"no held-out questions for {task} {topic}")
