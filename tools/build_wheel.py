"""Build the wheel that people install: the native decoder compiled, libjpeg-turbo inside. Then try it.

    python tools/build_wheel.py [--out dist] [--no-try]        (or: make wheel)

One wheel serves every Python from 3.11 on (abi3). libjpeg-turbo is the one that Pillow's wheel ships:
built with SIMD by people who do that for a living, and for glibc versions older than ours. auditwheel
names the platform (manylinux_2_xx) after what the binaries really need.

The trial makes a new virtual environment with the reader's own dependencies (no torch), hides every
compiler, installs the wheel, and compares patches of a synthetic slide with OpenSlide, natively and portably.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
READER_DEPENDENCIES = (
    "numpy", "tifffile", "zarr", "imagecodecs", "simplejpeg", "pillow", "aiohttp", "defusedxml",
    "openslide-python", "openslide-bin", "tiffslide", "fsspec",
)  # fmt: skip

TRIAL = """
import numpy as np, openslide, tempfile, sys
from pathlib import Path
from online_patching import ForegroundMask, PatchLoader, PatchSampler, canvases, native, read_slide_index
from online_patching.testing import SyntheticSlide, write_tiff
print(canvases.DECODER)
assert native.AVAILABLE and "this package" in native.ABOUT, native.ABOUT
assert "torch" not in sys.modules
path = write_tiff(Path(tempfile.mkdtemp()) / "a.svs", SyntheticSlide(1, 2300, 1500, mpp=0.25))
index = read_slide_index(str(path))
sampler = PatchSampler([index], [ForegroundMask.everything(index)], size_px=224, mpp=[0.25], seed=0)
slide = openslide.OpenSlide(path)
for native.AVAILABLE in (True, False):
    with PatchLoader(sampler, 32) as loader:
        batch = next(loader)
    for ref, pixels in zip(batch.refs, batch.pixels):
        theirs = slide.read_region((ref.x_px0, ref.y_px0), 0, (224, 224)).convert("RGB")
        assert (np.asarray(theirs) == pixels).all(), ref
print("64 patches equal OpenSlide's, native and portable")
"""


def main() -> None:
    """Build, tag, try."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path("dist"), help="folder for the wheel (default dist)"
    )
    parser.add_argument(
        "--no-try", action="store_true", help="only build; do not install it anywhere"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        wheel = build(Path(scratch), args.out.resolve())
        print(f"built {wheel}")
        if not args.no_try:
            attempt(wheel, Path(scratch) / "venv")


def build(scratch: Path, out: Path) -> Path:
    """The wheel, tagged for the platform it runs on."""
    source = scratch / "source"
    tracked = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    for name in filter(
        None, tracked
    ):  # the working tree's tracked files, and no leftovers of builds
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    put_libjpeg_in(source / "online_patching" / "native" / "lib")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", str(scratch / "plain"), str(source))
    plain = next((scratch / "plain").glob("*.whl"))
    if "abi3" not in plain.name:
        raise SystemExit(f"{plain.name}: the extension was not compiled. Is there a C compiler?")
    run("auditwheel", "repair", str(plain), "--wheel-dir", str(scratch / "tagged"))
    tagged = next((scratch / "tagged").glob("*.whl"))
    out.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy2(tagged, out / tagged.name))


def put_libjpeg_in(folder: Path) -> None:
    """libjpeg-turbo from Pillow's wheel, and its licence."""
    pillow = distribution("pillow")
    files = [f for f in pillow.files or () if f.name.startswith("libjpeg")]
    if not files:
        raise SystemExit("this Pillow ships no libjpeg-turbo: install its wheel from PyPI.")
    folder.mkdir(parents=True)
    shutil.copy2(str(pillow.locate_file(files[0])), folder / "libjpeg.so.62")
    licences = [
        f for f in pillow.files or () if f.name.startswith("LICENSE") and "dist-info" in str(f)
    ]
    for licence in licences:
        shutil.copy2(str(pillow.locate_file(licence)), folder / f"{licence.name}.pillow")


def attempt(wheel: Path, venv: Path) -> None:
    """Install the wheel where nothing can be compiled, and read patches."""
    run(sys.executable, "-m", "venv", str(venv))
    pip = [
        str(venv / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ]
    run(*pip, "--only-binary", ":all:", "-c", str(ROOT / "constraints.txt"), *READER_DEPENDENCIES)
    run(*pip, "--no-deps", str(wheel))
    without = {**os.environ, "PATH": str(venv / "bin"), "CC": "/bin/false"}
    print(run(str(venv / "bin" / "python"), "-I", "-c", TRIAL, env=without, cwd=venv).strip())


def run(*command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """A command's output; its errors end the script."""
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command[:4])} ...\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return done.stdout


if __name__ == "__main__":
    main()
