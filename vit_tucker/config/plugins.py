"""Plug-ins: Python files and modules of the user's own. They run where the user names them; a folder that is read is data.

A config that lies in a run folder, a saved folder or a kept study, or is reached through one by ``base:``, may have come from
elsewhere. What it names runs only if the user has named it too, in this process, or trusts the folder.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from vit_tucker.config.find import package_configs
from vit_tucker.config.source import Source
from vit_tucker.config.stored import stored_folder
from vit_tucker.errors import ConfigError, shorten
from vit_tucker.storage.paths import displayed

MODELS = Path("experiments/models")
"""What the models are called that this package ships beside its configs."""
_TRUSTED: ContextVar[bool] = ContextVar("trusted", default=False)
_GIVEN: ContextVar[tuple[str, ...]] = ContextVar("given", default=())
_in_this_process: dict[str, None] = {}
_NAMED: ContextVar[dict[str, None]] = ContextVar("named", default=_in_this_process)
"""What the user has named in this command, or in this process, in order: modules by name, files by absolute path."""


@contextmanager
def trust_plugins(trusted: bool = True) -> Iterator[None]:
    """Allows, within a context, the plug-ins that a stored folder's config names, as ``--trust-plugins`` does.

    Args:
        trusted: False refuses them, as without the option.
    """
    token = _TRUSTED.set(trusted)
    try:
        yield
    finally:
        _TRUSTED.reset(token)


@contextmanager
def command_plugins(given: Sequence[str], trusted: bool) -> Iterator[None]:
    """Opens the context of one command, in which plug-ins are those that it names.

    Args:
        given: plug-ins by ``-p``; they are imported first.
        trusted: see ``trust_plugins``.

    Raises:
        ConfigError: one can't be imported.
    """
    named, before = _NAMED.set({}), _GIVEN.set(tuple(given))
    try:
        load_plugins(given)
        with trust_plugins(trusted):
            yield
    finally:
        _NAMED.reset(named)
        _GIVEN.reset(before)


def plugin_arguments(plugins: Sequence[str]) -> list[str]:
    """Returns the arguments by which another command has the plug-ins of this one.

    Args:
        plugins: those that the config names; they have been imported.
    """
    full = {Path(name).name: name for name in _NAMED.get()}
    names = [full.get(Path(plugin).name, plugin) for plugin in (*_GIVEN.get(), *plugins)]
    return [text for name in dict.fromkeys(names) for text in ("-p", name)]


def load_plugins(plugins: Any, folder: Path = Path()) -> None:
    """Imports modules and .py files that the user names, so that their methods are registered.

    Args:
        plugins: module names ('my_package.attention') or .py files, relative to ``folder`` or to the current folder, or
            'experiments/models/NAME.py', a model of this package.
        folder: of the config file that names them.

    Raises:
        ConfigError: one can't be imported.
    """
    for plugin in listed(plugins):
        run_plugin(plugin, folder)


def load_config_plugins(source: Source, folder: Path) -> None:
    """Imports the plug-ins that a config names, if they may run.

    Args:
        source: with all of its bases and overrides.
        folder: of the user's config file; a stored folder's files are looked for in it.

    Raises:
        ConfigError: one can't be imported; or a stored folder names it, and the user has not.
    """
    plugins, stored = listed(source.values.get("plugins", [])), source.stored
    folder = stored or folder
    for plugin in plugins:
        if stored is not None and not _TRUSTED.get():
            if is_named(plugin):
                continue
            if (shipped := shipped_file(plugin)) is None:
                raise ConfigError(refusal(plugin, folder, stored, source.where(("plugins",))))
            plugin = str(shipped)
        run_plugin(plugin, folder)


def refusal(plugin: str, folder: Path, stored: Path, where: str) -> str:
    """Returns the line for a plug-in that only a stored folder names.

    Args:
        plugin: as the config names it.
        folder: that relative names start from.
        stored: the config that names it.
        where: place of the key, for messages.
    """
    file: str | Path = plugin if (found := find_file(plugin, folder)) is None else displayed(found)
    return (
        f"{where}: plugins: {file} is not run: {displayed(stored)} is data, whose plug-ins run only if you allow it: "
        "--trust-plugins, or -p FILE for your own copy"
    )


def listed(plugins: Any) -> Sequence[str]:
    """Returns the names in the key ``plugins``.

    Raises:
        ConfigError: it is no list of them.
    """
    if not isinstance(plugins, list | tuple) or not all(isinstance(name, str) and name for name in plugins):
        raise ConfigError("plugins: must be a list of module names or .py files")
    return plugins


def is_named(plugin: str) -> bool:
    """Returns whether the user has named a plug-in in this process: a module of that name, a file of that file name."""
    if not plugin.endswith(".py"):
        return plugin in sys.modules
    return Path(plugin).name in {Path(name).name for name in _NAMED.get()}


def shipped_file(plugin: str) -> Path | None:
    """Returns the model file of this package that a plug-in's name means; None if it is none."""
    file = package_configs() / "models" / Path(plugin).name
    return file if Path(plugin).parent == MODELS and file.is_file() else None


def find_file(plugin: str, folder: Path) -> Path | None:
    """Returns the file of a plug-in: beside its config, here, or a model of this package; None if there is none.

    A current folder that is itself a stored one is not searched: what lies there was put there by somebody else.
    """
    here = [] if stored_folder(Path.cwd() / plugin) is not None and not _TRUSTED.get() else [Path(plugin)]
    return next((file for file in (folder / plugin, *here) if file.is_file()), shipped_file(plugin))


def run_plugin(plugin: str, folder: Path) -> None:
    """Imports a plug-in, a module or a .py file of the folder or the current one; what this process has imported stays as it is.

    Raises:
        ConfigError: it is not there, or fails; one line.
    """
    try:
        if not plugin.endswith(".py"):
            importlib.import_module(plugin)
            _NAMED.get()[plugin] = None
            return
        file = find_file(plugin, folder)
        if file is None and is_named(plugin):
            return  # as -p, from another place
        if file is None:
            raise ConfigError(f"plugins: {plugin}: no such file in {folder} or the current folder")
        _import_file(file.resolve())
        _NAMED.get()[str(file.resolve())] = None
    except ConfigError:
        raise
    except Exception as error:
        reason = shorten(f"{type(error).__name__}: {error}", 300)
        raise ConfigError(f"plugins: {shorten(plugin)}: {reason}") from error


def _import_file(file: Path) -> None:
    name = f"vit_tucker_plugin_{file.stem}"
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) == str(file):
        return
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
