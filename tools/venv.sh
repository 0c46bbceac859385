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
    # The log keeps an interactive run readable; it is shown whole when something fails.
    if ! .venv/bin/python -m pip install --disable-pip-version-check -e ".[$extras]" "${torch[@]}" >.venv/install.log 2>&1 ||
        { [ $# -gt 0 ] && ! .venv/bin/python -m pip install --disable-pip-version-check --no-deps "$@" >>.venv/install.log 2>&1; }; then
        cat .venv/install.log >&2
        echo "error: the installation failed; its last lines above say why" >&2
        exit 1
    fi
    cp pyproject.toml "$stamp"
}
