"""Captions: CIDEr, BLEU, METEOR and ROUGE-L as COCO's caption evaluation computes them
(`pycocoevalcap`).

The tokenizer is Stanford's, in Java. CIDEr (here CIDEr-D, Vedantam et al. 2015) weighs words by how
rare they are in the references of all images of the evaluation, so figures of different sets do not
compare, and of a single image it is 0.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sphinx_pl.utils.errors import UserError

INSTALL = "pip install 'sphinx-pl[eval]'"


def check_caption_tools() -> None:
    """Check that captions can be scored on this machine, before a model answers for hours.

    Raises:
        UserError: `pycocoevalcap` or Java is missing.
    """
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise UserError(f"caption metrics need pycocoevalcap: {INSTALL}")
    if shutil.which("java") is None:
        raise UserError("caption metrics need Java for their tokenizer: install it (Debian: default-jre-headless)")


def caption_scores(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """The figures of COCO's caption evaluation (Chen et al. 2015; `COCOEvalCap`, but for SPICE),
    tokenized as there.

    Args:
        captions: by image.
        references: by image, at least one each.

    Returns:
        `CIDEr` (0 to 10, usually reported times 100), `BLEU-1` to `BLEU-4`, `METEOR`, `ROUGE-L` (0
        to 1).

    Raises:
        UserError: tools are missing or fail, or images of captions and references differ.
    """
    return scores_of_images(captions, references)[0]


def scores_of_images(
    captions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The figures of `caption_scores`, and each image's `CIDEr` and `ROUGE-L`, whose means they
    are.

    BLEU and METEOR are functions of counts over all images together.

    Raises:
        UserError: as `caption_scores`.
    """
    check_caption_tools()
    _check_images(captions, references)
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    given, true = _tokenized({image: [captions[image]] for image in references}), _tokenized(references)
    with contextlib.redirect_stdout(io.StringIO()):
        bleu, _ = Bleu(4).compute_score(true, given)
        meteor = _meteor(true, given)
        rouge, rouges = Rouge().compute_score(true, given)
        cider, ciders = Cider().compute_score(true, given)
    figures = {"CIDEr": float(cider)}
    figures |= {f"BLEU-{n}": float(value) for n, value in enumerate(bleu, 1)}
    each = {"CIDEr": ciders, "ROUGE-L": rouges}
    of_images = {name: dict(zip(true, map(float, scores), strict=True)) for name, scores in each.items()}
    return figures | {"METEOR": meteor, "ROUGE-L": float(rouge)}, of_images


def _tokenized(texts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The tokens with single blanks between them, by the program and the punctuation list of
    `pycocoevalcap`.

    Its own class starts the same program, but lets it write to the terminal, needs a temporary file
    beside the package, and takes a failed program for one that found no words.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer as official

    # The program reads a sentence per line, and knows other line breaks than "\n".
    lines = [" ".join(text.split()) for group in texts.values() for text in group]
    program = Path(official.__file__).with_name(official.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(program), "edu.stanford.nlp.process.PTBTokenizer"]
    done = subprocess.run(
        [*command, "-preserveLines", "-lowerCase"], input="\n".join(lines).encode(errors="replace"), capture_output=True
    )
    lines_out = done.stdout.decode().split("\n")
    if done.returncode or len(lines_out) < len(lines):
        raise UserError(f"Java's tokenizer of captions failed (exit code {done.returncode}): {_last(done.stderr)}")
    words = iter(" ".join(w for w in line.split() if w not in official.PUNCTUATIONS) for line in lines_out)
    return {image: [next(words) for _ in group] for image, group in texts.items()}


def _meteor(true: Mapping[str, Sequence[str]], given: Mapping[str, Sequence[str]]) -> float:
    from pycocoevalcap.meteor.meteor import Meteor

    scorer: Any = Meteor()
    try:
        return float(scorer.compute_score(true, given)[0])
    except (ValueError, OSError):  # the program answers without a number, or has ended
        scorer.lock.release()  # its destructor would wait for it
        reason = _last(scorer.meteor_p.communicate()[1])
        raise UserError(f"Java's METEOR failed (it takes 2 GB of memory): {reason}") from None


def _last(output: bytes) -> str:
    lines = output.decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def cider_of_tokens(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> float:
    """CIDEr-D of tokenized texts, with single blanks between tokens. It needs no Java.

    Args:
        captions: by image.
        references: by image, at least one each.

    Raises:
        UserError: no `pycocoevalcap`, or images of captions and references differ.
    """
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise UserError(f"caption metrics need pycocoevalcap: {INSTALL}")
    _check_images(captions, references)
    return _cider({key: [captions[key]] for key in references}, {key: list(references[key]) for key in references})


def _cider(captions: dict[str, list[str]], references: dict[str, list[str]]) -> float:
    from pycocoevalcap.cider.cider import Cider

    score, _ = Cider().compute_score(references, captions)
    return float(score)


def _check_images(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    if odd := sorted(captions.keys() ^ references.keys()):
        raise UserError(f"captions and references are not of the same images: {len(odd)} differ, such as '{odd[0]}'")
    if not captions:
        raise UserError("there are no captions to score")
    if empty := sorted(image for image, texts in references.items() if not texts):
        raise UserError(f"image '{empty[0]}' has no reference caption")
