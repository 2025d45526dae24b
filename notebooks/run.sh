# Run a notebook with a profile's values: `sh notebooks/run.sh embedded 10_inputs`; more options are papermill's.
# The executed copy in executed/ is not committed.
set -e
profile=$1 notebook=$2
shift 2
mkdir -p "executed/$profile"
papermill --cwd notebooks --log-output --no-progress-bar -f "params/$profile/$notebook.yaml" "$@" \
  "notebooks/$notebook.ipynb" "executed/$profile/$notebook.ipynb"
