"""Headers and config.json of a run's saved weights, and the weights of its teacher."""

from typing import Any

from torch import nn

from vit_tucker.attention.options import MethodConfig
from vit_tucker.checkpoint.describe import describe
from vit_tucker.checkpoint.libraries import library_of
from vit_tucker.config.schema import RunConfig
from vit_tucker.data.loaders import Loaders
from vit_tucker.errors import CheckpointError
from vit_tucker.hosts.slot import slot_of
from vit_tucker.patching.record import patch_records
from vit_tucker.run.builders import builder_of
from vit_tucker.run.built import BuiltModel
from vit_tucker.storage.digests import save_model
from vit_tucker.storage.run_dir import LOGGER, RunDir
from vit_tucker.storage.weights import full_state, save_weights


def describe_weights(
    model: nn.Module, config: RunConfig, built: BuiltModel, loaders: Loaders
) -> tuple[dict[str, str], dict[str, Any] | None]:
    """Returns header and config.json of a run's weights.

    config.json is None, with a line in the log, if the model's library can't rebuild it.

    Args:
        model: whose weights are saved.
        config, built, loaders: as of ``build_trainer``.
    """
    library = library_of(model)
    try:
        description = library.describe(model, **builder_of(config).described(built, loaders))
    except CheckpointError as error:
        LOGGER.warning(f"checkpoints have no config.json to be rebuilt from: {error}")
        return weights_header(config.model.name, *(record.config for record in patch_records(model).values())), None
    return library.header(description), description


def save_teacher(run_dir: RunDir, teacher: nn.Module, name: str) -> None:
    """Saves the weights of a run's teacher, with a config.json by which a change is found, where timm can rebuild it.

    Args:
        run_dir: of the run.
        teacher: on any device.
        name: timm's name of the student.
    """
    file, header_entries = run_dir.teacher, weights_header(name)
    try:
        config = describe(teacher)
    except CheckpointError:
        save_weights(file, full_state(teacher), header_entries)
    else:
        save_model(file.parent, file.name, full_state(teacher), header_entries, config)


def weights_header(architecture: str, *methods: MethodConfig) -> dict[str, str]:
    """Returns the header of a weights file: timm name of its model, methods and, as JSON, all options and ranks."""
    entries = {"architecture": architecture, "attention": ""}
    for method in methods:
        name = slot_of(method).name
        entries |= {name: method.method, f"{name}_config": method.model_dump_json()}
    return entries
