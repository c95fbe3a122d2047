#!/usr/bin/env bash
# Everything that needs a GPU, in one command that mostly takes under eight minutes, or in parts:
#
#     bench/gpu_check.sh [--dry-run] [--stages build,tests,sanitizers,bench] [OUT]
#
# Builds for this machine's GPU, runs tests/gpu, compute-sanitizer over a small set of calls, and the benches. A stage
# that fails or runs out of time does not stop the others. All that is worth keeping is left in OUT (default: $OUT, else
# gpu_check/), as it comes, with a summary in OUT/summary.txt. The exit status is that of the worst stage. Two stages
# more are for the trainer: training measures its steps, learning trains a detector with each loss in turn.
#
# The limits of all stages together are longer. Where a command may take ten minutes at most, in parts, the most
# important first; they add to OUT's summary and rows, and build in seconds what is built already. The first bench goes
# through every loss at N = 65536, 8192 and 512 and K = 1204, then again with torch.compile; the second through other
# widths. learning goes on where it was stopped while runs/ is there, as often as it is called.
#
#     bench/gpu_check.sh --stages build,tests OUT
#     bench/gpu_check.sh --stages build,sanitizers OUT
#     BENCH_S=360 bench/gpu_check.sh --stages build,bench OUT
#     export BENCH_ARGS="--profile full --columns 1203 1205 8192 21841 --dtypes float32 bfloat16 --eager"
#     BENCH_S=360 bench/gpu_check.sh --stages build,bench OUT
#     TRAINING_S=480 bench/gpu_check.sh --stages build,training OUT
#     bench/gpu_check.sh --stages build,learning OUT
#
# The machine needs Python 3.10+ with torch, setuptools and numpy, nvcc, a C++ compiler, and no network. It may lack
# packages that are not essential: put their wheels into wheels/ (pytest with pluggy, iniconfig, packaging and pygments;
# pytest-xdist with execnet; hypothesis with sortedcontainers; ninja; liger-kernel, quack-kernels; for the trainer what
# pyproject.toml has under detector, of which learning alone needs lvis or hotcoco), and they are installed to a temporary
# folder. Without pytest a plain script runs a part of the tests, without xdist they take longer, without ninja the
# build does.
#
# --dry-run goes through all stages on a machine without a GPU: it compiles for compute capability 9.0 and runs on the
# CPU what can run there.
#
# Variables: PYTHON (python3), MAX_JOBS, NVCC_FLAGS; GOL_KERNELS_COMMIT names the commit in the records where the tree
# has no repository; {BENCH,TRAINING,LEARNING}_ARGS are passed to `python -m bench {gpu,training,learning}`;
# {BUILD,TESTS,TRITON,SANITIZERS,BENCH,TRAINING,LEARNING}_S are the stages' limits in seconds. The benches add their
# rows to OUT/{gpu,training,learning}.jsonl.
set -uo pipefail
cd "$(dirname "$0")/.."

dry=0 stages=build,tests,sanitizers,bench out=${OUT:-gpu_check}
while (($#)); do
    case $1 in
        --dry-run) dry=1 ;;
        --stages) stages=$2 && shift ;;
        -*) sed -n '2,5p' "$0" >&2 && exit 2 ;;
        *) out=$1 ;;
    esac
    shift
done
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
summary=$out/summary.txt
for stage in ${stages//,/ }; do
    case $stage in
        build | sanitizers) rm -f "$out/$stage.log" ;;
        tests) rm -f "$out"/tests{.log,-cuda.xml,-triton.xml} ;;
        bench | training | learning) rm -f "$out/$stage.log" ;;
        *) echo "no stage $stage" >&2 && exit 2 ;;
    esac
done

python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=$work/triton TORCHINDUCTOR_CACHE_DIR=$work/inductor
export PYTHONPATH=${PYTHONPATH:-}
jobs=$(env -u OMP_NUM_THREADS nproc)
worst=0

say() { printf '%s\n' "$*" | tee -a "$summary"; }
wanted() { [[ ,$stages, == *,$1,* ]]; }
has() { "$python" -c "import $1" >/dev/null 2>&1; }

# stage NAME LIMIT_S LOG COMMAND...: runs it with its output in LOG, and adds its verdict to the summary
stage() {
    local name=$1 limit=$2 log=$3 begin=$SECONDS status=0 verdict=PASS
    shift 3
    # SIGINT first: pytest then still says what failed so far.
    timeout --signal=INT --kill-after=10 "$limit" "$@" >>"$log" 2>&1 || status=$?
    case $status in
        0) ;;
        124 | 137) verdict="TIMEOUT after $limit s" ;;
        *) verdict="FAIL, status $status" ;;
    esac
    ((status > worst)) && worst=$status
    say "$(printf '%-24s %4d s  %s' "$name" $((SECONDS - begin)) "$verdict")"
    return $status
}

prepare() {
    if compgen -G 'wheels/*.whl' >/dev/null; then
        "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/site" wheels/*.whl ||
            say "wheels/ could not be installed"
        PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH} PATH=$work/site/bin:$PATH
    fi
    if ! command -v ninja >/dev/null && has ninja; then
        PATH=$("$python" -c 'import ninja; print(ninja.BIN_DIR)'):$PATH
    fi
    command -v ninja >/dev/null || say "no ninja: one file is compiled after the other"
    if ((dry)); then
        arch=9.0
    else
        arch=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))') ||
            { say "torch sees no GPU"; exit 1; }
        nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv |
            tee -a "$summary"
    fi
    say "$(date -u +%FT%TZ) stages $stages"
    say "compute capability $arch, $("$python" --version), $(nvcc --version 2>/dev/null | tail -n 1), $jobs CPUs"
}

build() {
    local limit=150
    command -v ninja >/dev/null || limit=420
    ((dry)) && limit=1800
    export TORCH_CUDA_ARCH_LIST=$arch GOL_KERNELS_FORCE_CUDA=1 GOL_KERNELS_FORCE_EXT=1
    export NVCC_FLAGS=${NVCC_FLAGS:--Xptxas=-v}
    stage build "${BUILD_S:-$limit}" "$out/build.log" "$python" setup.py build_ext --inplace
    "$python" -m gol_kernels.info 2>&1 | tee -a "$summary"
    ((dry)) || stage "both backends on CUDA" 60 "$out/build.log" "$python" -c '
from gol_kernels.backends import choose
print(*(choose("bernoulli_loss", "cuda", backend) for backend in ("native", "triton")), sep="\n")'
}

tests() {
    local limit=${TESTS_S:-140} parallel=() device=()
    # Triton and Inductor compile in every worker: more threads of theirs would only get in each other's way.
    export OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
    if ! has pytest; then
        say "no pytest: a small set of calls instead of tests/gpu"
        ((dry)) && device=(--device cpu)
        for backend in native $( ((dry)) || echo triton); do
            stage "small set, $backend" "$limit" "$out/tests.log" \
                "$python" -m tests.gpu.small_set --backend "$backend" --all "${device[@]}"
        done
        return
    fi
    has xdist && parallel=(-n $((jobs > 3 ? jobs - 2 : 1)) --dist worksteal)
    local pytest=("$python" -m pytest tests/gpu -q --tb=short --durations=15 -p no:cacheprovider)
    if ((dry)); then
        stage "tests/gpu, collected" "$limit" "$out/tests.log" "${pytest[@]}" --collect-only
        export GOL_KERNELS_TEST_DEVICE=cpu
        stage "tests/gpu, some" $((3 * limit)) "$out/tests.log" "${pytest[@]}" "${parallel[@]}" \
            -k "test_table or test_label_counts or test_alignment or test_used_memory or test_illegal"
    else
        # Apart: Triton's take a compilation each, and should not keep the others from an end.
        stage "tests/gpu, CUDA" "$limit" "$out/tests.log" "${pytest[@]}" "${parallel[@]}" -k "not triton" \
            --junitxml="$out/tests-cuda.xml"
        stage "tests/gpu, Triton" "${TRITON_S:-140}" "$out/tests.log" "${pytest[@]}" "${parallel[@]}" -k triton \
            --junitxml="$out/tests-triton.xml"
    fi
    unset OMP_NUM_THREADS TORCHINDUCTOR_COMPILE_THREADS GOL_KERNELS_TEST_DEVICE
    grep -E '^(FAILED|ERROR|SKIPPED)|(passed|failed|skipped).* in [0-9]|no tests (ran|collected)' "$out/tests.log" |
        cut -c 1-200 | head -n 80 >>"$summary"
}

# sanitizers: every tool on every backend at once; they take long by themselves, and no time is measured here
sanitizers() {
    local limit=${SANITIZERS_S:-190} tool backend names=() calls=(-m tests.gpu.small_set)
    # Every tensor an allocation of its own: memcheck sees what is read one byte beyond it.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    if ((dry)); then
        command -v compute-sanitizer >/dev/null || say "no compute-sanitizer here: the small set without it"
        stage "small set, reference" "$limit" "$out/sanitizers.log" \
            "$python" "${calls[@]}" --backend reference --device cpu
        unset PYTORCH_NO_CUDA_MEMORY_CACHING
        return
    fi
    for tool in memcheck racecheck; do
        for backend in native triton; do
            names+=("$tool-$backend")
            (
                summary=$work/$tool-$backend.summary worst=0
                stage "$tool, $backend" "$limit" "$work/$tool-$backend.log" compute-sanitizer --tool "$tool" \
                    --target-processes application-only --error-exitcode 9 --print-limit 20 \
                    "$python" "${calls[@]}" --backend "$backend"
            ) >/dev/null &
        done
    done
    wait
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
    for name in "${names[@]}"; do
        printf '=== %s\n' "$name" >>"$out/sanitizers.log"
        tail -c 2000000 "$work/$name.log" >>"$out/sanitizers.log"
        tee -a "$summary" <"$work/$name.summary"
        grep -E 'ERROR SUMMARY|RACECHECK SUMMARY|failures in' "$work/$name.log" | tee -a "$summary"
        grep -q PASS "$work/$name.summary" || worst=$((worst > 1 ? worst : 1))
    done
}

bench() {
    local limit=${BENCH_S:-120} how=(--budget-s $((${BENCH_S:-120} - 30)))
    ((dry)) && how=(--dry-run --eager --rounds 1 --min-ms 0.05)
    # shellcheck disable=SC2086  # BENCH_ARGS are words
    stage bench "$limit" "$out/bench.log" \
        "$python" -m bench gpu --records "$out/gpu.jsonl" "${how[@]}" ${BENCH_ARGS:-}
    grep -E '^(PASS|FAIL|absent|time is used up)|^  refused' "$out/bench.log" | tee -a "$summary"
    ((dry)) || stage plot 60 "$out/bench.log" \
        "$python" -m bench plot --only gpu --gpu-records "$out/gpu.jsonl" --folder "$out"
}

# training: the trainer's step, in the same waiting policy as `python -m detector` sets
training() {
    local limit=${TRAINING_S:-300} how=(--budget-s $((${TRAINING_S:-300} / 2)) --records "$out/training.jsonl")
    ((dry)) && how=(--dry-run)
    # shellcheck disable=SC2086  # TRAINING_ARGS are words
    OMP_WAIT_POLICY=PASSIVE stage training "$limit" "$out/training.log" \
        "$python" -m bench training "${how[@]}" ${TRAINING_ARGS:-}
    grep -aE '^(FAIL|time is used up)|images/s, step|^  (device_ms|host_ms|bound)' "$out/training.log" | tee -a "$summary"
}

# learning: runs side by side, since one of them does not fill a big GPU
learning() {
    local limit=${LEARNING_S:-540} how=(--config synthetic_1203 --jobs 4 --records "$out/learning.jsonl")
    how+=(--budget-s $((limit - 60)))
    ((dry)) && how=(--losses gumbel --seeds 0 --folder "$work/learning" --records "$work/learning.jsonl"
        --set synthetic.{num_train=12,num_val=4,num_classes=3,image_size=64} data.{min_sizes=[64],test_size=64}
        train.{max_steps=2,milestones=[1],batch_size=2} model.fpn_channels=32)
    # shellcheck disable=SC2086  # LEARNING_ARGS are words
    OMP_WAIT_POLICY=PASSIVE stage learning "$limit" "$out/learning.log" \
        "$python" -m bench learning "${how[@]}" ${LEARNING_ARGS:-}
    grep -aE '^\||exit status|runs finished' "$out/learning.log" | tee -a "$summary"
}

prepare
wanted build && build
if wanted tests && wanted sanitizers && ((!dry)); then
    # Neither measures time, and both mostly wait for compilers.
    (summary=$work/sanitizers.summary worst=0; sanitizers >/dev/null; exit $worst) &
    tests
    wait $! || worst=$((worst > 1 ? worst : 1))
    tee -a "$summary" <"$work/sanitizers.summary"
else
    wanted tests && tests
    wanted sanitizers && sanitizers
fi
wanted bench && bench
wanted training && training
wanted learning && learning
say "$SECONDS s in all; worst status $worst; see $out"
exit "$worst"
