"""From a sweep's file to its runs: each with its name, seed, config and the run it waits for."""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from vit_tucker.config.find import find_config, stored_by_name
from vit_tucker.config.load import validate, validate_as
from vit_tucker.config.plugins import load_config_plugins
from vit_tucker.config.schema import RunConfig
from vit_tucker.config.source import (
    Source,
    merge_values,
    read_overrides,
    read_with_bases,
    read_yaml,
)
from vit_tucker.errors import ConfigError, nearest
from vit_tucker.storage.paths import MAX_NAME
from vit_tucker.sweep.schema import START, CellConfig, ExecutorConfig, SweepConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        name: of its cell, or START.
        seed: seed.
        config: resolved.
        after: the job that must be done before it.
    """

    name: str
    seed: int
    config: RunConfig
    after: "Job | None" = None

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return Path(str(self.config.output_dir))

    @property
    def key(self) -> tuple[str, int]:
        """What tells it from the sweep's other jobs."""
        return self.name, self.seed


@dataclass(frozen=True)
class Sweep:
    """A sweep's file, read.

    Attributes:
        file: the YAML file.
        output_dir: folder of the run folders.
        seeds: all seeds.
        jobs: all runs, in the order in which they are started; starts before the cells that need them.
        keep_checkpoints: whether cells that are done keep theirs.
        executor: where they are trained.
    """

    file: Path
    output_dir: Path
    seeds: tuple[int, ...]
    jobs: tuple[Job, ...]
    keep_checkpoints: bool = True
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the cells (and of the start), in order."""
        return tuple(dict.fromkeys(job.name for job in self.jobs))


def load_sweep(name: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read and validate a sweep and the configs of all its runs.

    Args:
        name: file, or name below experiments/configs.
        overrides: ``key.sub=value`` strings for the sweep's keys: ``seeds=[0,1]``, ``set.train.cpu=true``.

    Returns:
        The sweep.

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
    common = merge_values(base, part(source, "set"))
    load_config_plugins(common, file.parent)
    finetune = merge_values(common, part(source, "finetune"))
    settings = [setting for number, cell in enumerate(config.cells) for setting in _settings(cell, number, source)]
    _refuse_twice([name for name, _ in settings], source)
    jobs: list[Job] = []
    for seed in config.seeds:
        start = None
        if config.start is not None:
            start = _job(START, seed, merge_values(common, part(source, "start")), output_dir, file)
            jobs.append(start)
        jobs += [_job(cell, seed, merge_values(finetune, given), output_dir, file, start) for cell, given in settings]
    return Sweep(file, output_dir, config.seeds, tuple(jobs), config.keep_checkpoints, config.executor)


def select_jobs(sweep: Sweep, only: Sequence[str], seeds: Sequence[str] = ()) -> tuple[Job, ...]:
    """The jobs that match, with the starts that they need.

    Args:
        sweep: the sweep.
        only: names with wildcards, also with a seed ('gqa*', 'tucker-8-16-16/seed0'); all if empty.
        seeds: as text; all if empty.

    Raises:
        ConfigError: a pattern or seed that matches nothing.
    """
    for pattern in only:
        if not any(fnmatchcase(job.name, pattern) or fnmatchcase(_path(job), pattern) for job in sweep.jobs):
            raise ConfigError(f"--only: no cell matches '{pattern}', there are: {', '.join(sweep.names)}"
                              f"{nearest(pattern, sweep.names)}")  # fmt: skip
    if unknown := [seed for seed in seeds if seed not in map(str, sweep.seeds)]:
        raise ConfigError(f"--seeds: {unknown[0]} is none of the sweep's: {', '.join(map(str, sweep.seeds))}")
    chosen = [
        job
        for job in sweep.jobs
        if (not only or any(fnmatchcase(job.name, p) or fnmatchcase(_path(job), p) for p in only))
        and (not seeds or str(job.seed) in seeds)
    ]
    needed = {job.key for job in chosen} | {job.after.key for job in chosen if job.after is not None}
    return tuple(job for job in sweep.jobs if job.key in needed)


def _path(job: Job) -> str:
    return f"{job.name}/seed{job.seed}"


def _read_base(config: SweepConfig, source: Source, file: Path) -> Source:
    result = Source()
    for name in [config.base] if isinstance(config.base, str) else config.base:
        try:
            path = find_config(name, file.parent)
            result = merge_values(result, read_with_bases(path, stored=source.stored or stored_by_name(name, path)))
        except ConfigError as error:
            raise ConfigError(f"{source.where(('base',))}: base: {error}") from None
    return result


def part(source: Source, *path: str | int) -> Source:
    """A section of a source, as a source of its own; empty if it is null or missing."""
    values: Any = source.values
    for key in path:
        values = values[key] if isinstance(key, int) or key in values else None
        if values is None:
            return Source()
    size = len(path)
    return Source(
        values, {key[size:]: where for key, where in source.origin.items() if key[:size] == path}, source.stored
    )


def _settings(cell: CellConfig, number: int, source: Source) -> Iterator[tuple[str, Source]]:
    """Name and config keys of each combination of a cell's options."""
    at: tuple[str | int, ...] = ("cells", number)
    for word in cell.placeholders:
        if word not in cell.vary:
            raise ConfigError(
                f"{source.where((*at, 'name'))}: cells.{number}.name: '{{{word}}}' is no key of vary{nearest(word, cell.vary)}"
            )
    attention = {"attention": source.values["cells"][number]["attention"]}
    where = {("attention", *key): line for key, line in part(source, *at, "attention").origin.items()}
    fixed = merge_values(Source(attention, where), part(source, *at, "set"))
    axes = [_axis(key, (*at, "vary", key), source) for key in cell.vary]
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


def _axis(key: str, path: tuple[str | int, ...], source: Source) -> list[tuple[str, Source]]:
    """Labels and config keys of the values that one key of vary takes."""
    values: Any = source.values
    for step in path:
        values = values[step]
    if isinstance(values, dict):
        return [(label, part(source, *path, label)) for label in values]
    keys = tuple(key.split("."))
    result = []
    for number, value in enumerate(values):
        nested: Any = value
        for step in reversed(keys):
            nested = {step: nested}
        result.append((describe_value(value), Source(nested, {keys: source.where((*path, number))}, source.stored)))
    return result


def describe_value(value: Any) -> str:
    """A config value as part of a name: [8, 16, 16] -> '8-16-16', {budget: 0.15} -> 'budget0.15'."""
    if isinstance(value, dict):
        return "-".join(f"{key}{describe_value(each)}" for key, each in value.items())
    if isinstance(value, list):
        return "-".join(map(describe_value, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _refuse_twice(names: Sequence[str], source: Source) -> None:
    if twice := [name for number, name in enumerate(names) if name in names[:number]]:
        raise ConfigError(
            f"{source.where(('cells',))}: cells: two are named '{twice[0]}'; put what varies into the name, as in "
            "'gqa{attention.num_kv_heads}'"
        )


def _job(name: str, seed: int, source: Source, output_dir: Path, file: Path, start: Job | None = None) -> Job:
    """A run with its validated config, its plug-ins imported; an error names the cell."""
    fixed: dict[str, Any] = {"name": name, "seed": seed, "output_dir": str(output_dir / name / f"seed{seed}")}
    if start is not None:
        fixed["model"] = {"checkpoint": str(start.folder)}
    try:
        load_config_plugins(source, file.parent)
        return Job(name, seed, validate(merge_values(source, Source(fixed))), start)
    except ConfigError as error:
        raise ConfigError(f"{error} (cell {name})") from None
