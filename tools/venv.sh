# Sourced by tools/test and tools/demo: makes .venv in the root of the checkout and installs the project into it.
# usage: make_venv EXTRAS [PACKAGE installed without its dependencies]…

cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local name
    for name in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
        if [ -n "$name" ] && "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "error: need Python 3.11, 3.12 or 3.13; install one, or name it: PYTHON=/path/to/python $0" >&2
    return 1
}

# Run a command with its output in a log; a terminal sees the seconds and the log's last line meanwhile.
watched() {
    local log=.venv/install.log
    "$@" >"$log" 2>&1 &
    local pid=$!
    while [ -t 1 ] && kill -0 "$pid" 2>/dev/null; do
        printf '\r\033[K   %3d s  %.80s' "$SECONDS" "$(tail -n 1 "$log" | tr -d '\r')"
        sleep 0.5
    done
    [ -t 1 ] && printf '\r\033[K'
    if ! wait "$pid"; then
        cat "$log" >&2
        echo "error: '$*' failed; the lines above say why" >&2
        exit 1
    fi
}

make_venv() {
    local extras=$1 python stamp
    shift
    python=$(find_python) || exit 1
    # One stamp per set of extras: an unchanged pyproject.toml is not installed again.
    stamp=.venv/installed-${extras//,/-}
    if [ -f "$stamp" ] && cmp -s "$stamp" pyproject.toml; then
        return
    fi
    echo "== installing meshpack[$extras] into .venv (about two minutes the first time)"
    if ! [ -x .venv/bin/python ] && ! "$python" -m venv .venv; then
        rm -rf .venv
        echo "error: $python cannot make virtual environments; on Debian: apt-get install python3-venv" >&2
        exit 1
    fi
    # A CPU machine gets the one build the CPU figures were measured with; a GPU machine resolves torch itself.
    local torch=()
    if ! command -v nvidia-smi >/dev/null; then
        torch=("torch==2.13.0")
    fi
    local pip=(.venv/bin/python -m pip install --disable-pip-version-check)
    watched "${pip[@]}" -e ".[$extras]" "${torch[@]}"
    if [ $# -gt 0 ]; then
        watched "${pip[@]}" --no-deps "$@"
    fi
    cp pyproject.toml "$stamp"
}
