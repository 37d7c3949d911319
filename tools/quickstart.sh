#!/usr/bin/env bash
# From nothing to a trained and evaluated model: text alone, audio alone and both, on a corpus made on the spot.
#
#   bash tools/quickstart.sh [OUT]        OUT: folder of corpus, runs and report (default: build/quickstart)
if [[ ${1:-} == -* ]]; then
    sed -n '2,4s/^# \{0,1\}//p' "$0"
    exit 2
fi
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" demo
out=${1:-build/quickstart}

corpus=$out/corpus
if [ ! -f "$corpus/corpus.json" ]; then
    python tools/build_shards.py spoken --out "$corpus"
fi
# One rank a GPU; two on a machine without one.
ranks=$(python -c 'import torch; print(torch.cuda.device_count() or 2)')
jointfuse compare --recipe demo --ranks "$ranks" --out "$out" "data.corpus=$corpus"
