# Sourced by quickstart.sh and run_tests.sh: makes .venv, once, and installs a requirements file
# into it whenever that file has changed.

prepare() {  # prepare REQUIREMENTS_FILE
    if [ ! -x .venv/bin/python ]; then
        for python in python3 python; do
            if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
                break
            fi
            python=
        done
        if [ -z "$python" ]; then
            echo "Python 3.10 or newer is needed, and neither python3 nor python is one" >&2
            exit 2
        fi
        "$python" -m venv .venv
    fi
    local wanted installed=".venv/installed-$1"
    wanted=$(cat requirements*.txt)
    if [ "$(cat "$installed" 2>/dev/null)" != "$wanted" ]; then
        echo "Installing $1 into .venv (minutes, seconds with uv; several GB with CUDA)" >&2
        # uv takes seconds where pip takes minutes; it does not know pip's settings, though
        { command -v uv && uv pip install --quiet --python .venv/bin/python -r "$1"; } >/dev/null ||
            .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1"
        echo "$wanted" > "$installed"
    fi
}
