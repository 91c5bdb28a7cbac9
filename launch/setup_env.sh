#!/usr/bin/env bash
# Makes or re-uses the virtual environment. Source it and call `dmpo_setup [extras]`, or run it: launch/setup_env.sh dev
#
#   PYTHON     interpreter to make the environment with (default: the first suitable one on PATH)
#   DMPO_VENV  where the environment lies (default: .venv in the repository)

set -euo pipefail

DMPO_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
DMPO_VENV="${DMPO_VENV:-$DMPO_ROOT/.venv}"
case "$DMPO_VENV" in /*) ;; *) DMPO_VENV="$PWD/$DMPO_VENV" ;; esac

dmpo_die() {
    echo "dmpo: $*" >&2
    exit 1
}

dmpo_python_fits() { # INTERPRETER
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

dmpo_find_python() { # prints an interpreter, or says what is missing
    if [[ -n "${PYTHON:-}" ]]; then
        dmpo_python_fits "$PYTHON" || dmpo_die "PYTHON=$PYTHON is not a Python between 3.11 and 3.13"
        echo "$PYTHON"
        return
    fi
    local candidate
    for candidate in python3 python3.12 python3.11 python3.13 python; do
        if dmpo_python_fits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    dmpo_die "no Python between 3.11 and 3.13 on PATH; install one, or name it: PYTHON=/path/to/python3.11 $0"
}

dmpo_make_venv() {
    local python
    python="$(dmpo_find_python)" || exit 1
    # Never clear a folder that is not an environment: DMPO_VENV may be mistyped.
    if [[ -e "$DMPO_VENV" && ! -f "$DMPO_VENV/pyvenv.cfg" && -n "$(ls -A "$DMPO_VENV")" ]]; then
        dmpo_die "$DMPO_VENV exists and is not a virtual environment; set DMPO_VENV to another folder"
    fi
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        dmpo_die "$python cannot make virtual environments; on Debian and Ubuntu: sudo apt-get install python3-venv"
    "$python" -m venv --clear "$DMPO_VENV" || dmpo_die "could not make a virtual environment in $DMPO_VENV"
}

# The stamp says what is installed: a hash of pyproject.toml and constraints.txt and the checkout the editable install
# points to, then the extras. It is written last, so an interrupted installation leaves none.
dmpo_setup() { # [EXTRAS, comma-separated]
    local extras="${1:-}" stamp="$DMPO_VENV/.dmpo-installed" log="$DMPO_VENV/dmpo-install.log"
    local wanted hash="" have="" extra missing=""
    wanted="$(cd "$DMPO_ROOT" && { cat pyproject.toml constraints.txt && pwd; } | sha256sum | cut -d ' ' -f 1)"
    if [[ -f "$stamp" ]]; then
        read -r hash have <"$stamp" || true
    fi
    for extra in ${extras//,/ }; do
        [[ ",$have," == *",$extra,"* ]] || missing=yes
    done

    if ! "$DMPO_VENV/bin/python" -c '' 2>/dev/null; then
        dmpo_make_venv
        hash=""
    elif ! dmpo_python_fits "$DMPO_VENV/bin/python"; then
        dmpo_die "$DMPO_VENV holds $("$DMPO_VENV/bin/python" -V), not 3.11 to 3.13; remove it or set DMPO_VENV"
    elif [[ "$hash" == "$wanted" && -z "$missing" ]]; then
        echo "dmpo: environment $DMPO_VENV is up to date"
        dmpo_activate
        return
    fi
    # An environment made by uv, or one whose making was interrupted, has no pip.
    "$DMPO_VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$DMPO_VENV/bin/python" -m ensurepip >/dev/null ||
        dmpo_die "no pip in $DMPO_VENV; remove it and try again"

    # Extras that are there stay there, and the stamp keeps naming them.
    if [[ "$hash" == "$wanted" && -n "$have" ]]; then
        for extra in ${extras//,/ }; do
            [[ ",$have," == *",$extra,"* ]] || have+=",$extra"
        done
        extras="$have"
    fi
    rm -f "$stamp"
    echo "dmpo: installing .${extras:+[$extras]} into $DMPO_VENV (the first time takes minutes; progress: tail -f $log)"
    if ! (cd "$DMPO_ROOT" && "$DMPO_VENV/bin/python" -m pip install --disable-pip-version-check \
        -c constraints.txt -e ".${extras:+[$extras]}") >"$log" 2>&1; then
        dmpo_die "pip install failed, is the package index reachable? $(grep -o 'ERROR: .*' "$log" | tail -n 1) (all of it: $log)"
    fi
    echo "$wanted $extras" >"$stamp.part"
    mv "$stamp.part" "$stamp"
    dmpo_activate
}

dmpo_activate() {
    export VIRTUAL_ENV="$DMPO_VENV" PATH="$DMPO_VENV/bin:$PATH"
}

# What quickstart and tests share: one thread per worker, and DeepSpeed told when there is no NVIDIA GPU.
dmpo_runtime() {
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    if [[ -z "${DS_ACCELERATOR:-}" ]] && ! nvidia-smi -L >/dev/null 2>&1; then
        export DS_ACCELERATOR=cpu
    fi
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    dmpo_setup "${1:-}"
fi
