# Every notebook with the values in its first code cell, in two lanes with a core each; what one reads comes before it.
set -e
export OMP_NUM_THREADS=1
lane() { pytest -q -p no:cacheprovider --nbval-lax --nbval-cell-timeout=600 $(printf "notebooks/%s_*.ipynb " "$@"); }
lane 10 30 35 37 36 40 41 55 & first=$!
lane 01 02 45 47 50 00 95
wait $first
lane 60 61 62 20 & first=$!
lane 65 70
wait $first
lane 90 91
