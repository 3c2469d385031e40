#!/usr/bin/env bash
# Compare Faster R-CNN with modulated deformable convolutions (-dcnv2) with its plain twin, on drawn shapes that are
# rotated and stretched and on the photographs of blood cells of benchmarks/train_cells.sh (three seeds). As in the papers
# on deformable convolutions, both begin with the body of a trained plain network: the run "body" trains a Faster R-CNN on
# drawn shapes that are neither rotated nor stretched. Both then train for the same number of iterations. The box head of
# the plain twin is wider, so that the twin has at least as many parameters. The evaluations of each run are copied to
# benchmarks/results/dcn/NAME.jsonl.
#
# Usage: benchmarks/train_dcn.sh DATA [NAME...]
#
# DATA is the folder of the blood cells. Without a NAME, the script does all runs. A run uses one core, so several calls
# with different names can run side by side, but the run "body" must be finished before the others start.
set -euo pipefail
data=$1
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
runs=runs/dcn

# The settings that are missing here are the defaults for drawn shapes.
plain=(--backbone resnet18-gn-32 --hidden 272)
dcnv2=(--backbone resnet18-gn-dcnv2-32 --hidden 256)
rotated=(--data rotated-shapes:4000 --iterations 4000 --eval-every 1000)
cells=(--data "voc:$data" --min-size 240 --max-size 320 --channels 64 --option stride=8 --option "scales=(2,5,12)"
    --option min_size=4 --option roi=align --option dropout=0.0 --batch 4 --optimizer adamw --lr 1e-3
    --weight-decay 0.01 --schedule cosine --warmup 50 --clip 10 --ema 0.99 --vertical-flip --cache --iterations 1500
    --eval-every 500)

train() {
    local name=$1
    shift
    "$python" -m relops train --output "$runs/$name" --model faster_rcnn --workers 0 --threads 1 "$@"
    mkdir -p benchmarks/results/dcn
    grep '"AP"' "$runs/$name/log.jsonl" > "benchmarks/results/dcn/$name.jsonl"
}

run() {
    local body=(--backbone-weights "$runs/body.pt")
    case $1 in
    body)
        train "$1" --data shapes:2000 --iterations 2000 --eval-every 1000 --backbone resnet18-gn-32
        "$python" - "$runs" <<'END'
import sys

import torch

weights = torch.load(f"{sys.argv[1]}/body/model.pt", weights_only=True)["model"]
prefix = "backbone.body."
body = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
torch.save(body, f"{sys.argv[1]}/body.pt")
END
        ;;
    rotated-dcnv2-[0-9]) train "$1" "${body[@]}" "${rotated[@]}" "${dcnv2[@]}" --seed "${1##*-}" ;;
    rotated-plain-[0-9]) train "$1" "${body[@]}" "${rotated[@]}" "${plain[@]}" --seed "${1##*-}" ;;
    cells-dcnv2-[0-9]) train "$1" "${body[@]}" "${cells[@]}" "${dcnv2[@]}" --seed "${1##*-}" ;;
    cells-plain-[0-9]) train "$1" "${body[@]}" "${cells[@]}" "${plain[@]}" --seed "${1##*-}" ;;
    *) echo "unknown run: $1" && return 2 ;;
    esac
}

"$python" - "${dcnv2[1]}" "${dcnv2[3]}" "${plain[1]}" "${plain[3]}" <<'END'
import sys

from relops.models import faster_rcnn

for backbone, hidden in zip(sys.argv[1::2], map(int, sys.argv[2::2])):
    model = faster_rcnn(4, backbone=backbone, channels=64, hidden=hidden, stride=8)
    print(f"{backbone}, hidden {hidden}: {sum(x.numel() for x in model.parameters())} parameters")
END
[[ $# -gt 0 ]] || set -- body rotated-{dcnv2,plain}-{0,1,2} cells-{dcnv2,plain}-{0,1,2}
for name; do run "$name"; done
