"""Names of configs: files, run folders, and data set x method, which has no file of its own.

``DATA/METHOD`` is ``DATA/base.yaml`` with ``methods/METHOD.yaml`` on top, ``DATA/METHOD_RECIPE`` the same with
``DATA/base_RECIPE.yaml``. A file of that name comes first.
"""

import itertools
import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from vit_tucker.config.stored import stored_folder
from vit_tucker.errors import ConfigError, nearest, shorten

CONFIG_ROOT = Path("experiments/configs")
CONFIG_FILE = "config.yaml"
METHODS, SWEEPS = "methods", "sweeps"


def package_configs() -> Path:
    """Returns the folder of the shipped configs, so that names work from any folder."""
    return Path(str(resources.files("vit_tucker"))).resolve() / "configs"


def find_config(name: str | Path, beside: Path | None = None) -> Path:
    """Finds what ``--cfg`` or ``base:`` names: a file, a run folder, or a name below experiments/configs or the shipped configs.

    Args:
        name: with or without .yaml.
        beside: folder of the file whose ``base:`` it is; names are relative to it first.

    Returns:
        The file; for a data set x method the file that it would be, which ``parts_of`` and ``read_yaml`` understand.

    Raises:
        ConfigError: no such config; names the places and the nearest known config.
    """
    path, shown = Path(name), shorten(name)
    candidates = [path / CONFIG_FILE if os.path.isdir(path) else path]
    if not path.is_absolute():
        candidates += [CONFIG_ROOT / path, package_configs() / path]
    files = [file for candidate in candidates for file in (candidate, Path(f"{candidate}.yaml"))]
    files = files if beside is None else [beside / path, *files]
    found = next((file for file in files if os.path.isfile(file)), None)
    if found := found or next((file for file in files if parts_of(file)), None):
        return found
    if os.path.isdir(path):
        raise ConfigError(f"{shown}: not a run folder, it has no {CONFIG_FILE}")
    hint = nearest(str(name), [f"{known}.yaml" if path.suffix == ".yaml" else known for known in _all_names()])
    raise ConfigError(f"{shown}: no such config, neither here nor in {CONFIG_ROOT}{hint}")


def parts_of(file: Path) -> tuple[Path, Path] | None:
    """Returns the file of the data set and that of the method which a data set x method stands for.

    Args:
        file: as ``find_config`` returns it; methods are looked for beside its folder, then by name.

    Returns:
        None for a name that is no such combination, and for a file that exists.
    """
    file = Path(os.path.abspath(file))
    if file.suffix != ".yaml" or os.path.isfile(file) or not os.path.isdir(file.parent):
        return None
    folders = [file.parents[1], Path.cwd() / CONFIG_ROOT, package_configs()]
    for data, recipe in _bases_in(file.parent):
        names = [folder / METHODS / f"{file.stem.removesuffix(recipe)}.yaml" for folder in folders]
        method = next((name for name in names if os.path.isfile(name)), None)
        if method is not None and file.stem.endswith(recipe):
            return data, method
    return None


def config_names(sweeps: bool = False) -> list[str]:
    """Returns the names of the runs, or of the sweeps, in experiments/configs and of those that are shipped.

    Args:
        sweeps: those in the folder sweeps; else the runs, combinations of data set and method among them.
    """
    runs = [name for name in _all_names() if not name.startswith(f"{METHODS}/")]
    return [name for name in runs if name.startswith(f"{SWEEPS}/") == sweeps]


def _all_names() -> list[str]:
    return sorted({*_names_in(CONFIG_ROOT), *_names_in(package_configs())})


def _names_in(folder: Path) -> Iterator[str]:
    methods = [file.stem for place in {folder, package_configs()} for file in (place / METHODS).glob("*.yaml")]
    for file in folder.rglob("*.yaml"):
        yield file.relative_to(folder).with_suffix("").as_posix()
    for place in {file.parent for file in folder.rglob("base*.yaml")}:
        for (_, recipe), method in itertools.product(_bases_in(place), methods):
            yield (place / f"{method}{recipe}").relative_to(folder).as_posix()


def recipes_of(dataset: str) -> list[tuple[Path, str]]:
    """Returns the files ``base*.yaml`` of a data set's configs, base.yaml first, each with its name.

    Those below experiments/configs come before the shipped ones; there are none for names that are no folder's.
    """
    folders = [root / dataset for root in (CONFIG_ROOT, package_configs())] if dataset.isidentifier() else []
    return [(file, f"{dataset}/{file.stem}") for folder in folders for file, _ in _bases_in(folder)]


def _bases_in(folder: Path) -> list[tuple[Path, str]]:
    """Returns the files of a data set, base.yaml first, each with the ending that its recipe gives to names."""
    bases = [(file, file.stem.removeprefix("base")) for file in sorted(folder.glob("base*.yaml"))]
    return [(file, recipe) for file, recipe in bases if recipe[:1] in ("", "_")]


def stored_by_name(name: str | Path, file: Path) -> Path | None:
    """Returns the stored folder that a config's name means: a folder always, a file if it lies in one; None for a user's file.

    Args:
        name: as for ``find_config``.
        file: what that returns.
    """
    return file.parent if Path(name).is_dir() else stored_folder(file)
