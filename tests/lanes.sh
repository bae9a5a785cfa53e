#!/usr/bin/env bash
# Cases of the compiled kernels on the emulator: both warp widths, orders of threads, and under the
# sanitizers, whose runtimes must be there before Python is. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD OMP_NUM_THREADS=1

lane() {  # OPTIONS [RUNTIME [PATTERNS]]
    echo "== simt, $1"
    KERNELHUB_SIMT=$1 LD_PRELOAD=${2:-} "$python" tests/vendor/run_cases.py simt cpu "${3:-*}"
}

# ThreadSanitizer takes about a millisecond a GPU thread. Every kernel, scheme and RMSNorm is there
# once with few rows: tails, groups, masked experts, the sum over slots, one block a row and, at 128
# lanes, several: that case alone takes minutes.
races='rotary_embedding/*,fused_mul_add/*'
races+=',fused_gemv/*-k257*,fused_gemv/*-k129*,fused_gemv/*-m1,fused_gemv/int4-g32-*,fused_gemv/*-norm'
races+=',fused_moe_gemv/*n9-k257,fused_moe_gemv/int4-n9-k514,fused_moe_gemv/every-code-*'
races+=',fused_moe_gemv/ids-masked-*-shared,fused_moe_gemv/ids-duplicates-reduce-swiglu'
races+=',top_k_top_p_sampling_from_probs/misaligned-*'
races+=',top_k_top_p_sampling_from_probs/token-is-target-v129'

# What moves memory in another way, and not the cases of sampling that differ in numbers alone, which
# take most of the time.
accesses='rotary_embedding/*,fused_mul_add/*,fused_gemv/*,fused_moe_gemv/*,*/long-rows-*'
for layout in every_second expanded misaligned padded_rows transposed indices requests token-is misleading; do
    accesses+=",top_k_top_p_sampling_from_probs/$layout*"
done

for warp in 32 128; do
    lane "warp=$warp,order=forward"
    for order in reverse random:1; do
        lane "warp=$warp,order=$order" "" "$accesses"
    done
    # One OS thread: shared memory is then plain memory, whose edges AddressSanitizer sees.
    ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 \
        lane "warp=$warp,sanitize=address" "$(g++ -print-file-name=libasan.so)" "$accesses"
    # A race of two GPU threads is a data race; exit code 66 fails the lane.
    TSAN_OPTIONS=exitcode=66:report_signal_unsafe=0:ignore_noninstrumented_modules=1 \
        lane "warp=$warp,sanitize=thread,threads=2" "$(g++ -print-file-name=libtsan.so)" \
        "$races$([ "$warp" = 128 ] && echo ',*/long-rows-joint')"
done
