#!/usr/bin/env bash
# Every case of the compiled kernels on the emulator: both warp widths, every order of threads, and
# under the sanitizers, whose runtimes must be there before Python is; then the share of the kernels'
# lines that the cases execute. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD OMP_NUM_THREADS=1

lane() {  # OPTIONS [RUNTIME [CASES]]
    echo "== simt, $1"
    KERNELHUB_SIMT=$1 LD_PRELOAD=${2:-} "$python" tests/vendor/run_cases.py simt cpu "${3:-*}"
}

for warp in 32 128; do
    for order in forward reverse random:1 random:2; do
        lane "warp=$warp,order=$order"
    done
    # One OS thread: shared memory is then plain memory, whose edges AddressSanitizer sees.
    ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 \
        lane "warp=$warp,sanitize=address" "$(g++ -print-file-name=libasan.so)"
    # A race of two GPU threads is a data race; exit code 66 fails the lane. Slow: a part at 128.
    TSAN_OPTIONS=exitcode=66:report_signal_unsafe=0:ignore_noninstrumented_modules=1 \
        lane "warp=$warp,sanitize=thread,threads=2" "$(g++ -print-file-name=libtsan.so)" \
        "$([ "$warp" = 32 ] && echo '*' || echo '*bfloat16*')"
done

echo "== coverage"
"$python" -m tests.kernel_coverage
