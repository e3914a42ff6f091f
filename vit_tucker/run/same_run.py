"""Compares a config with that of the run in its folder: some keys may change, others may not."""

from vit_tucker.attention.base import AttentionConfig
from vit_tucker.checkpoint.entry import read_patch
from vit_tucker.config.load import config_difference, everywhere, load_config
from vit_tucker.config.schema import RunConfig
from vit_tucker.errors import CheckpointError, ConfigError
from vit_tucker.storage.checkpoints import intact_checkpoint
from vit_tucker.storage.json_files import parse_object
from vit_tucker.storage.paths import refuse_unwritable
from vit_tucker.storage.run_dir import RunDir
from vit_tucker.storage.run_files import IGNORED_KEYS
from vit_tucker.storage.weights import weights_metadata

STREAMS = ("wds", "hfids", "tfds")
"""Data sets whose batches depend on the number of loader workers."""


def check_folder(run_dir: RunDir, config: RunConfig, allow_changes: bool = False) -> tuple[RunConfig, list[str]]:
    """Refuses a folder with a run of another config, or that can't be made.

    A run that left no weights is none to go on with: its folder takes any config.

    Args:
        run_dir: folder of the run, which may be missing.
        config: validated.
        allow_changes: accept differences that matter.

    Returns:
        The config, with the ranks that a rank rule chose when the run began; and what has changed since then that matters.

    Raises:
        ConfigError: with the differences, or what is in the way.
    """
    if not run_dir.config.is_file():
        refuse_unwritable("output_dir", run_dir.path, folder=True)
        return config, []
    if not run_dir.begun:
        return config, []
    stored = load_config(run_dir.config)
    elsewhere = {line.partition(":")[0] for line in changes_of_run(everywhere(stored), everywhere(config))}
    changes = [line for line in changes_of_run(stored, config) if line.partition(":")[0] in elsewhere]
    if changes and not allow_changes:
        raise ConfigError(
            f"{run_dir.path} holds a run with another config: {'; '.join(changes)}; choose another output_dir=, remove that "
            "folder, or continue it with this config by --allow-changes"
        )
    if config.attention is not None and any(line.startswith("attention.") for line in changes):
        return config, changes
    return config.model_copy(update={"attention": stored.attention}), changes


def changes_of_run(stored: RunConfig, config: RunConfig) -> list[str]:
    """Lists the differences between the config of a run that began and another that matter: not the ranks that a rule chose.

    Returns:
        Lines 'train.lr: 0.001 -> 0.002'.
    """
    chosen, given = stored.attention, config.attention
    if chosen is not None and (given is None or given == given.without_choices()):  # it names no chosen ranks
        stored = stored.model_copy(update={"attention": chosen.without_choices()})
    streamed = config.data.dataset.partition("/")[0] in STREAMS
    ignored = IGNORED_KEYS - ({"data.num_workers"} if streamed else set())
    return [line for line in config_difference(stored, config) if line.partition(":")[0] not in ignored]


def stated_attention(config: RunConfig, run_dir: RunDir, training: bool) -> AttentionConfig | None:
    """Returns the attention of a run that has begun, with the ranks that its weights state: they may have changed in training.

    Args:
        config, run_dir: of the run.
        training: the weights are those to go on with, not the best ones.

    Returns:
        The config's own where the user has changed it, and where the weights state none.
    """
    if config.attention is None or config.attention != load_config(run_dir.config).attention:
        return config.attention
    checkpoint, _ = (None, ()) if run_dir.best.is_file() and not training else intact_checkpoint(run_dir.checkpoints)
    file = run_dir.best if checkpoint is None else checkpoint / "model.safetensors"
    try:
        stated = weights_metadata(file).get("attention_config") if file.is_file() else None
    except CheckpointError:  # whoever loads them says more of what is wrong
        stated = None
    if not stated:
        return config.attention
    return config.attention.model_copy(update={"rules": read_patch(parse_object(stated, str(file))).rules})
