# Sourced by the scripts beside it: makes .venv if it is missing or its Python is gone, and installs
# a requirements file into it whenever a requirements file has changed.

choose_python() {  # choose_python [PYTHON]: puts it, by default that of .venv, first on the path
    if [ -z "$1" ]; then
        prepare requirements.txt
        set -- "$PWD/.venv/bin/python"
    fi
    export PATH="$(dirname "$1"):$PATH"
}

show() {  # print a command and run it
    printf '\n$ %s\n' "$*" >&2 || true
    "$@"
}

prepare() {  # prepare REQUIREMENTS_FILE
    flock 9 2>/dev/null || true  # one at a time, where the system has flock
    # Half removed, without its pyvenv.cfg, it would install into the Python that it was made with
    if ! .venv/bin/python -c 'import os, sys; sys.exit(not os.path.samefile(sys.prefix, ".venv"))' \
        2>/dev/null; then
        local python
        for python in python3 python none; do
            if is_new_enough "$python"; then
                break
            fi
        done
        if [ "$python" = none ]; then
            echo "Found no Python 3.10 or newer as python3 or python: install one" >&2
            exit 2
        fi
        "$python" -m venv --clear .venv || {
            echo "Cannot make .venv: mend what is said above, or remove .venv, and repeat" >&2
            exit 2
        }
    elif ! is_new_enough .venv/bin/python; then
        echo "The Python of .venv must be 3.10 or newer: remove the folder .venv and repeat" >&2
        exit 2
    fi
    local wanted installed=".venv/installed-$1" unfinished=.venv/unfinished again=
    wanted=$(cat requirements*.txt)
    if [ -e $unfinished ] || [ "$(cat "$installed" 2>/dev/null)" != "$wanted" ]; then
        echo "Installing $1 into .venv (minutes, one with uv; several GB with CUDA)" >&2
        if [ -e $unfinished ]; then  # half a package passes for a whole one
            echo "The last installation was interrupted: all is installed again" >&2
            again=--force-reinstall
        fi
        touch $unfinished
        install_packages "$1" $again || { rm $unfinished; exit 2; }
        echo "$wanted" > "$installed"
        rm $unfinished
    fi
} 9<environment.sh

is_new_enough() {  # is_new_enough PYTHON
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

install_packages() {  # install_packages REQUIREMENTS_FILE [OPTION]
    # uv is faster than pip but ignores pip's settings: if it fails, pip tries. Bytecode is compiled
    # as pip does: where Python may not write any, every start would compile all of PyTorch's
    # modules anew, which takes longer than the rest of it
    { command -v uv && uv pip install --quiet --compile-bytecode --python .venv/bin/python ${2:-} \
        -r "$1"; } >/dev/null && return
    # Where venv was interrupted there is no pip
    .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null
    .venv/bin/python -m pip install --quiet --disable-pip-version-check ${2:-} -r "$1"
}
