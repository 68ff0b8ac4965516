"""Shows a picture with a grid of its own pixels, and polygons drawn on it; packs vertices as GeoJSON.

How the truth in ``pathfm/segmentation/drawn`` was made: look at a part of a picture with its grid,
write down vertices, look at them over the picture, correct them.

    python tools/trace.py show slide.jpg --box 100 50 400 300 --zoom 3 --out part.png [--drawn FILE]
    python tools/trace.py pack slide.jpg vertices.json --root PICTURES --out slide.geojson

``--drawn`` takes vertices.json or a GeoJSON. vertices.json is a list of
``{"name": "Tissue", "outer": [[x, y], ...], "holes": [[[x, y], ...], ...]}``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLOURS = {
    "Tissue": (0, 170, 0),
    "Fat": (230, 150, 0),
    "Pale stroma": (0, 150, 230),
    "Pen": (230, 0, 230),
    "Bubble": (0, 200, 200),
    "Edge": (120, 60, 200),
    "Ignore": (110, 110, 110),
}


def rings_of(path: Path) -> list[tuple[str, list[list[list[float]]]]]:
    """(name, rings) of each polygon: vertices.json or GeoJSON; the first ring is the outer one."""
    read: Any = json.loads(path.read_text())
    if isinstance(read, list):
        return [(p["name"], [p["outer"], *p.get("holes", [])]) for p in read]
    return [
        (f["properties"]["classification"]["name"], f["geometry"]["coordinates"])
        for f in read["features"]
    ]


def show(args: argparse.Namespace) -> None:
    """Writes the part of the picture, scaled, with a labelled grid and the polygons' outlines."""
    picture = Image.open(args.picture).convert("RGB")
    x0, y0, width, height = args.box or (0, 0, *picture.size)
    zoom = args.zoom or min(1400 / width, 1400 / height)
    part = picture.crop((x0, y0, x0 + width, y0 + height))
    part = part.resize((round(width * zoom), round(height * zoom)), Image.Resampling.LANCZOS)
    brush = ImageDraw.Draw(part, "RGBA")
    step = args.grid or next((s for s in (10, 20, 25, 50, 100, 200, 500) if s * zoom >= 70), 1000)
    for x in range(-(-x0 // step) * step, x0 + width, step):
        brush.line([((x - x0) * zoom, 0), ((x - x0) * zoom, part.height)], fill=(0, 0, 0, 60))
        brush.text(((x - x0) * zoom + 2, 1), str(x), fill=(200, 0, 0, 255))
    for y in range(-(-y0 // step) * step, y0 + height, step):
        brush.line([(0, (y - y0) * zoom), (part.width, (y - y0) * zoom)], fill=(0, 0, 0, 60))
        brush.text((1, (y - y0) * zoom + 1), str(y), fill=(200, 0, 0, 255))
    for name, rings in rings_of(args.drawn) if args.drawn else ():
        for k, ring in enumerate(rings):
            points = [((x - x0) * zoom, (y - y0) * zoom) for x, y in [*ring, ring[0]]]
            brush.line(points, fill=(*((220, 0, 0) if k else COLOURS[name]), 255), width=2)
            if args.vertices:
                for px, py in points[:-1]:
                    brush.ellipse((px - 2, py - 2, px + 2, py + 2), fill=(0, 0, 0, 255))
    part.save(args.out)
    print(f"{args.out}: {part.width} x {part.height} px, one grid step = {step} px of the picture")


def pack(args: argparse.Namespace) -> None:
    """Writes vertices.json as the GeoJSON of a picture, with the picture's size and SHA-256."""
    with Image.open(args.picture) as picture:
        width, height = picture.size
    if not args.picture.resolve().is_relative_to(args.root.resolve()):
        raise SystemExit(f"{args.picture} does not lie under --root {args.root}")
    features = []
    for name, rings in rings_of(args.vertices_file):
        if name not in COLOURS:
            raise SystemExit(f"{name!r} is no class: {', '.join(COLOURS)}")
        closed = [[*ring, ring[0]] if ring[0] != ring[-1] else ring for ring in rings]
        if any(len(ring) < 4 for ring in closed):
            raise SystemExit(f"a ring of {name} has fewer than three vertices")
        clipped = [[[min(max(x, 0), width), min(max(y, 0), height)] for x, y in r] for r in closed]
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": clipped},
                "properties": {"objectType": "annotation", "classification": {"name": name}},
            }
        )
    facts = {
        "file": args.picture.resolve().relative_to(args.root.resolve()).as_posix(),
        "sha256": hashlib.sha256(args.picture.read_bytes()).hexdigest(),
        "width_px": width,
        "height_px": height,
    }
    collection = {"type": "FeatureCollection", "picture": facts, "features": features}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(collection, separators=(",", ":")) + "\n")
    vertices = sum(len(r) - 1 for f in features for r in f["geometry"]["coordinates"])
    print(f"{args.out}: {len(features)} polygons, {vertices} vertices")


def main() -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(required=True)
    shown = verbs.add_parser("show")
    shown.add_argument("picture", type=Path)
    shown.add_argument("--box", type=int, nargs=4, metavar=("X", "Y", "W", "H"))
    shown.add_argument("--zoom", type=float)
    shown.add_argument("--grid", type=int, help="px of the picture between lines")
    shown.add_argument("--drawn", type=Path)
    shown.add_argument("--vertices", action="store_true", help="mark each vertex")
    shown.add_argument("--out", type=Path, required=True)
    shown.set_defaults(run=show)
    packed = verbs.add_parser("pack")
    packed.add_argument("picture", type=Path)
    packed.add_argument("vertices_file", type=Path)
    packed.add_argument("--root", type=Path, required=True, help="the pictures' root folder")
    packed.add_argument("--out", type=Path, required=True)
    packed.set_defaults(run=pack)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
