#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has one and little else: no network, nothing of ours installed.
#
#   bench/gpu.sh [--quick] [--skip PART]... [PART]...        parts, in this order: build tests kernels step rollout matcher
#
# build     installs this checkout in place and compiles pr1._C        step      bench/step.py      a benchmark that is
# tests     the tests marked `gpu`                                     rollout   bench/rollout.py   not in the checkout is
# kernels   bench/kernels.py                                           matcher   bench/matcher.py   passed over
#
# Needs a python with torch, transformers, numpy, scipy, pillow, setuptools, cmake, ninja, and a C++17 compiler. Packages
# that may be missing there (pybind11, numba, pycocotools, pytest, and the peers liger-kernel, trl, datasets,
# cut-cross-entropy, lapx) can be laid as wheels into a folder that PR1_WHEELS names: the build part unpacks them into
# build/gpu-site. A peer that is missing is a line in its table; a test file that cannot be imported is an error.
#
# PYTHON  interpreter (python3)           OUT    folder of results (bench/results): gpu.jsonl, PART.jsonl and PART.log
# LIMIT   seconds a part may take (570)   Parts can be run one call at a time; what build made is found again.
# Ends with the last lines of each part. Exit status 1 if a part failed or ran out of time.
set -u
cd "$(dirname "$0")/.." || exit 1

all="build tests kernels step rollout matcher"
python=${PYTHON:-python3} out=${OUT:-bench/results} limit=${LIMIT:-570}
quick='' skip=' ' parts=''
while [ $# -gt 0 ]; do
    case $1 in
    --quick) quick=--quick ;;
    --skip) shift && skip="$skip${1:-} " ;;
    *) parts="$parts $1" ;;
    esac
    shift
done
for part in $parts $skip; do
    case " $all " in *" $part "*) ;; *) echo "gpu.sh: no part is called '$part'; they are: $all" >&2 && exit 2 ;; esac
done
mkdir -p "$out" build || exit 1
out=$(cd "$out" && pwd)
export PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore
export PYTHONPATH="$PWD/build/gpu-site${PYTHONPATH:+:$PYTHONPATH}"

build() {
    if [ -n "${PR1_WHEELS:-}" ]; then
        "$python" -m pip install -q --no-index --no-deps --upgrade --target build/gpu-site "$PR1_WHEELS"/*.whl || return 1
    fi
    "$python" -m pip install -q --no-index --no-deps --no-build-isolation -e . || return 1
    "$python" -c 'import pr1._C, pr1.kernels, torch; print("built", pr1._C.__file__, "for torch", torch.__version__)'
}

gpu_tests() {
    files=$(grep -lE 'mark\.gpu|marks=.*gpu' tests/test_*.py) || { echo "no test is marked gpu" && return 0; }
    # shellcheck disable=SC2086
    "$python" -m pytest -q -m gpu -p no:cacheprovider $files
    code=$?
    [ "$code" -eq 5 ] && echo "no test is marked gpu" && return 0
    return "$code"
}

bench() {
    "$python" "bench/$1.py" $quick --out "$out/$1.jsonl"
}

# A part in a process group of its own, ended as a whole when its time is up.
run_part() {
    case $1 in
    build | tests) body=$([ "$1" = tests ] && echo gpu_tests || echo build) ;;
    *) body="bench $1" ;;
    esac
    export python out quick
    export -f build gpu_tests bench
    timeout --kill-after=20 "$limit" bash -c "$body" >"$out/$1.log" 2>&1
}

record() { # part, status, seconds
    "$python" - "$@" >>"$out/gpu.jsonl" <<'PY' || true
import json, subprocess, sys
part, status, seconds = sys.argv[1:]
line = {"part": part, "status": status, "seconds": int(seconds)}
try:
    from pr1.environment import environment
    line["environment"] = environment()
except ImportError as error:
    line["environment"] = f"unknown: {error}"
try:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
    line["gpus"] = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.split("\n")[:-1]
except (OSError, subprocess.TimeoutExpired):
    line["gpus"] = []
print(json.dumps(line))
PY
}

failed=0 ran='' table=''
for part in ${parts:-$all}; do
    case $skip in *" $part "*) table="$table$(printf '%-8s  skipped' "$part")"$'\n' && continue ;; esac
    if [ "$part" != build ] && [ "$part" != tests ] && [ ! -e "bench/$part.py" ]; then
        table="$table$(printf '%-8s  bench/%s.py is not here' "$part" "$part")"$'\n' && continue
    fi
    echo "[gpu.sh] $part ..."
    start=$SECONDS
    run_part "$part"
    code=$?
    case $code in 0) status=ok ;; 124 | 137) status="out of time ($limit s)" ;; *) status="failed ($code)" ;; esac
    [ "$code" -eq 0 ] || failed=1
    table="$table$(printf '%-8s  %-18s %4d s  %s' "$part" "$status" $((SECONDS - start)) "$out/$part.log")"$'\n'
    ran="$ran $part"
    record "$part" "$status" $((SECONDS - start))
    [ "$part" = build ] && [ "$code" -ne 0 ] && break
done

for part in $ran; do
    printf '\n==== %s\n' "$part"
    tail -n 28 "$out/$part.log" | cut -c1-160
done
printf '\n%s' "$table"
exit $failed
