"""Images that a command line names: files, and folders of them."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from vit_tucker.errors import DataError


def list_images(paths: Sequence[Path]) -> list[Path]:
    """Files, and all images in folders and the folders inside them, by name.

    Args:
        paths: files, whatever their names, and folders.

    Raises:
        DataError: a path that is missing, or a folder without images.
    """
    return [file for path in paths for file in files_of(path)]


def files_of(path: Path) -> list[Path]:
    """A file itself; the images of a folder, by their endings."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    Image.init()
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in endings and file.is_file())
    if not files:
        raise DataError(f"{path}: the folder has no images")
    return files


def read_image_file(file: Path, mode: str) -> Image.Image:
    """Decode an image.

    Args:
        file: of any format that Pillow reads.
        mode: of PIL, "L" or "RGB".

    Raises:
        DataError: it can't be read; one line with the reason.
    """
    try:
        with Image.open(file) as opened:
            return opened.convert(mode)
    except Exception as error:  # decoders raise anything
        reason = " ".join(str(error).split()).replace(f" {str(file)!r}", "")
        raise DataError(f"{file}: can't be read as an image: {reason or type(error).__name__}") from None
