"""Photographs to measure on: scikit-image's, or the user's own."""

from pathlib import Path

from .command_line import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def skimage_photo(name: str) -> Path:
    """The path of a photograph that scikit-image carries."""
    import skimage

    return Path(skimage.__file__).parent / "data" / name


def find_photos(given: list[str] | None) -> list[Path]:
    """Photographs among the files and folders ``given``; none given: two of scikit-image's.

    Raises:
        UserError: naming what is no file, or if there is none.
    """
    if not given:
        return [skimage_photo(name) for name in ("retina.jpg", "hubble_deep_field.jpg")]
    found = []
    for path in map(Path, given):
        found += (
            sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            if path.is_dir()
            else [path]
        )
    missing = [str(path) for path in found if not path.is_file()]
    if missing or not found:
        raise UserError(
            "--images: expected photos or folders of photos, found no "
            f"{', '.join(missing or given)}"
        )
    return found
