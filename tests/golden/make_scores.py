"""Makes scores.json.gz beside this file: odd answers, and what other packages score them.

    # in an environment of its own, whose Python then runs this:
    pip install --no-deps lmms-eval==0.7.3 salesforce-lavis==1.0.2 aac-metrics==0.6.0 faster-coco-eval==1.8.0
    pip install loguru numpy pandas requests pyyaml Levenshtein
    python tests/golden/make_scores.py

The first three are not imported as a whole, since they want much more than that: `lmms_eval` and `aac_metrics` stand
as empty packages on their own folders, and what their modules import and scoring does not use (judges that ask a
language model, BLEU, PyTorch around NumPy's arrays) as empty modules. Each entry of the file is a list of cases;
`CASES` below names what a case holds, its last items are the packages' results.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib
import importlib.metadata
import importlib.util
import io
import json
import random
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "scores.json.gz"

CASES = {
    "words": "text; LAVIS processPunctuation and processDigitArticle; lmms-eval EvalAIAnswerProcessor",
    "vqa": "prediction; ten answers; LAVIS VQAEval; lmms-eval vqav2; lmms-eval textvqa",
    "anls": "prediction; answers; lmms-eval anls",
    "chartqa": "prediction; answer; lmms-eval relaxed_correctness",
    "pope": "predictions; labels; lmms-eval accuracy, precision, recall, f1, yes_ratio",
    "mme_words": "text; lmms-eval parse_pred_ans",
    "mme": "[subtask, image, score]...; kind; lmms-eval total",
    "mmbench": "text; options; lmms-eval can_infer",
    "circular": "[index, prediction, answer]...; [question, hit]... of lmms-eval eval_sub_data",
    "seedbench": "prediction; options; answer; lmms-eval seed_process_result and seed_aggregation_result",
    "scienceqa": "prediction; options; index of the answer; lmms-eval sqa_process_results",
    "mathvista": "response; question_type; answer_type; choices; precision; lmms-eval: read by rules, normalised",
    "cider": "captions; references of each, tokenized; aac-metrics cider_d",
    "detection": "sizes; true [image, category, box, area, crowd]...; found [image, category, box, score]...; "
    "faster-coco-eval's twelve figures, boxes being x1, y1, x2, y2",
    "keypoints": "sizes; true [image, keypoints, box, area, crowd]...; found [image, keypoints, score]...; "
    "faster-coco-eval's ten figures",
    "rec": "text; true box, both in fractions of a square; lmms-eval compute_accuracy",
}

TEXT = r"""
a an the A The dog dogs red Red blue yes Yes no none zero one Two three ten eleven 1 2 3 10 1,000 2,500,000 3.5 .5 5.
12:30 U.S.A. u.s. Mr. e.g. dont don't cant can't Im I'm hes he's lets let's oclock o'clock 'twas twas ow's'at wed've
somebody'd somebodyd john's dogs' red/blue red-blue red,blue (red) [red] {red} "red" red; red: red? red! red... red_dog
red+blue red=1 <red> red> @home a@b `red` back\slash 50% $5 #1 & * 5kg kg 3ft 10cm , . ? ! - / ; é naïve 日本
unanswerable unsuitable
"""
WORDS = (*TEXT.split(), "", "\t", "\n", "5 kg")


def main() -> None:
    rng = random.Random(0)
    makers: dict[str, Callable[[random.Random], list[Any]]] = {
        "words": words, "vqa": vqa, "anls": anls, "chartqa": chartqa, "pope": pope, "mme_words": mme_words, "mme": mme,
        "mmbench": mmbench, "circular": circular, "seedbench": seedbench, "scienceqa": scienceqa,
        "mathvista": mathvista, "cider": cider, "detection": detection, "keypoints": keypoints, "rec": rec,
    }  # fmt: skip
    assert makers.keys() == CASES.keys()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        found: dict[str, Any] = {name: make(rng) for name, make in makers.items()}
    packages = ("lmms-eval", "salesforce-lavis", "aac-metrics", "faster-coco-eval")
    found["versions"] = {name: importlib.metadata.version(name) for name in packages}
    text = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    OUT.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    print(f"{OUT}: {OUT.stat().st_size} bytes, { ({name: len(cases) for name, cases in found.items()}) }")


def _empty(name: str, **content: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module
    return module


def _empty_package(name: str, *folders: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    _empty(name, __path__=[str(root)])
    for folder in folders:
        _empty(f"{name}.{folder}", __path__=[str(root / folder)])


def task(module: str) -> Any:
    """A module of lmms-eval, by its path within the package."""
    if "lmms_eval" not in sys.modules:
        _empty_package("lmms_eval", "tasks", "api")
        nothing = lambda *args, **kwargs: None  # noqa: E731
        _empty("lmms_eval.llm_judge", Request=nothing, ServerConfig=nothing, get_server=nothing)
        _empty("sacrebleu")
        _empty("datasets", Dataset=None)
        _empty("lmms_eval.api.registry", register_metric=_unregistered, register_aggregation=_unregistered)
    return importlib.import_module(f"lmms_eval.{module}")


def _unregistered(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    return lambda function: function


def lavis_vqa_eval() -> Any:
    distribution = importlib.metadata.distribution("salesforce-lavis")
    path = distribution.locate_file("lavis/common/vqa_tools/vqa_eval.py")
    spec = importlib.util.spec_from_file_location("lavis_vqa_eval", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.VQAEval


def text(rng: random.Random, most: int) -> str:
    return rng.choice((" ", " ", " ", "  ", "")).join(rng.choices(WORDS, k=rng.randint(0, most)))


def variant(rng: random.Random, words: str) -> str:
    """The same answer as another person would write it."""
    changes: tuple[Callable[[str], str], ...] = (
        str, str, str, str.lower, str.upper, str.capitalize,
        lambda s: f"the {s}", lambda s: f"a {s}", lambda s: f"{s}.", lambda s: f"{s}?", lambda s: f"({s})",
        lambda s: f" {s} ", lambda s: f"{s}\n", lambda s: s.replace("'", ""), lambda s: s.replace(" ", "-"),
        lambda s: s.replace(" ", ", "), lambda s: s.replace("2", "two"), lambda s: s.replace("one", "1"),
    )  # fmt: skip
    for change in rng.sample(changes, k=rng.randint(0, 2)):
        words = change(words)
    return words


def words(rng: random.Random) -> list[Any]:
    evaluation, other = lavis_vqa_eval()(), task("tasks._task_utils.vqa_eval_metric").EvalAIAnswerProcessor()
    texts = [*WORDS, *evaluation.contractions, *evaluation.contractions.values()]
    texts += [f"we {word}, she said." for word in evaluation.contractions]
    texts += [text(rng, 6) for _ in range(2500)] + ["." * 40, "a." * 40]
    cases = []
    for item in texts:
        line = item.replace("\n", " ").replace("\t", " ").strip()
        cases.append([item, evaluation.processDigitArticle(evaluation.processPunctuation(line)), other(item)])
    return cases


class _Answers:
    """As much of LAVIS' VQA as its evaluation asks for."""

    def __init__(self, qa: dict[int, Any]) -> None:
        self.qa = qa

    def getQuesIds(self) -> list[int]:  # noqa: N802
        return list(self.qa)


def vqa(rng: random.Random) -> list[Any]:
    vqav2, textvqa = task("tasks.vqav2.utils"), task("tasks.textvqa.utils")
    cases = []
    for _ in range(1500):
        bases = [text(rng, 2).strip() or "dog" for _ in range(rng.randint(1, 3))]
        answers = [variant(rng, rng.choice(bases)) for _ in range(10)]
        if rng.random() < 0.15:
            answers = [answers[0]] * 10
        prediction = rng.choice((variant(rng, rng.choice(bases)), rng.choice(answers)))
        truth = {"question_type": "q", "answer_type": "a"}
        truth |= {"answers": [{"answer": answer, "answer_id": i} for i, answer in enumerate(answers)]}
        evaluation = lavis_vqa_eval()(_Answers({1: truth}), _Answers({1: {"answer": prediction}}), n=9)
        evaluation.evaluate([1])
        document = [{"answer": answer, "answer_id": i} for i, answer in enumerate(answers)]
        always = vqav2.vqav2_process_results({"question_id": 1, "answers": document}, [prediction])["exact_match"]
        other = textvqa.textvqa_process_results({"question_id": 1, "answers": list(answers)}, [prediction])
        figures = [evaluation.evalQA[1] / 100, always, other["exact_match"]]
        cases.append([prediction, answers, *(round(figure, 9) for figure in figures)])
    return cases


def anls(rng: random.Random) -> list[Any]:
    score = task("api.metrics").anls
    cases = []
    for _ in range(1500):
        answers = [text(rng, 3) for _ in range(rng.randint(1, 3))]
        prediction = list(variant(rng, rng.choice(answers)))
        for _ in range(rng.randint(0, 4)):
            prediction.insert(rng.randint(0, len(prediction)), rng.choice("ab .,1"))
        joined = "".join(prediction)
        cases.append([joined, answers, round(float(score(answers, [joined])["anls"]), 9)])
    return cases


def chartqa(rng: random.Random) -> list[Any]:
    relaxed = task("tasks.chartqa.utils").relaxed_correctness

    def number(value: float) -> str:
        form = rng.choice(("{}", "{}", "{}%", "{:.2f}", "{:,}", "{:e}", "{}.", "${}", "{} %", "+{}", "{} million"))
        return form.format(round(value, 6))

    others = ("Yes", "yes", "no", "", "nan", "inf", "Red", "red", "1_000", "2019", "2,019", "%", "[1, 2]", "٣")
    cases = []
    for _ in range(2500):
        value = rng.choice((0, 1, 5, 45, 100, 1000, 2019, 0.45, -3, 12.5))
        ratio = rng.choice((1, 1, 1.05, 0.95, 1.0501, 0.94, -1, 100, 0.01))
        if rng.random() < 0.8:
            prediction, answer = number(value * ratio), number(value)
        else:
            prediction, answer = rng.choice(others), rng.choice((*others, number(value)))
        cases.append([prediction, answer, bool(relaxed(prediction, answer))])
    return cases


def pope(rng: random.Random) -> list[Any]:
    utils = task("tasks.pope.utils")
    cases = []
    for _ in range(200):
        labels = rng.choices(("yes", "no"), (rng.random(), rng.random()), k=rng.randint(1, 60))
        predictions = [rng.choice((label, "yes", "no", "Yes", "NO ", "maybe")) for label in labels]
        if rng.random() < 0.5:
            predictions = [prediction.replace("maybe", "no") for prediction in predictions]
        results = [
            utils.pope_process_results({"question_id": 1, "answer": label}, [prediction])["pope_accuracy"]
            for prediction, label in zip(predictions, labels, strict=True)
        ]
        names = ("accuracy", "precision", "recall", "f1_score", "yes_ratio")
        figures = [round(getattr(utils, f"pope_aggregate_{name}")(results), 9) for name in names]
        cases.append([predictions, labels, *figures])
    return cases


def mme_words(rng: random.Random) -> list[Any]:
    parse = task("tasks.mme.utils").parse_pred_ans
    starts = (
        "yes",
        "Yes",
        "YES",
        "no",
        "No",
        "NO",
        "none",
        "not",
        "Nope",
        "yesterday",
        "y",
        "n",
        "",
        "I",
        "maybe",
        "No-one",
    )
    ends = ("", ".", ",", "!", ", it is", " it is not", ". No", "\n", " no", " yes")
    texts = [f"{blank}{start}{end}" for blank in ("", " ", "\n") for start in starts for end in ends]
    return [[item, parse(item)] for item in texts]


def mme(rng: random.Random) -> list[Any]:
    utils = task("tasks.mme.utils")
    cases = []
    for _ in range(60):
        kind = rng.choice(("Perception", "Cognition"))
        subtasks = rng.sample(utils.eval_type_dict[kind], k=rng.randint(1, 4))
        answers = [
            [subtask, f"{image}.png", rng.randint(0, 1)]
            for subtask in subtasks
            for image in range(rng.randint(1, 6))
            for _ in range(2)
        ]
        rng.shuffle(answers)
        results = [{"category": subtask, "question_id": image, "score": score} for subtask, image, score in answers]
        cases.append([answers, kind.lower(), round(utils.mme_aggregate_results(results), 6)])
    return cases


# fmt: off
OPTIONS = (
    "a cat", "dog", "red", "Red car", "two", "A", "B", "the left side", "I. Newton", "blue", "C. Darwin", "no",
    "3/4", "green", "left", "4", "bus", "on the table", "7 m", "None of these", "Yes",
)
LETTER_FORMS = (
    "{l}", "{l}.", "({l})", "{l})", "{l}:", "{l}. {o}", "{l}: {o}", "({l}) {o}", "{l}, {m}", "{l} or {m}", "{l}{m}",
    "{o}", "{o}.", "Answer: {l}", "The answer is {l}", "The answer is {l}.", "the answer is ({l}).",
    "The answer is: {l}", "The correct answer is {l}. {o}", "The answer is {o}", "Answer: {o}.", "It is {o}",
    "{l} is right", "Option {l}", "I think {l}", "A man", "", " ", "not {l}", "The answer is not {l}", "{o} or {p}",
    "**{l}**", "{l}.\n{o}", "{l} {o}", "Neither", "Blue", "The answer is A dog", "Answer: {l} because {o}",
    "Image {l}", "{L}.",
)
# fmt: on


def letter_text(rng: random.Random, options: list[str]) -> str:
    letter = rng.choice("ABCDEab")
    option, other = rng.choice(options), rng.choice(options)
    form = rng.choice((*LETTER_FORMS, *(("{l}", "{l}.", "({l})", "{l})", "{l}. {own}", "({l}) {own}") * 4)))
    own = dict(zip("ABCDE", options, strict=False)).get(letter.upper(), option)
    return form.format(l=letter, own=own, m=rng.choice("ABCD"), o=option, p=other, L=letter.lower())


def mmbench(rng: random.Random) -> list[Any]:
    evaluator = task("tasks.mmbench.mmbench_evals").MMBench_Evaluator()
    cases = []
    for _ in range(2000):
        options = rng.sample(OPTIONS, k=rng.randint(2, 4))
        item = letter_text(rng, options)
        found = evaluator.can_infer(item, dict(zip("ABCD", options, strict=False)))
        cases.append([item, options, found or None])
    return cases


def circular(rng: random.Random) -> list[Any]:
    import pandas as pd

    evaluator = task("tasks.mmbench.mmbench_evals").MMBench_Evaluator()
    cases = []
    for _ in range(60):
        rows: list[dict[str, Any]] = []
        for question in range(1, rng.randint(2, 8)):
            options, skill = rng.sample(OPTIONS[:5], k=4), rng.random()
            for turn in range(rng.choice((1, 2, 4))):
                turned = options[turn:] + options[:turn]
                answer = "ABCD"[turned.index(options[0])]
                prediction = answer if rng.random() < skill**0.3 else rng.choice("ABCD")
                row = {"index": question + turn * 1_000_000, "answer": answer, "prediction": prediction}
                rows.append(row | dict(zip("ABCD", turned, strict=True)))
        table = pd.DataFrame(rows)
        answers = {row["index"]: row["answer"] for row in rows}
        questions = sorted({row["index"] % 1_000_000 for row in rows})
        hits = [
            [question, evaluator.eval_sub_data(table[table["index"] % 1_000_000 == question], answers)]
            for question in questions
        ]
        cases.append([[[row["index"], row["prediction"], row["answer"]] for row in rows], hits])
    return cases


def seedbench(rng: random.Random) -> list[Any]:
    utils = task("tasks.seedbench.utils")
    cases = []
    for _ in range(800):
        options, answer = rng.sample(OPTIONS, k=4), rng.choice("ABCD")
        item = letter_text(rng, options)
        result = utils.seed_process_result({"answer": answer, "data_type": "x", "question_id": 1}, [item])
        cases.append([item, options, answer, bool(utils.seed_aggregation_result([result["seed_all"]]))])
    return cases


def scienceqa(rng: random.Random) -> list[Any]:
    utils = task("tasks.scienceqa.utils")
    cases = []
    for _ in range(1000):
        options = rng.sample(OPTIONS, k=rng.randint(2, 5))
        answer, item = rng.randrange(len(options)), letter_text(rng, options)
        found = utils.sqa_process_results({"choices": options, "answer": answer}, [item])["exact_match"]
        cases.append([item, options, answer, bool(found)])
    return cases


def mathvista(rng: random.Random) -> list[Any]:
    evaluator = task("tasks.mathvista.mathvista_evals").MathVistaEvaluator()
    evaluator.get_chat_response = lambda *args, **kwargs: None
    numbers = ("14", "-3", "0.6", "1.45", "2.675", "1,234", "14.7", "1e3", ".5", "7.", "12.0", "0", "3/4", "nan", "inf")
    forms = (
        "{n}", "{n}.", " {n} ", "{n} cm", "${n}", "{n}%", 'The answer is "{n}".', "The answer is {n}.",
        "It is {n}, not {m}.", "Answer: {n}", "There are {n} dogs.", "x = {n}", "2 + {n} = {m}. The answer is {n}.",
        "no idea", "", "+{n}",
    )  # fmt: skip
    lists = (
        "[2007, 2008]",
        "[2007,2008]",
        "The years are [1, 2].",
        "[1.2, 1.3",
        "[]",
        "1, 2",
        "['a', 'b']",
        "[1], [2]",
    )
    cases = []
    for _ in range(1500):
        kind = rng.choice(("multi_choice", "integer", "float", "list"))
        choices: list[str] = []
        if kind == "multi_choice":
            choices = rng.sample(OPTIONS, k=rng.randint(2, 5))
            response = rng.choice((letter_text(rng, choices), rng.choice(choices)))
        elif kind == "list":
            response = rng.choice(lists)
        else:
            response = rng.choice(forms).format(n=rng.choice(numbers), m=rng.choice(numbers))
        question_type = kind if kind == "multi_choice" else "free_form"
        answer_type = "text" if kind == "multi_choice" else kind
        precision = rng.choice((1, 2)) if kind == "float" else None
        problem = {"question_type": question_type, "answer_type": answer_type, "choices": choices, "query": ""}
        extraction = evaluator.extract_answer(response, problem, True)
        by_rules = extraction is not None
        normalised = evaluator.normalize_extracted_answer(
            extraction if by_rules else response, choices, question_type, answer_type, precision
        )
        cases.append([response, question_type, answer_type, choices, precision, by_rules, normalised])
    return cases


def cider(rng: random.Random) -> list[Any]:
    _empty_package("aac_metrics", "functional", "utils")
    _empty("aac_metrics.utils.checks", check_metric_inputs=lambda *args: None)
    _empty("torch", Tensor=None, float64=None, from_numpy=lambda array: array, as_tensor=lambda array, dtype: array)
    score = importlib.import_module("aac_metrics.functional.cider_d").cider_d
    tokens = "a the dog cat man on in red blue sits runs 's two , -".split()  # noqa: SIM905

    def sentence() -> str:
        return " ".join(rng.choices(tokens, k=rng.randint(1, 9)))

    cases = []
    for _ in range(100):
        references = [[sentence() for _ in range(rng.randint(1, 4))] for _ in range(rng.randint(2, 8))]
        captions = [rng.choice((sentence(), rng.choice(texts), "")) for texts in references]
        cases.append([captions, references, round(float(score(captions, references)[0]["cider_d"]), 9)])
    return cases


def coco(kind: str, sizes: list[list[int]], true: list[Any], found: list[Any]) -> list[float]:
    """Figures of faster-coco-eval, of annotations as COCO's files have them."""
    from faster_coco_eval import COCO, COCOeval_faster

    images = [{"id": i, "width": width, "height": height} for i, (width, height) in enumerate(sizes)]
    categories = [{"id": i, "name": str(i)} for i in (1, 2, 3)]
    annotations = [annotation | {"id": i} for i, annotation in enumerate(true, 1)]
    truth = COCO({"images": images, "categories": categories, "annotations": annotations})
    evaluation = COCOeval_faster(truth, truth.loadRes(found), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [round(float(figure), 9) for figure in evaluation.stats[: 12 if kind == "bbox" else 10]]


def xywh(box: list[int]) -> list[int]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def detection(rng: random.Random) -> list[Any]:
    cases = []
    for number in range(40):
        sizes = [[rng.randint(100, 640), rng.randint(100, 480)] for _ in range(rng.randint(1, 6))]

        def box(width: int, height: int) -> list[int]:
            (x1, x2), (y1, y2) = (sorted(rng.sample(range(length + 1), 2)) for length in (width, height))
            return [x1, y1, x2, y2]

        true, found = [], []
        for image, (width, height) in enumerate(sizes):
            for _ in range(rng.choice((0, 1, 3, 6))):
                place, category = box(width, height), rng.randint(1, 3)
                area = (place[2] - place[0]) * (place[3] - place[1]) * rng.choice((1, 0.6))
                true.append([image, category, place, area, rng.random() < 0.1])
                for _ in range(rng.choice((0, 1, 1, 2))):
                    near = [value + rng.randint(-8, 8) for value in place]
                    near = [min(max(v, 0), limit) for v, limit in zip(near, (width, height) * 2, strict=True)]
                    if near[0] < near[2] and near[1] < near[3]:
                        found.append([image, rng.choice((category, category, 1)), near, rng.random()])
            for _ in range(rng.choice((0, 0, 2))):
                found.append([image, rng.randint(1, 3), box(width, height), rng.random()])
        if not true or not found:
            continue
        kinds = {category for _, category, *_ in true}
        found = [item for item in found if item[1] in kinds]
        if number % 4 == 0:
            found = [[*item[:3], 1.0] for item in found]
        figures = coco(
            "bbox",
            sizes,
            [
                {"image_id": i, "category_id": c, "bbox": xywh(b), "area": area, "iscrowd": int(crowd)}
                for i, c, b, area, crowd in true
            ],
            [{"image_id": i, "category_id": c, "bbox": xywh(b), "score": score} for i, c, b, score in found],
        )
        cases.append([sizes, true, found, figures])
    return cases


def keypoints(rng: random.Random) -> list[Any]:
    cases = []
    for _ in range(10):
        sizes = [[rng.randint(200, 640), rng.randint(200, 480)] for _ in range(rng.randint(1, 4))]
        true, found = [], []
        for image, (width, height) in enumerate(sizes):
            for _ in range(rng.randint(0, 2)):
                x, y, side = rng.randint(0, width - 100), rng.randint(0, height - 100), rng.randint(30, 100)
                points = [
                    [x + rng.randint(0, side), y + rng.randint(0, side), rng.choice((0, 1, 2))] for _ in range(17)
                ]
                points = [point if point[2] else [0, 0, 0] for point in points]
                true.append([image, points, [x, y, x + side, y + side], side * side * 0.6, rng.random() < 0.1])
                reach = rng.choice((1, 4, 10))
                if rng.random() < 0.8:
                    near = [
                        [px + rng.randint(-reach, reach), py + rng.randint(-reach, reach), 2] for px, py, _ in points
                    ]
                    found.append([image, [[max(px, 0), max(py, 0), v] for px, py, v in near], rng.random()])
            if rng.random() < 0.3:
                points = [[rng.randint(0, width), rng.randint(0, height), 2] for _ in range(17)]
                found.append([image, points, rng.random()])
        if not true or not found:
            continue
        figures = coco(
            "keypoints",
            sizes,
            [
                {
                    "image_id": image,
                    "category_id": 1,
                    "bbox": xywh(box),
                    "area": area,
                    "iscrowd": int(crowd),
                    "keypoints": [value for point in points for value in point],
                    "num_keypoints": sum(point[2] > 0 for point in points),
                }
                for image, points, box, area, crowd in true
            ],
            [
                {
                    "image_id": image,
                    "category_id": 1,
                    "keypoints": [value for point in points for value in point],
                    "score": score,
                }
                for image, points, score in found
            ],
        )
        cases.append([sizes, true, found, figures])
    return cases


def rec(rng: random.Random) -> list[Any]:
    utils = task("tasks.refcoco.utils_rec")

    def box() -> list[float]:
        (x1, x2), (y1, y2) = (sorted(rng.sample(range(1001), 2)) for _ in range(2))
        return [x1 / 1000, y1 / 1000, x2 / 1000, y2 / 1000]

    forms = (
        "[{b}]", "It is at [{b}].", "[{b}] and [{c}]", "<p>dog</p>[{b}]", "[ {b} ]", "none", "", "[{x}]", "({b})",
        "[{b}",
    )  # fmt: skip
    cases = []
    for _ in range(800):
        truth = box()
        near = [min(abs(round(value + rng.uniform(-0.1, 0.1), 3)), 1) for value in truth]
        near = [min(near[0], near[2]), min(near[1], near[3]), max(near[0], near[2]), max(near[1], near[3])]
        b, c = (",".join(f"{value:.3f}" for value in item) for item in (near, box()))
        item = rng.choice(forms).format(b=b, c=c, x=",".join(b.split(",")[:3]))
        found = utils.parse_float_sequence_within(item)
        cases.append([item, truth, bool(utils.compute_accuracy(found, truth))])
    return cases


if __name__ == "__main__":
    main()
