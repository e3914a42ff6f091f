"""One run from its config file, as the command line and sweeps start it."""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from vit_tucker.errors import StoppedError


def train(
    cfg: str, overrides: Sequence[str] = (), evaluate: bool = False, allow_changes: bool = False, dry_run: bool = False
) -> int:
    """Trains, continues or evaluates the run of a config.

    Args:
        cfg: config file, name of a shipped config, or a run folder, which is then the run's own.
        overrides: ``key.sub=value`` strings.
        evaluate, allow_changes, dry_run: see ``vit_tucker.run.run.run``.

    Returns:
        0, the exit status.

    Raises:
        VitTuckerError, FailedError: see ``run``. StoppedError: with the command that continues.
    """
    from vit_tucker.config.load import load_config

    config = load_config(cfg, overrides)
    from vit_tucker.run.run import run  # after it: a mistake is reported before torch is imported

    if Path(cfg).is_dir():
        config = config.model_copy(update={"output_dir": str(Path(cfg))})
    try:
        run(config, evaluate, allow_changes, dry_run)
    except StoppedError as stop:
        command = resume_command(str(config.output_dir), config.plugins)
        raise StoppedError(f"{stop}; the same command continues{f', or: {command}' if command else ''}") from None
    return 0


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
