#!/usr/bin/env bash
# The front door. Every command sets the project up first (a virtual environment in .venv; quick when nothing changed).
#
#   ./run.sh                          train a dense ViT on the embedded digits, patch it with Tucker Attention, fine-tune, compare
#   ./run.sh test [pytest args]       all tests; -p mymethod.py tests/contract: those that a method of yours must pass;
#                                     --quick: under a minute, for the inner loop; it says what it leaves out
#   ./run.sh train --cfg X key=value  train anything; NUM_PROCESSES=2 ./run.sh train ... on that many processes or GPUs;
#                                     --quick-check tries it; or train MODEL --method 'NAME ...' data.dataset=Y, without a file
#   ./run.sh sweep --cfg sweeps/X     methods x options x seeds, from one dense model per seed
#   ./run.sh tables RUNS... --out F   tables and figures of finished runs; ./run.sh report: README of experiments/results
#   ./run.sh hosts --filter 'vit_*'   which timm models can be patched, by which methods
#   ./run.sh plan --cfg X             what a config's patch would do, without training
#   ./run.sh cost MODEL --method ...  parameters, FLOPs, memory and latency of a timm model with any methods
#   ./run.sh COMMAND ...              any command of vit-tucker: convert, evaluate, predict, explain, export, bench, ...; --help lists them
#   ./run.sh docs                     the documentation into site/; ./run.sh docs serve: while you write it
#   ./run.sh setup [EXTRA]            only set up; with an extra of setup.cfg: onnx, data (webdataset, sets of the hub), slurm, hf
#
# What a command needs beside the package is installed when its arguments first ask for it: onnx by export, slurm, data, hf.
# PYTHON=python3.12 chooses the interpreter (3.10 to 3.13), CONSTRAINTS=constraints-oldest.txt the oldest supported torch and timm.
set -euo pipefail
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
constraints=${CONSTRAINTS:-constraints.txt}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "error: no Python 3.10 to 3.13 found (tried: ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}); set PYTHON=" >&2
  return 2
}

# setup EXTRA: install the package with an extra of setup.cfg, or "", and the versions of the constraints file into .venv.
setup() {
  local extra=$1 stamp state stamps
  stamp=".venv/.installed-${extra:-main}"
  if [ ! -x .venv/bin/python ]; then
    local python
    python=$(find_python)
    echo "setting up .venv with $("$python" --version); the first time downloads several GB (PyTorch)" >&2
    rm -rf .venv
    "$python" -m venv .venv || { rm -rf .venv; echo "error: $python can't make a virtual environment (Debian: apt install python3-venv)" >&2; return 2; }
  fi
  state=$(cat setup.cfg pyproject.toml "$constraints" | cksum)
  case $extra in
    "") stamps=.venv/.installed-* ;;  # each extra brings the package
    lint) stamps=$stamp ;;
    *) stamps="$stamp .venv/.installed-test" ;;  # which has the others in it
  esac
  if ! grep -qsxF "$state" $stamps; then
    [ -z "$extra" ] || echo "installing what this needs besides: vit_tucker[$extra]" >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c "$constraints" -e ".${extra:+[$extra]}" >&2
    echo "$state" >"$stamp"
  fi
}

# run_tests ARGS: pytest; -p takes a module, or a .py file, of the folder where this script was called.
run_tests() {
  local path=$called_from arguments=() before="" argument file
  for argument in "$@"; do
    if [ "$before" = -p ] && [[ $argument == *.py ]]; then
      file=$argument
      [[ $file == /* ]] || file=$called_from/$file
      path="$(cd "$(dirname "$file")" && pwd):$path"
      argument=$(basename "$file" .py)
    fi
    arguments+=("$argument")
    before=$argument
  done
  PYTHONPATH="$path${PYTHONPATH:+:$PYTHONPATH}" exec .venv/bin/python -m pytest -n 2 --dist loadfile "${arguments[@]}"
}

check_processes() {
  case "${NUM_PROCESSES:-1}" in *[!0-9]* | 0*)
    echo "error: NUM_PROCESSES=$NUM_PROCESSES: a number of processes, 1 or more" >&2
    return 2
    ;;
  esac
}

train() {
  if [ "${NUM_PROCESSES:-1}" -gt 1 ]; then
    # --multi_gpu also starts the processes on a machine without GPUs (they talk over gloo); --cpu would start only one
    local port
    port=${MASTER_PORT:-$(.venv/bin/python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
    .venv/bin/python -m vit_tucker.cli.launch --multi_gpu --num_processes "$NUM_PROCESSES" --num_machines 1 \
      --mixed_precision no --dynamo_backend no --main_process_port "$port" experiments/train_vit.py "$@"
  else
    .venv/bin/python experiments/train_vit.py "$@"
  fi
}

# extra_of COMMAND ARGS: what of setup.cfg's extras a command needs, as far as its arguments tell.
extra_of() {
  local extra=""
  case " $* " in
    *" -h "* | *" --help "* | " export "*--format[\ =]dense* | " export "*--format[\ =]torch_export*) ;;
    " export "*) extra=onnx ;;
    " sweep "*slurm*) extra=slurm ;;
    " perplexity "* | " hosts "*transformers*) extra=hf ;;
  esac
  case " $* " in *[\ =]hf:*) extra=${extra:+$extra,}hf ;; esac
  case " $* " in *[\ =]wds/* | *[\ =]hfds/* | *[\ =]hfids/*) extra=${extra:+$extra,}data ;; esac
  echo "$extra"
}

main_job() {
  train --cfg digits/dense
  train --cfg digits/tucker_r16_finetune
  echo
  .venv/bin/python -m vit_tucker compare runs/digits-dense-0 runs/digits-tucker_r16_finetune-0
}

command=${1:-main}
[ $# -gt 0 ] && shift
case "$command" in
  main) check_processes && setup "" && main_job ;;
  setup) setup "${1:-}" ;;
  test) setup test && run_tests "$@" ;;
  docs) setup docs && NO_MKDOCS_2_WARNING=1 exec .venv/bin/mkdocs "${1:-build}" --strict ;;
  lint) setup lint && .venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy ;;
  train) check_processes && setup "$(extra_of train "$@")" && train "$@" ;;
  sweep | tables | report) setup "$(extra_of "$command" "$@")" && exec .venv/bin/python "experiments/$command.py" "$@" ;;
  -h | --help | help) sed -n '2,20s/^# \{0,1\}//p' "$0" && setup "" && exec .venv/bin/vit-tucker --help ;;
  *) setup "$(extra_of "$command" "$@")" && exec .venv/bin/vit-tucker "$command" "$@" ;;
esac
