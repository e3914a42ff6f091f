"""A look at every image of a run before it begins."""

from vit_tucker.config.schema import RunConfig
from vit_tucker.data.check import unreadable
from vit_tucker.data.classes import stored_classes
from vit_tucker.data.faults import FaultLog
from vit_tucker.errors import DataError
from vit_tucker.run.model import classes_and_channels
from vit_tucker.storage.run_dir import LOGGER, RunDir
from vit_tucker.training.coordination import Coordinator


def check_images(config: RunConfig, run_dir: RunDir, coordinator: Coordinator, with_train: bool) -> list[str]:
    """Opens every image of the run's splits, shared among the processes; streams are only checked as they are read.

    Args:
        config: validated.
        run_dir: its folder.
        coordinator: of the processes.
        with_train: check the training split too.

    Returns:
        The fault lines of the bad ones, of all processes.

    Raises:
        DataError: more of them than ``data.max_bad_images``; each has a line in the log.
    """
    stored = stored_classes(run_dir.path_if_begun)
    num_classes, channels = coordinator.together(lambda: classes_and_channels(config, stored))
    place = coordinator.rank, coordinator.num_processes
    bad = coordinator.union(
        coordinator.together(lambda: unreadable(config.data, channels, with_train, stored, num_classes, *place))
    )
    try:
        coordinator.together(lambda: FaultLog(config.data.max_bad_images).add(bad))
    except DataError:
        for line in bad:
            LOGGER.warning(f"bad image: {line}")
        raise
    return bad
