"""Writing a figure to disk whole or not at all."""

import pathlib

from matplotlib.figure import Figure

from efficient_attn.workdir import WorkdirError


def save(figure: Figure, out: pathlib.Path) -> None:
    """Write the PNG aside, then rename it. Raises `WorkdirError` where `out` is no PNG or cannot be written."""
    if out.suffix != ".png":
        raise WorkdirError(f"{out} should end in .png")
    aside = out.with_name(f".{out.name}.tmp.png")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(aside, dpi=120)
        aside.replace(out)
    except OSError as error:
        raise WorkdirError(f"cannot write {out}: {error.strerror}") from error
