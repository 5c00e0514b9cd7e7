#!/bin/sh
# Every benchmark that needs a card, one after the other, within 10 minutes.
# Tables, numbers and plots lie in benchmarks/<card>/ afterwards. A benchmark that fails, or that
# the time does not reach, is named at the end, and the others go on.
#
#   sh benchmarks/gpu.sh [PYTHON]        by default the environment's, .venv/bin/python
cd "$(dirname "$0")/.." || exit 1
python=${1:-.venv/bin/python}
deadline=$(($(date +%s) + 590))
failed=""

bench() {
    echo "== $*"
    left=$((deadline - $(date +%s)))
    if [ "$left" -le 0 ] || ! timeout "$left" "$python" -m benchmarks "$@"; then
        failed="$failed
  $*"
    fi
}

bench step --size 0.4b --precision bf16-mixed --pack-to 1280
bench modality_adaptive --size 0.4b --precision bf16-mixed --pack-to 1280
bench peak --size 0.4b --precision bf16-mixed --pack-to 1280
for fusion in concat modality_adaptive hyperattention; do
    bench train --size 1b --fusion "$fusion"
done
bench decode
bench images --size 0.4b --precision bf16-mixed

if [ -n "$failed" ]; then
    echo "not measured:$failed" >&2
    exit 1
fi
