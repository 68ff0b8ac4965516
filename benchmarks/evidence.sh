#!/bin/sh
# Everything that docs/results.md tells, from slides and labelled pictures to its tables: 1.5 to 2 hours on two
# shared cores.
#
#   sh benchmarks/evidence.sh OUT                  # all of it; what is done already is not done again
#   sh benchmarks/evidence.sh OUT probe compare    # some of its steps
#
# PATHFM: the command (pathfm). DATA: slides, patches and ImageNet weights (../shared/data).
set -eu
OUT=$1
shift
[ $# -gt 0 ] || set -- corpus pretrain groups embed probe robustness segmentation compare
PATHFM=${PATHFM:-pathfm}
DATA=${DATA:-../shared/data}
IMAGENET=$DATA/weights/vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors
export OMP_NUM_THREADS=1 MLFLOW_TRACKING_URI="sqlite:///$OUT/mlflow.db"
mkdir -p "$OUT"

# One of two files of the CMU-1 region is left out: the DICOM copy is the same picture.
corpus() {
  $PATHFM index "$DATA/wsi" --out "$OUT/corpus" --mpp_overrides "$DATA/wsi/mpp.csv" --cohort.exclude wsic_
  $PATHFM foreground "$OUT/corpus"
}

pretrain_one() { # NAME SEED STEPS
  $PATHFM pretrain --corpus "$OUT/corpus" --out "$OUT/runs/$1" --backbone vit_tiny_patch16_224 \
    --weights "$IMAGENET" --seed "$2" --steps "$3" --batch_size 32 --checkpoint_every_steps 96 \
    --monitor_patches 256 --watch.every_steps 48 --optim.lr 2.5e-4 --optim.warmup_steps 30 \
    --dino.out_dim 2048 --dino.hidden_dim 1024 --views.global_1.size_px 112 \
    --views.global_2.size_px 112 --views.local.size_px 48 --views.n_local 4 \
    --tracking.experiment evidence
}

# The demo's recipe, three times as long, by two seeds.
pretrain() {
  for seed in 0 1; do pretrain_one "dino_$seed" "$seed" 384; done
}

# At 112 px bf16 turns some of ImageNet's features by more than it may: fp32 for all there.
embed_as() { # DATA SIZE POOLING MODEL...
  data=$1 px=$2 pooling=$3 precision=auto
  [ "$2" = 224 ] || precision=fp32
  shift 3
  for model; do
    case $model in
    imagenet) weights=$IMAGENET ;;
    random) weights=random:0 ;;
    *) weights=$OUT/runs/$model ;;
    esac
    $PATHFM embed --data "$OUT/$data" --weights "$weights" --backbone vit_tiny_patch16_224 --name "$model" \
      --input_px "$px" --pooling "$pooling" --out "$OUT/embeddings/$data/$px/$pooling" --threads 1 \
      --precision $precision --tracking.experiment evidence
  done
}

# plain: without groups. clustered: 100 groups by ImageNet features. clustered_dino: by features of dino_0.
groups() {
  for copy in plain clustered clustered_dino; do
    [ -d "$OUT/$copy" ] || cp -r "$DATA/patches/colorectal5" "$OUT/$copy"
    chmod -R u+w "$OUT/$copy"
  done
  embed_as plain 224 cls imagenet
  python tools/cluster_groups.py --embeddings "$OUT/embeddings/plain/224/cls/imagenet.safetensors" \
    --data "$OUT/clustered"
  embed_as clustered 224 cls dino_0
  python tools/cluster_groups.py --embeddings "$OUT/embeddings/clustered/224/cls/dino_0.safetensors" \
    --data "$OUT/clustered_dino"
}

embed() {
  for px in 224 112; do embed_as clustered $px cls imagenet random dino_0 dino_1; done
  for data in plain clustered_dino; do embed_as $data 112 cls imagenet dino_0; done
  for pooling in cls+mean mean; do embed_as clustered 112 $pooling imagenet random dino_0; done
}

probe_as() { # NAME DATA SIZE POOLING "MODELS" OPTION...
  name=$1 at=$OUT/embeddings/$2/$3/$4 files=
  for model in $5; do files="$files $at/$model.safetensors"; done
  shift 5
  # shellcheck disable=SC2086
  $PATHFM probe --embeddings $files --out "$OUT/probe/$name" --tracking.experiment evidence "$@"
}

# eva's heads with its own settings, then with several learning rates; the other axes by logistic and kNN.
probe() {
  for px in 224 112; do
    probe_as clustered_$px clustered $px cls "imagenet random dino_0" --also eva few-shot
    probe_as seeds_$px clustered $px cls "imagenet dino_0 dino_1"
  done
  probe_as clustered_112_rates clustered 112 cls "imagenet random dino_0" --also eva \
    --eva.learning_rates 1e-4 3e-4 1e-3 3e-3 1e-2
  for data in plain clustered_dino; do probe_as ${data}_112 $data 112 cls "imagenet dino_0"; done
  for pooling in cls+mean mean; do
    probe_as clustered_112_$pooling clustered 112 $pooling "imagenet random dino_0"
  done
  python benchmarks/probe_pairs.py "$OUT/probe/clustered_224" "$OUT/probe/clustered_112"
}

robustness() {
  $PATHFM robustness --data "$OUT/clustered" --models imagenet="$IMAGENET" random=random:0 \
    dino_0="$OUT/runs/dino_0" --backbone vit_tiny_patch16_224 --input_px 112 --per_class 200 \
    --n_splits 3 --precision bf16 --threads 1 --out "$OUT/robustness" --tracking.experiment evidence
}

# Thumbnails on which tissue was drawn, without those of slides that were pretrained on and those that are no slides.
segmentation() {
  python tools/drawn_masks.py --pictures "$DATA/masks" --out "$OUT/drawn" --without helicobacter \
    kidneyoncocytoma metastaticsarcoma molluscum gallery_06 histoqc_pen coverslip_edge
  $PATHFM probe-segmentation --data "$OUT/drawn" --weights "$IMAGENET" random:0 "$OUT/runs/dino_0" \
    --names imagenet random dino_0 --backbone vit_tiny_patch16_224 --tile_px 0 --heads linear --n_folds 5 \
    --n_runs 1 --steps 200 --out "$OUT/segmentation" --tracking.experiment evidence
}

compare() {
  $PATHFM compare --uri "$MLFLOW_TRACKING_URI" --experiment evidence --out "$OUT/page"
}

for step; do $step; done
