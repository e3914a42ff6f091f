"""Reads a sweep's file into its runs, each with its name, seed, config and the run it waits for."""

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_tucker.config.early import refuse_early
from vit_tucker.config.find import find_config, stored_by_name
from vit_tucker.config.load import validate_as, validate_with_plugins
from vit_tucker.config.source import Source, merge_values, read_overrides, read_with_bases, read_yaml
from vit_tucker.errors import ConfigError, nearest
from vit_tucker.storage.paths import MAX_NAME
from vit_tucker.sweep.schema import START, CellConfig, SweepConfig

if TYPE_CHECKING:
    from vit_tucker.config.schema import RunConfig

_PLACEHOLDER = re.compile(r"\{([^{}]+)\}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        name: of its cell, or START.
        seed: of its random numbers.
        config: with everything that the sweep sets.
        after: the job that must be done before it.
        notes: lines about values of the config that were made to fit.
    """

    name: str
    seed: int
    config: "RunConfig"
    after: "Job | None" = None
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Returns the folder that the run trains in, its ``output_dir``."""
        return Path(str(self.config.output_dir))

    @property
    def log(self) -> Path:
        """Returns the file of the run's output: seed0.log beside the folder seed0."""
        return self.folder.with_suffix(".log")

    @property
    def key(self) -> tuple[str, int]:
        """Returns the name and the seed, which identify the run within its sweep."""
        return self.name, self.seed


@dataclass(frozen=True)
class Sweep:
    """A sweep's file and the runs that it defines.

    Attributes:
        file: the YAML file.
        config: its content.
        output_dir: folder of the run folders.
        jobs: all runs, in the order in which they are started; starts before the cells that need them.
    """

    file: Path
    config: SweepConfig
    output_dir: Path
    jobs: tuple[Job, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the names of the start and of the cells, in order."""
        return tuple(dict.fromkeys(job.name for job in self.jobs))


def load_sweep(name: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Reads and validates a sweep and the configs of all its runs.

    Args:
        name: file, or name below experiments/configs.
        overrides: ``key.sub=value`` strings for the sweep's keys: ``seeds=[0,1]``, ``set.train.cpu=true``.

    Raises:
        ConfigError: one line with file, line, key, what is wrong, and the nearest valid name.
    """
    file = find_config(name)
    source = merge_values(read_yaml(file), read_overrides(overrides))
    if "cells" not in source.values:
        raise ConfigError(f"{file}: no sweep: it has no cells; a run's config is started by experiments/train_vit.py")
    config = validate_as(SweepConfig, source)
    output_dir = Path(config.output_dir or f"runs/{file.stem}")
    source.stored = stored_by_name(name, file)
    base = _read_base(config, source, file)
    common = merge_values(base, _section(source, config.set, "set"))
    finetune = merge_values(common, _section(source, config.finetune, "finetune"))
    settings = [setting for number, cell in enumerate(config.cells) for setting in _settings(cell, number, source)]
    names = [name for name, _ in settings]
    if twice := [name for number, name in enumerate(names) if name in names[:number]]:
        raise ConfigError(
            f"{source.where(('cells',))}: cells: two are named '{twice[0]}'; put what varies into the name, as in "
            "'gqa{attention.num_kv_heads}'"
        )
    cells = [(name, merge_values(finetune, given)) for name, given in settings]
    first = [] if config.start is None else [(START, merge_values(common, _section(source, config.start, "start")))]
    for name, values in (*first, *cells):
        with _named(name):
            refuse_early(values)
    jobs: list[Job] = []
    for seed in config.seeds:
        starts = [_job(name, seed, values, output_dir, file) for name, values in first]
        jobs += starts
        jobs += [_job(name, seed, values, output_dir, file, *starts) for name, values in cells]
    return Sweep(file, config, output_dir, tuple(jobs))


def select_jobs(sweep: Sweep, only: Sequence[str], seeds: Sequence[str] = ()) -> tuple[Job, ...]:
    """Returns the jobs that match, with the starts that they need.

    Args:
        sweep: the sweep.
        only: names with wildcards, also with a seed ('gqa*', 'tucker-8-16-16/seed0'); all if empty.
        seeds: as text; all if empty.

    Raises:
        ConfigError: a pattern or seed that matches nothing.
    """
    for pattern in only:
        if not any(_matches(job, pattern) for job in sweep.jobs):
            raise ConfigError(f"--only: no cell matches '{pattern}', there are: {', '.join(sweep.names)}"
                              f"{nearest(pattern, sweep.names)}")  # fmt: skip
    known = [str(seed) for seed in sweep.config.seeds]
    if unknown := [seed for seed in seeds if seed not in known]:
        raise ConfigError(f"--seeds: {unknown[0]} is none of the sweep's: {', '.join(known)}")
    chosen = [job for job in sweep.jobs if str(job.seed) in (seeds or known)]
    if only:
        chosen = [job for job in chosen if any(_matches(job, pattern) for pattern in only)]
    needed = {job.key for job in chosen} | {job.after.key for job in chosen if job.after is not None}
    return tuple(job for job in sweep.jobs if job.key in needed)


def _matches(job: Job, pattern: str) -> bool:
    return fnmatchcase(job.name, pattern) or fnmatchcase(f"{job.name}/seed{job.seed}", pattern)


def _read_base(config: SweepConfig, source: Source, file: Path) -> Source:
    result = Source()
    for name in [config.base] if isinstance(config.base, str) else config.base:
        try:
            path = find_config(name, file.parent)
            result = merge_values(result, read_with_bases(path, stored=source.stored or stored_by_name(name, path)))
        except ConfigError as error:
            raise ConfigError(f"{source.where(('base',))}: base: {error}") from None
    return result


def _section(source: Source, values: dict[str, Any], *path: str | int) -> Source:
    """Returns a section of the sweep as a source of its own: its values, which stand at that path of the file."""
    size = len(path)
    origin = {key[size:]: where for key, where in source.origin.items() if key[:size] == path}
    return Source(values, origin, source.stored)


def _settings(cell: CellConfig, number: int, source: Source) -> Iterator[tuple[str, Source]]:
    """Yields the name and the config keys of each combination of a cell's options."""
    at: tuple[str | int, ...] = ("cells", number)
    for word in _PLACEHOLDER.findall(cell.name):
        if word not in cell.vary:
            raise ConfigError(
                f"{source.where((*at, 'name'))}: cells.{number}.name: '{{{word}}}' is no key of vary{nearest(word, cell.vary)}"
            )
    attention = _section(source, {"attention": cell.attention}, *at)
    fixed = merge_values(attention, _section(source, cell.set, *at, "set"))
    axes = [_axis(key, values, (*at, "vary", key), source) for key, values in cell.vary.items()]
    for values in itertools.product(*axes):
        given, name = fixed, cell.name
        for key, (label, extra) in zip(cell.vary, values, strict=True):
            given, name = merge_values(given, extra), name.replace(f"{{{key}}}", label)
        if not _NAME.fullmatch(name) or name == START or len(name) > MAX_NAME:
            raise ConfigError(
                f"{source.where((*at, 'name'))}: cells.{number}.name: '{name}' can't be a folder's name here; letters, digits "
                f"and . _ + = - are allowed, {MAX_NAME} at most, and not '{START}'"
            )
        yield name, given


def _axis(key: str, values: Any, path: tuple[str | int, ...], source: Source) -> list[tuple[str, Source]]:
    """Returns the label and the config keys of each value that a key of vary has."""
    if isinstance(values, dict):
        return [(label, _section(source, section, *path, label)) for label, section in values.items()]
    keys = tuple(key.split("."))
    result = []
    for number, value in enumerate(values):
        nested: Any = value
        for step in reversed(keys):
            nested = {step: nested}
        result.append((describe_value(value), Source(nested, {keys: source.where((*path, number))}, source.stored)))
    return result


def describe_value(value: Any) -> str:
    """Returns a config value as part of a name: [8, 16, 16] -> '8-16-16', {budget: 0.15} -> 'budget0.15'."""
    if isinstance(value, dict):
        return "-".join(f"{key}{describe_value(each)}" for key, each in value.items())
    if isinstance(value, list):
        return "-".join(map(describe_value, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _job(name: str, seed: int, source: Source, output_dir: Path, file: Path, start: Job | None = None) -> Job:
    """Returns a run with its validated config, its plug-ins imported; an error names the cell."""
    fixed: dict[str, Any] = {"name": name, "seed": seed, "output_dir": str(output_dir / name / f"seed{seed}")}
    if start is not None:
        fixed["model"] = {"checkpoint": str(start.folder)}
    with _named(name):
        config, notes = validate_with_plugins(merge_values(source, Source(fixed)), file.parent)
        return Job(name, seed, config, start, notes)


@contextmanager
def _named(cell: str) -> Iterator[None]:
    """Adds the cell to the line of a mistake."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{error} (cell {cell})") from None
