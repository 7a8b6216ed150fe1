# Sourced by quickstart.sh and run_tests.sh: makes .venv if it is missing, and installs a
# requirements file into it whenever a requirements file has changed.

prepare() {  # prepare REQUIREMENTS_FILE
    if [ ! -x .venv/bin/python ]; then
        for python in python3 python; do
            if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
                break
            fi
            python=
        done
        if [ -z "$python" ]; then
            echo "Found no Python 3.10 or newer as python3 or python: install one" >&2
            exit 2
        fi
        "$python" -m venv .venv
    fi
    local wanted installed=".venv/installed-$1"
    wanted=$(cat requirements*.txt)
    if [ "$(cat "$installed" 2>/dev/null)" != "$wanted" ]; then
        echo "Installing $1 into .venv (minutes, one with uv; several GB with CUDA)" >&2
        # uv is faster than pip but ignores pip's settings: if it fails, pip tries. Bytecode is
        # compiled as pip does: where Python may not write any, every start would compile all
        # of PyTorch's modules anew, which takes longer than the rest of it
        { command -v uv && uv pip install --quiet --compile-bytecode --python .venv/bin/python \
            -r "$1"; } >/dev/null ||
            .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1"
        echo "$wanted" > "$installed"
    fi
}
