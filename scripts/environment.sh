# Sourced by scripts/demo and scripts/test: makes .venv if there is none, and installs featx into it.
# usage: make_environment REQUIREMENT ("." or ".[dev]")

make_environment() {
    local python
    if [ ! -x .venv/bin/python ]; then
        for python in python3 python3.14 python3.13 python3.12 python3.11 ""; do
            if [ -z "$python" ]; then
                echo "featx needs Python 3.11 or newer, with venv; none of python3, python3.11 ... python3.14 is that." >&2
                exit 2
            fi
            if command -v "$python" >/dev/null && "$python" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
                break
            fi
        done
        echo "Making .venv with $("$python" --version) and installing featx into it (once, a few minutes) ..." >&2
        "$python" -m venv .venv
    fi
    # The stamp says what was installed: a changed project file or another requirement installs again.
    local stamp wanted
    stamp=.venv/featx-installed
    wanted="$1 $(cat pyproject.toml scripts/constraints.txt | cksum)"
    if ! grep -qsxF "$wanted" "$stamp"; then
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint scripts/constraints.txt --editable "$1"
        echo "$wanted" >>"$stamp"
    fi
}
