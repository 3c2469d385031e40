#!/usr/bin/env bash
# Train the detectors from scratch on photographs of blood cells at 320x240 on a CPU. The data set is the public
# Complete-Blood-Cell-Count-Dataset with 300 training images and 60 test images, which must be in
# DATA/{train,test}/{Annotations,Images}. The logs, metrics and plots of each run are copied to
# benchmarks/results/cells/NAME.
#
# Usage: benchmarks/train_cells.sh DATA [NAME...]
#
# Without a NAME, the script does all runs.
set -euo pipefail
data=$1
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
runs=runs/cells

common=(--data "voc:$data" --backbone resnet18-gn-32 --min-size 240 --max-size 320 --batch 4 --optimizer adamw --lr 1e-3
    --weight-decay 0.01 --schedule cosine --warmup 50 --clip 10 --ema 0.99 --vertical-flip --workers 1 --cache)
pyramid=(--channels 64 --hidden 256 --option "sizes=(16,32,64,128,256)" --option num_samples=128)
map=(--option stride=8 --option "scales=(2,5,12)" --option min_size=4)
single_map=(--model faster_rcnn --channels 128 --hidden 256 --option dropout=0.0 --option roi=align "${map[@]}")

train() {
    local name=$1
    shift
    "$python" -m relops train --output "$runs/$name" "${common[@]}" "$@"
    local kept=benchmarks/results/cells/$name
    mkdir -p "$kept"
    cp "$runs/$name"/{log.jsonl,metrics.json,curves.png} "$kept"
    cp "$runs/$name/predictions/0.png" "$kept/prediction.png"
}

run() {
    case $1 in
    faster_rcnn_fpn) train "$1" --model "$1" "${pyramid[@]}" --iterations 1950 --eval-every 195 ;;
    approximate) train "$1" "${single_map[@]}" --iterations 600 --eval-every 150 ;;
    joint) train "$1" "${single_map[@]}" --option training="$1" --iterations 400 --eval-every 100 ;;
    alternating) train "$1" "${single_map[@]}" --option training="$1" --iterations 1400 --eval-every 350 ;;
    cascade_rcnn | mask_rcnn) train "$1" --model "$1" "${pyramid[@]}" --iterations 260 --eval-every 130 ;;
    r_fcn)
        train "$1" --model "$1" --channels 128 --hidden 256 "${map[@]}" --option parts=3 --option roi=align \
            --iterations 600 --eval-every 150
        ;;
    hypernet)
        train "$1" --model "$1" --hidden 256 --option dropout=0.0 --option "sizes=(20,45,100)" \
            --option num_samples=64 --iterations 800 --eval-every 200
        ;;
    fast_rcnn) # uses the proposals of the run "approximate", which must be finished
        for split in train test; do
            "$python" -m relops propose "$runs/approximate" --split $split --count 300 --output "$runs/$split.npz"
        done
        train "$1" --model "$1" --proposals "$runs/train.npz" --test-proposals "$runs/test.npz" --hidden 256 \
            --option dropout=0.0 --option stride=8 --option roi=align --iterations 400 --eval-every 100
        ;;
    relation_networks) # the run "faster_rcnn_fpn" is the baseline without relations
        train "$1" --model relation_networks_fpn "${pyramid[@]}" --batch 2 --lr 7e-4 --iterations 3600 --eval-every 400
        ;;
    unsuppressed) # no non-maximum suppression, neither of proposals nor of detections
        train "$1" --model relation_networks_fpn "${pyramid[@]}" --option proposal_nms=None --batch 2 --lr 7e-4 \
            --iterations 3600 --eval-every 400
        ;;
    sparse_rcnn)
        train "$1" --model "$1" --batch 2 --channels 64 --hidden 256 --option proposals=100 --option init=grid \
            --lr 6e-4 --iterations 4000 --eval-every 400
        ;;
    sparse_rcnn_iou)
        train "$1" --model sparse_rcnn --batch 2 --channels 64 --hidden 256 --option proposals=100 --option init=grid \
            --option iou_attention=True --lr 6e-4 --iterations 2800 --eval-every 400
        ;;
    deformable_detr)
        train "$1" --model "$1" --batch 2 --channels 128 --hidden 256 --option queries=60 --option encoder_layers=1 \
            --option decoder_layers=3 --option refine=True --option two_stage=True --option dropout=0.0 --lr 4e-4 \
            --backbone-lr 2 --clip 1 --iterations 1600 --eval-every 200
        ;;
    lr_net) train "$1" "${single_map[@]}" --backbone lr_net26-32 --iterations 400 --eval-every 100 ;;
    *) echo "unknown run: $1" && return 2 ;;
    esac
}

[[ $# -gt 0 ]] || set -- faster_rcnn_fpn approximate joint alternating cascade_rcnn mask_rcnn r_fcn hypernet fast_rcnn \
    relation_networks unsuppressed sparse_rcnn sparse_rcnn_iou deformable_detr lr_net
for name; do run "$name"; done
