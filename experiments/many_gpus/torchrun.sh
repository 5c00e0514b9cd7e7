#!/usr/bin/env bash
# On each of NODES machines, NODE being 0, 1, ...:
#   NODES=2 NODE=0 MASTER=10.0.0.1 GPUS=8 experiments/many_gpus/torchrun.sh experiment=shapes_owl3 trainer=fsdp name=first
# Name the run, so that all ranks write of the same one.
set -euo pipefail
: "${NODES:=1}" "${NODE:=0}" "${MASTER:=127.0.0.1}" "${PORT:=29500}" "${GPUS:=8}"
exec torchrun --nnodes="$NODES" --node-rank="$NODE" --nproc-per-node="$GPUS" --master-addr="$MASTER" --master-port="$PORT" \
    --module owlfuse train "$@" trainer.devices="$GPUS" trainer.num_nodes="$NODES"
