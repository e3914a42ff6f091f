"""What can be known to be wrong with a sweep's runs before any of them starts."""

from collections.abc import Sequence

from vit_tucker.build import classes_and_channels
from vit_tucker.errors import PatchError
from vit_tucker.models import create_host
from vit_tucker.patching.patch import plan
from vit_tucker.patching.probe import structure_copy
from vit_tucker.sweep.plan import Job


def refuse_impossible(jobs: Sequence[Job]) -> None:
    """Plan each cell's patch on its host, without weights.

    Args:
        jobs: the runs; one per cell is looked at. Cells whose ranks are yet to be chosen are left out.

    Raises:
        VitTuckerError: a model that can't be built, or a patch that it doesn't allow; it names the cell.
    """
    hosts = {}
    for job in {job.name: job for job in jobs}.values():
        model, attention = job.config.model, job.config.attention
        bare = model.model_copy(update={"pretrained": False, "checkpoint": None})
        arguments = (bare, *classes_and_channels(job.config))
        if (key := repr(arguments)) not in hosts:
            hosts[key] = structure_copy(create_host(*arguments))
        if attention is None or attention.rank_rule is not None:
            continue
        try:
            plan(
                hosts[key],
                attention.model_copy(update={"init": "random", "calibration": None}),
                img_size=model.img_size,
            )
        except PatchError as error:
            raise PatchError(f"cell {job.name}: attention: {error}") from None
