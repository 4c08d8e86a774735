# Make .venv and install emtool into it, step by step. Sourced by quickstart.sh and test.sh; safe to run again.
#
#   setup_env runtime|dev
#
# EMTOOL_TORCH_INDEX, if set, is the index that torch is installed from.

say() { printf '\n==> %s\n' "$*"; }

setup_env() {
    local kind=$1 python=${PYTHON:-python3} extras="" gpu="" stamp=.venv/.emtool-$1 wanted
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "Python 3.11 or newer is needed; $python is $("$python" --version 2>&1). Set PYTHON to another one." >&2
        return 1
    }
    wanted=$(cat pyproject.toml emtool/__init__.py | cksum)
    if [ -x .venv/bin/emtool ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        say "using the virtual environment in .venv"
        return 0
    fi
    say "making a virtual environment in .venv"
    "$python" -m venv .venv
    local pip=".venv/bin/python -m pip --disable-pip-version-check install --quiet"
    .venv/bin/python -c 'import sys; sys.path.insert(0, "."); from emtool.core.hardware import cuda_device_count; sys.exit(not cuda_device_count())' && gpu=yes
    if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
        local torch="torch==2.13.0"
        if [ -n "$gpu" ]; then
            torch="torch>=2.6"
            say "installing torch for CUDA: a download of several GB"
        else
            say "installing torch 2.13.0: 190 MB where the index has the CPU build, about half a minute"
            [ -n "${EMTOOL_TORCH_INDEX:-}" ] || echo "    (several GB where it has only the CUDA build: set EMTOOL_TORCH_INDEX to an index of CPU builds)"
        fi
        $pip ${EMTOOL_TORCH_INDEX:+--index-url "$EMTOOL_TORCH_INDEX"} "$torch"
    fi
    local size="165 MB, one minute"
    [ "$kind" = dev ] && extras=dev size="300 MB with the test tools, two minutes"
    say "installing emtool and its other packages: about $size"
    [ -n "$gpu" ] && extras="${extras:+$extras,}cuda"
    $pip --editable ".${extras:+[$extras]}"
    echo "$wanted" >"$stamp"
}
