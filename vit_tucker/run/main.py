"""One run from its config file, as the command line and sweeps start it."""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from vit_tucker.errors import ConfigError, StoppedError, nearest


def train(
    cfg: str | None,
    overrides: Sequence[str] = (),
    evaluate: bool = False,
    allow_changes: bool = False,
    dry_run: bool = False,
    *,
    model: str | None = None,
    method: str | None = None,
    quick_check: bool = False,
) -> int:
    """Trains, continues or evaluates the run of a config, or of a timm model with the recipe of its data set.

    Args:
        cfg: config file, name of a shipped config, or a run folder, which is then the run's own; None with ``model``.
        overrides: ``key.sub=value`` strings.
        evaluate, allow_changes, dry_run, quick_check: see ``vit_tucker.run.run.run``.
        model, method: see ``vit_tucker.config.target.read_run``.

    Returns:
        0, the exit status.

    Raises:
        VitTuckerError, FailedError: see ``run``. StoppedError: with the command that continues.
    """
    from vit_tucker.config.target import read_run

    config, notes = read_run(cfg, model, method, overrides)
    from vit_tucker.run.run import run  # after it: a mistake is reported before torch is imported

    if cfg is not None and Path(cfg).is_dir():
        config = config.model_copy(update={"output_dir": str(Path(cfg))})
    try:
        run(config, evaluate, allow_changes, dry_run, quick_check=quick_check, notes=notes)
    except StoppedError as stop:
        if quick_check:
            raise
        command = resume_command(str(config.output_dir), config.plugins)
        raise StoppedError(f"{stop}; the same command continues{f', or: {command}' if command else ''}") from None
    return 0


def device_overrides(name: str | None) -> list[str]:
    """Chooses the device of a training process, before CUDA is used.

    Args:
        name: cpu, cuda, or cuda:N, which becomes the only GPU that this process and its children see; None for the config's
            choice.

    Returns:
        ``key=value`` strings to override the config with.

    Raises:
        ConfigError: there is no such device here, or several processes would share it.
    """
    if name is None:
        return []
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and (kind == "cpu" or not number.isdecimal())):
        raise ConfigError(f"--device {name}: training runs on cpu, cuda or cuda:N{nearest(name, ('cpu', 'cuda'))}")
    if kind == "cpu":
        return ["train.cpu=true"]
    import torch

    count = torch.cuda.device_count()
    if int(number or 0) >= count:
        found = (
            "there is no GPU that torch can use here" if count == 0 else f"the GPUs here are cuda:0 to cuda:{count - 1}"
        )
        raise ConfigError(f"--device {name}: {found}; --device cpu trains without")
    if number:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(f"--device {name}: of several processes each has a GPU of its own; choose them by "
                              "CUDA_VISIBLE_DEVICES")  # fmt: skip
        visible = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
        os.environ["CUDA_VISIBLE_DEVICES"] = (visible or [str(n) for n in range(count)])[int(number)]
    return ["train.cpu=false"]


def resume_command(folder: str, plugins: Sequence[str] = ()) -> str | None:
    """Returns the command that continues a run here, on as many processes and with its plug-ins; None on several machines."""
    from vit_tucker.config.plugins import plugin_arguments

    processes, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if processes != here:
        return None
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    own = sys.argv[0].endswith(".py") and Path(sys.argv[0]).name != "__main__.py"
    script = [sys.argv[0]] if own else ["-m", "vit_tucker", "train"]
    launcher = [python, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    return shlex.join(
        [*(launcher if processes > 1 else [python]), *script, "--cfg", folder, *plugin_arguments(plugins)]
    )
