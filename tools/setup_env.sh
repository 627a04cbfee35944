#!/bin/sh
# Makes .venv, installs the pinned packages and builds pr1._C, as far as each is missing or out of date. Called by make.
# Safe to interrupt and to run again: a step leaves its stamp only after it has succeeded, and what a killed step left
# is thrown away. PYTHON=... names the interpreter, CXX=... the compiler.
set -u
cd "$(dirname "$0")/.." || exit 1
trap 'exit 130' INT TERM # pip answers Ctrl-C with an ordinary failure; nothing after it may run then

root=$(pwd -P)
venv=.venv
busy=$venv/.busy              # present while the environment is being changed; left behind only by a kill
oldest_triton=$venv/triton-3.6
installed=$venv/.installed    # what was installed, and where
built=$venv/.built            # the sources pr1._C was built from
pip="$venv/bin/python -m pip --disable-pip-version-check"

print_version='import sys; print("%d.%d" % sys.version_info[:2])'

say() { printf '[setup] %s\n' "$*"; }
fail() {
    printf '\n[setup] FAILED: %s\n' "$1" >&2
    shift
    for line in "$@"; do printf '[setup]   %s\n' "$line" >&2; done
    exit 1
}

# Sets $python to the first interpreter that will do: 3.11 or 3.12, able to make virtual environments, with headers.
find_python() {
    python='' seen='' no_venv='' no_headers=''
    for candidate in ${PYTHON:-python3.12 python3.11 python3 python}; do
        version=$("$candidate" -c "$print_version" 2>/dev/null) || continue
        seen="$seen $candidate is $version;"
        case $version in 3.11 | 3.12) ;; *) continue ;; esac
        "$candidate" -c 'import venv, ensurepip' 2>/dev/null || { no_venv=$version && continue; }
        headers=$("$candidate" -c 'import sysconfig; print(sysconfig.get_path("include"))')
        [ -e "$headers/Python.h" ] || { no_headers=$version && continue; }
        python=$candidate
        return
    done
    if [ -n "$no_venv" ]; then
        fail "Python $no_venv cannot make virtual environments: its venv or ensurepip module is missing." \
            "On Debian or Ubuntu: sudo apt-get install python$no_venv-venv" \
            "or name another Python 3.11 or 3.12: make ... PYTHON=/path/to/python"
    elif [ -n "$no_headers" ]; then
        fail "Python $no_headers has no headers (Python.h), which the C++ module pr1._C needs." \
            "On Debian or Ubuntu: sudo apt-get install python$no_headers-dev" \
            "or name another Python 3.11 or 3.12: make ... PYTHON=/path/to/python"
    elif [ -n "${PYTHON:-}" ]; then
        fail "Python 3.11 or 3.12 is needed, but:${seen:- PYTHON=$PYTHON does not run}" \
            "Name another one, or leave PYTHON out: python3.12, python3.11 and python3 are tried in this order."
    fi
    fail "Python 3.11 or 3.12 is needed. Found:${seen:- no Python at all}" \
        "Install one (Debian or Ubuntu: sudo apt-get install python3.11 python3.11-venv python3.11-dev)" \
        "or say where it is: make ... PYTHON=/path/to/python3.11"
}

check_compiler() {
    for candidate in ${CXX:-c++ g++ clang++}; do
        if echo '#include <vector>
int main() { return 0; }' | "$candidate" -std=c++17 -x c++ -fsyntax-only - >/dev/null 2>&1; then
            CXX=$candidate
            export CXX
            return
        fi
    done
    fail "no C++17 compiler: none of '${CXX:-c++ g++ clang++}' compiles a C++ program." \
        "On Debian or Ubuntu: sudo apt-get install g++" \
        "or say where one is: make ... CXX=/path/to/g++"
}

# The environment is whole, was made at this path (its scripts name it) and, if PYTHON is given, with that version.
venv_is_sound() {
    [ ! -e "$busy" ] && [ -x "$venv/bin/python" ] || return 1
    case $("$venv/bin/python" -c "import pip; $print_version" 2>/dev/null) in 3.11 | 3.12) ;; *) return 1 ;; esac
    [ ! -e "$installed" ] || grep -qxF "path $root/$venv" "$installed" || return 1
    [ -z "${PYTHON:-}" ] ||
        [ "$("$PYTHON" -c "$print_version" 2>/dev/null)" = "$("$venv/bin/python" -c "$print_version")" ]
}

make_venv() {
    find_python
    if [ -e "$venv" ]; then
        say "1/3 $venv is unfinished or does not fit: making it again with $python ($version)"
        rm -rf "$venv"
    else
        say "1/3 making $venv with $python ($version)"
    fi
    mkdir -p "$venv" && : >"$busy" && "$python" -m venv "$venv" ||
        fail "$python could not make $venv; its message is above."
    rm -f "$busy"
}

install_packages() {
    say "2/3 installing the packages of requirements.txt (the first time takes minutes)"
    before=$(ls "$venv"/lib/python*/site-packages)
    : >"$busy"
    $pip install -r requirements.txt || {
        # pip downloads everything before it changes anything: without a network the environment is as it was.
        [ "$before" = "$(ls "$venv"/lib/python*/site-packages)" ] && rm -f "$busy"
        fail "pip could not install the packages; its message is above." \
            "Without a network, or after a broken download, run the same command again once the network is there:" \
            "it continues, and what was downloaded is not downloaded again." \
            "Behind a mirror or proxy, set PIP_INDEX_URL or HTTPS_PROXY."
    }
    rm -f "$busy"
    { echo "path $root/$venv" && cksum <requirements.txt; } >"$installed.new" && mv "$installed.new" "$installed"
}

# The oldest Triton the kernels must compile with, beside the installed one, for tests/test_sm90.py.
install_oldest_triton() {
    say "2/3 installing triton 3.6.0 into $oldest_triton, for the tests"
    rm -rf "$oldest_triton.new"
    $pip install --quiet --no-deps --target "$oldest_triton.new" triton==3.6.0 &&
        rm -rf "$oldest_triton" && mv "$oldest_triton.new" "$oldest_triton" ||
        fail "pip could not install triton 3.6.0; its message is above. Run the same command again."
}

build_module() {
    say "3/3 building the C++ module pr1._C with $CXX"
    rm -f "$built"
    $pip install --quiet --no-build-isolation --no-deps --editable . ||
        fail "pr1._C could not be built; the compiler's message is above." \
            "After mending the cause, run the same command again."
    echo "$sources" >"$built.new" && mv "$built.new" "$built"
}

# One set-up at a time. The lock ends with the last process that holds the file open, pip and the compiler included.
exec 9<tools/setup_env.sh
if command -v flock >/dev/null 2>&1 && ! flock -n 9; then
    say "another set-up is at work here; waiting for it"
    flock 9
fi
venv_is_sound || make_venv
if ! [ "$(cksum <requirements.txt)" = "$(sed 1d "$installed" 2>/dev/null)" ]; then
    check_compiler # before the long download, not after it
    install_packages
fi
if [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] && ! [ -e "$oldest_triton" ]; then
    install_oldest_triton
fi
sources=$(cksum csrc/* CMakeLists.txt setup.py pyproject.toml)
module_loads() { (cd / && "$root/$venv/bin/python" -c 'import pr1._C' 2>/dev/null); }
if ! { [ "$sources" = "$(cat "$built" 2>/dev/null)" ] && module_loads; }; then
    check_compiler
    build_module
fi
say "$venv, its packages and pr1._C are up to date"
