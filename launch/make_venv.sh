#!/bin/sh
# make_venv.sh DIR: a virtual environment in DIR, with torch. `make` starts it; it checks the machine before it installs anything.
#
# PYTHON: the interpreter. Default: the first of python3, python3.13, python3.12 and python3.11 that will do.
# TORCH:  what pip is asked for, such as torch==2.12.0. Default: torch 2.13.0, and the build for the CPU where there is no GPU.
set -eu

venv=$1
version=2.13.0
cpu_index=https://download.pytorch.org/whl/cpu

refuse() {
    echo "tpserve: $1" >&2
    exit 2
}

system=$(uname -s)
machine=$(uname -m)
[ "$system" = Linux ] || refuse "it runs on Linux, and this is $system: use a Linux machine, a virtual machine or a container (launch/docker)"
case $machine in
    x86_64 | aarch64) ;;
    *) refuse "torch is built for x86_64 and aarch64, and this machine is $machine" ;;
esac
for libc in /lib/ld-musl-*; do
    [ ! -e "$libc" ] || refuse "torch is built for glibc, and this system has musl: use Debian, Ubuntu, Fedora or the like, or a container of one"
done

will_do() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }

python=${PYTHON:-}
if [ -z "$python" ]; then
    for name in python3 python3.13 python3.12 python3.11; do
        if will_do "$name"; then
            python=$name
            break
        fi
    done
    [ -n "$python" ] || refuse "it needs Python 3.11, 3.12 or 3.13, and python3 is $(python3 --version 2>/dev/null || echo not there): install one of them (with its venv module), or name it: make PYTHON=/path/to/python3.12"
fi
will_do "$python" || refuse "it needs Python 3.11, 3.12 or 3.13, and $python is $("$python" --version 2>&1 || true): name another one, as in make PYTHON=python3.12"
"$python" -c 'import ensurepip, venv' 2>/dev/null || refuse "$python has no venv module: install it (Debian, Ubuntu: apt-get install python3-venv)"

echo "making $venv with $("$python" --version)"
"$python" -m venv "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check"

has_gpu() { [ -e /proc/driver/nvidia/version ] || nvidia-smi -L >/dev/null 2>&1; }
answers() { "$python" -c 'import sys, urllib.request as u; u.urlopen(u.Request(sys.argv[1], method="HEAD"), timeout=5)' "$cpu_index/torch/" 2>/dev/null; }

if [ -n "${TORCH:-}" ]; then
    echo "installing $TORCH"
    exec $pip install "$TORCH"
fi
if has_gpu; then
    echo "installing torch $version"
elif answers; then
    echo "installing torch $version for the CPU: this machine has no NVIDIA GPU (TORCH=torch==$version takes the other build)"
    if $pip install --no-deps --index-url "$cpu_index" "torch==$version+cpu"; then
        exit 0
    fi
    echo "that did not work: taking torch $version from where pip looks by itself"
else
    echo "installing torch $version from where pip looks by itself: $cpu_index does not answer, so this may be the large build"
fi
exec $pip install "torch==$version"
