#!/bin/sh
# The seven studies of docs/studies.md, from slides and labelled pictures to their pages: hours, which
# `pathfm study NAME --dry-run` reckons for each. What is done already is not done again.
#
#   sh benchmarks/studies.sh OUT                     # all of them
#   sh benchmarks/studies.sh OUT groups supcon       # some
#
# PATHFM: the command (pathfm). DATA: slides, patches and ImageNet weights (../shared/data). PICTURES: folders that hold the
# thumbnails of pathfm/segmentation/drawn/pictures.csv, which says where each is from; without, segmentation_losses is left
# out. PROCESSES: 2.
set -eu
OUT=$1
shift
[ $# -gt 0 ] || set -- groups initialisation online_vs_offline magnifications slides_and_patches supcon robustness_recipe segmentation_losses
PATHFM=${PATHFM:-pathfm}
DATA=${DATA:-../shared/data}
IMAGENET=$DATA/weights/vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors
LABELLED=$OUT/colorectal5
mkdir -p "$OUT"

# No slide is known of a labelled picture: look-alikes by ImageNet's features stand in, 100 groups.
groups() {
  [ -d "$LABELLED" ] || cp -r "$DATA/patches/colorectal5" "$LABELLED"
  chmod -R u+w "$LABELLED"
  $PATHFM embed --data "$LABELLED" --weights "$IMAGENET" --backbone vit_tiny_patch16_224 --name imagenet \
    --input_px 224 --threads 1 --out "$OUT/embeddings" --tracking.no-enabled
  python tools/cluster_groups.py --embeddings "$OUT/embeddings/imagenet.safetensors" --data "$LABELLED"
}

for step; do
  case $step in
  groups) groups ;;
  segmentation_losses)
    [ -n "${PICTURES:-}" ] || { echo "segmentation_losses is left out: PICTURES is not set" >&2; continue; }
    # shellcheck disable=SC2086
    $PATHFM study $step --pictures $PICTURES --out "$OUT/studies" --processes "${PROCESSES:-2}"
    ;;
  *)
    $PATHFM study "$step" --slides "$DATA/wsi" --mpp_overrides "$DATA/wsi/mpp.csv" \
      --exclude wsic_ --patches "$LABELLED" \
      --weights "$IMAGENET" --out "$OUT/studies" --processes "${PROCESSES:-2}"
    ;;
  esac
done
