"""A look at the first records of a source, so that wrong files and options show at once."""

from __future__ import annotations

import logging
from collections import Counter

from sphinx_pl.data.images import load_image
from sphinx_pl.data.processor import Processor
from sphinx_pl.data.readers import spread
from sphinx_pl.data.sampling.config import SourceConfig
from sphinx_pl.data.skip import Filtered, SkipSample
from sphinx_pl.utils.errors import UserError

log = logging.getLogger(__name__)

LOOKED_AT = 64
"""The number of records of a source that are looked at."""
TRIED = 16
"""The number of records with images, or of unusable ones, after which the look ends."""


def probe_source(name: str, key: str, config: SourceConfig, processor: Processor, row_length: int) -> None:
    """Read, tokenize and decode records of a source's first file, as training will.

    Args:
        key: the source's key in the configuration, for messages.
        row_length: the longest sample that fits into a row.

    Raises:
        UserError: no record can be used, or an option asks for what no record has.
    """
    reader = config.open(name)
    try:
        shard = reader.open(0)
    except SkipSample as error:
        if len(reader.urls) == 1:
            raise UserError(f"{key}: {reader.urls[0]} cannot be read ({error})") from None
        log.warning("%s: %s", key, error)
        return
    if not len(shard) and len(reader.urls) == 1:
        why = "; ".join(f"{counter}: {example}" for counter, example in shard.examples.items())
        raise UserError(f"{key}: nothing to read in {reader.urls[0]}{reader.hint()} ({why or 'nothing in it'})")
    reader.check_shard(shard)
    bad: Counter[str] = Counter()
    examples: dict[str, str] = {}
    usable: Counter[str] = Counter()  # with an image, without one
    filtered: Counter[str] = Counter()
    few = spread(len(shard), TRIED)
    for index in few + [index for index in spread(len(shard), LOOKED_AT) if index not in few]:
        if usable["image"] + bad.total() >= TRIED:
            break
        try:
            record = shard.record(index)
            for sample in processor.samples(record, name):
                if sample.length > row_length:
                    raise SkipSample("longer_than_row", f"{record.key}: {sample.length} tokens")
            for image in record.images:
                load_image(image, processor.image_size)
            usable["image" if record.images else "text"] += 1
        except Filtered as reason:
            filtered[reason.reason] += 1
        except SkipSample as reason:
            bad[reason.reason] += 1
            examples.setdefault(reason.reason, reason.detail)
    why = "; ".join(f"{reason}: {count}, such as {examples[reason]}" for reason, count in bad.most_common())
    advice = reader.folder_hint(key) if bad["image_missing"] else ""
    if bad["longer_than_row"]:
        advice = f"raise data.packing.row_length={row_length}"
    with_images = sum(count for reason, count in bad.items() if reason.startswith("image_"))
    if bad and (not usable or (with_images >= TRIED // 4 and not usable["image"])):
        what = "with images " if usable else ""
        raise UserError(
            f"{key}: none of the first {bad.total()} records {what}can be used ({why}){f'; {advice}' * bool(advice)}"
        )
    if bad:
        tried = bad.total() + usable.total()
        log.warning("%s: %d of %d records that were tried cannot be used (%s) %s", key, bad.total(), tried, why, advice)
    elif filtered and not usable:
        counts = ", ".join(f"{reason}: {count}" for reason, count in filtered.most_common())
        log.warning("%s: the filters leave out all of %d records that were tried (%s)", key, filtered.total(), counts)
