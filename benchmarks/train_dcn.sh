#!/usr/bin/env bash
# Compare Faster R-CNN with modulated deformable convolutions (-dcnv2) with its plain twin. Both train from scratch on a
# CPU, for the same number of iterations, on drawn shapes that are rotated and stretched (three seeds) and on the
# photographs of blood cells of benchmarks/train_cells.sh. The pyramid of the plain twin has 84 instead of 64 channels, so
# that the twin has at least as many parameters. The logs and metrics of each run are copied to
# benchmarks/results/dcn/NAME.
#
# Usage: benchmarks/train_dcn.sh DATA [NAME...]
#
# DATA is the folder of the blood cells. Without a NAME, the script does all runs. A run uses one core, so several calls
# with different names can run side by side.
set -euo pipefail
data=$1
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
runs=runs/dcn

dcnv2=(--backbone resnet18-gn-dcnv2-32 --channels 64)
plain=(--backbone resnet18-gn-32 --channels 84)
# The settings that are missing here are the defaults for drawn shapes.
rotated=(--data rotated-shapes:2000 --iterations 1000 --eval-every 500)
cells=(--data "voc:$data" --min-size 240 --max-size 320 --hidden 256 --option "sizes=(16,32,64,128,256)"
    --option num_samples=128 --batch 4 --optimizer adamw --lr 1e-3 --weight-decay 0.01 --schedule cosine --warmup 50
    --clip 10 --ema 0.99 --vertical-flip --cache --iterations 600 --eval-every 200)

train() {
    local name=$1
    shift
    "$python" -m relops train --output "$runs/$name" --model faster_rcnn_fpn --workers 1 --threads 1 "$@"
    local kept=benchmarks/results/dcn/$name
    mkdir -p "$kept"
    cp "$runs/$name"/{log.jsonl,metrics.json} "$kept"
}

run() {
    case $1 in
    rotated-dcnv2-[0-9]) train "$1" "${rotated[@]}" "${dcnv2[@]}" --seed "${1##*-}" ;;
    rotated-plain-[0-9]) train "$1" "${rotated[@]}" "${plain[@]}" --seed "${1##*-}" ;;
    cells-dcnv2) train "$1" "${cells[@]}" "${dcnv2[@]}" ;;
    cells-plain) train "$1" "${cells[@]}" "${plain[@]}" ;;
    *) echo "unknown run: $1" && return 2 ;;
    esac
}

"$python" - "${dcnv2[1]}" "${dcnv2[3]}" "${plain[1]}" "${plain[3]}" <<'END'
import sys

from relops.models import faster_rcnn_fpn

for backbone, channels in zip(sys.argv[1::2], map(int, sys.argv[2::2])):
    model = faster_rcnn_fpn(4, backbone=backbone, channels=channels, hidden=256)
    print(f"{backbone}, {channels} channels: {sum(x.numel() for x in model.parameters())} parameters")
END
[[ $# -gt 0 ]] || set -- rotated-{dcnv2,plain}-{0,1,2} cells-{dcnv2,plain}
for name; do run "$name"; done
