#!/usr/bin/env bash
# Slides to slide-level scores, every stage from the shell, on the real slides in ../shared/data/wsi:
# headers, masks, patches through the loader on a grid and drawn, bags (HDF5), ABMIL and mean pooling in folds by patient.
#
#     bash benchmarks/slide_level.sh OUT
#
# The labels are made up ("a" and "b" by turns of the patients), so the scores say nothing: the path is what is shown.
set -eu
out=$1 data=../shared/data
weights=$data/weights/vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors

pathfm index $data/wsi --out "$out/corpus" --mpp_overrides $data/wsi/mpp.csv --cohort.exclude vendor
pathfm foreground "$out/corpus"

embed="pathfm embed --data $out/corpus --weights $weights --mpp 4 --input_px 112 --out $out/bags --tracking.enabled false"
$embed --name grid
$embed --name drawn --slides.patches_per_slide 16

# one case, four stains: one patient
python - "$out" <<'PYTHON'
import sys
from pathlib import Path

slides = sorted(path.stem for path in Path(sys.argv[1], "bags", "grid", "h5_files").glob("*.h5"))
patients = [slide.split("_")[0] for slide in slides]
turns = {patient: "ab"[turn % 2] for turn, patient in enumerate(dict.fromkeys(patients))}
rows = [f"{slide},{turns[patient]},{patient}" for slide, patient in zip(slides, patients)]
Path(sys.argv[1], "slides.csv").write_text("slide,label,patient\n" + "\n".join(rows) + "\n")
PYTHON
cat "$out/slides.csv"
pathfm probe-slides --bags "$out/bags/grid" "$out/bags/drawn" --labels "$out/slides.csv" \
  --n_folds 3 --n_runs 3 --max_epochs 10 --out "$out/probe" --tracking.enabled false
python - "$out" <<'PYTHON'
import sys
from pathlib import Path

import h5py

for path in sorted(Path(sys.argv[1], "bags").glob("*/h5_files/*.h5")):
    with h5py.File(path) as bag:
        told = {name: int(bag["coords"].attrs[name]) for name in ("patch_size", "patch_size_level0", "overlap")}
        print(path.parent.parent.name, path.stem, bag["features"].shape, bag["coords"].shape, told)
PYTHON
