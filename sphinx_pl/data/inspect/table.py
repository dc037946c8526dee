"""The sources of a mixture before anything is trained: sizes, shares, expected draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sphinx_pl.data.datamodule import DataModule
from sphinx_pl.data.images import load_image
from sphinx_pl.data.readers import READERS, expand_paths
from sphinx_pl.data.sampling.config import Group, SourceConfig
from sphinx_pl.data.sampling.mixture import Mixture
from sphinx_pl.data.sampling.stream import MADE, SourceStream
from sphinx_pl.data.skip import SkipSample
from sphinx_pl.utils.console import Table
from sphinx_pl.utils.errors import UserError

PROBE = 64
"""The number of draws from each source for the expectations."""


@dataclass(frozen=True)
class SourceSummary:
    """One source of a mixture. Numbers per draw are means over the probed draws."""

    name: str
    kind: str
    modality: str
    files: int
    records: int
    certain: bool
    """Whether `records` was counted. Otherwise it is extrapolated from some of the files."""
    share: float
    """The share of the draws (or of the supervised tokens, see `MixingConfig.unit`)."""
    records_drawn: float
    """Records that a draw takes: more than one if questions about one image share it."""
    tokens: float
    targets: float
    images: float
    unusable: float
    """Share of the records that are skipped or filtered, also because of their images."""
    why: Mapping[str, tuple[int, str]]
    """skipped/<reason>, filtered/<reason>, capped/<task>, unused/<name> and events of samples that
    are used (such as `cut`, see `Sample`) -> how many were met, and the first in words."""

    @property
    def draws(self) -> float:
        """Draws in an epoch."""
        return self.records / self.records_drawn


def lines(datamodule: DataModule, probe: int = PROBE) -> list[SourceSummary]:
    """The sources of the training mixture, each tried with `probe` draws.

    Raises:
        UserError: a source cannot be read.
    """
    row_length = datamodule.packing.row_length
    mixture = Mixture(datamodule.sources, datamodule.processor, datamodule.seed, row_length, datamodule.mixing)
    return [_line(name, stream, mixture.shares[name], probe) for name, stream in mixture.streams.items()]


def _line(name: str, stream: SourceStream, share: float, probe: int) -> SourceSummary:
    records, certain = stream.source.size()
    draws = 0
    while draws < probe and not stream.exhausted:
        for sample in stream.next():
            try:
                for image in sample.images:
                    load_image(image, stream.processor.image_size)
            except SkipSample as error:
                stream.leave_out(sample, error)
        draws += 1
    counts = stream.counts
    bad = sum(count for key, count in counts.items() if key.startswith(("skipped/", "filtered/")))
    # What could not even be indexed is of all that was opened, of which only some was drawn.
    lost = stream.left_out.total() / max(stream.left_out.total() + stream.indexed, 1)
    return SourceSummary(
        name=name,
        kind=stream.config.kind,
        modality=stream.config.modality,
        files=len(stream.source.urls),
        records=records,
        certain=certain,
        share=share,
        records_drawn=counts["seen"] / draws,
        tokens=counts["tokens"] / draws,
        targets=counts["targets"] / draws,
        images=counts["images"] / draws,
        unusable=lost + (1 - lost) * bad / counts["seen"],
        why={
            key: (number, next(iter(stream.examples.get(key, ())), ""))
            for key, number in (
                *((f"skipped/{reason}", number) for reason, number in stream.left_out.items()),
                *((key, number) for key, number in counts.items() if key not in MADE and number),
            )
        },
    )


def epoch_tokens(summaries: list[SourceSummary]) -> float:
    """Tokens of all sources, each read once."""
    return sum(line.draws * line.tokens for line in summaries)


def reasons(summaries: list[SourceSummary]) -> str:
    """A line for each reason and event: its source, its name, how many were met, and an example."""
    return "".join(
        f"\n{line.name}  {key}: {number}{f'  ({example:.300})' if example else ''}"
        for line in summaries
        for key, (number, example) in sorted(line.why.items())
    )


def missing(configs: Mapping[str, SourceConfig]) -> dict[str, str]:
    """Source -> why its files cannot be read, for those whose files are not there."""
    problems = {}
    for name, config in configs.items():
        try:
            expand_paths(name, config.path, READERS[config.kind].folders)
        except UserError as error:
            problems[name] = str(error)
    return problems


def expectations(summaries: list[SourceSummary], unit: str, row_length: int, rows: int, steps: int) -> Table:
    """The lines with their sums, and their use in a run of `steps` steps.

    Args:
        rows: of an optimizer step, on all ranks.
    """
    # A source's share is of draws, or of supervised tokens; what a step holds follows from its
    # tokens.
    draws = {line.name: line.share / (max(line.targets, 1e-9) if unit == "token" else 1) for line in summaries}
    total = sum(draws.values())
    mean_tokens = sum(draws[line.name] / total * line.tokens for line in summaries)
    drawn = steps * rows * row_length / max(mean_tokens, 1e-9)
    result = Table(title=f"{steps} steps of {rows} rows of {row_length} positions; shares by {unit}")
    result.add_column("source", overflow="fold")
    for column in ("records", "files", "share", "tokens", "targets", "images", "unusable", "Mtok/epoch", "Mimg/epoch"):
        result.add_column(column, justify="right")
    result.add_column("epochs", justify="right")
    for line in summaries:
        result.add_row(
            line.name,
            f"{'' if line.certain else '~'}{line.records}",
            str(line.files),
            f"{line.share:.1%}",
            f"{line.tokens:.1f}",
            f"{line.targets:.1f}",
            f"{line.images:.2f}",
            f"{line.unusable:.1%}",
            f"{line.draws * line.tokens / 1e6:.3g}",
            f"{line.draws * line.images / 1e6:.3g}",
            f"{drawn * draws[line.name] / total / line.draws:.3g}",
        )
    epoch = epoch_tokens(summaries) / (rows * row_length)
    result.caption = (
        "tokens, targets (supervised tokens) and images: of a mean draw. epochs: how often the run reads the source, "
        f"if rows are full. Everything once: {epoch:.0f} steps"
    )
    return result


def plan(group: Group, absent: Mapping[str, str]) -> Table:
    """A table of the sources by their configuration alone, for when files are missing.

    Args:
        absent: source -> why, as `missing` says.
    """
    result = Table(title="The mixture, without reading it")
    for column in ("source", "kind", "modality", "share", "path", "files"):
        result.add_column(column, overflow="fold")
    shares = {} if group.needs_sizes else group.shares({})
    for name, config in group.leaves():
        share = f"{shares.get(name, 0):.1%}" if shares else "by size"
        path = config.path if isinstance(config.path, str) else ", ".join(config.path)
        result.add_row(name, config.kind, config.modality, share, path, "MISSING" if name in absent else "found")
    return result
